"""mLSTM on the device: stabilised gates, then a matrix memory in which the normaliser is one more column."""

import math

import cupy as cp
import numpy as np
from refimpl.gpu import chunk_kernels, chunk_policy, chunk_tensor, chunkwise, mirror
from refimpl.gpu.arrays import cast
from refimpl.gpu.launch import Kernel
from refimpl.gpu.matrix_memory import WIDEST, flat, instances, read, read_vjp
from refimpl.gpu.precision import widened

from refimpl.core.numerics import constant, log_sigmoid, sigmoid, sqrt_of
from refimpl.ops.gated_rnn import mlstm as chapter

_GATES = {x: Kernel("kernel_mlstm_gates.cu", f"mlstm_gates<{c}>") for x, c in (("float32", "float"), ("float64", "double"))}
_GATES_VJP = {x: Kernel("kernel_mlstm_gates.cu", f"mlstm_gates_vjp<{c}>") for x, c in (("float32", "float"), ("float64", "double"))}
_READ_VJP = Kernel("kernel_mlstm_gates.cu", "mlstm_read_vjp")
KERNELS_GATES = (*_GATES.values(), *_GATES_VJP.values(), _READ_VJP)
KERNELS = (
    *instances(low_rank=False, before=False),
    *chunk_kernels.BY_HEAD,
    *chunk_tensor.KERNELS,
    *chunk_tensor.KERNELS_NORMALISED_VJP,
    *KERNELS_GATES,
)


@mirror.form(chapter.CONTRACT)
def mlstm(q, k, v, i, f, *, forget="sigmoid", eps=0.0, state=None, return_state=False, method=None, chunk_length=None):
    """mLSTM on CuPy arrays; arguments and results as `refimpl.mlstm`.

    Parameters
    ----------
    method : {"fused", "chunkwise", "tensor"}, optional
        How it is computed: step by step; in chunks, of cuBLAS's products, which read halves; or in chunks that never leave the chip,
        for bfloat16, up to 128 features of a key (others go in chunks of cuBLAS's). By default what is fastest, of what
        was measured (`chunk_policy`).
    chunk_length : int, optional
        Steps of a chunk.

    Notes
    -----
    The stabiliser is computed first, by a walk through the gates. Fused: one kernel for the whole sequence, the memory in registers, in
    float32 for halves; keys of more than 1024 features run the chapter's steps one by one.
    """
    how = _chosen(method, chunk_length, q, v, gradient=False)
    if how.method == "chunkwise":
        return Chunkwise(chunk_kernels.Steps, gates, gates_vjp, q, k, v, i, f, forget, eps, state, how.chunk).result(return_state)
    if how.method == "tensor":
        return _in_one_kernel(q, k, v, i, f, forget, eps, state, return_state)
    q, k, v, i, f = widened(q, k, v, i, f)
    if k.shape[-1] > WIDEST:
        return chapter.mlstm(q, k, v, i, f, forget=forget, eps=eps, state=state, return_state=return_state)
    call = _Call(*chapter._prepare(q, k, v, i, f, forget, state))
    memory, last, _ = read(*call.arrays, state=call.S, sequences=len(call.S))
    memory = memory.reshape(*call.batch, *memory.shape[1:])
    h = memory[..., :-1] / _denominator(memory[..., -1], call.m, eps)[..., None]
    return (h, call.state(last, call.m[..., -1] if call.T else call.m_before)) if return_state else h


@mirror.gradient(chapter.CONTRACT)
def mlstm_vjp(dy, q, k, v, i, f, *, forget="sigmoid", eps=0.0, state=None, dstate=None, method=None, chunk_length=None):
    """Gradient of `mlstm` on CuPy arrays, as `refimpl.mlstm_vjp`, through the stabiliser.

    Keeps one state in eight, or in chunks one of each; on tensor cores one of 64 and its cotangent, in bfloat16.
    """
    how = _chosen(method, chunk_length, q, v, gradient=True)
    if how.method == "chunkwise":
        return Chunkwise(chunk_kernels.Steps, gates, gates_vjp, q, k, v, i, f, forget, eps, state, how.chunk, gradient=True).vjp(dy, dstate)
    if how.method == "tensor":
        return _in_one_kernel_vjp(dy, q, k, v, i, f, forget, eps, state, dstate)
    dy, q, k, v, i, f = widened(dy, q, k, v, i, f)
    if k.shape[-1] > WIDEST:
        return chapter.mlstm_vjp(dy, q, k, v, i, f, forget=forget, eps=eps, state=state, dstate=dstate)
    scale, pre_activation = sqrt_of(q.shape[-1], q), f
    call = _Call(*chapter._prepare(q, k, v, i, f, forget, state))
    memory, _, kept = read(*call.arrays, state=call.S, sequences=len(call.S), keep=True)
    memory = memory.reshape(*call.batch, *memory.shape[1:])  # (..., H, T, e + 1)
    d_memory, dm_read = _read_vjp(memory, call.m, eps, dy)

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
    return {"q": g.q.reshape(*call.batch, *g.q.shape[1:]), "k": dk, "v": dv, "i": di, "f": d_forget} | {
        "state": call.state(g.state, d_first)
    }


def _chosen(method, chunk, q, v, gradient: bool) -> chunk_policy.Choice:
    return chunk_policy.chosen(
        "mlstm",
        method,
        chunk,
        kind="head",
        gradient=gradient,
        heads=q.shape[:-2],
        T=q.shape[-2],
        d=q.shape[-1],
        e=v.shape[-1],
        dtype=q.dtype,
    )


class _Tensor:
    """A call as the kernels on tensor cores take it: log i'/√d is the gain of a key."""

    def __init__(self, q, k, v, i, f, forget, state):
        wide = np.dtype(np.float32)
        i, self.f = cast(i, wide), cast(f, wide)
        F = log_sigmoid(self.f) if forget == "sigmoid" else self.f
        batch = [x.shape[: x.ndim - own] for own, xs in ((2, (q, k, v)), (1, (i, F))) for x in xs]
        self.batch = np.broadcast_shapes(*batch, *(() if state is None else (state[2].shape,)))
        first = cp.full(self.batch, -np.inf, wide) if state is None else state[2]
        self.F, self.i, self.first = (self.each(x, own) for x, own in ((F, 1), (i, 1), (first, 0)))
        log_f, _, self.m = gates(self.F, self.i, self.first)
        self.gain = self.i - np.where(self.m == -np.inf, np.zeros_like(self.m), self.m) - np.log(sqrt_of(k.shape[-1], i))
        self.state = (None, None) if state is None else (self.each(state[0], 2)[:, None], self.each(state[1], 1)[:, None])
        self.arguments = (*(self.each(x, 2)[:, None] for x in (q, k, v)), log_f[:, None], self.gain[:, None])

    def each(self, x, own):
        """Batch axes written out and made one, before that of one head."""
        shape = x.shape[x.ndim - own :]
        return cp.ascontiguousarray(cp.broadcast_to(x, (*self.batch, *shape))).reshape(math.prod(self.batch), *shape)

    def whole(self, x):
        return x.reshape(*self.batch, *x.shape[1:])


def _in_one_kernel(q, k, v, i, f, forget, eps, state, return_state):
    """The normaliser is the kernel's."""
    call = _Tensor(q, k, v, i, f, forget, state)
    m = call.m
    result = chunk_tensor.read(*call.arguments, *call.state, normalised=True, lower=_lower_bound(m)[:, None], eps=eps)
    h, C, n = (call.whole(x[:, 0]) for x in result)
    return (h, chapter.State(C, n, call.whole(m[:, -1] if m.shape[1] else call.first))) if return_state else h


def _in_one_kernel_vjp(dy, q, k, v, i, f, forget, eps, state, dstate):
    """1/D is a factor of each query, and n one more column of the values, of which each step has 1."""
    call = _Tensor(q, k, v, i, f, forget, state)
    dy = call.each(cast(dy, v.dtype), 2)[:, None]
    seen = chunk_tensor.witness(dy, *call.arguments, *call.state)
    of_query, of_n, dm_read = denominator_vjp(seen.overlap[:, 0], seen.against[:, 0], call.m, eps)
    dlast = dnorm = dm_last = None
    if dstate is not None:
        dlast, dnorm, dm_last = call.each(dstate[0], 2)[:, None], call.each(dstate[1], 1)[:, None], call.each(dstate[2], 0)
    g = chunk_tensor.read_vjp(
        dy, *call.arguments, dlast=dlast, seen=seen, of_query=of_query[:, None], of_n=of_n[:, None], dnorm=dnorm
    )  # fmt: skip
    dF, di, d_first = gates_vjp(call.F, call.i, call.first, call.m, g.w[:, 0], g.gain[:, 0] * np.exp(call.gain), dm_read, dm_last)
    gradients = {name: call.whole(x) for name, x in {"q": g.q[:, 0], "k": g.k[:, 0], "v": g.v[:, 0], "i": di, "f": dF}.items()}
    if forget == "sigmoid":
        gradients["f"] = gradients["f"] * sigmoid(-call.f)
    return gradients | {"state": chapter.State(*(call.whole(x) for x in (g.state[:, 0], g.norm[:, 0], d_first)))}


class _Call:
    """A call as the matrix memory takes it: keys times i', values with a 1, decays f', and the stabiliser of every step."""

    def __init__(self, q, k, v, i, F, C, n, m):
        self.batch, self.T, self.m_before = m.shape, q.shape[-2], m
        self.F, self.i, self.first = (flat(x, self.batch, own) for x, own in ((F, 1), (i, 1), (m, 0)))
        log_f, self.i_prime, top = gates(self.F, self.i, self.first)
        self.m = top.reshape(*self.batch, self.T)
        keys = flat(k, self.batch, 2) * self.i_prime[..., None]
        values = flat(cp.concatenate([v, cp.ones_like(v, shape=(*v.shape[:-1], 1))], axis=-1), self.batch, 2)
        self.arrays = (flat(q, self.batch, 2), keys, values, log_f)
        self.S = flat(cp.concatenate([C, n[..., None]], axis=-1), self.batch, 2)

    def gates_vjp(self, d_old, d_new, d_read, d_last):
        dF, di, d_first = gates_vjp(self.F, self.i, self.first, cp.ascontiguousarray(self.m), d_old, d_new, d_read, d_last)
        return dF.reshape(*self.batch, self.T), di.reshape(*self.batch, self.T), d_first.reshape(self.batch)

    def state(self, memory, m):
        memory = memory.reshape(*self.batch, *memory.shape[1:])
        return chapter.State(memory[..., :-1], memory[..., -1], m)


class Chunkwise:
    """A call in chunks, in the arithmetic of `steps`; `gates` and `gates_vjp` are this module's, or do the same on the host."""

    def __init__(self, steps, gates, gates_vjp, q, k, v, i, f, forget, eps, state, chunk, gradient=False):
        # where n·q nearly cancels, gradients of 8 digits are noise, and of 11 come near the end of float16's range and would leave it
        precision = np.float32 if gradient and q.dtype.itemsize == 2 else q.dtype
        self.steps, self.gates_vjp, self.forget, self.eps = steps(precision), gates_vjp, forget, eps
        steps, xp = self.steps, self.steps.xp
        q, k, v = (cast(x, steps.operand) for x in (q, k, v))
        i, self.f = (cast(x, steps.wide) for x in (i, f))
        F = log_sigmoid(self.f) if forget == "sigmoid" else self.f
        root, d, e = sqrt_of(k.shape[-1], i), k.shape[-1], v.shape[-1]
        batch = [x.shape[: x.ndim - own] for own, xs in ((2, (q, k, v)), (1, (i, F))) for x in xs]
        self.batch = np.broadcast_shapes(*batch, *(() if state is None else (state[2].shape,)))
        if state is None:
            S, m = xp.zeros((*self.batch, d, e + 1), steps.wide), xp.full(self.batch, -np.inf, steps.wide)
        else:
            S, m = xp.concatenate([state[0], state[1][..., None]], axis=-1), state[2]
        self.F, self.i, self.first = (self.flat(x, own) for x, own in ((F, 1), (i, 1), (m, 0)))
        log_f, _, self.m = gates(self.F, self.i, self.first)
        top = xp.where(self.m == -np.inf, xp.zeros_like(self.m), self.m)
        gain = self.i - top - np.log(root)  # of a key: log i'/√d, so that no product i' k is rounded
        q, k, v, S = (self.flat(x, 2)[:, None] for x in (q, k, v, S))
        self.k = k
        length = chunkwise.length(q.shape[2], False, chunk)
        log_f, gain = (x[:, None, :, None] for x in (log_f, gain))
        self.memory = chunkwise.Memory(steps, q, k, steps.with_ones(v), log_f, None, S, gain, chunk=length)

    def flat(self, x, own):
        """Batch axes written out and made one."""
        xp, shape = self.steps.xp, x.shape[x.ndim - own :]
        return xp.ascontiguousarray(xp.broadcast_to(x, (*self.batch, *shape))).reshape(math.prod(self.batch), *shape)

    def whole(self, x):
        return x.reshape(*self.batch, *x.shape[1:])

    def result(self, return_state):
        memory = self.memory.read()[:, 0]
        h = self.whole(memory[..., :-1] / _denominator(memory[..., -1], self.m, self.eps)[..., None])
        return (h, self.state(self.memory.last[:, 0], self.m[:, -1] if self.m.shape[1] else self.first)) if return_state else h

    def vjp(self, dy, dstate):
        xp = self.steps.xp
        d_memory, dm_read = _read_vjp(self.memory.read()[:, 0], self.m, self.eps, self.flat(cast(dy, self.steps.wide), 2))
        dlast = dm_last = None
        if dstate is not None:
            dlast = self.flat(xp.concatenate([dstate[0], dstate[1][..., None]], axis=-1), 2)[:, None]
            dm_last = self.flat(dstate[2], 0)
        g = self.memory.vjp(self.steps.store(d_memory[:, None]), dlast)
        d_new = self.steps.dots(g.k, self.k)[:, 0]  # of log i'
        dF, di, d_first = self.gates_vjp(self.F, self.i, self.first, self.m, g.w[:, 0, :, 0], d_new, dm_read, dm_last)
        gradients = {"q": g.q[:, 0], "k": g.k[:, 0], "v": g.v[:, 0, :, :-1], "i": di, "f": dF}
        gradients = {name: self.whole(x) for name, x in gradients.items()}
        if self.forget == "sigmoid":
            gradients["f"] = gradients["f"] * sigmoid(-self.f)
        return gradients | {"state": self.state(g.state[:, 0], d_first)}

    def state(self, memory, m):
        memory = self.whole(memory)
        return chapter.State(memory[..., :-1], memory[..., -1], self.whole(m))


def gates(F, i, first):
    """log f', i' and m of every step, of (sequences, T) gates and the first m."""
    log_f, i_prime, m = (cp.empty_like(F) for _ in range(3))
    count, T = F.shape
    _GATES[F.dtype.name]((count if T else 0,), (256,), (F, i, first, log_f, i_prime, m, np.int64(T)))
    return log_f, i_prime, m


def gates_vjp(F, i, first, m, d_old, d_new, d_read, d_last):
    """Cotangents of F, i and the first m, of those of log f' and log i', and of m where it is read and at the end."""
    dF, di, d_first = cp.empty_like(F), cp.empty_like(F), cp.zeros_like(first)
    count, T = F.shape
    if T == 0 and d_last is not None:
        d_first = d_last
    d_old, d_new, d_read = (cp.ascontiguousarray(x) for x in (d_old, d_new, d_read))
    last = np.uint64(0) if d_last is None else d_last
    _GATES_VJP[F.dtype.name]((count if T else 0,), (256,), (F, i, first, m, d_old, d_new, d_read, last, dF, di, d_first, np.int64(T)))
    return dF, di, d_first


def denominator_vjp(overlap, against, m, eps):
    """What `_read_vjp` is for the kernels on tensor cores, of n·q and o·dy, o unnormalised: -log D, D times the cotangent of n·q, that of m."""
    of_query, of_n, dm_read = (cp.empty_like(m) for _ in range(3))
    overlap, against = (cp.ascontiguousarray(x) for x in (overlap, against))
    arguments = (overlap, against, m, of_query, of_n, dm_read, np.int64(m.size), np.float32(eps))
    _READ_VJP((-(-m.size // 256),), (256,), arguments)
    return of_query, of_n, dm_read


def _read_vjp(memory, m, eps, dy):
    """Cotangents of what is read, (..., T, e + 1), and of the stabiliser where it bounds the denominator."""
    overlap, bound = memory[..., -1], _lower_bound(m)
    D = _denominator(overlap, m, eps)
    h = memory[..., :-1] / D[..., None]
    against = (h * dy).sum(axis=-1)
    enough = abs(overlap) >= bound
    d_overlap = np.where(enough, -np.sign(overlap) * against / D, np.zeros_like(D))
    dm_read = np.where(enough, np.zeros_like(D), against / (1 + constant(eps, m) / bound))
    return np.concatenate([dy / D[..., None], d_overlap[..., None]], axis=-1), dm_read


def _lower_bound(m):
    """e^-m, but a number that is not flushed to 0."""
    return np.maximum(chapter._lower_bound(m), np.finfo(m.dtype).tiny)


def _denominator(overlap, m, eps):
    return np.maximum(abs(overlap), _lower_bound(m)) + constant(eps, m)
