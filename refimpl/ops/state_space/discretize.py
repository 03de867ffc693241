"""Discretisation: from x' = A x + B u to x_t = Ā x_{t-1} + B̄ u_t.

    zoh               Ā = e^(dt A),                       B̄ = ∫_0^dt e^(sA) ds B                             (1)
    mamba             Ā = e^(dt A),                       B̄ = dt B                                           (2)
    bilinear          Ā = (I - dt/2 A)⁻¹ (I + dt/2 A),    B̄ = (I - dt/2 A)⁻¹ dt B                            (3)
    backward_euler    Ā = (I - dt A)⁻¹,                   B̄ = (I - dt A)⁻¹ dt B                              (4)
    euler             Ā = I + dt A,                       B̄ = dt B                                           (5)

A state space model is written in continuous time and run in steps. A zero-order hold (1) is exact for an input that is
constant within each step. The integral is A⁻¹ (e^(dt A) - I) where A has an inverse, but needs none: it is a block of a
larger exponential [1],

    exp( dt [[A, B], [0, 0]] ) = [[Ā, B̄], [0, I]]                                                       (6)

(3)-(5) are one family, (I - α dt A)⁻¹ (I + (1-α) dt A) with α = 1/2, 1, 0 [2]: first order in dt, the bilinear one second.
For A in the left half plane (3) and (4) keep the eigenvalues of Ā inside the unit circle at every dt; (5) does not.
Where A is diagonal all of this is elementwise: `discretize_diagonal`. What is done with Ā and B̄ is `ssm`.

Glossary
    A, B      continuous system          A, B in [3, equation (1)]
    dt        step                       Δ in [3], [4]
    Ā, B̄     discrete system, `A_bar`, `B_bar`

Where implementations differ
    B̄: exact hold (1) in papers, dt·B in every Mamba code, whose paper prints (1) [4, equation (4)]: method "mamba".
    C and D stay as they are; `scipy.signal.cont2discrete` changes both for bilinear and backward Euler, because it takes
    the state at another point of the step. "Bilinear" is also called Tustin or trapezoidal.
    A step of its own for every channel is a dt of shape (c,): batch axes broadcast.

References
    [1] C. F. Van Loan, "Computing integrals involving the matrix exponential", IEEE Trans. Automatic Control 23(3), 1978.
    [2] G. Zhang, X. Chen and T. Chen, "Digital redesign via the generalised bilinear transformation", Int. J. Control
        82(4), 2009, section 2.
    [3] A. Gu, K. Goel and C. Ré, "Efficiently modeling long sequences with structured state spaces", ICLR 2022,
        section 2.3.
    [4] A. Gu and T. Dao, "Mamba", 2023, section 2, equation (4).
    [5] N. J. Higham, "Functions of Matrices", SIAM, 2008, sections 3.1 and 10.3.
    [6] N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM, 2002, section 9.3.
"""

import numpy as np

from refimpl.core import linalg
from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.options import one_of
from refimpl.op import Cost, Form, Op
from refimpl.ops.state_space.discretization_laws import contraction, linear_in_b, semigroup, small_step, time_scale

CONTRACT = Contract(
    "discretize",
    takes="A (..., n, n); B (..., n) | (..., n, m); dt () | (...)",
    gives="A_bar (..., n, n); B_bar (..., n, m) | (..., n)",
)

IMPLICITNESS = {"euler": 0, "bilinear": 0.5, "backward_euler": 1}  # α
METHODS = ("zoh", "bilinear", "euler", "backward_euler", "mamba")


@CONTRACT.form
def discretize(A, B, dt, *, method="zoh"):
    """Discrete system (Ā, B̄) of a continuous one, equations (1)-(5).

    Parameters
    ----------
    A : ndarray, shape (..., n, n)
        State matrix, real or complex; it may be singular.
    B : ndarray, shape (..., n) or (..., n, m)
        Input matrix, or a single column.
    dt : float or ndarray, shape () or (...)
        Step; its axes broadcast with the batch axes of A and B.
    method : {"zoh", "bilinear", "euler", "backward_euler", "mamba"}
        Which of (1)-(5).

    Returns
    -------
    A_bar : ndarray, shape (..., n, n)
    B_bar : ndarray, shape (..., n) or (..., n, m), as B

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, the method is unknown, or I - α dt A has no inverse.

    Notes
    -----
    2 (n + m)³ (20 + log2 ‖dt A‖) operations for an exponential, 2/3 n³ + 4 n² (n + m) for a solve. Errors grow
    with ‖dt A‖ and the condition of I - α dt A; see ``error_bound``. Both results have all batch axes. Not every matrix
    exponential is as good: ``torch.linalg.matrix_exp`` (2.13) in float32 leaves up to 500 u where 0.3 < ‖dt A‖ < 0.58.

    References
    ----------
    [1]-[4]; and "Where implementations differ" in this module's docstring.

    Examples
    --------
    >>> import numpy as np
    >>> integrator = np.array([[0.0, 1.0], [0.0, 0.0]])  # position and velocity, driven by a force: A has no inverse
    >>> A_bar, B_bar = discretize(integrator, np.array([0.0, 1.0]), 0.5)
    >>> A_bar.round(12).tolist(), B_bar.round(12).tolist()
    ([[1.0, 0.5], [0.0, 1.0]], [0.125, 0.5])
    """
    one_of("discretize", "method", method, METHODS)
    A, B, dt, column = _together(A, B, dt)
    if method == "zoh":
        A_bar, B_bar = _augmented_exponential(dt * A, dt * B)
    elif method == "mamba":
        A_bar, B_bar = linalg.expm(dt * A), dt * B
    else:
        M, R = _implicit_step(dt * A, dt * B, IMPLICITNESS[method])
        A_bar, B_bar = _split(_solve(M, R, method), A.shape[-1])
    return A_bar, B_bar[..., 0] if column else B_bar


def _augmented_exponential(A, B):
    """(6). B's block enters with entries of at most 1: the exponential is linear in it, its algorithm minds its size."""
    n, m = B.shape[-2:]
    size = linalg.largest(B)
    top = np.concatenate([A, B / size], axis=-1)  # (..., n, n+m)
    bottom = np.zeros_like(top, shape=(*top.shape[:-2], m, n + m))
    E = linalg.expm(np.concatenate([top, bottom], axis=-2))  # (..., n+m, n+m)
    return E[..., :n, :n], E[..., :n, n:] * size


def _implicit_step(A, B, alpha):
    """M = I - αA and R = [I + (1-α) A, B], so that M [Ā, B̄] = R."""
    eye = _identity(A)
    return eye - alpha * A, np.concatenate([eye + (1 - alpha) * A, B], axis=-1)


@CONTRACT.form
def discretize_doubling(A, B, dt, *, method="zoh"):
    """The same, a hold by its law and the others by the resolvent.

    Two holds compose to one of twice the length by the operator of `linear_recurrence`,
    (Ā, B̄)∘(Ā, B̄) = (Ā², Ā B̄ + B̄): so start with a step short enough for a few terms of a series, and double it. For
    (3) and (4) write I + (1-α) dt A with M = I - α dt A: Ā = (M⁻¹ - (1-α) I) / α, and B̄ = M⁻¹ dt B.

    2 n² (n + m) (14 + log2 ‖dt A‖) operations: n + m wide where (6) is n + m square.
    """
    one_of("discretize", "method", method, METHODS)
    A, B, dt, column = _together(A, B, dt)
    X, Y = dt * A, dt * B
    if method in ("zoh", "mamba"):
        levels = linalg.squarings(X)
        short = linalg.halved(X, levels)
        A_bar, phi = linalg.exp_and_phi1(short)
        B_bar = phi @ linalg.halved(Y, levels)
        for j in range(levels.max(initial=0)):
            left = (j < levels)[..., None, None]
            again = np.where(left, A_bar, np.zeros_like(A_bar))
            A_bar, B_bar = np.where(left, again @ again, A_bar), again @ B_bar + B_bar
        B_bar = Y if method == "mamba" else B_bar
    elif method == "euler":
        A_bar, B_bar = _identity(A) + X, Y
    else:
        alpha = IMPLICITNESS[method]
        resolvent = _solve(_identity(A) - alpha * X, _identity(A), method)
        A_bar, B_bar = (resolvent - (1 - alpha) * _identity(A)) / alpha, resolvent @ Y
    return A_bar, B_bar[..., 0] if column else B_bar


@CONTRACT.gradient
def discretize_vjp(dy, A, B, dt, *, method="zoh"):
    """Gradient of `discretize`.

    With X = dt A, Y = dt B. A hold: the adjoint of the derivative of exp at X is the derivative at Xᴴ [5, section 3.1],
    of the larger matrix (6). A solve M [Ā, B̄] = R: dR = M⁻ᴴ [dĀ, dB̄], dM = -dR [Ā, B̄]ᴴ. Then

        dA = conj(dt) dX,    dB = conj(dt) dY,    d(dt) = Σ conj(A) dX + Σ conj(B) dY

    Parameters
    ----------
    dy : tuple of ndarray
        Cotangents of A_bar and B_bar; None is zero.

    Returns
    -------
    dict
        "A", "B", "dt".
    """
    one_of("discretize", "method", method, METHODS)
    if not isinstance(dy, tuple) or len(dy) != 2:
        raise ValueError(f"discretize: dy must be a tuple (dA_bar, dB_bar), got {type(dy).__name__}")
    A, B, dt, column = _together(A, B, dt)
    dA_bar, dB_bar = dy[0], dy[1][..., None] if column else dy[1]
    X, Y = dt * A, dt * B
    if method == "zoh":
        dX, dY = _augmented_exponential_vjp(dA_bar, dB_bar, X, Y)
    elif method == "mamba":
        dX, dY = linalg.expm_derivative(_adjoint(X), dA_bar), dB_bar
    else:
        alpha = IMPLICITNESS[method]
        M, R = _implicit_step(X, Y, alpha)
        dR = _solve(_adjoint(M), np.concatenate([dA_bar, dB_bar], axis=-1), method)
        dM = -dR @ _adjoint(_solve(M, R, method))
        dR_A, dY = _split(dR, A.shape[-1])
        dX = (1 - alpha) * dR_A - alpha * dM
    ddt = (np.conj(A) * dX).sum(axis=(-2, -1)) + (np.conj(B) * dY).sum(axis=(-2, -1))
    dB = np.conj(dt) * dY
    return {"A": np.conj(dt) * dX, "B": dB[..., 0] if column else dB, "dt": ddt}


def _augmented_exponential_vjp(dA_bar, dB_bar, A, B):
    n, m = B.shape[-2:]
    size = linalg.largest(B)
    left = np.concatenate([_adjoint(A), _adjoint(B / size)], axis=-2)  # the adjoint of (6)'s matrix: (..., n+m, n)
    X = np.concatenate([left, np.zeros_like(left, shape=(*left.shape[:-1], m))], axis=-1)
    top = np.concatenate([dA_bar, dB_bar * size], axis=-1)
    direction = np.concatenate([top, np.zeros_like(top, shape=(*top.shape[:-2], m, n + m))], axis=-2)
    G = linalg.expm_derivative(X, direction)
    return G[..., :n, :n], G[..., :n, n:] / size


def error_bound(A, B, dt, *, unit, store=0.0, method="zoh"):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`.

    An exponential: the running error of scaling and squaring [5, section 10.3], E <- |Y| E + E |Y| + n u |Y|², from
    16 u e^|X| at the norm where the series begins (other stable algorithms halve a few times more), and 4 n u of the
    largest entry (of I at least), because solves with Padé denominators are stable in norm only. X is the matrix of (6)
    as it stands, since many exponentiate it so. A solve: (n + 4) u |M⁻¹| (|M| + its columns' maxima) |M⁻¹| |R|, which
    holds for any pivots, and if the inverse is formed [6, section 9.3]. Intermediates kept in a half precision add the
    same with `store`, a part of it: they are rounded once where sums round often.
    """
    A, B, dt, column = _together(*map(np.asarray, (A, B, dt)))
    X, Y = dt * A, dt * B
    n, m = B.shape[-2:]
    if method in ("zoh", "mamba"):
        top = np.concatenate([X, Y], axis=-1)
        E, result = _growth_of_errors(np.concatenate([top, np.zeros_like(top, shape=(*top.shape[:-2], m, n + m))], axis=-2))
        size_A, size_B = (4 * n * abs(x).max(axis=(-2, -1), keepdims=True, initial=0) for x in _split(result[..., :n, :], n))
        E_A, E_B = _split((unit + store / 8) * E[..., :n, :], n)
        E_A, E_B = E_A + unit * np.maximum(size_A, 4 * n), E_B + unit * size_B
    elif method == "euler":
        E_A = (4 * unit + 2 * store) * (_identity(abs(A)) + abs(X))
    else:
        M_abs = _identity(abs(A)) + abs(X)
        R_abs = np.concatenate([M_abs, abs(Y)], axis=-1)
        columns = np.broadcast_to(M_abs.max(axis=-2, keepdims=True, initial=0), M_abs.shape)
        inverse = abs(linalg.solve(_identity(A) - IMPLICITNESS[method] * X, _identity(A)))
        E_A, E_B = _split(((n + 4) * unit + store) * (inverse @ (columns + M_abs) @ inverse @ R_abs), n)
    if method in ("euler", "mamba"):
        E_B = (3 * unit + 2 * store) * abs(Y)
    return E_A, E_B[..., 0] if column else E_B


def _growth_of_errors(X):
    """What a roundoff of 1 grows to in e^X; and e^X."""
    s = linalg.squarings(X)
    Y = linalg.expm(linalg.halved(X, s))
    E = 16 * linalg.expm(abs(linalg.halved(X, s)))
    for j in range(s.max(initial=0)):
        left = (j < s)[..., None, None]
        Z = np.where(left, abs(Y), np.zeros_like(E))
        E = np.where(left, Z @ E + E @ Z + X.shape[-1] * (Z @ Z), E)
        again = np.where(left, Y, np.zeros_like(Y))
        Y = np.where(left, again @ again, Y)
    return E, Y


# -- what the forms share --------------------------------------------------------------------------------------------


def _together(A, B, dt):
    """All batch axes on all three, B as a matrix, dt as (..., 1, 1); and whether B was a single column."""
    column = CONTRACT.axis("n", A=A, B=B, dt=dt)["B"] == -1
    B = B[..., None] if column else B
    batch = np.broadcast_shapes(A.shape[:-2], B.shape[:-2], dt.shape)
    A, B = np.broadcast_to(A, (*batch, *A.shape[-2:])), np.broadcast_to(B, (*batch, *B.shape[-2:]))
    return A, B, np.broadcast_to(dt, batch)[..., None, None], column


def _solve(M, R, method):
    try:
        return linalg.solve(M, R)
    except np.linalg.LinAlgError:
        alpha = {"bilinear": "dt/2", "backward_euler": "dt"}.get(method, "0")
        raise ValueError(f"discretize: I - {alpha} A must have an inverse for the method {method!r}, got a singular matrix") from None


def _split(columns, n):
    return columns[..., :n], columns[..., n:]


def _identity(A):
    n = A.shape[-1]
    return np.zeros_like(A) + (np.arange(n)[:, None] == np.arange(n))


def _adjoint(x):
    return np.conj(np.swapaxes(x, -1, -2))


def _sample(rng, *, n=4, m=2, batch=()):
    """A stable, well-conditioned system."""
    return {
        "A": 0.4 * rng.standard_normal((*batch, n, n)) / np.sqrt(max(n, 1)) - 1.2 * np.eye(n),
        "B": rng.standard_normal((*batch, n, m)),
        "dt": np.asarray(rng.uniform(0.8, 1.3, batch)),
    }


def _with(**changes):
    """A hard call: the sample, with some arrays replaced."""

    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        return call | {name: np.asarray(change(rng, call[name])) for name, change in changes.items()}

    return draw


def _legs(rng, A):
    """HiPPO-LegS: far from normal, its norm n²."""
    i = np.arange(A.shape[-1])
    return np.broadcast_to(-np.tril(np.sqrt((2 * i[:, None] + 1) * (2 * i + 1)), -1) - np.diag(i + 1.0), A.shape)


def _exponential_cost(n, m=1, batch=1, norm=2.0):
    return Cost(
        2 * (n + m) ** 3 * (20 + np.log2(1 + norm)) * batch, (log2_ceil(n + m) + 3) * (20 + np.log2(1 + norm)), 8 * (n + m) ** 2 * batch
    )


def _doubling_cost(n, m=1, batch=1, norm=2.0):
    return Cost(
        2 * n**2 * ((n + m) * (1 + np.log2(1 + norm)) + 14 * n) * batch,
        (log2_ceil(n) + 2) * (22 + np.log2(1 + norm)),
        7 * n * (n + m) * batch,
    )


OPS = (
    Op(
        name="discretize",
        summary="(Ā, B̄) of x' = Ax + Bu for a step dt: zero-order hold, bilinear, Euler forward and backward",
        contract=CONTRACT,
        forms={
            "augmented": Form(discretize, _exponential_cost),
            "doubling": Form(discretize_doubling, _doubling_cost, on_balls=False),
        },
        gradient=discretize_vjp,
        sample=_sample,
        options={"method": METHODS},
        hard={
            "singular A": _with(A=lambda rng, A: np.broadcast_to(np.eye(A.shape[-1], k=1), A.shape)),
            "A = 0": _with(A=lambda rng, A: 0 * A),
            "dt = 0": _with(dt=lambda rng, dt: 0 * dt),
            "tiny steps": _with(dt=lambda rng, dt: 1e-6 * dt),
            "long steps": _with(dt=lambda rng, dt: 15 * dt),
            "stiff: fast and slow states": _with(A=lambda rng, A: np.zeros_like(A) - np.diag(10.0 ** np.linspace(-3, 2, A.shape[-1]))),
            "an undamped oscillator": _with(
                A=lambda rng, A: np.broadcast_to(3 * np.eye(A.shape[-1], k=1) - 3 * np.eye(A.shape[-1], k=-1), A.shape)
            ),
            "a growing state": _with(A=lambda rng, A: -A),
            "HiPPO-LegS": _with(A=_legs, dt=lambda rng, dt: dt / 2),
            "B much larger than A": _with(B=lambda rng, B: B * 2.0**6),
            "B much smaller than A": _with(B=lambda rng, B: B * 2.0**-15),
            "complex A and B": _with(A=lambda rng, A: A + 1j * rng.standard_normal(A.shape), B=lambda rng, B: B * (1 + 1j)),
            "one system, a step for each channel": lambda rng, *, batch=(), **sizes: (
                _sample(rng, **sizes) | {"dt": rng.uniform(0.8, 2, batch or (3,))}
            ),
            "many systems, one step": lambda rng, *, batch=(), **sizes: (
                _sample(rng, batch=batch or (3,), **sizes) | {"dt": np.asarray(1.0)}
            ),
            "a single column": _with(B=lambda rng, B: B[..., 0]),
            "a single column, many systems": lambda rng, *, batch=(), **sizes: _with(B=lambda rng, B: B[..., 0])(
                rng, batch=batch or (3,), **sizes
            ),
        },
        error_bound=error_bound,
        references=(
            "vanloan1978",
            "zhang2009, section 2",
            "gu2022s4, section 2.3",
            "gu2023mamba, equation (4)",
            "higham2008, section 10.3",
        ),
        lengths=(),
        sizes=({"n": 1, "m": 1}, {"n": 5, "m": 5}, {"n": 1, "m": 3}, {"n": 12}, {"batch": (2,)}, {"batch": (2, 3)}),
        laws=(linear_in_b(CONTRACT), time_scale(CONTRACT), small_step(CONTRACT), semigroup(CONTRACT), contraction(CONTRACT)),
    ),
)
