"""H3, "hungry hungry hippos": two state space models and two gates in place of attention.

    y = q · ssm(shift(k) · v)                                                                                   (1)
    shift(k)_t = Σ_s shift_kernel_s k_{t-s} + skip k_t,        ssm: x_t = Ā x_{t-1} + B̄ u_t,  Re(C x_t) + D u_t

Linear attention computes q_t · Σ_s k_s v_s: whatever was written stays, and nothing can be compared with what stood
next to it. H3 puts a state space model in each of these places. The first, a `long_conv` by a short kernel, moves keys
along: shift(k)_t · v_t writes v_t if the token before it was so and so. The second, a diagonal `ssm`, remembers what was
written, for as long as each state does; and q reads it. Together they can look up "what came after this token the last
time", which is what earlier state space models could not [1, section 3.1]. It is `hyena` of N = 2 with these filters.

One call, three lives, as everywhere in this part: a recurrence; two convolutions by transforms; and with the kernel
K_s = Re(C Ā^s B̄) of the second model a matrix for each channel, lower triangular,

    y = M v,        M_ts = q_t (K_{t-s} + D [t = s]) shift(k)_s,    s <= t                                      (2)

Glossary
    q, k, v               query, key, value, each (..., T, c)         Q, K, V in [1, algorithm 1]
    shift_kernel, skip    filter on k and its direct path             SSM_shift, with its C and D
    A_bar, B_bar, C, D    diagonal system of each channel             SSM_diag
    pairs                 one of each conjugate pair is given         as in `ssm`
    y                     output

Where implementations differ
    The published model gives both systems to every channel of every head and, with heads of size d, takes the outer product
    of key and value, d states-to-be per channel; this chapter is d = 1, elementwise, which is what its long convolutions and
    fused kernels compute. There the shift model has a state for each tap, so that its kernel is its C; its reference code
    learns kernels of both models in double-sided pairs. D and skip are separate here: each belongs to its own model.

References
    [1] D. Y. Fu, T. Dao, K. K. Saab, A. W. Thomas, A. Rudra and C. Ré, "Hungry hungry hippos: towards language modeling
        with state space models", ICLR 2023, section 3.1 and algorithm 1.
    [2] M. Poli, S. Massaroli, E. Nguyen et al., "Hyena hierarchy", ICML 2023, section 3.1 (H3 as a case of Hyena).
    [3] N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM, 2002, sections 3.1 and 3.3.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import fft_depth, fft_work, log2_ceil, taps
from refimpl.core.options import one_of
from refimpl.laws import causal, linear, time_invariant
from refimpl.op import Cost, Form, Op
from refimpl.ops.recurrence.long_conv import error_bound as convolution_bound
from refimpl.ops.recurrence.long_conv import long_conv, long_conv_fft, long_conv_vjp
from refimpl.ops.state_space import ssm_system
from refimpl.ops.state_space.ssm import error_bound as system_bound
from refimpl.ops.state_space.ssm import ssm, ssm_convolution, ssm_vjp
from refimpl.ops.state_space.ssm_kernel import ssm_kernel


def _check(arguments, sizes):
    """What shapes cannot say."""
    one_of("h3", "pairs", arguments.get("pairs", False), (False, True))


CONTRACT = Contract(
    "h3",
    takes="q:real (..., T, c); k:real (..., T, c); v:real (..., T, c); shift_kernel:real (K, c);"
    "A_bar (1, n) | (c, n); B_bar (1, n) | (c, n); C (1, n) | (c, n); D:real (1) | (c); skip:real (c)",
    gives="y (..., T, c)",
    check=_check,
)


@CONTRACT.form
def h3(q, k, v, shift_kernel, A_bar, B_bar, C, D=None, skip=None, *, pairs=False):
    """H3, equation (1), one step at a time.

    Parameters
    ----------
    q, k, v : ndarray, shape (..., T, c)
        Query, key and value, real. T may be 0.
    shift_kernel : ndarray, shape (K, c)
        Filter on k, real; row 0 meets the newest sample.
    A_bar, B_bar, C : ndarray, shape (c, n)
        Discrete diagonal system of each channel, real or complex; a first axis of 1 is shared.
    D : ndarray, shape (c,), optional
        The system's direct path, real.
    skip : ndarray, shape (c,), optional
        The shift filter's direct path, real.
    pairs : bool
        Whether one of each conjugate pair of states is given: then the system's answer is twice the real part.

    Returns
    -------
    y : ndarray, shape (..., T, c)
        Real.

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, an array is not numeric, or one that must be real is complex.

    Notes
    -----
    T (2 K + 18 n + 4) c operations for a complex system, 2 T deep. The error is at most ``error_bound``: that of the filter,
    carried on by the system of absolute values, and that of the system.

    References
    ----------
    [1], algorithm 1.

    Examples
    --------
    Associative recall: v_t is kept if the token before it was the key, and is read at the end.

    >>> import numpy as np
    >>> key_came, value = np.array([[0.0], [1.0], [0.0], [0.0]]), np.array([[5.0], [6.0], [7.0], [8.0]])
    >>> asked, one = np.array([[0.0], [0.0], [0.0], [1.0]]), np.ones((1, 1))
    >>> h3(asked, key_came, value, shift_kernel=np.array([[0.0], [1.0]]), A_bar=one, B_bar=one, C=one)[:, 0]
    array([0., 0., 0., 7.])
    """
    written = long_conv(k, shift_kernel, skip) * v  # (..., T, c)
    return q * ssm(written, A_bar, B_bar, C, D, pairs=pairs)


@CONTRACT.form
def h3_convolution(q, k, v, shift_kernel, A_bar, B_bar, C, D=None, skip=None, *, pairs=False):
    """The same with both models as convolutions by transforms, whose kernels do not depend on the data: how it is trained.

    O(T log T) operations a channel once the second kernel is there, a logarithm of T deep [1, section 4].
    """
    written = long_conv_fft(k, shift_kernel, skip) * v  # (..., T, c)
    return q * ssm_convolution(written, A_bar, B_bar, C, D, pairs=pairs)


@CONTRACT.form
def h3_attention(q, k, v, shift_kernel, A_bar, B_bar, C, D=None, skip=None, *, pairs=False):
    """The same by (2): the matrix of every channel, a masked attention whose scores are shifted keys, filtered and gated.

    T² operations and numbers a channel; to see what reads what.
    """
    T, c = v.shape[-2:]
    kernel = np.broadcast_to(ssm_kernel(A_bar, B_bar, C, T, pairs=pairs), (T, c))  # (T, c)
    delay = np.arange(T)[:, None] - np.arange(T)  # t - s
    K = np.moveaxis(kernel[abs(delay)], -1, 0)  # (c, T, T)
    if D is not None:
        K = K + np.where(delay == 0, D[:, None, None], np.zeros_like(D)[:, None, None])
    query, key = (np.swapaxes(x, -1, -2) for x in (q, long_conv(k, shift_kernel, skip)))  # (..., c, T)
    M = query[..., :, None] * K * key[..., None, :]
    terms = M * np.swapaxes(v, -1, -2)[..., None, :]
    terms = np.where(delay >= 0, terms, np.zeros_like(terms))  # masked last, so that a NaN of the future stays there
    return np.swapaxes(terms.sum(axis=-1), -1, -2)  # (..., T, c)


@CONTRACT.gradient
def h3_vjp(dy, q, k, v, shift_kernel, A_bar, B_bar, C, D=None, skip=None, *, pairs=False):
    """Gradient of `h3`: back through the two gates, the system and the filter, each with its own adjoint.

        dq = dy · ssm(shift(k) · v),        g = ssm's adjoint of (q · dy),        dv = shift(k) · g,        dk = shift's adjoint of (v · g)

    and the gradients of the two models' parameters are those of `ssm_vjp` and of `long_conv_vjp`.

    Parameters
    ----------
    dy : ndarray, shape (..., T, c)
        Cotangent of y.

    Returns
    -------
    dict
        "q", "k", "v", "shift_kernel", "A_bar", "B_bar", "C", and "D", "skip" where they were given.
    """
    q, k, v = np.broadcast_arrays(q, k, v, subok=True)
    shifted = long_conv(k, shift_kernel, skip)
    through_ssm = ssm_vjp(q * dy, shifted * v, A_bar, B_bar, C, D, pairs=pairs)
    g = through_ssm.pop("u")  # (..., T, c)
    through_shift = long_conv_vjp(v * g, k, shift_kernel, skip)
    own = {"q": dy * ssm(shifted * v, A_bar, B_bar, C, D, pairs=pairs), "k": through_shift["u"], "v": shifted * g}
    return own | {"shift_kernel": through_shift["kernel"], "skip": through_shift.get("skip")} | through_ssm


def error_bound(q, k, v, shift_kernel, A_bar, B_bar, C, D=None, skip=None, *, unit, store=0.0, pairs=False):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`.

    The filter is off by `long_conv`'s bound, the product with v by a rounding more, and the system of absolute values
    carries both on; the system itself is off by `ssm`'s bound, or, written out as a matrix or a sum over its kernel, by
    t + 5 roundings of the sum of absolute values [3, section 3.1]; the product with q is one more. `store` allows for
    operands and the two products kept in a half precision.
    """
    written = long_conv(k, shift_kernel, skip) * v
    size = long_conv(abs(k), abs(shift_kernel), None if skip is None else abs(skip)) * abs(v)
    off = convolution_bound(k, shift_kernel, skip, unit=unit, store=store) * abs(v) + (unit + 2 * store) * size
    magnitudes = abs(A_bar), abs(B_bar), abs(C), None if D is None else abs(D)
    carried, whole = (ssm(x, *magnitudes, pairs=pairs) for x in (off, size))
    steps = np.arange(v.shape[-2])[:, None]
    system = system_bound(written, A_bar, B_bar, C, D, pairs=pairs, unit=unit, store=store)
    return abs(q) * (system + carried + ((steps + 6) * unit + 3 * store) * whole)


# -- the catalogue ---------------------------------------------------------------------------------------------------


def _sample(rng, *, T=7, c=3, n=4, K=4, shared=False, batch=()):
    call = {name: rng.standard_normal((*batch, T, c)) for name in "qkv"}
    call["shift_kernel"] = rng.standard_normal((K, c)) / np.sqrt(max(K, 1))
    call |= ssm_system.drawn(rng, c=c, n=n, dense=False, shared=shared)
    return call | {name: rng.uniform(0.5, 1.5, c) * rng.choice([-1, 1], c) for name in ("D", "skip")}


def _with(**changes):
    """A hard call: the sample, with some arrays replaced."""

    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        return call | {name: change(rng, call[name]) for name, change in changes.items()}

    return draw


def _real(rng, v):
    return v.real.copy()


def _last_tap(rng, kernel):
    """A delay by K - 1 steps."""
    return 0 * kernel + (np.arange(kernel.shape[0]) == kernel.shape[0] - 1)[:, None]


OPS = (
    Op(
        name="h3",
        summary="y = q · ssm(shift(k) · v): two state space models and two gates",
        contract=CONTRACT,
        forms={
            "recurrent": Form(
                h3,
                lambda T, c, n, K, batch=1: Cost(
                    (2 * taps(T, K) + T * (18 * n + 4)) * c * batch, 2 * T + log2_ceil(n) + 5, (5 * T + 4 * n) * c * batch
                ),
            ),
            "convolution": Form(
                h3_convolution,
                lambda T, c, n, K, batch=1: Cost(
                    (3 * fft_work(T + min(T, K)) + 3 * fft_work(2 * T) + 16 * T + 20 * T * n) * c * batch,
                    2 * fft_depth(T + min(T, K)) + 2 * fft_depth(2 * T) + 4,
                    (6 * T * n + 8 * T) * c * batch,
                ),
                on_balls=False,
                stops="|Ā| > 1 and non-finite data: a transform spreads its largest value over all",
            ),
            "attention": Form(
                h3_attention,
                lambda T, c, n, K, batch=1: Cost(
                    (4 * T * T + 2 * taps(T, K) + 14 * T * n) * c * batch,
                    T + log2_ceil(n) + log2_ceil(T) + 4,
                    5 * T * T * c * batch,
                ),
            ),
        },
        gradient=h3_vjp,
        sample=_sample,
        options={"pairs": (False, True)},
        hard={
            "a real system": _with(A_bar=_real, B_bar=_real, C=_real),
            "on the unit circle": _with(A_bar=lambda rng, A: ssm_system.of_norm_one(A)),
            "integrators": _with(A_bar=lambda rng, A: np.ones_like(A)),
            "nothing stays": _with(A_bar=lambda rng, A: np.where(rng.random(A.shape) < 0.5, 0, A)),
            "slightly unstable": _with(A_bar=lambda rng, A: ssm_system.of_norm_one(A) * (1 + 2.0**-9)),
            "maps of one for all": _with(B_bar=lambda rng, B: B[:1], C=lambda rng, C: C[:1]),
            "a pure delay": _with(shift_kernel=_last_tap, skip=lambda rng, s: 0 * s),
            "differences of large keys": _with(
                k=lambda rng, k: k + 1000, shift_kernel=lambda rng, s: s - s.mean(axis=-2, keepdims=True), skip=lambda rng, s: 0 * s
            ),
            "one needle": _with(v=lambda rng, v: v * (np.arange(v.shape[-2]) == v.shape[-2] // 3)[:, None]),
            "asked once": _with(q=lambda rng, q: q * (np.arange(q.shape[-2]) == q.shape[-2] - 1)[:, None]),
        },
        error_bound=error_bound,
        references=("fu2023h3, section 3.1 and algorithm 1", "poli2023, section 3.1", "higham2002, section 3.1"),
        sizes=({"c": 1, "n": 1}, {"shared": True}, {"K": 1}, {"K": 17}, {"c": 20, "n": 17}, {"batch": (2, 3)}),
        laws=(
            causal(CONTRACT, "q", "k", "v"),
            linear(CONTRACT, "q"),
            linear(CONTRACT, "k"),
            linear(CONTRACT, "v"),
            time_invariant(CONTRACT, "q", "k", "v"),
        ),
    ),
)
