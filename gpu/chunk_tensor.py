"""A matrix memory with a decay of each head in one kernel on tensor cores (``cuda/kernel_memory.cu``): bfloat16, keys of up to 128 features.

    S_t = e^{w_t} S_{t-1} + e^{g_t} k_t v_tᵀ,    y_t = (scale S_tᵀ q_t / D_t + skip v_t) silu(z_t)
    D_t = 1,  or q_t·n_t with n_t = e^{w_t} n_{t-1} + e^{g_t} k_t,  or max(|q_t·n_t|, lower_t) + eps

The arithmetic is that of `chunkwise` with chunks of 64: products of bfloat16 (weights, the state that enters a chunk, and keys faded to
its end are rounded), sums in float32. Only y and the last state are written.
"""

from typing import Any, NamedTuple

import cupy as cp
import numpy as np
from refimpl.gpu.arrays import or_null
from refimpl.gpu.chunk_policy import WIDEST
from refimpl.gpu.launch import Kernel

TILE, CHUNK = 64, 64  # values that a block takes, steps at a time
THREADS = 256
_SUMS = 200  # floats of a chunk's decays
_STAGES = 3  # chunks under way in ``memory_states``
_TOLD, _FOUND = 452, 664  # floats of ``Told`` and ``Found``
PLAIN, NORMALISED, WITNESS = range(3)
ALONE, TOGETHER, WITH_NORM = range(3)


def _memory(width: int, kind: int) -> Kernel:
    return Kernel("kernel_memory.cu", f"memory_tensor<{width}, {kind}>", spills=kind == WITNESS)


def _states(width: int, normalised: bool) -> Kernel:
    return Kernel("kernel_memory_states.cu", f"memory_states<{width}, {str(normalised).lower()}>")


def _gradient(width: int, kind: int) -> Kernel:
    return Kernel("kernel_memory_gradient.cu", f"memory_gradient<{width}, {kind}>", spills=True, stack=128)


_TELL, _DECAYS = (Kernel("kernel_memory_decays.cu", name) for name in ("memory_told", "memory_decays"))
_SUM_HEADS = Kernel("kernel_sum_heads.cu", "sum_heads")
KERNELS = tuple(_memory(width, kind) for width in (TILE, WIDEST) for kind in (PLAIN, NORMALISED))
KERNELS_VJP = (
    *(f(width, kind) for f, kind in ((_states, False), (_gradient, ALONE), (_gradient, TOGETHER)) for width in (TILE, WIDEST)),
    _TELL,
    _DECAYS,
    _SUM_HEADS,
)
KERNELS_NORMALISED_VJP = (
    _TELL,
    _DECAYS,
    *(f(width, how) for width in (TILE, WIDEST) for f, how in ((_memory, WITNESS), (_states, True), (_gradient, WITH_NORM))),
)


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
    q, k, v, z = (None if x is None else ready(eights(x, 1)) for x in (q, k, v, z))
    state = None if state is None else ready(eights(state, 2))
    norm = None if norm is None else ready(eights(norm, 1))
    kind = NORMALISED if normalised else PLAIN
    y, last, last_norm = _start(kind, q, k, v, w, gain, state, norm, lower, skip, z, scale=scale, eps=eps)
    return Result(y[..., :e], last[..., :d, :e], last_norm[..., :d] if normalised else None)


class Witness(NamedTuple):
    """What the gradient of a memory with a normaliser is made of.

    Overlaps q_t·n_t (G, H, T) and dy_t·o_t, o unnormalised (G, H, T), in float32; the states that enter each chunk, (G, H, chunks, d, e) in
    bfloat16, and n, (G, H, chunks, d) in float32; d and e filled up to multiples of 8.
    """

    overlap: Any
    against: Any
    states: Any
    norms: Any


def witness(dy, q, k, v, w=None, gain=None, state=None, norm=None) -> Witness:
    """The memory through a whole sequence, as `read` takes it, for the sake of its gradient; dy (G, H, T, e) in bfloat16."""
    dy, q, k, v = (ready(eights(x, 1)) for x in (dy, q, k, v))
    state = None if state is None else ready(eights(state, 2))
    norm = None if norm is None else ready(eights(norm, 1))
    return _start(WITNESS, q, k, v, w, gain, state, norm, z=dy)


class Gradients(NamedTuple):
    """q and k (G, H or 1, T, d), v (G, H, T, e), in bfloat16; w and gain (G, H, T), state (G, H, d, e), norm (G, H, d), skip (G, H), in float32.

    What heads share is summed over them if both q and k are shared, else of each head by itself. That of the gain is left without
    the factor e^g.
    """

    q: Any
    k: Any
    v: Any
    w: Any
    gain: Any
    state: Any
    norm: Any
    skip: Any


def read_vjp(
    dy, q, k, v, w=None, gain=None, state=None, dlast=None, *, skip=None, scale=1.0, seen=None, of_query=None, of_n=None, dnorm=None
) -> Gradients:
    """Adjoint of `read` without a gate; dy (G, H, T, e) in bfloat16, dlast (G, 1 or H, d, e).

    With a normaliser, `seen` is what `witness` said, `of_query` (G, H, T) the logarithm of 1/D, `of_n` the cotangent of q·n times D,
    `dnorm` (G, 1 or H, d) that of the last n. Without one the states that enter each chunk are computed first. Then the cotangents of
    those that leave each, backwards; then all chunks at once.
    """
    d, e = q.shape[3], v.shape[3]
    (G, H), T = dy.shape[:2], q.shape[2]
    dy, q, k, v = (ready(eights(x, 1)) for x in (dy, q, k, v))
    state, dlast = (None if x is None else ready(cp.broadcast_to(eights(x, 2), (G, H, q.shape[3], v.shape[3]))) for x in (state, dlast))
    dnorm = None if dnorm is None else ready(cp.broadcast_to(eights(dnorm, 1), (G, H, q.shape[3])))
    w, gain, skip, of_query, of_n = (None if x is None else cp.ascontiguousarray(x) for x in (w, gain, skip, of_query, of_n))
    normalised, width = seen is not None, width_of(d)
    chunks = -(-T // CHUNK)
    decays = next((x.shape[1] for x in (w, gain) if x is not None), 1)
    told, found = (cp.empty((G * H * chunks, size), np.float32) for size in (_TOLD, _FOUND))
    told, found = told.view(np.uint8), found.view(np.uint8)
    count, warps = (np.int64(T), np.int64(len(told)), np.int32(chunks)), (-(-len(told) * 32 // THREADS),)
    arguments = (*map(or_null, (w, gain, of_query, of_n)), told, *count, np.int32(H), np.int32(decays), np.float32(scale))
    _TELL(warps, (THREADS,), arguments)
    states, norms = (seen.states, seen.norms) if normalised else _walk(k, v, told, state, H)[:2]
    adjoints, of_norms, first, first_norm = _walk(q, dy, told, dlast, H, norm=dnorm, normalised=normalised, back=True)
    together = q.shape[1] == k.shape[1] == 1 < H and not normalised
    of_keys = 1 if together else H
    dq, dk = (cp.empty((G, of_keys, T, q.shape[3]), q.dtype) for _ in range(2))
    dv = cp.empty((G, H, T, v.shape[3]), q.dtype)
    dw, dgain = (cp.empty((G, H, T), np.float32) for _ in range(2))
    dskip = None if skip is None else cp.empty((G, H, chunks), np.float32)
    arrays = (q, k, v, dy, told, states, adjoints, norms, of_norms, skip, dq, dk, dv, found)
    sizes = (np.int32(x) for x in (q.shape[3], v.shape[3], H, q.shape[1], k.shape[1], v.shape[1]))
    shared = 2 * (2 * CHUNK * width + 2 * (2 * CHUNK * TILE + 2 * width * TILE) + 2 * CHUNK * CHUNK + CHUNK * TILE)
    arguments = (*map(or_null, arrays), np.int64(T), *sizes, np.float32(scale))
    kind = WITH_NORM if normalised else TOGETHER if together else ALONE
    _gradient(width, kind)((G * of_keys * chunks,), (2 * THREADS,), arguments, shared)
    arguments = (told, found, dw, dgain, or_null(dskip), *count, np.float32(scale))
    _DECAYS(warps, (THREADS,), arguments)
    first_norm = first_norm[..., :d] if normalised else None
    return Gradients(
        dq[..., :d], dk[..., :d], dv[..., :e], dw, dgain, first[..., :d, :e], first_norm, None if skip is None else dskip.sum(axis=-1)
    )


def _walk(keys, values, told, state, heads, *, norm=None, normalised=False, back=False):
    """States before each chunk, or backwards after it, (G, H, chunks, d, e) in bfloat16, and n; and what comes out at the end."""
    G, T, d, e = len(keys), *keys.shape[2:], values.shape[3]
    chunks, width = -(-T // CHUNK), width_of(d)
    states, last = cp.empty((G, heads, chunks, d, e), keys.dtype), cp.empty((G, heads, d, e), np.float32) if back else None
    norms, last_norm = (cp.empty((G, heads, *more, d), np.float32) if normalised else None for more in ((chunks,), ()))
    arrays = (keys, values, told, state, norm, states, norms, last, last_norm)
    sizes = (np.int32(x) for x in (d, e, heads, keys.shape[1], values.shape[1], back))
    shared = 2 * _STAGES * CHUNK * (width + TILE) + THREADS // 32 * 16 * 128
    _states(width, normalised)((G * heads, -(-e // TILE)), (THREADS,), (*map(or_null, arrays), np.int64(T), *sizes), shared)
    return states, norms, last, last_norm


def sum_heads(x):
    """(G, H, T, f) in bfloat16, summed over the heads in float32; what one head has stays as it is."""
    G, H, T, f = x.shape
    if H == 1:
        return x[:, 0]
    x = ready(eights(x, 1))
    y = cp.empty((G, T, x.shape[3]), np.float32)
    _SUM_HEADS((-(-y.size // (8 * THREADS)),), (THREADS,), (x, y, np.int64(G), np.int32(H), np.int64(T * x.shape[3])))
    return y[..., :f]


def _start(kind, q, k, v, w=None, gain=None, state=None, norm=None, lower=None, skip=None, z=None, *, scale=1.0, eps=0.0):
    """One launch of ``memory_tensor`` on arrays as it takes them."""
    G, T, d, e = len(q), *q.shape[2:], v.shape[3]
    H = max(x.shape[1] for x in (q, k, v) if x is not None)
    w, gain, lower, skip = (None if x is None else cp.ascontiguousarray(x) for x in (w, gain, lower, skip))
    decays = next((x.shape[1] for x in (w, gain) if x is not None), 1)
    width, chunks, tiles, wide = width_of(d), -(-T // CHUNK), -(-e // TILE), np.float32
    y = last = last_norm = states = norms = overlap = against = None
    if kind == WITNESS:
        states, norms = cp.empty((G, H, chunks, d, e), v.dtype), cp.empty((G, H, chunks, d), wide)
        overlap, against = cp.empty((G, H, T), wide), cp.empty((tiles, G, H, T), wide)
    else:
        y, last = cp.empty((G, H, T, e), v.dtype), cp.empty((G, v.shape[1], d, e), wide)
        last_norm = cp.empty((G, v.shape[1], d), wide) if kind == NORMALISED else None
    arrays = (q, k, v, w, gain, state, norm, lower, skip, z, y, last, last_norm, states, norms, overlap, against)
    sizes = (np.int32(x) for x in (d, e, H, q.shape[1], k.shape[1], v.shape[1], decays))
    shared = 2 * (4 * CHUNK * width + 2 * CHUNK * TILE) + 2 * width * TILE + 4 * (2 * _SUMS + width)
    arguments = (*map(or_null, arrays), np.int64(T), *sizes, np.float32(scale), np.float32(eps))
    _memory(width, kind)((G * H, tiles), (THREADS,), arguments, shared)
    if kind == WITNESS:
        return Witness(overlap, against[0] if tiles == 1 else against.sum(axis=0), states, norms)
    return y, last, last_norm


def width_of(d: int) -> int:
    """The features for which kernels are compiled that d of them fit into."""
    return TILE if d <= TILE else WIDEST


def eights(x, axes: int):
    """Zeros after the last of the features (of the last axes), so that rows are whole runs of 16 bytes."""
    more = [(0, -size % 8 if i >= x.ndim - axes else 0) for i, size in enumerate(x.shape)]
    if not any(after for _, after in more):
        return x
    raw = x.view(np.uint16) if x.itemsize == 2 else x  # not every operation of CuPy's knows bfloat16
    full = cp.zeros(tuple(size + after for size, (_, after) in zip(x.shape, more, strict=True)), raw.dtype)
    full[tuple(slice(size) for size in x.shape)] = raw
    return full.view(x.dtype)


def ready(x):
    """Contiguous, and starting at a multiple of 16 bytes."""
    x = cp.ascontiguousarray(x)
    return x if _address(x) % 16 == 0 else x.copy()


def _address(x) -> int:
    return x.data.ptr
