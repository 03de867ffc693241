"""Tiled attention, step by step: softmax attention whose map of weights is never made (FlashAttention).

    python -c "import refimpl; print(refimpl.attention.__doc__)"                       what is computed
    NUMBA_ENABLE_CUDASIM=1 python -m refimpl.gpu.teaching.tiled_attention              how, without a GPU

A block has ROWS queries of one head, one a thread. Keys and values come by in tiles of KEYS, which all threads bring to
shared memory together and then read: each number of K and V is fetched once for ROWS queries. Of what it has seen so far a
thread keeps three things, relative to the largest score `top`:

    total = Σ_j e^{s_j - top},    acc = Σ_j e^{s_j - top} v_j

A new tile may bring a larger score. Then both sums, which are in units of e^{top}, are brought to the new unit by the factor
e^{top - larger}; at the end acc / total is the result, in which the unit cancels [1, algorithm 1]. Until a row has seen a key,
top is -∞; -∞ - (-∞) is no number, so what is subtracted is then 0, and e^{-∞} = 0 does the rest: a row that sees nothing
gives o = 0 and lse = -∞.

Position allows a query at P = i + offset the keys P - left ... P + right. Tiles that no row of the block sees are not visited:
with a causal mask half of the work.

The kernels in ``gpu/cuda`` differ in who does a product, not in this: there a warp makes 16 rows on a tensor core, or a
thread 8 x 8 scores, and the next tile is copied while this one is computed.

References
    [1] T. Dao, D. Y. Fu, S. Ermon, A. Rudra, C. Ré, "FlashAttention", NeurIPS 2022, section 3.1 and algorithm 1.
"""

import functools
import math

import numba
import numpy as np
from numba import cuda

from refimpl.ops.attention.attention import CONTRACT

ROWS = 16  # queries of a block, and its threads
KEYS = 8  # of a tile


@functools.cache
def kernel(dtype: np.dtype, d: int, e: int):
    """Attention for one arithmetic and one head size: arrays in shared memory and in registers have both in their type."""
    number, nothing = numba.from_dtype(dtype), -math.inf

    @cuda.jit
    def attend(q, k, v, group, below, above, scale, softcap, o, lse):
        k_tile = cuda.shared.array((KEYS, d), number)
        v_tile = cuda.shared.array((KEYS, e), number)
        acc = cuda.local.array(e, number)
        s = cuda.local.array(KEYS, number)
        head, thread = cuda.blockIdx.y, cuda.threadIdx.x
        n, m = q.shape[1], k.shape[1]
        first = cuda.blockIdx.x * ROWS
        i = first + thread  # this thread's query
        for x in range(e):
            acc[x] = 0
        top, total = nothing, 0.0

        start = max(0, first + below) // KEYS * KEYS  # what the block's first query sees first ...
        stop = min(m, first + ROWS - 1 + above + 1)  # ... and its last one last
        for tile in range(start, stop, KEYS):
            cuda.syncthreads()  # all are done with the tile before
            for x in range(thread, KEYS * d, ROWS):
                j = tile + x // d
                k_tile[x // d, x % d] = k[head // group, j, x % d] if j < m else 0
            for x in range(thread, KEYS * e, ROWS):
                j = tile + x // e
                v_tile[x // e, x % e] = v[head // group, j, x % e] if j < m else 0
            cuda.syncthreads()  # the tile is there
            if i < n:
                larger = top
                for y in range(KEYS):
                    j = tile + y
                    s[y] = nothing
                    if i + below <= j and j <= i + above and j < m:
                        product = 0.0
                        for x in range(d):
                            product += q[head, i, x] * k_tile[y, x]
                        product *= scale
                        s[y] = product if softcap == 0 else softcap * math.tanh(product / softcap)
                    larger = max(larger, s[y])
                shift = larger if larger > nothing else 0.0
                keep = math.exp(top - shift)
                total *= keep
                for x in range(e):
                    acc[x] *= keep
                for y in range(KEYS):
                    w = math.exp(s[y] - shift)
                    total += w
                    for x in range(e):
                        acc[x] += w * v_tile[y, x]
                top = larger
        if i < n:
            for x in range(e):
                o[head, i, x] = acc[x] / total if total > 0 else 0
            lse[head, i] = top + math.log(total) if total > 0 else nothing

    return attend


@CONTRACT.form
def attention(q, k, v, *, causal=False, offset=None, window=None, scale=None, softcap=None, return_lse=False):
    """`refimpl.attention` by the kernel above, on NumPy arrays that are copied to the device and back; without mask, bias and sink.

    Parameters
    ----------
    q : ndarray, shape (..., Hq, n, d)
    k : ndarray, shape (..., Hkv, m, d)
    v : ndarray, shape (..., Hkv, m, e)
    causal : bool
    offset : int, optional
    window : tuple (left, right), optional
    scale, softcap : float, optional
    return_lse : bool

    Returns
    -------
    o : ndarray, shape (..., Hq, n, e)
    lse : ndarray, shape (..., Hq, n), only with `return_lse`
    """
    batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    q, k, v = (np.broadcast_to(x, (*batch, *x.shape[-3:])) for x in (q, k, v))
    (Hq, n, d), (Hkv, m, e) = q.shape[-3:], v.shape[-3:]
    at = m - n if offset is None else offset
    left, right = window or (None, None)
    right = 0 if causal else right  # causal is the window (None, 0)
    below, above = -n if left is None else at - left, m if right is None else at + right
    o, lse = np.zeros((*q.shape[:-1], e), q.dtype), np.full(q.shape[:-1], -np.inf, q.dtype)
    if o.size:
        flat = lambda x, axes: np.ascontiguousarray(x).reshape(-1, *x.shape[x.ndim - axes :])
        o_device, lse_device = cuda.to_device(flat(o, 2)), cuda.to_device(flat(lse, 1))
        grid = -(-n // ROWS), math.prod(batch) * Hq
        kernel(q.dtype, d, e)[grid, ROWS](
            *(cuda.to_device(flat(x, 2)) for x in (q, k, v)), Hq // max(Hkv, 1), below, above,
            d**-0.5 if scale is None else scale, softcap or 0.0, o_device, lse_device,
        )  # fmt: skip
        o, lse = o_device.copy_to_host().reshape(o.shape), lse_device.copy_to_host().reshape(lse.shape)
    return (o, lse) if return_lse else o


if __name__ == "__main__":
    keys = np.linspace(0, 3, 20)[:, None]
    print(attention(np.ones((3, 1)), keys, keys, causal=True)[:, 0], "approaches 3 as the queries see more keys")
