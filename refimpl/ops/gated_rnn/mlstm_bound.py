"""How wrong a right mLSTM may be: the running error analysis behind ``mlstm.error_bound``.

Let h = N / D be (4) of `mlstm`, and w_tj = exp(A_tj - m_t) the weight of step j at time t. What any legal order of the
operations does to a weight:

    ΔA_tj <= u (|b_0| + ... + |b_t|) + u (|b_0| + ... + |b_j|)       differences of running sums b_t = log f_0 + ... + log f_t
           + u Σ_{j<s<=t} (|m_{s-1}| + 2 |log f_s| + |a_s - m_s| + 4)   step by step: a_s = m_{s-1} + log f_s, one exp, one product
           + 4 u (|A_tj| + |A_tj - m_t| + |ĩ_j|)                       the last sums, and a gate a few units off         (1)

m itself costs nothing in h: any m, if used throughout, gives the same h. With γ_d = 6 √d u for dot products of d terms
(worst cases grow like d, right programs like √d [1, section 3.1]), the same for the sum over j, 12 u for what is left, and
6 v for operands, weights and states kept in halves of unit roundoff v, the relative error of a term of N is

    δ_tj = e^ΔA_tj - 1 + γ_d + γ_t + 12 u + 6 v                                                                        (2)

    |ΔN_t| <= Σ_j w_tj δ_tj (|q_t|·|k_j|) |v_j|,        |Δ(n·q)| the same without v,        Δe^-m <= 4 u e^-m             (3)

    |Δh| <= (|ΔN| + |h| |ΔD|) / (D - |ΔD|) + 4 u |h|                                                                   (4)

where ΔD is that of whichever argument of the maximum may be the larger one. In the state, ΔA of the largest exponent
counts as well: it is the error of m, and C and n are relative to e^m. Everything is linear in u but e^ΔA: it is enough.

References
    [1] N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM, 2002, sections 2.8, 3.1 and 3.3.
"""

import numpy as np

from refimpl.core.numerics import constant, finite_or_zero, gate_exponents, sqrt_of


def bound(q, k, v, i, F, C, n, m, h, lower, *, eps, unit, store):
    """(E, (error of C, of n, of m)) for prepared arguments: keys scaled, F = log f, batch axes of one shape, T > 0.

    h is the exact result, `lower` maps m to e^-m. The initial state is treated as step -1, with m_{-1} for its ĩ.
    """
    T, d = q.shape[-2:]
    gates = np.concatenate([m[..., None], i], axis=-1)  # (..., H, T + 1)
    log_f = np.concatenate([np.zeros_like(m)[..., None], F], axis=-1)
    A = gate_exponents(log_f, gates)[..., 1:, :]  # (..., H, T, T + 1)
    row_max = A.max(axis=-1)  # m_t
    away = A - finite_or_zero(row_max)[..., None]
    weight = np.exp(away)

    running = np.cumsum(_size(np.cumsum(log_f, axis=-1)), axis=-1)
    before = np.concatenate([m[..., None], row_max[..., :-1]], axis=-1)
    step = _size(before) + 2 * _size(F) + _size(before + F - finite_or_zero(row_max)) + 4
    steps = np.concatenate([np.zeros_like(m)[..., None], np.cumsum(step, axis=-1)], axis=-1)
    exponent = running[..., 1:, None] + running[..., None, :] + np.maximum(steps[..., 1:, None] - steps[..., None, :], 0)  # (1) / u
    exponent = exponent + 4 * (_size(A) + _size(away) + _size(gates)[..., None, :])
    dots = 6 * sqrt_of(d, q) + 6 * np.sqrt(np.arange(1, T + 1, dtype=q.dtype))[:, None] + 12
    error = np.where(weight > 0, weight * (np.expm1(np.minimum(unit * exponent, 1)) + unit * dots + 6 * store), 0)  # w δ, (2)

    match = abs(q) @ np.swapaxes(abs(k), -1, -2)  # (..., H, T, T)
    error_N = (error[..., 1:] * match) @ abs(v) + error[..., :1] * (abs(q) @ abs(C))  # (..., H, T, e)
    error_s = (error[..., 1:] * match).sum(axis=-1) + error[..., 0] * (abs(q) @ abs(n)[..., None])[..., 0]  # (..., H, T)
    s = (weight[..., 1:] * (q @ np.swapaxes(k, -1, -2))).sum(axis=-1) + weight[..., 0] * (q @ n[..., None])[..., 0]
    floor = np.minimum(lower(row_max), np.finfo(q.dtype).max / 4)
    maybe_s, maybe_floor = abs(s) + error_s >= floor * (1 - 4 * unit), abs(s) - error_s <= floor * (1 + 4 * unit)
    error_D = np.maximum(np.where(maybe_s, error_s, 0), np.where(maybe_floor, 4 * unit * floor, 0))
    D = np.maximum(np.maximum(abs(s) - error_s, floor * (1 - 4 * unit)), np.finfo(q.dtype).tiny) + constant(eps, q)
    with np.errstate(over="ignore"):  # where n·q may be 0 and nothing holds it away from there, no digit is certain
        E = error_N / D[..., None] + abs(h) * np.minimum(error_D / D + 4 * unit, np.finfo(q.dtype).max)[..., None]  # (4)

    near = away[..., -1, :] > -1
    error_m = unit * np.where(near, exponent[..., -1, :] + 1, 0).max(axis=-1)
    last = error[..., -1, :] + weight[..., -1, :] * np.expm1(np.minimum(error_m, 1))[..., None]  # (..., H, T + 1)
    kept = last[..., 1:, None] * abs(k)  # (..., H, T, d)
    error_C = np.swapaxes(kept, -1, -2) @ abs(v) + last[..., :1, None] * abs(C)
    return E, (error_C, kept.sum(axis=-2) + last[..., :1] * abs(n), error_m)


def _size(x):
    return np.where(np.isfinite(x), abs(x), 0)
