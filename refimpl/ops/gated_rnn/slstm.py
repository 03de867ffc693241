"""sLSTM: an LSTM with exponential gates, a normaliser, and a stabiliser.

    z̃_t = z_t + R_z h_{t-1} + b_z,     and likewise ĩ_t, f̃_t, õ_t                                       (1)
    z = tanh(z̃),   i = exp(ĩ),   f = σ(f̃) or exp(f̃),   o = σ(õ)                                         (2)
    c_t = f_t c_{t-1} + i_t z_t,      n_t = f_t n_{t-1} + i_t,      h_t = o_t c_t / n_t                  (3)

c/n is a weighted mean of all z so far: an exponential input gate can raise a new value above everything stored, which the
sigmoid of an LSTM cannot; the mean keeps h in (-1, 1) all the same. The recurrence reads h, through one matrix per gate and
head (R is block diagonal over heads), so that there is no parallel form: a step must wait for the one before.

Since exp(ĩ) overflows, c and n are kept divided by e^m, m the running maximum of the exponents [1, eq. 15-17]:

    m_t = max(log f_t + m_{t-1}, ĩ_t),     i' = exp(ĩ_t - m_t),     f' = exp(log f_t + m_{t-1} - m_t)    (4)

and (3) holds with i', f'; their quotient, hence h, does not depend on m.

Glossary
    z, i, f, o      what the input gives to the pre-activations, W x in [1, eq. 10-13]; the chapter adds R h + b
    R, bias         R_z, R_i, R_f, R_o and b, in this order, a matrix and a vector per head; (R h)_i = Σ_j R_ij h_j
    c, n, h, m      cell, normaliser, hidden, stabiliser state [1, eq. 8-17]; together the state
    F               log f

Where implementations differ
    (R h)_i = Σ_j R_ij h_j here and in the paper; `lstm` and `gru` in this package write h R. xlstm stores the gates in the order
    i, f, z, o and the transpose of R. Its first step sets m to ĩ, which is what m = -∞ does.

References
    [1] M. Beck, K. Pöppel, M. Spanring, A. Auer, O. Prudnikova, M. Kopp, G. Klambauer, J. Brandstetter, S. Hochreiter,
        "xLSTM: Extended Long Short-Term Memory", NeurIPS 2024, section 2.2 and appendix A.2.
"""

from typing import NamedTuple

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.numerics import finite_or_zero, log_sigmoid, sigmoid, tanh_derivative
from refimpl.core.options import one_of
from refimpl.core.propagation import Propagation
from refimpl.laws import carries_nan, causal, hand_off
from refimpl.op import Cost, Form, Law, Op


class State(NamedTuple):
    """The state between two steps, each of shape (..., H, d). Before the first step c = n = h = 0, m = -∞.

    c and n stand for c e^m and n e^m.
    """

    c: np.ndarray
    n: np.ndarray
    h: np.ndarray
    m: np.ndarray


def _check(arguments, sizes):
    one_of("slstm", "forget", arguments.get("forget", "exp"), ("sigmoid", "exp"))
    for name in ("z", "i", "f", "o", "R", "bias"):
        if arguments.get(name) is not None and arguments[name].dtype.kind == "c":
            raise TypeError(f"slstm: {name} must be real, got dtype {arguments[name].dtype}")


CONTRACT = Contract(
    "slstm",
    takes="z (..., H?, T, d); i (..., H?, T, d); f (..., H?, T, d); o (..., H?, T, d); R (4, H?, d, d); bias (4, H?, d);"
    "state.c (..., H?, d); state.n (..., H?, d); state.h (..., H?, d); state.m (..., H?, d)",
    gives="h (..., H?, T, d)",
    check=_check,
)


@CONTRACT.form
def slstm(z, i, f, o, R, bias=None, *, forget="sigmoid", state=None, return_state=False):
    """sLSTM, equations (1) to (4), one step at a time.

    Parameters
    ----------
    z, i, f, o : ndarray, shape (..., H, T, d)
        What the input gives to the pre-activations of cell input, input gate, forget gate, output gate. Without the axis H
        there is one head.
    R : ndarray, shape (4, H, d, d)
        Recurrent matrices in the order z, i, f, o; they multiply h from the left.
    bias : ndarray, shape (4, H, d), optional
    forget : {"sigmoid", "exp"}
        Activation of the forget gate.
    state : State, optional
        (c, n, h, m) before the first step; (0, 0, 0, -∞) by default.
    return_state : bool
        Also return the final state.

    Returns
    -------
    h : ndarray, shape (..., H, T, d)
    state : State, only with `return_state`

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, an array is not numeric, or `forget` is unknown.

    Notes
    -----
    8 T d² operations per head, T steps of a matrix product each. The error is at most ``error_bound``. Recurrent nets amplify
    rounding errors by what they do to any other small change: for R of large norm that is exponential in T.

    Examples
    --------
    Without recurrence h is o times the mean of what was written; the second step is e times heavier than the first:

    >>> import numpy as np
    >>> z, i = np.arctanh([[0.0], [0.5]]), np.array([[0.0], [1.0]])
    >>> f, o, R = np.zeros((2, 1)), np.full((2, 1), 50.0), np.zeros((4, 1, 1))
    >>> h = slstm(z, i, f, o, R, forget="exp")[:, 0]
    >>> bool(np.isclose(h[1], 0.5 * np.e / (1 + np.e)))
    True
    """
    x, c, n, h, m = _prepare(z, i, f, o, R, bias, state)
    hs = []
    for t in range(x.shape[-2]):
        c, n, h, m = _step(x[..., t, :], R, forget, c, n, h, m)[0]
        hs.append(h)
    y = np.stack(hs, axis=-2) if hs else x[..., 0, :, :, :]  # (..., H, T, d)
    return (y, State(c, n, h, m)) if return_state else y


def _step(x, R, forget, c, n, h, m):
    """One step, and what the gradient asks of it: x (..., 4, H, d), the state's parts (..., H, d)."""
    a = x + _recurrent(R, h)  # z̃, ĩ, f̃, õ: (..., 4, H, d)
    z, i, o = np.tanh(a[..., 0, :, :]), a[..., 1, :, :], sigmoid(a[..., 3, :, :])
    F = log_sigmoid(a[..., 2, :, :]) if forget == "sigmoid" else a[..., 2, :, :]
    decayed = F + m
    m = np.maximum(decayed, i)
    f_prime, i_prime = np.exp(decayed - finite_or_zero(m)), np.exp(i - finite_or_zero(m))
    c, n = f_prime * c + i_prime * z, f_prime * n + i_prime
    return State(c, n, o * (c / n), m), (a, z, o, F, f_prime, i_prime)


@CONTRACT.form
def slstm_naive(z, i, f, o, R, bias=None, *, forget="sigmoid", state=None, return_state=False):
    """The same without (4): what the stabilised form must equal as long as no gate overflows. Its m is 0.

    c and n are those of (3), in true units; the cost is the same.
    """
    x, c, n, h, m = _prepare(z, i, f, o, R, bias, state)
    c, n, m = c * np.exp(m), n * np.exp(m), np.zeros_like(m)
    hs = []
    for t in range(x.shape[-2]):
        z_pre, i_pre, f_pre, o_pre = np.moveaxis(x[..., t, :] + _recurrent(R, h), -3, 0)
        f_gate = sigmoid(f_pre) if forget == "sigmoid" else np.exp(f_pre)
        c = f_gate * c + np.exp(i_pre) * np.tanh(z_pre)
        n = f_gate * n + np.exp(i_pre)
        h = sigmoid(o_pre) * (c / n) + 0 * n  # NaN where n has overflowed: c/∞ = 0 would be a wrong number
        hs.append(h)
    y = np.stack(hs, axis=-2) if hs else x[..., 0, :, :, :]  # (..., H, T, d)
    return (y, State(c, n, h, m)) if return_state else y


@CONTRACT.gradient
def slstm_vjp(dy, z, i, f, o, R, bias=None, *, forget="sigmoid", state=None, dstate=None):
    """Gradient of `slstm`: backpropagation through time.

    With dc, dn, dh, dm the cotangents of the state after step t, dh including dy_t:

        (3)  do = dh c/n,   dc += dh o/n,   dn -= dh h/n
             df' = dc c_{t-1} + dn n_{t-1},   di' = dc z + dn,   dz = i' dc,   dc_{t-1} = f' dc,   dn_{t-1} = f' dn
        (4)  d(log f + m_{t-1}) = f' df',   dĩ = i' di',   dm -= f' df' + i' di';   dm goes to the larger argument of the max
        (2)  dz̃ = dz (1 - z²),   df̃ = dlog f · σ(-f̃) or dlog f,   dõ = do o (1 - o)
        (1)  dh_{t-1} = Σ Rᵀ da,   dR += da h_{t-1}ᵀ,   dbias += da        over the four gates a

    A tie in the max, log f + m_{t-1} = ĩ, sends dm to the left.

    Parameters
    ----------
    dy : ndarray, shape (..., H, T, d)
        Cotangent of h.
    dstate : State, optional
        Cotangent (dc, dn, dh, dm) of the final state; its h is that of the state, in addition to dy.

    Returns
    -------
    dict
        "z", "i", "f", "o", "R", and "bias", "state" where given.
    """
    x, *first = _prepare(z, i, f, o, R, bias, state)
    steps = [(State(*first), ())]
    for t in range(x.shape[-2]):
        steps.append(_step(x[..., t, :], R, forget, *steps[-1][0]))
    dc, dn, dh, dm = (np.zeros_like(s) for s in first) if dstate is None else dstate
    das = []
    for t in reversed(range(x.shape[-2])):
        (c, n, h, _), (a, z_t, o_t, F, f_prime, i_prime) = steps[t + 1]
        before = steps[t][0]
        dh = dh + dy[..., t, :]
        dc, dn = dc + dh * o_t / n, dn - dh * h / n
        d_decayed, d_i = f_prime * (dc * before.c + dn * before.n), i_prime * (dc * z_t + dn)
        dm = dm - d_decayed - d_i
        to_left = F + before.m >= a[..., 1, :, :]
        d_decayed, d_i = d_decayed + np.where(to_left, dm, 0), d_i + np.where(to_left, 0, dm)
        d_z = i_prime * dc * tanh_derivative(a[..., 0, :, :])
        d_f = d_decayed * sigmoid(-a[..., 2, :, :]) if forget == "sigmoid" else d_decayed
        d_o = dh * (c / n) * o_t * sigmoid(-a[..., 3, :, :])
        da = np.stack([d_z, d_i, d_f, d_o], axis=-3)  # (..., 4, H, d)
        das.append(da)
        dc, dn, dm = f_prime * dc, f_prime * dn, d_decayed
        dh = (np.swapaxes(R, -1, -2) @ da[..., None])[..., 0].sum(axis=-3)  # Σ Rᵀ da
    da = np.stack(das[::-1], axis=-2) if das else x  # (..., 4, H, T, d)
    read = np.stack([s.h for s, _ in steps[:-1]], axis=-2) if das else x[..., 0, :, :, :]  # h_{t-1}: (..., H, T, d)
    dR = np.swapaxes(da, -1, -2) @ read[..., None, :, :, :]  # (..., 4, H, d, d)
    inputs = dict(zip("zifo", np.moveaxis(da, -4, 0), strict=True))
    return inputs | {"R": dR, "bias": da.sum(axis=-2), "state": State(dc, dn, dh, dm)}


@CONTRACT.form
def error_bound(z, i, f, o, R, bias=None, *, unit, store=0.0, forget="sigmoid", state=None, return_state=False):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`.

    With y = c/n, L = log n + m and β = i'/n, a step is y <- (1 - β) y + β z, log β = ĩ - L, so that to first order

        ΔL <- (1 - β)(ΔL + Δlog f) + β Δĩ,      Δy <- (1 - β) Δy + β Δz + β (1 - β)(z - y)(Δĩ - Δlog f - ΔL)
        Δh = o Δy + y Δo,                       Δa = R Δh + local rounding

    are the J of `core.propagation` over (h, y, L). Local are: the dot products of (1), 6 √d u of |x| + |R| |h|; 4 u of each
    function; the sums in exponents, u of |log f|, |ĩ|, |m|; and with `store` each of them, c, n and h once more. Then
    Δm = max(Δm + Δlog f, Δĩ), Δn = n (ΔL + Δm), Δc = n Δy + |c| (ΔL + Δm).
    """
    x, *first = _prepare(z, i, f, o, R, bias, state)
    size = _prepare(abs(z), abs(i), abs(f), abs(o), R, None if bias is None else abs(bias), state)[0]
    now, d = State(*first), x.shape[-1]
    eye, zero = np.eye(d, dtype=x.dtype), np.zeros_like(x[..., 0, :, :1, :1].sum(axis=-2), shape=(*now.h.shape, d))
    errors, E_h, E_m, E = Propagation(np.zeros_like(now.h, shape=(*now.h.shape[:-1], 3 * d))), 0 * now.h, 0 * now.h, []
    for t in range(x.shape[-2]):
        before, (now, (a, z_t, o_t, F, f_prime, i_prime)) = now, _step(x[..., t, :], R, forget, *now)
        a_z, a_i, a_f, a_o = (a[..., gate, :, :] for gate in range(4))
        dots = (unit * (6 * d**0.5 + 6) + 2 * store) * (size[..., t, :] + _recurrent(abs(R), abs(before.h)))  # (..., 4, H, d)
        beta, rest = i_prime / now.n, f_prime * before.n / now.n
        y, y_before = now.c / now.n, np.where(before.n == 0, 0, before.c / np.where(before.n == 0, 1, before.n))
        pull = beta * rest * (z_t - y_before)
        slope_f = sigmoid(-a_f) if forget == "sigmoid" else np.ones_like(a_f)
        slope_o = y * o_t * sigmoid(-a_o)
        to_y = np.stack([beta * tanh_derivative(a_z), pull, -pull * slope_f, 0 * y], axis=-3)  # d y / d a: (..., 4, H, d)
        to_L = np.stack([0 * y, beta, rest * slope_f, 0 * y], axis=-3)
        sums = abs(F) + abs(a_i) + 2 * (_size(before.m) + _size(now.m) + _size(F + before.m - finite_or_zero(now.m))) + 8
        exponents = unit * sums + 2 * store

        rows_y = np.concatenate([_rows(to_y, R), rest[..., None] * eye, -pull[..., None] * eye], axis=-1)  # (..., H, d, 3 d)
        rows_L = np.concatenate([_rows(to_L, R), zero, rest[..., None] * eye], axis=-1)
        rows_h = o_t[..., None] * rows_y + np.concatenate([slope_o[..., None] * R[3], zero, zero], axis=-1)
        local_y = (abs(to_y) * dots).sum(axis=-3) + abs(pull) * exponents + (4 * unit + 2 * store) * (abs(beta) + abs(rest * y_before))
        local_L = (abs(to_L) * dots).sum(axis=-3) + exponents
        local_h = o_t * local_y + abs(slope_o) * dots[..., 3, :, :] + (8 * unit + 2 * store) * abs(y)
        moved = _recurrent(abs(R), E_h) + dots
        J, local = np.concatenate([rows_h, rows_y, rows_L], axis=-2), np.concatenate([local_h, local_y, local_L], axis=-1)
        E_h, E_y, E_L = np.split(errors.step(J, local), 3, axis=-1)
        E_m = np.maximum(E_m + slope_f * moved[..., 2, :, :], moved[..., 1, :, :]) + exponents
        E.append(E_h)
    E_y, E_L = (E_y, E_L) if E else (0 * E_h, 0 * E_h)
    E = np.stack(E, axis=-2) if E else x[..., 0, :, :, :]
    scaled = E_L + E_m
    return (E, State(now.n * E_y + abs(now.c) * scaled, abs(now.n) * scaled, E_h, E_m)) if return_state else E


# -- what the forms share --------------------------------------------------------------------------------------------


def _prepare(z, i, f, o, R, bias, state):
    """(1) without its recurrent part, x (..., 4, H, T, d), and a state, (..., H, d) each."""
    x = np.stack(np.broadcast_arrays(z, i, f, o), axis=-4)
    x = x if bias is None else x + bias[..., None, :]
    heads = (*x.shape[:-4], x.shape[-3], x.shape[-1])
    if state is None:
        zeros = np.zeros_like(x, shape=heads)
        return x, zeros, zeros, zeros, np.full_like(x, -np.inf, shape=heads)
    heads = np.broadcast_shapes(heads, *(s.shape for s in state))
    x = np.broadcast_to(x, (*heads[:-2], *x.shape[-4:]))
    return x, *(np.broadcast_to(s, heads) for s in state)


def _recurrent(R, h):
    """R h of each gate: (..., 4, H, d)."""
    return (R @ h[..., None, :, :, None])[..., 0]


def _rows(slopes, R):
    """Σ over gates of diag(slope) R: (..., H, d, d)."""
    return (slopes[..., None] * R).sum(axis=-4)


def _size(x):
    return np.where(np.isfinite(x), abs(x), 0)


def _sample(rng, *, H=2, T=7, d=3, batch=()):
    heads = (*batch, H)

    def normal(mean, deviation):
        return mean + deviation * rng.standard_normal((*heads, T, d))

    return {
        "z": normal(0, 1),
        "i": normal(0, 1),
        "f": normal(0.5, 0.7),
        "o": normal(0.5, 1),
        "R": rng.standard_normal((4, H, d, d)) * 0.7 / np.sqrt(d),
        "bias": rng.standard_normal((4, H, d)) / 2,
        "state": State(
            rng.uniform(-1, 1, (*heads, d)),
            rng.uniform(0.3, 2, (*heads, d)),
            rng.uniform(-1, 1, (*heads, d)),
            rng.uniform(-1, 1, (*heads, d)),
        ),
    }


def _with(**changes):
    """A hard call: the sample, with some arrays replaced and some options set."""

    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        return call | {name: change(rng, call[name]) if name in call else change for name, change in changes.items()}

    return draw


def _sometimes(value):
    return lambda rng, x: np.where(rng.random(x.shape) < 0.3, value + x, x)


def _mean_of_z(f, call, bound, rng):
    """Law: without a state, h / o is a weighted mean of tanh(z̃): one constant z, no recurrence, gives o tanh(z)."""
    plain = {name: call[name] for name in ("z", "i", "f", "o")} | {"R": 0 * call["R"]}
    plain |= {"z": 0 * call["z"] + call["z"][..., :1, :], "o": 0 * call["o"], "forget": call.get("forget", "sigmoid")}
    want = np.tanh(plain["z"]) / 2
    yield "h of a constant z, half open", f(**plain), want, 2 * bound(**plain)


def _cost(each, depth, alive):
    return lambda T, d, H=1, batch=1, **_: Cost(
        batch * H * T * d * (8 * d + each), T * (log2_ceil(d) + depth), batch * H * d * (5 * T + alive)
    )


OPS = (
    Op(
        name="slstm",
        summary="LSTM with exponential gates and a normaliser, c <- f c + i z, n <- f n + i, h = o c / n, recurrent through h",
        contract=CONTRACT,
        forms={
            "stabilized": Form(slstm, _cost(23, 13, 17), exact=("work", "depth")),
            "naive": Form(
                slstm_naive,
                _cost(18, 8, 15),
                exact=("work", "depth"),
                stabilised=False,
                stops="unstabilised: exp(ĩ) or a product of exp(f̃) overflows, or all of them underflow; returns m = 0",
            ),
        },
        gradient=slstm_vjp,
        sample=_sample,
        options={"forget": ("sigmoid", "exp")},
        hard={
            "gates of -1e3": _with(i=_sometimes(-1e3), f=_sometimes(-1e3)),
            "gates of +50": _with(i=_sometimes(50.0), f=_sometimes(50.0)),
            "exponential forget gates of +50": _with(f=_sometimes(50.0), forget="exp"),
            "all gates far below": _with(i=lambda rng, x: x - 1e3, f=lambda rng, x: x - 1e3, state=lambda rng, s: s._replace(m=s.m - 1e3)),
            "huge common offset": _with(i=lambda rng, x: x + 300, state=lambda rng, s: s._replace(m=s.m + 300)),
            "saturated": _with(z=lambda rng, x: 30 * x, o=lambda rng, x: 30 * x),
            "nothing is forgotten": _with(f=lambda rng, x: 0 * x + 40),
            "no recurrence": _with(R=lambda rng, R: 0 * R),
            "no initial state": _with(state=lambda rng, s: None),
        },
        error_bound=error_bound,
        bound_work=lambda T, H, d, batch=1: batch * T * H * 4 * (3 * d) ** 3,
        references=("beck2024, section 2.2, appendix A.2",),
        sizes=({"d": 1}, {"d": 16}, {"H": 1}, {"H": 3, "batch": (2,)}, {"batch": (2, 2)}),
        laws=(causal(CONTRACT, "z", "i", "f", "o"), hand_off(CONTRACT), Law("mean_of_z", _mean_of_z, ("z", "R")), carries_nan(CONTRACT, "z")),
    ),
)
