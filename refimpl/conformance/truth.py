"""The right results of a call, and how far from them a right implementation may be.

The truth about float32 and the half types is the definition in float64, about float64 the definition in longdouble. The
distance allowed is the chapter's error bound, for the arithmetic in which the candidate computes.
"""

import functools
import inspect
import warnings
from collections.abc import Callable

import numpy as np

from refimpl.conformance.precision import Precision, rounding, widened
from refimpl.op import Op

SLACK = 2.0  # on the chapter's bound in float32 and float64, where right and wrong lie a thousandfold apart
_HALF_SLACK = 1.0


def truth(op: Op, call: dict, to: Precision) -> dict[str, np.ndarray]:
    """Right results by name; `call` holds arrays already rounded to the precision.

    Raises
    ------
    ValueError
        If the operator refuses the call.
    """
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = op.definition(**widened(call, to.truth))
    return op.contract.named(result, call.get("return_state", False))


def tolerance(op: Op, call: dict, to: Precision, right: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The distance allowed, elementwise, by name (gate G1)."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bound = op.error_bound(**widened(call, np.dtype(np.float64)), unit=to.compute_unit, store=to.store)
    named = op.contract.named(bound, call.get("return_state", False))
    slack = _HALF_SLACK if to.coarse else SLACK
    factors = [_largest(v) for v in list(call.values())[1:] if isinstance(v, np.ndarray) and v.dtype.kind not in "iub"]  # what follows may enlarge it
    flushed = smallest(to) * max(1.0, *factors) if to.half and factors else smallest(to)
    limits = {}
    for name, exact in right.items():
        unit = to.compute_unit if name.startswith("state") else to.unit
        with np.errstate(all="ignore"):
            limit = slack * np.nan_to_num(np.asarray(named[name], dtype=np.float64), nan=0.0, posinf=np.inf)
            limits[name] = np.broadcast_to(limit + unit * abs(exact).astype(np.float64) + flushed, np.shape(exact))
    return limits


def certain(op: Op, call: dict, to: Precision, right: dict[str, np.ndarray]) -> bool:
    """Whether a call is so simple that every right algorithm gives the truth itself in a half precision.

    So it is if results of few bits come out the same from every form; for what an algorithm adds on the way in float32,
    a transform's error, say, vanishes in the last rounding.
    """
    if not to.half or any(np.any(abs(v) > 64) or np.any(v * 4 != np.rint(v * 4)) for v in right.values() if v.dtype.kind in "fc"):
        return False
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for form in op.forms.values():
            try:
                found = op.contract.named(form.function(**call), call.get("return_state", False))
            except ValueError:
                continue
            if not all(np.array_equal(np.asarray(found[n]).astype(v.dtype), v) for n, v in right.items()):
                return False
    return True


def directions(op: Op, call: dict, right: dict[str, np.ndarray], to: Precision) -> dict[str, dict[str, np.ndarray]]:
    """What a factor on one argument does to every result: the derivative by the factor, by result, for every real array of the call."""
    step = 2.0**-7
    right = {name: exact for name, exact in right.items() if exact.dtype.kind in "fc"}
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name in right}
    wide = widened(call, to.truth)
    for argument, value in wide.items():
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
            continue
        try:
            moved = truth(op, {**wide, argument: value * (1 + step)}, to)
        except ValueError:
            continue
        for name, exact in right.items():
            with np.errstate(all="ignore"):
                slope = (moved[name] - exact) / step
            found[name][argument] = np.where(np.isfinite(slope), slope, 0).astype(np.complex128 if slope.dtype.kind == "c" else np.float64)
    return found


def smallest(to: Precision) -> float:
    """What may be flushed to zero: below the smallest normal number of the arithmetic, or half a step of the result."""
    import ml_dtypes

    info = ml_dtypes.finfo(to.dtype)
    return max(float(np.finfo(to.compute).tiny), float(info.smallest_subnormal) if to.dtype != to.compute else 0.0)


def _adjoint(op: Op) -> Callable:
    if op.gradient is None:
        raise ValueError(f"check: {op.name} has no gradient")
    return op.gradient


def gradient_names(op: Op, call: dict) -> list[str]:
    """Arguments of a call that the contract's vjp takes."""
    accepted = inspect.signature(_adjoint(op)).parameters
    return [n for n in call if n in accepted]


def gradient_truth(op: Op, call: dict, dy, dstate, to: Precision) -> dict:
    """The right gradients by argument name."""
    wide = widened(call, to.truth)
    wide = {n: wide[n] for n in gradient_names(op, wide)}
    extra = {} if dstate is None else {"dstate": _widen(dstate, to.truth)}
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _adjoint(op)(_widen(dy, to.truth), **wide, **extra)


def gradient_tolerance(op: Op, call: dict, dy, dstate, to: Precision, right: dict, results: dict) -> dict:
    """The distance allowed for gradients: what perturbations of the inputs by their own roundoff do to them.

    A backward-stable algorithm is the exact gradient of inputs changed by a few roundoffs; so the spread of the exact
    gradients of such inputs, times a small factor, is what right algorithms show; with it the error of the chapter's own
    gradient in the candidate's arithmetic, the roundoff of sums as large as the largest entry, and |dy| |error of y| / |x|,
    which is what is left where a gradient is exactly zero; the relative error that the results themselves may have; and u |x|,
    the relative error of a factor that is formed as e^(x - logsumexp x).

    Perturbations come with their opposites, one pair thrice as large and counted a third: so that where the operator has a
    kink (max(|n·q|, e^-m) of mLSTM, for one) nearby, one of them is on its other side, where a right algorithm may be too.
    """
    unit = max(to.unit, to.store)
    base = widened(call, np.dtype(np.float64))
    right = {n: _tree(lambda v: np.asarray(v, dtype=np.result_type(v.dtype, np.float64) if v.dtype.kind != "g" else v.dtype), g) for n, g in right.items()}
    spread = {n: _tree(lambda v: np.zeros(np.shape(v)), g) for n, g in right.items()}
    for roundoffs, sign in ((2, 1), (2, -1), (6, 1), (6, -1)):
        shake = functools.partial(_shake, unit=sign * roundoffs * unit, rng=np.random.default_rng(7 + roundoffs))
        shaken = {n: _tree(shake, v) for n, v in base.items()}
        moved = gradient_truth(op, shaken, _tree(shake, _widen(dy, np.dtype(np.float64))), dstate, to)
        spread = _spread(spread, moved, right, 2 / roundoffs)
    compute = widened(call, to.compute)
    spread = _spread(spread, _own_gradient(op, compute, dy, dstate, to), right, 0.5)
    if to.half and not op.lengths:  # without steps in time, every intermediate result may be rounded to the half type
        step_by_step = {n: rounding(v, to) for n, v in compute.items()}
        spread = _spread(spread, _own_gradient(op, step_by_step, dy, dstate, to), right, 1.0)
    longest = max((max(v.shape, default=1) for v in base.values() if isinstance(v, np.ndarray)), default=1)

    bounds = tolerance(op, call, to, results)
    relative = max((_largest(bounds[n]) / _largest(y) for n, y in results.items() if _largest(y)), default=0.0)
    product = max((_largest(c) * _largest(bounds[n]) for c, n in zip(_leaves((dy, dstate)), results, strict=False)), default=0.0)

    def limit(s, r, x):
        size = _largest(x)
        smooth = np.broadcast_to(s.max(axis=-1, keepdims=True), s.shape) if s.ndim and s.size else s
        sums = 4 * unit * (np.sqrt(longest) if not to.coarse else 1.0) * _largest(r) + product / (size or 1.0)
        share = relative * (abs(r).astype(np.float64) + 0.05 * _largest(r)) + 2 * to.compute_unit * size * abs(r).astype(np.float64)
        return (8 if to.coarse else 16) * smooth + sums + share + unit * abs(r).astype(np.float64) + smallest(to)

    with np.errstate(all="ignore"):
        return {n: _tree3(limit, spread[n], right[n], base[n]) for n in right}


def _own_gradient(op: Op, compute: dict, dy, dstate, to: Precision) -> dict:
    """The chapter's gradient of a call in the precision in which the candidate computes."""
    extra = {} if dstate is None else {"dstate": _widen(dstate, to.compute)}
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _adjoint(op)(_widen(dy, to.compute), **{n: compute[n] for n in gradient_names(op, compute)}, **extra)


def _spread(spread: dict, gradients: dict, right: dict, weight: float) -> dict:
    """The largest errors so far, and those of other gradients, weighted."""

    def widest(s, g, r):
        return np.maximum(s, weight * np.nan_to_num(abs(g - r).astype(np.float64)))

    return {n: _tree3(widest, s, gradients[n], right[n]) if n in gradients else s for n, s in spread.items()}


def _shake(x, unit: float, rng):
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "fc":
        return x
    return x * (1 + unit * rng.uniform(-1, 1, x.shape))


def _widen(x, dtype):
    def widen(v):
        if not isinstance(v, np.ndarray) or v.dtype.kind in "iub":
            return v
        return v.astype(np.result_type(dtype, np.complex64) if v.dtype.kind == "c" else dtype)

    return _tree(widen, x)


def _tree(f, x):
    if isinstance(x, tuple):
        parts = [_tree(f, v) for v in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return None if x is None else f(x)


def _tree3(f, x, y, z):
    if isinstance(x, tuple):
        return tuple(_tree3(f, a, b, c) for a, b, c in zip(x, y, z, strict=True))
    return f(x, y, z)


def _leaves(x) -> list:
    if isinstance(x, tuple):
        return [leaf for part in x for leaf in _leaves(part)]
    return [] if x is None else [x]


def _largest(x) -> float:
    x = abs(np.asarray(x))
    return float(np.max(x[np.isfinite(x)], initial=0.0))


def flat(values: dict) -> dict[str, np.ndarray]:
    """Gradients (or arguments) by name, a state's parts each by a name of its own."""
    found: dict[str, np.ndarray] = {}
    for name, value in values.items():
        found |= {f"{name}[{i}]": part for i, part in enumerate(value)} if isinstance(value, tuple) else {name: value}
    return found
