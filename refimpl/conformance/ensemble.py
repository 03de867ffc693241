"""What right algorithms give in a lesser precision: legal emulations of an operator, against which gates G2 and G3 measure.

Running ten of them takes longer than the candidate does, so what the gates want to know of them, a few numbers about
their errors (`gates.Peers`), is kept on disk (`disk.py`): no result of theirs is, and nothing that a result follows from.
"""

import warnings

import numpy as np

from refimpl.conformance import disk, gates, truth
from refimpl.conformance.gates import Peers
from refimpl.conformance.precision import TF32, Precision, widened
from refimpl.op import Op

SIZE = 8
Results = dict[str, np.ndarray]
_GAINS_FROM = 2000  # elements of the first result from which factors on arguments are looked for


def readings(op: Op, call: dict, to: Precision, right: Results, keep: bool) -> dict[str, Peers]:
    """What the gates want to know of right algorithms, by result; from disk where the same was asked before, and may be (`keep`)."""
    names = [n for n, v in right.items() if v.dtype.kind in "fc"]
    key = disk.digest("ensemble", op.name, to.name, call) if keep else ""
    found = _unpacked(disk.load(key), names) if key else None
    if found is None:
        found = _measured(op, call, to, {n: right[n] for n in names})
        if key:
            disk.store(key, _packed(found))
    return found


def slopes(op: Op, call: dict, to: Precision, right: Results) -> dict[str, Results]:
    """What factors on arguments do to every result that is large enough to tell."""
    return truth.directions(op, call, right, to) if next(iter(right.values())).size >= _GAINS_FROM else {}


def ensemble(op: Op, call: dict, to: Precision) -> list[Results]:
    """The results, by name, of at least eight legal emulations, rounded to the precision.

    Every form computes in the precision's arithmetic and rounds once; the rest see inputs that were rounded once more on
    the way, as tensor-core kernels round operands and intermediate results: to the nearest, and for tf32 in every second
    of them by cutting bits off, which shortens all that is rounded.
    """
    compute = widened(call, to.compute)
    rng = np.random.default_rng(0)
    results: list[Results] = []
    functions = []
    for form in op.forms.values():
        first = _results(op, form.function, compute, to) if form.stabilised else None
        if first is not None:
            results.append(first)
            functions.append(form.function)
    while functions and len(results) < SIZE + len(functions):
        low, high = (-2, 0) if to.name == TF32 and len(results) % 2 else (-1, 1) if to.coarse else (-4, 4)  # a wide number moves by whole units
        shaken = {n: _round_again(v, to.unit, rng, low, high) for n, v in compute.items()}
        first = _results(op, functions[len(results) % len(functions)], shaken, to)
        if first is None:
            break
        results.append(first)
    return results


def _measured(op: Op, call: dict, to: Precision, right: Results) -> dict[str, Peers]:
    emulations = ensemble(op, call, to)
    if not emulations:
        return {}
    directions = slopes(op, call, to, right)
    return {n: gates.peers(v, [e[n] for e in emulations], directions.get(n, {}), to.unit) for n, v in right.items()}


def _packed(found: dict[str, Peers]) -> Results:
    """As arrays by name; no array for what there is none of."""
    arrays: Results = {}
    for name, peers in found.items():
        arrays |= {f"{name}/slopes": peers.slopes, f"{name}/numbers": np.array([peers.spread, peers.outlier])}
        arrays |= {f"{name}/{part}": value for part, value in (("errors", peers.errors), ("rows", peers.rows)) if value is not None}
        arrays |= {f"{name}/gains/{argument}": np.array(gain) for argument, gain in peers.gains.items()}
    return arrays


def _unpacked(arrays: Results | None, names: list[str]) -> dict[str, Peers] | None:
    if arrays is None or (arrays and not all(f"{name}/{part}" in arrays for name in names for part in ("slopes", "numbers"))):
        return None
    found = {}
    for name in names if arrays else ():
        gains = {key.removeprefix(f"{name}/gains/"): float(v) for key, v in arrays.items() if key.startswith(f"{name}/gains/")}
        spread, outlier = map(float, arrays[f"{name}/numbers"])
        found[name] = Peers(arrays.get(f"{name}/errors"), spread, arrays[f"{name}/slopes"], gains, arrays.get(f"{name}/rows"), outlier)
    return found


def _results(op: Op, function, call: dict, to: Precision) -> Results | None:
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            named = op.contract.named(function(**call), call.get("return_state", False))
        except ValueError:
            return None  # the form refuses an option
    return {n: np.asarray(y).astype(to.dtype) if y.dtype.kind == "f" and not n.startswith("state") else np.asarray(y) for n, y in named.items()}


def _round_again(x, unit: float, rng, low: float = -1.0, high: float = 1.0):
    if isinstance(x, tuple):
        parts = [_round_again(v, unit, rng, low, high) for v in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if not isinstance(x, np.ndarray) or x.dtype.kind not in ("fc" if high > 1 else "f"):  # no half precision is complex
        return x
    return (x * (1 + 0.5 * unit * rng.uniform(low, high, x.shape))).astype(x.dtype)
