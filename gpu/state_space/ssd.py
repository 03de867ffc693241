"""State space duality on the device: Mamba-2 as a case of the matrix memory."""

import cupy as cp
import numpy as np
from refimpl.gpu import mirror
from refimpl.gpu.matrix_memory import WIDEST, flat, instances, read, read_vjp
from refimpl.gpu.precision import widened

from refimpl.core.numerics import constant, sigmoid, silu, silu_derivative, softplus
from refimpl.ops.state_space import ssd as chapter

KERNELS = instances(low_rank=False, before=False)


@mirror.form(chapter.CONTRACT)
def ssd(x, dt, A, B, C, D=None, z=None, dt_bias=None, *, dt_softplus=False, dt_limit=(0.0, np.inf), state=None, return_state=False):
    """Mamba-2 on CuPy arrays; arguments and results as `refimpl.ssd`.

    Notes
    -----
    One kernel for the whole sequence, the state in registers, in float32 for halves. More than 1024 states run the chapter's steps one
    by one.
    """
    x, dt, A, B, C, D, z, dt_bias = widened(x, dt, A, B, C, D, z, dt_bias)
    options = {"dt_softplus": dt_softplus, "dt_limit": dt_limit}
    if B.shape[-1] > WIDEST:
        return chapter.ssd(x, dt, A, B, C, D, z, dt_bias, **options, state=state, return_state=return_state)
    x, dt, B, C, S = chapter._prepare(x, dt, A, B, C, z, dt_bias, dt_softplus, dt_limit, state)
    arrays, S = _flat(x, dt, A, B, C, S)
    y, last, _ = read(*arrays, state=S, sequences=len(S))
    y = chapter._skip_and_gate(y.reshape(x.shape), x, D, z)
    return (y, last.reshape(*x.shape[:-2], *last.shape[1:])) if return_state else y


@mirror.gradient(chapter.CONTRACT)
def ssd_vjp(dy, x, dt, A, B, C, D=None, z=None, dt_bias=None, *, dt_softplus=False, dt_limit=(0.0, np.inf), state=None, dstate=None):
    """Gradient of `ssd` on CuPy arrays, as `refimpl.ssd_vjp`. Keeps one state in eight."""
    dy, x, dt, A, B, C, D, z, dt_bias = widened(dy, x, dt, A, B, C, D, z, dt_bias)
    options = {"dt_softplus": dt_softplus, "dt_limit": dt_limit}
    if B.shape[-1] > WIDEST:
        return chapter.ssd_vjp(dy, x, dt, A, B, C, D, z, dt_bias, **options, state=state, dstate=dstate)
    raw = dt if dt_bias is None else dt + dt_bias[:, None]
    unclipped, groups = softplus(raw) if dt_softplus else raw, B.shape[-3]
    low, high = (constant(v, unclipped) for v in dt_limit)
    x, dt, B, C, S = chapter._prepare(x, dt, A, B, C, z, dt_bias, dt_softplus, dt_limit, state)
    dp = np.broadcast_to(dy if z is None else dy * silu(z), x.shape)
    arrays, S = _flat(x, dt, A, B, C, S)
    read_out, _, kept = read(*arrays, state=S, sequences=len(S), keep=True)
    heads = x.shape[:-2]
    dlast = None if dstate is None else flat(dstate, heads, 2)
    g = read_vjp(flat(dp, heads, 2), *arrays, kept=kept, dlast=dlast, sequences=len(S))
    dC, dB, dv, dw, dS = (v.reshape(*heads, *v.shape[1:]) for v in (g.q, g.k, g.v, g.w, g.state))
    r = dw.sum(axis=-1)  # (..., H, T)
    d_dt = A[:, None] * r + (dv * x).sum(axis=-1)
    inside = (low <= unclipped) & (unclipped <= high)
    d_dt = np.where(inside, d_dt, np.zeros_like(d_dt))
    d_raw = d_dt * sigmoid(raw) if dt_softplus else d_dt
    dx = dt[..., None] * dv
    gradient = {
        "x": dx if D is None else dx + D[:, None, None] * dp,
        "dt": d_raw,
        "A": (dt * r).sum(axis=-1),
        "B": chapter._by_group(dB, groups),
        "C": chapter._by_group(dC, groups),
        "D": (dp * x).sum(axis=(-2, -1)),
        "dt_bias": d_raw.sum(axis=-1),
        "state": dS,
    }
    if z is None:
        return gradient
    p = chapter._skip_and_gate(read_out.reshape(x.shape), x, D, None)
    return gradient | {"z": dy * p * silu_derivative(z)}


def _flat(x, dt, A, B, C, S):
    """C for queries, B for keys, dt x for values; heads of a group share B and C."""
    heads, groups = x.shape[:-2], B.shape[:-2]
    log_decay = flat(dt * A[:, None], heads, 1)
    return (flat(C, groups, 2), flat(B, groups, 2), flat(dt[..., None] * x, heads, 2), log_decay), flat(cp.asarray(S), heads, 2)
