"""WKV of RWKV-4 on the device: a thread walks a channel through time."""

import cupy as cp
import numpy as np
from refimpl.gpu import mirror
from refimpl.gpu.launch import Kernel
from refimpl.gpu.matrix_memory import flat
from refimpl.gpu.precision import widened

from refimpl.ops.linear_attention import wkv as chapter

_FORWARD, _BACKWARD = (
    {x: Kernel("kernel_wkv.cu", f"{name}<{c}>") for x, c in (("float32", "float"), ("float64", "double"))} for name in ("wkv", "wkv_vjp")
)
KERNELS = (*_FORWARD.values(), *_BACKWARD.values())
_THREADS = 64


@mirror.form(chapter.CONTRACT)
def wkv(k, v, w, u, *, state=None, return_state=False):
    """RWKV-4 on CuPy arrays; arguments and results as `refimpl.wkv`. Halves compute in float32."""
    k, v, w, u = widened(k, v, w, u)
    y, last, _ = _run(k, v, w, u, state, keep=False)
    return (y, last) if return_state else y


@mirror.gradient(chapter.CONTRACT)
def wkv_vjp(dy, k, v, w, u, *, state=None, dstate=None):
    """Gradient of `wkv` on CuPy arrays, as `refimpl.wkv_vjp`. Keeps all states, three times the memory of k."""
    dy, k, v, w, u = widened(dy, k, v, w, u)
    y, last, (k, v, w, u, *saved) = _run(k, v, w, u, state, keep=True)
    batch, channels = y.shape[:-2], last.num.shape
    dk, dv = cp.empty_like(y), cp.empty_like(y)
    dw, du = cp.zeros(channels, y.dtype), cp.zeros(channels, y.dtype)
    d_state = [cp.zeros(channels, y.dtype) if x is None else cp.array(cp.broadcast_to(x, channels), order="C") for x in dstate or (None,) * 3]
    arrays = (k, v, w, u, *saved, flat(dy, batch, 2), dk, dv, dw, du, *d_state)
    _BACKWARD[y.dtype.name](_grid(dw), (_THREADS,), (*arrays, *_sizes(k)))
    return {"k": dk, "v": dv, "w": dw, "u": du, "state": chapter.State(*d_state)}


def _run(k, v, w, u, state, keep):
    """y, the last state, and the arrays as the kernels take them, with the states before each step if they are kept."""
    batch = np.broadcast_shapes(k.shape[:-2], v.shape[:-2], *(x.shape[:-1] for x in state or ()))
    channels = (*batch, k.shape[-1])
    k, v, first = flat(k, batch, 2), flat(v, batch, 2), [None if x is None else flat(x, batch, 1) for x in state or (None,) * 3]
    w, u = cp.ascontiguousarray(w), cp.ascontiguousarray(u)
    y = cp.empty((*batch, *k.shape[1:]), k.dtype)
    last = chapter.State(*(cp.empty(channels, k.dtype) for _ in range(3)))
    saved = [cp.empty_like(k) for _ in range(3)] if keep else []
    nothing = np.uint64(0)
    pointers = (k, v, w, u, *(nothing if x is None else x for x in first), y, *last, *(saved or (nothing,) * 3))
    _FORWARD[k.dtype.name](_grid(last.num), (_THREADS,), (*pointers, *_sizes(k)))
    return y, last, (k, v, w, u, *saved)


def _grid(channels):
    return (-(-channels.size // _THREADS),)


def _sizes(k):
    return tuple(np.int64(n) for n in k.shape)
