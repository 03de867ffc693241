"""What the chapters on experts share: a choice of k, its way back into an array, logits whose order no rounding changes."""

import numpy as np

from refimpl.core.options import one_of

ORDERS = ("topk_softmax", "softmax_topk", "sigmoid")


def check_choice(operator: str, k, experts: int, order: str) -> None:
    """Raise ValueError unless k of so many experts can be chosen, in an order that there is."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= experts:
        raise ValueError(f"{operator}: k must be an integer from 1 to the number of experts, {experts}, got {k!r}")
    one_of(operator, "order", order, ORDERS)


def spread(values, experts, like):
    """An array like `like`, (..., T, E), with the values (..., T, k) at the experts, 0 elsewhere."""
    full, every = np.zeros_like(like), np.arange(like.shape[-1])
    for j in range(experts.shape[-1]):
        full = full + np.where(every == experts[..., j, None], values[..., j, None], np.zeros_like(like))
    return full


def decided_logits(rng, shape):
    """Logits whose order no rounding changes: in every row distinct multiples of 1/16, which bfloat16 holds."""
    rising = np.cumsum(rng.integers(1, 5, shape), axis=-1)
    middle = rising[..., -1:] // 2 - rng.integers(-16, 17, (*shape[:-1], 1)) if shape[-1] else 0
    return rng.permuted((rising - middle) / 16, axis=-1)
