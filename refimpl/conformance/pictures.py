"""What a page draws, as plain data of bounded size: where errors are, how a few numbers look, how errors are spread in ULPs.

A failure carries its own (`picture`); every judged call carries a histogram (`ulps`), which a report sums up (`accuracy`).
"""

from typing import Any

import numpy as np

from refimpl.conformance.gates import error_ratio
from refimpl.conformance.precision import Precision

ROWS, COLUMNS = 48, 96  # of a map
NONE, WILD = -5.0, 99.0  # on a map: no error; NaN or an infinity where there should be none, or none where there should be
_CLOSE = (6, 6)  # rows and columns of a close-up


def picture(axes: tuple[str, ...], got: np.ndarray, right: np.ndarray, limit: np.ndarray) -> dict[str, Any] | None:
    """Where the errors of a result are: a map over the two axes that tell most, and the numbers around the worst.

    Returns
    -------
    dict or None
        ``axes``: two of {name, size, step}, rows and columns; ``map``: rows of log10(error / bound), the largest over all
        other axes and over steps; ``worst``: the index of the worst element; ``close``: got, expected and ratio around it,
        with the indices of rows and columns. None where the result has another shape or no element.
    """
    if got.shape != right.shape or not right.size:
        return None
    with np.errstate(all="ignore"):
        ratio = _ratio(got, right, np.broadcast_to(limit, right.shape))
        log = np.clip(np.where(ratio == 0, NONE, np.log10(np.where(ratio == 0, 1.0, ratio))), NONE, 9.0)
    log = np.where(np.isinf(ratio), WILD, log)
    worst = tuple(int(i) for i in np.unravel_index(int(np.argmax(ratio)), ratio.shape)) if ratio.ndim else ()
    first, second = _telling(ratio)
    names = [axes[i] if i is not None else "" for i in (first, second)]
    flat = _two(log, first, second, None)
    steps = [max(1, -(-size // most)) for size, most in zip(flat.shape, (ROWS, COLUMNS), strict=True)]
    shown = [{"name": n, "size": int(s), "step": int(p)} for n, s, p in zip(names, flat.shape, steps, strict=True)]
    close: dict[str, list] = {"rows": [], "columns": []}
    windows = []
    for axis, label, most, size in ((first, "rows", _CLOSE[0], flat.shape[0]), (second, "columns", _CLOSE[1], flat.shape[1])):
        centre = worst[axis] if axis is not None else 0
        low = max(0, min(centre - most // 2, size - most))
        windows.append(slice(low, low + most))
        close[label] = list(range(low, min(size, low + most)))
    parts = {n: _two(x, first, second, worst)[tuple(windows)] for n, x in (("got", got), ("expected", right), ("ratio", ratio))}
    numbers = {n: [[_short(v) for v in row] for row in part] for n, part in parts.items()}
    return {"axes": shown, "map": [[round(float(v), 2) for v in row] for row in _coarse(flat, steps)], "worst": list(worst), "close": close | numbers}


def _ratio(got: np.ndarray, right: np.ndarray, limit: np.ndarray) -> np.ndarray:
    if right.dtype.kind in "iub" or got.dtype.kind in "iub":
        return np.where(got == right, 0.0, np.inf)
    wide = got.astype(right.dtype)
    wild = (np.isnan(wide) != np.isnan(right)) | (np.isinf(wide) != np.isinf(right)) | (np.isinf(right) & (wide != right) & ~np.isnan(wide))
    return np.where(wild, np.inf, error_ratio(got, right, limit))


def _telling(ratio: np.ndarray) -> tuple[int | None, int | None]:
    """The two axes along which the errors differ most, in order; None where there is none longer than 1."""
    score = {}
    with np.errstate(all="ignore"):
        size = np.log10(np.clip(ratio, 1e-3, 1e6))
    for axis in range(ratio.ndim):
        if ratio.shape[axis] > 1:
            others = tuple(i for i in range(ratio.ndim) if i != axis)
            score[axis] = float(np.ptp(size.max(axis=others)) + np.ptp(size.mean(axis=others))) + 1e-3 * axis
    best = sorted(sorted(score, key=lambda a: -score[a])[:2])
    return (None, best[0]) if len(best) == 1 else (best[0], best[1]) if best else (None, None)


def _two(x: np.ndarray, first: int | None, second: int | None, at: tuple | None) -> np.ndarray:
    """Two axes of an array: the largest over the others, or, with `at`, the slice through an element."""
    kept = [a for a in (first, second) if a is not None]
    if at is None:
        x = x.max(axis=tuple(i for i in range(x.ndim) if i not in kept))
    else:
        x = x[tuple(slice(None) if i in kept else at[i] for i in range(x.ndim))]
    return np.reshape(x, (1, -1)) if len(kept) < 2 else x


def _coarse(x: np.ndarray, steps: list[int]) -> np.ndarray:
    rows, columns = (np.arange(0, size, step) for size, step in zip(x.shape, steps, strict=True))
    return np.maximum.reduceat(np.maximum.reduceat(x, rows, axis=0), columns, axis=1)


def _short(x) -> str:
    if np.iscomplexobj(x):
        return f"{_short(x.real)}{'+' if x.imag >= 0 else ''}{_short(x.imag)}i"
    return str(int(x)) if x.dtype.kind in "iub" else f"{float(x):.5g}"


# -- ULPs --------------------------------------------------------------------------------------------------------------

_PER_OCTAVE = 4


def ulps(got: np.ndarray, right: np.ndarray, to: Precision, state: bool = False) -> dict[str, int]:
    """How many elements are off by how much, signed, in units in the last place of the truth; those that should be 0 aside.

    Keys are bins on a logarithmic scale; `off` gives the ULPs that a bin stands for.
    """
    if got.shape != right.shape or right.dtype.kind not in "fc" or got.dtype.kind in "iub":
        return {}
    if right.dtype.kind == "c":
        with np.errstate(all="ignore"):
            got = got.astype(right.dtype)
        got, right = (np.concatenate([x.real.ravel(), x.imag.ravel()]) for x in (got, right))
    with np.errstate(all="ignore"):
        wide = np.asarray(got).astype(right.dtype)
        error = (wide - right).astype(np.float64)
        fine = np.isfinite(error) & (right != 0)
        _, exponent = np.frexp(np.abs(right[fine]).astype(np.float64))
        unit = to.compute_unit if state else to.unit
        off_by = error[fine] / (np.ldexp(1.0, np.maximum(exponent, -1000)) * unit)
        bins = np.sign(off_by) * np.rint(_PER_OCTAVE * np.log2(1 + 4 * np.abs(off_by)))
    found, counts = np.unique(bins[np.isfinite(bins)].astype(int), return_counts=True)
    return {str(b): int(c) for b, c in zip(found, counts, strict=True)}


def off(bin_: int) -> float:
    """The ULPs that a bin stands for."""
    return float(np.sign(bin_)) * (2.0 ** (abs(bin_) / _PER_OCTAVE) - 1) / 4


def summed(histograms: list[dict[str, int]]) -> dict[str, Any]:
    """Histograms as one, with the median, the 99th percentile and the largest of the absolute values."""
    total: dict[int, int] = {}
    for histogram in histograms:
        for key, count in histogram.items():
            total[int(key)] = total.get(int(key), 0) + count
    sizes: dict[int, int] = {}
    for key, count in total.items():
        sizes[abs(key)] = sizes.get(abs(key), 0) + count
    ordered = sorted(sizes)
    reached = np.cumsum([sizes[k] for k in ordered]) if ordered else np.zeros(0)

    def share(p: float) -> float:
        return round(off(ordered[int(np.searchsorted(reached, p * reached[-1]))]), 3) if ordered else 0.0

    return {
        "elements": int(sum(total.values())),
        "p50": share(0.5),
        "p99": share(0.99),
        "max": round(off(ordered[-1]), 3) if ordered else 0.0,
        "histogram": {str(k): total[k] for k in sorted(total)},
    }
