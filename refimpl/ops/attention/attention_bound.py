"""How wrong a right softmax attention may be: the error analysis behind ``attention.error_bound``.

With s, p, o, lse as in `attention`, u the unit roundoff, v that of half-precision intermediates, and K the number of keys
that a row sees. Sums of K terms cost γ_K = min(K, 6 √K) roundings in any order: K at worst [1, section 3.1], √K with
overwhelming probability [2]. First a score, with each step's error carried through the next:

    δ_ij = u (γ_d + 4) |scale| |q_i|·|k_j|           the product, in any order, scaled before or after
         + v (2 min(|scale| |q_i|·|k_j|, 4 |scale| √Σ q²k²) + |s|)     q and k rounded after scaling, the score when kept
    δ_ij <- (1 - tanh²) δ_ij + (8 u + v) |s|         softcap: its slope where it is largest within δ, and its rounding
    δ_ij <- δ_ij + (2 u + v) |s| + 2 u |bias|        bias
    δ_ij <- δ_ij + u (2 |s| + 2 |top| + 32)          distance to the maximum, in base e or 2; fast exponentials err by 20 u (1)

So large scores are what costs. Weights in error by factors within e^±δ move the mean of values by

    |Δo_i| <= Σ_j p_ij (e^δ_ij - 1) (|v_j| + |o_i|) / Σ_j p_ij e^-δ_ij                                                    (2)

since Σ p x v / (1 + Σ p x) - o Σ p x / (1 + Σ p x) is that change for any relative errors x. The sink is a key with v = 0.
Summing adds u (γ_K + 4) (Σ p |v| + |o|), weights kept in halves v Σ p |v|, underflow the smallest number per key; and

    |Δlse_i| <= log(1 + Σ_j p_ij (e^δ_ij - 1)) + u (γ_K + 8 + 4 (|top| + |lse| + log K))                                  (3)

References
    [1] N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM, 2002, sections 3.1 and 4.2.
    [2] I. C. F. Ipsen, H. Zhou, "Probabilistic error analysis for inner products", SIAM J. Matrix Anal. Appl. 41(4), 2020.
"""

import numpy as np

from refimpl.core.numerics import finite_or_zero, masked_matmul, tanh_derivative


def bound(q, k, v, raw, s, p, lse, sink, p_sink, scale, softcap, bias, *, unit, store):
    """(2) and (3), shapes (..., n, e) and (..., n, 1), from the chapter's arrays: `raw` are the scaled products before (1)."""
    hidden = np.isneginf(s)
    o = abs(masked_matmul(p, v, s))
    top = abs(finite_or_zero(np.maximum(np.max(s, axis=-1, keepdims=True, initial=-np.inf), sink)))  # (..., n, 1)
    size, spread = abs(scale) * (abs(q) @ abs(k).mT), abs(scale) * np.sqrt(q**2 @ (k**2).mT)  # (..., n, m)
    delta = unit * (_growth(q.shape[-1]) + 4) * size + store * (2 * np.minimum(size, 4 * spread) + abs(raw))
    if softcap is not None:
        flattest = np.maximum(abs(raw) - delta, np.zeros_like(raw)) / softcap
        delta = tanh_derivative(flattest) * delta + (8 * unit + store) * abs(softcap * np.tanh(raw / softcap))
    if bias is not None:
        delta = delta + (2 * unit + store) * abs(s) + 2 * unit * abs(bias)
    delta = np.where(hidden, np.zeros_like(s), _within_range(delta + unit * (2 * abs(s) + 2 * top + 32)))
    delta_sink = _within_range(unit * (2 * abs(finite_or_zero(sink)) + 2 * top + 32))

    moved, moved_sink = p * np.expm1(delta), p_sink * np.expm1(delta_sink)
    all_moved = moved.sum(axis=-1, keepdims=True) + moved_sink
    least = (p * np.exp(-delta)).sum(axis=-1, keepdims=True) + p_sink * np.exp(-delta_sink)
    least = np.where(least == 0, np.ones_like(least), least)
    K = (~hidden).sum(axis=-1, keepdims=True) + 1
    mean = masked_matmul(p, abs(v), s)
    smallest = (2.0**-126 if unit > 2.0**-50 else 2.0**-1022) + store * 2.0**-14
    lost = smallest * masked_matmul(np.where(hidden, np.zeros_like(s), np.ones_like(s)), abs(v) + 1, s)
    E = (masked_matmul(moved, abs(v), s) + o * all_moved) / least + unit * (_growth(K) + 4) * (mean + o) + store * mean + lost
    E_lse = np.log1p(all_moved) + unit * (_growth(K) + 8 + 4 * (top + abs(finite_or_zero(lse)) + np.log(K)))
    return E, np.where(np.isneginf(lse), np.zeros_like(E_lse), E_lse)


def _growth(K):
    return np.minimum(K, 6 * np.sqrt(K))


def _within_range(delta):
    """Nothing is known of a weight that is off by e^50; e^δ must not overflow."""
    return np.minimum(delta, 50)
