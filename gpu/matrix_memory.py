"""The recurrence of a matrix memory (``cuda/kernel_matrix_memory.cu``), of which several operators are cases.

    p_t = S_{t-1}ᵀ a_t,    S_t = diag(e^{w_t}) S_{t-1} + k_t v_tᵀ + b_t p_tᵀ,    o_t = S_tᵀ q_t,  or S_{t-1}ᵀ q_t with `before`

Arrays here are flat: (sequences, T, features), in float32 or float64. Those that several sequences share have fewer: sequence s
reads entry s // (sequences // count) of an array of `count`; v, w and the state go together, and so do k, a and b.
"""

import math
from typing import NamedTuple

import cupy as cp
import numpy as np
from refimpl.gpu.arrays import or_null
from refimpl.gpu.launch import STACK, Kernel, multiprocessors, shared_memory

WIDEST = 1024  # features of a key that the kernels hold
_FORWARD = {32: (8, 4, 2), 64: (16, 4, 2), 128: (16, 8, 2), 256: (16, 16, 2), 512: (16, 32, 2), 1024: (32, 32, 1)}
_BACKWARD = {32: (1, 8, 8), 64: (2, 8, 8), 128: (4, 8, 8), 256: (8, 4, 4), 512: (16, 2, 2), 1024: (32, 1, 1)}  # rows, columns, warps
_C = {"float32": "float", "float64": "double"}


def _flags(*flags: bool) -> str:
    return ", ".join("true" if f else "false" for f in flags)


def _forward(dtype, width, low_rank, before) -> Kernel:
    rows, lanes, columns = _FORWARD[width]
    name = f"matrix_memory<{_C[dtype]}, {rows}, {lanes}, {columns}, {_flags(low_rank, before)}>"
    return Kernel("kernel_matrix_memory.cu", name, spills=low_rank and width == 512)


def _backward(dtype, width, low_rank, before) -> Kernel:
    rows, columns, _ = _BACKWARD[width]
    name = f"matrix_memory_vjp<{_C[dtype]}, {rows}, {columns}, {_flags(low_rank, before)}>"
    spills = dtype == "float64" or width > 256
    return Kernel("kernel_matrix_memory.cu", name, spills=spills, stack=192 if spills else STACK)


def instances(low_rank: bool, before: bool) -> tuple[Kernel, ...]:
    return tuple(make(x, width, low_rank, before) for make in (_forward, _backward) for x in _C for width in _FORWARD)


class Gradients(NamedTuple):
    """Of every sequence by itself, (sequences, T, d or e); w per key channel; state (sequences, d, e)."""

    q: cp.ndarray
    k: cp.ndarray
    v: cp.ndarray
    w: cp.ndarray
    a: cp.ndarray | None
    b: cp.ndarray | None
    state: cp.ndarray


def flat(x, batch, axes: int):
    """Batch axes written out and made one: (..., *own) -> (count, *own), contiguous; `axes` counts own ones."""
    own = x.shape[x.ndim - axes :]
    return cp.ascontiguousarray(cp.broadcast_to(x, (*batch, *own))).reshape(math.prod(batch), *own)


def read(q, k, v, w=None, a=None, b=None, state=None, *, sequences, before=False, keep=False):
    """o (sequences, T, e), the last state (of every entry of v), and with `keep` the states that the gradient starts from."""
    T, d, e = q.shape[1], q.shape[2], v.shape[2]
    o = cp.empty((sequences, T, e), q.dtype)
    last = cp.empty((len(v), d, e), q.dtype)
    every = _layout(d, e, q.itemsize, a is not None)[1]
    kept = cp.empty((sequences, -(-T // every), d, e), q.dtype) if keep else None
    if not (sequences and T and d and e):
        o[...] = 0
        last[...] = 0 if state is None else state
        return o, last, kept
    width = _width(d)
    rows, lanes, columns = _FORWARD[width]
    threads = min(256, -(-lanes * -(-e // columns) // 32) * 32)
    across = threads // lanes * columns
    step = ((5 if a is not None else 3) * width + across) * q.itemsize
    tile = max(1, min(16, T, 64 * 1024 // step))
    shares = _shares(sequences, q, k, v)
    sizes = (np.int64(T), np.int32(d), np.int32(e), *shares, np.int32(w is not None and w.ndim == 3), np.int32(tile), np.int32(every))
    kernel = _forward(q.dtype.name, width, a is not None, before)
    pointers = (q, k, v, *map(or_null, (w, a, b, state)), o, last, or_null(kept))
    kernel((sequences, -(-e // across)), (threads,), (*pointers, *sizes), tile * step)
    return o, last, kept


def read_vjp(do, q, k, v, w=None, a=None, b=None, *, kept, dlast=None, sequences, before=False) -> Gradients:
    """Adjoint of `read`; `dlast` (sequences, d, e) is the cotangent of every sequence's last state."""
    T, d, e = q.shape[1], q.shape[2], v.shape[2]
    low_rank = a is not None
    dstate = cp.zeros((sequences, d, e), q.dtype) if dlast is None else dlast.copy()
    dv = cp.empty((sequences, T, e), q.dtype)
    if not (sequences and T and d and e):
        rows = [cp.zeros((sequences, T, d), q.dtype) for _ in range(5)]
        return Gradients(rows[0], rows[1], cp.zeros_like(dv), rows[2], rows[3] if low_rank else None, rows[4] if low_rank else None, dstate)
    width = _width(d)
    rows, columns, _ = _BACKWARD[width]
    warps, every, size = _layout(d, e, q.itemsize, low_rank)
    parts = -(-e // (warps * columns))
    partial = [cp.empty((parts, sequences, T, d), q.dtype) for _ in range(5 if low_rank else 3)]
    grid = (max(1, min(sequences, 4 * multiprocessors() // parts)), parts)
    scratch = cp.empty((grid[0] * parts, every, rows * columns * warps * 32), q.dtype)
    nothing = np.uint64(0)
    more = partial[3:] if low_rank else (nothing, nothing)
    pointers = (q, k, v, *map(or_null, (w, a, b)), kept, do, or_null(dlast), *partial[:2], dv, partial[2], *more, dstate, scratch)
    sizes = (np.int64(sequences), np.int64(T), np.int32(d), np.int32(e), *_shares(sequences, q, k, v))
    sizes = (*sizes, np.int32(w is not None and w.ndim == 3), np.int32(every))
    kernel = _backward(q.dtype.name, width, low_rank, before)
    kernel(grid, (32 * warps,), (*pointers, *sizes), size)
    dq, dk, dw, *da_db = (x[0] if parts == 1 else x.sum(axis=0) for x in partial)
    return Gradients(dq, dk, dv, dw, *(da_db or (None, None)), dstate)


def _layout(d: int, e: int, itemsize: int, low_rank: bool) -> tuple[int, int, int]:
    """Of the gradient: warps of a block, steps between two states that the forward pass keeps, bytes of shared memory."""
    if not (d and e):
        return 1, 8, 0
    width, inputs = _width(d), 5 if low_rank else 3
    _, columns, most = _BACKWARD[width]
    warps = max(1, min(most if itemsize == 4 else max(1, most // 2), -(-e // columns)))
    for every in (8, 4, 2, 1):
        size = (every * (inputs * width + 2 * warps * columns) + 2 * warps * inputs * width) * itemsize
        if size <= shared_memory() - 1024:
            break
    return warps, every, size


def _width(d: int) -> int:
    return next(width for width in _FORWARD if d <= width)


def _shares(sequences, *arrays):
    return tuple(np.int32(sequences // len(x)) for x in arrays)
