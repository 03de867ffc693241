"""How wrong a right WKV may be: the running error analysis behind ``wkv.error_bound``.

Let A_tj = k_j - (t-1-j) w be the exponent of step j when step t is read, the initial state counting as step -1, A_tt = u + k_t,
and M_t = max(m, u + k_t) the largest one. What any legal order of the operations does to an exponent:

    ΔA_tj <= u Σ_{j<s<t} (|m_s| + 2 |w| + |m_{s-1} - w - m_s| + 4)          step by step, (3) of `wkv`: two differences, exp, product
           + u (t √t + j √j) |w|                                         multiples of w, or running sums of w, and their differences
           + 4 u (|A_tj| + |A_tj - M_t| + |k_j| + |M_t - m|)             the last sums, and runs joined in a tree            (1)

A constant added to all exponents of a row cancels in y. With 6 u √t for the sums over j, 12 u for what is left, and 6 v for
weights and values kept in halves of unit roundoff v, a term of the numerator N or the denominator D is off by at most

    δ_tj = e^ΔA_tj - 1 + u (6 √(t+1) + 12) + 6 v,       |Δy| <= (ΔN + |y| ΔD) / (D - ΔD) + 4 u |y|                          (2)

Weights are positive, hence D >= 1 in the row's own units, without cancellation. In the state the error of m counts as well,
since num and den are relative to e^m: that of the largest exponents.
"""

import numpy as np

from refimpl.core.numerics import finite_or_zero


def bound(k, v, w, u, num, den, m, *, unit, store):
    """(E, (error of num, of den, of max)) for prepared arguments, of one batch shape; T > 0."""
    T = k.shape[-2]
    k, v = (np.swapaxes(x, -1, -2) for x in (k, v))  # (..., c, T)
    keys = np.concatenate([m[..., None], k], axis=-1)  # (..., c, T + 1); column j is step j - 1, column 0 the state
    values, ones = np.concatenate([num[..., None], v], axis=-1), np.concatenate([den[..., None], np.ones_like(v)], axis=-1)
    row, column = np.arange(T + 1, dtype=k.dtype)[:, None], np.arange(T + 1, dtype=k.dtype)
    size, lag = abs(w)[:, None, None], np.maximum(row - column, 0)
    A = np.where(column <= row, keys[..., None, :] - lag * w[:, None, None], -np.inf)  # (..., c, T + 1, T + 1); row T is the final state
    top = A.max(axis=-1)  # m before step t

    after = top[..., 1:]
    steps = _size(after) + 2 * abs(w)[:, None] + _size(top[..., :-1] - w[:, None] - finite_or_zero(after)) + 4
    steps = np.concatenate([np.zeros_like(steps[..., :1]), np.cumsum(steps, axis=-1)], axis=-1)  # (..., c, T + 1)
    exponent = np.maximum(steps[..., :, None] - steps[..., None, :], 0) + (row**1.5 + column**1.5) * size
    exponent = exponent + 4 * (_size(A) + _size(A - finite_or_zero(top)[..., None]) + _size(keys)[..., None, :])  # (1) / u
    rest = unit * (6 * np.sqrt(row[:, 0] + 1) + 12) + 6 * store

    def wrong(weight, exponent):
        return np.where(weight > 0, weight * (np.expm1(np.minimum(unit * exponent, 1)) + rest[: weight.shape[-2], None]), 0)

    bonus = u[:, None] + k  # (..., c, T)
    M = np.maximum(top[..., :T], bonus)
    weight = np.exp(A[..., :T, :] - M[..., None])
    error = wrong(weight, exponent[..., :T, :] + 4 * _size(top[..., :T] - M)[..., None])
    current = np.exp(bonus - M)
    of_current = abs(bonus) + abs(bonus - M) + abs(k) + abs(u)[:, None]
    error_now = wrong(current[..., None], 4 * of_current[..., None])[..., 0]
    N, D = (weight * values[..., None, :]).sum(axis=-1) + current * v, (weight * ones[..., None, :]).sum(axis=-1) + current
    error_N = (error * abs(values)[..., None, :]).sum(axis=-1) + error_now * abs(v)
    error_D = (error * abs(ones)[..., None, :]).sum(axis=-1) + error_now
    y = abs(N / D)
    E = (error_N + y * error_D) / np.maximum(abs(D) - error_D, np.finfo(D.dtype).tiny) + 4 * unit * y  # (2)

    last, exponent = np.exp(A[..., T, :] - finite_or_zero(top[..., T])[..., None]), exponent[..., T, :]
    near = A[..., T, :] - finite_or_zero(top[..., T])[..., None] > -1
    error_m = unit * np.where(near, exponent + 1, 0).max(axis=-1)  # (..., c)
    error = wrong(last[..., None], exponent[..., None] + error_m[..., None, None] / unit)[..., 0]
    errors = (error * abs(values)).sum(axis=-1), (error * abs(ones)).sum(axis=-1), error_m
    return np.swapaxes(E, -1, -2), errors


def _size(x):
    return np.where(np.isfinite(x), abs(x), 0)
