"""State space model: a linear system with n states for every channel, y = Re(C x) + D u.

    x_t = Ā x_{t-1} + B̄ u_t,        x_{-1} = state, 0 if none is given                                    (1)
    y_t = factor · Re(C x_t) + D u_t,        factor = 1, or 2 with `pairs`                                 (2)

The recurrence of S4, S4D and S5, after `discretize`. One function, and the part of the book where its lives meet:

    recurrence     (1) as it stands: n numbers of memory, a step at a time. How a model is run.
    convolution    unrolled, x_t = Σ_s Ā^s B̄ u_{t-s}: a filter as long as the sequence, y = K * u + D u with the
                   K_s = Re(C Ā^s B̄) of `ssm_kernel`, and fast transforms. How S4 is trained [1, section 2.4].
    scan           steps compose, so all prefixes come in log2 T rounds. How S5 is trained [2, section 2.2].
    matrix         y = M u with the Toeplitz matrix M_ts = K_{t-s} below the diagonal.

The convolution needs Ā, B̄ and C to be constant in time. The scan only needs them not to depend on x: that much
`selective_scan` keeps, and with it the scan. And the matrix of a system whose steps change with the input is no longer
Toeplitz but still of low rank below the diagonal: that is `ssd`.

Glossary
    u, y           input, output, (..., T, c)              u, y in [1]
    x, state       states, (..., c, n)                     x
    A_bar, B_bar   discrete system, from `discretize`      Ā, B̄
    C, D           output map, skip connection             C, D
    pairs          one of each conjugate pair is given     "2 Re" in the code of [3]

Where implementations differ
    Textbooks and `scipy.signal.dlsim` read before they write, y_t = C x_t + D u_t, x_{t+1} = Ā x_t + B̄ u_t; here, as in
    all of these models, step t's output includes step t's input. Whoever has the other kind passes C Ā for C and
    D + C B̄ for D. S4D and S5 keep half the states of a real system and double the real part: pairs=True. Nothing is
    conjugated here; where C is stored as its conjugate, say so to C.

References
    [1] A. Gu, K. Goel and C. Ré, "Efficiently modeling long sequences with structured state spaces", ICLR 2022,
        sections 2.3-2.4, equations (3)-(5).
    [2] J. T. H. Smith, A. Warrington and S. W. Linderman, "Simplified state space layers for sequence modeling",
        ICLR 2023, section 2.2 and appendix H.
    [3] A. Gu, A. Gupta, K. Goel and C. Ré, "On the parameterization and initialization of diagonal state space models",
        NeurIPS 2022, section 3.
    [4] N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM, 2002, sections 3.3, 24.1.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import fft_depth, fft_work, log2_ceil
from refimpl.core.options import one_of
from refimpl.laws import causal, hand_off, linear, time_invariant
from refimpl.op import Cost, Form, Law, Op
from refimpl.ops.recurrence.long_conv import long_conv_fft
from refimpl.ops.state_space import ssm_system
from refimpl.ops.state_space.ssm_bound import bound
from refimpl.ops.state_space.ssm_system import SYSTEM, adjoint_states, applied, gradient_of_matrix, observed, orbit, squared


def _check(arguments, sizes):
    """What shapes cannot say."""
    for name in ("u", "D"):
        if arguments.get(name) is not None and np.iscomplexobj(arguments[name]):
            raise TypeError(f"ssm: {name} must be real, got dtype {arguments[name].dtype}")
    one_of("ssm", "pairs", arguments.get("pairs", False), (False, True))


CONTRACT = Contract("ssm", takes=f"u (..., T, c); {SYSTEM}; D (1) | (c); state (..., c, n)", gives="y (..., T, c)", check=_check)


@CONTRACT.form
def ssm(u, A_bar, B_bar, C, D=None, *, pairs=False, state=None, return_state=False):
    """State space model, equations (1) and (2), one step at a time.

    Parameters
    ----------
    u : ndarray, shape (..., T, c)
        Input, real. T may be 0.
    A_bar : ndarray, shape (c, n) or (c, n, n)
        Discrete state matrix of each channel, diagonal or dense; here and below a first axis of 1 is shared.
    B_bar, C : ndarray, shape (c, n)
        Input and output map; all three real or complex.
    D : ndarray, shape (c,), optional
        Skip connection, real.
    pairs : bool
        Whether one of each conjugate pair of states is given: then y takes twice the real part.
    state : ndarray, shape (..., c, n), optional
        x before the first step; 0 by default.
    return_state : bool
        Also return the last x, to go on from.

    Returns
    -------
    y : ndarray, shape (..., T, c)
        Real.
    state : ndarray, shape (..., c, n), only with `return_state`
        Complex where A_bar, B_bar or the state before is.

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, an array is not numeric, or u or D is complex.

    Notes
    -----
    Complex: 18 T c n operations, and 8 T c n² in place of 6 T c n of them for a dense matrix; 2 T deep. The error is at
    most ``error_bound``: what has travelled l steps is off by a few l u.

    Examples
    --------
    A quarter turn a step, seen from the side; with its conjugate, both halves of a real oscillator:

    >>> import numpy as np
    >>> u, one = np.array([[1.0], [0.0], [0.0], [0.0]]), np.ones((1, 1))
    >>> ssm(u, np.array([[1j]]), one, one)[:, 0].tolist()
    [1.0, 0.0, -1.0, 0.0]
    >>> ssm(u, np.array([[1j]]), one, one, pairs=True)[:, 0].tolist()
    [2.0, 0.0, -2.0, 0.0]
    """
    x = _first(u, A_bar, B_bar, C, state)
    ys = []
    for t in range(u.shape[-2]):
        x = applied(A_bar, x) + B_bar * u[..., t, :, None]  # (..., c, n)
        ys.append((C * x).sum(axis=-1))  # (..., c)
    y = observed(np.stack(ys, axis=-2), pairs) if ys else _nothing(u, x)
    return (_with_skip(y, u, D), x) if return_state else _with_skip(y, u, D)


@CONTRACT.form
def ssm_convolution(u, A_bar, B_bar, C, D=None, *, pairs=False, state=None, return_state=False):
    """The same as a long convolution with the kernel of `ssm_kernel`, by transforms: Ā, B̄ and C are constant in time.

    O(T log T) operations a channel once the kernel is there, log T deep. An initial state x is one more impulse, Ā x in
    place of B̄, whose answer is added; and the last state is a sum of the same powers, last first. The error is relative
    to the largest outputs of a channel, not to each.
    """
    x, T = _first(u, A_bar, B_bar, C, state), u.shape[-2]
    answers = orbit(A_bar, B_bar, T)  # Ā^k B̄: (T, c, n)
    kernel = observed((C * answers).sum(axis=-1), pairs)  # (T, c)
    y = long_conv_fft(u, np.broadcast_to(kernel, (T, u.shape[-1])))
    free = orbit(A_bar, applied(A_bar, x), T)  # Ā^(t+1) x: (..., T, c, n)
    if state is not None:
        y = y + observed((C * free).sum(axis=-1), pairs)
    y = _with_skip(y, u, D)
    if not return_state:
        return y
    return y, (answers[::-1] * u[..., None]).sum(axis=-3) + free[..., -1, :, :] if T else x


@CONTRACT.form
def ssm_scan(u, A_bar, B_bar, C, D=None, *, pairs=False, state=None, return_state=False):
    """The same by doubling: after round r every x_t is the sum over the 2^r inputs up to t, and Ā^(2^r) brings the rest.

    log2 T rounds over the whole array, 8 T c n log2 T operations, and T c n states of memory. That is the scan of Hillis
    and Steele (`linear_recurrence`); as Ā is constant, one power serves all positions of a round, so that it does for
    dense matrices, whose products a scan of steps would have to form at every position [2, section 2.2].
    """
    x, T = _first(u, A_bar, B_bar, C, state), u.shape[-2]
    if T == 0:
        y = _with_skip(_nothing(u, x), u, D)
        return (y, x) if return_state else y
    xs = B_bar * u[..., None] + np.zeros_like(x)[..., None, :, :]  # (..., T, c, n)
    xs = np.concatenate([xs[..., :1, :, :] + applied(A_bar, x)[..., None, :, :], xs[..., 1:, :, :]], axis=-3)
    reach, power = 1, A_bar
    while reach < T:
        further = xs[..., reach:, :, :] + applied(power, xs[..., :-reach, :, :])
        xs = np.concatenate([xs[..., :reach, :, :], further], axis=-3)
        reach, power = 2 * reach, squared(power)
    y = _with_skip(observed((C * xs).sum(axis=-1), pairs), u, D)
    return (y, xs[..., -1, :, :]) if return_state else y


@CONTRACT.gradient
def ssm_vjp(dy, u, A_bar, B_bar, C, D=None, *, pairs=False, state=None, dstate=None):
    """Gradient of `ssm`: the adjoint system, with Āᴴ, conj(C) and conj(B̄) for Ā, B̄ and C, run backwards in time.

        g_t = factor·conj(C) dy_t + Āᴴ g_{t+1},          g_{T-1} also takes dstate                         (3)
        du_t = Re Σ_n conj(B̄) g_t + D dy_t,              dD = Σ_t dy_t u_t,         dB̄ = Σ_t g_t u_t
        dC = factor Σ_t dy_t conj(x_t),                  dĀ = Σ_t g_t x_{t-1}ᴴ,     dstate_in = Āᴴ g_0

    For a diagonal Ā only the diagonal of g x ᴴ is taken. The adjoint of a filter being the filter backwards, (3) could be
    a convolution as well.

    Parameters
    ----------
    dy : ndarray, shape (..., T, c)
        Cotangent of y.
    dstate : ndarray, shape (..., c, n), optional
        Cotangent of the final state.

    Returns
    -------
    dict
        "u", "A_bar", "B_bar", "C", and "D", "state" where they were given. Sums over time and batch axes.
    """
    x = _first(u, A_bar, B_bar, C, state)
    last = np.zeros_like(C * x) if dstate is None else np.broadcast_to(dstate, x.shape)
    g, at_start = adjoint_states(A_bar, C, np.broadcast_to(dy, (*x.shape[:-2], *dy.shape[-2:])), last, pairs)  # (..., T, c, n)
    xs = [x]
    for t in range(u.shape[-2]):
        xs.append(applied(A_bar, xs[-1]) + B_bar * u[..., t, :, None])
    states = np.stack(xs, axis=-3)  # (..., T + 1, c, n), the initial one first
    du = (np.conj(B_bar) * g).real.sum(axis=-1)
    return {
        "u": du if D is None else du + D * dy,
        "A_bar": gradient_of_matrix(A_bar, g, states[..., :-1, :, :]).sum(axis=-3 if A_bar.ndim == 2 else -4),
        "B_bar": (g * u[..., None]).sum(axis=-3),
        "C": ((2 if pairs else 1) * dy[..., None] * np.conj(states[..., 1:, :, :])).sum(axis=-3),
        "D": dy * u,
        "state": at_start,
    }


@CONTRACT.form
def error_bound(u, A_bar, B_bar, C, D=None, *, unit, store=0.0, pairs=False, state=None, return_state=False):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`: `ssm_bound` derives it.

    `store` allows for operands kept in a half precision, for the carry of every 64 steps and for what transforms keep;
    not for rounding the state at every step.
    """
    x = _first(u, A_bar, B_bar, C, state)
    u = np.broadcast_to(u, (*x.shape[:-2], *u.shape[-2:]))
    off_y, off_state = bound(u, A_bar, B_bar, C, D, x, pairs=pairs, transformed=True, unit=unit, store=store)
    return (off_y, off_state) if return_state else off_y


# -- what the forms share --------------------------------------------------------------------------------------------


def _first(u, A_bar, B_bar, C, state):
    """The state before the first step, with all batch axes: real only if everything that makes it is."""
    batch = np.broadcast_shapes(u.shape[:-2], () if state is None else state.shape[:-2])
    shape = (*batch, u.shape[-1], C.shape[-1])
    zero = np.zeros_like(applied(A_bar, B_bar), shape=shape)
    return zero if state is None else zero + state


def _nothing(u, x):
    """No rows of y."""
    return np.zeros_like(x.real, shape=(*x.shape[:-2], 0, u.shape[-1]))


def _with_skip(y, u, D):
    return y if D is None else y + D * u


# -- laws ------------------------------------------------------------------------------------------------------------


def _pairs_count_twice(f, call, bound, rng):
    """With `pairs` the states count twice, the skip connection does not; and the states themselves are the same."""
    D = 0 if call.get("D") is None else call["D"] * call["u"]
    call = {n: v for n, v in call.items() if n not in ("pairs", "return_state")}
    y, x = f(**call, return_state=True)
    twice, same = f(**call, pairs=True, return_state=True)
    limit, limit_x = bound(**call, pairs=True, return_state=True)
    yield "y of pairs", twice - D, 2 * (y - D), 3 * limit
    yield "state of pairs", same, x, 2 * limit_x


def _other_basis(f, call, bound, rng):
    """Names of states do not matter: in the basis S⁻¹ x, with S⁻¹ Ā S, S⁻¹ B̄ and C S, y is the same (powers of 2: exactly)."""
    n = call["C"].shape[-1]
    S = (2.0 ** (np.arange(n) % 5 - 2)).astype(call["u"].dtype)
    call = {**call, "return_state": True}
    other = {**call, "B_bar": call["B_bar"] / S, "C": call["C"] * S}
    if call["A_bar"].ndim == 3:
        other["A_bar"] = call["A_bar"] / S[:, None] * S
    if call.get("state") is not None:
        other["state"] = call["state"] / S
    (y, x), (same, changed) = f(**call), f(**other)
    limits = bound(**call), bound(**other)
    yield "y in another basis", same, y, limits[0][0] + limits[1][0]
    yield "state in another basis", changed * S, x, limits[0][1] + limits[1][1] * S


# -- the catalogue ---------------------------------------------------------------------------------------------------


def _sample(rng, *, T=7, c=3, n=4, dense=False, shared=False, batch=()):
    arrays = {"u": rng.standard_normal((*batch, T, c))} | ssm_system.drawn(rng, c=c, n=n, dense=dense, shared=shared)
    state = rng.standard_normal((*batch, c, n)) + 1j * rng.standard_normal((*batch, c, n))
    return arrays | {"D": rng.uniform(0.5, 1.5, c) * rng.choice([-1, 1], c), "state": state}


def _with(*, dense=False, **changes):
    """A hard call: the sample, with some arrays replaced."""

    def draw(rng, **sizes):
        call = _sample(rng, **{"dense": dense, **sizes})
        return call | {name: change(rng, call[name]) for name, change in changes.items()}

    return draw


def _real(rng, v):
    return v.real.copy()


def _delays(rng, A):
    """The shift by one place: states are the last n inputs."""
    return np.broadcast_to(np.eye(A.shape[-1], k=-1), A.shape)


def _jordan(rng, A):
    """One eigenvalue in a single block: powers grow before they fall."""
    return np.broadcast_to(0.75 * np.eye(A.shape[-1]) + 0.5 * np.eye(A.shape[-1], k=1), A.shape)


def _cost(work, depth, peak):
    def cost(T, c, n, batch=1, dense=False, **_):
        step = 8 * n * n if dense else 6 * n
        return Cost(work(T, n, step) * c * batch, depth(T, n), peak(T, n) * c * batch)

    return cost


OPS = (
    Op(
        name="ssm",
        summary="x_t = Ā x_{t-1} + B̄ u_t, y_t = Re(C x_t) + D u_t: a linear system for each channel",
        contract=CONTRACT,
        forms={
            "recurrent": Form(
                ssm,
                _cost(
                    lambda T, n, step: T * (step + 12 * n - 2) + 6 * n, lambda T, n: 2 * T + log2_ceil(n) + 1, lambda T, n: 3 * T + 6 * n
                ),
            ),
            "convolution": Form(
                ssm_convolution,
                _cost(
                    lambda T, n, step: 2 * T * (step + 9 * n) + 3 * fft_work(2 * T) + 9 * T,
                    lambda T, n: 2 * fft_depth(2 * T) + 3 * log2_ceil(T) + log2_ceil(n) + 4,
                    lambda T, n: 8 * T * n + 9 * T,
                ),
                on_balls=False,
                stops="|Ā| > 1 and non-finite data: a transform spreads its largest value over all",
            ),
            "scan": Form(
                ssm_scan,
                _cost(
                    lambda T, n, step: T * ((step + 2 * n) * max(1, log2_ceil(T)) + 12 * n + 2),
                    lambda T, n: 3 * log2_ceil(T) + log2_ceil(n) + 5,
                    lambda T, n: 6 * T * n + 2 * T,
                ),
                stops="|Ā| > 1: powers may overflow where x does not",
            ),
        },
        gradient=ssm_vjp,
        sample=_sample,
        options={"pairs": (False, True)},
        hard={
            "a real system": _with(A_bar=_real, B_bar=_real, C=_real, state=_real),
            "a real dense system": _with(dense=True, A_bar=_real, B_bar=_real, C=_real, state=_real),
            "on the unit circle": _with(A_bar=lambda rng, A: ssm_system.of_norm_one(A)),
            "integrators": _with(A_bar=lambda rng, A: np.ones_like(A)),
            "maps of one for all": _with(B_bar=lambda rng, B: B[:1], C=lambda rng, C: C[:1]),
            "nothing stays": _with(A_bar=lambda rng, A: np.where(rng.random(A.shape) < 0.5, 0, A)),
            "slightly unstable": _with(A_bar=lambda rng, A: ssm_system.of_norm_one(A) * (1 + 2.0**-9)),
            "delays": _with(dense=True, A_bar=_delays),
            "a Jordan block": _with(dense=True, A_bar=_jordan),
            "one needle": _with(u=lambda rng, u: u * (np.arange(u.shape[-2]) == u.shape[-2] // 3)[:, None], state=lambda rng, s: 0 * s),
            "large state": _with(state=lambda rng, s: 1e4 * s),
        },
        error_bound=error_bound,
        references=("gu2022s4, sections 2.3-2.4", "smith2023, section 2.2", "gu2022s4d, section 3", "higham2002, section 24.1"),
        sizes=(
            {"c": 1, "n": 1},
            {"dense": True},
            {"dense": True, "shared": True, "n": 3, "batch": (2,)},
            {"dense": True, "n": 12},
            {"shared": True},
            {"c": 20, "n": 17},
            {"batch": (2, 3)},
        ),
        laws=(
            causal(CONTRACT, "u"),
            linear(CONTRACT, "u", "state"),
            hand_off(CONTRACT),
            time_invariant(CONTRACT, "u"),
            Law("conjugate_pairs", _pairs_count_twice, ("u",)),
            Law("other_basis", _other_basis, ("B_bar", "C")),
        ),
    ),
)
