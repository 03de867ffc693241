"""Discretisation of diagonal systems: one number a state, from x' = a x + b u to x_t = ā x_{t-1} + b̄ u_t.

    zoh               ā = e^z,                      b̄ = dt φ(z) b,        φ(z) = (e^z - 1) / z           (1)
    mamba             ā = e^z,                      b̄ = dt b                                             (2)
    bilinear          ā = (1 + z/2) / (1 - z/2),    b̄ = dt b / (1 - z/2)                                 (3)
    backward_euler    ā = 1 / (1 - z),              b̄ = dt b / (1 - z)                                   (4)
    euler             ā = 1 + z,                    b̄ = dt b,             z = dt a throughout            (5)

What `discretize` does to matrices, for S4D, S5 and Mamba, whose A is diagonal: everything is elementwise, and arrays
of any shapes that broadcast will do. The one subtle thing is φ. Written as a⁻¹ (e^z - 1) b it subtracts two numbers
that agree in all but the last digits when a step is short, and divides 0 by 0 at a = 0; computed by expm1 it is right
to the last bits everywhere [3]. Short steps are not rare: S4's start at dt = 0.001.

Glossary
    a, b     continuous system           the diagonal of A, and B, in [1, section 3]
    dt       step                        Δ
    ā, b̄     discrete system, `A_bar`, `B_bar`

Where implementations differ
    b̄: exact hold (1) in S4D and S5, dt·b (2) in every Mamba code, whose paper prints (1) [2, equation (4)].
    Complex systems that keep one of each conjugate pair are discretised like any other; doubling the real part is up
    to the one who runs them (`ssm`, pairs=True).

References
    [1] A. Gu, A. Gupta, K. Goel and C. Ré, "On the parameterization and initialization of diagonal state space models",
        NeurIPS 2022, section 3.
    [2] A. Gu and T. Dao, "Mamba", 2023, section 2, equation (4).
    [3] N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM, 2002, section 1.14.1.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.linalg import exp_and_phi1, halved, squarings
from refimpl.core.numerics import phi1, phi1_derivative
from refimpl.core.options import one_of
from refimpl.op import Cost, Form, Op
from refimpl.ops.state_space.discretization_laws import contraction, linear_in_b, semigroup, small_step, time_scale
from refimpl.ops.state_space.discretize import IMPLICITNESS, METHODS

CONTRACT = Contract(
    "discretize_diagonal",
    takes="a (...); b (...); dt (...)",
    gives="A_bar (...); B_bar (...)",
)


@CONTRACT.form
def discretize_diagonal(a, b, dt, *, method="zoh"):
    """Discrete system (ā, b̄) of a diagonal continuous one, elementwise, equations (1)-(5).

    Parameters
    ----------
    a : ndarray, shape (...)
        Eigenvalues of the system, real or complex, 0 included.
    b : ndarray, shape (...)
        Input coefficients.
    dt : float or ndarray, shape (...)
        Steps. All three broadcast, as in NumPy: Mamba's are a (c, n), b (..., T, 1, n), dt (..., T, c, 1).
    method : {"zoh", "bilinear", "euler", "backward_euler", "mamba"}
        Which of (1)-(5).

    Returns
    -------
    A_bar, B_bar : ndarray, shape (...)
        Both of the shape to which the three broadcast.

    Raises
    ------
    ValueError, TypeError
        If the shapes do not broadcast, an array is not numeric, or the method is unknown.

    Notes
    -----
    At most 7 operations a number, of which 2 are exponentials. Relative errors are a few u, plus |z| u from rounding z;
    at a pole of (3), (4) the result is infinite, as the equation says.

    References
    ----------
    [1], section 3; and "Where implementations differ" in this module's docstring.

    Examples
    --------
    >>> import numpy as np
    >>> A_bar, B_bar = discretize_diagonal(np.array([-1.0, 0.0]), np.ones(2), np.log(2.0))
    >>> A_bar.round(12).tolist(), B_bar.round(4).tolist()
    ([0.5, 1.0], [0.5, 0.6931])
    >>> discretize_diagonal(-1.0, 1.0, 1e-20)[1].item()
    1e-20
    """
    one_of("discretize_diagonal", "method", method, METHODS)
    z, b, dt = _together(a, b, dt)
    if method == "zoh":
        A_bar, B_bar = np.exp(z), dt * phi1(z) * b
    elif method == "mamba":
        A_bar, B_bar = np.exp(z), dt * b
    else:
        alpha = IMPLICITNESS[method]
        A_bar, B_bar = (1 + (1 - alpha) * z) / (1 - alpha * z), dt * b / (1 - alpha * z)
    return A_bar[..., 0], B_bar[..., 0]


@CONTRACT.form
def discretize_diagonal_doubling(a, b, dt, *, method="zoh"):
    """The same, a hold by its law and the others by the resolvent: `discretize`'s form "doubling" for one state.

    Start with a step so short that a few terms of a series are exact, and double it: (ā, b̄)∘(ā, b̄) = (ā², ā b̄ + b̄).
    No cancellation, because b̄ comes from the series and not from ā - 1. For (3) and (4), r = 1 / (1 - αz) gives
    ā = (r - (1-α)) / α. 28 + 3 log2 |z| operations.
    """
    one_of("discretize_diagonal", "method", method, METHODS)
    z, b, dt = _together(a, b, dt)
    if method in ("zoh", "mamba"):
        short = z[..., None, None]  # a matrix of one row
        levels = squarings(short)
        A_bar, phi = (x[..., 0, 0] for x in exp_and_phi1(halved(short, levels)))
        B_bar = phi * halved((dt * b)[..., None, None], levels)[..., 0, 0]
        for j in range(levels.max(initial=0)):
            again = np.where(j < levels, A_bar, np.zeros_like(A_bar))
            A_bar, B_bar = np.where(j < levels, again * again, A_bar), again * B_bar + B_bar
        B_bar = dt * b if method == "mamba" else B_bar
    elif method == "euler":
        A_bar, B_bar = 1 + z, dt * b
    else:
        alpha = IMPLICITNESS[method]
        resolvent = 1 / (1 - alpha * z)
        A_bar, B_bar = (resolvent - (1 - alpha)) / alpha, resolvent * (dt * b)
    return A_bar[..., 0], B_bar[..., 0]


@CONTRACT.gradient
def discretize_diagonal_vjp(dy, a, b, dt, *, method="zoh"):
    """Gradient of `discretize_diagonal`, with dā/dz = e^z, φ'(z) = (e^z - φ(z)) / z for a hold, and for (3)-(5)

        dā/dz = 1 / (1 - αz)²,    db̄/dz = α dt b / (1 - αz)²

    Parameters
    ----------
    dy : tuple of ndarray
        Cotangents of A_bar and B_bar; None is zero.

    Returns
    -------
    dict
        "a", "b", "dt"; axes along which they were broadcast are summed.
    """
    one_of("discretize_diagonal", "method", method, METHODS)
    if not isinstance(dy, tuple) or len(dy) != 2:
        raise ValueError(f"discretize_diagonal: dy must be a tuple (dA_bar, dB_bar), got {type(dy).__name__}")
    dA_bar, dB_bar = (x[..., None] for x in dy)
    a = a[..., None]
    z, b, dt = _together(a[..., 0], b, dt)
    if method in ("zoh", "mamba"):
        exact = method == "zoh"
        dA_dz = np.exp(z)
        gain, gain_dz = (phi1(z), phi1_derivative(z)) if exact else (np.ones_like(z), np.zeros_like(z))  # b̄ = dt·gain·b
    else:
        alpha = IMPLICITNESS[method]
        gain = 1 / (1 - alpha * z)
        dA_dz, gain_dz = gain * gain, alpha * gain * gain
    dz = np.conj(dA_dz) * dA_bar + np.conj(dt * b * gain_dz) * dB_bar
    gradients = {"a": np.conj(dt) * dz, "b": np.conj(dt * gain) * dB_bar, "dt": np.conj(a) * dz + np.conj(b * gain) * dB_bar}
    return {name: g[..., 0] for name, g in gradients.items()}


def error_bound(a, b, dt, *, unit, store=0.0, method="zoh"):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`.

    Rounding z moves e^z by |z| u of it, and dt φ(z) b by at most |dt e^z b| u (|z| u of its slope); the functions and
    products themselves add 8 u, doubling 8 |z| u, or log |z| for b̄. Of 1 + (1-α) z and
    1 - αz the sums of absolute values count [3, section 3.1]. Half-precision operands add `store` in place of u, twice.
    """
    z, b, dt = _together(*map(np.asarray, (a, b, dt)))
    size, scale = abs(z), abs(dt * b)
    roundoff = unit + store / 4
    if method in ("zoh", "mamba"):
        E_A = 8 * (1 + size) * roundoff * abs(np.exp(z))
        E_B = roundoff * scale * ((8 + np.log2(1 + size)) * abs(phi1(z)) + 3 * abs(np.exp(z)) * np.minimum(size, 1 + size / 8))
    else:
        alpha = IMPLICITNESS[method]
        divisor = abs(1 - alpha * z)
        growth = (1 + alpha * size) / divisor  # of a rounding in 1 - αz
        E_A = 4 * roundoff * ((1 + (1 - alpha) * size) / divisor * (1 + growth) + (1 + growth) / divisor)
        E_B = 4 * roundoff * (1 + growth) * scale / divisor
    if method in ("euler", "mamba"):
        E_B = (3 * unit + 2 * store) * scale
    return E_A[..., 0], E_B[..., 0]


# -- what the forms share --------------------------------------------------------------------------------------------


def _together(a, b, dt):
    """z = dt a, b and dt, broadcast; with an axis of 1 at the end, because NumPy makes scalars of 0-d arrays."""
    a, b, dt = np.broadcast_arrays(a[..., None], b[..., None], dt[..., None])
    return dt * a, b, dt


def _sample(rng, *, n=5, batch=()):
    return {
        "a": -rng.uniform(0.3, 2.5, (*batch, n)),
        "b": rng.standard_normal((*batch, n)),
        "dt": rng.uniform(0.4, 1.2, (*batch, n)),
    }


def _with(**changes):
    """A hard call: the sample, with some arrays replaced."""

    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        return call | {name: change(rng, call[name]) for name, change in changes.items()}

    return draw


def _mamba_shapes(rng, *, n=5, batch=(), T=3, c=2):
    return {
        "a": -rng.uniform(0.3, 2.5, (c, n)),
        "b": rng.standard_normal((*batch, T, 1, n)),
        "dt": rng.uniform(0.1, 1.2, (*batch, T, c, 1)),
    }


OPS = (
    Op(
        name="discretize_diagonal",
        summary="(ā, b̄) of x' = ax + bu for a step dt, elementwise and accurate for short steps",
        contract=CONTRACT,
        forms={
            "elementwise": Form(
                discretize_diagonal, lambda n=1, batch=1: Cost(7 * n * batch, 6, 6.125 * n * batch), exact=("work", "depth", "peak")
            ),
            "doubling": Form(discretize_diagonal_doubling, lambda n=1, batch=1: Cost(88 * n * batch, 58, 8.5 * n * batch), on_balls=False),
        },
        gradient=discretize_diagonal_vjp,
        sample=_sample,
        options={"method": METHODS},
        hard={
            "a = 0": _with(a=lambda rng, a: np.where(np.arange(a.shape[-1]) % 2 == 0, 0.0, a)),
            "dt = 0": _with(dt=lambda rng, dt: 0 * dt),
            "short steps": _with(dt=lambda rng, dt: dt * 10.0 ** -rng.integers(1, 12, dt.shape)),
            "steps of a tenth to a thousandth": _with(dt=lambda rng, dt: dt * 10.0 ** -rng.uniform(1, 3, dt.shape)),
            "long steps": _with(dt=lambda rng, dt: 20 * dt),
            "growing": _with(a=lambda rng, a: -a / 4),
            "complex a and b": _with(a=lambda rng, a: a + 3j * rng.standard_normal(a.shape), b=lambda rng, b: b * (1 - 1j)),
            "complex a, short steps": _with(
                a=lambda rng, a: a + 3j * rng.standard_normal(a.shape), dt=lambda rng, dt: dt * 10.0 ** -rng.integers(1, 12, dt.shape)
            ),
            "undamped": _with(a=lambda rng, a: 2j * a, b=lambda rng, b: b + 0j),
            "Mamba's shapes": _mamba_shapes,
            "one step for all": _with(dt=lambda rng, dt: np.asarray(0.3)),
        },
        error_bound=error_bound,
        references=("gu2022s4d, section 3", "gu2023mamba, equation (4)", "higham2002, section 1.14.1"),
        lengths=(),
        sizes=({"n": 1}, {"n": 64}, {"batch": (2,)}, {"batch": (2, 3)}),
        laws=(linear_in_b(CONTRACT), time_scale(CONTRACT), small_step(CONTRACT), semigroup(CONTRACT), contraction(CONTRACT)),
    ),
)
