"""Counted arrays: ndarrays that write to a ledger whatever is done with them.

A `Counted` is an ndarray whose every operation, be it a ufunc, a function of NumPy, a method or an index, arrives at
`__array_ufunc__`, `__array_function__` or a method of this class, is run on plain arrays, and is entered in the ledger.
What is not known there raises `Uncounted`; so does an array that came into being behind our back, since it has no buffer.
A value that leaves the arrays for Python may be a condition or an index (bool, int), not a number to compute with.
"""
# mypy: disable-error-code="override, misc, assignment"
# (the methods of an ndarray, of which this class has its own, have overloads that do not concern it)

from collections.abc import Callable, Iterator
from math import ceil, log2
from typing import Any

import numpy as np
from numpy import asarray  # by name: a measurement replaces those of `np`

from refimpl.complexity.counter import CONSTANT, Buffer, Ledger, Uncounted, active

FUNCTIONS: dict[Callable, Callable] = {}  # NumPy's function -> ours, which runs and counts it; filled by `functions` and `movement`
UFUNC_METHODS: dict[str, Callable] = {}  # __call__, reduce, accumulate ... -> the same


def implements(*functions: Callable) -> Callable:
    def register(ours: Callable) -> Callable:
        for function in functions:
            FUNCTIONS[function] = ours
        return ours

    return register


class outside:
    """Inside, NumPy makes plain arrays: for its own use."""

    def __enter__(self):
        self._token = active.set(None)

    def __exit__(self, *_):
        active.reset(self._token)


class Counted(np.ndarray):
    """An array with a `Buffer`: the memory it looks at, and the depth of each element there."""

    _buffer: Buffer | None

    def __array_finalize__(self, obj):
        self._buffer = None

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        if method not in UFUNC_METHODS:
            raise Uncounted(f"complexity: numpy.{ufunc.__name__}.{method} is not known to the counter")
        with outside():
            return UFUNC_METHODS[method](ufunc, *inputs, **kwargs)

    def __array_function__(self, func, types, args, kwargs):
        if func not in FUNCTIONS:
            raise Uncounted(f"complexity: numpy.{func.__name__} is not known to the counter")
        with outside():
            return FUNCTIONS[func](*args, **kwargs)

    # -- elements -------------------------------------------------------------------------------------------------

    def __getitem__(self, key):
        key, fancy, reach = _index(key)
        data, buffer = plain(self), buffer_of(self)
        if not fancy:
            return view_of(data[key], self)
        result = data[key]
        depth = buffer.depth_of(self)
        made = adopt(result, joined(depth[key] if isinstance(depth, np.ndarray) else depth, reach), buffer.ledger)
        buffer.ledger.touch((made, *(k for k in key if isinstance(k, np.ndarray))), (made,))
        return made

    def __setitem__(self, key, value):
        key, fancy, reach = _index(key)
        data, buffer = plain(self), buffer_of(self)
        part = data[key]
        data[key] = plain(value)
        depth = joined(depth_of(value), reach)
        if fancy:
            buffer.write(self, depth, key)
            buffer.ledger.touch(arrays_in([value, *key]), (adopt(part, CONSTANT, buffer.ledger),))
        else:
            window = view_of(part, self)
            buffer.write(window, depth)
            buffer.ledger.touch(arrays_in([value]), (window,))

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __bool__(self):
        return bool(plain(self))

    def __index__(self):
        return plain(self).__index__()

    def __int__(self):
        return int(plain(self))

    def __float__(self):
        raise Uncounted("complexity: a float that leaves its array is lost to the counter")

    __complex__ = __float__

    def item(self, *at):
        if self.dtype.kind not in "biu":
            float(self)
        return plain(self).item(*at)

    def tolist(self):
        if self.dtype.kind not in "biu":
            float(self)
        return plain(self).tolist()

    # -- views and copies -----------------------------------------------------------------------------------------

    @property
    def T(self):
        return np.transpose(self)

    @property
    def mT(self):
        return np.swapaxes(self, -1, -2)

    @property
    def real(self):
        return view_of(plain(self).real, self)

    @real.setter
    def real(self, value):
        self.real[...] = value

    @property
    def imag(self):
        part = plain(self).imag
        return view_of(part, self) if self.dtype.kind == "c" else adopt(part.copy(), CONSTANT, buffer_of(self).ledger)

    @imag.setter
    def imag(self, value):
        self.imag[...] = value

    def reshape(self, *shape, order="C"):
        return np.reshape(self, shape[0] if len(shape) == 1 else shape, order=order)

    def transpose(self, *axes):
        return np.transpose(self, axes[0] if len(axes) == 1 else axes or None)

    def astype(self, dtype, copy=True, **_):
        if not copy and np.dtype(dtype) == self.dtype:
            return self
        return copied(self, plain(self).astype(dtype))

    def copy(self, order="C"):
        return copied(self, plain(self).copy(order))

    def flatten(self):
        return copied(self, plain(self).flatten())

    def fill(self, value):
        self[...] = value

    def conj(self):
        return np.conjugate(self)

    conjugate = conj


def _method(function: Callable) -> Callable:
    return lambda self, *args, **kwargs: function(self, *args, **kwargs)


for _name in (
    *("all", "any", "argmax", "argmin", "argsort", "clip", "cumprod", "cumsum", "diagonal", "dot", "max", "mean", "min", "nonzero"),
    *("prod", "ravel", "repeat", "round", "squeeze", "std", "sum", "swapaxes", "take", "trace", "var"),
):
    setattr(Counted, _name, _method(getattr(np, _name)))


def _unknown(name: str) -> property:
    def refuse(self):
        raise Uncounted(f"complexity: ndarray.{name} is not known to the counter")

    return property(refuse)


_FREE = {"shape", "strides", "ndim", "size", "itemsize", "nbytes", "dtype", "flags", "base", "ctypes", "device", "to_device", "data"}
for _name in dir(np.ndarray):
    if not _name.startswith("_") and _name not in vars(Counted) and _name not in _FREE:
        setattr(Counted, _name, _unknown(_name))


# -- between counted and plain ---------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """The same without the counter: arrays, and arrays in lists, tuples and dictionaries."""
    if isinstance(value, Counted):
        return np.ndarray.view(value, np.ndarray)
    if isinstance(value, list | tuple):
        parts = [plain(v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value


def buffer_of(array: Counted) -> Buffer:
    if array._buffer is None:
        raise Uncounted("complexity: an array was made behind the counter's back")
    return array._buffer


def ledger_of(*values: Any) -> Ledger:
    """The ledger of the first counted array."""
    for value in arrays_in(values):
        if isinstance(value, Counted):
            return buffer_of(value).ledger
    ledger = active.get()
    if ledger is None:
        raise Uncounted("complexity: no counted array in sight")
    return ledger


def adopt(array: Any, depth: Any, ledger: Ledger, given: bool = False) -> Counted:
    """A fresh array, counted from here on."""
    array = np.asanyarray(array)
    made = np.ndarray.view(array, Counted)
    made._buffer = Buffer(array, depth, ledger, given)
    return made


def view_of(array: Any, source: Counted) -> Counted:
    """A view of what `source` looks at."""
    made = np.ndarray.view(array, Counted)
    made._buffer = buffer_of(source)
    return made


def is_view(array: np.ndarray, source: Counted) -> bool:
    buffer = buffer_of(source)
    inside = 0 <= array.__array_interface__["data"][0] - buffer.start < max(buffer.size * buffer.itemsize, 1)
    return array.base is not None and inside


def copied(source: Counted, result: np.ndarray) -> Counted:
    """A copy of the same shape, perhaps of another dtype."""
    made = adopt(result, depth_of(source), buffer_of(source).ledger)
    made_buffer = buffer_of(made)
    made_buffer.ledger.touch((source,), (made,))
    return made


def arrays_in(values: Any) -> Iterator[np.ndarray]:
    for value in values:
        if isinstance(value, np.ndarray):
            yield value
        elif isinstance(value, list | tuple):
            yield from arrays_in(value)


def _index(key: Any) -> tuple[tuple, bool, int]:
    """A plain index, whether it copies, and the depth of what it consists of."""
    keys = key if isinstance(key, tuple) else (key,)
    out: list[Any] = []
    fancy, reach = False, CONSTANT
    for k in keys:
        if isinstance(k, Counted):
            reach = max(reach, deepest(depth_of(k)))
            k = plain(k) if k.ndim or k.dtype.kind == "b" else int(k)
        elif isinstance(k, list | range):
            reach = max(reach, deepest(depth_of(k)))
            k = asarray(plain(k))
            k = k.astype(np.intp) if not k.size else k
        fancy = fancy or isinstance(k, np.ndarray)
        out.append(k)
    if not fancy and not any(k is Ellipsis for k in out):
        out.append(Ellipsis)  # elements are arrays of no axes, and so keep their depth
    return tuple(out), fancy, reach


# -- depth -----------------------------------------------------------------------------------------------------------


def depth_of(value: Any) -> Any:
    """Depth of each element: an array, or one number where all share it."""
    if isinstance(value, Counted):
        return buffer_of(value).depth_of(value)
    if isinstance(value, list | tuple):
        return max((deepest(depth_of(v)) for v in value), default=CONSTANT)
    return CONSTANT


def full_depth(value: Any) -> np.ndarray:
    """The same as an array of the value's shape."""
    return np.broadcast_to(asarray(depth_of(value), np.int32), np.shape(plain(value)))


def deepest(depth: Any) -> int:
    return int(depth.max(initial=CONSTANT)) if isinstance(depth, np.ndarray) else int(depth)


def joined(*depths: Any) -> Any:
    """Of what depends on several things, elementwise."""
    result = depths[0]
    for depth in depths[1:]:
        if isinstance(result, np.ndarray) or isinstance(depth, np.ndarray):
            result = np.maximum(result, depth)
        else:
            result = max(result, depth)
    return result


def raised(depth: Any, by: int) -> Any:
    """After `by` more operations; what depends on no data costs no time."""
    if isinstance(depth, np.ndarray):
        return depth + by * (depth >= 0) if by else depth
    return depth + by if depth >= 0 else depth


def levels(n: float) -> int:
    """Of a binary tree over n leaves."""
    return ceil(log2(n)) if n > 1 else 0
