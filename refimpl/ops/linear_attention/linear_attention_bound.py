"""How wrong a right linear attention may be: the running error analysis behind ``linear_attention.error_bound``.

Every legal order of operations multiplies what step j wrote by a product of the decays up to step t, or by the exponential of
a sum of log-decays, or of a difference of two running sums F_t = g_0 + ... + g_t; each of these is, step by step, a relative
error in the decay of that step, of at most

    ε_t = u (4 + |g_t| + |F_t|)                                                                         (1)

Without the delta rule everything is a sum of products, so absolute values bound it: with H the memory of absolute values,
H_t = e^{g_t} H_{t-1} + |k_t| |v_t|ᵀ, the error of S obeys

    E_t = e^{g_t} E_{t-1} + ε_t H_t + |Δk_t| |v_t|ᵀ + s |k_t| |v_t|ᵀ                                      (2)

Δk is the feature map's error, and s = 4 v that of operands and weights kept in halves of unit roundoff v (with v/64 of H for
a state that is rounded at the end of every chunk). Reading adds γ = u (4 + 4 √m + 2 √t) of |q|ᵀ H for its sums, in the
order of the recurrence or over all t steps at once, and what is wrong with q; a quotient o = N / D of two such sums is off by

    |Δo| <= (|ΔN| + |o| |ΔD|) / (|D| - |ΔD|) + 4 u |o|                                                  (3)

With the delta rule absolute values would grow without end where S does not: a step multiplies the error of a column of S by
(I - β k kᵀ) diag(e^g), whose norm is at most ρ_t = max(1, |1 - β |k|²|) max_i e^{g_i}. So it is the length n_t of that column
which is followed, and what a step does wrong to it itself:

    n_t = ρ_t n_{t-1} + max(1, |1 - β |k|²|) |ε_t S'_t| + c_t (|u_t| + β (|v_t| + |S'_t| |k_t|)) |k_t| + u |S_t|   (4)

with c = u (8 + 4 √m) + s, again for |Δk|, and |.| the Euclidean length of a column. A chunk's triangular system is solved by
substitution, whose residual is that of (4) with the same u's.
"""

import numpy as np


def bound(q, k, v, g, beta, S, z, scale, dq, dk, *, normalize, unit, store):
    """(E, (error of S, of z)) for prepared arguments; dq, dk are the errors of the mapped q and k."""
    E, outputs = (np.zeros_like(S), np.zeros_like(z)), []
    step = _sum if beta is None else _delta
    H, F, T = (abs(S), abs(z)), np.zeros_like(g, shape=(*g.shape[:-2], g.shape[-1])), k.shape[-2]
    for t in range(T):
        k_t, v_t, g_t, q_t = k[..., t, :], v[..., t, :], g[..., t, :], q[..., t, :]
        F = F + np.where(np.isfinite(g_t), g_t, 0)
        eps = unit * (4 + np.where(np.isfinite(g_t), abs(g_t), 0) + abs(F)) + store / 64  # (1)
        here = (k_t, v_t, g_t, None if beta is None else beta[..., t, :], dk[..., t, :], eps)
        S, z, H, E = step(S, z, H, E, *here, unit=unit, store=4 * store)
        gamma = unit * (4 + 4 * np.sqrt(k.shape[-1]) + 2 * np.sqrt(t + 1.0)) + 4 * store
        N, D = q_t @ S, q_t @ z[..., None]
        passed_on = abs(q_t) @ E[0] if beta is None else _length(q_t) * E[0][..., :1, :]
        E_N = passed_on + gamma * (abs(q_t) @ H[0]) + dq[..., t, :] @ H[0]
        if not normalize:
            outputs.append(abs(scale) * E_N)
            continue
        E_D = (abs(q_t) @ (E[1] + gamma * H[1])[..., None]) + dq[..., t, :] @ H[1][..., None]
        with np.errstate(all="ignore"):
            o = N / D
            outputs.append((E_N + abs(o) * E_D) / np.maximum(abs(D) - E_D, np.finfo(D.dtype).tiny) + 4 * unit * abs(o))  # (3)
    return (np.stack(outputs, axis=-2) if outputs else None), E


def _sum(S, z, H, E, k, v, g, _, dk, eps, *, unit, store):
    """(2), for S and z."""
    a = np.exp(g)
    S, z = a[..., None] * S + _outer(k, v), a * z + k
    H = a[..., None] * H[0] + _outer(abs(k), abs(v)), a * H[1] + abs(k)
    wrong = dk + store * abs(k)
    return S, z, H, (a[..., None] * E[0] + eps[..., None] * H[0] + _outer(wrong, abs(v)), a * E[1] + eps * H[1] + wrong)


def _delta(S, z, H, E, k, v, g, beta, dk, eps, *, unit, store):
    """(4): every entry of a column gets the length of the whole column's error."""
    m = k.shape[-1]
    old = np.exp(g)[..., None] * S
    u = beta * (v - (k[..., None, :] @ old)[..., 0, :])
    length = _length(k)
    grows = np.maximum(1, abs(1 - beta * length**2))
    n = E[0][..., 0, :]  # all entries of a column are its n
    n = grows * np.exp(g).max(axis=-1, keepdims=True) * n + grows * _columns(eps[..., None] * old)
    touched = abs(u) + abs(beta) * (abs(v) + _columns(old) * length)
    n = n + ((unit * (8 + 4 * np.sqrt(m)) + store) * length + 2 * _length(dk)) * touched
    S = old + _outer(k, u)
    n = n + unit * _columns(S)
    return S, z, (abs(S), H[1]), (np.broadcast_to(n[..., None, :], S.shape), E[1])


def _outer(k, v):
    return k[..., :, None] * v[..., None, :]


def _length(x):
    return np.sqrt((x * x).sum(axis=-1, keepdims=True))


def _columns(S):
    """Lengths of the columns, (..., e)."""
    return np.sqrt((S * S).sum(axis=-2))
