"""What is unusual about a call, and whether a candidate that fails on it simply does not do such calls.

A kernel may be written for real arrays (or, where those are usual, for complex ones), for one batch axis, for one of the
shapes that an argument may have, for sequences of at least one step. Where every call of such a trait makes it raise, and
others pass, the trait is not applicable and is said to be; of empty sequences (the state after the last step is the
natural one) and of arrays that are not contiguous (some strides may do), where some calls do. A wrong number is never excused.
"""

from collections.abc import Callable

import numpy as np

from refimpl.conformance.cases import default_sizes
from refimpl.conformance.invoke import TWICE
from refimpl.conformance.report import Report
from refimpl.conformance.shapes import shared
from refimpl.op import Op

COMPLEX = "complex arrays"
STRIDED = " inputs"
OF_ONE_SIDE = "gradients of "  # one optional array where another is not given
OF_ONE_ALONE = "the gradient of one argument alone"
_USUAL: dict[Callable, tuple[dict, frozenset]] = {}


def _usual(op: Op) -> tuple[dict, frozenset]:
    if op.sample not in _USUAL:  # an operator of a reader's own is in no catalogue
        _USUAL[op.sample] = _drawn(op)
    return _USUAL[op.sample]


def _drawn(op: Op) -> tuple[dict, frozenset]:
    call = op.sample(np.random.default_rng(0), **default_sizes(op))
    arrays = {a.name.partition(".")[0] for a in op.contract.arrays}
    call = {n: v for n, v in call.items() if n in arrays}
    return op.contract.layout(**call), frozenset(n for n, v in call.items() if _complex(v))


def traits(op: Op, call: dict, view: str = "contiguous") -> tuple[str, ...]:
    """The unusual things about a call, in words."""
    arrays = {n: v for n, v in call.items() if n in {a.name.partition(".")[0] for a in op.contract.arrays}}
    layout, complex_names = _usual(op)
    found = []
    if any(_complex(v) and n not in complex_names for n, v in arrays.items()):
        found.append(COMPLEX)
    found += [f"a real {n}" for n, v in arrays.items() if n in complex_names and v is not None and not _complex(v)]
    for name, axes in op.contract.layout(**arrays).items():
        if axes != layout.get(name, axes):
            found.append(f"{name} of shape ({', '.join(['...', *axes]) if axes else ''})")
    found += shared(op, call)
    found += empty(op, call)
    found += [f"{view}{STRIDED}"] if view != "contiguous" else []
    _, batch = op.contract.sizes(**arrays)
    found.append({0: "no batch axis", 1: "one batch axis"}.get(len(batch), f"{len(batch)} batch axes"))
    return tuple(found)


def empty(op: Op, call: dict) -> list[str]:
    """The lengths of a call that are 0, in words."""
    sizes, _ = op.contract.sizes(**{n: v for n, v in call.items() if n in {a.name.partition(".")[0] for a in op.contract.arrays}})
    none = [letter for letter in op.lengths if sizes.get(letter) == 0]
    return [*(f"{letter} = 0" for letter in none), *([" = ".join([*none, "0"])] if len(none) > 1 else [])]


def real_parts(call: dict) -> dict:
    """The call with imaginary parts dropped, as code does that has no notion of them."""
    return {n: np.ascontiguousarray(v.real) if _complex(v) else v for n, v in call.items()}


def excuse(report: Report) -> None:
    """Turn failures that share a trait into "not applicable": one of which no call works, or that may be refused now and then."""
    for trait in dict.fromkeys(t for c in report.failures for t in c.traits):
        having = [c for c in report.cases if trait in c.traits and c.status != "NOT_APPLICABLE"]
        if not trait.startswith((OF_ONE_SIDE, OF_ONE_ALONE, TWICE)):
            having = [c for c in having if not (c.klass == "gradients" and c.status == "PASS")]
        if trait.endswith((" = 0", STRIDED)):
            having = [c for c in having if c.status != "PASS"]
        lacking = [c for c in report.cases if trait not in c.traits]
        if having and all(c.excusable for c in having) and any(c.status == "PASS" and c.klass != "laws" for c in lacking):
            for c in having:
                c.status, c.message = "NOT_APPLICABLE", f"does not take {trait}: {c.message}"
            report.not_checked.append(trait)


def _complex(value) -> bool:
    return any(isinstance(v, np.ndarray) and v.dtype.kind == "c" for v in (value if isinstance(value, tuple) else (value,)))
