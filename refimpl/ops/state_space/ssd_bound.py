"""How wrong a right state space dual may be: the running error analysis behind ``ssd.error_bound``.

Let u be the unit roundoff, v that of intermediate results which an implementation may keep in a half precision, and H the
recurrence of absolute values, H_t = |a_t| H_{t-1} + |dt_t| |B_t| |x_t|ᵀ, with a = exp(dt A). What any legal order of the
operations does, recurrent, in chunks or as an attention:

    |Δdt| <= clip(dt ± δ) - clip(dt),      δ = u |dt + dt_bias| σ + u (6 dt + 1), and u dt + v dt more                     (1)
             a rounded sum through softplus (σ its slope), softplus itself, the limits themselves and one rounding at the end
    |Δa|  <= e^{w + ε} - e^w,      w = dt A,      ε = |A| |Δdt| + u (2 |w| + 4)                                           (2)
    E_t   =  (|a_t| + |Δa_t|) E_{t-1} + |Δa_t| H_{t-1} + |Δ(dt B x)| + (4 u + v/64) H_t                                    (3)
             a carry may be rounded once in 64 steps
    |ΔS|  <= E + 4 u |A| F_t |a_t| H_{t-1} + 2 u √t H,      F_t = dt_0 + ... + dt_t                                       (4)
             where elapsed times are differences of running sums, and the state is a sum over many steps at once
    |Δy|  <= Σ_n |C| (|ΔS| + (u (4 + 4 √n) + 3 v) H) + 3 u |D x| + u Y,      Y = Σ_n |C| H + |D x|                         (5)
             weights C·B, their product with decays, and the values dt x may each be rounded before the last product
    gate:    |silu(z)| times that, and Y (u (8 + |z|) |silu(z)| + 2 u |z| + v |silu(z)| + r(z))                          (6)
             r the steps of silu in a half precision (`numerics.silu_rounding`)

This is running error analysis [1, section 3.3]; sums of m terms in one go count 2 √m to 4 √m units and not m, as rounding
errors have both signs. With decays below 1 the bound does not grow with T but for F and √t.

References
    [1] N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM, 2002.
"""

import numpy as np

from refimpl.core.numerics import sigmoid, silu, silu_rounding, softplus


def bound_of_steps(raw, dt, limit, *, biased, softened, unit, store):
    """(1), for steps `dt` made of `raw`; what is given as it is and within the limits has no error."""
    made = softplus(raw) if softened else raw
    off = unit * abs(raw) if biased else np.zeros_like(raw)
    if softened:
        off = sigmoid(raw) * off + unit * (6 * abs(made) + 1)
    up, down, clipped = (np.minimum(np.maximum(v, limit[0]), limit[1]) for v in (made + off, made - off, made))
    off = np.maximum(up - clipped, clipped - down) + np.where(clipped == made, 0, unit * abs(clipped))
    return np.broadcast_to(off + store * abs(clipped) if biased or softened else off, dt.shape)


def bound(x, dt, A, B, C, D, z, S, *, off_dt, unit, store):
    """Errors of y (..., H, T, p) and of the final state (..., H, n, p), for maps B, C of every head and one batch shape."""
    x, B, C, size, n = abs(x), abs(B), abs(C), abs(A), B.shape[-1]
    elapsed, D = np.cumsum(abs(dt), axis=-1), None if D is None else abs(D)[:, None, None]
    H = abs(S)
    E, off_S = np.zeros_like(H), np.zeros_like(H)
    scales, errors = [np.zeros_like(H[..., 0, :])], [np.zeros_like(H[..., 0, :])]  # a row before the first, so that T may be 0
    for t in range(x.shape[-2]):
        step, off_step = dt[..., t], off_dt[..., t]  # (..., H)
        w, off_w = step * A, size * off_step + unit * (2 * size * abs(step) + 4)
        a, off_a = (v[..., None, None] for v in (np.exp(w), -np.exp(w + off_w) * np.expm1(-off_w)))
        into = B[..., t, :, None] * x[..., t, None, :]  # (..., H, n, p)
        kept, entry = a * H, abs(step)[..., None, None] * into
        E = (a + off_a) * E + off_a * H + off_step[..., None, None] * into + (4 * unit + 2 * store) * entry
        H = kept + entry
        E = E + (4 * unit + store / 64) * H
        off_S = E + 4 * unit * (size * elapsed[..., t])[..., None, None] * kept + 2 * unit * np.sqrt(t + 1.0) * H
        scales.append((C[..., t, :, None] * H).sum(axis=-2))  # (..., H, p)
        errors.append((C[..., t, :, None] * (off_S + (unit * (4 + 4 * np.sqrt(n)) + 3 * store) * H)).sum(axis=-2))
    Y, off_y = np.stack(scales, axis=-2)[..., 1:, :], np.stack(errors, axis=-2)[..., 1:, :]  # (..., H, T, p)
    if D is not None:
        Y, off_y = Y + D * x, off_y + 3 * unit * D * x
    off_y = off_y + unit * Y
    if z is not None:
        gate = abs(silu(z))
        off_y = gate * off_y + Y * (unit * ((8 + abs(z)) * gate + 2 * abs(z)) + store * gate + silu_rounding(z, store))
    return off_y, off_S
