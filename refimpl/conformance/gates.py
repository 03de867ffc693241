"""When is a number right? The gates, in order; each takes arrays and knows no operator.

    G0  shape, dtype, and the places of NaN, +inf and -inf equal the contract's; NaN is never a wildcard
    G1  every element within its bound of the truth
    G2  per slice, the RMS error is no more than a few times that of right algorithms in the same precision
    G3  no common factor: the regression of the error on the truth is as small as rounding makes it
    G4  how far results are off in units in the last place; this only reports
    G5  where nothing rounds, small integers in a half precision, nothing may be off: G1 with a bound of 0 (`truth.certain`)
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.conformance.precision import Precision
from refimpl.core.dtypes import real_dtype

PEERS_FACTOR = 4.0  # G2: RMS error of a slice over the worst of the ensemble's
BIAS_FLOOR = 0.3  # G3: in roundoffs of the result; a factor of 1.002 is 0.51 of bfloat16's
GAIN_FLOOR = 0.6  # G3, factors on arguments: a scale of 1/√d kept in the half type is off by up to half a roundoff


@dataclass(frozen=True)
class Finding:
    """Why a result is not right: status, sentence, and the place."""

    status: str
    message: str
    output: str = ""
    index: tuple[int, ...] = ()
    got: Any = None
    expected: Any = None
    bound: float | None = None
    ratio: float = 0.0
    bad: np.ndarray | None = None


def exact(name: str, got, right: np.ndarray, to: Precision, wanted: np.dtype, state: bool, secondary: bool, mixed: bool = False) -> Finding | None:
    """G0: kind of thing, shape, dtype (`wanted`), non-finite places.

    In a half precision, results beside the first (`secondary`) may be in float32; and where the other arrays are complex,
    which no half type is (`mixed`), the real result may be in the half type that was asked for.
    """
    if not isinstance(got, np.ndarray):
        return Finding("SHAPE", f"{name} is {type(got).__name__}, expected an array of shape {right.shape}", name)
    if got.shape != right.shape:
        return Finding("SHAPE", f"{name} has shape {got.shape}, expected {right.shape}", name)
    legal = {wanted} | ({np.dtype(np.float32)} if secondary and to.half else set())
    if mixed and to.half and not state and wanted.kind == "f":
        legal.add(to.dtype)
    if got.dtype not in legal and not (wanted.kind in "iu" and got.dtype.kind in "iu"):
        return Finding("DTYPE", f"{name} has dtype {got.dtype}, expected {wanted}", name)
    if got.dtype.kind in "iub":
        return None
    with np.errstate(all="ignore"):
        g, r = got.astype(right.dtype), right
        edge = (abs(r) > 0.99 * to.largest) & np.isfinite(r) if not state else np.zeros(r.shape, bool)
    for label, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        if right.dtype.kind == "c" and label != "NaN":
            continue
        wrong = (test(g) != test(r)) & ~edge
        if np.any(wrong):
            index = tuple(int(i) for i in np.argwhere(wrong)[0])
            has = "has" if test(g)[index] else "lacks"
            return Finding("NONFINITE", f"{name} {has} {label} where the contract {'has none' if has == 'has' else 'has it'}", name, index, got[index], right[index], 0.0, np.inf, wrong)
    return None


def result_dtype(right: np.ndarray, compute: np.dtype | None, out: np.dtype | None, state: bool) -> np.dtype:
    """The dtype of a result whose truth is `right`, in a call computed in one precision and given back in another."""
    if right.dtype.kind in "iub":
        return right.dtype
    wanted = compute if state else out
    return np.result_type(wanted, np.complex64) if right.dtype.kind == "c" else real_dtype(wanted)


def bounded(name: str, got: np.ndarray, right: np.ndarray, limit: np.ndarray) -> Finding | None:
    """G1: |got - right| <= limit, elementwise."""
    if got.dtype.kind in "iub":
        wrong = got != right
        if not np.any(wrong):
            return None
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        return Finding("NUMERIC", f"{name} is {got[index]}, expected {right[index]}", name, index, got[index], right[index], 0.0, np.inf, wrong)
    ratio = error_ratio(got, right, limit)
    wrong = ratio > 1
    if not np.any(wrong):
        return None
    index = tuple(int(i) for i in np.unravel_index(int(np.argmax(ratio)), ratio.shape))
    worst = float(ratio[index])
    message = f"{name} is off by {worst:.3g} times what a right implementation may be"
    return Finding("NUMERIC", message, name, index, got[index], right[index], float(limit[index]), worst, wrong)


def error_ratio(got: np.ndarray, right: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """|got - right| / limit where both are finite, else 0 (G0 has looked at the rest)."""
    with np.errstate(all="ignore"):
        g = got.astype(right.dtype)
        error = abs(g - right).astype(np.float64)
        ratio = np.where(error == 0, 0.0, error / limit)
    return np.where(np.isfinite(g) & np.isfinite(right), ratio, 0.0)


def like_peers(name: str, got: np.ndarray, right: np.ndarray, peers: list[np.ndarray], floor: np.ndarray) -> Finding | None:
    """G2: the RMS error of every slice against the worst of the ensemble's."""
    error, allowed = slice_errors(got, right), allowed_error(right, peers, floor)
    if error is None or allowed is None:
        return None
    with np.errstate(all="ignore"):
        ratio = np.where(error == 0, 0.0, error / allowed)
    if not np.any(ratio > 1):
        return None
    slice_ = int(np.argmax(ratio))
    message = f"{name}: RMS error of slice {slice_} is {ratio[slice_]:.3g} times what {PEERS_FACTOR:g} times the worst right algorithm in this precision would have"
    return Finding("NUMERIC", message, name, ratio=float(ratio[slice_]))


def allowed_error(right: np.ndarray, peers: list[np.ndarray], floor: np.ndarray) -> np.ndarray | None:
    """G2's limit on the RMS error of every slice; None where there are too few elements for one."""
    base, floors = [_slices(_difference(p, right)) for p in peers], _slices(floor)
    if floors is None:
        return None
    peak = np.max([b for b in base if b is not None], axis=0)
    return PEERS_FACTOR * np.maximum(peak, np.median(peak)) + floors


def slice_errors(got: np.ndarray, right: np.ndarray) -> np.ndarray | None:
    """The RMS error of every slice."""
    return _slices(_difference(got, right))


def bias(got: np.ndarray, right: np.ndarray, peers: list[np.ndarray], unit: float) -> tuple[float, float]:
    """G3: the common factor between a result and the truth, less 1, and what is allowed of it."""
    others = [abs(_slope(p, right)) for p in peers]
    return _slope(got, right), max(BIAS_FLOOR * unit, 6 * max(others, default=0.0), 8 * unit / np.sqrt(right.size))


def unbiased(name: str, got: np.ndarray, right: np.ndarray, peers: list[np.ndarray], unit: float) -> Finding | None:
    """G3: the common factor between the result and the truth, of all and of every head, batch entry and feature."""
    parts = [("", got, right, peers)]
    for axis, count in enumerate(right.shape):  # each head, each batch entry, each feature
        if 1 < count <= 64:
            parts += [
                (f" at {i} along axis {axis}", got.take(i, axis), right.take(i, axis), [p.take(i, axis) for p in peers]) for i in range(count)
            ]
    for where, g, r, ps in parts:
        if r.size < 500:
            continue
        ours, allowed = bias(g, r, ps, unit)
        if abs(ours) > allowed:
            message = f"{name}{where} is {1 + ours:.6g} times the truth on average, where rounding leaves a factor within {allowed:.2g} of 1"
            return Finding("BIAS", message, name, ratio=abs(ours) / allowed)
    return None


def ungained(name: str, got: np.ndarray, right: np.ndarray, peers: list[np.ndarray], directions: dict[str, np.ndarray], unit: float) -> Finding | None:
    """G3 for the arguments: the error has no part along what a small factor on one of them does to the result.

    A factor on the scores, the steps or the rates of half a percent hides below the roundoff of every single element; the
    regression of all errors on the derivative finds it. `directions`: by argument, d result / d log argument. A constant
    that a kernel keeps in the half precision is off by up to its roundoff, hence the floor.
    """
    error = _signed(got, right)
    for argument, direction in directions.items():
        square = float(np.sum(direction**2))
        if right.size < 1000 or square == 0:
            continue
        ours = float(np.sum(error * direction)) / square
        others = [abs(float(np.sum(_signed(p, right) * direction))) / square for p in peers]
        noise = float(np.sqrt(np.sum((right.astype(np.float64) * direction) ** 2))) / square
        allowed = max(GAIN_FLOOR * unit, 6 * max(others, default=0.0), 8 * unit * noise)
        if abs(ours) > allowed:
            message = f"{name} is what {1 + ours:.6g} times {argument} would give, where rounding leaves a factor within {allowed:.2g} of 1"
            return Finding("BIAS", message, name, ratio=abs(ours) / allowed)
    return None


def teeth(right: np.ndarray, limit: np.ndarray) -> set[str]:
    """Gates for the gates: the disguises that this tolerance sees through."""
    if not right.size or right.dtype.kind in "iub":
        return set()
    seen = set()
    disguises = {"zeros": np.zeros_like(right), "sign": -right}
    if right.ndim > 1 and right.shape[-2] > 1:
        disguises["swapped rows"] = right[..., ::-1, :]
        disguises["one row"] = np.broadcast_to(right[..., :1, :], right.shape)
    for name, disguise in disguises.items():
        if np.any(error_ratio(disguise, right, limit) > 1):
            seen.add(name)
    return seen


def _difference(a: np.ndarray, right: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        d = abs(a.astype(right.dtype) - right).astype(np.float64)
    return np.where(np.isfinite(d), d, 0.0)


def _signed(a: np.ndarray, right: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        d = (a.astype(right.dtype) - right).astype(np.float64)
    return np.where(np.isfinite(d), d, 0.0)


def _slices(x: np.ndarray) -> np.ndarray | None:
    """RMS over blocks of at least 64 elements: heads or batch entries, then runs of rows."""
    if x.ndim < 2 or x.size < 256:
        return None
    rows = x.reshape(-1, x.shape[-2] * x.shape[-1])
    per = max(64, rows.shape[1] // 8)
    count = rows.shape[1] // per
    if count == 0:
        return np.sqrt(np.mean(rows**2, axis=1)) if rows.shape[1] >= 64 else None
    blocks = rows[:, : count * per].reshape(rows.shape[0], count, per)
    return np.sqrt(np.mean(blocks**2, axis=-1)).ravel()


def _slope(got: np.ndarray, right: np.ndarray) -> float:
    g, r = got.astype(np.float64).ravel(), right.astype(np.float64).ravel()
    fine = np.isfinite(g) & np.isfinite(r)
    g, r = g[fine], r[fine]
    square = float(np.sum(r * r))
    return float(np.sum((g - r) * r) / square) if square else 0.0
