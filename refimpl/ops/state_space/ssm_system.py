"""A linear time-invariant system and its states: what `ssm` and `ssm_kernel` share.

The matrix Ā of a channel is diagonal, and then given as its n entries, or dense; a first axis of 1 serves all channels:

    A_bar (c, n), (1, n)           Ā x = A_bar * x, elementwise
    A_bar (c, n, n), (1, n, n)     Ā x = A_bar @ x

Everything here takes either, and states x of shape (..., c, n).
"""

import numpy as np

SYSTEM = "A_bar (1, n) | (c, n) | (1, n, n) | (c, n, n); B_bar (1, n) | (c, n); C (1, n) | (c, n)"  # a contract's line, for both


def applied(A, x):
    """Ā x."""
    return A * x if A.ndim == 2 else (A @ x[..., None])[..., 0]


def adjoint(A):
    """Āᴴ."""
    return np.conj(A) if A.ndim == 2 else np.conj(np.swapaxes(A, -1, -2))


def squared(A):
    """Ā²."""
    return A * A if A.ndim == 2 else A @ A


def observed(y, pairs):
    """C x as a real number: its real part, twice if x is one of a pair of conjugates."""
    return 2 * y.real if pairs else y.real


def orbit(A, b, length):
    """b, Ā b, Ā² b, ..., as (..., length, c, n), by doubling: what is known, and Ā to the power of its length times that.

    log2 length rounds. Doubled once too often, a growing system may overflow in rows that are then cut off.
    """
    rows, power = (b + np.zeros_like(applied(A, b)))[..., None, :, :], A  # a b that serves all channels becomes one for each
    if length == 0:
        return rows[..., :0, :, :]
    while rows.shape[-3] < length:
        rows = np.concatenate([rows, applied(power, rows)], axis=-3)
        power = squared(power)
    return rows[..., :length, :, :]


def adjoint_states(A, C, dy, last, pairs):
    """The adjoint recurrence g_t = factor·conj(C) dy_t + Āᴴ g_{t+1}, with g_T such that Āᴴ g_T is `last`: (..., T, c, n).

    y_t = factor·Re(C x_t), so conj(C) dy_t is what a change of x_t does; after that a state does what its successor does.
    """
    into = np.conj(C) * ((2 if pairs else 1) * dy)[..., None]  # (..., T, c, n)
    back, rows, g = adjoint(A), [], last
    for t in reversed(range(dy.shape[-2])):
        g = into[..., t, :, :] + g
        rows.append(g)
        g = applied(back, g)
    return (np.stack(rows[::-1], axis=-3) if rows else into), g


def gradient_of_matrix(A, g, before):
    """Σ_t g_t x_{t-1}ᴴ, of which a diagonal Ā takes the diagonal; batch axes and time are summed by who calls."""
    return g * np.conj(before) if A.ndim == 2 else g[..., :, None] * np.conj(before)[..., None, :]


def drawn(rng, *, c, n, dense, shared):
    """A stable complex system: eigenvalues of modulus 0.4 to 0.9, or a matrix with a spectral radius of about 0.7; Ā and B̄ of one or of each."""
    rows = 1 if shared else c

    def normal(*shape):
        return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) / np.sqrt(2)

    A = 0.7 * normal(rows, n, n) / np.sqrt(n) if dense else rng.uniform(0.4, 0.9, (rows, n)) * np.exp(1j * rng.uniform(-3, 3, (rows, n)))
    return {"A_bar": A, "B_bar": normal(rows, n), "C": normal(c, n)}


def of_norm_one(A):
    """Ā with every eigenvalue on the unit circle, or, dense, with a norm of 1."""
    return A / (abs(A) if A.ndim == 2 else np.linalg.norm(A, 2, axis=(-2, -1), keepdims=True))
