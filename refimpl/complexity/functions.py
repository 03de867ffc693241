"""What NumPy's reductions, sorts, products, solvers and transforms count for.

A transform of length n is 5/2 n log2 n operations on real and 5 n log2 n on complex numbers, a sort of n is n log2 n comparisons,
Gaussian elimination what it does.
"""

from collections.abc import Callable

import numpy as np
from numpy import asarray, full  # by name: a measurement replaces those of `np`

from refimpl.complexity.arrays import (
    FUNCTIONS,
    Counted,
    adopt,
    arrays_in,
    deepest,
    depth_of,
    full_depth,
    implements,
    ledger_of,
    levels,
    outside,
    plain,
    raised,
)
from refimpl.complexity.counter import CONSTANT, Uncounted
from refimpl.complexity.ufuncs import fold, running
from refimpl.core.costs import fft_depth, fft_work

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
    kind = "integer" if raw.dtype.kind in "biu" else "einsum" if left_out else "multiply"
    ledger.add(kind, each * raw.size * summed, deepest(depth))
    made = adopt(raw, depth, ledger)
    ledger.touch(arrays_in(operands), (made,))
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
    ledger.touch(arrays_in([a, b]), (made,))
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
