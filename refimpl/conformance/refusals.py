"""What a candidate refuses, and whether that leaves enough to say that it conforms.

A refused call (NotImplementedError) is not a pass. It is no failure either where it follows a rule that can be named: an
option or an optional array, a shape of an argument, complex numbers, a number of batch axes, strides, a size of 0 or 1, or
two of these together. Such rules are listed under "not checked". What remains are refusals of calls that differ from
answered ones in values or sizes alone. A function that refuses whatever it would get wrong looks like that; whoever means
it says so with `domain`. Where they are more than a few, the verdict is "inconclusive".
"""

import itertools
from collections import Counter
from typing import Any

import numpy as np

from refimpl.conformance.cases import Case, default_sizes, parameters
from refimpl.conformance.domain import ALIKE
from refimpl.conformance.report import Report, Result
from refimpl.conformance.traits import COMPLEX
from refimpl.op import Op

FEW = 0.1  # of all calls that no rule sets aside
EXCEPTIONS = 0.15  # of the refused calls that a rule of one feature covers
_PAIRS_NEED = 4  # refused calls that a rule of two must cover, lest it be found by chance
_RULES = 8  # rules of two, likewise


def features(op: Op, case: Case, call: dict[str, Any], unusual: tuple[str, ...]) -> tuple[str, ...]:
    """What a rule of refusal may speak of, in words; `unusual` are the call's traits."""
    _, optional, options = parameters(op)
    found = [name if call.get(name) is not None else f"no {name}" for name in optional]
    if op.stateful:
        found += ["state" if call.get("state") is not None else "no state", "return_state" if call.get("return_state") else "no return_state"]
    for name, default in options.items():
        value = call.get(name, default)
        found.append(f"{name}={getattr(value, '__name__', value)!s}" if not isinstance(value, float | np.ndarray) else name)
    arrays = {a.name.partition(".")[0] for a in op.contract.arrays}
    layout = op.contract.layout(**{n: v for n, v in call.items() if n in arrays})
    found += [f"{name} of shape ({', '.join(axes)})" for name, axes in layout.items()]
    found += unusual if COMPLEX in unusual else ("real arrays", *unusual)
    sizes = {letter: size for letter, size in case.sizes.items() if isinstance(size, int)}
    usual = default_sizes(op)
    found += [f"{letter} = {size}" for letter, size in sizes.items() if size < min(2, usual.get(letter, 2))]  # groups are one anyhow
    for a, b in itertools.combinations(op.lengths, 2):
        if sizes.get(a) != sizes.get(b):
            found.append(f"{a} {'<' if sizes[a] < sizes[b] else '>'} {b}")
    found += [f"{a} other than {b}" for a, b in ALIKE if a in sizes and b in sizes and sizes[a] != sizes[b]]
    return tuple(dict.fromkeys([*found, *(["strides"] if case.view != "contiguous" else [])]))


def weigh(report: Report) -> None:
    """Name the rules of what was refused; and where too much follows none, say so as the reason for no verdict."""
    rules: dict[str, list[str]] = {}
    stray: dict[str, tuple[list[Result], int]] = {}
    precisions = list(dict.fromkeys(c.dtype for c in report.cases))
    for dtype in precisions:
        asked = [c for c in report.cases if c.dtype == dtype and c.features]
        refused, answered = [c for c in asked if c.status == "NOT_APPLICABLE"], [c for c in asked if c.status != "NOT_APPLICABLE"]
        if not refused:
            continue
        if not answered:
            rules.setdefault(dtype, []).append(dtype)
            continue
        for exceptions in (EXCEPTIONS, 0.0):  # where little is answered, all of it may be taken for exceptions
            found, left = _rules(refused, answered, exceptions)
            telling = [c for c in answered if not _trivial(c.features) and not any(rule <= set(c.features) for rule in found)]
            if telling:
                break
        else:
            found, left = [], refused
        if telling and not exceptions and not report.reason:
            names = ", ".join(" with ".join(sorted(rule)) for rule in found[:3])
            report.reason = f"it answers {len(answered)} of {len(asked)} calls in {dtype} and refuses {names}; with domain= more are made of what it supports"
        for rule in found:
            rules.setdefault(" with ".join(sorted(rule, key=lambda f: (f.startswith("no "), f))), []).append(dtype)
        if left:
            stray[dtype] = left, len(telling)
    gradients = [c for c in report.cases if c.klass == "gradients"]
    if gradients and all(c.status == "NOT_APPLICABLE" for c in gradients):
        report.not_checked.append("gradients (it refuses)")
        report.reason = report.reason or f"gradients were asked for, and none was given: {gradients[0].message}"
    known = ", ".join(report.not_checked)
    for rule, where in rules.items():
        if rule not in known:
            only = "" if rule in where or len(where) == len(precisions) else f" in {', '.join(where)}"
            report.not_checked.append(f"{rule}{only} (it refuses)")
    for dtype, (left, answered) in stray.items():
        words = f"{len(left)} of {len(left) + answered} calls in {dtype} that differ from answered ones in sizes or values alone, {left[0].id} for one ({left[0].message})"
        report.notes.append(f"it refuses {words}")
        if len(left) > FEW * (len(left) + answered) and not report.reason:
            report.reason = f"it refuses {words}; what it supports is said with domain="


def _trivial(found: tuple[str, ...]) -> bool:
    """Whether there is a size of 0 or 1 among features."""
    return any(f.endswith((" = 0", " = 1")) for f in found)


def _rules(refused: list[Result], answered: list[Result], exceptions: float) -> tuple[list[set[str]], list[Result]]:
    """Features, alone or two together, of which calls were refused: those that cover most first; and what none covers.

    A rule of one feature may have a few exceptions: a filter whose decay is constant in time takes an array over time too,
    where it holds the same value everywhere.
    """
    found: list[set[str]] = []
    for size, share, need, most in ((1, exceptions, 1, 100), (2, 0.0, _PAIRS_NEED, _RULES)):
        combos = ((c, r) for r in answered for c in itertools.combinations(sorted(r.features), size))
        allowed = Counter(c for c, r in combos if not _trivial(r.features) or _trivial(c))  # what a single step looks like says nothing
        for _ in range(most):
            counts = Counter(c for r in refused for c in itertools.combinations(sorted(r.features), size))
            counts = Counter({c: n for c, n in counts.items() if n >= need and allowed[c] <= share * n})
            if not counts:
                break
            best = max(counts, key=lambda c: (counts[c], -allowed[c], [not f.startswith("no ") for f in c]))
            found.append(set(best))
            refused = [r for r in refused if not set(best) <= set(r.features)]
    return found, refused
