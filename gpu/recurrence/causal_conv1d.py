"""`causal_conv1d` on the device: every number read once, in either memory layout (``cuda/kernel_causal_conv1d.cu``)."""

import cupy as cp
import numpy as np
from refimpl.gpu import mirror
from refimpl.gpu.arrays import arithmetic, cast, cpp, flat, strides
from refimpl.gpu.launch import Kernel
from refimpl.gpu.recurrence.linear_recurrence import empty_like_layout, time_is_contiguous

from refimpl.ops.recurrence.causal_conv1d import CONTRACT

FILE = "kernel_causal_conv1d.cu"
LENGTHS = (32, 8)  # steps a thread: where channels are contiguous, and where time is
WINDOWS = (2, 3, 4)  # numbers of taps that a thread keeps in registers; others are read again
IN_REGISTERS = ("float32", "float16", "bfloat16")


def _kernel(name, dtype, taps, length) -> Kernel:
    window = taps if np.dtype(dtype).name in IN_REGISTERS and taps in WINDOWS else 0
    return Kernel(FILE, f"{name}<{cpp(dtype)}, {window}, {length}>")


KERNELS = tuple(
    dict.fromkeys(
        _kernel(name, dtype, taps, length)
        for length in LENGTHS
        for name in ("causal_conv1d", "causal_conv1d_gradient")
        for dtype in ("float32", "float16", "bfloat16", "float64", "complex64", "complex128")
        for taps in (0, *WINDOWS)
    )
)


class _Prepared:
    def __init__(self, x, weight, bias, state):
        self.batch = np.broadcast_shapes(x.shape[:-2], () if state is None else state.shape[:-2])
        dtype = np.dtype(x.dtype)
        if any(a is not None and a.dtype.kind == "c" for a in (x, weight, bias, state)):
            dtype = np.result_type(arithmetic(dtype), np.complex64)
        self.dtype, self.number = dtype, arithmetic(dtype)
        self.x = flat(cast(x, dtype), self.batch, 2)
        self.weight, self.bias = (None if a is None else cp.ascontiguousarray(cast(a, self.number)) for a in (weight, bias))
        self.state = None if state is None else self.rows(state)
        self.taps = weight.shape[-1]
        self.length = LENGTHS[time_is_contiguous(self.x)]

    def rows(self, x):
        """(..., W-1, c) -> (N, W-1, c), contiguous, in the arithmetic's precision."""
        return cp.ascontiguousarray(flat(cast(x, self.number), self.batch, 2))

    def run(self, y, activation):
        """The kernel, into `y` of the input's shape."""
        N, T, c = self.x.shape
        threads = N * -(-T // self.length) * c
        _kernel("causal_conv1d", self.dtype, self.taps, self.length)(
            (-(-threads // 128),), (128,),
            (self.x, *strides(self.x), self.weight, *(np.uintp(0) if a is None else a for a in (self.bias, self.state)), y, *strides(y),
             np.int64(N), np.int64(T), np.int64(c), np.int32(self.taps), np.int32(activation == "silu"), np.int32(time_is_contiguous(self.x))),
        )  # fmt: skip


@mirror.form(CONTRACT)
def causal_conv1d(x, weight, bias=None, *, activation=None, state=None, return_state=False):
    """`refimpl.causal_conv1d` on CuPy arrays, bias and activation in the same kernel.

    Parameters
    ----------
    x : cupy.ndarray, shape (..., T, c)
        Fast if channels are contiguous or if time is; right for any strides.
    weight : cupy.ndarray, shape (c, W)
        Any W; 2, 3 and 4 taps are kept in registers.
    bias : cupy.ndarray, shape (c,), optional
    activation : {None, "silu"}
    state : cupy.ndarray, shape (..., W-1, c), optional
    return_state : bool

    Returns
    -------
    y : cupy.ndarray, shape (..., T, c)
    state : cupy.ndarray, shape (..., W-1, c), only with `return_state`
    """
    p = _Prepared(x, weight, bias, state)
    N, T, c = p.x.shape
    y = empty_like_layout(p.x)
    if y.size:
        p.run(y, activation)
    y = y.reshape(*p.batch, T, c)
    if not return_state:
        return y
    before = cp.zeros((N, p.taps - 1, c), p.number) if p.state is None else p.state
    seen = cp.concatenate([before, p.x[:, max(0, T - p.taps + 1) :].astype(p.number)], axis=1)
    return y, seen[:, seen.shape[1] - p.taps + 1 :].copy().reshape(*p.batch, p.taps - 1, c)


@mirror.gradient(CONTRACT)
def causal_conv1d_vjp(dy, x, weight, bias=None, *, activation=None, state=None, dstate=None):
    """Gradient of `causal_conv1d`, in one kernel for up to 4 taps; sums have one order.

    Parameters
    ----------
    dy : cupy.ndarray, shape (..., T, c)
    dstate : cupy.ndarray, shape (..., W-1, c), optional

    Returns
    -------
    dict
        "x", "weight", and "bias", "state" where they were given.
    """
    p = _Prepared(x, weight, bias, state)
    if dy.dtype.kind == "c" and p.dtype.kind != "c":
        p = _Prepared(x.astype(np.result_type(p.number, np.complex64)), weight, bias, state)
    N, T, c = p.x.shape
    dy = flat(cast(dy, p.dtype), p.batch, 2)
    dlast = None if dstate is None else p.rows(dstate)
    dx, before = empty_like_layout(p.x), cp.zeros((N, p.taps - 1, c), p.number)
    if not dx.size:
        dweight = cp.zeros((c, p.taps), p.number)
        return {
            "x": dx.reshape(*p.batch, T, c),
            "weight": dweight,
            "bias": dweight[:, 0],
            "state": (before if dlast is None else dlast).reshape(*p.batch, p.taps - 1, c),
        }
    kernel = _kernel("causal_conv1d_gradient", p.dtype, p.taps, p.length)
    if activation == "silu" and ", 0, " in kernel.name:
        z = cp.empty((N, T, c), p.dtype)
        p.run(z, None)
        z, wide = z.astype(p.number), dy.astype(p.number)
        gate = 1 / (1 + cp.exp(-z))
        dy = (wide * cp.where(gate == 0, 0, gate * (1 + z * (1 - gate)))).astype(p.dtype)
    chunks = -(-T // p.length)
    parts = cp.empty((N, chunks, p.taps + 1, c), p.number)
    kernel(
        (-(-N * chunks * c // 128),), (128,),
        (dy, *strides(dy), p.x, *strides(p.x), p.weight, *(np.uintp(0) if a is None else a for a in (p.bias, p.state, dlast)), dx, *strides(dx),
         before, parts, np.int64(N), np.int64(T), np.int64(c), np.int32(p.taps), np.int32(activation == "silu"), np.int32(time_is_contiguous(p.x))),
    )  # fmt: skip
    total = parts.sum(axis=(0, 1))  # (W+1, c)
    return {"x": dx.reshape(*p.batch, T, c), "weight": total[:-1].T, "bias": total[-1], "state": before.reshape(*p.batch, p.taps - 1, c)}
