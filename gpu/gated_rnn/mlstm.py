"""mLSTM on the device: stabilised gates, then a matrix memory in which the normaliser is one more column."""

import cupy as cp
import numpy as np
from refimpl.gpu import mirror
from refimpl.gpu.launch import Kernel
from refimpl.gpu.matrix_memory import WIDEST, flat, instances, read, read_vjp
from refimpl.gpu.precision import widened

from refimpl.core.numerics import constant, sigmoid, sqrt_of
from refimpl.ops.gated_rnn import mlstm as chapter

_GATES = {x: Kernel("kernel_mlstm_gates.cu", f"mlstm_gates<{c}>") for x, c in (("float32", "float"), ("float64", "double"))}
_GATES_VJP = {x: Kernel("kernel_mlstm_gates.cu", f"mlstm_gates_vjp<{c}>") for x, c in (("float32", "float"), ("float64", "double"))}
KERNELS = (*instances(low_rank=False, before=False), *_GATES.values(), *_GATES_VJP.values())


@mirror.form(chapter.CONTRACT)
def mlstm(q, k, v, i, f, *, forget="sigmoid", eps=0.0, state=None, return_state=False):
    """mLSTM on CuPy arrays; arguments and results as `refimpl.mlstm`.

    Notes
    -----
    The stabiliser is computed first, by a walk through the gates; then one kernel for the whole sequence, the memory in registers, in
    float32 for halves. Keys of more than 1024 features run the chapter's steps one by one.
    """
    q, k, v, i, f = widened(q, k, v, i, f)
    if k.shape[-1] > WIDEST:
        return chapter.mlstm(q, k, v, i, f, forget=forget, eps=eps, state=state, return_state=return_state)
    call = _Call(*chapter._prepare(q, k, v, i, f, forget, state))
    memory, last, _ = read(*call.arrays, state=call.S, sequences=len(call.S))
    memory = memory.reshape(*call.batch, *memory.shape[1:])
    h = memory[..., :-1] / _denominator(memory[..., -1], call.m, eps)[..., None]
    return (h, call.state(last, call.m[..., -1] if call.T else call.m_before)) if return_state else h


@mirror.gradient(chapter.CONTRACT)
def mlstm_vjp(dy, q, k, v, i, f, *, forget="sigmoid", eps=0.0, state=None, dstate=None):
    """Gradient of `mlstm` on CuPy arrays, as `refimpl.mlstm_vjp`, through the stabiliser. Keeps one state in eight."""
    dy, q, k, v, i, f = widened(dy, q, k, v, i, f)
    if k.shape[-1] > WIDEST:
        return chapter.mlstm_vjp(dy, q, k, v, i, f, forget=forget, eps=eps, state=state, dstate=dstate)
    scale, pre_activation = sqrt_of(q.shape[-1], q), f
    call = _Call(*chapter._prepare(q, k, v, i, f, forget, state))
    memory, _, kept = read(*call.arrays, state=call.S, sequences=len(call.S), keep=True)
    memory = memory.reshape(*call.batch, *memory.shape[1:])  # (..., H, T, e + 1)
    overlap, bound = memory[..., -1], _lower_bound(call.m)
    D = _denominator(overlap, call.m, eps)  # (..., H, T)
    h = memory[..., :-1] / D[..., None]
    against = (h * dy).sum(axis=-1)
    enough = abs(overlap) >= bound
    d_overlap = np.where(enough, -np.sign(overlap) * against / D, np.zeros_like(D))
    d_memory = cp.concatenate([dy / D[..., None], d_overlap[..., None]], axis=-1)
    dm_read = np.where(enough, np.zeros_like(D), against / (1 + constant(eps, q) / bound))

    dlast = dm_last = None
    if dstate is not None:
        dlast = flat(cp.concatenate([dstate[0], dstate[1][..., None]], axis=-1), call.batch, 2)
        dm_last = flat(dstate[2], call.batch, 0)
    g = read_vjp(flat(d_memory, call.batch, 2), *call.arrays, kept=kept, dlast=dlast, sequences=len(call.S))
    d_new = (g.k * call.arrays[1]).sum(axis=-1)  # of log i'
    dF, di, d_first = call.gates_vjp(g.w.sum(axis=-1), d_new, flat(dm_read, call.batch, 1), dm_last)
    dk = (g.k * call.i_prime[..., None]).reshape(*call.batch, *g.k.shape[1:]) / scale
    d_forget = dF * sigmoid(-pre_activation) if forget == "sigmoid" else dF
    dv = g.v.reshape(*call.batch, *g.v.shape[1:])[..., :-1]
    return {"q": g.q.reshape(*call.batch, *g.q.shape[1:]), "k": dk, "v": dv, "i": di, "f": d_forget} | {"state": call.state(g.state, d_first)}


class _Call:
    """A call as the matrix memory takes it: keys times i', values with a 1, decays f', and the stabiliser of every step."""

    def __init__(self, q, k, v, i, F, C, n, m):
        self.batch, self.T, self.m_before = m.shape, q.shape[-2], m
        self.F, self.i, self.first = (flat(x, self.batch, own) for x, own in ((F, 1), (i, 1), (m, 0)))
        log_f, self.i_prime, top = (cp.empty_like(self.F) for _ in range(3))
        _GATES[F.dtype.name]((len(self.F) if self.T else 0,), (256,), (self.F, self.i, self.first, log_f, self.i_prime, top, np.int64(self.T)))
        self.m = top.reshape(*self.batch, self.T)
        keys = flat(k, self.batch, 2) * self.i_prime[..., None]
        values = flat(cp.concatenate([v, cp.ones_like(v, shape=(*v.shape[:-1], 1))], axis=-1), self.batch, 2)
        self.arrays = (flat(q, self.batch, 2), keys, values, log_f)
        self.S = flat(cp.concatenate([C, n[..., None]], axis=-1), self.batch, 2)

    def gates_vjp(self, d_old, d_new, d_read, d_last):
        dF, di, d_first = cp.empty_like(self.F), cp.empty_like(self.F), cp.zeros_like(self.first)
        if self.T == 0 and d_last is not None:
            d_first = d_last
        nothing = np.uint64(0)
        arguments = (self.F, self.i, self.first, cp.ascontiguousarray(self.m), d_old, d_new, d_read, nothing if d_last is None else d_last)
        _GATES_VJP[self.F.dtype.name]((len(self.F) if self.T else 0,), (256,), (*arguments, dF, di, d_first, np.int64(self.T)))
        return dF.reshape(*self.batch, self.T), di.reshape(*self.batch, self.T), d_first.reshape(self.batch)

    def state(self, memory, m):
        memory = memory.reshape(*self.batch, *memory.shape[1:])
        return chapter.State(memory[..., :-1], memory[..., -1], m)


def _lower_bound(m):
    """e^-m, but a number that is not flushed to 0."""
    return np.maximum(chapter._lower_bound(m), np.finfo(m.dtype).tiny)


def _denominator(overlap, m, eps):
    return np.maximum(abs(overlap), _lower_bound(m)) + constant(eps, m)
