"""Functions that move, select and make: no work, but traffic; depth goes where the values go."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
from numpy import empty  # by name: a measurement replaces those of `np`

from refimpl.complexity.arrays import (
    FUNCTIONS,
    Counted,
    adopt,
    arrays_in,
    buffer_of,
    copied,
    deepest,
    depth_of,
    full_depth,
    implements,
    is_view,
    joined,
    ledger_of,
    levels,
    outside,
    plain,
    raised,
    view_of,
)
from refimpl.complexity.counter import CONSTANT, active

# -- what moves and selects --------------------------------------------------------------------------------------------


def _moves(function: Callable) -> Callable:
    """The same is done to the depths as to the values: exact, whatever it is."""

    def run(*args, **kwargs):
        ledger = ledger_of(*args, *kwargs.values())
        depths: set[int] = set()
        for x in arrays_in((*args, *kwargs.values())):
            depth = depth_of(x)
            depths |= set(np.unique(depth).tolist()) if isinstance(depth, np.ndarray) else {depth}
        with outside():
            raw = function(*plain(args), **plain(kwargs))
            uniform = len(depths) == 1
            depth = depths.pop() if uniform else function(*_depths(args), **_depths(kwargs))
        made = adopt(raw, depth, ledger)
        ledger.touch(arrays_in((*args, *kwargs.values())), (made,))
        return made

    return run


def _depths(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return full_depth(value)
    if isinstance(value, list | tuple):
        return type(value)(_depths(v) for v in value)
    return {k: _depths(v) for k, v in value.items()} if isinstance(value, dict) else value


for _function in (
    *(
        np.concatenate,
        np.stack,
        np.vstack,
        np.hstack,
        np.column_stack,
        np.roll,
        np.tile,
        np.append,
        np.resize,
        np.repeat,
        np.delete,
        np.insert,
    ),
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
    ledger.touch(arrays_in((condition, *choices)), (made,))
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
    ledger.touch((made, *arrays_in([indices])), (made,))
    return made


@implements(np.put_along_axis)
def put_along_axis(array, indices, values, axis):
    buffer = buffer_of(array)
    with outside():
        np.put_along_axis(plain(array), plain(indices), plain(values), axis)
        depth = full_depth(array).copy()
        np.put_along_axis(depth, plain(indices), joined(full_depth(indices), depth_of(values)), axis)
    buffer.write(array, depth)
    buffer.ledger.touch(arrays_in([indices, values]), (adopt(empty(np.shape(indices), array.dtype), CONSTANT, buffer.ledger),))


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
    ledger.touch(arrays_in([array, values]), (made,))
    return made


@implements(np.bincount)
def bincount(array, weights=None, minlength=0):
    ledger = ledger_of(array, weights)
    raw = np.bincount(plain(array), plain(weights), minlength)
    depth = raised(max(deepest(depth_of(x)) for x in (array, weights)), 1 + levels(array.size))
    ledger.add("integer" if weights is None else "sum", array.size, depth)
    made = adopt(raw, depth, ledger)
    ledger.touch(arrays_in([array, weights]), (made,))
    return made


# -- what makes arrays -----------------------------------------------------------------------------------------------


def _like(function: Callable) -> Callable:
    def run(array, *args, **kwargs):
        ledger = ledger_of(array)
        made = adopt(
            function(plain(array), *plain(args), **plain(kwargs)), depth_of(args[0]) if function is np.full_like else CONSTANT, ledger
        )
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


def _is_library(frame: FrameType) -> bool:
    """Whether it is NumPy or SciPy that makes an array, for its own use; which ones they make differs between versions."""
    return frame.f_globals.get("__name__", "").startswith(("numpy.", "scipy."))


def _constant(original: Callable) -> Callable:
    """A function that makes an array of nothing: within a measurement, a counted constant."""

    def make(*args, **kwargs):
        ledger = active.get()
        if ledger is None or _is_library(sys._getframe(1)):
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
        if ledger is None or _is_library(sys._getframe(1)):
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
        ledger.touch(arrays_in([value]), (made,))
        return made

    return convert


def _depths_of(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_depths_of(v) for v in value]
    return full_depth(value)


class _Draws:
    """A generator of random numbers, which are constants: they depend on no argument."""

    def __init__(self, generator: np.random.Generator):
        self._generator = generator

    def __getattr__(self, name: str) -> Any:
        def draw(*args, **kwargs):
            with outside():
                drawn = getattr(self._generator, name)(*args, **kwargs)
            ledger = active.get()
            return adopt(drawn, CONSTANT, ledger) if isinstance(drawn, np.ndarray) and ledger is not None else drawn

        return draw


def _random(seed=None, *, _original=np.random.default_rng):
    ledger = active.get()
    with outside():
        generator = _original(seed)
    return generator if ledger is None else _Draws(generator)


MAKERS: list[tuple[Any, str, Callable]] = [
    *(
        (np, name, _constant(getattr(np, name)))
        for name in ("zeros", "ones", "empty", "full", "eye", "identity", "arange", "tri", "linspace")
    ),
    *((np, name, _converter(getattr(np, name), name == "array")) for name in ("array", "asarray", "ascontiguousarray")),
    (np.random, "default_rng", _random),
]
