"""State space duality on the device: Mamba-2 as a case of the matrix memory, step by step in one kernel or in chunks."""

import math

import cupy as cp
import numpy as np
from refimpl.gpu import chunk_kernels, chunk_policy, chunk_tensor, chunkwise, mirror
from refimpl.gpu.arrays import cast, or_null
from refimpl.gpu.launch import Kernel
from refimpl.gpu.matrix_memory import WIDEST, flat, instances, read, read_vjp
from refimpl.gpu.precision import widened

from refimpl.core.numerics import constant, sigmoid, silu, silu_derivative, softplus
from refimpl.ops.state_space import ssd as chapter

_STEPS, _STEPS_VJP = KERNELS_STEPS = tuple(Kernel("kernel_ssd_steps.cu", name) for name in ("ssd_steps", "ssd_steps_vjp"))
KERNELS = (
    *instances(low_rank=False, before=False),
    *chunk_kernels.BY_HEAD,
    *chunk_tensor.KERNELS,
    *chunk_tensor.KERNELS_VJP,
    *KERNELS_STEPS,
)


@mirror.form(chapter.CONTRACT)
def ssd(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, *, dt_softplus=False, dt_limit=(0.0, np.inf), state=None, return_state=False,
    method=None, chunk_length=None,
):  # fmt: skip
    """Mamba-2 on CuPy arrays; arguments and results as `refimpl.ssd`.

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
    Fused: one kernel for the whole sequence, the state in registers, in float32 for halves; more than 1024 states run the chapter's
    steps one by one.
    """
    how = _chosen(method, chunk_length, x, B, gradient=False)
    if how.method == "chunkwise" or (how.method == "tensor" and dt_limit[0] < 0):  # whose steps have no logarithms
        call = Chunkwise(chunk_kernels.Steps, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, state, how.chunk)
        return call.result(return_state)
    if how.method == "tensor":
        return _in_one_kernel(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, state, return_state)
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
def ssd_vjp(
    dy, x, dt, A, B, C, D=None, z=None, dt_bias=None, *, dt_softplus=False, dt_limit=(0.0, np.inf), state=None, dstate=None,
    method=None, chunk_length=None,
):  # fmt: skip
    """Gradient of `ssd` on CuPy arrays, as `refimpl.ssd_vjp`. Keeps one state in eight, in chunks one of each, on tensor cores and its cotangent."""
    how = _chosen(method, chunk_length, x, B, gradient=True)
    if how.method == "chunkwise" or (how.method == "tensor" and dt_limit[0] < 0):
        return Chunkwise(chunk_kernels.Steps, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, state, how.chunk).vjp(dy, dstate)
    if how.method == "tensor":
        return _in_one_kernel_vjp(dy, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, state, dstate)
    dy, x, dt, A, B, C, D, z, dt_bias = widened(dy, x, dt, A, B, C, D, z, dt_bias)
    options = {"dt_softplus": dt_softplus, "dt_limit": dt_limit}
    if B.shape[-1] > WIDEST:
        return chapter.ssd_vjp(dy, x, dt, A, B, C, D, z, dt_bias, **options, state=state, dstate=dstate)
    raw = dt if dt_bias is None else dt + dt_bias[:, None]
    unclipped, groups = softplus(raw) if dt_softplus else raw, B.shape[-3]
    x, dt, B, C, S = chapter._prepare(x, dt, A, B, C, z, dt_bias, dt_softplus, dt_limit, state)
    dp = np.broadcast_to(dy if z is None else dy * silu(z), x.shape)
    arrays, S = _flat(x, dt, A, B, C, S)
    read_out, _, kept = read(*arrays, state=S, sequences=len(S), keep=True)
    heads = x.shape[:-2]
    dlast = None if dstate is None else flat(dstate, heads, 2)
    g = read_vjp(flat(dp, heads, 2), *arrays, kept=kept, dlast=dlast, sequences=len(S))
    dC, dB, dv, dw, dS = (v.reshape(*heads, *v.shape[1:]) for v in (g.q, g.k, g.v, g.w, g.state))
    r = dw.sum(axis=-1)  # (..., H, T)
    d_raw = _of_raw(A[:, None] * r + (dv * x).sum(axis=-1), raw, unclipped, dt_softplus, dt_limit)
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


def _chosen(method, chunk, x, B, gradient: bool) -> chunk_policy.Choice:
    return chunk_policy.chosen(
        "ssd", method, chunk, kind="head", gradient=gradient, heads=x.shape[:-2], T=x.shape[-2], d=B.shape[-1], e=x.shape[-1], dtype=x.dtype
    )


class _Tensor:
    """A call as the kernel on tensor cores takes it: steps are gains of the keys, so that values are x itself."""

    def __init__(self, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, state):
        A, D, dt_bias = (None if v is None else cast(v, np.dtype(np.float32)) for v in (A, D, dt_bias))
        given = [v for v in (x, dt[..., None], B, C, z, state) if v is not None]
        batch = np.broadcast_shapes(*(v.shape[:-3] for v in given))
        x, dt, B, C = (np.broadcast_to(v, (*batch, *v.shape[-3:])) for v in (x, dt[..., None], B, C))
        self.heads, self.groups, self.T, self.shape = x.shape[:-2], B.shape[:-2], x.shape[-2], x.shape
        self.G, self.sharing = math.prod(self.groups), self.heads[-1] // max(self.groups[-1], 1)
        self.z = None if z is None else self.by_head(np.broadcast_to(z, x.shape), 2)
        self.skip = None if D is None else self.by_head(np.broadcast_to(D, self.heads), 0)
        queries, keys = (v.reshape(self.G, 1, *v.shape[-2:]) for v in (C, B))
        self.raw = cp.ascontiguousarray(dt[..., 0])
        self.of_heads = [or_null(v if v is None else cp.ascontiguousarray(v)) for v in (A, dt_bias)]
        self.sizes = np.int64(self.T), np.int32(self.heads[-1]), np.int32(dt_softplus), *(np.float32(v) for v in dt_limit)
        w, gain = (cp.empty(self.raw.shape, np.float32) for _ in range(2))
        _STEPS((math.prod(self.heads),), (256,), (self.raw, *self.of_heads, w, gain, *self.sizes))
        state = None if state is None else self.by_head(np.broadcast_to(state, (*self.heads, B.shape[-1], x.shape[-1])), 2)
        self.arguments = (queries, keys, self.by_head(x, 2), self.by_head(w, 1), self.by_head(gain, 1), state)

    def of_steps(self, dw, dgain):
        """Cotangents of dt (..., H, T), and of A and the bias, of each sequence by itself, (..., H)."""
        dt, dA, dbias = cp.empty(self.raw.shape, np.float32), *(cp.empty(self.heads, np.float32) for _ in range(2))
        _STEPS_VJP((math.prod(self.heads),), (256,), (self.raw, *self.of_heads, dw, dgain, dt, dA, dbias, *self.sizes))
        return dt, dA, dbias

    def by_head(self, v, own):
        """(..., H, own axes) as (groups, heads of each, own axes)."""
        return v.reshape(self.G, self.sharing, *v.shape[v.ndim - own :])


def _in_one_kernel(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, state, return_state):
    """The skip and the gate are the kernel's."""
    call = _Tensor(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, state)
    result = chunk_tensor.read(*call.arguments, skip=call.skip, z=call.z)
    y = result.y.reshape(call.shape)
    return (y, result.last.reshape(*call.heads, *result.last.shape[2:])) if return_state else y


def _in_one_kernel_vjp(dy, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, state, dstate):
    call, wide = _Tensor(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, state), np.dtype(np.float32)
    heads = call.heads
    dy = call.by_head(np.broadcast_to(dy, call.shape), 2)
    dp = cast(dy if z is None else cast(dy, wide) * silu(cast(call.z, wide)), x.dtype)
    last = (*heads, B.shape[-1], x.shape[-1])
    dlast = None if dstate is None else call.by_head(np.broadcast_to(dstate, last), 2)
    g = chunk_tensor.read_vjp(dp, *call.arguments, dlast, skip=call.skip)
    d_dt, dA, dbias = call.of_steps(g.w, g.gain)
    gradient = {
        "x": g.v.reshape(call.shape),
        "dt": d_dt,
        "A": dA,
        "B": chunk_tensor.sum_heads(g.k).reshape(*call.groups, *g.k.shape[2:]),
        "C": chunk_tensor.sum_heads(g.q).reshape(*call.groups, *g.q.shape[2:]),
        "dt_bias": dbias,
        "state": g.state.reshape(last),
    }
    if D is not None:
        gradient["D"] = g.skip.reshape(heads)
    if z is not None:
        read, z = chunk_tensor.read(*call.arguments, skip=call.skip).y, cast(call.z, wide)
        gradient["z"] = (cast(dy, wide) * cast(read, wide) * silu_derivative(z)).reshape(call.shape)
    return gradient


def _of_raw(d_dt, raw, unclipped, dt_softplus, dt_limit):
    """A step's cotangent through the limits and softplus."""
    low, high = (constant(v, unclipped) for v in dt_limit)
    inside = (low <= unclipped) & (unclipped <= high)
    d_dt = np.where(inside, d_dt, np.zeros_like(d_dt))
    return d_dt * sigmoid(raw) if dt_softplus else d_dt


class Chunkwise:
    """A call in chunks, in the arithmetic of `steps`: C reads and B is written under, for all heads of a group; values are dt x."""

    def __init__(self, steps, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, state, chunk):
        self.steps = steps = steps(x.dtype)
        dt, self.A, self.D, dt_bias = (None if v is None else cast(v, steps.wide) for v in (dt, A, D, dt_bias))
        self.raw = dt if dt_bias is None else dt + dt_bias[:, None]
        self.unclipped = softplus(self.raw) if dt_softplus else self.raw
        x, B, C, z = (None if v is None else cast(v, steps.operand) for v in (x, B, C, z))  # nothing, or float32 for float16
        self.z, self.dt_softplus, self.dt_limit = z, dt_softplus, dt_limit
        x, self.dt, B, C, S = chapter._prepare(x, dt, self.A, B, C, z, dt_bias, dt_softplus, dt_limit, state)
        self.x, self.heads, self.groups = x, x.shape[:-2], B.shape[:-2]
        self.sharing = self.heads[-1] // max(self.groups[-1], 1)
        values = steps.scaled(self.grouped(x), self.grouped(self.dt[..., None]))
        w = (self.dt * self.A[:, None])[..., None]
        arrays = (self.grouped(C, 1), self.grouped(B, 1), values, self.grouped(w), None, self.grouped(cast(S, steps.wide)))
        self.memory = chunkwise.Memory(steps, *arrays, chunk=chunkwise.length(x.shape[-2], False, chunk))

    def grouped(self, v, sharing=None):
        """(..., H, rows, columns) as (groups, heads of each, rows, columns); `sharing` = 1 for what groups have, (..., G, rows, columns)."""
        return v.reshape(math.prod(self.groups), self.sharing if sharing is None else sharing, *v.shape[-2:])

    def read(self, D=None, z=None, dtype=None):
        x, D = (None, None) if D is None else (self.grouped(self.x), self.by_group(D))
        z = None if z is None else self.grouped(self.xp.broadcast_to(z, self.x.shape))
        return self.memory.read(x=x, D=D, z=z, dtype=dtype).reshape(self.x.shape)

    def by_group(self, D):
        """A number of each head, (H), as (groups, heads of each)."""
        return self.xp.broadcast_to(D, self.heads).reshape(math.prod(self.groups), self.sharing)

    @property
    def xp(self):
        return self.steps.xp

    def result(self, return_state):
        y, last = self.read(self.D, self.z, self.steps.operand), self.memory.last
        return (y, last.reshape(*self.heads, *last.shape[2:])) if return_state else y

    def vjp(self, dy, dstate):
        steps, heads, xp, shape = self.steps, self.heads, self.xp, self.x.shape
        z = None if self.z is None else cast(self.z, steps.wide)
        dp = self.grouped(steps.store(xp.broadcast_to(dy if z is None else cast(dy, steps.wide) * silu(z), shape)))
        dlast = None if dstate is None else self.grouped(xp.broadcast_to(dstate, (*heads, *self.memory.last.shape[2:])))
        g, x = self.memory.vjp(dp, dlast), self.grouped(self.x)
        r = g.w.reshape(shape[:-1])
        d_raw = self.A[:, None] * r + steps.dots(g.v, x).reshape(shape[:-1])
        d_raw = _of_raw(d_raw, self.raw, self.unclipped, self.dt_softplus, self.dt_limit)
        skipped = {} if self.D is None else {"x": dp, "D": self.by_group(self.D)}
        gradient = {
            "x": steps.finish(None, g.v, self.grouped(self.dt[..., None]), **skipped).reshape(shape),
            "dt": d_raw,
            "A": (self.dt * r).sum(axis=-1),
            "B": g.k.reshape(*self.groups, *g.k.shape[2:]),
            "C": g.q.reshape(*self.groups, *g.q.shape[2:]),
            "D": steps.dots(dp, x).sum(axis=-1).reshape(heads),
            "dt_bias": d_raw.sum(axis=-1),
            "state": g.state.reshape(*heads, *g.state.shape[2:]),
        }
        return gradient if z is None else gradient | {"z": cast(dy, steps.wide) * self.read(self.D) * silu_derivative(z)}


def _flat(x, dt, A, B, C, S):
    """C for queries, B for keys, dt x for values; heads of a group share B and C."""
    heads, groups = x.shape[:-2], B.shape[:-2]
    log_decay = flat(dt * A[:, None], heads, 1)
    return (flat(C, groups, 2), flat(B, groups, 2), flat(dt[..., None] * x, heads, 2), log_decay), flat(cp.asarray(S), heads, 2)
