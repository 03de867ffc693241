"""What is left of a step, channel by channel, when another one reads it: what the chunkwise forms of wkv6 and wkv7 share.

The memory before step t, of L steps that start with a memory S: what step j < t wrote has faded by the log-decays of the steps
in between, j + 1 ... t - 1, and S by those of all steps before t.
"""

import numpy as np

from refimpl.core.numerics import gate_exponents, times_exp


def fading(w):
    """Log-decays of L steps, as seen before step t = 0 ... L; t = L is the end.

    Parameters
    ----------
    w : ndarray, shape (..., L, d)

    Returns
    -------
    A : ndarray, shape (..., d, L + 1, L)
        w_{j+1} + ... + w_{t-1} at [t, j], -∞ for j >= t. Sums, not differences: a decay of 0 is no hindrance.
    since : ndarray, shape (..., L + 1, d)
        e^(w_0 + ... + w_{t-1} - peak).
    peak : ndarray, shape (..., d)
        The largest of those sums, 0 for decays: it goes to S (`times_exp`), where it does not overflow unless S itself does.
    """
    g = np.swapaxes(w, -1, -2)  # (..., d, L)
    after = gate_exponents(g, np.zeros_like(g))  # (..., d, L, L)
    A = np.concatenate([np.full_like(after[..., :1, :], -np.inf), after], axis=-2)
    sums = np.cumsum(np.concatenate([np.zeros_like(w[..., :1, :]), w], axis=-2), axis=-2)  # (..., L + 1, d)
    peak = np.where(np.isfinite(sums), sums, np.zeros_like(sums)).max(axis=-2)
    return A, np.exp(sums - peak[..., None, :]), peak


def matched(q, k, A, *, own):
    """Σ_i q_ti k_ji e^A_tj at [t, j], of the steps j < t, or with `own` j <= t: (..., L, L). `A` has the rows of q."""
    pairs = sum(times_exp(q[..., :, None, i] * k[..., None, :, i], A[..., i, :, :]) for i in range(q.shape[-1]))
    return np.tril(pairs, 0 if own else -1)


def kept(k, A):
    """k_j times what is left of it at the end: (..., L, d)."""
    return times_exp(k, np.swapaxes(A[..., -1, :], -1, -2))


def hidden(match, *, own):
    """0 for pairs of steps that see each other, -∞ for the others: what `masked_matmul` asks for."""
    seen = np.tril(np.ones(match.shape[-2:]), 0 if own else -1) > 0
    return np.where(seen, np.zeros(()), np.full((), -np.inf))


def chunks(x, L):
    """(..., T, f) as (..., T/L, L, f); the steps after the end are zeros, which write nothing and forget nothing."""
    pad = np.zeros_like(x, shape=(*x.shape[:-2], -x.shape[-2] % L, x.shape[-1]))
    return np.concatenate([x, pad], axis=-2).reshape(*x.shape[:-2], -1, L, x.shape[-1])


def aligned(state, *arrays):
    """Arrays of one batch shape, (..., H, T, f) each, and a state (..., H, d, e), zeros if there is none; d, e of the first and third."""
    batch = np.broadcast_shapes(*(x.shape[:-3] for x in (*arrays, *(() if state is None else (state,)))))
    arrays = tuple(np.broadcast_to(x, (*batch, *x.shape[-3:])) for x in arrays)
    if state is None:
        first, third = arrays[0], arrays[2]
        state = np.zeros_like(first, shape=(*first.shape[:-2], first.shape[-1], third.shape[-1]))
    return *arrays, np.broadcast_to(state, (*batch, *state.shape[-3:]))
