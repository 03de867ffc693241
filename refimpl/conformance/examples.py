"""A wrong attention, to show what a failure looks like.

It is what many write first: the causal mask is drawn from the corner at the start, so it is right as long as there are as
many queries as keys, and wrong from the first token that is decoded with a cache.
"""

import numpy as np


def wrong_attention(q, k, v, *, causal=False, scale=None):
    """softmax(q kᵀ) v, with the mask's corner at the wrong end."""
    scale = 1 / np.sqrt(q.shape[-1]) if scale is None else scale
    groups = q.shape[-3] // k.shape[-3] if q.ndim > 2 else 1
    if groups > 1:
        k, v = np.repeat(k, groups, axis=-3), np.repeat(v, groups, axis=-3)
    s = q @ k.swapaxes(-1, -2) * q.dtype.type(scale)
    if causal:
        allowed = np.tril(np.ones(s.shape[-2:], dtype=bool))  # should be np.tril(..., m - n): the ends stand together
        s = np.where(allowed, s, -np.inf)
    if s.shape[-1] == 0:
        return s @ v
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True) @ v
