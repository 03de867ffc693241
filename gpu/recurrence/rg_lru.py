"""`rg_lru` on the device: gates and scan in one kernel, the policy `Gated` of ``cuda/kernel_linear_recurrence.cu``."""

import cupy as cp
import numpy as np
from refimpl.gpu import mirror
from refimpl.gpu.arrays import arithmetic, cast, flat
from refimpl.gpu.recurrence.linear_recurrence import empty_like_layout, instances, linear_recurrence, linear_recurrence_vjp, scan

from refimpl.ops.recurrence.rg_lru import CONTRACT

KERNELS = instances("Gated", ("float32", "float64", "float16", "bfloat16"))


@mirror.form(CONTRACT)
def rg_lru(x, r, i, log_a, *, exponent=8.0, reset=None, state=None, return_state=False):
    """`refimpl.rg_lru` on CuPy arrays: x, r and i are read once and h is written once.

    Parameters
    ----------
    x, r, i : cupy.ndarray, shape (..., T, c)
        Complex x takes two kernels more.
    log_a : cupy.ndarray, shape (c,)
    exponent : float
    reset : cupy.ndarray of bool, shape (..., T), optional
        Costs one more pass over r.
    state : cupy.ndarray, shape (..., c), optional
    return_state : bool

    Returns
    -------
    h : cupy.ndarray, shape (..., T, c)
    state : cupy.ndarray, shape (..., c), only with `return_state`
    """
    if any(v is not None and v.dtype.kind == "c" for v in (x, r, i, log_a, state)):
        a, m = _decay_and_factor(r, log_a, exponent, reset)
        return linear_recurrence(a, m * (i * x), state=state, return_state=return_state)
    if reset is not None:
        number = arithmetic(r.dtype)  # `where`, for writing through a mask would wait for the device to count it
        r = cast(cp.where(reset[..., None], number.type(np.inf), cast(r, number)), r.dtype)  # how the kernel is told that a segment starts
    batch = np.broadcast_shapes(*(v.shape[:-2] for v in (x, r, i)), () if state is None else state.shape[:-1])
    dtype, number = x.dtype, arithmetic(x.dtype)
    x, r, i = (flat(v, batch, 2) for v in (x, r, i))
    N, T, c = x.shape
    rates = cp.ascontiguousarray(exponent * cast(log_a, number)).astype(number, copy=False)
    first = None if state is None else cp.ascontiguousarray(flat(cast(state, number), batch, 1))
    h, last = empty_like_layout(x, dtype), cp.empty((N, c), number) if return_state else None
    if h.size:
        scan("Gated", (x, r, i), (h,), first, rates, last)
    elif return_state:
        last = cp.zeros((N, c), number) if first is None else first.copy()
    h = h.reshape(*batch, T, c)
    return (h, last.reshape(*batch, c)) if return_state else h


@mirror.gradient(CONTRACT)
def rg_lru_vjp(dy, x, r, i, log_a, *, exponent=8.0, reset=None, state=None, dstate=None):
    """Gradient of `rg_lru`: that of the recurrence in its kernels, that of the gates elementwise, in float32 for halves.

    Parameters
    ----------
    dy : cupy.ndarray, shape (..., T, c)
    dstate : cupy.ndarray, shape (..., c), optional

    Returns
    -------
    dict
        "x", "r", "i", "log_a", and "state" where one was given.
    """
    number = arithmetic(x.dtype)
    dy, x, r, i, log_a = (cast(v, number) if v.dtype.itemsize == 2 else v for v in (dy, x, r, i, log_a))
    batch = np.broadcast_shapes(*(v.shape[:-2] for v in (dy, x, r, i)), () if state is None else state.shape[:-1])
    shape = (*batch, *dy.shape[-2:])
    real = all(v is None or v.dtype.kind != "c" for v in (dy, x, r, i, log_a, state, dstate))
    starts = False if reset is None else reset[..., None]
    if real:
        rate = exponent * log_a
        a, b = _gates(*(cp.broadcast_to(v, shape) for v in (x, r, i)), rate, starts)
    else:
        a, m = _decay_and_factor(r, log_a, exponent, reset)
        a, b = (cp.ascontiguousarray(cp.broadcast_to(v, shape)) for v in (a, m * (i * x)))
    first = cp.zeros((*batch, shape[-1]), b.dtype) if state is None else cp.broadcast_to(state, (*batch, shape[-1]))
    through = linear_recurrence_vjp(cp.broadcast_to(dy, shape), a, b, state=first, dstate=dstate)
    if real:
        dx, dr, di, dlog_a = _gates_gradient(through["a"], through["b"], x, r, i, rate, exponent, starts)
        return {"x": dx, "r": dr, "i": di, "log_a": dlog_a, "state": through["state"]}
    db = through["b"]
    still = (m == 0) if reset is None else (m == 0) | starts
    slope = cp.where(still, 0, -a * a / cp.where(still, 1, m))
    dw = a * through["a"] + slope * cp.conj(i * x) * db
    return {"x": m * i * db, "r": exponent * log_a * dw, "i": m * cp.conj(x) * db, "log_a": exponent * r * dw, "state": through["state"]}


_gates = cp.ElementwiseKernel(
    "T x, T r, T g, T rate, bool starts",
    "T a, T b",
    """
    const T w = rate * r;
    a = starts ? T(0) : T(exp(w));
    b = (starts ? T(1) : T(sqrt(-expm1(2 * w)))) * g * x;
    """,
    "rg_lru_gates",
)
# w = log a, m = √(1 - e^(2w)): dw = a da - (a²/m) i x db, and 0 for the root's part where m = 0
_gates_gradient = cp.ElementwiseKernel(
    "T da, T db, T x, T r, T g, T rate, T exponent, bool starts",
    "T dx, T dr, T di, T dlog_a",
    """
    const T w = rate * r, a = starts ? T(0) : T(exp(w)), m = starts ? T(1) : T(sqrt(-expm1(2 * w)));
    const T dw = a * da - (m == 0 ? T(0) : a * a / m * g * x * db);
    dx = m * g * db;
    di = m * x * db;
    dr = rate * dw;
    dlog_a = exponent * r * dw;
    """,
    "rg_lru_gates_gradient",
)


def _decay_and_factor(r, log_a, exponent, reset):
    """a_t and √(1 - a_t²), elementwise."""
    w = exponent * r * log_a
    a, m = cp.exp(w), cp.sqrt(-cp.expm1(2 * w))
    if reset is not None:
        a, m = cp.where(reset[..., None], 0, a), cp.where(reset[..., None], 1, m)
    return cast(a, w.dtype), cast(m, w.dtype)
