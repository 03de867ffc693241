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

TILE, CHUNK = 64, 64  # values that a block takes, steps at a time
THREADS = 256
_SUMS = 200  # floats of a chunk's decays


def _kernel(width: int, normalised: bool) -> Kernel:
    return Kernel("kernel_memory.cu", f"memory_tensor<{width}, {'true' if normalised else 'false'}>")


KERNELS = tuple(_kernel(width, normalised) for width in (64, WIDEST) for normalised in (False, True))


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
    G, T, d, e = len(q), *q.shape[2:], v.shape[3]
    H = max(x.shape[1] for x in (q, k, v))
    q, k, v, z = (None if x is None else _ready(_eights(x, 1)) for x in (q, k, v, z))
    state = None if state is None else _ready(_eights(state, 2))
    norm = None if norm is None else _ready(_eights(norm, 1))
    w, gain, lower, skip = (None if x is None else cp.ascontiguousarray(x) for x in (w, gain, lower, skip))
    d8, e8 = q.shape[3], v.shape[3]
    width = TILE if d8 <= TILE else WIDEST
    y = cp.empty((G, H, T, e8), v.dtype)
    last = cp.empty((G, v.shape[1], d8, e8), np.float32)
    last_norm = cp.empty((G, v.shape[1], d8), np.float32) if normalised else None
    pointers = (_or_null(x) for x in (q, k, v, w, gain, state, norm, lower, skip, z, y, last, last_norm))
    heads = (np.int32(x) for x in (d8, e8, H, q.shape[1], k.shape[1], v.shape[1]))
    shared = 2 * (4 * CHUNK * width + 2 * CHUNK * TILE) + 2 * width * TILE + 4 * (2 * _SUMS + width)
    arguments = (*pointers, np.int64(T), *heads, np.float32(scale), np.float32(eps))
    _kernel(width, normalised)((G * H, -(-e8 // TILE)), (THREADS,), arguments, shared)
    return Result(y[..., :e], last[..., :d, :e], last_norm[..., :d] if normalised else None)


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
