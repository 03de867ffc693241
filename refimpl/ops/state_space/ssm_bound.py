"""How wrong a right state space model may be: the analysis behind the error bounds of `ssm` and `ssm_kernel`.

Powers of Ā come by steps, by squaring, or as exponentials of logarithms; each way a factor of Ā brings a relative error
of a few u, so that what has travelled l steps is off by l + 1 times that. For a diagonal Ā, with absolute values
H_t = |Ā| H_{t-1} + |B̄ u_t|, this is the running error analysis [1, section 3.3]

    E_t = |Ā| E_{t-1} + (4 u + v/64) H_t + 2 v |B̄ u_t|,      and 2 u (t + 1) |log |Ā|| |Ā| H_{t-1} for logarithms           (1)

(u the unit roundoff, v that of a half precision in which operands may be kept). For a dense Ā absolute values would grow
where Ā's powers do not. There norms count: a product of l factors that is wrong in one place or squared on the way is off by

    W_l = max over i + j + k = l of ‖Āⁱ‖ ‖Āʲ‖ ‖Āᵏ B̄‖,      e_t = Σ_l ((l + 1) (4 + 2 √n) u + (2 + l/64) v) W_l |u_{t-l}|    (2)

and the same for the initial state. Then reading, and convolving by transforms [1, section 24.1]:

    |Δy| <= |C| (E + ((4 + 4 √n + 2 √t) u + 2 v) H) + (3 log2 4T u + 3 v) ‖K‖ ‖u‖ + 3 u |D u| + u Y                         (3)

References
    [1] N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM, 2002.
"""

import numpy as np

from refimpl.ops.state_space.ssm_system import applied


def bound(u, A, B, C, D, x, *, pairs, transformed, unit, store):
    """Errors of y (..., T, c) and of the final state (..., c, n), for |u| and an initial state x with all batch axes."""
    T, n, factor = u.shape[-2], C.shape[-1], 2 if pairs else 1
    u, C = abs(u), factor * abs(C)
    if A.ndim == 2:
        E, H, K = _diagonal(u, abs(A), abs(B), abs(x), unit, store)
    else:
        E, H, K = _dense(u, A, B, x, unit, store)
        C = np.sqrt((C * C).sum(axis=-1, keepdims=True))  # the norm meets a norm
    t = np.arange(T)[:, None]  # (T, 1)
    reading = unit * (4 + 4 * np.sqrt(n) + 2 * np.sqrt(t + 1.0)) + 2 * store
    Y = (C * H[..., 1:, :, :]).sum(axis=-1)  # (..., T, c)
    off_y = (C * E[..., 1:, :, :]).sum(axis=-1) + reading * Y
    if transformed:
        levels = 3 * (unit * np.log2(4 * max(T, 1)) + store)
        off_y = off_y + levels * _norm((C * K).sum(axis=-1)) * _norm(u)
    if D is not None:
        Y, off_y = Y + abs(D) * u, off_y + 3 * unit * abs(D) * u
    off_state = E[..., -1, :, :] + 2 * unit * np.sqrt(float(T)) * H[..., -1, :, :]
    return off_y + unit * Y, np.broadcast_to(off_state, x.shape)


def _diagonal(u, a, B, x, unit, store):
    """(1): E and H, from the initial state on, (..., T + 1, c, n), and |Āᵏ B̄|, (T, c, n)."""
    log = abs(np.log(np.where(a > 0, a, np.ones_like(a))))
    H, E, K = [x], [np.zeros_like(x)], []
    carried, power = E[0], B * np.ones_like(a)
    for t in range(u.shape[-2]):
        entry, kept = B * u[..., t, :, None], a * H[-1]
        H.append(kept + entry)
        carried = a * carried + (4 * unit + store / 64) * H[-1] + 2 * store * entry
        E.append(carried + 2 * unit * (t + 1) * log * kept)
        K.append(power)
        power = a * power
    return np.stack(E, axis=-3), np.stack(H, axis=-3), np.stack(K) if K else B[None][:0]


def _dense(u, A, B, x, unit, store):
    """(2), with an axis of 1 in place of n: norms."""
    (T, c), n = u.shape[-2:], A.shape[-1]
    size, from_input, from_state, power = [], [], [], np.broadcast_to(np.eye(n, dtype=A.dtype), A.shape)
    B, vectors = np.broadcast_to(B, (c, n)), x
    for t in range(T + 1):
        whole = np.sqrt((abs(power) ** 2).sum(axis=(-2, -1)))  # (c or 1,)
        size.append(np.broadcast_to(np.ones_like(whole) if t == 0 else whole, (c,)))
        from_input.append(_length(B))
        from_state.append(_length(vectors))
        power, B, vectors = A @ power, applied(A, B), applied(A, vectors)
    size, h, start = np.stack(size, axis=-2), np.stack(from_input, axis=-2), np.stack(from_state, axis=-2)  # (T + 1, c), (..., T + 1, c)
    twice = _largest_product(size, size)
    W, W_start = _largest_product(twice, h), _largest_product(twice, start)
    steps = np.arange(T + 1)[:, None]
    weight = (steps + 1) * unit * (4 + 2 * np.sqrt(n)) + (2 + steps / 64) * store
    E, H = weight * W_start * (steps > 0), start.copy()
    for lag in range(T):
        E[..., lag + 1 :, :] += (weight * W)[lag] * u[..., : T - lag, :]
        H[..., lag + 1 :, :] += h[lag] * u[..., : T - lag, :]
    return E[..., None], H[..., None], h[:T, :, None]


def _largest_product(g, h):
    """max over i + k = l of g_i h_k."""
    best = g[0] * h
    for i in range(1, len(g)):
        best[..., i:, :] = np.maximum(best[..., i:, :], g[i] * h[..., : len(g) - i, :])
    return best


def _length(x):
    return np.sqrt((abs(x) ** 2).sum(axis=-1))


def _norm(x):
    return np.sqrt((x * x).sum(axis=-2, keepdims=True))  # (..., 1, c)
