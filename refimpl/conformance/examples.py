"""A wrong attention, to show what a failure looks like.

Its mistake is in one line, which tiles where it should repeat. With as many key heads as query heads, or with one, both are
the same; with two key heads and four query heads, half of the heads read the wrong keys, and all numbers look fine.
"""

import numpy as np


def wrong_attention(q, k, v, *, causal=False, scale=None):
    """softmax(q kᵀ) v, with grouped heads dealt out in the wrong order."""
    if q.ndim > 2:
        groups = q.shape[-3] // k.shape[-3]
        k, v = (np.concatenate([x] * groups, axis=-3) for x in (k, v))  # np.repeat(x, groups, axis=-3) is right
    n, m = q.shape[-2], k.shape[-2]
    s = q @ k.swapaxes(-1, -2) * q.dtype.type(1 / np.sqrt(q.shape[-1]) if scale is None else scale)
    allowed = np.tri(n, m, m - n if causal else m, dtype=bool)
    p = np.where(allowed, np.exp(s - s.max(axis=-1, keepdims=True, where=allowed, initial=-np.inf)), 0)
    total = p.sum(axis=-1, keepdims=True)
    return p / np.where(total == 0, 1, total) @ v
