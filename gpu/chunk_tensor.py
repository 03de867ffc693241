"""A matrix memory with a decay of each head in one kernel on tensor cores (``cuda/kernel_memory.cu``): bfloat16, keys of up to 128 features.

    S_t = e^{w_t} S_{t-1} + e^{g_t} k_t v_tᵀ,    y_t = (scale S_tᵀ q_t / D_t + skip v_t) silu(z_t)
    D_t = 1,  or q_t·n_t with n_t = e^{w_t} n_{t-1} + e^{g_t} k_t,  or max(|q_t·n_t|, lower_t) + eps

The arithmetic is that of `chunkwise` with chunks of 64: products of bfloat16 (weights, the state that enters a chunk, and keys faded to
its end are rounded), sums in float32. Only y and the last state are written.
"""

from typing import Any, NamedTuple

import cupy as cp
import numpy as np
from refimpl.gpu.chunk_policy import WIDEST
from refimpl.gpu.launch import Kernel

from refimpl.core.numerics import times_exp

TILE, CHUNK = 64, 64  # values that a block takes, steps at a time
THREADS = 256
_SUMS = 200  # floats of a chunk's decays
PLAIN, NORMALISED, GRADIENT = range(3)


def _memory(width: int, kind: int) -> Kernel:
    return Kernel("kernel_memory.cu", f"memory_tensor<{width}, {kind}>")


def _decays(width: int) -> Kernel:
    return Kernel("kernel_memory_decays.cu", f"memory_decays<{width}>")


_SUM_HEADS = Kernel("kernel_memory_decays.cu", "sum_heads")
KERNELS = tuple(_memory(width, kind) for width in (TILE, WIDEST) for kind in (PLAIN, NORMALISED))
KERNELS_VJP = (*(_memory(width, GRADIENT) for width in (TILE, WIDEST)), *map(_decays, (TILE, WIDEST)), _SUM_HEADS)


class Result(NamedTuple):
    """y (G, H, T, e) in bfloat16; the last state (G, 1 or H, d, e), and n (G, 1 or H, d) or None, in float32."""

    y: Any
    last: Any
    norm: Any


def read(
    q, k, v, w=None, gain=None, state=None, norm=None, *, normalised=False, lower=None, skip=None, z=None, scale=1.0, eps=0.0
) -> Result:
    """The memory through a whole sequence.

    Parameters
    ----------
    q, k : array, shape (G, 1 or H, T, d)
        bfloat16, as v and z.
    v : array, shape (G, 1 or H, T, e)
    w, gain : array, shape (G, 1 or H, T), optional
        Log-decays, and logarithms of factors of the keys, in float32; of the heads of v.
    state, norm : array, shapes (G, 1 or H, d, e) and (G, 1 or H, d), optional
        Before the first step, in float32; of the heads of v.
    lower : array, shape (G, H, T), optional
    skip : array, shape (G, H), optional
    z : array, shape (G, H, T, e), optional
    """
    d, e = q.shape[3], v.shape[3]
    q, k, v, z = (None if x is None else _ready(_eights(x, 1)) for x in (q, k, v, z))
    state = None if state is None else _ready(_eights(state, 2))
    norm = None if norm is None else _ready(_eights(norm, 1))
    kind = NORMALISED if normalised else PLAIN
    y, last, last_norm = _start(kind, q, k, v, w, gain, state, norm, lower, skip, z, scale=scale, eps=eps)
    return Result(y[..., :e], last[..., :d, :e], last_norm[..., :d] if normalised else None)


class Gradients(NamedTuple):
    """Of each head by itself, (G, H, T, features) in bfloat16, w and gain (G, H, T) and state (G, H, d, e) in float32.

    That of the gain is left without the factor e^g.
    """

    q: Any
    k: Any
    v: Any
    w: Any
    gain: Any
    state: Any


def read_vjp(dy, q, k, v, w=None, gain=None, state=None, dlast=None, *, skip=None, scale=1.0) -> Gradients:
    """Adjoint of `read` without a normaliser and a gate; dy (G, H, T, e) in bfloat16, dlast (G, 1 or H, d, e); up to 128 values.

    Three times the operator itself, with roles changed: dq is what queries dy read of a memory with keys v and values k; dv and dk
    what k and v read of memories of q and dy, backwards in time. What the decays get is a kernel of its own, from the states that
    enter and the cotangents that leave each chunk.
    """
    d, e = q.shape[3], v.shape[3]
    (G, H), T = dy.shape[:2], q.shape[2]
    dy, q, k, v = (_ready(_eights(x, 1)) for x in (dy, q, k, v))
    dlast = None if dlast is None else dlast / np.float32(scale)  # so that the scale is one of everything that is read
    state, dlast = (None if x is None else cp.broadcast_to(_eights(x, 2), (G, H, q.shape[3], v.shape[3])) for x in (state, dlast))
    w, gain = (None if x is None else cp.ascontiguousarray(x) for x in (w, gain))
    chunks = -(-T // CHUNK)
    states = cp.empty((G, H, chunks, v.shape[3], q.shape[3]), q.dtype)
    adjoints = cp.empty((G, H, chunks, q.shape[3], v.shape[3]), q.dtype)
    turned = (None if x is None else cp.ascontiguousarray(x.swapaxes(-1, -2)) for x in (state, dlast))
    dq, _, _ = _start(GRADIENT, dy, v, k, w, gain, next(turned), scale=scale, states=states)
    back = {"scale": scale, "back": True, "of_queries": True}
    dv, first, _ = _start(GRADIENT, k, q, dy, w, gain, None if dlast is None else _ready(dlast), skip=skip, states=adjoints, **back)
    dk, _, _ = _start(GRADIENT, v, dy, q, w, gain, next(turned), **back)
    dw, dgain = _decays_vjp(dy, q, k, v, w, gain, states, adjoints)
    first = first if w is None or T == 0 else times_exp(first, cp.broadcast_to(w[:, :, 0], (G, H))[..., None, None])
    scale = np.float32(scale)
    return Gradients(dq[..., :d], dk[..., :d], dv[..., :e], dw * scale, dgain * scale, first[..., :d, :e] * scale)


def sum_heads(x):
    """(G, H, T, f) in bfloat16, summed over the heads in float32; what one head has stays as it is."""
    G, H, T, f = x.shape
    if H == 1:
        return x[:, 0]
    x = _ready(_eights(x, 1))
    y = cp.empty((G, T, x.shape[3]), np.float32)
    _SUM_HEADS((-(-y.size // (8 * THREADS)),), (THREADS,), (x, y, np.int64(G), np.int32(H), np.int64(T * x.shape[3])))
    return y[..., :f]


def _start(
    kind, q, k, v, w=None, gain=None, state=None, norm=None, lower=None, skip=None, z=None, *,
    scale=1.0, eps=0.0, states=None, back=False, of_queries=False,
):  # fmt: skip
    """One launch of ``memory_tensor`` on arrays as it takes them."""
    G, T, d, e = len(q), *q.shape[2:], v.shape[3]
    H = max(x.shape[1] for x in (q, k, v) if x is not None)
    w, gain, lower, skip = (None if x is None else cp.ascontiguousarray(x) for x in (w, gain, lower, skip))
    decays = next((x.shape[1] for x in (w, gain) if x is not None), 1)
    width, own = _width(d), H if kind == GRADIENT else v.shape[1]
    y = cp.empty((G, H, T, e), v.dtype)
    last = cp.empty((G, own, d, e), np.float32)
    last_norm = cp.empty((G, own, d), np.float32) if kind == NORMALISED else None
    pointers = (_or_null(x) for x in (q, k, v, w, gain, state, norm, lower, skip, z, y, last, last_norm, states))
    sizes = (np.int32(x) for x in (d, e, H, q.shape[1], k.shape[1], v.shape[1], decays))
    shared = 2 * (4 * CHUNK * width + 2 * CHUNK * TILE) + 2 * width * TILE + 4 * (2 * _SUMS + width)
    arguments = (*pointers, np.int64(T), *sizes, np.float32(scale), np.float32(eps), np.int32(back), np.int32(of_queries))
    _memory(width, kind)((G * H, -(-e // TILE)), (THREADS,), arguments, shared)
    return y, last, last_norm


def _decays_vjp(dy, q, k, v, w, gain, states, adjoints):
    """Cotangents of w and of the gain, without its factor, of each head."""
    (G, H), T, d, e = dy.shape[:2], *q.shape[2:], v.shape[3]
    tiles, chunks, width = -(-e // TILE), states.shape[2], _width(d)
    dw, dgain = (cp.empty((tiles, G, H, T), np.float32) for _ in range(2))
    decays = next((x.shape[1] for x in (w, gain) if x is not None), 1)
    sizes = (np.int32(x) for x in (d, e, H, q.shape[1], k.shape[1], v.shape[1], decays, G * H))
    arguments = (q, k, v, dy, _or_null(w), _or_null(gain), states, adjoints, dw, dgain, np.int64(T), *sizes)
    shared = 2 * (2 * CHUNK * width + 2 * CHUNK * TILE + 2 * TILE * width) + 16  # with what it has otherwise more than 48 KB in all
    _decays(width)((G * H * chunks, tiles), (THREADS,), arguments, shared)
    return (dw[0], dgain[0]) if tiles == 1 else (dw.sum(axis=0), dgain.sum(axis=0))


def _width(d: int) -> int:
    return TILE if d <= TILE else WIDEST


def _eights(x, axes: int):
    """Zeros after the last of the features (of the last axes), so that rows are whole runs of 16 bytes."""
    more = [(0, -size % 8 if i >= x.ndim - axes else 0) for i, size in enumerate(x.shape)]
    if not any(after for _, after in more):
        return x
    raw = x.view(np.uint16) if x.itemsize == 2 else x  # not every operation of CuPy's knows bfloat16
    full = cp.zeros(tuple(size + after for size, (_, after) in zip(x.shape, more, strict=True)), raw.dtype)
    full[tuple(slice(size) for size in x.shape)] = raw
    return full.view(x.dtype)


def _ready(x):
    """Contiguous, and starting at a multiple of 16 bytes."""
    x = cp.ascontiguousarray(x)
    return x if _address(x) % 16 == 0 else x.copy()


def _address(x) -> int:
    return x.data.ptr


def _or_null(x):
    return np.uint64(0) if x is None else x
