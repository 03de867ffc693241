"""Routing on the device: a warp for each token."""

import cupy as cp
import numpy as np
from refimpl.gpu import mirror
from refimpl.gpu.launch import Kernel, shared_memory
from refimpl.gpu.precision import widened

from refimpl.core.numerics import sigmoid, softmax
from refimpl.ops.experts.choice import ORDERS
from refimpl.ops.experts.route import CONTRACT

_KERNELS = {x: Kernel("kernel_route.cu", f"route<{c}>") for x, c in (("float32", "float"), ("float64", "double"))}
KERNELS = tuple(_KERNELS.values())


@mirror.form(CONTRACT)
def route(logits, k, *, order="topk_softmax", renormalize=False, noise=None, rng=None):
    """The k experts of every token and their weights, of CuPy arrays; arguments and results as `refimpl.route`.

    Notes
    -----
    Noise is drawn on the host by NumPy's generator, so that a seed means the same everywhere, and copied to the device.

    Raises
    ------
    NotImplementedError
        For more than some 28000 experts (float64), whose logits do not fit into shared memory.
    """
    return choose(_noisy(*widened(logits), noise, rng), k, order, renormalize)


def choose(logits, k, order, renormalize):
    """`route` without noise, of float32 or float64."""
    *rows, E = logits.shape
    weights, experts = cp.empty((*rows, k), logits.dtype), cp.empty((*rows, k), np.int64)
    need, room = (E + k) * logits.itemsize, shared_memory() - 1024
    if need > room:
        raise NotImplementedError(
            f"route: at most {room // logits.itemsize} experts and choices of a token fit into a block, got {E} + {k}"
        )
    warps = max(1, min(4, room // need))
    count = weights.size // k
    sizes = (np.int64(count), np.int32(E), np.int32(k), np.int32(ORDERS.index(order)), np.int32(bool(renormalize)))
    arguments = (cp.ascontiguousarray(logits), weights, experts, *sizes)
    _KERNELS[logits.dtype.name]((-(-count // warps),), (32 * warps,), arguments, warps * need)
    return weights, experts


@mirror.gradient(CONTRACT)
def route_vjp(dy, logits, k, *, order="topk_softmax", renormalize=False, noise=None, rng=None):
    """Gradient of `route` on CuPy arrays, as `refimpl.route_vjp`."""
    (dw,) = widened(dy[0] if isinstance(dy, tuple) else dy)
    logits = _noisy(*widened(logits), noise, rng)
    return {"logits": choice_vjp(dw, logits, *choose(logits, k, order, renormalize), order, renormalize)}


def choice_vjp(dw, logits, weights, experts, order, renormalize):
    """Through the weights, the experts held fast."""
    pull = weights * dw
    total = pull.sum(axis=-1, keepdims=True)
    if order == "softmax_topk" and not renormalize:
        return _spread(pull, experts, logits) - softmax(logits) * total
    if order != "sigmoid":
        return _spread(pull - weights * total, experts, logits)
    chosen = cp.take_along_axis(logits, experts, axis=-1)
    return _spread(sigmoid(-chosen) * (pull - weights * total if renormalize else pull), experts, logits)


def _spread(values, experts, like):
    """The values at their experts, 0 elsewhere."""
    full, k = cp.zeros(like.shape, values.dtype), values.shape[-1]
    rows = cp.arange(values.size // k)[:, None]
    full.reshape(-1, like.shape[-1])[rows, experts.reshape(-1, k)] = values.reshape(-1, k)
    return full


def _noisy(logits, noise, rng):
    if noise is None:
        return logits
    return logits + noise * cp.asarray(np.random.default_rng(rng).standard_normal(logits.shape).astype(logits.dtype))
