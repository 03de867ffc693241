"""Mixture of experts on the device: pairs sorted by expert, products of each expert's rows, no word to the host."""

import math

import cupy as cp
import numpy as np
from refimpl.gpu import mirror
from refimpl.gpu.experts.route import KERNELS as _ROUTE
from refimpl.gpu.experts.route import choice_vjp, choose
from refimpl.gpu.grouped import KERNELS as _GROUPED
from refimpl.gpu.grouped import Groups, packed, product_of_halves, tensor_cores_fit
from refimpl.gpu.precision import widened

from refimpl.core.dtypes import HALF
from refimpl.ops.experts.moe import CONTRACT

KERNELS = (*_ROUTE, *_GROUPED)


@mirror.form(CONTRACT)
def moe(
    x, router, w_in, w_out, w_gate=None, *, k, activation="silu", order="topk_softmax", renormalize=False, capacity=None, return_stats=False
):
    """Mixture of experts on CuPy arrays; arguments and results as `refimpl.moe`.

    Notes
    -----
    Halves: logits and weights in float32; products of halves summed in float32; h and the experts' results rounded to the half.
    Sums are in a fixed order. Halves on Hopper, with d and f multiples of 8, run in a kernel that makes h of both products at once;
    others in cuBLAS. Experts' rows are filled up to blocks of 16 to 256 rows, so that no length needs to be known on the
    host: memory is for 1 + experts·block/pairs times the rows that are needed.
    """
    if not x.size:
        stats = cp.zeros((*x.shape[:-2], router.shape[1]), np.int64), cp.zeros(x.shape[:-2], np.int64)
        return (cp.zeros_like(x), *stats) if return_stats else cp.zeros_like(x)
    call = _Call(x, router, w_in, k, order, renormalize, capacity)
    h = call.groups.hidden(call.groups.take(call.x), packed(w_in), packed(w_gate), activation)
    results = call.groups.product(h, packed(w_out))
    y = call.groups.back(results, call.weights).reshape(x.shape)
    return (y, *call.stats()) if return_stats else y


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
    """Gradient of `moe` on CuPy arrays, as `refimpl.moe_vjp`.

    Halves that fit Hopper's tensor cores: what is multiplied is rounded to the half, sums are float32. Others in float32 throughout.
    """
    dy = dy[0] if isinstance(dy, tuple) else dy
    if not x.size:
        arrays = {"x": x, "router": router, "w_in": w_in, "w_out": w_out, "w_gate": w_gate}
        return {name: None if v is None else cp.zeros_like(v) for name, v in arrays.items()}
    if dy.dtype != x.dtype or not tensor_cores_fit(x, w_in):
        dy, x, router, w_in, w_out, w_gate = widened(dy, x, router, w_in, w_out, w_gate)
    w_in, w_out, w_gate = packed(w_in), packed(w_out), packed(w_gate)
    call = _Call(x, router, w_in, k, order, renormalize, capacity)
    groups, rows = call.groups, call.groups.take(call.x)
    dy = groups.take(packed(dy).reshape(call.x.shape))
    a, g = groups.product(rows, w_in), None if w_gate is None else groups.product(rows, w_gate)
    dh = groups.product_transposed(dy, w_out)  # of weights 1
    dweights = groups.activate_backwards(a, g, dh, call.weights, activation)
    weighted, da, dg = dh, a, g
    gradients = {
        "w_out": groups.outer(weighted, dy),
        "w_in": groups.outer(rows, da),
        "w_gate": None if g is None else groups.outer(rows, dg),
    }
    drows = groups.product_transposed(da, w_in) if g is None else groups.product_transposed(da, w_in, dg, w_gate)
    dlogits = choice_vjp(dweights, call.logits, call.weights, call.experts, order, renormalize)
    (router, flat) = widened(router, call.x)
    dx = groups.back(drows, dtype=dlogits.dtype) + dlogits @ router.T
    return gradients | {"x": dx.reshape(x.shape), "router": flat.T @ dlogits}


class _Call:
    """Who goes where: tokens (batch·T, d), their weights and experts (batch·T, k), and the pairs by expert."""

    def __init__(self, x, router, w_in, k, order, renormalize, capacity):
        *self.batch, T, d = x.shape
        entries = math.prod(self.batch)
        self.x = packed(x).reshape(entries * T, d)
        self.logits = product_of_halves(self.x, packed(router)) if x.dtype.name in HALF else self.x @ router
        self.weights, self.experts = choose(self.logits, k, order, renormalize)
        choice = self.experts.reshape(entries, T, k)
        self.groups, self.tokens = Groups.of(choice, router.shape[1], capacity, tensor_cores_fit(x, w_in))

    def stats(self):
        """Tokens that each expert takes, and pairs that are dropped, of every entry of the batch."""
        pairs = self.experts.size // max(1, len(self.tokens))
        return self.tokens.reshape(*self.batch, -1), (pairs - self.tokens.sum(axis=-1)).reshape(self.batch)
