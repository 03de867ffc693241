"""Whether a candidate's results in one case are those of a known mistake.

A mistake may show in a case, or be silent there: then its results are right. Where it shows, the candidate's results are
the same, within what two right implementations of that mistake may differ by, and off from the truth by as much; or other.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.conformance.gates import error_ratio
from refimpl.conformance.mutants import Mutant
from refimpl.conformance.precision import Precision, widened
from refimpl.conformance.truth import flat, gradient_names
from refimpl.op import Op

SAME, SILENT, OTHER, UNKNOWN = "same", "silent", "other", "unknown"  # unknown: the mistake has no result here, or none that can be told apart
_CLEARLY = 2.0  # times its bound: a mistake that a passing case contradicts is off by more
_PART = 0.3  # of a mistake's deviation: how much more or less of it the candidate's may be
_MOVED = 1e-2  # times what is allowed: a mistake that moves nothing by as much has no effect
_GROSS = 1e3  # times what is allowed; in a half precision, where that is much,
_GROSS_IN_HALF = 20


@dataclass(frozen=True)
class Evidence:
    """A case with what the candidate returned: results (or gradients) by name, the truth and its limits."""

    call: dict
    to: Precision
    got: dict[str, np.ndarray]
    right: dict[str, np.ndarray]
    limits: dict[str, np.ndarray]
    cotangents: tuple | None = None
    failed: bool = True
    case: str = ""

    @property
    def elements(self) -> int:
        return sum(np.size(v) for v in self.call.values() if isinstance(v, np.ndarray))

    @property
    def kind(self) -> tuple:
        """What cases have in common that differ in sizes alone: precision, class, hard input, options, optional arrays."""
        options = [n if _holds_arrays(v) else f"{n}={v!r}" for n, v in self.call.items()]
        label = re.split(r",|=|#", self.case)[0]
        return (self.to.name, self.cotangents is None, label, *sorted(options))


def _holds_arrays(value) -> bool:
    return any(isinstance(v, np.ndarray) for v in (value if isinstance(value, tuple) else (value,)))


def likeness(op: Op, mutant: Mutant, e: Evidence) -> str:
    """SAME, SILENT, OTHER or UNKNOWN."""
    if mutant.of_gradient and e.cotangents is None:
        return SILENT
    if mutant.undecided is not None:
        return _where_decided(op, mutant, e)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if e.cotangents is not None and not mutant.of_gradient:
                return _as_gradient(op, mutant.function, e)
            exact = _exact(op, mutant.function, e)
            first = _compared(exact, {}, e)
            if first == OTHER and _grossly(exact, e):
                return OTHER
            lesser = _run(op, mutant.function, e, e.to.compute)
            found = {_compared(exact, lesser, e), _compared(lesser, lesser, e)}  # a loss of digits shows in the candidate's own precision only
        except Exception:  # a mistake may not survive every input
            return UNKNOWN
    if SAME in found:
        return SAME
    if not e.failed and SILENT in found:
        return SILENT
    return OTHER if OTHER in found else UNKNOWN if UNKNOWN in found else SILENT


def _exact(op: Op, function: Callable, e: Evidence) -> dict:
    try:
        return _run(op, function, e, e.to.truth)
    except (TypeError, ValueError):  # in extended precision not everything runs
        return _run(op, function, e, np.dtype(np.float64))


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


# -- results beside results --------------------------------------------------------------------------------------------


def _compared(wrong: dict, lesser: dict, e: Evidence) -> str:
    """The candidate's results beside a mistake's; `lesser` are the mistake's in the candidate's precision, whose error is allowed."""
    same, shows = True, False
    ours, theirs = [], []  # deviations from the truth, in units of what is allowed
    for name, got in e.got.items():
        right, w = e.right.get(name), wrong.get(name)
        if not isinstance(got, np.ndarray) or right is None or w is None:
            return UNKNOWN
        right, w = np.asarray(right), np.asarray(w)
        if w.shape != right.shape:
            same, shows = same and w.shape == got.shape, True
            continue
        limit = np.broadcast_to(np.asarray(e.limits.get(name, 0.0)), right.shape)
        factor = 1.0 if e.failed else _CLEARLY
        shows |= not _same_places(w, right) or bool(np.any(error_ratio(w, right, np.maximum(factor * limit, 1e-300)) > 1))
        if got.shape != w.shape or not _same_places(got.astype(w.dtype), w):
            same = False
            continue
        allowed = _allowed(name, w, lesser.get(name), limit, e)
        same &= not np.any(error_ratio(got, w, allowed) > 1)
        if w.dtype.kind in "fc" and w.size:
            fine = np.isfinite(w) & np.isfinite(right) & (allowed > 0)
            ours.append(((got.astype(w.dtype) - right)[fine] / allowed[fine]).astype(np.complex128))
            theirs.append(((w - right)[fine] / allowed[fine]).astype(np.complex128))
    as_much = _as_much(ours, theirs)
    if not shows:
        moved = any(np.any(abs(t) > _MOVED) for t in theirs)  # a mistake without effect on this call explains nothing
        hidden = moved and e.failed and not _beyond(e)  # only statistics say that the case fails, and may say why
        return SILENT if not hidden or as_much is False else SAME if same and as_much else UNKNOWN
    if not same:
        return OTHER
    return SAME if not e.failed or as_much else UNKNOWN if as_much is None else OTHER


def _allowed(name: str, wrong: np.ndarray, lesser, limit: np.ndarray, e: Evidence) -> np.ndarray:
    """How far two right implementations of a mistake may be from one another."""
    if e.to.half and limit.size:  # where the truth is 0 its limit is, and the mistake's is not
        limit = np.maximum(limit, limit.max() / 2)
    unit = e.to.compute_unit if name.startswith("state") else e.to.unit
    size = abs(np.where(np.isfinite(wrong), wrong, 0)).astype(np.float64)
    noise = np.nan_to_num(abs(np.asarray(lesser).astype(wrong.dtype) - wrong)).astype(np.float64) if lesser is not None and np.shape(lesser) == wrong.shape else 0.0
    return np.asarray(2 * limit + unit * size + 64 * e.to.compute_unit * np.max(size, initial=0.0) + 8 * noise)


def _as_much(ours: list, theirs: list) -> bool | None:
    """Whether the candidate's deviation from the truth has the mistake's size; None where rounding hides how large it is."""
    a, b = (np.concatenate(x) if x else np.zeros(0) for x in (ours, theirs))
    top = float(np.max(abs(b), initial=0.0))
    if not top:  # they differ by where NaN or infinities are, or not at all
        return not np.any(abs(a) > 1)
    if not np.isfinite(top):
        return None
    a, b = a / top, b / top
    square = float(np.sum(abs(b) ** 2))
    part = float(np.sum((a * np.conj(b)).real)) / square
    unsure = float(np.sqrt(np.sum(abs(a - b) ** 2 * abs(b) ** 2))) / square
    return None if unsure > _PART / 2 and abs(part - 1) < 3 * unsure else abs(part - 1) < _PART


def _beyond(e: Evidence) -> bool:
    """Whether some element is out of its bound: else only statistics say that the case fails."""
    for name, got in e.got.items():
        right = np.asarray(e.right[name])
        if not isinstance(got, np.ndarray) or got.shape != right.shape or not _same_places(got.astype(right.dtype), right):
            return True
        if got.dtype.kind in "iub" or np.any(error_ratio(got, right, np.broadcast_to(e.limits[name], right.shape)) > 1):
            return True
    return False


def _grossly(wrong: dict, e: Evidence) -> bool:
    """Whether results are so far from the candidate's that no rounding explains it."""
    for name, got in e.got.items():
        w = np.asarray(wrong.get(name))
        if not isinstance(got, np.ndarray) or got.shape != w.shape or w.dtype.kind not in "fc":
            continue
        limit = np.broadcast_to(np.asarray(e.limits.get(name, 0.0)), w.shape)
        off = error_ratio(got, w, (_GROSS_IN_HALF if e.to.half else _GROSS) * _allowed(name, w, None, limit, e))
        if np.mean(off > 1) > 0.1:
            return True
    return False


def _same_places(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype.kind in "iub" or (np.array_equal(np.isnan(a), np.isnan(b)) and np.array_equal(np.isinf(a), np.isinf(b)))


def _where_decided(op: Op, mutant: Mutant, e: Evidence) -> str:
    """Whether results (..., T, ...) are right at every step but the undecided; sums over steps say nothing where there are such."""
    undecided = mutant.undecided(widened(e.call, np.dtype(np.float64))) if mutant.undecided else np.zeros(())
    if not np.any(undecided):
        return SILENT
    axes = op.contract.result_axis(mutant.undecided_axis) if e.cotangents is None else {}
    for name in axes.keys() & e.got.keys():
        got, right, limit = e.got[name], np.asarray(e.right[name]), np.asarray(e.limits.get(name, 0.0))
        if got.shape != right.shape:
            return OTHER
        wrong = (got != right) if got.dtype.kind in "iub" else error_ratio(got, right, limit) > 1
        if np.any(wrong & ~np.expand_dims(undecided, tuple(range(axes[name] + 1, 0)))):
            return OTHER
    return SAME


# -- gradients beside a mistaken forward -------------------------------------------------------------------------------


def _as_gradient(op: Op, function: Callable, e: Evidence) -> str:
    """Whether the gradients are those of a mistaken forward, by its differences along random directions."""
    rng = np.random.default_rng(3)
    wide = widened(e.call, np.dtype(np.longdouble))
    dy, dstate = (_cast(c, np.dtype(np.longdouble)) for c in e.cotangents or ())
    cotangents = [c for c in _leaves((dy, dstate)) if c is not None]

    def loss(call: dict):
        results = op.contract.named(function(**call), call.get("return_state", False))
        outputs = [y for y in results.values() if y.dtype.kind in "fc"]
        return sum(np.sum((np.conj(c) * y).real) for c, y in zip(cotangents, outputs, strict=True))

    arguments, shows, same = flat({n: wide[n] for n in gradient_names(op, wide)}), False, True
    for name, gradient in e.got.items():
        x = arguments[name]
        for _ in range(2):
            direction = rng.standard_normal(x.shape) + (1j * rng.standard_normal(x.shape) if x.dtype.kind == "c" else 0)
            step = 1e-6 * (np.max(abs(x), initial=0.0) or 1.0)
            forth, back = (loss(_moved(wide, name, sign * step * direction)) for sign in (1, -1))
            slope = float((forth - back) / (2 * step))
            if not np.isfinite(slope):  # its results are NaN, and so should be the gradients
                shows = True
                same &= not np.all(np.isfinite(np.asarray(gradient).astype(direction.dtype)))
                break
            ours, truth = (float(np.sum((np.conj(np.asarray(g).astype(direction.dtype)) * direction).real)) for g in (gradient, e.right[name]))
            size = float(np.sqrt(np.sum(abs(np.asarray(e.right[name]).astype(direction.dtype)) ** 2)))
            rounding = float(np.sqrt(np.sum((np.broadcast_to(e.limits[name], x.shape) * abs(direction)) ** 2)))
            allowed = (16 * e.to.unit + 1e-9) * max(size, abs(slope)) + 2 * rounding
            shows |= abs(truth - slope) > allowed
            same &= abs(ours - slope) <= allowed
            if shows and not same:
                return OTHER
    return (SAME if same else OTHER) if shows else SILENT


def _moved(call: dict, name: str, by) -> dict:
    """The call with one array moved; ``state[1]`` is a part of a tuple."""
    argument, _, part = name.partition("[")
    if not part:
        return {**call, argument: call[argument] + by}
    parts: list[Any] = list(call[argument])
    parts[int(part[:-1])] = parts[int(part[:-1])] + by
    return {**call, argument: type(call[argument])(*parts) if hasattr(call[argument], "_fields") else tuple(parts)}


def _leaves(x) -> list:
    return [leaf for part in x for leaf in _leaves(part)] if isinstance(x, tuple) else [x]
