"""What a ufunc counts for: the weights, and how depth passes through.

Elementwise functions have one row in `UFUNCS`: the class they are reported under, and the operations per element, on real and
on complex numbers. Sums and maxima of n are n - 1 operations, products of matrices n m k multiply-adds of two.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy import asarray  # by name: a measurement replaces those of `np`

from refimpl.complexity.arrays import (
    UFUNC_METHODS,
    Counted,
    adopt,
    arrays_in,
    buffer_of,
    deepest,
    depth_of,
    full_depth,
    joined,
    ledger_of,
    levels,
    outside,
    plain,
    raised,
)
from refimpl.complexity.counter import CONSTANT, Ledger, Uncounted

# name -> class, operations per element of real and of complex numbers
UFUNCS: dict[str, tuple[str, int, int]] = {
    **dict.fromkeys(("add", "subtract"), ("add", 1, 2)),
    "multiply": ("multiply", 1, 6),
    "square": ("multiply", 1, 6),
    "divide": ("divide", 1, 11),
    "reciprocal": ("divide", 1, 11),
    **dict.fromkeys(("floor_divide", "remainder", "fmod", "divmod"), ("divide", 1, 11)),
    **dict.fromkeys(("sqrt", "cbrt"), ("root", 1, 8)),
    **dict.fromkeys(("maximum", "minimum", "fmax", "fmin"), ("compare", 1, 2)),
    **dict.fromkeys(("less", "less_equal", "greater", "greater_equal", "equal", "not_equal"), ("compare", 1, 2)),
    "clip": ("compare", 2, 4),
    **dict.fromkeys(("rint", "floor", "ceil", "trunc"), ("round", 1, 2)),
    "ldexp": ("multiply", 1, 2),
    **dict.fromkeys(("exp", "exp2", "expm1"), ("exp", 1, 5)),
    **dict.fromkeys(("log", "log2", "log10", "log1p"), ("log", 1, 6)),
    **dict.fromkeys(("power", "float_power"), ("power", 1, 17)),
    **dict.fromkeys(("sin", "cos", "tan", "sinh", "cosh"), ("trigonometric", 1, 8)),
    **dict.fromkeys(("tanh", "arctan", "arctan2", "arcsin", "arccos", "arctanh", "arcsinh"), ("special", 1, 11)),
    **dict.fromkeys(("expit", "ndtr", "erf", "erfc", "log_expit", "logaddexp", "hypot"), ("special", 1, 11)),
    "absolute": ("root", 0, 4),
    **dict.fromkeys(("negative", "positive", "conjugate", "sign", "copysign", "fabs"), ("move", 0, 0)),
    **dict.fromkeys(("isfinite", "isnan", "isinf", "signbit", "frexp", "spacing", "nextafter"), ("move", 0, 0)),
    **dict.fromkeys(("logical_and", "logical_or", "logical_not", "logical_xor"), ("logic", 0, 0)),
    **dict.fromkeys(("bitwise_and", "bitwise_or", "bitwise_xor", "invert", "left_shift", "right_shift"), ("integer", 1, 1)),
    "bitwise_count": ("integer", 1, 1),
}
MIXED = {"add": 1, "subtract": 1, "multiply": 2}  # a real and a complex number
IDENTITIES = {"add": 0, "multiply": 1, "maximum": -np.inf, "minimum": np.inf, "logical_and": True, "logical_or": False}
PRODUCTS = {"matmul", "vecdot", "matvec", "vecmat"}


def weight(name: str, operands: list, result: np.ndarray) -> tuple[str, int]:
    """Class and operations per element of a ufunc."""
    if name not in UFUNCS:
        raise Uncounted(f"complexity: {name} is not known to the counter")
    kind, real, of_complex = UFUNCS[name]
    kinds = [x.dtype.kind if isinstance(x, np.ndarray | np.generic) else np.result_type(x).kind for x in operands]
    if "c" in kinds:
        if name == "divide" and kinds[1] != "c":
            return kind, 2
        return kind, MIXED[name] if kinds.count("c") == 1 and len(kinds) == 2 and name in MIXED else of_complex
    if all(k == "b" for k in kinds):
        return "logic", 0
    return ("integer" if real and all(k in "biu" for k in kinds) and result.dtype.kind in "biu" else kind), real


# -- ufuncs ----------------------------------------------------------------------------------------------------------


def _store(raw: Any, out: Any, depth: Any, ledger: Ledger) -> Counted:
    """A result: new, or written into an array that was given for it."""
    if out is None:
        return adopt(raw, depth, ledger)
    if not isinstance(out, Counted):
        raise Uncounted("complexity: a result is written into an array that is not counted")
    buffer_of(out).write(out, depth)
    return out


def call(ufunc, *inputs, out=None, **kwargs):
    outs = out if isinstance(out, tuple) else (out,) * ufunc.nout
    if ufunc.__name__ in PRODUCTS:
        return product(ufunc, inputs, outs[0])
    ledger = ledger_of(*inputs, *(o for o in outs if o is not None))
    bare = plain(list(inputs))
    raws = ufunc(*bare, **({} if out is None else {"out": plain(outs)}), **plain(kwargs))
    raws = raws if isinstance(raws, tuple) else (raws,)
    kind, each = weight(ufunc.__name__, bare, raws[0])
    depth = raised(joined(*(depth_of(x) for x in (*inputs, kwargs.get("where")))), 1 if each else 0)
    ledger.add(kind, each * np.size(raws[0]), deepest(depth))
    made = tuple(_store(raw, o, depth, ledger) for raw, o in zip(raws, outs, strict=True))
    ledger.touch(arrays_in(inputs), made)
    return made if len(made) > 1 else made[0]


def product(ufunc, inputs, out):
    """Products of matrices and vectors."""
    ledger, (a, b) = ledger_of(*inputs), (asarray(plain(x)) for x in inputs)
    raw = ufunc(a, b, **({} if out is None else {"out": plain(out)}))
    da, db = (depth_of(x) for x in inputs)
    inner = a.shape[-1]
    if ufunc.__name__ == "matmul" and (isinstance(da, np.ndarray) or isinstance(db, np.ndarray)):
        da, db = (full_depth(x) for x in inputs)
        rows = da.max(axis=-1, initial=CONSTANT, keepdims=True)
        columns = db.max(axis=-2, initial=CONSTANT, keepdims=True) if b.ndim > 1 else db.max(initial=CONSTANT, keepdims=True)
        depth = np.maximum(rows if b.ndim > 1 else rows[..., 0], columns)
        if a.ndim == 1 and b.ndim > 1:
            depth = depth[..., 0, :]
    else:
        depth = joined(deepest(da), deepest(db))
    depth = raised(depth if getattr(depth, "ndim", 0) else deepest(depth), 1 + levels(inner)) if inner else CONSTANT
    complexes = (a.dtype.kind == "c") + (b.dtype.kind == "c")
    kind = "integer" if raw.dtype.kind in "biu" else "matmul"
    ledger.add(kind, (2, 4, 8)[complexes] * np.size(raw) * inner, deepest(depth))
    made = _store(raw, out, depth, ledger)
    ledger.touch(arrays_in(inputs), (made,))
    return made


def _axes(axis, ndim: int) -> tuple[int, ...]:
    return tuple(range(ndim)) if axis is None else tuple(a % ndim for a in (axis if isinstance(axis, tuple) else (axis,)))


def fold(name: str, function: Callable, array, axis=None, *, keepdims=False, last: tuple[str, int] | None = None, **kwargs):
    """A reduction by a binary operation, as a balanced tree; `last` is done to each result afterwards."""
    ledger, bare = ledger_of(array), plain(array)
    kwargs = {k: v for k, v in kwargs.items() if v is not None and v is not np._NoValue}
    if kwargs.pop("out", None) is not None:
        raise Uncounted(f"complexity: {name} into an array that was there before")
    with outside():
        raw = asarray(function(bare, axis=axis, keepdims=keepdims, **plain(kwargs)))
    kind, each = weight(name, [bare, bare], bare)
    started = int("initial" in kwargs and kwargs["initial"] != IDENTITIES[name])  # from the identity, a fold does nothing more
    depth, axes = depth_of(array), _axes(axis, bare.ndim)
    if isinstance(depth, np.ndarray):
        depth = depth.max(axis=axes, keepdims=bool(keepdims), initial=CONSTANT)
    each_of = bare.size // raw.size if raw.size else 0
    count = max(bare.size - raw.size, 0) + started * raw.size if bare.size else 0
    depth = raised(depth, levels(each_of + started)) if bare.size else CONSTANT
    if name == "add" and kind == "add":
        kind = "sum"
    if bare.dtype.kind == "b" and name == "add":
        kind, each = "integer", 1
    ledger.add(kind, each * count, deepest(depth))
    if last is not None:
        depth = raised(depth, 1)
        ledger.add(last[0], last[1] * raw.size, deepest(depth))
    made = adopt(raw, depth, ledger)
    ledger.touch((array,), (made,))
    return made


def reduce(ufunc, array, axis=0, dtype=None, out=None, **kwargs):
    if dtype is not None or out not in (None, (None,)):
        raise Uncounted(f"complexity: {ufunc.__name__}.reduce with dtype or out")
    return fold(ufunc.__name__, ufunc.reduce, array, axis, **kwargs)


def running(name: str, function: Callable, array, axis=None, **kwargs):
    """A running sum (maximum ...): T - 1 operations one after another, or a scan log2 T deep."""
    if any(v is not None for v in kwargs.values()):
        raise Uncounted(f"complexity: running {name} with {', '.join(kwargs)}")
    if axis is None:
        array, axis = np.reshape(array, -1), 0
    ledger, bare = ledger_of(array), plain(array)
    with outside():
        raw = function(bare, axis=axis)
    kind, each = weight(name, [bare, bare], bare)
    if bare.dtype.kind == "b":
        kind, each = "integer", 1
    depth = depth_of(array)
    if bare.size:
        steps = asarray([levels(i + 1) for i in range(bare.shape[axis])]).reshape([-1] + [1] * (bare.ndim - 1 - axis % bare.ndim))
        depth = np.maximum.accumulate(np.broadcast_to(asarray(depth, np.int32), bare.shape), axis=axis)
        depth = depth + steps * (depth >= 0)
        ledger.add(kind, each * (bare.size - bare.size // bare.shape[axis]), deepest(depth))
    made = adopt(raw, depth, ledger)
    ledger.touch((array,), (made,))
    return made


def accumulate(ufunc, array, axis=0, dtype=None, out=None):
    return running(ufunc.__name__, ufunc.accumulate, array, axis, dtype=dtype, out=out if out != (None,) else None)


def reduceat(ufunc, array, indices, axis=0, dtype=None, out=None):
    ledger, bare = ledger_of(array), plain(array)
    raw = ufunc.reduceat(bare, plain(indices), axis)
    kind, each = weight(ufunc.__name__, [bare, bare], bare)
    depth = raised(deepest(depth_of(array)), levels(bare.shape[axis]) if each else 0)
    ledger.add(kind, each * max(bare.size - raw.size, 0), depth)
    made = adopt(raw, depth, ledger)
    ledger.touch((array,), (made,))
    return made


def outer(ufunc, a, b, **kwargs):
    return call(ufunc, np.reshape(a, np.shape(a) + (1,) * np.ndim(b)), b, **kwargs)


def at(ufunc, array, indices, values):
    """Unbuffered: equal indices add up, in any order."""
    ledger, bare = ledger_of(array), plain(array)
    ufunc.at(bare, plain(indices), plain(values))
    size = np.size(plain(values))
    kind, each = weight(ufunc.__name__, [bare, bare], bare)
    depth = raised(max(deepest(depth_of(x)) for x in (array, indices, values)), 1 + levels(size))
    ledger.add(kind, each * size, depth)
    buffer_of(array).write(array, depth)
    ledger.touch(arrays_in([array, indices, values]), (array,))


UFUNC_METHODS.update(__call__=call, reduce=reduce, accumulate=accumulate, reduceat=reduceat, outer=outer, at=at)
