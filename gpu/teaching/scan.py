"""A parallel scan, step by step: `linear_recurrence` by one thread block a channel, up-sweep, down-sweep, and carries.

    python -c "import refimpl; print(refimpl.linear_recurrence.__doc__)"      what is computed
    NUMBA_ENABLE_CUDASIM=1 python -m refimpl.gpu.teaching.scan                how, without a GPU

A step of the recurrence h_t = a_t h_{t-1} + b_t is the map h -> a h + b, a pair (a, b). Two steps are one step again,

    first (a_1, b_1), then (a_2, b_2):    (a_2 a_1,  a_2 b_1 + b_2)

an operation that is associative, so that steps may be put together in any grouping, but not commutative: which of two
pairs comes first matters. A block puts together CHUNK steps in shared memory as a tree does [1, section 1.2-1.4]:

    up-sweep      pairs of neighbours, then pairs of pairs: each node of the tree holds what its leaves come to
    down-sweep    from the root, which has nothing before it, every node tells its children what comes before them: the
                  left one what came before the node itself, the right one that followed by the left child's steps

Then thread j knows the composition of all steps before step j, applies it to the h that arrives at the chunk, and does
its own. The next chunk begins with the h that this one leaves: the carry. 2 log2(CHUNK) rounds for CHUNK steps. The
kernels in ``gpu/cuda`` keep most of the tree in registers and let several blocks work on one sequence; the algebra is this.

References
    [1] G. E. Blelloch, "Prefix sums and their applications", CMU-CS-90-190, 1990.
"""

import functools

import numba
import numpy as np
from numba import cuda

from refimpl.ops.recurrence.linear_recurrence import CONTRACT

THREADS = 32
CHUNK = 2 * THREADS  # a thread for every two leaves of the tree


@functools.cache
def kernel(dtype: np.dtype):
    """The scan in one arithmetic: shared memory is declared with its type."""
    number = numba.from_dtype(dtype)

    @cuda.jit
    def scan(a, b, state, h, last):
        a_tree = cuda.shared.array(CHUNK, number)
        b_tree = cuda.shared.array(CHUNK, number)
        lane, i, T = cuda.blockIdx.x, cuda.threadIdx.x, a.shape[1]
        carry = state[lane]
        for start in range(0, T, CHUNK):
            for leaf in (i, i + THREADS):
                inside = start + leaf < T
                a_tree[leaf] = a[lane, start + leaf] if inside else 1  # h -> 1 h + 0: no step
                b_tree[leaf] = b[lane, start + leaf] if inside else 0

            reach = 1  # up-sweep: the node over `reach` leaves is kept at the last of them
            while reach < CHUNK:
                cuda.syncthreads()
                second = 2 * reach * (i + 1) - 1
                if second < CHUNK:
                    first = second - reach
                    b_tree[second] = a_tree[second] * b_tree[first] + b_tree[second]
                    a_tree[second] = a_tree[second] * a_tree[first]
                reach *= 2

            cuda.syncthreads()
            a_all, b_all = a_tree[CHUNK - 1], b_tree[CHUNK - 1]
            cuda.syncthreads()
            if i == 0:
                a_tree[CHUNK - 1] = 1
                b_tree[CHUNK - 1] = 0
            while reach > 1:  # down-sweep: a node holds what comes before its leaves
                reach //= 2
                cuda.syncthreads()
                second = 2 * reach * (i + 1) - 1
                if second < CHUNK:
                    first = second - reach
                    a_first, b_first = a_tree[first], b_tree[first]
                    a_tree[first] = a_tree[second]
                    b_tree[first] = b_tree[second]
                    b_tree[second] = a_first * b_tree[second] + b_first  # before the node, then its first half
                    a_tree[second] = a_first * a_tree[second]
            cuda.syncthreads()

            for leaf in (i, i + THREADS):
                t = start + leaf
                if t < T:
                    arrives = a_tree[leaf] * carry + b_tree[leaf]
                    h[lane, t] = a[lane, t] * arrives + b[lane, t]
            carry = a_all * carry + b_all
            cuda.syncthreads()  # all have read the tree before the next chunk fills it
        if i == 0:
            last[lane] = carry

    return scan


@CONTRACT.form
def linear_recurrence(a, b, *, state=None, reverse=False, return_state=False):
    """`refimpl.linear_recurrence` by the kernel above, on NumPy arrays that are copied to the device and back.

    Parameters
    ----------
    a : ndarray, shape (..., T, c), (..., 1, c) or (c,)
    b : ndarray, shape (..., T, c)
    state : ndarray, shape (..., c), optional
    reverse : bool
    return_state : bool

    Returns
    -------
    h : ndarray, shape (..., T, c)
    state : ndarray, shape (..., c), only with `return_state`
    """
    a = a[None, :] if a.ndim == 1 else a
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2], () if state is None else state.shape[:-1])
    T, c = b.shape[-2:]
    dtype = np.result_type(a, b, *([] if state is None else [state]))
    lanes = int(np.prod(batch, dtype=int)) * c

    def rows(x):
        x = np.swapaxes(np.broadcast_to(x, (*batch, T, c)), -1, -2).reshape(lanes, T)  # time contiguous
        return np.ascontiguousarray(x[:, ::-1] if reverse else x).astype(dtype)

    first = np.zeros(lanes, dtype) if state is None else np.broadcast_to(state, (*batch, c)).reshape(lanes).astype(dtype)
    h, last = np.zeros((lanes, T), dtype), first.copy()
    if h.size:
        h_device, last_device = cuda.to_device(h), cuda.to_device(last)
        kernel(dtype)[lanes, THREADS](cuda.to_device(rows(a)), cuda.to_device(rows(b)), cuda.to_device(first), h_device, last_device)
        h, last = h_device.copy_to_host(), last_device.copy_to_host()
    h = np.swapaxes((h[:, ::-1] if reverse else h).reshape(*batch, c, T), -1, -2)
    return (h, last.reshape(*batch, c)) if return_state else h


if __name__ == "__main__":
    print(linear_recurrence(np.array([0.5]), np.ones((5, 1)))[:, 0], "approaches 2")
