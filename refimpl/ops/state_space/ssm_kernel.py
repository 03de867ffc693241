"""The convolution kernel of a state space model: K_k = Re(C Ā^k B̄), its answer to a single 1.

    K_k = factor · Re(C Ā^k B̄),        k = 0 ... L-1,        factor = 1, or 2 with `pairs`                (1)

A linear time-invariant system, x_t = Ā x_{t-1} + B̄ u_t, y_t = Re(C x_t), forgets where it stands in time, so what it
answers to one impulse says all about it: y = K * u [1, equation (5)]. To train on whole sequences, one needs K; to have
K, one needs L powers of Ā. A dense Ā costs n² operations a power. In a diagonal one they are powers of numbers, and K is
a product with a Vandermonde matrix [2, section 3.2]:

    K_k = factor · Re Σ_n V_kn (C_n B̄_n),        V_kn = Ā_n^k                                            (2)

Glossary
    A_bar, B_bar   discrete system, from `discretize`      Ā, B̄
    C              output map                              C
    length         L, rows of the kernel                   L
    pairs          one of each conjugate pair is given     "2 Re" in the code of [2]

Where implementations differ
    S4 trains C̃ = C (I - Ā^L) in place of C, the truncation being a term of its transform; here C is C. S4D gives one of
    each conjugate pair and doubles the real part: pairs=True. Some kernels have time last, (c, L).

References
    [1] A. Gu, K. Goel and C. Ré, "Efficiently modeling long sequences with structured state spaces", ICLR 2022,
        section 2.4, equations (4)-(5).
    [2] A. Gu, A. Gupta, K. Goel and C. Ré, "On the parameterization and initialization of diagonal state space models",
        NeurIPS 2022, section 3.2.
    [3] N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM, 2002, section 3.3.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.options import one_of
from refimpl.laws import linear
from refimpl.op import Cost, Form, Law, Op
from refimpl.ops.state_space import ssm_system
from refimpl.ops.state_space.ssm_bound import bound
from refimpl.ops.state_space.ssm_system import SYSTEM, adjoint_states, applied, gradient_of_matrix, observed, orbit


def _check(arguments, sizes):
    """Options that are not there, because only shapes or precision are asked about, are not looked at."""
    if "length" in arguments:
        length = arguments["length"]
        if isinstance(length, bool) or not isinstance(length, int | np.integer) or length < 0:
            raise ValueError(f"ssm_kernel: length must be an integer of at least 0, got {length!r}")
        sizes["L"] = int(length)
    sizes.setdefault("c", 1)
    one_of("ssm_kernel", "pairs", arguments.get("pairs", False), (False, True))


CONTRACT = Contract("ssm_kernel", takes=SYSTEM, gives="K (L, c)", check=_check)


@CONTRACT.form
def ssm_kernel(A_bar, B_bar, C, length, *, pairs=False):
    """Kernel of a state space model, equation (1), one power at a time.

    Parameters
    ----------
    A_bar : ndarray, shape (c, n) or (c, n, n)
        Discrete state matrix of each channel, diagonal or dense; here and below a first axis of 1 is shared.
    B_bar, C : ndarray, shape (c, n)
        Input and output map. All three real or complex.
    length : int
        Rows of the kernel.
    pairs : bool
        Whether one of each conjugate pair of states is given: then the kernel is twice the real part.

    Returns
    -------
    K : ndarray, shape (length, c)
        Real.

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, an array is not numeric, or `length` is not an integer of at least 0.

    Notes
    -----
    Complex: 14 L c n operations, and 8 L c n² for a dense matrix. K_k is off by a few k u of Σ |C Ā^k B̄|.

    Examples
    --------
    Half of what is there stays at every step:

    >>> import numpy as np
    >>> ssm_kernel(np.array([[0.5]]), np.array([[1.0]]), np.array([[3.0]]), 4)[:, 0]
    array([3.   , 1.5  , 0.75 , 0.375])
    """
    x, rows = B_bar + np.zeros_like(C * applied(A_bar, B_bar)), []  # (c, n)
    for _ in range(length):
        rows.append((C * x).sum(axis=-1))  # (c,)
        x = applied(A_bar, x)
    return observed(np.stack(rows), pairs) if rows else _no_row(A_bar, B_bar, C)


@CONTRACT.form
def ssm_kernel_vandermonde(A_bar, B_bar, C, length, *, pairs=False):
    """The same for a diagonal Ā by (2): a matrix of powers of the eigenvalues, times C B̄.

    Powers come by doubling, V_{k + 2^j} = V_k Ā^(2^j): log2 L rounds and L c n products; the rest is one product of
    matrices. Kernels form V as exp(k log Ā), which takes an exponential a number [2, section 3.2].
    """
    if A_bar.ndim != 2:
        raise ValueError(f"ssm_kernel: the form 'vandermonde' needs a diagonal A_bar, (c, n), got shape {A_bar.shape}")
    V = orbit(A_bar, np.ones_like(A_bar), length)  # (L, c, n)
    return observed((V * (C * B_bar)).sum(axis=-1), pairs) if length else _no_row(A_bar, B_bar, C)


@CONTRACT.gradient
def ssm_kernel_vjp(dy, A_bar, B_bar, C, length, *, pairs=False):
    """Gradient of `ssm_kernel`: that of `ssm` for an input of a single 1. With x_k = Ā^k B̄, backwards,

        g_k = factor·conj(C) dK_k + Āᴴ g_{k+1},    dB̄ = g_0,    dC = factor Σ_k dK_k conj(x_k),    dĀ = Σ_{k>=1} g_k x_{k-1}ᴴ

    Parameters
    ----------
    dy : ndarray, shape (length, c)
        Cotangent of K.

    Returns
    -------
    dict
        "A_bar", "B_bar", "C".
    """
    none = np.zeros_like(C * applied(A_bar, B_bar))  # (c, n)
    x = orbit(A_bar, B_bar + none, length)  # (L, c, n)
    g, _ = adjoint_states(A_bar, C, dy, none, pairs)  # (L, c, n)
    return {
        "A_bar": gradient_of_matrix(A_bar, g[1:], x[:-1]).sum(axis=0),
        "B_bar": g[:1].sum(axis=0),
        "C": ((2 if pairs else 1) * dy[..., None] * np.conj(x)).sum(axis=0),
    }


@CONTRACT.form
def error_bound(A_bar, B_bar, C, length, *, unit, store=0.0, pairs=False):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`: `ssm_bound` derives it.

    The kernel is the answer of `ssm` to a single 1, and its bound is that of `ssm` for this input, without transforms.
    """
    c = max(A_bar.shape[0], B_bar.shape[0], C.shape[0])
    impulse = np.zeros_like(abs(C), shape=(length, c))
    impulse[:1] = 1
    still = np.zeros_like(applied(A_bar, B_bar), shape=(c, C.shape[-1]))
    return bound(impulse, A_bar, B_bar, C, None, still, pairs=pairs, transformed=False, unit=unit, store=store)[0]


def _no_row(A_bar, B_bar, C):
    """A kernel of length 0, of the right kind."""
    return (C * applied(A_bar, B_bar)).real.sum(axis=-1)[None, :][:0]


# -- laws ------------------------------------------------------------------------------------------------------------


def _later(f, call, bound, rng):
    """A step later, K_{k+1} is the kernel of the system whose input has taken that step, Ā B̄."""
    later = {**call, "B_bar": applied(call["A_bar"], call["B_bar"])}
    limit = bound(**call), bound(**later)
    yield "K of A B", f(**later)[:-1], f(**call)[1:], limit[0][1:] + 2 * limit[1][:-1]


def _prefix(f, call, bound, rng):
    """The first rows do not depend on how many follow."""
    half = call["length"] // 2
    yield "K of half the length", f(**{**call, "length": half}), f(**call)[:half], 2 * bound(**call)[:half]


def _pairs(f, call, bound, rng):
    """Conjugates written out, or one of each pair: the same kernel."""
    one = {n: v for n, v in call.items() if n != "pairs"}
    both = {n: np.conj(call[n]) for n in ("A_bar", "B_bar", "C")}
    want = f(**one) + f(**{**one, **both})
    yield "K of pairs", f(**one, pairs=True), want, 4 * bound(**one)


def _sample(rng, *, L=7, c=3, n=4, dense=False, shared=False, batch=()):
    """A system has channels and no batch axes: `batch` is taken, as by every sample, and changes nothing."""
    return ssm_system.drawn(rng, c=c, n=n, dense=dense, shared=shared) | {"length": L}


def _with(*, dense=False, **changes):
    """A hard call: the sample, with some arrays replaced."""

    def draw(rng, **sizes):
        call = _sample(rng, **{"dense": dense, **sizes})
        return call | {name: change(rng, call[name]) for name, change in changes.items()}

    return draw


def _delays(rng, A):
    """The shift by one place: nilpotent, Ā^n = 0."""
    return np.broadcast_to(np.eye(A.shape[-1], k=-1), A.shape)


def _jordan(rng, A):
    """One eigenvalue in a single block: powers grow before they fall."""
    return np.broadcast_to(0.75 * np.eye(A.shape[-1]) + 0.5 * np.eye(A.shape[-1], k=1), A.shape)


def _real(rng, v):
    return v.real.copy()


def _cost(work, depth, peak):
    def cost(c, n, L=7, batch=1, dense=False, **_):
        return Cost(work(L, n, dense) * c * batch, depth(L, n), peak(L, n, dense) * c * batch)

    return cost


OPS = (
    Op(
        name="ssm_kernel",
        summary="K_k = Re(C Ā^k B̄), the convolution kernel of a state space model",
        contract=CONTRACT,
        forms={
            "power": Form(
                ssm_kernel,
                _cost(
                    lambda L, n, dense: L * (8 * n + (8 * n * n if dense else 6 * n) - 2) + 14 * n,
                    lambda L, n: L + log2_ceil(n) + 1,
                    lambda L, n, dense: 3.5 * L + 6 * n,
                ),
            ),
            "vandermonde": Form(
                ssm_kernel_vandermonde,
                _cost(
                    lambda L, n, dense: L * 14 * n,
                    lambda L, n: log2_ceil(L) + log2_ceil(n) + 1,
                    lambda L, n, dense: 4.5 * L * n + L,
                ),
                stops="|Ā| > 1: powers that are then cut off may overflow",
            ),
        },
        gradient=ssm_kernel_vjp,
        sample=_sample,
        options={"pairs": (False, True)},
        hard={
            "a real system": _with(A_bar=_real, B_bar=_real, C=_real),
            "a real dense system": _with(dense=True, A_bar=_real, B_bar=_real, C=_real),
            "on the unit circle": _with(A_bar=lambda rng, A: ssm_system.of_norm_one(A)),
            "integrators": _with(A_bar=lambda rng, A: np.ones_like(A)),
            "maps of one for all": _with(B_bar=lambda rng, B: B[:1], C=lambda rng, C: C[:1]),
            "nothing stays": _with(A_bar=lambda rng, A: np.where(rng.random(A.shape) < 0.5, 0, A)),
            "slightly unstable": _with(A_bar=lambda rng, A: ssm_system.of_norm_one(A) * (1 + 2.0**-9)),
            "delays": _with(dense=True, A_bar=_delays),
            "a Jordan block": _with(dense=True, A_bar=_jordan),
            "cancelling states": _with(
                A_bar=lambda rng, A: 0 * A + A[:, :1] * (1 + 2.0**-10 * np.arange(A.shape[-1])),
                C=lambda rng, C: C - C.mean(axis=-1, keepdims=True),
            ),
        },
        error_bound=error_bound,
        references=("gu2022s4, equations (4)-(5)", "gu2022s4d, section 3.2", "higham2002, section 3.3"),
        lengths=("L",),
        sizes=({"c": 1, "n": 1}, {"dense": True}, {"dense": True, "shared": True, "n": 3}, {"dense": True, "n": 12}, {"shared": True}, {"n": 33}, {"c": 40}),
        laws=(
            linear(CONTRACT, "B_bar"),
            linear(CONTRACT, "C"),
            Law("later", _later, ("A_bar", "B_bar")),
            Law("prefix", _prefix, ("A_bar",)),
            Law("conjugate_pairs", _pairs, ("A_bar", "B_bar", "C")),
        ),
    ),
)
