"""Mixture of experts on the device: pairs sorted by expert, products of blocks of rows by cuBLAS, no word to the host."""

import math

import cupy as cp
import numpy as np
from refimpl.gpu import mirror
from refimpl.gpu.experts.route import KERNELS as _ROUTE
from refimpl.gpu.experts.route import choice_vjp, choose
from refimpl.gpu.grouped import KERNELS as _GROUPED
from refimpl.gpu.grouped import Groups, places
from refimpl.gpu.precision import widened

from refimpl.core.dtypes import HALF
from refimpl.ops.experts.moe import ACTIVATIONS, CONTRACT

KERNELS = (*_ROUTE, *_GROUPED)


@mirror.form(CONTRACT)
def moe(
    x, router, w_in, w_out, w_gate=None, *, k, activation="silu", order="topk_softmax", renormalize=False, capacity=None, return_stats=False
):
    """Mixture of experts on CuPy arrays; arguments and results as `refimpl.moe`.

    Notes
    -----
    Halves: logits and weights in float32, products of halves summed in float32, activations rounded to the half. Groups are
    filled up to blocks of 16 to 256 rows, so that no length needs to be known on the host: the products are at most
    1 + experts·block/pairs times what is needed.
    """
    if not x.size:
        stats = cp.zeros((*x.shape[:-2], router.shape[1]), np.int64), cp.zeros(x.shape[:-2], np.int64)
        return (cp.zeros_like(x), *stats) if return_stats else cp.zeros_like(x)
    call = _Call(x, router, k, order, renormalize, capacity)
    rows = call.groups.take(call.x)
    h, *_ = _hidden(call.groups, rows, *_contiguous(w_in, w_gate), activation)
    results = call.groups.product(h, *_contiguous(w_out), dtype=call.weights.dtype)
    y = call.back(results * call.weight_of_slot[:, None]).reshape(x.shape)
    return (y, call.tokens, call.dropped) if return_stats else y


@mirror.gradient(CONTRACT)
def moe_vjp(
    dy,
    x,
    router,
    w_in,
    w_out,
    w_gate=None,
    *,
    k,
    activation="silu",
    order="topk_softmax",
    renormalize=False,
    capacity=None,
    return_stats=False,
):
    """Gradient of `moe` on CuPy arrays, as `refimpl.moe_vjp`; halves in float32 throughout."""
    dy = dy[0] if isinstance(dy, tuple) else dy
    shape = x.shape
    if not x.size:
        arrays = {"x": x, "router": router, "w_in": w_in, "w_out": w_out, "w_gate": w_gate}
        return {name: None if v is None else cp.zeros_like(v) for name, v in arrays.items()}
    dy, x, router, w_in, w_out, w_gate = widened(dy, x, router, w_in, w_out, w_gate)
    w_in, w_out, w_gate = _contiguous(w_in, w_out, w_gate)
    call = _Call(x, router, k, order, renormalize, capacity)
    groups, rows, dy = call.groups, call.groups.take(call.x), call.groups.take(dy.reshape(call.x.shape))
    h, a, g = _hidden(groups, rows, w_in, w_gate, activation)
    act, slope = ACTIVATIONS[activation]
    do = dy * call.weight_of_slot[:, None]
    dw_slot = (groups.product(h, w_out) * dy).sum(axis=-1)
    dweights = cp.concatenate([dw_slot, cp.zeros_like(dw_slot[:1])])[groups.slot].reshape(call.weights.shape)
    dh = groups.product(do, w_out, transposed=True)
    gradients = {"w_out": groups.outer(h, do), "w_gate": None}
    if w_gate is None:
        da = dh * slope(a)
        drows = groups.product(da, w_in, transposed=True)
    else:
        da, dg = dh * act(g), dh * a * slope(g)
        drows = groups.product(da, w_in, transposed=True) + groups.product(dg, w_gate, transposed=True)
        gradients["w_gate"] = groups.outer(rows, dg)
    gradients["w_in"] = groups.outer(rows, da)
    dlogits = choice_vjp(dweights, call.logits, call.weights, call.experts, order, renormalize)
    dx = call.back(drows) + dlogits @ router.T
    return gradients | {"x": dx.reshape(shape), "router": call.x.T @ dlogits}


class _Call:
    """Who goes where: tokens (batch·T, d), their weights and experts (batch·T, k), and the pairs by expert."""

    def __init__(self, x, router, k, order, renormalize, capacity):
        *batch, T, d = x.shape
        self.E, self.k, self.x = router.shape[1], k, cp.ascontiguousarray(x).reshape(math.prod(batch) * T, d)
        self.logits = _matmul(*widened(self.x, router))
        self.weights, self.experts = choose(self.logits, k, order, renormalize)
        entries = math.prod(batch)
        self.tokens, kept = _queues(self.experts.reshape(entries, T * k), capacity, self.E)
        self.dropped = (T * k - self.tokens.sum(axis=-1)).reshape(batch)
        self.tokens = self.tokens.reshape(*batch, self.E)
        group = self.experts.reshape(-1) if kept is None else cp.where(kept.reshape(-1), self.experts.reshape(-1), self.E)
        self.groups = Groups.of(group, self.E)
        source = self.groups.source
        self.weight_of_slot = cp.where(source >= 0, self.weights.reshape(-1)[cp.maximum(source, 0)], cp.zeros((), self.weights.dtype))
        self.groups = self.groups._replace(source=cp.where(source >= 0, source // k, -1))  # from now on tokens, not pairs

    def back(self, results):
        """What the slots hold, summed over each token's pairs in the order of their weights."""
        results = cp.concatenate([results, cp.zeros_like(results[:1])])
        slots = self.groups.slot.reshape(-1, self.k)
        y = results[slots[:, 0]]
        for j in range(1, self.k):
            y = y + results[slots[:, j]]
        return y


def _queues(experts, capacity, E):
    """Tokens that each expert takes, (batch, E), and which pairs are kept, (batch, T·k); None for all."""
    place, tokens = places(experts, E)
    return (tokens, None) if capacity is None else (cp.minimum(tokens, capacity), place < capacity)


def _hidden(groups, rows, w_in, w_gate, activation):
    """h of every slot, and what went into it: x W_in, x W_gate."""
    act = ACTIVATIONS[activation][0]
    a = groups.product(rows, w_in)
    g = a if w_gate is None else groups.product(rows, w_gate)
    if a.dtype.name in HALF:
        wide_a, wide_g = a.astype(np.float32), g.astype(np.float32)
        return (act(wide_g) if w_gate is None else act(wide_g) * wide_a).astype(a.dtype), a, g
    return (act(g) if w_gate is None else act(g) * a), a, g


def _contiguous(*arrays):
    return tuple(x if x is None else cp.ascontiguousarray(x) for x in arrays)


def _matmul(a, b):
    return a @ b if a.shape[1] else cp.zeros((a.shape[0], b.shape[1]), a.dtype)
