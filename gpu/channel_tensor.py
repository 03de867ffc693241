"""A matrix memory with a decay of each channel in one kernel on tensor cores (``cuda/kernel_memory_channels.cu``): bfloat16, keys of up to
128 features.

    S_t = diag(e^{w_t}) S_{t-1} + k_t v_tᵀ,    y_t = scale S_tᵀ q_t

In blocks of 16 steps: products of bfloat16 (weights, the state that enters a block, and keys and queries faded within it are rounded),
sums in float32. Only y and the last state are written.
"""

from typing import Any, NamedTuple

import cupy as cp
import numpy as np
from refimpl.gpu.arrays import or_null
from refimpl.gpu.chunk_policy import WIDEST
from refimpl.gpu.chunk_tensor import eights, ready, width_of
from refimpl.gpu.launch import Kernel

from refimpl.core.numerics import times_exp

STEPS, VALUES, KEPT = 16, 128, 64  # of a block of steps; of a block of threads; steps between two states that are kept
THREADS, STAGES, GROUPS = 512, 4, 2
_TILES = 11  # of 8 rows: faded queries and keys of a block


def _memory(width: int, gradient: bool) -> Kernel:
    return Kernel("kernel_memory_channels.cu", f"memory_channels<{width}, {str(gradient).lower()}>")


def _gradient(width: int) -> Kernel:
    return Kernel("kernel_memory_channels_gradient.cu", f"memory_channels_gradient<{width}>", spills=True)


KERNELS = tuple(_memory(width, False) for width in (64, WIDEST))
KERNELS_VJP = (*(_memory(width, True) for width in (64, WIDEST)), *map(_gradient, (64, WIDEST)))


class Result(NamedTuple):
    """y (G, H, T, e) in bfloat16; the last state (G, 1 or H, d, e) in float32."""

    y: Any
    last: Any


def read(q, k, v, w, state=None, *, scale=1.0) -> Result:
    """The memory through a whole sequence.

    Parameters
    ----------
    q, k : array, shape (G, 1 or H, T, d)
        bfloat16, as w and v.
    v : array, shape (G, 1 or H, T, e)
    w : array, shape (G, 1 or H, T, d)
        Log-decays.
    state : array, shape (G, 1 or H, d, e), optional
        Before the first step, in float32; of the heads of v.
    """
    d, e = q.shape[3], v.shape[3]
    q, k, v, w = (ready(eights(x, 1)) for x in (q, k, v, w))
    state = None if state is None else cp.ascontiguousarray(eights(state, 2))
    y, last = _start(False, q, k, v, w, state, scale=scale)
    return Result(y[..., :e], last[..., :d, :e])


class Gradients(NamedTuple):
    """Of each head by itself, (G, H, T, features) in bfloat16; state (G, H, d, e) in float32."""

    q: Any
    k: Any
    v: Any
    w: Any
    state: Any


def read_vjp(dy, q, k, v, w, state=None, dlast=None, *, scale=1.0) -> Gradients:
    """Adjoint of `read`; dy (G, H, T, e) in bfloat16, dlast (G, 1 or H, d, e) in float32; up to 128 values.

    The memory once more, forwards, and its adjoint, backwards in time: a memory of q and dy that k reads, which is dv. Both leave what
    enters every 64 steps, from which all chunks at once get dq, dk and dw.
    """
    d, e = q.shape[3], v.shape[3]
    (G, H), T = dy.shape[:2], q.shape[2]
    dy, q, k, v, w = (ready(eights(x, 1)) for x in (dy, q, k, v, w))
    dlast = None if dlast is None else dlast / np.float32(scale)  # so that the scale is one of everything that is read
    own, wide = max(x.shape[1] for x in (k, v, w)), (q.shape[3], v.shape[3])
    state = None if state is None else cp.ascontiguousarray(cp.broadcast_to(eights(state, 2), (G, own, *wide)))
    dlast = None if dlast is None else cp.ascontiguousarray(cp.broadcast_to(eights(dlast, 2), (G, H, *wide)))
    chunks = -(-T // KEPT)
    states, adjoints = (cp.empty((G, heads, chunks, *wide[::-1]), q.dtype) for heads in (own, H))
    _start(True, k, k, v, w, state, states=states, silent=True)
    dv, first = _start(True, k, q, dy, w, dlast, scale=scale, states=adjoints, back=True)
    dq, dk, dw = (cp.empty((G, H, T, q.shape[3]), q.dtype) for _ in range(3))
    heads = (np.int32(x) for x in (H, q.shape[1], k.shape[1], v.shape[1], w.shape[1], own))
    width = width_of(q.shape[3])
    shared = 2 * KEPT * (3 * width + 2 * VALUES + KEPT) + 4 * VALUES * width
    arguments = (q, k, v, w, dy, states, adjoints, dq, dk, dw, np.int64(T), *map(np.int32, wide), *heads, np.float32(scale))
    _gradient(width)((G * H * chunks,), (256,), arguments, shared)
    first = first if T == 0 else times_exp(first, cp.broadcast_to(w[:, :, 0].astype(np.float32), (G, H, q.shape[3]))[..., None])
    return Gradients(dq[..., :d], dk[..., :d], dv[..., :e], dw[..., :d], first[..., :d, :e] * np.float32(scale))


def _start(gradient, q, k, v, w, state=None, *, scale=1.0, states=None, back=False, silent=False):
    """One launch of ``memory_channels`` on arrays as it takes them."""
    G, T, d, e = len(q), *q.shape[2:], v.shape[3]
    H = max(x.shape[1] for x in (q, k, v, w))
    width = width_of(d)
    y = None if silent else cp.empty((G, H, T, e), v.dtype)
    last = cp.empty((G, H if gradient else v.shape[1], d, e), np.float32)
    pointers = (or_null(x) for x in (q, k, v, w, state, y, last, states))
    sizes = (np.int32(x) for x in (d, e, H, q.shape[1], k.shape[1], v.shape[1], w.shape[1]))
    stage = 2 * STEPS * (2 * width + VALUES + STEPS) + 4 * width
    shared = STAGES * stage + GROUPS * _TILES * 8 * width * 2
    arguments = (*pointers, np.int64(T), *sizes, np.float32(scale), np.int32(back))
    _memory(width, gradient)((G * H, -(-e // VALUES)), (THREADS,), arguments, shared)
    return y, last
