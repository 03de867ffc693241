"""How wrong a right selective scan may be: the running error analysis behind ``selective_scan.error_bound``.

Let u be the unit roundoff, v that of intermediate results which an implementation may keep in a half precision, and H
the recurrence of absolute values, H_t = |a_t| H_{t-1} + |b_t|, with a = exp(dt A) and b = dt B u. What any legal order of
the operations does, to first order but for the exponential:

    |Δdt| <= u |delta + delta_bias| σ + u (6 dt + 1) + v dt       a rounded sum through softplus, and softplus itself      (1)
             (σ softplus' slope; the 1 is for log(1 + e^x), which published kernels write where log1p is meant)
    |Δa|  <= e^{x + ε} - e^x,      x = dt Re A,      ε = |A| |Δdt| + u (2 |dt A| + 4)                                     (2)
    E_t   =  (|a_t| + |Δa_t|) E_{t-1} + |Δa_t| H_{t-1} + |Δb_t| + (4 u + v/64) H_t                                         (3)
             four units of H for a product and a sum, complex ones too; a carry may be rounded once in 64 steps
    |Δh|  <= E + 4 u |A| F_t |a_t| H_{t-1},      F_t = |dt_0| + ... + |dt_t|                                              (4)
             where elapsed times are formed as differences of running sums (that of a step to itself is 0)
    |Δy|  <= Σ_n |C| (|Δh| + (n + 4) u H + v H) + 3 u |D u| + u Y,      Y = Σ_n |C| H + |D u|                              (5)
    gate:    |silu(z)| times that, and Y (u (8 + |z|) |silu(z)| + 2 u |z| + v |silu(z)| + r(z))                          (6)
             r the steps of silu in a half precision (`numerics.silu_rounding`); e^-z errs by |z| units,
             and a sigmoid computed as (1 + tanh(z/2))/2 by a unit of 1

This is running error analysis [1, section 3.3]; with decays below 1 it does not grow with T but for F.

References
    [1] N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM, 2002.
"""

import numpy as np

from refimpl.core.numerics import sigmoid, silu, silu_rounding


def bound_of_steps(raw, dt, *, biased, softplus, unit, store):
    """(1), for steps `dt` made of `raw`; what is given as it is has no error."""
    off = unit * abs(raw) if biased else np.zeros_like(raw)
    if softplus:
        off = sigmoid(raw) * off + unit * (6 * abs(dt) + 1)
    return np.broadcast_to(off + store * abs(dt) if biased or softplus else off, dt.shape)


def bound(u, dt, A, B, C, D, z, h, *, off_dt, unit, store):
    """Errors of y (..., T, c) and of the final state (..., c, n), for maps B, C of every channel and all batch axes in u, dt, h."""
    u, elapsed, factor = abs(u), np.cumsum(abs(dt), axis=-2), 2 if np.iscomplexobj(A) else 1
    B, C, size, n = abs(B), factor * abs(C), abs(A), A.shape[-1]
    H = abs(h)
    E, off_h = np.zeros_like(H), np.zeros_like(H)
    scales, errors = [np.zeros_like(H[..., 0])], [np.zeros_like(H[..., 0])]  # a row before the first, so that T may be 0
    for t in range(u.shape[-2]):
        step, off_step = dt[..., t, :, None], off_dt[..., t, :, None]  # (..., c, 1)
        x, off_x = step * A.real, size * off_step + unit * (2 * size * abs(step) + 4)  # (..., c, n)
        a, off_a = np.exp(x), -np.exp(x + off_x) * np.expm1(-off_x)
        into = u[..., t, :, None] * B[..., t, :, :]
        b, off_b = abs(step) * into, (off_step + (4 * unit + 2 * store) * abs(step)) * into
        E = (a + off_a) * E + off_a * H + off_b
        kept = a * H
        H = kept + b
        E = E + (4 * unit + store / 64) * H
        off_h = E + 4 * unit * size * elapsed[..., t, :, None] * kept
        scales.append((C[..., t, :, :] * H).sum(axis=-1))  # (..., c)
        errors.append((C[..., t, :, :] * (off_h + ((n + 4) * unit + store) * H)).sum(axis=-1))
    Y, off_y = np.stack(scales, axis=-2)[..., 1:, :], np.stack(errors, axis=-2)[..., 1:, :]  # (..., T, c)
    if D is not None:
        Y, off_y = Y + abs(D) * u, off_y + 3 * unit * abs(D) * u
    off_y = off_y + unit * Y
    if z is not None:
        gate = abs(silu(z))
        off_y = gate * off_y + Y * (unit * ((8 + abs(z)) * gate + 2 * abs(z)) + store * gate + silu_rounding(z, store))
    return off_y, off_h
