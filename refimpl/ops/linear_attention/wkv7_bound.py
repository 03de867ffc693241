"""How wrong a right WKV of RWKV-7 may be: the running error analysis behind ``wkv7.error_bound``.

Let p_t = S_{t-1}ᵀ a_t, u the unit roundoff, v that of operands and weights which an implementation keeps in halves, and G the
absolute values of all that was written, faded by the decays alone, whatever cancels among them:

    G_t = e^{w_t} G_{t-1} + |b_t| |p_t|ᵀ + |k_t| |v_t|ᵀ                                                    (1)

A form in chunks sums S from these parts, a step from S itself; |S| <= G. Each product of decays, or exponential of sums of
log-decays or of differences of running sums F_t = w_0 + ... + w_t, is step by step a relative error of ε_t in a decay, which
reaches what is read from the parts as X, without passing through b aᵀ:

    X_t = e^{w_t} X_{t-1} + ε_t e^{w_t} G_{t-1},      ε_t = u (4 + |w_t| + 2 |F_t|)                              (2)
    |Δp_t| <= |a_t|ᵀ (X_{t-1} + γ_t G_{t-1}),      γ_t = u (4 + 4 √d + 2 √t) + 8 v                          (3)
    δ_t = |b_t| |Δp_t|ᵀ + ε_t e^{w_t} |S_{t-1}| + (4 u + 8 v) (|b_t| |p_t|ᵀ + |k_t| |v_t|ᵀ) + (u + v/64) G_t         (4)

δ_t is what a step does wrong by itself. It is carried on by J_t = diag(e^{w_t}) + b_t a_tᵀ, column by column of S, since a
memory that loses what it read also loses the errors in it (`core.propagation`): E. Reading adds what (3) says, for r:

    |ΔS_t| <= E_t + X_t + 2 u √t G_t,      |Δo_t| <= |r_t|ᵀ (E_t + X_t + γ_t G_t)                              (5)
"""

import numpy as np

from refimpl.core.propagation import Propagation


def bound(r, w, k, v, a, b, S, *, unit, store):
    """(E of o, or None for T = 0; E of the final S) for prepared arguments."""
    d, T = r.shape[-1], r.shape[-2]
    G, X, E = abs(S), np.zeros_like(S), np.zeros_like(S)
    F, eye, outputs = np.zeros_like(S[..., 0]), np.eye(d, dtype=S.dtype), []
    errors = Propagation(np.swapaxes(E, -1, -2))  # (..., H, e, d): a column of S in each row
    for t in range(T):
        w_t, k_t, v_t, a_t, b_t = (x[..., t, :] for x in (w, k, v, a, b))
        F = F + _size(w_t)
        decay, eps = np.exp(w_t)[..., None], (unit * (4 + _size(w_t) + 2 * F))[..., None]
        gamma = unit * (4 + 4 * np.sqrt(d) + 2 * np.sqrt(t + 1.0)) + 8 * store
        p = (a_t[..., None, :] @ S)[..., 0, :]  # (..., H, e)
        off_p = (abs(a_t)[..., None, :] @ (X + gamma * G))[..., 0, :]  # (3)
        parts = _outer(abs(b_t), abs(p)) + _outer(abs(k_t), abs(v_t))
        X = decay * (X + eps * G)  # (2)
        G = decay * G + parts  # (1)
        local = _outer(abs(b_t), off_p) + eps * decay * abs(S) + (4 * unit + 8 * store) * parts + (unit + store / 64) * G  # (4)
        S = decay * S + _outer(b_t, p) + _outer(k_t, v_t)
        J = eye * np.exp(w_t)[..., None, :] + _outer(b_t, a_t)  # (..., H, d, d)
        E = np.swapaxes(errors.step(J[..., None, :, :], np.swapaxes(local, -1, -2)), -1, -2)
        outputs.append((abs(r[..., t, None, :]) @ (E + X + gamma * G))[..., 0, :])  # (5)
    return (np.stack(outputs, axis=-2) if outputs else None), E + X + 2 * np.sqrt(T) * unit * G


def _outer(x, y):
    return x[..., :, None] * y[..., None, :]


def _size(x):
    return np.where(np.isfinite(x), abs(x), 0)
