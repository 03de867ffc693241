"""What the numbers say by themselves, without a catalogue: zeros, a common factor, a shift in time, a lesser precision."""

from typing import Any

import numpy as np

from refimpl.conformance.gates import error_ratio
from refimpl.conformance.likeness import Evidence
from refimpl.conformance.precision import Precision
from refimpl.op import Op

_FEW = 3  # passing cases: of nothing, of one step


def relations(op: Op, failing: list[Evidence], passing: list[Evidence]) -> list[str]:
    """Relations to the truth that hold wherever a result, or a gradient, is wrong."""
    found = []
    for name in dict.fromkeys(n for e in failing for n in e.got):
        plain = any(e.cotangents is None for e in failing if name in e.got)
        wrong = [p for e in failing if (p := _pair(e, name, plain)) is not None and np.any(error_ratio(*p[:3]) > 1)]
        if not wrong:
            continue
        label = name if plain else f"the gradient of {name}"
        fine = sum((e.cotangents is None) == plain and name in e.got for e in passing)
        for relation in (_zero, _factor, _factor_in_part, _shifted, _lesser_precision):
            if relation is _lesser_precision and (fine > max(_FEW, len(wrong)) or 2 * sum(map(_smooth, wrong)) > len(wrong)):
                continue  # roundings would show nearly everywhere, and change from one element to the next
            words = [relation(op, label, *p) for p in wrong]
            same = len(set(words)) == 1
            if all(words) and (same or relation is not _factor_in_part):
                found.append(f"{label} is the truth times a factor that differs from case to case" if relation is _factor and not same else words[0])
                break
    return found


def _pair(e: Evidence, name: str, plain: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, Precision] | None:
    """What came and what is right, where these can be compared."""
    got, limit = e.got.get(name), np.asarray(e.limits.get(name, 0.0))
    if (e.cotangents is None) != plain or name not in e.right or not isinstance(got, np.ndarray) or got.dtype.kind in "iub":
        return None
    right: Any = np.asarray(e.right[name])
    fits = got.shape == right.shape == limit.shape and right.size
    return (got, right, limit, e.to) if fits else None


def _zero(op, name, got, right, limit, to) -> str:
    return f"{name} is zero everywhere" if not np.any(got) and np.any(right) else ""


def _factor(op, name, got, right, limit, to) -> str:
    g, r = got.astype(np.complex128).ravel(), right.astype(np.complex128).ravel()
    fine = np.isfinite(g) & np.isfinite(r)
    g, r = g[fine], r[fine]
    square = np.sum(abs(r) ** 2)
    if g.size < 4 or square == 0:
        return ""
    factor = np.sum(g * np.conj(r)) / square
    residue = abs(g - factor * r)
    if np.any(residue > 2 * limit.ravel()[fine] * max(1.0, abs(factor)) + 1e-3 * abs(factor - 1) * abs(r)):
        return ""
    if not np.any(error_ratio(factor.real * right, right, limit) > 1) and not factor.imag:
        return ""
    return f"{name} is {_shown(factor)} times the truth, everywhere"


def _factor_in_part(op, name, got, right, limit, to) -> str:
    """The same factor wherever it is wrong, seen clearly."""
    wrong = (error_ratio(got, right, limit) > 1) & np.isfinite(got.astype(right.dtype)) & np.isfinite(right)
    g, r, b = (x[wrong].astype(np.complex128) for x in (got, right, limit))
    clear = abs(g - r) > 16 * b.real
    if np.sum(clear) < 4 or not np.any(r):
        return ""
    factor = np.sum(g * np.conj(r)) / np.sum(abs(r) ** 2)
    if np.any(abs(g - factor * r) > (2 * b.real + 2 * to.unit * abs(r)) * max(1.0, abs(factor))) or abs(factor.imag) > 1e-4 * abs(factor):
        return ""
    return f"where it is wrong, {name} is {_shown(factor)} times the truth"


def _shown(factor: complex) -> str:
    if abs(factor.imag) > 1e-4 * abs(factor):
        return f"{factor:.4g}"
    return f"{factor.real:.4g}" if abs(factor - 1) > 1e-3 else f"1 {'+' if factor.real > 1 else '-'} {abs(factor.real - 1):.2g}"


def _shifted(op, name, got, right, limit, to) -> str:
    axis = op.contract.result_axis(op.lengths[0]).get(name) if op.lengths else None
    if axis is None or got.shape[axis] < 4:
        return ""
    g, r, b = (np.moveaxis(x, axis, 0) for x in (got, right, limit))
    for shift in (1, -1, 2, -2):
        a, e, c = (g[shift:], r[:-shift], b[:-shift]) if shift > 0 else (g[:shift], r[-shift:], b[-shift:])
        if a.size and not np.any(error_ratio(a, e, 2 * c) > 1):
            return f"{name} is {'late' if shift > 0 else 'early'} by {abs(shift)} step{'s' if abs(shift) > 1 else ''}"
    return ""


def _smooth(pair: tuple) -> bool:
    """Whether neighbours' errors are alike along some axis."""
    got, right, *_ = pair
    error = np.nan_to_num(got.astype(right.dtype) - right)
    error = error / (np.max(abs(error), initial=0.0) or 1.0)
    square = float(np.sum(abs(error) ** 2))
    for axis in (a for a in range(error.ndim) if error.shape[a] >= 8 and square):
        e = np.moveaxis(error, axis, 0)
        if abs(np.sum(e[1:] * np.conj(e[:-1]))) > 0.5 * square:
            return True
    return False


def _lesser_precision(op, name, got, right, limit, to) -> str:
    if to.half:
        return ""
    scale = float(np.sqrt(np.mean(np.abs(right[np.isfinite(right)]).astype(np.float64) ** 2))) if np.any(np.isfinite(right)) else 0.0
    with np.errstate(all="ignore"):
        error = np.abs(got.astype(right.dtype) - right).astype(np.float64)
    error = float(np.sqrt(np.mean(error[np.isfinite(error)] ** 2)))
    with np.errstate(all="ignore"):
        share = np.mean(np.abs(got.astype(right.dtype) - right).astype(np.float64) > 0.1 * error)
    if not scale or share < 0.4:  # rounding is off a little everywhere, a mistake much at some places
        return ""
    relative = error / scale
    if to.name == "float32" and 2e-5 < relative < 1e-3:
        return f"{name}: a relative error of {relative:.1e} is what TF32 or float16 products leave; float32 was promised"
    if to.name == "float32" and 1e-3 <= relative < 8e-3:
        return f"{name}: a relative error of {relative:.1e} is what bfloat16 leaves; float32 was promised"
    if to.name == "float64" and 1e-9 < relative < 3e-6:
        return f"{name}: a relative error of {relative:.1e} is what float32 leaves; float64 was promised"
    return ""
