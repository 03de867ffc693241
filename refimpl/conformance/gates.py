"""When is a number right? The gates, in order; each takes arrays and knows no operator.

    G0  shape, dtype, and the places of NaN, +inf and -inf equal the contract's; NaN is never a wildcard
    G1  every element within its bound of the truth
    G2  per slice, the RMS error is no more than a few times that of right algorithms in the same precision; and of many rows
        none stands out from the rest by more than it does with them
    G3  no common factor: the regression of the error on the truth is as small as rounding makes it, in every large result
        and in all of them together
    G4  how far results are off in units in the last place; this only reports
    G5  where nothing rounds, small integers in a half precision, nothing may be off: G1 with a bound of 0 (`truth.certain`)
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.conformance.precision import Precision, precision
from refimpl.core.dtypes import real_dtype

PEERS_FACTOR = 4.0  # G2: RMS error of a slice over the worst of the ensemble's
BIAS_FLOOR = 0.3  # G3: in roundoffs of the result; a factor of 1.002 is 0.51 of bfloat16's
BIAS_PEERS, PART_PEERS = 3.0, 6.0  # G3: over the ensemble's largest common factor, of a whole result and of a part of one
BITS_FROM = 24  # numbers of a state that all end in zeros
BIAS_CHANCE = 6.0  # G3: what roundings of both signs leave of a factor, in standard deviations
BIAS_SPREADS = 6.0  # G3, of all cases together: over the spread that the ensemble's common factors have
ROWS = 1000  # G2: from so many rows on, each is looked at by itself
ROW_FACTOR, ROW_LEAST = 2.5, 6.0  # G2: over what the ensemble's worst row stands out by, or this if that is less
MANY = 1e6  # times a bound: beyond, a number says nothing
GAIN_MOST = 0.1  # where an argument's size hardly matters, some factor on it explains any error
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


def exact(
    name: str, got, right: np.ndarray, limit: np.ndarray, to: Precision, wanted: np.dtype, state: bool, secondary: bool, mixed: bool = False
) -> Finding | None:
    """G0: kind of thing, shape, dtype (`wanted`), non-finite places: infinite may be what is within its `limit` of the range's end.

    In a half precision, results beside the first (`secondary`) may be in float32; of eight bits, all results may be in
    bfloat16, float16 or float32; and where the other arrays are complex, which no half type is (`mixed`), the real result
    may be in the half type that was asked for.
    """
    if not isinstance(got, np.ndarray):
        return Finding("SHAPE", f"{name} is {type(got).__name__}, expected an array of shape {right.shape}", name)
    if got.shape != right.shape:
        return Finding("SHAPE", f"{name} has shape {got.shape}, expected {right.shape}", name)
    legal = {wanted} | ({np.dtype(np.float32)} if secondary and to.half else set())
    if to.narrow and wanted == to.dtype:
        legal |= {precision(name).dtype for name in ("bfloat16", "float16", "float32")}
    if mixed and to.half and not state and wanted.kind == "f":
        legal.add(to.dtype)
    if got.dtype not in legal and not (wanted.kind in "iu" and got.dtype.kind in "iu"):
        return Finding("DTYPE", f"{name} has dtype {got.dtype}, expected {wanted}", name)
    if got.dtype.kind in "iub":
        return None
    with np.errstate(all="ignore"):
        g, r = got.astype(right.dtype), right
        edge = (abs(r) > 0.99 * to.largest) & np.isfinite(r) if not state else np.zeros(r.shape, bool)
        beyond = edge | ((abs(r) + limit > 0.99 * to.largest) & np.isfinite(r) & (not state))
    for label, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        if right.dtype.kind == "c" and label != "NaN":
            continue
        wrong = (test(g) != test(r)) & ~(edge if label == "NaN" else beyond)
        if np.any(wrong):
            index = tuple(int(i) for i in np.argwhere(wrong)[0])
            has = "has" if test(g)[index] else "lacks"
            return Finding("NONFINITE", f"{name} {has} {label} where the contract {'has none' if has == 'has' else 'has it'}", name, index, got[index], right[index], 0.0, np.inf, wrong)
    return None


def narrow(name: str, got: np.ndarray, right: np.ndarray, to: Precision, outputs: list[np.ndarray]) -> Finding | None:
    """Whether a state that is due in float32 holds no more bits than the half precision: it was rounded on the way.

    Not judged: what the truth itself needs no more bits for (inputs that are kept, their maximum), and a state that is the
    last row of a result, which some kernels feed back as they gave it out.
    """
    if not to.half or got.dtype != np.float32 or any(y.ndim > 1 and y.shape[-2] and np.array_equal(y[..., -1, :], got) for y in outputs):
        return None
    with np.errstate(all="ignore"):
        known = np.isfinite(right) & (right.astype(to.dtype) != right.astype(np.float32))
        if np.count_nonzero(known) < BITS_FROM or not np.array_equal(got[known].astype(to.dtype).astype(np.float32), got[known]):
            return None
    index = tuple(int(i) for i in np.argwhere(known)[0])
    message = f"{name} holds numbers of {to.name} in float32: it was rounded on the way, and is handed over in float32"
    return Finding("NUMERIC", message, name, index, got[index], right[index], ratio=np.inf, bad=known)


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
    times = f"{worst:.3g}" if worst < MANY else "more than a million"
    message = f"{name} is off by {times} times what a right implementation may be"
    return Finding("NUMERIC", message, name, index, got[index], right[index], float(limit[index]), worst, wrong)


def error_ratio(got: np.ndarray, right: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """|got - right| / limit where both are finite, else 0 (G0 has looked at the rest)."""
    with np.errstate(all="ignore"):
        g = got.astype(right.dtype)
        error = abs(g - right).astype(np.float64)
        ratio = np.where(error == 0, 0.0, error / limit)
    return np.where(np.isfinite(g) & np.isfinite(right), ratio, 0.0)


@dataclass(frozen=True)
class Peers:
    """What G2 and G3 know of the right algorithms in a precision, about one result: numbers of their errors, none of their values.

    Of every slice the largest RMS error, or None where there are too few elements for slices; the spread of the common
    factors, less 1, of the whole; of every part (`parts`) the largest of those; for every argument the largest factor on it
    that would explain an error. Of many rows, the RMS error of each and how far the worst stands out; None of few.
    """

    errors: np.ndarray | None
    spread: float
    slopes: np.ndarray
    gains: dict[str, float]
    rows: np.ndarray | None = None
    outlier: float = 0.0


def peers(right: np.ndarray, results: list[np.ndarray], directions: dict[str, np.ndarray], unit: float) -> Peers:
    """The readings of right algorithms' results; `directions` as in `ungained`."""
    errors = [_slices(_difference(p, right)) for p in results]
    whole = [slope(p, right) for p in results]
    slopes = [[abs(slope(p[at], right[at])) for p in results] for _, at in parts(right.shape)]
    gains = {n: max(abs(_gain(_signed(p, right), d)) for p in results) for n, d in directions.items()}
    worst = None if errors[0] is None else np.max([e for e in errors if e is not None], axis=0)
    spread = float(np.sqrt(np.mean(np.abs(whole) ** 2) + (unit * _few(right)) ** 2 / 12))
    rows, outlier = _typical_rows(right, results, unit) if _many_rows(right) else (None, 0.0)
    return Peers(worst, spread, np.array([max(s) for s in slopes]), gains, rows, outlier)


def no_row_apart(name: str, got: np.ndarray, right: np.ndarray, others: Peers, limit: np.ndarray) -> Finding | None:
    """G2 of many rows: none is off by much more than right algorithms are there, while the result's other rows are not."""
    ratio = row_apart(got, right, others, limit)
    if ratio is None or not np.any(ratio > 1):
        return None
    row = int(np.argmax(ratio))
    index = (*(int(i) for i in np.unravel_index(row, right.shape[:-1])), 0)
    bad = np.broadcast_to((ratio > 1).reshape(right.shape[:-1])[..., None], right.shape)
    times = ratio[row] * ROW_FACTOR * max(others.outlier, ROW_LEAST)
    message = f"{name}: row {index[:-1]} is off {times:.3g} times as much as right algorithms in this precision are there, the other rows are not"
    return Finding("NUMERIC", message, name, index, got[index], right[index], ratio=float(ratio[row]), bad=bad)


def row_apart(got: np.ndarray, right: np.ndarray, others: Peers, limit: np.ndarray) -> np.ndarray | None:
    """How far every row stands out, as a ratio to what is allowed; None of few rows.

    A row of which the bound says that it may stand out, where a number lies half way between two integers, say, may.
    """
    if others.rows is None:
        return None
    ratio = _rows(_difference(got, right)) / others.rows
    known = _rows(_finite(limit)) / others.rows
    ratio = ratio / np.maximum(known / (np.median(known) or 1.0), 1.0)
    return ratio / max(float(np.median(ratio)), 1.0) / (ROW_FACTOR * max(others.outlier, ROW_LEAST))


def together(name: str, slopes: list[tuple[complex, float]], unit: float) -> Finding | None:
    """G3 of all cases together: the mean of their common factors, less 1, each weighted by how certain it is."""
    weight = sum(1 / spread**2 for _, spread in slopes)
    ours = sum(slope / spread**2 for slope, spread in slopes) / weight
    allowed = max(BIAS_FLOOR * unit, BIAS_SPREADS / math.sqrt(weight))
    if abs(ours) <= allowed:
        return None
    message = f"{name} is {1 + ours.real:.6g} times the truth on average over {len(slopes)} cases, where rounding leaves a factor within {allowed:.2g} of 1"
    return Finding("BIAS", message, name, ratio=abs(ours) / allowed)


def like_peers(name: str, got: np.ndarray, right: np.ndarray, others: Peers, floor: np.ndarray) -> Finding | None:
    """G2: the RMS error of every slice against the worst of the ensemble's."""
    error, allowed = slice_errors(got, right), allowed_error(others, floor)
    if error is None or allowed is None:
        return None
    with np.errstate(all="ignore"):
        ratio = np.where(error == 0, 0.0, error / allowed)
    if not np.any(ratio > 1):
        return None
    slice_ = int(np.argmax(ratio))
    message = f"{name}: RMS error of slice {slice_} is {ratio[slice_]:.3g} times what {PEERS_FACTOR:g} times the worst right algorithm in this precision would have"
    return Finding("NUMERIC", message, name, ratio=float(ratio[slice_]))


def allowed_error(others: Peers, floor: np.ndarray) -> np.ndarray | None:
    """G2's limit on the RMS error of every slice; None where there are too few elements for one."""
    floors = _slices(floor)
    if floors is None or others.errors is None:
        return None
    return PEERS_FACTOR * np.maximum(others.errors, np.median(others.errors)) + floors


def slice_errors(got: np.ndarray, right: np.ndarray) -> np.ndarray | None:
    """The RMS error of every slice."""
    return _slices(_difference(got, right))


def bias(got: np.ndarray, right: np.ndarray, others: float, unit: float, whole: bool = True) -> tuple[complex, float]:
    """G3: the common factor between a result, or a part of one, and the truth, less 1; and what is allowed of it."""
    factor = BIAS_PEERS if whole else PART_PEERS
    return slope(got, right), max(BIAS_FLOOR * unit, factor * others, BIAS_CHANCE * unit * _few(right))


def unbiased(name: str, got: np.ndarray, right: np.ndarray, others: Peers, unit: float) -> Finding | None:
    """G3: the common factor between the result and the truth, of all and of every head, batch entry and feature."""
    for (where, at), slope in zip(parts(right.shape), others.slopes, strict=True):
        ours, allowed = bias(got[at], right[at], float(slope), unit, whole=not at)
        if abs(ours) > allowed:
            message = f"{name}{where} is {1 + ours.real:.6g} times the truth on average, where rounding leaves a factor within {allowed:.2g} of 1"
            return Finding("BIAS", message, name, ratio=abs(ours) / allowed)
    return None


def ungained(name: str, got: np.ndarray, right: np.ndarray, others: Peers, directions: dict[str, np.ndarray], unit: float) -> Finding | None:
    """G3 for the arguments: the error has no part along what a small factor on one of them does to the result.

    A factor on the scores, the steps or the rates of half a percent hides below the roundoff of every single element; the
    regression of all errors on the derivative finds it. `directions`: by argument, d result / d log argument. A constant
    that a kernel keeps in the half precision is off by up to its roundoff, hence the floor.
    """
    error = _signed(got, right)
    for argument, direction in directions.items():
        square = float(np.sum(abs(direction) ** 2))
        if right.size < 1000 or square == 0:
            continue
        ours = _gain(error, direction)
        noise = float(np.sqrt(np.sum(abs(_finite(right) * direction) ** 2))) / square
        allowed = max(GAIN_FLOOR * unit, 6 * others.gains.get(argument, 0.0), 8 * unit * noise)
        if abs(ours) > allowed and allowed < GAIN_MOST:
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
        d = _wide(a.astype(right.dtype) - right)
    return np.where(np.isfinite(d), d, 0.0)


def _wide(x: np.ndarray) -> np.ndarray:
    """In double precision, complex where it was."""
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def parts(shape: tuple[int, ...]) -> list[tuple[str, tuple]]:
    """All of an array, and each head, batch entry and feature, in words and as an index; of at least 500 elements each."""
    size, parts = math.prod(shape), []
    for axis, count in enumerate(shape):
        if 1 < count <= 64 and size // count >= 500:
            parts += [(f" at {i} along axis {axis}", (*[slice(None)] * axis, i)) for i in range(count)]
    return [("", ()), *parts] if size >= 500 else []


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


def _many_rows(right: np.ndarray) -> bool:
    return right.ndim > 1 and right.size >= ROWS * right.shape[-1] > 0


def _rows(x: np.ndarray) -> np.ndarray:
    """RMS of every row."""
    return np.sqrt(np.mean(x.reshape(-1, x.shape[-1]) ** 2, axis=-1))


def _typical_rows(right: np.ndarray, results: list[np.ndarray], unit: float) -> tuple[np.ndarray, float]:
    """The RMS error of every row, and how far the worst row of any result stands out from those of the other results."""
    squares = np.array([_rows(_difference(p, right)) for p in results]) ** 2  # (results, rows)
    finite = np.where(np.isfinite(right), np.abs(right), 0).astype(np.float64)
    floor = 0.3 * unit * _rows(finite) + np.finfo(np.float32).tiny
    outlier, total = 0.0, squares.sum(axis=0)
    for square in squares:
        ratio = np.sqrt(square) / np.maximum(np.sqrt(np.maximum(total - square, 0) / max(len(squares) - 1, 1)), floor)
        outlier = max(outlier, float(np.max(ratio) / max(np.median(ratio), 1.0)))
    return np.maximum(np.sqrt(total / len(squares)), floor), outlier


def slope(got: np.ndarray, right: np.ndarray) -> complex:
    """The common factor between a result and the truth, less 1, of all finite elements."""
    g, r = _wide(got.astype(right.dtype)).ravel(), _wide(right).ravel()
    fine = np.isfinite(g) & np.isfinite(r)
    g, r = g[fine], r[fine]
    square = float(np.sum(abs(r) ** 2))
    return complex(np.vdot(r, g - r) / square) if square else 0j


def _few(right: np.ndarray) -> float:
    """How much independent errors of all elements leave of a common factor: 1/√N of N elements alike; of a few large ones, more."""
    squares = np.abs(_finite(right)) ** 2
    return float(np.sqrt(np.sum(squares**2)) / (np.sum(squares) or 1.0))


def _finite(x: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(x), _wide(x), 0)


def _gain(error: np.ndarray, direction: np.ndarray) -> float:
    square = float(np.sum(abs(direction) ** 2))
    return float(np.vdot(direction, error).real) / square if square else 0.0
