"""Linear recurrent unit: a diagonal complex recurrence between two dense maps, y = Re(C x) + D u.

    λ = exp(-e^ν + i e^θ),    x_t = λ x_{t-1} + γ (B u_t),    y_t = Re(C x_t) + D u_t,    γ = √(1 - |λ|²)       (1)

What is left of a deep state space model when everything that is not needed is taken away: no discretisation, no HiPPO,
a recurrence whose eigenvalues are parameters. The double exponential keeps |λ| < 1 whatever ν is; γ keeps the state
from growing as |λ| -> 1, where 1 - |λ|² = -expm1(-2 e^ν) is computed without cancellation. All n eigenvalues are given
(no conjugate pairs are implied: the real part is taken once, without a factor of 2).

Glossary
    u, y        input, output, (..., T, c)    [1, equation (6)]
    x           state, complex (..., n)
    nu_log      ν = log(-log |λ|)             ν^log in [1, lemma 3.2]
    theta_log   θ = log of the angle of λ     θ^log in [1]
    gamma       γ itself                      [1, equation (7)]; the paper's code keeps its logarithm
    B, C, D     (n, c) and (c, n) complex, (c,) real

Where implementations differ
    Published code passes log γ as a parameter of its own, initialised at (1); pass gamma=exp(gamma_log), and ν then has
    no gradient through γ. Some ports keep n/2 eigenvalues and double the real part.

References
    [1] A. Orvieto, S. L. Smith, A. Gu et al., "Resurrecting recurrent neural networks for long sequences", ICML 2023,
        sections 3.2-3.4 and appendix A.
    [2] N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM, 2002, sections 3.3, 3.6.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.laws import causal, hand_off, linear, time_invariant
from refimpl.op import Cost, Form, Op
from refimpl.ops.recurrence import linear_recurrence as lr


def _real_where_it_must_be(arguments, sizes):
    for name in ("u", "nu_log", "theta_log", "D", "gamma"):
        if arguments.get(name) is not None and np.iscomplexobj(arguments[name]):
            raise ValueError(f"lru: {name} must be real, got dtype {arguments[name].dtype}")


CONTRACT = Contract(
    "lru",
    takes="u (..., T, c); nu_log (n); theta_log (n); B (n, c); C (c, n); D (c); gamma (n); state (..., n)",
    gives="y (..., T, c)",
    check=_real_where_it_must_be,
)


@CONTRACT.form
def lru(u, nu_log, theta_log, B, C, D, gamma=None, *, state=None, return_state=False):
    """Linear recurrent unit, equation (1), step by step.

    Parameters
    ----------
    u : ndarray, shape (..., T, c)
        Input, real. T may be 0.
    nu_log, theta_log : ndarray, shape (n,)
        ν and θ: logarithms of the decay rate and of the angle of each eigenvalue.
    B, C : ndarray, shape (n, c) and (c, n)
        Input and output maps, complex.
    D : ndarray, shape (c,)
        The direct path, real.
    gamma : ndarray, shape (n,), optional
        Scale of each state's input; √(1 - |λ|²) by default.
    state : ndarray, shape (..., n), optional
        x before the first step, complex; zeros by default.
    return_state : bool
        Also return the last x, to go on from.

    Returns
    -------
    y : ndarray, shape (..., T, c)
        Real.
    state : ndarray, shape (..., n), only with `return_state`
        Complex.

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, an array is not numeric, or u, nu_log, theta_log, D or gamma is complex.

    Notes
    -----
    2 T n (6 c + 5) operations, 2 T deep. The error is that of the recurrence between two products; rounding e^ν and e^θ
    moves λ by e^ν + e^θ roundoffs, which a memory of 1/e^ν steps feels as many times.

    References
    ----------
    [1], section 3; and "Where implementations differ" in this module's docstring.

    Examples
    --------
    >>> import numpy as np
    >>> half = np.log(-np.log([0.5]))  # |λ| = 1/2
    >>> quarter_turn = np.log([np.pi / 2])
    >>> one = np.ones((1, 1))
    >>> y = lru(np.array([[1.0], [0.0], [0.0]]), half, quarter_turn, one, one, np.zeros(1), np.ones(1))
    >>> (y[:, 0] + 0.0).round(12).tolist()  # Re of 1, i/2, -1/4
    [1.0, 0.0, -0.25]
    """
    return _run(lr.linear_recurrence, u, nu_log, theta_log, B, C, D, gamma, state, return_state)


@CONTRACT.form
def lru_scan(u, nu_log, theta_log, B, C, D, gamma=None, *, state=None, return_state=False):
    """The same with the recurrence as a parallel prefix scan, as [1] trains it: 4 log2 T deep.

    λ is constant in time, but a scan needs λ^(2^k) only, which it forms itself.
    """
    return _run(lr.linear_recurrence_blelloch, u, nu_log, theta_log, B, C, D, gamma, state, return_state)


@CONTRACT.form
def lru_convolution(u, nu_log, theta_log, B, C, D, gamma=None, *, state=None, return_state=False):
    """The same with the recurrence as a long convolution with the kernel λ^s, by FFT: possible because λ is constant."""
    return _run(lr.linear_recurrence_convolution, u, nu_log, theta_log, B, C, D, gamma, state, return_state)


def _run(recurrence, u, nu_log, theta_log, B, C, D, gamma, state, return_state):
    lam = _eigenvalues(nu_log, theta_log)  # (n,)
    gamma = _normaliser(nu_log) if gamma is None else gamma
    x, last = recurrence(lam, gamma * (u @ B.T), state=state, return_state=True)  # (..., T, n)
    y = (x @ C.T).real + D * u  # (..., T, c)
    return (y, last) if return_state else y


@CONTRACT.gradient
def lru_vjp(dy, u, nu_log, theta_log, B, C, D, gamma=None, *, state=None, dstate=None):
    """Gradient of `lru`.

    dx = Cᴴ dy enters the adjoint recurrence, which gives dλ and the gradient g of γ B u. Then dB = Σ_t γ g_t u_tᵀ,
    dγ = Σ_t Re(conj(B u_t) g_t), dC = Σ_t dy_t conj(x_t)ᵀ, du = γ Re(Bᴴ g) + D dy; and with w = log λ, dw = conj(λ) dλ,

        dν = -e^ν Re(dw),    dθ = e^θ Im(dw),    and through γ, unless it is given, dν += dγ e^ν |λ|² / γ

    Parameters
    ----------
    dy : ndarray, shape (..., T, c)
        Cotangent of y.
    dstate : ndarray, shape (..., n), optional
        Cotangent of the final state, complex.

    Returns
    -------
    dict
        "u", "nu_log", "theta_log", "B", "C", "D", and "gamma", "state" where they were given.
    """
    lam = _eigenvalues(nu_log, theta_log)
    scale = _normaliser(nu_log) if gamma is None else gamma
    v = np.broadcast_to(u @ B.T, (*dy.shape[:-1], len(lam)))  # (..., T, n), or the recurrence would sum what is missing
    first = np.zeros_like(lam * v[..., :0, :].sum(axis=-2)) if state is None else state
    x = lr.linear_recurrence(lam, scale * v, state=first)
    through = lr.linear_recurrence_vjp(dy @ np.conj(C), lam, scale * v, state=first, dstate=dstate)
    g = through["b"]  # (..., T, n)
    dw = np.conj(lam) * through["a"]  # (n,)
    dgamma = (np.conj(v) * g).real.sum(axis=tuple(range(g.ndim - 1)))  # (n,)
    dnu = -np.exp(nu_log) * dw.real
    if gamma is None:
        still = scale == 0  # e^ν underflows, and the slope e^ν |λ|² / γ with it
        slope = np.exp(nu_log - 2 * np.exp(nu_log)) / np.where(still, np.ones_like(scale), scale)
        dnu = dnu + np.where(still, np.zeros_like(scale), slope) * dgamma
    return {
        "u": ((scale * g) @ np.conj(B)).real + D * dy,
        "nu_log": dnu,
        "theta_log": np.exp(theta_log) * dw.imag,
        "B": np.swapaxes(scale * g, -1, -2) @ u,
        "C": np.swapaxes(dy, -1, -2) @ np.conj(x),
        "D": u * dy,
        "gamma": dgamma,
        "state": through["state"],
    }


def error_bound(u, nu_log, theta_log, B, C, D, gamma=None, *, unit, store=0.0, state=None, return_state=False):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`.

    Sums of products over c and n in any order, complex: (c + 6) u and (2 + n + 6) u of the absolute values
    [2, section 3.6]; the recurrence's own bound between them. λ is off by 2 (3 + (2 + |ν|) e^ν + (2 + |θ|) e^θ) u of
    itself, an exponential of x, done as a power of 2, by (2 + |x|) u; γ by its error in the square over γ, where the
    square may be a difference. Operands and states kept in a half precision add `store`, twice each.
    """
    nu, theta = np.exp(nu_log), np.exp(theta_log)
    size = np.exp(-nu)  # |λ|
    dlam = 2 * unit * (3 + (2 + abs(nu_log)) * nu + (2 + abs(theta_log)) * theta) * size
    g, dg = (_normaliser(nu_log), None) if gamma is None else (abs(gamma), 0 * gamma)
    if dg is None:
        of_square = unit * (2 + 4 * size * size * (1 + (2 + abs(nu_log)) * nu))
        dg = np.minimum(of_square / np.where(g > 0, g, 1), np.sqrt(of_square)) + 2 * unit * g
    v = abs(u) @ abs(B).T  # (..., T, n)
    first = None if state is None else abs(state)
    H, last = lr.linear_recurrence(size, g * v, state=first, return_state=True)
    start = np.zeros_like(last) if first is None else np.broadcast_to(first, last.shape)
    before = np.concatenate([start[..., None, :], H], axis=-2)[..., :-1, :]  # (..., T, n)
    rounding = (unit * (B.shape[1] + 6) + 2 * store) * g * v
    given = lr.linear_recurrence(size, dlam * before + dg * v + rounding, return_state=True)
    own = lr.error_bound(size, g * v, unit=unit, store=store, state=first, return_state=True)
    E, E_last = (x + y for x, y in zip(given, own, strict=True))
    E = E @ abs(C).T + (unit * (C.shape[1] + 8) + 2 * store) * (H @ abs(C).T + abs(D * u))
    return (E, E_last) if return_state else E


# -- what the forms share --------------------------------------------------------------------------------------------


def _eigenvalues(nu_log, theta_log):
    """λ, inside the unit circle for every ν."""
    return np.exp(-np.exp(nu_log) + 1j * np.exp(theta_log))


def _normaliser(nu_log):
    """√(1 - |λ|²), |λ|² = e^(-2 e^ν), right to the last bits also where |λ| is close to 1."""
    return np.sqrt(-np.expm1(-2 * np.exp(nu_log)))


def _sample(rng, *, T=7, c=3, n=4, batch=()):
    size = rng.uniform(0.5, 0.95, n)
    return {
        "u": rng.standard_normal((*batch, T, c)),
        "nu_log": np.log(-np.log(size)),
        "theta_log": np.log(rng.uniform(0.2, 3, n)),
        "B": (rng.standard_normal((n, c)) + 1j * rng.standard_normal((n, c))) / np.sqrt(2 * c),
        "C": (rng.standard_normal((c, n)) + 1j * rng.standard_normal((c, n))) / np.sqrt(n),
        "D": rng.standard_normal(c),
        "gamma": rng.uniform(0.2, 1.5, n),
        "state": rng.standard_normal((*batch, n)) + 1j * rng.standard_normal((*batch, n)),
    }


def _with(**changes):
    """A hard call: the sample, with some arrays replaced."""

    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        return call | {name: change(rng, call[name]) for name, change in changes.items()}

    return draw


def _cost(each, depth, alive):
    return lambda T, c, n, batch=1: Cost(
        (12 * T * n * c + each(T) * T * n + 2 * T * c) * batch + 14 * n, depth(T) + log2_ceil(n), max(alive * n, 4 * c + 2 * n) * T * batch
    )


OPS = (
    Op(
        name="lru",
        summary="x_t = λ x_{t-1} + γ B u_t, y_t = Re(C x_t) + D u_t with λ = exp(-e^ν + i e^θ)",
        contract=CONTRACT,
        forms={
            "recurrent": Form(lru, _cost(lambda T: 10, lambda T: 2 * T + 6, 7), exact=("work",)),
            "scan": Form(lru_scan, _cost(lambda T: 30, lambda T: 4 * log2_ceil(T) + 4, 14)),
            "convolution": Form(
                lru_convolution,
                _cost(lambda T: 30 * log2_ceil(T) + 75, lambda T: 4 * log2_ceil(T) + 13, 16),
                on_balls=False,
                stops="non-finite data: a transform spreads its largest value over all",
            ),
        },
        gradient=lru_vjp,
        sample=_sample,
        hard={
            "long memory": _with(nu_log=lambda rng, v: np.log(-np.log(1 - 2.0 ** -rng.integers(6, 12, v.shape)))),
            "no memory": _with(nu_log=lambda rng, v: v + 4),
            "hardly any decay": _with(nu_log=lambda rng, v: v * 0 - 9),
            "no rotation": _with(theta_log=lambda rng, v: v * 0 - 200),
            "alternating": _with(theta_log=lambda rng, v: v * 0 + np.log(np.pi)),
            "one needle": _with(u=lambda rng, u: u * (np.arange(u.shape[-2]) == u.shape[-2] // 3)[:, None], state=lambda rng, s: s * 0),
            "a common offset": _with(u=lambda rng, u: u + 100),
            "real maps": _with(B=lambda rng, B: B.real, C=lambda rng, C: C.real),
        },
        error_bound=error_bound,
        references=("orvieto2023, section 3", "higham2002, section 3.6"),
        sizes=({"c": 1}, {"n": 1}, {"c": 1, "n": 1}, {"c": 64, "n": 5}, {"n": 33}, {"batch": (2,)}, {"batch": (2, 3)}),
        laws=(causal(CONTRACT, "u"), linear(CONTRACT, "u", "state"), hand_off(CONTRACT), time_invariant(CONTRACT, "u")),
    ),
)
