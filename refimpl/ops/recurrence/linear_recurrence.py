"""Linear recurrence: h_t = a_t h_{t-1} + b_t.

    h_t = a_t h_{t-1} + b_t,        t = 0 ... T-1,        h_{-1} = state, 0 if none is given              (1)

The line of algebra under every state space model and every linear RNN: elementwise, with a decay `a` that may change
at every step. It looks sequential, and is not. A step is the affine map h -> a_t h + b_t, and affine maps compose:

    (a_2, b_2) ∘ (a_1, b_1) = (a_2 a_1,  a_2 b_1 + b_2)                                                 (2)

is associative (and not commutative: the later step stands on the left). So all prefixes can be computed by any
parallel prefix scan [1, section 1.4]; and where `a` is constant, (1) unrolls to a convolution with the kernel a^j.
With an input that comes from a system in continuous time (`discretize`) and states that are read (`ssm`) it is a state
space model: the introduction to that part, `refimpl.ops.state_space`, follows it from here to Mamba-2.

Glossary
    a, b    decay and input             (a_t, b_t) in (1); pairs (c_i) in [1, section 1.4]
    h       all states, the result
    state   h_{-1}, shape (..., c); with `reverse`, h_T

Where implementations differ
    Packages disagree on whether the result includes the initial state; here it does not: h has T rows.
    `scipy.signal.lfilter` keeps a·h as its state where this chapter keeps h.

References
    [1] G. E. Blelloch, "Prefix sums and their applications", CMU-CS-90-190, 1990, sections 1.2-1.4.
    [2] W. D. Hillis and G. L. Steele, "Data parallel algorithms", CACM 29(12), 1986, pp. 1170-1183.
    [3] N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM, 2002, section 3.3.
"""

import numpy as np
import scipy.fft

from refimpl.core.contract import Contract
from refimpl.core.costs import fft_depth, fft_work, log2_ceil
from refimpl.core.options import positive_int
from refimpl.laws import causal, hand_off, linear, time_invariant
from refimpl.op import Cost, Form, Law, Op

CONTRACT = Contract(
    "linear_recurrence",
    takes="a (c) | (..., 1, c) | (..., T, c); b (..., T, c); state (..., c)",
    gives="h (..., T, c)",
)


@CONTRACT.form
def linear_recurrence(a, b, *, state=None, reverse=False, return_state=False):
    """Linear recurrence, equation (1), one step at a time.

    Parameters
    ----------
    a : ndarray, shape (..., T, c), (..., 1, c) or (c,)
        Decay, real or complex; the shorter shapes are constant in time.
    b : ndarray, shape (..., T, c)
        Input. T may be 0.
    state : ndarray, shape (..., c), optional
        h before the first step; 0 by default.
    reverse : bool
        Run backwards, h_t = a_t h_{t+1} + b_t; the state enters at the end, and the final state is h_0.
    return_state : bool
        Also return the last h, to go on from.

    Returns
    -------
    h : ndarray, shape (..., T, c)
    state : ndarray, shape (..., c), only with `return_state`

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit or an array is not numeric.

    Notes
    -----
    2 T c operations, 2 T deep. The error is at most ``error_bound``: each step's rounding decays with the signal.

    Examples
    --------
    >>> import numpy as np
    >>> linear_recurrence(np.array([0.5]), np.array([[1.0], [0.0], [0.0]]))[:, 0]
    array([1.  , 0.5 , 0.25])
    """
    a, b, h = _prepare(a, b, state)
    T = b.shape[-2]
    hs: list = [None] * T
    for t in reversed(range(T)) if reverse else range(T):
        h = a[..., t, :] * h + b[..., t, :]  # (..., c)
        hs[t] = h
    y = np.stack(hs, axis=-2) if hs else a * b  # (..., T, c)
    return (y, h) if return_state else y


@CONTRACT.form
def linear_recurrence_hillis_steele(a, b, *, state=None, reverse=False, return_state=False):
    """The same by doubling: after round r every position holds the composition (2) of the 2^r steps up to it.

    log2 T rounds, each over the whole array: 3 T c log2 T operations, 2 log2 T deep [2]. The fastest when processors
    are free, wasteful when they are not. A round forms the composition (2) of more steps than the result needs, so
    decays above 1 may overflow in it, and a NaN decay spreads.
    """
    a, b, h = _prepare(a, b, state, reverse)
    b = _absorb(a, b, h)
    T, reach = b.shape[-2], 1
    while reach < T:
        a_new, b_new = _compose(a[..., reach:, :], b[..., reach:, :], a[..., :-reach, :], b[..., :-reach, :])
        a = np.concatenate([a[..., :reach, :], a_new], axis=-2)  # (..., T, c)
        b = np.concatenate([b[..., :reach, :], b_new], axis=-2)  # (..., T, c)
        reach = 2 * reach
    return _finish(b, h, reverse, return_state)


@CONTRACT.form
def linear_recurrence_blelloch(a, b, *, state=None, reverse=False, return_state=False):
    """The same by pairing: compose neighbours, scan the half as many pairs, and step once from each to what it skipped.

    Going in is the up-sweep of [1], coming out the down-sweep: fewer than 2 T compositions (6 T c operations) in
    2 log2 T levels, for any T. A vector of step maps is halved until one is left, so nothing needs padding.
    """
    a, b, h = _prepare(a, b, state, reverse)
    b = _absorb(a, b, h)
    if b.shape[-2]:
        _, b = _prefixes(a, b)
    return _finish(b, h, reverse, return_state)


def _prefixes(a, b):
    """All prefix compositions of the steps (a_t, b_t)."""
    T = b.shape[-2]
    if T == 1:
        return a, b
    a_even, b_even, a_odd, b_odd = a[..., ::2, :], b[..., ::2, :], a[..., 1::2, :], b[..., 1::2, :]
    half = T // 2
    to_odd = _prefixes(*_compose(a_odd, b_odd, a_even[..., :half, :], b_even[..., :half, :]))  # prefixes ending at 1, 3, 5 ...
    before = tuple(x[..., : (T - 1) // 2, :] for x in to_odd)
    to_even = _compose(a_even[..., 1:, :], b_even[..., 1:, :], *before)  # ending at 2, 4, 6 ...; the one at 0 is step 0
    a_to_even, b_to_even = (np.concatenate([step[..., :1, :], rest], axis=-2) for step, rest in zip((a_even, b_even), to_even, strict=True))
    return _interleave(a_to_even, to_odd[0]), _interleave(b_to_even, to_odd[1])


@CONTRACT.form
def linear_recurrence_chunked(a, b, *, state=None, reverse=False, return_state=False, chunk=64):
    """The same in chunks: all chunks at once from a zero state, then the carries, then what each carry adds.

    Inside a chunk, h_t = (local h_t) + (a_t ... a_start) h_{start-1}. Two sequential loops, of `chunk` and of T/chunk
    steps, in place of one of T: 5 T c operations, chunk + T/chunk deep. This is the form of GPU kernels.
    """
    positive_int("linear_recurrence", "chunk", chunk)
    a, b, h = _prepare(a, b, state, reverse)
    T, c = b.shape[-2:]
    if T == 0:
        return _finish(a * b, h, reverse, return_state)
    pad = -T % chunk
    a, b = _pad_time(a, pad, 1), _pad_time(b, pad, 0)  # the identity step
    a, b = (x.reshape(*x.shape[:-2], (T + pad) // chunk, chunk, c) for x in (a, b))  # (..., T/chunk, chunk, c)
    local, decay = [b[..., 0, :]], [a[..., 0, :]]
    for i in range(1, chunk):
        local.append(a[..., i, :] * local[-1] + b[..., i, :])  # (..., T/chunk, c)
        decay.append(a[..., i, :] * decay[-1])
    carries = [h]
    for j in range(b.shape[-3]):
        carries.append(decay[-1][..., j, :] * carries[-1] + local[-1][..., j, :])
    entering = np.stack(carries[:-1], axis=-2)[..., None, :]  # (..., T/chunk, 1, c)
    y = np.stack(local, axis=-2) + np.stack(decay, axis=-2) * entering  # (..., T/chunk, chunk, c)
    return _finish(y.reshape(*y.shape[:-3], T + pad, c)[..., :T, :], h, reverse, return_state)


@CONTRACT.form
def linear_recurrence_in_place(a, b, *, state=None, reverse=False, return_state=False, rows=64):
    """The same in the memory of the result: a block of inputs is copied there, and row by row becomes states.

    The operations of (1), in its order; what is saved is memory traffic. A step reads one row of `a` and changes one row
    that is still in the cache, where a transcription of (1) makes two new rows: the fastest form on a processor.
    """
    positive_int("linear_recurrence", "rows", rows)
    a, b, h = _prepare(a, b, state, reverse)
    y = np.empty_like(h, shape=b.shape)
    for start in range(0, b.shape[-2], rows):
        now = slice(start, start + rows)
        y[..., now, :] = b[..., now, :]
        for decay, row in zip(*(np.moveaxis(x[..., now, :], -2, 0) for x in (a, y)), strict=True):  # (..., c) each
            row += decay * h
            h = row
    return _finish(y, h, reverse, return_state)


@CONTRACT.form
def linear_recurrence_convolution(a, b, *, state=None, reverse=False, return_state=False):
    """The same for constant `a`, unrolled: h = b * kernel + state's decay, kernel_j = a^j, by FFT.

    15 T c log2 T operations or so, log T deep. The transform is padded to 2T, or the end would wrap onto the
    beginning. Its rounding error is relative to the largest output of a channel, not to each.
    """
    if a.ndim > 1 and a.shape[-2] > 1:
        raise ValueError(f"linear_recurrence: the form 'convolution' needs an a that is constant in time, of shape (c,) or (..., 1, c), got {a.shape}")
    a, b, h = _prepare(a, b, state, reverse)
    T = b.shape[-2]
    if T == 0:
        return _finish(a * b, h, reverse, return_state)
    kernel = a[..., :1, :] ** np.arange(T)[:, None].astype(a.real.dtype)  # (..., T, c)
    n = scipy.fft.next_fast_len(2 * T)
    if b.dtype.kind == "c" or a.dtype.kind == "c":
        y = scipy.fft.ifft(scipy.fft.fft(b, n, axis=-2) * scipy.fft.fft(kernel, n, axis=-2), axis=-2)[..., :T, :]
    else:
        y = scipy.fft.irfft(scipy.fft.rfft(b, n, axis=-2) * scipy.fft.rfft(kernel, n, axis=-2), n, axis=-2)[..., :T, :]
    y = y + a[..., :1, :] * kernel * h[..., None, :]
    return _finish(y, h, reverse, return_state)


@CONTRACT.gradient
def linear_recurrence_vjp(dy, a, b, *, state=None, reverse=False, dstate=None):
    """Gradient of `linear_recurrence`. The adjoint of a recurrence is a recurrence, run the other way:

        g_t = dy_t + conj(a_{t+1}) g_{t+1},    db_t = g_t,    da_t = conj(h_{t-1}) g_t,    dstate = conj(a_0) g_0

    with g_T = dstate, the cotangent of the final state.

    Parameters
    ----------
    dy : ndarray, shape (..., T, c)
        Cotangent of h.
    dstate : ndarray, shape (..., c), optional
        Cotangent of the final state.

    Returns
    -------
    dict
        "a", "b", and "state" where one was given.
    """
    h = linear_recurrence(a, b, state=state, reverse=reverse)
    a, b, first = _prepare(a, b, state, reverse)
    if reverse:
        dy, h = dy[..., ::-1, :], h[..., ::-1, :]
    last = np.zeros_like(first) if dstate is None else dstate
    before = np.concatenate([first[..., None, :], h], axis=-2)[..., :-1, :]  # h_{t-1}: (..., T, c)
    later = np.concatenate([a[..., 1:, :], np.ones_like(a[..., :1, :])], axis=-2)  # a_{t+1}, and 1 for g_T to enter: (..., T, c)
    g = linear_recurrence(np.conj(later), dy, state=last, reverse=True)
    at_start = np.conj(a[..., 0, :]) * g[..., 0, :] if b.shape[-2] else last
    if reverse:
        g, before = g[..., ::-1, :], before[..., ::-1, :]
    return {"a": np.conj(before) * g, "b": g, "state": at_start}


def error_bound(a, b, *, unit, store=0.0, state=None, reverse=False, return_state=False):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`.

    Each of the at most 2 (t - s) + 2 roundings on the way from b_s to h_t is relative to a term of the recurrence of
    absolute values H, so E_t = |a_t| E_{t-1} + 4 u H_t bounds them all (running error analysis, [3, section 3.3]; 4
    instead of 2 for complex products). Products of decays formed as e^(F_t - F_s) add 2 u F_t |a_t| H_{t-1}, F the running
    sum of |log |a|| (a decay of 0 ends every product, and has no logarithm). Transforms add 8 u log2 2T times the channel's
    largest H, for constant `a`. `store` allows for one rounding of the carry of every 64 steps: a state that is rounded
    to half precision at every step breaks the contract.
    """
    a, b, h = _prepare(abs(a), abs(b), None if state is None else abs(state), reverse)
    T = b.shape[-2]
    H = linear_recurrence(a, b, state=h)
    F = np.cumsum(abs(np.log(np.where(a > 0, a, np.ones_like(a)))), axis=-2)
    E = linear_recurrence(a, (4 * unit + store / 64) * H) + 2 * unit * F * np.maximum(H - b, 0)
    if T and np.all(a == a[..., :1, :]):
        E = E + 8 * unit * np.log2(2 * T) * H.max(axis=-2, keepdims=True)
    return _finish(E, np.zeros_like(h), reverse, return_state)


# -- what the forms share --------------------------------------------------------------------------------------------


def _prepare(a, b, state, reverse=False):
    """Decay and input of every step and an initial state, with all batch axes; time reversed where asked."""
    a = a[None, :] if a.ndim == 1 else a
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2], () if state is None else state.shape[:-1])
    zero = np.zeros_like(a[..., :0, :].sum(axis=-2) * b[..., :0, :].sum(axis=-2), shape=(*batch, b.shape[-1]))  # (..., c)
    a, b = (np.broadcast_to(x, (*batch, *b.shape[-2:])) for x in (a, b))
    if reverse:
        a, b = a[..., ::-1, :], b[..., ::-1, :]
    return a, b, zero if state is None else zero + state


def _compose(a2, b2, a1, b1):
    """(2): first step 1, then step 2."""
    return a2 * a1, a2 * b1 + b2


def _absorb(a, b, h):
    """The initial state as part of the first input."""
    first = b[..., :1, :] + a[..., :1, :] * h[..., None, :]
    return np.concatenate([first, b[..., 1:, :]], axis=-2)


def _interleave(even, odd):
    """even_0, odd_0, even_1, odd_1 ... along time."""
    y = np.empty_like(odd, shape=(*odd.shape[:-2], even.shape[-2] + odd.shape[-2], odd.shape[-1]))
    y[..., ::2, :], y[..., 1::2, :] = even, odd
    return y


def _pad_time(x, count, value):
    return np.concatenate([x, np.full_like(x, value, shape=(*x.shape[:-2], count, x.shape[-1]))], axis=-2) if count else x


def _finish(y, h, reverse, return_state):
    last = y[..., -1, :] if y.shape[-2] else h
    y = y[..., ::-1, :] if reverse else y
    return (y, last) if return_state else y


def _sample(rng, *, T=7, c=3, batch=()):
    return {
        "a": rng.uniform(0.1, 1, (*batch, T, c)) * rng.choice([-1, 1, 1, 1], (*batch, T, c)),
        "b": rng.standard_normal((*batch, T, c)),
        "state": rng.standard_normal((*batch, c)),
    }


def _with(**changes):
    """A hard call: the sample, with some arrays replaced."""

    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        return call | {name: change(rng, call[name]) for name, change in changes.items()}

    return draw


def _forwards(law):
    """A law of time that runs forwards: backwards, the past depends on the future, as it should."""
    return Law(law.name, lambda f, call, bound, rng: () if call.get("reverse") else law.holds(f, call, bound, rng), law.arguments)


OPS = (
    Op(
        name="linear_recurrence",
        summary="h_t = a_t h_{t-1} + b_t, elementwise",
        contract=CONTRACT,
        forms={
            "sequential": Form(
                linear_recurrence, lambda T, c, batch=1: Cost(2 * T * c * batch, 2 * T, 2 * T * c * batch), exact=("work", "depth", "peak")
            ),
            "hillis_steele": Form(
                linear_recurrence_hillis_steele,
                lambda T, c, batch=1: Cost(
                    (3 * (T * log2_ceil(T) - 2 ** log2_ceil(T)) + 5) * c * batch, 2 * log2_ceil(T) + 2, 7 * T * c * batch
                ),
                exact=("work",),
                stops="|a| > 1: products of decays may overflow where h does not; NaN in a decay reaches every later row",
            ),
            "blelloch": Form(
                linear_recurrence_blelloch,
                lambda T, c, batch=1: Cost(
                    (3 * sum((T >> i) - 1 for i in range(T.bit_length())) + 2) * c * batch, max(4 * log2_ceil(T) - 2, 2), 6 * T * c * batch
                ),
                exact=("work",),
                stops="|a| > 1: products of decays may overflow where h does not",
            ),
            "chunked": Form(
                linear_recurrence_chunked,
                lambda T, c, batch=1, chunk=64: Cost(
                    (5 * chunk - 1) * -(-T // chunk) * c * batch,
                    2 * (chunk + -(-T // chunk)) - 3,
                    (5 * T + 7 * (-T % chunk) + 1) * c * batch,
                ),
                exact=("work",),
                stops="|a| > 1: a chunk's product of decays may overflow where h does not",
            ),
            "in_place": Form(
                linear_recurrence_in_place,
                lambda T, c, batch=1, rows=64: Cost(2 * T * c * batch, 2 * T, (T + 2) * c * batch),
                exact=("work", "depth", "peak"),
            ),
            "convolution": Form(
                linear_recurrence_convolution,
                lambda T, c, batch=1: Cost((3 * fft_work(2 * T) + 9 * T) * c * batch, 2 * fft_depth(2 * T), 9 * T * c * batch),
                on_balls=False,
                stops="|a| > 1 and non-finite data: a transform spreads its largest value over all",
            ),
        },
        gradient=linear_recurrence_vjp,
        sample=_sample,
        options={"reverse": (False, True)},
        hard={
            "decay exactly 0": _with(a=lambda rng, a: np.where(rng.random(a.shape) < 0.3, 0.0, a)),
            "decay exactly 1": _with(a=lambda rng, a: np.ones_like(a)),
            "decay nearly 1": _with(a=lambda rng, a: 1 - 2.0**-12 * rng.random(a.shape)),
            "growth and decay": _with(a=lambda rng, a: 1 + 0.1 * rng.uniform(-1, 1, a.shape)),
            "alternating decay -1": _with(a=lambda rng, a: -np.ones_like(a)),
            "constant decay": _with(a=lambda rng, a: a[..., :1, :]),
            "one needle": _with(b=lambda rng, b: b * (np.arange(b.shape[-2]) == b.shape[-2] // 3)[:, None], state=lambda rng, s: s * 0),
            "a state that fades": _with(b=lambda rng, b: b * 0, a=lambda rng, a: a * 0.3),
            "complex decay": _with(
                a=lambda rng, a: a * np.exp(1j * rng.uniform(-3, 3, a.shape)),
                b=lambda rng, b: b + 1j * rng.standard_normal(b.shape),
                state=lambda rng, s: s + 1j * rng.standard_normal(s.shape),
            ),
        },
        error_bound=error_bound,
        references=("blelloch1990, section 1.4", "hillis1986", "higham2002, section 3.3"),
        sizes=({"c": 1}, {"c": 64}, {"batch": (2,)}, {"batch": (2, 3)}),
        laws=(
            _forwards(causal(CONTRACT, "a", "b")),
            linear(CONTRACT, "b", "state"),
            _forwards(hand_off(CONTRACT)),
            time_invariant(CONTRACT, "b"),
        ),
    ),
)
