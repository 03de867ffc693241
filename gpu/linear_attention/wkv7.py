"""WKV of RWKV-7 on the device: a case of the matrix memory."""

import cupy as cp
from refimpl.gpu import mirror
from refimpl.gpu.matrix_memory import WIDEST, flat, instances, read, read_vjp
from refimpl.gpu.precision import widened

from refimpl.ops.linear_attention import wkv7 as chapter

KERNELS = instances(low_rank=True, before=False)


@mirror.form(chapter.CONTRACT)
def wkv7(r, w, k, v, a, b, *, state=None, return_state=False):
    """RWKV-7 on CuPy arrays; arguments and results as `refimpl.wkv7`.

    Notes
    -----
    One kernel for the whole sequence, the memory in registers; float32 arithmetic for halves. Keys of more than 1024 features run the
    chapter's steps one by one.
    """
    r, w, k, v, a, b = widened(r, w, k, v, a, b)
    if r.shape[-1] > WIDEST:
        return chapter.wkv7(r, w, k, v, a, b, state=state, return_state=return_state)
    arrays, S, batch = _flat(r, w, k, v, a, b, state)
    o, last, _ = read(*arrays, S, sequences=len(S))
    o = o.reshape(*batch, *o.shape[1:])
    return (o, last.reshape(*batch, *last.shape[1:])) if return_state else o


@mirror.gradient(chapter.CONTRACT)
def wkv7_vjp(dy, r, w, k, v, a, b, *, state=None, dstate=None):
    """Gradient of `wkv7` on CuPy arrays, as `refimpl.wkv7_vjp`. Keeps one state in eight."""
    dy, r, w, k, v, a, b = widened(dy, r, w, k, v, a, b)
    if r.shape[-1] > WIDEST:
        return chapter.wkv7_vjp(dy, r, w, k, v, a, b, state=state, dstate=dstate)
    arrays, S, batch = _flat(r, w, k, v, a, b, state)
    _, _, kept = read(*arrays, S, sequences=len(S), keep=True)
    dlast = None if dstate is None else flat(dstate, batch, 2)
    g = read_vjp(flat(dy, batch, 2), *arrays, kept=kept, dlast=dlast, sequences=len(S))
    named = {"r": g.q, "w": g.w, "k": g.k, "v": g.v, "a": g.a, "b": g.b, "state": g.state}
    return {name: x.reshape(*batch, *x.shape[1:]) for name, x in named.items()}


def _flat(r, w, k, v, a, b, state):
    r, w, v, k, a, b, S = chapter.aligned(state, r, w, v, k, a, b)
    batch = r.shape[:-2]
    return [flat(x, batch, 2) for x in (r, k, v, w, a, b)], flat(cp.asarray(S), batch, 2), batch
