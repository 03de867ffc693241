"""WKV of RWKV-6 on the device: a matrix memory that is read before it is touched, and a bonus for the current step."""

import cupy as cp
from refimpl.gpu import mirror
from refimpl.gpu.matrix_memory import WIDEST, flat, instances, read, read_vjp
from refimpl.gpu.precision import widened

from refimpl.ops.linear_attention import wkv6 as chapter

KERNELS = instances(low_rank=False, before=True)


@mirror.form(chapter.CONTRACT)
def wkv6(r, k, v, w, u, *, state=None, return_state=False):
    """RWKV-6 on CuPy arrays; arguments and results as `refimpl.wkv6`.

    Notes
    -----
    One kernel for the whole sequence, the memory in registers; float32 arithmetic for halves. Keys of more than 1024 features run the
    chapter's steps one by one.
    """
    r, k, v, w, u = widened(r, k, v, w, u)
    if r.shape[-1] > WIDEST:
        return chapter.wkv6(r, k, v, w, u, state=state, return_state=return_state)
    arrays, S, batch = _flat(r, k, v, w, state)
    o, last, _ = read(*arrays, state=S, sequences=len(S), before=True)
    own = (r * u[:, None, :] * k).sum(axis=-1, keepdims=True)  # (..., H, T, 1)
    o = o.reshape(*batch, *o.shape[1:]) + own * v
    return (o, last.reshape(*batch, *last.shape[1:])) if return_state else o


@mirror.gradient(chapter.CONTRACT)
def wkv6_vjp(dy, r, k, v, w, u, *, state=None, dstate=None):
    """Gradient of `wkv6` on CuPy arrays, as `refimpl.wkv6_vjp`. Keeps one state in eight."""
    dy, r, k, v, w, u = widened(dy, r, k, v, w, u)
    if r.shape[-1] > WIDEST:
        return chapter.wkv6_vjp(dy, r, k, v, w, u, state=state, dstate=dstate)
    arrays, S, batch = _flat(r, k, v, w, state)
    _, _, kept = read(*arrays, state=S, sequences=len(S), before=True, keep=True)
    dlast = None if dstate is None else flat(dstate, batch, 2)
    g = read_vjp(flat(dy, batch, 2), *arrays, kept=kept, dlast=dlast, sequences=len(S), before=True)
    dr, dk, dv, dw, dS = (x.reshape(*batch, *x.shape[1:]) for x in (g.q, g.k, g.v, g.w, g.state))
    u = u[:, None, :]
    c = (v * dy).sum(axis=-1, keepdims=True)  # (..., H, T, 1)
    own = (r * u * k).sum(axis=-1, keepdims=True)
    du = (c * r * k).sum(axis=-2)
    return {"r": dr + c * u * k, "k": dk + c * u * r, "v": dv + own * dy, "w": dw, "u": du, "state": dS}


def _flat(r, k, v, w, state):
    r, k, v, w, S = chapter.aligned(state, r, k, v, w)
    batch = r.shape[:-2]
    return [flat(x, batch, 2) for x in (r, k, v, w)], flat(cp.asarray(S), batch, 2), batch
