"""Real-gated linear recurrent unit: a diagonal recurrence whose decay and input are gated, as in Griffin.

    log a_t = exponent · r_t · log a,        h_t = a_t h_{t-1} + √(1 - a_t²) · (i_t x_t)                   (1)

Each channel has a decay a in (0, 1). The recurrence gate r moves it towards 1: with r = 0 the state is kept and nothing
enters, with r = 1 the decay is a^exponent, the strongest. The factor √(1 - a²) keeps the variance: if the inputs are
independent with variance 1, so is h, whatever the gates do. It is computed as √(-expm1(2 log a_t)), since 1 - a_t²
cancels where a is close to 1, which is where memory is long and the unit is used.

Where `reset` holds, a segment starts: a_t = 0 and the factor is 1, so h_t = i_t x_t.

Glossary
    x, h        input, state and output           [1, equation (4)]
    r, i        recurrence and input gates, after their sigmoids    [1, equations (1), (2)]
    log_a       log a, at most 0; log σ(Λ) = -softplus(-Λ) of [1]
    exponent    c = 8                             [1, section 2.4]

Where implementations differ
    a^(c r) is in the paper and in RecurrentGemma; at least one public port divides by c instead. RecurrentGemma
    computes 1 - a² and clips the derivative of its root at 1000; here nothing is clipped. Parameters: log_a =
    -softplus(param) in RecurrentGemma, whose sign of the parameter is opposite to the paper's Λ.

References
    [1] S. De, S. L. Smith, A. Fernando et al., "Griffin: mixing gated linear recurrences with local attention for efficient
        language models", 2024, section 2.4.
    [2] A. Botev, S. De, S. L. Smith et al., "RecurrentGemma", 2024, section 2.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.options import positive_int
from refimpl.laws import causal, hand_off, linear
from refimpl.op import Cost, Form, Law, Op
from refimpl.ops.recurrence import linear_recurrence as lr


def _exponent_is_positive(arguments, sizes):
    exponent = arguments.get("exponent", 8.0)
    if isinstance(exponent, bool) or not isinstance(exponent, int | float) or not exponent > 0:
        raise ValueError(f"rg_lru: exponent must be a positive number, got {exponent!r}")


CONTRACT = Contract(
    "rg_lru",
    takes="x (..., T, c); r (..., T, c); i (..., T, c); log_a (c); reset:bool (..., T); state (..., c)",
    gives="h (..., T, c)",
    check=_exponent_is_positive,
)


@CONTRACT.form
def rg_lru(x, r, i, log_a, *, exponent=8.0, reset=None, state=None, return_state=False):
    """Real-gated linear recurrent unit, equation (1), step by step.

    Parameters
    ----------
    x : ndarray, shape (..., T, c)
        Input. T may be 0.
    r, i : ndarray, shape (..., T, c)
        Recurrence and input gates, in (0, 1).
    log_a : ndarray, shape (c,)
        Logarithm of each channel's decay, at most 0 (above it the root is of a negative number: NaN).
    exponent : float
        How much a fully open recurrence gate multiplies log_a.
    reset : ndarray of bool, shape (..., T), optional
        Where a segment starts, so that nothing before it is seen.
    state : ndarray, shape (..., c), optional
        h before the first step; zeros by default.
    return_state : bool
        Also return the last h, to go on from.

    Returns
    -------
    h : ndarray, shape (..., T, c)
    state : ndarray, shape (..., c), only with `return_state`

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, an array is not numeric, or the exponent is not positive.

    Notes
    -----
    10 T c operations, 2 T deep. The error is that of the recurrence, plus what rounding log a_t does to a_t and to the
    root; where a_t is within u of 1 an implementation that subtracts a_t² has no digits of the root left.

    References
    ----------
    [1], section 2.4; and "Where implementations differ" in this module's docstring.

    Examples
    --------
    >>> import numpy as np
    >>> half = np.log([0.5])
    >>> h = rg_lru(np.array([[1.0], [0.0]]), np.ones((2, 1)), np.ones((2, 1)), half, exponent=1.0)
    >>> h[:, 0].round(4)  # √(1 - 1/4), and half of it
    array([0.866, 0.433])
    """
    a, b = _gated(x, r, i, log_a, exponent, reset)
    return lr.linear_recurrence(a, b, state=state, return_state=return_state)


@CONTRACT.form
def rg_lru_scan(x, r, i, log_a, *, exponent=8.0, reset=None, state=None, return_state=False):
    """The same by a parallel prefix scan: (1) is a linear recurrence once its gates are known. 4 log2 T deep.

    A reset is a decay of 0, which the scan's composition carries along; nothing has to be cut.
    """
    a, b = _gated(x, r, i, log_a, exponent, reset)
    return lr.linear_recurrence_blelloch(a, b, state=state, return_state=return_state)


@CONTRACT.form
def rg_lru_chunked(x, r, i, log_a, *, exponent=8.0, reset=None, state=None, return_state=False, chunk=64):
    """The same in chunks, all chunks at once and then their carries: the form of kernels. 2 (chunk + T/chunk) deep."""
    positive_int("rg_lru", "chunk", chunk)
    a, b = _gated(x, r, i, log_a, exponent, reset)
    return lr.linear_recurrence_chunked(a, b, state=state, return_state=return_state, chunk=chunk)


@CONTRACT.gradient
def rg_lru_vjp(dy, x, r, i, log_a, *, exponent=8.0, reset=None, state=None, dstate=None):
    """Gradient of `rg_lru`: through the recurrence, then through the gates.

    With w_t = log a_t, m_t = √(1 - e^(2 w_t)), b_t = m_t i_t x_t and (da, db) from the recurrence,

        dw = a da - (a² / m) i x db,    dr = exponent log_a dw,    dlog_a = Σ_t exponent r_t dw_t,    dx = m i db,    di = m x db

    where a segment starts dw = 0. At a_t = 1 the root has no derivative: 0 is taken there, as at any kink.

    Parameters
    ----------
    dy : ndarray, shape (..., T, c)
        Cotangent of h.
    dstate : ndarray, shape (..., c), optional
        Cotangent of the final state.

    Returns
    -------
    dict
        "x", "r", "i", "log_a", and "state" where one was given.
    """
    a, m = _decay_and_factor(r, log_a, exponent, reset)
    a, b = (np.broadcast_to(v, dy.shape) for v in (a, m * i * x))  # or the recurrence would sum what is missing
    through = lr.linear_recurrence_vjp(dy, a, b, state=_initial(state, b), dstate=dstate)
    db = through["b"]
    flat = (m == 0) if reset is None else (m == 0) | reset[..., None]
    slope = np.where(flat, np.zeros_like(m), -a * a / np.where(flat, np.ones_like(m), m))  # dm/dw; at a reset a = 0
    dw = a * through["a"] + slope * np.conj(i * x) * db
    return {"x": m * i * db, "r": exponent * log_a * dw, "i": m * np.conj(x) * db, "log_a": exponent * r * dw, "state": through["state"]}


def error_bound(x, r, i, log_a, *, unit, store=0.0, exponent=8.0, reset=None, state=None, return_state=False):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`.

    The recurrence's own bound, on the absolute values; and what goes into it. w = log a_t has two roundings, so a_t is
    off by 4 (1 + |w|) u of itself; 1 - a_t², if it is subtracted, by (2 + 8 (1 + |w|) a_t²) u, and its root by that over
    the root or by its root, whichever is less. Inputs b kept in a half precision add `store` twice.
    """
    a, m = _decay_and_factor(r, log_a, exponent, reset)
    gated = abs(i * x)
    w = abs(exponent * r * log_a)
    da = 4 * (1 + w) * unit * a
    of_square = (2 + 8 * (1 + w) * a * a) * unit
    dm = np.minimum(of_square / np.where(m > 0, m, 1), np.sqrt(of_square)) + 2 * unit * m
    if reset is not None:
        dm = np.where(reset[..., None], 2 * unit, dm)
    b = m * gated
    first = None if state is None else abs(state)
    H, last = lr.linear_recurrence(a, b, state=first, return_state=True)
    start = np.zeros_like(last) if first is None else np.broadcast_to(first, last.shape)
    before = np.concatenate([start[..., None, :], H], axis=-2)[..., :-1, :]  # (..., T, c)
    given = lr.linear_recurrence(a, da * before + dm * gated + (3 * unit + 2 * store) * b, return_state=True)
    own = lr.error_bound(a, b, unit=unit, store=store, state=first, return_state=True)
    E, E_last = (x + y for x, y in zip(given, own, strict=True))
    return (E, E_last) if return_state else E


# -- what the forms share --------------------------------------------------------------------------------------------


def _gated(x, r, i, log_a, exponent, reset):
    """(1) as h_t = a_t h_{t-1} + b_t."""
    a, m = _decay_and_factor(r, log_a, exponent, reset)
    return a, m * (i * x)


def _decay_and_factor(r, log_a, exponent, reset):
    w = exponent * r * log_a  # log a_t: (..., T, c)
    a, m = np.exp(w), np.sqrt(-np.expm1(2 * w))
    if reset is not None:
        starts = reset[..., None]  # (..., T, 1)
        a, m = np.where(starts, np.zeros_like(a), a), np.where(starts, np.ones_like(m), m)
    return a, m


def _initial(state, b):
    """The state, for a gradient that is asked for one."""
    return np.zeros_like(b, shape=(*b.shape[:-2], b.shape[-1])) if state is None else state


def _closed_and_open():
    """A recurrence gate of 0 keeps the state for ever; with resets everywhere nothing is remembered."""

    def holds(f, call, bound, rng):
        call = {k: v for k, v in call.items() if k not in ("reset", "return_state")}
        still = {**call, "r": 0 * call["r"]}
        h = f(**still)
        first = still.get("state")
        want = np.zeros_like(h) if first is None else np.broadcast_to(first[..., None, :], h.shape)
        yield "h with closed gates", h, want, bound(**still)
        everywhere = {**call, "reset": np.ones(call["x"].shape[:-1], dtype=bool)}
        h = f(**everywhere)
        yield "h with resets everywhere", h, np.broadcast_to(call["i"] * call["x"], h.shape), bound(**everywhere)

    return Law("closed_and_open", holds, ("r", "reset"))


def _sample(rng, *, T=7, c=3, batch=()):
    return {
        "x": rng.standard_normal((*batch, T, c)),
        "r": rng.uniform(0.1, 0.9, (*batch, T, c)),
        "i": rng.uniform(0.1, 0.9, (*batch, T, c)),
        "log_a": -rng.uniform(0.02, 0.4, c),
        "reset": rng.random((*batch, T)) < 0.2,
        "state": rng.standard_normal((*batch, c)),
    }


def _with(**changes):
    """A hard call: the sample, with some arrays replaced."""

    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        return call | {name: change(rng, call[name]) for name, change in changes.items()}

    return draw


OPS = (
    Op(
        name="rg_lru",
        summary="h_t = a_t h_{t-1} + √(1 - a_t²) i_t x_t with log a_t = exponent r_t log a",
        contract=CONTRACT,
        forms={
            "recurrent": Form(
                rg_lru, lambda T, c, batch=1: Cost(10 * T * c * batch, 2 * T + 5, 4 * T * c * batch), exact=("work", "depth", "peak")
            ),
            "scan": Form(
                rg_lru_scan, lambda T, c, batch=1: Cost(14 * T * c * batch, 4 * np.ceil(np.log2(max(T, 2))) + 3, 8 * T * c * batch)
            ),
            "chunked": Form(
                rg_lru_chunked,
                lambda T, c, batch=1, chunk=64: Cost(
                    (13 * T + 5 * (-T % chunk)) * c * batch, 2 * (chunk + np.ceil(T / chunk)) + 3, (7 * T + 7 * (-T % chunk)) * c * batch
                ),
            ),
        },
        gradient=rg_lru_vjp,
        sample=_sample,
        options={"exponent": (8.0, 2.0)},
        hard={
            "a decay of nearly 1": _with(log_a=lambda rng, a: np.where(np.arange(len(a)) % 2 == 0, -(2.0**-11), a)),
            "a decay of 0": _with(log_a=lambda rng, a: np.where(np.arange(len(a)) % 2 == 0, -1e3, a)),
            "long memory": _with(log_a=lambda rng, a: a / 1000),
            "gates nearly closed": _with(r=lambda rng, r: r * 1e-4),
            "gates shut or open": _with(r=lambda rng, r: np.where(r < 0.5, 2.0**-9, 1.0), i=lambda rng, i: np.round(i)),
            "reset everywhere": _with(reset=lambda rng, s: s | True),
            "reset at the start only": _with(reset=lambda rng, s: np.broadcast_to(np.arange(s.shape[-1]) == 0, s.shape)),
            "large": _with(x=lambda rng, x: 1e6 * x),
            "one needle": _with(
                x=lambda rng, x: x * (np.arange(x.shape[-2]) == x.shape[-2] // 3)[:, None],
                state=lambda rng, s: s * 0,
                reset=lambda rng, s: s & False,
            ),
        },
        error_bound=error_bound,
        references=("de2024griffin, section 2.4", "botev2024recurrentgemma, section 2"),
        sizes=({"c": 1}, {"c": 64}, {"batch": (2,)}, {"batch": (2, 3)}),
        laws=(causal(CONTRACT, "x", "r", "i"), linear(CONTRACT, "x", "state"), hand_off(CONTRACT), _closed_and_open()),
    ),
)
