"""What the mistake is: the known mistake whose results the candidate's equal better than the truth.

Every mutant of the operator is run on the failing cases. One that explains all of them is named; a legitimate variant
that does makes the verdict "deviates". Mistakes that need no catalogue, a common factor, a shift in time, the accuracy
of a lesser precision, are recognised from the numbers.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.conformance.gates import error_ratio
from refimpl.conformance.mutants import Mutant, mutants
from refimpl.conformance.precision import Precision, widened
from refimpl.conformance.truth import flat, gradient_names
from refimpl.op import Op

_GLANCE = 4  # failing cases that decide whether a mutant is worth trying on all


@dataclass(frozen=True)
class Evidence:
    """A failing case with what the candidate returned: results (or gradients) by name, the truth and its limits."""

    call: dict
    to: Precision
    got: dict[str, np.ndarray]
    right: dict[str, np.ndarray]
    limits: dict[str, np.ndarray]
    cotangents: tuple | None = None
    failed: bool = True


def explain(op: Op, evidence: list[Evidence]) -> tuple[list[str], str]:
    """Sentences, best explanation first, and the legitimate variants, joined by " and ", that explain every failure, if any do."""
    failing = [e for e in evidence if e.failed]
    if not failing:
        return [], ""
    scored = []
    for mutant in mutants(op.name):
        relevant = [e for e in failing if e.cotangents is not None or not mutant.of_gradient]
        if not relevant:
            continue
        first = [_matches(op, mutant, e) for e in relevant[:: max(1, len(relevant) // _GLANCE)][:_GLANCE]]
        if sum(first) < 0.5 * len(first):
            continue
        hits = sum(_matches(op, mutant, e) for e in relevant)
        if hits and hits >= 0.5 * len(relevant):
            others = [e for e in evidence if not e.failed and (e.cotangents is not None or not mutant.of_gradient)]
            clashes = sum(not _matches(op, mutant, e) for e in others)
            scored.append((hits / len(failing), -clashes, mutant))
    scored.sort(key=lambda s: (-s[0], -s[1], s[2].variant))
    sentences = [_sentence(share, clashes, m) for share, clashes, m in scored[:4]]
    variants = _variants(op, failing)
    full_wrong = any(share == 1.0 and not m.variant and clashes > c for share, clashes, m in scored for s, c, v in scored if v.name in variants)
    return sentences + _from_the_numbers(op, failing), "" if full_wrong else " and ".join(variants)


def _variants(op: Op, failing: list[Evidence]) -> list[str]:
    """Few legitimate variants of which each failure is one or the other; empty where some failure is none."""
    explained = {m.name: {i for i, e in enumerate(failing) if _matches(op, m, e)} for m in mutants(op.name) if m.variant}
    left, chosen = set(range(len(failing))), []
    while left:
        name = max(explained, key=lambda n: len(explained[n] & left), default=None)
        if name is None or not explained[name] & left:
            return []
        chosen.append(name)
        left -= explained.pop(name)
    return chosen


def _sentence(share: float, clashes: int, mutant: Mutant) -> str:
    how = "matches" if share == 1.0 else f"matches in {share:.0%} of the failures"
    return f"{how} `{mutant.name}`: {mutant.says}"


def _matches(op: Op, mutant: Mutant, e: Evidence) -> bool:
    """Whether the candidate's results are the mutant's, and not, where the case failed, the truth's as well."""
    if mutant.undecided is not None:
        return _right_where_decided(op, mutant.undecided(widened(e.call, np.dtype(np.float64))), e)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if e.cotangents is not None and not mutant.of_gradient:
            try:
                return _is_gradient_of(op, mutant.function, e)
            except Exception:
                return False
        try:
            exact, lesser = _run(op, mutant.function, e, np.dtype(np.float64)), _run(op, mutant.function, e, e.to.compute)
        except Exception:  # a mutant may not survive every input
            return False
        for found in (exact, lesser):  # a loss of digits shows in the candidate's own precision only
            verdicts = [_equals(name, got, found.get(name), lesser.get(name), e) for name, got in e.got.items()]
            if all(v is not None for v in verdicts) and (any(verdicts) or not e.failed):
                return True
    return False


def _right_where_decided(op: Op, undecided: np.ndarray, e: Evidence) -> bool:
    """Whether results (..., T, ...) are right at every step but the undecided; sums over steps say nothing where there are such."""
    if not np.any(undecided):
        return not e.failed
    axes = op.contract.result_axis("T") if e.cotangents is None else {}
    for name in axes.keys() & e.got.keys():
        got, right, limit = e.got[name], np.asarray(e.right[name]), np.asarray(e.limits.get(name, 0.0))
        if got.shape != right.shape:
            return False
        wrong = (got != right) if got.dtype.kind in "iub" else error_ratio(got, right, limit) > 1
        if np.any(wrong & ~np.expand_dims(undecided, tuple(range(axes[name] + 1, 0)))):
            return False
    return True


def _is_gradient_of(op: Op, function: Callable, e: Evidence) -> bool:
    """Whether the gradients are those of a mistaken forward, by its differences along random directions; and not the truth's."""
    rng = np.random.default_rng(3)
    wide = widened(e.call, np.dtype(np.longdouble))
    dy, dstate = (_cast(c, np.dtype(np.longdouble)) for c in e.cotangents or ())
    cotangents = [c for c in _leaves((dy, dstate)) if c is not None]

    def loss(call: dict):
        results = op.contract.named(function(**call), call.get("return_state", False))
        outputs = [y for y in results.values() if y.dtype.kind in "fc"]
        return sum(np.sum((np.conj(c) * y).real) for c, y in zip(cotangents, outputs, strict=True))

    arguments, differs = flat({n: wide[n] for n in gradient_names(op, wide)}), False
    for name, gradient in e.got.items():
        x = arguments[name]
        for _ in range(2):
            direction = rng.standard_normal(x.shape) + (1j * rng.standard_normal(x.shape) if x.dtype.kind == "c" else 0)
            step = 1e-6 * (np.max(abs(x), initial=0.0) or 1.0)
            forth, back = (loss(_moved(wide, name, sign * step * direction)) for sign in (1, -1))
            slope = float((forth - back) / (2 * step))
            if not np.isfinite(slope):  # its results are NaN, and so should be the gradients
                if np.all(np.isfinite(np.asarray(gradient).astype(direction.dtype))):
                    return False
                differs = True
                break
            ours, truth = (float(np.sum((np.conj(np.asarray(g).astype(direction.dtype)) * direction).real)) for g in (gradient, e.right[name]))
            size = float(np.sqrt(np.sum(abs(np.asarray(e.right[name]).astype(direction.dtype)) ** 2)))
            rounding = float(np.sqrt(np.sum((np.broadcast_to(e.limits[name], x.shape) * abs(direction)) ** 2)))
            allowed = (16 * e.to.unit + 1e-9) * max(size, abs(slope)) + 2 * rounding
            if not abs(ours - slope) <= allowed:
                return False
            differs |= abs(truth - slope) > allowed
    return differs or not e.failed


def _moved(call: dict, name: str, by: np.ndarray) -> dict:
    """The call with one of its arrays, or one part of a tuple (``state[1]``), moved."""
    name, bracket, part = name.partition("[")
    if not bracket:
        return {**call, name: call[name] + by}
    parts = [v + by if i == int(part[:-1]) else v for i, v in enumerate(call[name])]
    return {**call, name: type(call[name])(*parts) if hasattr(call[name], "_fields") else tuple(parts)}


def _leaves(x) -> list:
    return [leaf for part in x for leaf in _leaves(part)] if isinstance(x, tuple) else [x]


def _equals(name: str, got, wrong, lesser, e: Evidence) -> bool | None:
    """None: not the mutant's result. Else whether that result differs from the truth."""
    if not isinstance(got, np.ndarray) or np.shape(wrong) != got.shape:
        return None
    wrong = np.asarray(wrong)
    ours = got.astype(wrong.dtype)
    if not _same_places(ours, wrong):
        return None
    limit: Any = e.limits.get(name)
    limit = np.zeros(got.shape) if np.shape(limit) != got.shape else limit
    if e.to.half and limit.size:  # where the truth is 0 its limit is, and the mutant's is not
        limit = np.maximum(limit, limit.max() / 2)
    unit = e.to.unit if not name.startswith("state") else e.to.compute_unit
    scale = np.max(abs(wrong)[np.isfinite(wrong)], initial=0.0)
    noise = np.nan_to_num(abs(np.asarray(lesser).astype(wrong.dtype) - wrong)) if np.shape(lesser) == got.shape else 0.0
    allowed = 2 * limit + unit * abs(np.nan_to_num(wrong)) + 64 * e.to.compute_unit * scale + 8 * noise
    if np.any(error_ratio(ours, wrong, allowed) > 1):
        return None
    right: Any = e.right.get(name)
    if np.shape(right) != got.shape:
        return True
    right = np.asarray(right).astype(wrong.dtype)
    return bool(np.any(error_ratio(wrong, right, np.maximum(limit, 1e-300)) > 1)) or not _same_places(wrong, right)


def _same_places(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype.kind in "iub" or (np.array_equal(np.isnan(a), np.isnan(b)) and np.array_equal(np.isinf(a), np.isinf(b)))


def _run(op: Op, function: Callable, e: Evidence, dtype: np.dtype) -> dict:
    wide = widened(e.call, dtype)
    if e.cotangents is None:
        return op.contract.named(function(**wide), e.call.get("return_state", False))
    dy, dstate = (_cast(c, dtype) for c in e.cotangents)
    arguments = {n: wide[n] for n in gradient_names(op, wide)}
    return flat(function(dy, **arguments, **({} if dstate is None else {"dstate": dstate})))


def _cast(x, dtype):
    if isinstance(x, tuple):
        parts = [_cast(v, dtype) for v in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x.astype(np.result_type(dtype, np.complex64) if x.dtype.kind == "c" else dtype) if isinstance(x, np.ndarray) else x


# -- what needs no catalogue -----------------------------------------------------------------------------------------


def _from_the_numbers(op: Op, failing: list[Evidence]) -> list[str]:
    """Relations to the truth that hold in every failing case of results."""
    found = []
    for name in dict.fromkeys(n for e in failing for n in e.got):
        pairs = [(e.got[name], np.asarray(e.right[name]), e.limits[name], e.to) for e in failing if name in e.right and isinstance(e.got.get(name), np.ndarray)]
        pairs = [p for p in pairs if p[0].shape == p[1].shape and p[1].size and p[0].dtype.kind not in "iub" and np.shape(p[2]) == p[1].shape]
        pairs = [p for p in pairs if np.any(error_ratio(*p[:3]) > 1)]
        if not pairs:
            continue
        label = name if any(e.cotangents is None for e in failing if name in e.got) else f"the gradient of {name}"
        for relation in (_zero, _factor, _shifted, _lesser_precision):
            words = [relation(op, label, *p) for p in pairs]
            if words[0] and all(words):
                found.append(words[0])
                break
    return found


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
    shown = f"{factor.real:.6g}" if abs(factor.imag) < 1e-6 * abs(factor) else f"{factor:.6g}"
    return f"{name} is {shown} times the truth, everywhere"


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
