"""What attention's relatives share: weights from scores, their gradient, and how wrong a weighted mean may be.

    p_ij = e^{s_ij} / Σ_j e^{s_ij},    o_i = Σ_j p_ij v_j,    s_ij = -∞ where a pair is not allowed                (1)

Not a chapter: `attention` tells the story. A row with nothing allowed has p = 0 and o = 0.

The error of (1): with scores known to within δ_ij, weights err by factors within e^±δ, and the mean of v moves by at most

    |Δo_i| <= Σ_j p_ij (e^δ_ij - 1) (|v_j| + |o_i|) / Σ_j p_ij e^-δ_ij                                          (2)

δ includes the score's distance to the row's maximum, u (2 |s| + 2 |top|), and the exponential, 32 u (fast ones err by 20 u).
Sums of K terms, in any order, add u min(K, 6 √K) of what they sum: K at worst, √K with overwhelming probability.

References
    N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM, 2002, sections 3.1 and 4.2.
    I. C. F. Ipsen, H. Zhou, "Probabilistic error analysis for inner products", SIAM J. Matrix Anal. Appl. 41(4), 2020.
"""

import numpy as np

from refimpl.core.numerics import finite_or_zero, masked_matmul


def weights(s):
    """p of (1), along the last axis."""
    e = np.exp(s - finite_or_zero(np.max(s, axis=-1, keepdims=True, initial=-np.inf)))
    total = e.sum(axis=-1, keepdims=True)
    return e / np.where(total == 0, np.ones_like(total), total)


def weights_vjp(p, dp, s):
    """ds from dp: (1) gives ∂p_ij/∂s_ik = p_ij (1[j = k] - p_ik); a pair that is not allowed has none.

    The mean of dp is taken off twice: where one weight is nearly 1, the first time leaves its own dp as a small number, and
    what the light keys add to the mean is not lost beside it.
    """
    dp = np.where(np.isneginf(s), np.zeros_like(dp), dp)
    dp = dp - (p * dp).sum(axis=-1, keepdims=True)
    return p * (dp - (p * dp).sum(axis=-1, keepdims=True))


def growth(K):
    """Roundings that a sum of K terms can show."""
    return np.minimum(K, 6 * np.sqrt(K))


def mean_error(s, p, v, delta, *, unit, store):
    """(2) and the sum's own rounding; `delta` (..., n, m) is the error of the scores before (1)."""
    hidden = np.isneginf(s)
    top = abs(finite_or_zero(np.max(s, axis=-1, keepdims=True, initial=-np.inf)))
    delta = delta + unit * (2 * abs(s) + 2 * top + 32)
    delta = np.where(hidden, np.zeros_like(s), np.minimum(delta, 50))  # nothing is known of a weight that is off by e^50
    o, mean = abs(masked_matmul(p, v, s)), masked_matmul(p, abs(v), s)
    moved = p * np.expm1(delta)
    least = (p * np.exp(-delta)).sum(axis=-1, keepdims=True)
    least = np.where(least == 0, np.ones_like(least), least)
    K = (~hidden).sum(axis=-1, keepdims=True)
    smallest = (2.0**-126 if unit > 2.0**-50 else 2.0**-1022) + store * 2.0**-14
    lost = smallest * masked_matmul(np.where(hidden, np.zeros_like(s), np.ones_like(s)), abs(v) + 1, s)
    E = (masked_matmul(moved, abs(v), s) + o * moved.sum(axis=-1, keepdims=True)) / least
    return E + unit * (growth(K) + 4) * (mean + o) + store * mean + lost
