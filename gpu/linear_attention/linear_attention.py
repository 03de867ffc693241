"""Linear attention on the device: feature maps, decays, delta rule and normaliser as cases of the matrix memory."""

import math

import cupy as cp
import numpy as np
from refimpl.gpu import channel_tensor, chunk_kernels, chunk_policy, chunk_tensor, chunkwise, mirror
from refimpl.gpu.arrays import cast
from refimpl.gpu.matrix_memory import WIDEST, flat, instances, read, read_vjp
from refimpl.gpu.precision import widened

from refimpl.core.numerics import constant, sqrt_of
from refimpl.ops.linear_attention import linear_attention as chapter
from refimpl.ops.linear_attention.feature_maps import feature_map_of, width
from refimpl.ops.linear_attention.linear_attention_contract import CONTRACT, prepare
from refimpl.ops.linear_attention.linear_attention_gradient import linear_attention_vjp as step_by_step_vjp
from refimpl.ops.linear_attention.state import State

KERNELS = (
    *instances(low_rank=False, before=False),
    *instances(low_rank=True, before=False),
    *chunk_kernels.KERNELS,
    *chunk_tensor.KERNELS,
    *chunk_tensor.KERNELS_VJP,
    *channel_tensor.KERNELS,
    *channel_tensor.KERNELS_VJP,
)


@mirror.form(CONTRACT)
def linear_attention(
    q, k, v, *, decay=None, beta=None, feature_map=None, normalize=False, scale=None, state=None, return_state=False,
    method=None, chunk_length=None,
):  # fmt: skip
    """Linear attention on CuPy arrays; arguments and results as `refimpl.linear_attention`.

    Parameters
    ----------
    method : {"fused", "chunkwise", "tensor"}, optional
        How it is computed: step by step; in chunks, of cuBLAS's products, which read halves (float32 with the delta rule); or in chunks that
        never leave the chip, for bfloat16 and up to 128 features of a key, without the delta rule, and with decays of channels without the
        normaliser (others go in chunks of cuBLAS's). By default what is fastest, of what was measured (`chunk_policy`).
    chunk_length : int, optional
        Steps of a chunk.

    Notes
    -----
    Fused: one kernel for the whole sequence, the memory in registers, in float32 for halves; heads of q that share a memory compute it
    each for itself. Keys of more than 1024 features run the chapter's steps one by one. A callable feature map gets CuPy arrays.
    """
    how = _chosen(method, chunk_length, q, v, decay, beta, feature_map, normalize, scale, gradient=False)
    if how.method == "chunkwise":
        return Chunkwise(chunk_kernels.Steps, q, k, v, decay, beta, feature_map, normalize, scale, state, how.chunk).result(return_state)
    if how.method == "tensor":
        return _in_one_kernel(q, k, v, decay, feature_map, normalize, scale, state, return_state)
    q, k, v, decay, beta = widened(q, k, v, decay, beta)
    options = {"feature_map": feature_map, "normalize": normalize, "scale": scale, "state": state}
    if width(feature_map, k) > WIDEST:
        return chapter.linear_attention(q, k, v, decay=decay, beta=beta, **options, return_state=return_state)
    call = _Call(q, k, v, decay, beta, **options)
    o, last, _ = read(*call.arrays, call.S, sequences=call.sequences)
    o = o.reshape(*call.batch, call.q_heads, *o.shape[1:])
    if normalize:
        o = o[..., :-1] / o[..., -1:]
    return (o, call.state_like(last.reshape(*call.k_shape[:-2], *last.shape[1:]))) if return_state else o


@mirror.gradient(CONTRACT)
def linear_attention_vjp(
    dy, q, k, v, *, decay=None, beta=None, feature_map=None, normalize=False, scale=None, state=None, dstate=None,
    method=None, chunk_length=None,
):  # fmt: skip
    """Gradient of `linear_attention` on CuPy arrays, as `refimpl.linear_attention_vjp`.

    Keeps one state in eight, for each head of q; in chunks one of each, for each head of k; on tensor cores one of 64
    and its cotangent, in bfloat16, for each head of q.
    """
    how = _chosen(method, chunk_length, q, v, decay, beta, feature_map, normalize, scale, gradient=True)
    phi = feature_map_of(feature_map)
    if phi is not None and not callable(getattr(phi, "vjp", None)):
        raise TypeError(f"linear_attention: feature_map must have a method vjp(dphi, x) for the gradient (see FeatureMap), got {phi!r}")
    if dstate is not None and isinstance(dstate, tuple) != bool(normalize):
        raise TypeError(f"linear_attention: dstate must be {'a tuple (dS, dz)' if normalize else 'one array'}, as the state is")
    if how.method == "chunkwise":
        return Chunkwise(chunk_kernels.Steps, q, k, v, decay, beta, feature_map, normalize, scale, state, how.chunk).vjp(dy, dstate)
    if how.method == "tensor":
        return _in_one_kernel_vjp(dy, q, k, v, decay, feature_map, scale, state, dstate)
    dy, q, k, v, decay, beta = widened(dy, q, k, v, decay, beta)
    options = {"feature_map": feature_map, "normalize": normalize, "scale": scale, "state": state}
    if width(feature_map, k) > WIDEST:
        return step_by_step_vjp(dy, q, k, v, decay=decay, beta=beta, **options, dstate=dstate)
    call = _Call(q, k, v, decay, beta, **options)
    o, _, kept = read(*call.arrays, call.S, sequences=call.sequences, keep=True)
    do = flat(dy, (*call.batch, call.q_heads), 2)
    if normalize:
        do = do / o[..., -1:]
        do = cp.concatenate([do, -(do * (o[..., :-1] / o[..., -1:])).sum(axis=-1, keepdims=True)], axis=-1)
    g = read_vjp(do, *call.arrays, kept=kept, dlast=call.cotangent(dstate), sequences=call.sequences)
    dq = g.q.reshape(*call.batch, call.q_heads, *g.q.shape[1:]) * call.scale
    dk, dv, dg, dS = (call.over_group(x) for x in (g.k, g.v, g.w, g.state))
    gradients = {}
    if beta is not None:
        da, db = call.over_group(g.a), call.over_group(g.b)
        residual = dk - db  # what βk is worth: R (v - p)
        gradients["beta"] = (call.k * residual).sum(axis=-1)
        faded = np.exp(call.g) * da
        dk, dg = call.beta * residual + faded, dg + call.k * faded
    if phi is not None:
        dq = phi.vjp(dq, np.broadcast_to(q, (*dq.shape[:-1], q.shape[-1])))
        dk = phi.vjp(dk, np.broadcast_to(k, (*dk.shape[:-1], k.shape[-1])))
    per_channel = decay is not None and decay.ndim == q.ndim
    gradients |= {"q": dq, "k": dk, "v": dv[..., :-1] if normalize else dv, "decay": dg if per_channel else dg.sum(axis=-1)}
    return gradients | {"state": call.state_like(dS)}


def _chosen(method, chunk, q, v, decay, beta, feature_map, normalize, scale, gradient: bool) -> chunk_policy.Choice:
    kind = "delta" if beta is not None else "channel" if decay is not None and decay.ndim == q.ndim else "head"
    sizes = {"heads": q.shape[:-2], "T": q.shape[-2], "d": width(feature_map, q), "e": v.shape[-1]}
    adjoint = not normalize and (scale is None or abs(scale) > 1e-6)  # by which the last state's cotangent is divided
    how = {"kind": kind, "gradient": gradient, "adjoint": adjoint, "normalised": normalize}
    return chunk_policy.chosen("linear_attention", method, chunk, **how, **sizes, dtype=q.dtype)


class _Tensor:
    """A call as the kernel on tensor cores takes it: heads of q that share a memory compute it each for itself."""

    def __init__(self, q, k, v, decay, feature_map, normalize, scale, state):
        stored, wide = q.dtype, np.dtype(np.float32)
        if feature_map is not None:
            q, k = cast(q, wide), cast(k, wide)
        self.raw_q, self.raw_k = q, k
        self.channels = decay is not None and decay.ndim == q.ndim  # whose kernel reads decays as they are stored
        decay = decay if decay is None or self.channels else cast(decay, wide)
        plain = 1 / q.shape[-1] ** 0.5 if feature_map is None else 1
        q, k, v, g, _, S, z, _ = prepare(q, k, v, decay, None, feature_map, normalize, 1, state)
        self.batch, self.heads, self.group = k.shape[:-3], *q.shape[-4:-2]
        q, k, v = (self.shared(cast(x, stored)) for x in (q, k, v))
        w = None if decay is None else self.shared(g) if self.channels else self.shared(g)[..., 0]
        self.arguments = (q, k, v, w, None, None if state is None else self.shared(S))
        self.norm = z.reshape(len(q), 1, -1) if normalize and state is not None else None
        self.scale = 1 if normalize else plain if scale is None else scale

    def shared(self, x):
        """(..., heads of k, [group,] rows, columns) as (memories, group or 1, rows, columns)."""
        return x.reshape(math.prod(self.batch) * self.heads, self.group if x.ndim == len(self.batch) + 4 else 1, *x.shape[-2:])

    def queries(self, x):
        return x.reshape(*self.batch, self.heads * self.group, *x.shape[2:])

    def keys(self, x):
        return x.reshape(*self.batch, self.heads, *x.shape[1:])


def _in_one_kernel(q, k, v, decay, feature_map, normalize, scale, state, return_state):
    call = _Tensor(q, k, v, decay, feature_map, normalize, scale, state)
    if call.channels:
        q, k, v, w, _, S = call.arguments
        result = channel_tensor.read(q, k, v, w, S, scale=call.scale)
    else:
        result = chunk_tensor.read(*call.arguments, call.norm, normalised=normalize, scale=call.scale)
    o = call.queries(result.y)
    if not return_state:
        return o
    last = call.keys(result.last[:, 0])
    return o, State(last, call.keys(result.norm[:, 0])) if normalize else last


def _in_one_kernel_vjp(dy, q, k, v, decay, feature_map, scale, state, dstate):
    call, phi, wide = _Tensor(q, k, v, decay, feature_map, False, scale, state), feature_map_of(feature_map), np.dtype(np.float32)
    G = len(call.arguments[0])
    dy = cast(dy, v.dtype).reshape(G, call.group, *dy.shape[-2:])
    if dstate is not None:  # the first of the heads that share a memory takes it for all
        dlast = cp.zeros((G, call.group, *dstate.shape[-2:]), wide)
        dlast[:, 0] = cp.broadcast_to(dstate, (*call.batch, call.heads, *dstate.shape[-2:])).reshape(G, *dstate.shape[-2:])
    dlast = None if dstate is None else dlast
    if call.channels:
        q, k, v, w, _, S = call.arguments
        g = channel_tensor.read_vjp(dy, q, k, v, w, S, dlast, scale=call.scale)
        dw = chunk_tensor.sum_heads(g.w)
    else:
        g = chunk_tensor.read_vjp(dy, *call.arguments, dlast, scale=call.scale)
        dw = g.w.sum(axis=1)
    dq, dk, dv = call.queries(g.q), call.keys(chunk_tensor.sum_heads(g.k)), call.keys(chunk_tensor.sum_heads(g.v))
    if phi is not None:
        dq, dk = cast(dq, wide), cast(dk, wide)
        dq, dk = (
            phi.vjp(dx, cp.broadcast_to(x, (*dx.shape[:-1], x.shape[-1]))) for dx, x in ((dq, call.raw_q), (dk, call.raw_k))
        )  # fmt: skip
    return {"q": dq, "k": dk, "v": dv, "decay": call.keys(dw), "state": call.keys(g.state.sum(axis=1))}


class _Call:
    """A call as the matrix memory takes it: heads of q are its sequences; k, v, decays and state are shared by those of a group."""

    def __init__(self, q, k, v, decay, beta, *, feature_map, normalize, scale, state):
        q, self.k, v, self.g, self.beta, S, z, self.scale = prepare(q, k, v, decay, beta, feature_map, normalize, scale, state)
        self.normalize, self.k_shape, self.batch = normalize, self.k.shape, self.k.shape[:-3]
        self.heads, self.group = q.shape[-4:-2]
        self.q_heads = self.heads * self.group
        if normalize:
            v, S, self.scale = cp.concatenate([v, cp.ones_like(v[..., :1])], axis=-1), cp.concatenate([S, z[..., None]], axis=-1), 1
        shared = (*self.batch, self.heads)
        g = None if decay is None else flat(self.g, shared, 2)
        w = g if g is None or (g.shape[-1] == self.k.shape[-1] and g.shape[-1] > 1) else g[..., 0]
        keys, a, b = self.k, None, None
        if beta is not None:
            keys = self.beta * self.k
            a, b = flat(np.exp(self.g) * self.k, shared, 2), flat(-keys, shared, 2)
        q = flat(q * self.scale, (*shared, self.group), 2)
        self.sequences = len(q)
        w = w if w is None else cp.ascontiguousarray(w)
        self.arrays = (q, flat(keys, shared, 2), flat(v, shared, 2), w, a, b)
        self.S = flat(S, shared, 2)

    def over_group(self, x):
        """Gradients of every head of q, summed over those that share a memory."""
        return x.reshape(*self.batch, self.heads, self.group, *x.shape[1:]).sum(axis=-3 if x.ndim == 3 else -2)

    def state_like(self, S):
        return State(S[..., :-1], S[..., -1]) if self.normalize else S

    def cotangent(self, dstate):
        """The cotangent of the final state, which the first head of a group takes for all."""
        if dstate is None:
            return None
        dS = cp.concatenate([dstate[0], dstate[1][..., None]], axis=-1) if self.normalize else dstate
        dS = flat(dS, (*self.batch, self.heads), 2)
        full = cp.zeros((len(dS), self.group, *dS.shape[1:]), dS.dtype)
        full[:, 0] = dS
        return full.reshape(-1, *dS.shape[1:])


class Chunkwise:
    """A call in chunks, in the arithmetic of `steps`: the heads of q that share a memory are the queries of one."""

    def __init__(self, steps, q, k, v, decay, beta, feature_map, normalize, scale, state, chunk):
        # a triangular system is no place for halves
        self.steps = steps = steps(q.dtype if beta is None else steps(q.dtype).wide)
        q, k, v = (cast(x, steps.wide if feature_map is not None else steps.operand) for x in (q, k, v))
        self.raw_q, self.raw_k, self.phi = q, k, feature_map_of(feature_map)
        decay, beta = (None if x is None else cast(x, steps.wide) for x in (decay, beta))
        self.has_channels = decay is not None and decay.ndim == q.ndim
        q, k, v, g, beta, S, z, _ = prepare(q, k, v, decay, beta, feature_map, normalize, 1, state)
        like = cast(g, steps.wide)
        plain = 1 / sqrt_of(self.raw_q.shape[-1], like) if self.phi is None else 1
        self.scale = 1 if normalize else plain if scale is None else scale
        self.normalize, self.batch, self.heads, self.group = normalize, k.shape[:-3], *q.shape[-4:-2]
        S = cast(S, steps.wide)
        if normalize:
            v, S = steps.with_ones(v), self.xp.concatenate([S, cast(z, S.dtype)[..., None]], axis=-1)
        arrays = (*(steps.store(self.shared(x)) for x in (q, k, v)), *map(self.shared, (like, beta, S)))
        self.memory = chunkwise.Memory(steps, *arrays, chunk=chunkwise.length(k.shape[-2], g.shape[-1] > 1, chunk))

    @property
    def xp(self):
        return self.steps.xp

    def shared(self, x):
        """(..., heads of k, [group,] rows, columns) as (memories, group or 1, rows, columns)."""
        group = 1 if x is None or x.ndim == len(self.batch) + 3 else self.group
        return None if x is None else x.reshape(math.prod(self.batch) * self.heads, group, *x.shape[-2:])

    def result(self, return_state):
        o, last = self.memory.read(scale=self.scale, dtype=None if self.normalize else self.steps.operand), self.memory.last
        o = o[..., :-1] / o[..., -1:] if self.normalize else o
        o = o.reshape(*self.batch, self.heads * self.group, *o.shape[2:])
        return (o, self.state_like(last)) if return_state else o

    def vjp(self, dy, dstate):
        xp, wide = self.xp, self.steps.wide
        do = cast(dy, wide).reshape(math.prod(self.batch) * self.heads, self.group, *dy.shape[-2:]) * constant(self.scale, self.memory.last)
        if self.normalize:
            o = self.memory.read()
            do = do / o[..., -1:]
            do = xp.concatenate([do, -(do * (o[..., :-1] / o[..., -1:])).sum(axis=-1, keepdims=True)], axis=-1)
        if dstate is not None:
            dstate = xp.concatenate([dstate[0], dstate[1][..., None]], axis=-1) if self.normalize else dstate
            dstate = self.shared(xp.broadcast_to(dstate, (*self.batch, self.heads, *dstate.shape[-2:])))
        g = self.memory.vjp(self.steps.store(do), dstate)
        dq = g.q.reshape(*self.batch, self.heads * self.group, *g.q.shape[2:])
        dk, dv, dw = (x.reshape(*self.batch, self.heads, *x.shape[2:]) for x in (g.k, g.v, g.w))
        if self.phi is not None:
            dq, dk = (
                self.phi.vjp(dx, xp.broadcast_to(x, (*dx.shape[:-1], x.shape[-1])))
                for dx, x in ((dq, self.raw_q), (dk, self.raw_k))
            )  # fmt: skip
        dw = dw if self.has_channels else dw.sum(axis=-1)
        gradients = {"q": dq, "k": dk, "v": dv[..., :-1] if self.normalize else dv, "decay": dw, "state": self.state_like(g.state)}
        return gradients if g.beta is None else gradients | {"beta": g.beta.reshape(dw.shape[: dk.ndim - 1])}

    def state_like(self, S):
        S = S.reshape(*self.batch, self.heads, *S.shape[2:])
        return State(S[..., :-1], S[..., -1]) if self.normalize else S
