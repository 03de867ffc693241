"""What each operation of NumPy and SciPy counts for: the weights, and how depth passes through.

Elementwise functions have one row in `UFUNCS`: the class they are reported under, and the operations per element, on real and on
complex numbers. Everything else is a function below. Convention: n m k products and sums for a product of matrices (a
multiply-add is two), n - 1 for a sum or maximum of n, 5/2 n log2 n for a real and 5 n log2 n for a complex transform,
n log2 n comparisons for a sort.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy import asarray, empty, full  # by name: a measurement replaces those of `np`

from refimpl.complexity.arrays import (
    FUNCTIONS,
    UFUNC_METHODS,
    Counted,
    _arrays,
    adopt,
    buffer_of,
    copied,
    deepest,
    depth_of,
    full_depth,
    is_view,
    joined,
    ledger_of,
    levels,
    outside,
    plain,
    raised,
    view_of,
)
from refimpl.complexity.counter import CONSTANT, Ledger, Uncounted, active
from refimpl.core.costs import fft_depth, fft_work

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
    kinds = [np.result_type(x).kind for x in operands]
    if "c" in kinds:
        if name == "divide" and kinds[1] != "c":
            return kind, 2
        return kind, MIXED[name] if kinds.count("c") == 1 and len(kinds) == 2 and name in MIXED else of_complex
    if all(k == "b" for k in kinds):
        return "logic", 0
    return ("integer" if real and all(k in "biu" for k in kinds) and result.dtype.kind in "biu" else kind), real


def implements(*functions: Callable) -> Callable:
    def register(ours: Callable) -> Callable:
        for function in functions:
            FUNCTIONS[function] = ours
        return ours

    return register


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
    ledger.touch(_arrays(inputs), made)
    return made if len(made) > 1 else made[0]


def product(ufunc, inputs, out):
    """Products of matrices and vectors."""
    ledger, (a, b) = ledger_of(*inputs), (asarray(plain(x)) for x in inputs)
    raw = ufunc(a, b, **({} if out is None else {"out": plain(out)}))
    da, db = (full_depth(x) for x in inputs)
    inner = a.shape[-1]
    if ufunc.__name__ == "matmul":
        rows = da.max(axis=-1, initial=CONSTANT, keepdims=True)
        columns = db.max(axis=-2, initial=CONSTANT, keepdims=True) if b.ndim > 1 else db.max(initial=CONSTANT, keepdims=True)
        depth = np.maximum(rows if b.ndim > 1 else rows[..., 0], columns)
        if a.ndim == 1 and b.ndim > 1:
            depth = depth[..., 0, :]
    else:
        depth = joined(deepest(da), deepest(db))
    depth = raised(depth if isinstance(depth, np.ndarray) and depth.ndim else deepest(depth), 1 + levels(inner)) if inner else CONSTANT
    complexes = (a.dtype.kind == "c") + (b.dtype.kind == "c")
    kind = "integer" if raw.dtype.kind in "biu" else "matmul"
    ledger.add(kind, (2, 4, 8)[complexes] * np.size(raw) * inner, deepest(depth))
    made = _store(raw, out, depth, ledger)
    ledger.touch(_arrays(inputs), (made,))
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
    ledger.touch(_arrays([array, indices, values]), (array,))


UFUNC_METHODS.update(__call__=call, reduce=reduce, accumulate=accumulate, reduceat=reduceat, outer=outer, at=at)


# -- reductions ------------------------------------------------------------------------------------------------------

for _function, _ufunc in (
    *((np.sum, "add"), (np.prod, "multiply"), (np.max, "maximum"), (np.min, "minimum"), (np.all, "logical_and"), (np.any, "logical_or")),
):
    FUNCTIONS[_function] = lambda array, axis=None, *, _f=_function, _u=_ufunc, **kwargs: fold(_u, _f, array, axis, **kwargs)


@implements(np.mean)
def mean(array, axis=None, **kwargs):
    return fold("add", np.mean, array, axis, last=("divide", 2 if array.dtype.kind == "c" else 1), **kwargs)


@implements(np.cumsum)
def cumsum(array, axis=None, dtype=None, out=None):
    return running("add", np.cumsum, array, axis, dtype=dtype, out=out)


@implements(np.cumprod)
def cumprod(array, axis=None, dtype=None, out=None):
    return running("multiply", np.cumprod, array, axis, dtype=dtype, out=out)


@implements(np.argmax)
def argmax(array, axis=None, **kwargs):
    return fold("maximum", np.argmax, array, axis, **kwargs)


@implements(np.argmin)
def argmin(array, axis=None, **kwargs):
    return fold("minimum", np.argmin, array, axis, **kwargs)


def _ordered(function: Callable) -> Callable:
    def run(array, axis=-1, **kwargs):
        ledger, bare = ledger_of(array), plain(array)
        with outside():
            raw = function(bare, axis=axis, **kwargs)
        n = bare.shape[axis] if axis is not None else bare.size
        depth = depth_of(array)
        if isinstance(depth, np.ndarray):
            depth = np.broadcast_to(depth.max(axis=axis, keepdims=True, initial=CONSTANT), raw.shape)
        depth = raised(depth, levels(n))
        ledger.add("sort", bare.size * levels(n), deepest(depth))
        made = adopt(raw, depth, ledger)
        ledger.touch((array,), (made,))
        return made

    return run


FUNCTIONS[np.sort], FUNCTIONS[np.argsort] = _ordered(np.sort), _ordered(np.argsort)


@implements(np.trace)
def trace(array, offset=0, axis1=0, axis2=1):
    return np.sum(np.diagonal(array, offset, axis1, axis2), axis=-1)


@implements(np.diff)
def diff(array, n=1, axis=-1):
    before = (slice(None),) * (axis % array.ndim)
    for _ in range(n):
        array = array[(*before, slice(1, None))] - array[(*before, slice(None, -1))]
    return array


@implements(np.clip)
def clip(array, a_min=None, a_max=None, **kwargs):
    low, high = kwargs.get("min", a_min), kwargs.get("max", a_max)
    array = array if low is None else np.maximum(array, low)
    return array if high is None else np.minimum(array, high)


@implements(np.round)
def round_(array, decimals=0, out=None):
    if decimals or out is not None:
        raise Uncounted("complexity: numpy.round to decimals")
    return np.rint(array)


# -- products --------------------------------------------------------------------------------------------------------


@implements(np.dot)
def dot(a, b):
    return np.matmul(a, b) if np.ndim(a) and np.ndim(b) else np.multiply(a, b)


@implements(np.outer)
def outer_product(a, b):
    return np.multiply(np.reshape(a, (-1, 1)), np.reshape(b, (1, -1)))


@implements(np.einsum)
def einsum(subscripts, *operands, **kwargs):
    """Every combination of the letters, once: one product per further operand, and a sum where a letter is left out."""
    left, arrow, right = subscripts.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in left or any(len(set(t)) < len(t) for t in terms):
        raise Uncounted(f"complexity: einsum {subscripts!r}")
    ledger, bare = ledger_of(*operands), [plain(x) for x in operands]
    with outside():
        raw = asarray(np.einsum(subscripts, *bare, **kwargs))
    sizes: dict[str, int] = {}
    for term, x in zip(terms, bare, strict=True):
        sizes |= {letter: n for letter, n in zip(term, x.shape, strict=True) if n != 1 or letter not in sizes}
    left_out = [n for letter, n in sizes.items() if letter not in right]
    summed = int(np.prod(left_out))
    depth = full(raw.shape, CONSTANT, np.int32)
    for term, x in zip(terms, operands, strict=True):
        own = full_depth(x).max(axis=tuple(i for i, letter in enumerate(term) if letter not in right), initial=CONSTANT)
        letters = [letter for letter in term if letter in right]
        own = own.transpose([letters.index(letter) for letter in right if letter in letters])
        depth = np.maximum(depth, np.expand_dims(own, [i for i, letter in enumerate(right) if letter not in letters]))
    depth = raised(depth, len(operands) - 1 + levels(summed))
    complexes = sum(x.dtype.kind == "c" for x in bare)
    each = (len(operands) - 1) * (1, 2, 6)[min(complexes, 2)] + bool(left_out) * (2 if complexes else 1)
    kind = "integer" if raw.dtype.kind in "biu" else "matmul" if left_out else "multiply"
    ledger.add(kind, each * raw.size * summed, deepest(depth))
    made = adopt(raw, depth, ledger)
    ledger.touch(_arrays(operands), (made,))
    return made


@implements(np.linalg.solve)
def solve(a, b):
    """Gaussian elimination: n(n-1)/2 quotients and n(n-1)(2n-1)/3 more, then 2 n² - n for each right-hand side."""
    ledger, (x, y) = ledger_of(a, b), (asarray(plain(v)) for v in (a, b))
    with outside():
        raw = np.linalg.solve(x, y)
    n, columns = x.shape[-1], y.shape[-1] if y.ndim > 1 else 1
    systems = raw.size // (n * columns) if n and columns else 0
    each = n * (n - 1) // 2 + n * (n - 1) * (2 * n - 1) // 3 + (2 * n * n - n) * columns
    depth = raised(max(deepest(depth_of(v)) for v in (a, b)), 8 * n - 7)
    ledger.add("solve", each * systems * (4 if raw.dtype.kind == "c" else 1), depth)
    made = adopt(raw, depth, ledger)
    ledger.touch(_arrays([a, b]), (made,))
    return made


@implements(np.linalg.inv)
def inv(a):
    return np.linalg.solve(a, np.broadcast_to(np.eye(a.shape[-1], dtype=a.dtype), a.shape))


@implements(np.linalg.matrix_power)
def matrix_power(a, n):
    """By repeated squaring: log2 n squarings, and a product for each further digit."""
    result = None
    while n:
        if n & 1:
            result = a if result is None else result @ a
        n >>= 1
        a = a @ a if n else a
    return np.broadcast_to(np.eye(a.shape[-1], dtype=a.dtype), a.shape) if result is None else result


# -- transforms ------------------------------------------------------------------------------------------------------

REAL_TRANSFORMS = {"rfft", "irfft"}
COMPLEX_TRANSFORMS = {"fft", "ifft", "hfft", "ihfft"}


def transform(function: Callable, name: str, array, n=None, axis=-1, **kwargs):
    """One transform of length n for each line."""
    if name not in REAL_TRANSFORMS | COMPLEX_TRANSFORMS:
        raise Uncounted(f"complexity: fft.{name} is not known to the counter")
    ledger, bare = ledger_of(array), plain(array)
    with outside():
        raw = function(bare, n, axis=axis, **{k: v for k, v in kwargs.items() if v is not None})
    length = n or (2 * (bare.shape[axis] - 1) if name == "irfft" else bare.shape[axis])
    lines = bare.size // bare.shape[axis] if bare.size else 0
    real = name in REAL_TRANSFORMS or (bare.dtype.kind != "c" and name == "fft")
    depth = depth_of(array)
    if isinstance(depth, np.ndarray):
        depth = np.broadcast_to(depth.max(axis=axis, keepdims=True, initial=CONSTANT), raw.shape)
    depth = raised(depth, fft_depth(length))
    ledger.add("fft", round((1 if real else 2) * fft_work(length)) * lines, deepest(depth))
    made = adopt(raw, depth, ledger)
    ledger.touch((array,), (made,))
    return made


for _name in sorted(REAL_TRANSFORMS | COMPLEX_TRANSFORMS):
    _function = getattr(np.fft, _name)
    FUNCTIONS[_function] = lambda array, n=None, axis=-1, *, _f=_function, _n=_name, **kwargs: transform(_f, _n, array, n, axis, **kwargs)


class Transforms:
    """SciPy's transforms, which ask a backend instead of the array."""

    __ua_domain__ = "numpy.scipy.fft"

    @staticmethod
    def __ua_function__(method, args, kwargs):
        if not any(isinstance(a, Counted) for a in (*args, *kwargs.values())):
            return NotImplemented

        def run(*args, **kwargs):
            import scipy.fft

            with scipy.fft.skip_backend(Transforms):
                return method(*args, **kwargs)

        with outside():
            return transform(run, method.__name__, *args, **kwargs)


# -- what moves and selects --------------------------------------------------------------------------------------------


def _moves(function: Callable) -> Callable:
    """The same is done to the depths as to the values: exact, whatever it is."""

    def run(*args, **kwargs):
        ledger = ledger_of(*args, *kwargs.values())
        depths: set[int] = set()
        for x in _arrays((*args, *kwargs.values())):
            depth = depth_of(x)
            depths |= set(np.unique(depth).tolist()) if isinstance(depth, np.ndarray) else {depth}
        with outside():
            raw = function(*plain(args), **plain(kwargs))
            uniform = len(depths) == 1
            depth = depths.pop() if uniform else function(*_depths(args), **_depths(kwargs))
        made = adopt(raw, depth, ledger)
        ledger.touch(_arrays((*args, *kwargs.values())), (made,))
        return made

    return run


def _depths(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return full_depth(value)
    if isinstance(value, list | tuple):
        return type(value)(_depths(v) for v in value)
    return {k: _depths(v) for k, v in value.items()} if isinstance(value, dict) else value


for _function in (
    *(np.concatenate, np.stack, np.vstack, np.hstack, np.column_stack, np.roll, np.tile, np.append, np.resize, np.repeat, np.delete, np.insert),
):
    FUNCTIONS[_function] = _moves(_function)


def _looks(function: Callable) -> Callable:
    """Views where NumPy gives views, else copies."""

    def wrap(raw, source):
        if isinstance(raw, list | tuple):
            return type(raw)(wrap(r, source) for r in raw)
        if is_view(raw, source):
            return view_of(raw, source)
        return None

    def run(*args, **kwargs):
        source = next(a for a in (*args, *kwargs.values()) if isinstance(a, Counted))
        with outside():
            raw = function(*plain(args), **plain(kwargs))
        made = wrap(raw, source)
        return copy(*args, **kwargs) if made is None else made

    copy = _moves(function)
    return run


for _function in (
    *(np.reshape, np.ravel, np.transpose, np.swapaxes, np.moveaxis, np.squeeze, np.expand_dims, np.broadcast_to, np.flip, np.diagonal),
    *(np.atleast_1d, np.atleast_2d, np.split, np.array_split, np.hsplit, np.matrix_transpose, np.rot90, np.permute_dims),
):
    FUNCTIONS[_function] = _looks(_function)


@implements(np.real)
def real(array):
    return array.real


@implements(np.imag)
def imag(array):
    return array.imag


@implements(np.broadcast_arrays)
def broadcast_arrays(*arrays, subok=False):
    shape = np.broadcast_shapes(*(np.shape(a) for a in arrays))
    return tuple(np.broadcast_to(a, shape) for a in arrays)


@implements(np.copy)
def copy(array, order="K", subok=False):
    return copied(array, plain(array).copy(order))


@implements(np.copyto)
def copyto(to, values, casting="same_kind", where=True):
    if where is True:
        to[...] = values
    else:
        to[...] = np.where(where, values, to)


@implements(np.where)
def where(condition, *choices):
    if not choices:
        return np.nonzero(condition)
    ledger = ledger_of(condition, *choices)
    raw = np.where(*(plain(x) for x in (condition, *choices)))
    made = adopt(raw, joined(*(depth_of(x) for x in (condition, *choices))), ledger)
    ledger.touch(_arrays((condition, *choices)), (made,))
    return made


@implements(np.isneginf, np.isposinf)
def is_infinite(array, out=None):
    """Looks at bits, as `isfinite` does."""
    return np.isinf(array)


@implements(np.nonzero)
def nonzero(array):
    """Compaction: positions are running sums."""
    ledger, raws = ledger_of(array), plain(array).nonzero()
    depth = raised(deepest(depth_of(array)), levels(array.size))
    ledger.add("integer", array.size, depth)
    made = tuple(adopt(raw, depth, ledger) for raw in raws)
    ledger.touch((array,), made)
    return made


@implements(np.flatnonzero)
def flatnonzero(array):
    return np.nonzero(np.ravel(array))[0]


@implements(np.take)
def take(array, indices, axis=None, **kwargs):
    if axis is None:
        return np.ravel(array)[indices]
    return array[(slice(None),) * (axis % array.ndim) + (indices,)]


@implements(np.take_along_axis)
def take_along_axis(array, indices, axis=-1):
    ledger = ledger_of(array, indices)
    with outside():
        raw = np.take_along_axis(plain(array), plain(indices), axis)
        moved = depth_of(array)
        if isinstance(moved, np.ndarray):
            moved = np.take_along_axis(moved, plain(indices), axis)
    made = adopt(raw, joined(moved, depth_of(indices)), ledger)
    ledger.touch((made, *_arrays([indices])), (made,))
    return made


@implements(np.put_along_axis)
def put_along_axis(array, indices, values, axis):
    buffer = buffer_of(array)
    with outside():
        np.put_along_axis(plain(array), plain(indices), plain(values), axis)
        depth = full_depth(array).copy()
        np.put_along_axis(depth, plain(indices), joined(full_depth(indices), depth_of(values)), axis)
    buffer.write(array, depth)
    buffer.ledger.touch(_arrays([indices, values]), (adopt(empty(np.shape(indices), array.dtype), CONSTANT, buffer.ledger),))


def _triangle(function: Callable) -> Callable:
    def run(array, k=0):
        made = adopt(function(plain(array), k), depth_of(array), ledger_of(array))
        buffer_of(made).ledger.touch((array,), (made,))
        return made

    return run


FUNCTIONS[np.tril], FUNCTIONS[np.triu] = _triangle(np.tril), _triangle(np.triu)


@implements(np.diag)
def diag(array, k=0):
    return np.diagonal(array, k) if array.ndim == 2 else _moves(np.diag)(array, k)


@implements(np.searchsorted)
def searchsorted(array, values, side="left", sorter=None):
    ledger = ledger_of(array, values)
    raw = np.searchsorted(plain(array), plain(values), side=side)
    depth = raised(max(deepest(depth_of(x)) for x in (array, values)), levels(len(array) + 1))
    ledger.add("compare", np.size(raw) * levels(len(array) + 1), depth)
    made = adopt(raw, depth, ledger)
    ledger.touch(_arrays([array, values]), (made,))
    return made


@implements(np.bincount)
def bincount(array, weights=None, minlength=0):
    ledger = ledger_of(array, weights)
    raw = np.bincount(plain(array), plain(weights), minlength)
    depth = raised(max(deepest(depth_of(x)) for x in (array, weights)), 1 + levels(array.size))
    ledger.add("integer" if weights is None else "sum", array.size, depth)
    made = adopt(raw, depth, ledger)
    ledger.touch(_arrays([array, weights]), (made,))
    return made


# -- what makes arrays -----------------------------------------------------------------------------------------------


def _like(function: Callable) -> Callable:
    def run(array, *args, **kwargs):
        ledger = ledger_of(array)
        made = adopt(function(plain(array), *plain(args), **plain(kwargs)), depth_of(args[0]) if function is np.full_like else CONSTANT, ledger)
        if function is not np.empty_like:
            ledger.touch((), (made,))
        return made

    return run


for _function in (np.zeros_like, np.ones_like, np.full_like, np.empty_like):
    FUNCTIONS[_function] = _like(_function)


def _free(function: Callable) -> Callable:
    return lambda *args, **kwargs: function(*plain(args), **plain(kwargs))


for _function in (
    *(np.iscomplexobj, np.isrealobj, np.shape, np.ndim, np.size, np.result_type, np.can_cast, np.may_share_memory, np.shares_memory),
    *(np.min_scalar_type, np.common_type),
):
    FUNCTIONS[_function] = _free(_function)


def _constant(original: Callable) -> Callable:
    """A function that makes an array of nothing: within a measurement, a counted constant."""

    def make(*args, **kwargs):
        ledger = active.get()
        if ledger is None:
            return original(*args, **kwargs)
        made = adopt(original(*plain(args), **plain(kwargs)), depth_of([*args, *kwargs.values()]), ledger)
        if original is not np.empty:
            ledger.touch((), (made,))
        return made

    return make


def _converter(original: Callable, copies: bool) -> Callable:
    """np.array and np.asarray, which see neither subclasses nor what lists of arrays consist of."""

    def convert(value, dtype=None, **kwargs):
        ledger = active.get()
        if ledger is None:
            return original(value, dtype, **kwargs)
        same = isinstance(value, Counted) and (dtype is None or np.dtype(dtype) == value.dtype)
        if same and not (copies and kwargs.get("copy", True)):
            return value
        if isinstance(value, np.ndarray) and not isinstance(value, Counted):
            return adopt(original(value, dtype, **kwargs), CONSTANT, ledger)
        with outside():
            raw = original(plain(value), dtype, **kwargs)
            depth = depth_of(value) if isinstance(value, Counted) or deepest(depth_of(value)) < 0 else original(_depths_of(value), np.int32)
        made = adopt(raw, depth, ledger)
        ledger.touch(_arrays([value]), (made,))
        return made

    return convert


def _depths_of(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_depths_of(v) for v in value]
    return full_depth(value)


def _apart(original: Callable) -> Callable:
    """A function of NumPy that makes arrays for its own use by way of `np`."""

    def make(*args, **kwargs):
        with outside():
            return original(*args, **kwargs)

    return make


MAKERS: list[tuple[Any, str, Callable]] = [
    *((np, name, _constant(getattr(np, name))) for name in ("zeros", "ones", "empty", "full", "eye", "identity", "arange", "tri", "linspace")),
    *((np, name, _converter(getattr(np, name), name == "array")) for name in ("array", "asarray", "ascontiguousarray")),
    (np.random, "default_rng", _apart(np.random.default_rng)),
]
