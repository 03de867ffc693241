"""WKV, the time mixing of RWKV-4: a weighted mean of all values so far, whose weights fade at a fixed rate per channel.

    y_t = (Σ_{i<t} e^{k_i - (t-1-i) w} v_i + e^{u+k_t} v_t) / (Σ_{i<t} e^{k_i - (t-1-i) w} + e^{u+k_t})            (1)

An attention without queries: how much a step counts is up to its key alone, and to how long ago it was. That makes the two
sums recurrences, N for the numerator and D for the denominator, and a channel needs two numbers as its memory:

    y_t = (N_{t-1} + e^{u+k_t} v_t) / (D_{t-1} + e^{u+k_t}),   N_t = e^{-w} N_{t-1} + e^{k_t} v_t,   D_t = e^{-w} D_{t-1} + e^{k_t}   (2)

The step t itself counts with its own bonus u, and enters the memory without it: so it fades neither for itself nor for the
next step. e^k overflows; so N e^-m and D e^-m are kept, m being the largest exponent seen, which cancels in (2):

    m_t = max(m_{t-1} - w, k_t),     N_t <- e^{m_{t-1} - w - m_t} N_{t-1} + e^{k_t - m_t} v_t,     likewise D       (3)

Glossary
    k, v    keys and values                 k_i, v_i in [1, eq. 14]
    w       decay of a step, w > 0          w in [1, eq. 14]: e^-w is what is left after a step
    u       bonus of the current step       u in [1, eq. 14]
    N, D, m num, den, max of the state      a', b', p in [1, appendix D]

Where implementations differ
    w is the decay itself, and positive. RWKV-4's checkpoints hold log w (`time_decay`): pass exp(time_decay). wkv6 and wkv7 take
    the log-decay, -w here, which is negative. Published codes start at max = -1e38 where this chapter has -∞, the same from the
    first step on; their kernels negate and exponentiate inside.

References
    [1] B. Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", Findings of EMNLP 2023, section 3.1.2 and appendix D.
    [2] M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax", 2018, section 3.1.
"""

from typing import NamedTuple

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.numerics import finite_or_zero, masked_matmul
from refimpl.laws import carries_nan, causal, hand_off
from refimpl.op import Cost, Form, Op
from refimpl.ops.linear_attention.wkv_bound import bound
from refimpl.ops.linear_attention.wkv_laws import MEAN, OFFSET, UNITS


class State(NamedTuple):
    """The memory between two steps; stands for (num, den)·e^max. Before the first step num = den = 0, max = -∞.

    Attributes
    ----------
    num, den, max : ndarray, shape (..., c)
    """

    num: np.ndarray
    den: np.ndarray
    max: np.ndarray


def _check(arguments, sizes):
    for name in ("k", "v", "w", "u"):
        if arguments[name].dtype.kind == "c":
            raise TypeError(f"wkv: {name} must be real, got dtype {arguments[name].dtype}")


CONTRACT = Contract(
    "wkv",
    takes="k (..., T, c); v (..., T, c); w (c); u (c); state.num (..., c); state.den (..., c); state.max (..., c)",
    gives="y (..., T, c)",
    check=_check,
)


@CONTRACT.form
def wkv(k, v, w, u, *, state=None, return_state=False):
    """WKV of RWKV-4, equations (2) and (3), one step at a time.

    Parameters
    ----------
    k, v : ndarray, shape (..., T, c)
        Keys (exponents) and values.
    w : ndarray, shape (c,)
        Decay of a step, positive: e^-w is left. A checkpoint's `time_decay` is log w.
    u : ndarray, shape (c,)
        Added to the key of the current step.
    state : State, optional
        (num, den, max) before the first step; (0, 0, -∞) by default. den > 0 where max is finite.
    return_state : bool
        Also return the final state.

    Returns
    -------
    y : ndarray, shape (..., T, c)
    state : State, only with `return_state`

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit or an array is not real.

    Warnings
    --------
    w is not a log-decay. `wkv6` and `wkv7` take the logarithm of the decay, which is -w.

    Notes
    -----
    24 T c operations, 2 T deep. Every exponent is at most 0, so that nothing overflows for any keys; w <= 0 does not
    fade, but is computed all the same. The error is at most ``error_bound``: relative to the |v| that are averaged.

    Examples
    --------
    The first step sees itself alone; the second two keys of equal weight, then one that counts e² = 7.4 times as much:

    >>> import numpy as np
    >>> k, v = np.zeros((2, 1)), np.array([[1.0], [3.0]])
    >>> wkv(k, v, np.ones(1), np.zeros(1))[:, 0]
    array([1., 2.])
    >>> wkv(k, v, np.ones(1), np.full(1, 2.0))[:, 0].round(3)
    array([1.   , 2.762])
    """
    k, v, before = _prepare(k, v, state)
    ys = []
    for t in range(k.shape[-2]):
        k_t, v_t = k[..., t, :], v[..., t, :]  # (..., c)
        ys.append(_read(k_t, v_t, u, before))
        before = _join(before, w, State(v_t, np.ones_like(v_t), k_t))
    y = np.stack(ys, axis=-2) if ys else v  # (..., T, c)
    return (y, before) if return_state else y


def _read(k, v, u, before):
    """y of (2), from the memory of the steps before."""
    bonus = u + k
    top = np.maximum(before.max, bonus)
    past, present = np.exp(before.max - finite_or_zero(top)), np.exp(bonus - finite_or_zero(top))
    return (past * before.num + present * v) / (past * before.den + present)


def _join(earlier, decay, later):
    """The memory of two runs of steps, where the earlier one fades by `decay` during the later one: (3), for a run of one step."""
    faded = earlier.max - decay
    m = np.maximum(faded, later.max)
    old, new = np.exp(faded - finite_or_zero(m)), np.exp(later.max - finite_or_zero(m))
    return State(old * earlier.num + new * later.num, old * earlier.den + new * later.den, m)


@CONTRACT.form
def wkv_parallel(k, v, w, u, *, state=None, return_state=False):
    """The same as an attention: equation (1), the weights of all pairs of steps at once, each row a softmax.

    The initial state is one more term, with the exponent max - t w. 7 T² c operations and 4 T² c memory, but only log T deep.
    """
    k, v, before = _prepare(k, v, state)
    T = k.shape[-2]
    if T == 0:
        return (v, before) if return_state else v
    k, v = (np.swapaxes(x, -1, -2) for x in (k, v))  # (..., c, T)
    A, start = _exponents(k, before.max, w)  # (..., c, T + 1, T), (..., c, T + 1)
    diagonal = np.arange(T) == np.arange(T + 1)[:, None]
    A_read = np.where(diagonal, (u[:, None] + k)[..., None, :], A)
    m = np.maximum(start, A_read.max(axis=-1))  # (..., c, T + 1)
    weight, initial = np.exp(A_read - finite_or_zero(m)[..., None]), np.exp(start - finite_or_zero(m))
    num = masked_matmul(weight, v[..., None], A_read)[..., 0] + initial * before.num[..., None]  # (..., c, T + 1)
    den = weight.sum(axis=-1) + initial * before.den[..., None]
    y = np.swapaxes(num[..., :T] / den[..., :T], -1, -2)  # (..., T, c)
    return (y, State(num[..., T], den[..., T], m[..., T])) if return_state else y


def _exponents(k, m, w):
    """k_i - (t-1-i) w at [t, i], -∞ for i >= t: (..., c, T + 1, T); the state's, m - t w: (..., c, T + 1). Row T is the final state's."""
    T = k.shape[-1]
    steps = np.cumsum(np.ones_like(w, shape=(T + 1,))) - 1
    lag = steps[:, None] - 1 - steps[:T]  # t - 1 - i: (T + 1, T)
    past = np.arange(T) < np.arange(T + 1)[:, None]
    fades = np.where(past, lag, np.zeros_like(lag)) * w[:, None, None]  # (c, T + 1, T)
    return np.where(past, k[..., None, :] - fades, np.full_like(fades, -np.inf)), m[..., None] - steps * w[:, None]


@CONTRACT.form
def wkv_scan(k, v, w, u, *, state=None, return_state=False):
    """The same by doubling: memories of runs of steps join associatively, as in the online softmax [2].

    A run of steps is (num, den, max), and two of them, the later one n steps long, join to
    (e^{m_1 - n w - m} N_1 + e^{m_2 - m} N_2, likewise D, m = max(m_1 - n w, m_2)). After round r every position holds the run
    of the 2^r steps up to it. 9 T c log2 T operations, 2 log2 T deep.
    """
    k, v, before = _prepare(k, v, state)
    T, reach = k.shape[-2], 1
    if T == 0:
        return (v, before) if return_state else v
    runs = State(v, np.ones_like(v), k)  # of one step each: (..., T, c)
    first = _join(before, w, State(*(x[..., 0, :] for x in runs)))
    runs = State(*(np.concatenate([f[..., None, :], x[..., 1:, :]], axis=-2) for f, x in zip(first, runs, strict=True)))
    while reach < T:
        joined = _join(State(*(x[..., :-reach, :] for x in runs)), reach * w, State(*(x[..., reach:, :] for x in runs)))
        runs = State(*(np.concatenate([x[..., :reach, :], j], axis=-2) for x, j in zip(runs, joined, strict=True)))
        reach = 2 * reach
    entering = State(*(np.concatenate([b[..., None, :], x[..., :-1, :]], axis=-2) for b, x in zip(before, runs, strict=True)))
    y = _read(k, v, u, entering)
    return (y, State(*(x[..., -1, :] for x in runs))) if return_state else y


@CONTRACT.gradient
def wkv_vjp(dy, k, v, w, u, *, state=None, dstate=None):
    """Gradient of `wkv`: (3) and (2) transposed, last step first.

    With a = e^{m-M}, b = e^{u+k-M} the weights of (2), M = max(m, u + k), whose denominator is Δ = a D + b, and dN, dD, dm the
    cotangents of the state after step t:

        (3)  with p = e^{m_{t-1} - w - m_t}, q = e^{k_t - m_t}:
             dp = p (N_{t-1} dN + D_{t-1} dD),  dq = q (v dN + dD),  dm -= dp + dq;  dm goes to the larger argument of the max
             dv = q dN,  dk = dq,  dw = -dp,  dm_{t-1} = dp,  dN_{t-1} = p dN,  dD_{t-1} = p dD
        (2)  g = dy / Δ:   dN += a g,  dD -= a g y,  dv += b g;  and with δ = a b g (v D - N) / Δ:  dk += δ,  du = δ,  dm -= δ

    δ is b g (v - y), and -δ is a g (N - y D), without the difference of v and a y that may be all but v. M needs no term, for δ and -δ
    cancel in it. m needs its own, for N and D come out in its units; with no cotangent of the final state all that arrives at it
    cancels as well.

    A tie in (3) sends dm to m_{t-1} - w.

    Parameters
    ----------
    dy : ndarray, shape (..., T, c)
        Cotangent of y.
    dstate : State, optional
        Cotangent of the final (num, den, max).

    Returns
    -------
    dict
        "k", "v", "w", "u", and "state" (a State) where one was given.

    Notes
    -----
    Keeps all T states, 3 T c elements. About 60 T c operations.
    """
    k, v, first = _prepare(k, v, state)
    states = [first]
    for t in range(k.shape[-2]):
        states.append(_join(states[-1], w, State(v[..., t, :], np.ones_like(v[..., t, :]), k[..., t, :])))
    dN, dD, dm = (np.zeros_like(first.num),) * 3 if dstate is None else dstate
    dw, du = np.zeros_like(first.num), np.zeros_like(first.num)  # (..., c)
    dks, dvs = [], []
    for t in reversed(range(k.shape[-2])):
        k_t, v_t, before, m = k[..., t, :], v[..., t, :], states[t], states[t + 1].max
        faded = before.max - w
        old, new = np.exp(faded - finite_or_zero(m)), np.exp(k_t - finite_or_zero(m))
        d_old, d_new = old * (before.num * dN + before.den * dD), new * (v_t * dN + dD)
        to_m = dm - d_old - d_new
        to_left = faded >= k_t
        d_old, d_new = d_old + np.where(to_left, to_m, 0), d_new + np.where(to_left, 0, to_m)
        dv, dN, dD, dm = new * dN, old * dN, old * dD, d_old
        dw = dw - d_old

        bonus = u + k_t
        top = np.maximum(before.max, bonus)
        past, present = np.exp(before.max - finite_or_zero(top)), np.exp(bonus - finite_or_zero(top))
        den = past * before.den + present
        y = (past * before.num + present * v_t) / den
        g = dy[..., t, :] / den
        d_bonus = past * present * g * (v_t * before.den - before.num) / den
        dm = dm - d_bonus
        dN, dD = dN + past * g, dD - past * g * y
        du = du + d_bonus
        dks.append(d_new + d_bonus)
        dvs.append(dv + present * g)
    dk, dv = (np.stack(x[::-1], axis=-2) if x else k for x in (dks, dvs))
    return {"k": dk, "v": dv, "w": dw, "u": du, "state": State(dN, dD, dm)}


@CONTRACT.form
def error_bound(k, v, w, u, *, unit, store=0.0, state=None, return_state=False):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`: derived in `wkv_bound`.

    A weight's relative error is the error of its exponent, hence grows with |k|, |u|, and with w times the steps.
    """
    k, v, before = _prepare(k, v, state)
    if k.shape[-2] == 0:
        E, errors = v, tuple(np.zeros_like(x) for x in before)
    else:
        E, errors = bound(k, v, w, u, *before, unit=unit, store=store)
    return (E, State(*errors)) if return_state else E


# -- what the forms share --------------------------------------------------------------------------------------------


def _prepare(k, v, state):
    """Keys, values and a state, of one batch shape."""
    batch = np.broadcast_shapes(k.shape[:-2], v.shape[:-2], *(x.shape[:-1] for x in state or ()))
    k, v = (np.broadcast_to(x, (*batch, *x.shape[-2:])) for x in (k, v))
    channels = (*batch, k.shape[-1])
    if state is None:
        zero = np.zeros_like(k, shape=channels)
        return k, v, State(zero, zero, np.full_like(k, -np.inf, shape=channels))
    return k, v, State(*(np.broadcast_to(x, channels) for x in state))


def _sample(rng, *, T=7, c=3, batch=()):
    return {
        "k": rng.standard_normal((*batch, T, c)),
        "v": rng.standard_normal((*batch, T, c)),
        "w": rng.uniform(0.1, 1.5, c),
        "u": rng.choice([-1, 1], c) * rng.uniform(0.5, 1.5, c),
        "state": State(rng.standard_normal((*batch, c)), rng.uniform(0.5, 2, (*batch, c)), rng.uniform(-1, 1, (*batch, c))),
    }


def _with(**changes):
    """A hard call: the sample, with some arrays replaced."""

    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        return call | {name: change(rng, call[name]) for name, change in changes.items()}

    return draw


def _raised(by):
    return lambda rng, s: s._replace(max=s.max + by)


_cost = {
    "recurrent": lambda T, c, batch=1: Cost(24 * T * c * batch, 2 * T + 5, max(T + 12, 2 * T + 3) * c * batch),
    "parallel": lambda T, c, batch=1: Cost(
        ((7 * T * T + 15 * T + 6) * batch + (T + 1) ** 2) * c, 2 * log2_ceil(T) + 8, 4 * T * (T + 2) * c * batch
    ),
    "scan": lambda T, c, batch=1: Cost((9 * np.ceil(np.log2(max(T, 2))) + 14) * T * c * batch, 2 * log2_ceil(T) + 8, 15 * T * c * batch),
}

OPS = (
    Op(
        name="wkv",
        summary="RWKV-4: a mean of the values so far, weighted by e^k and by a decay per channel, with a bonus for the current step",
        contract=CONTRACT,
        forms={
            "recurrent": Form(wkv, _cost["recurrent"], exact=("work", "depth", "peak")),
            "parallel": Form(wkv_parallel, _cost["parallel"], exact=("work", "depth")),
            "scan": Form(wkv_scan, _cost["scan"]),
        },
        gradient=wkv_vjp,
        sample=_sample,
        hard={
            "keys of -80 and +80": _with(k=lambda rng, k: k + rng.choice([-80.0, 0.0, 80.0], k.shape)),
            "keys of 200 after the first": _with(k=lambda rng, k: k + 200 * (np.arange(k.shape[-2]) > 0)[:, None]),
            "bonuses of -150 and +150": _with(u=lambda rng, u: u + 150 * np.where(np.arange(u.shape[-1]) % 2, 1, -1)),
            "huge common offset": _with(k=lambda rng, k: k + 300, state=_raised(300)),
            "all far below": _with(k=lambda rng, k: k - 20000, state=_raised(-20000)),
            "an old state outweighs all": _with(state=_raised(60), w=lambda rng, w: w / 16),
            "hardly any decay": _with(w=lambda rng, w: w * 2.0**-20),
            "every step counts alike": _with(k=lambda rng, k: k / 16, w=lambda rng, w: w * 2.0**-20),  # den counts the steps
            "fast decay": _with(w=lambda rng, w: w + 3),
            "only the last step is left": _with(w=lambda rng, w: w + 60),
            "bonuses of -60 and +60": _with(u=lambda rng, u: u + 60 * np.where(np.arange(u.shape[-1]) % 2, 1, -1)),
            "one needle": _with(k=lambda rng, k: k + 40 * (np.arange(k.shape[-2]) == k.shape[-2] // 3)[:, None]),
            "values that cancel": _with(v=lambda rng, v: v + 1e3 * np.where(np.arange(v.shape[-2]) % 2, -1, 1)[:, None]),
            "empty initial state": _with(state=lambda rng, s: State(0 * s.num, 0 * s.den, np.full_like(s.max, -np.inf))),
        },
        error_bound=error_bound,
        references=("peng2023, section 3.1.2, equation 14, appendix D",),
        sizes=({"c": 1}, {"c": 16}, {"c": 5, "batch": (2,)}, {"batch": (2, 3)}),
        laws=(causal(CONTRACT, "k", "v"), hand_off(CONTRACT), MEAN, OFFSET, UNITS, carries_nan(CONTRACT, "v")),
    ),
)
