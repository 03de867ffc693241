"""What right algorithms give in a lesser precision: legal emulations of an operator, against which gate G2 measures."""

import warnings

import numpy as np

from refimpl.conformance.precision import Precision, widened
from refimpl.op import Op

SIZE = 8


def ensemble(op: Op, call: dict, to: Precision) -> list[np.ndarray]:
    """The first result of at least eight legal emulations, rounded to the precision.

    Every form computes in the precision's arithmetic and rounds once; the rest see inputs that were rounded once more on
    the way, as tensor-core kernels round operands and intermediate results.
    """
    compute = widened(call, to.compute)
    rng = np.random.default_rng(0)
    results: list[np.ndarray] = []
    functions = []
    for form in op.forms.values():
        first = _first(op, form.function, compute, to) if form.stabilised else None
        if first is not None:
            results.append(first)
            functions.append(form.function)
    while functions and len(results) < SIZE + len(functions):
        shaken = {n: _round_again(v, to.unit, rng) for n, v in compute.items()}
        first = _first(op, functions[len(results) % len(functions)], shaken, to)
        if first is None:
            break
        results.append(first)
    return results


def _first(op: Op, function, call: dict, to: Precision) -> np.ndarray | None:
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = function(**call)
        except ValueError:
            return None  # the form refuses an option
    y = next(iter(op.contract.named(result, call.get("return_state", False)).values()))
    return y.astype(to.dtype) if y.dtype.kind == "f" else y


def _round_again(x, unit: float, rng):
    if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
        return x
    return (x * (1 + 0.5 * unit * rng.uniform(-1, 1, x.shape))).astype(x.dtype)
