"""LSTM: a cell that is added to, and three gates that decide what is written, kept and shown.

    i = σ(x W_i + h R_i + b_i),    f = σ(x W_f + h R_f + b_f),    o = σ(x W_o + h R_o + b_o)              (1)
    g = tanh(x W_g + h R_g + b_g)                                                                        (2)
    c_t = f c_{t-1} + i g,         h_t = o tanh(c_t)                                                     (3)

with x = x_t, h = h_{t-1}, all of them rows. What made the LSTM last is the sum in (3): along c a gradient passes through a
product with f, and through no matrix [1, 2]. The matrices in (1) read h, so that a step must wait for the one before.

Glossary
    x           input x_t
    W, R, b     W_i, W_f, W_g, W_o, in this order, likewise R and b; they act from the right, as on rows
    h, c        hidden and cell state, together the state; the result is h of all steps

Where implementations differ
    Order of the gates: i, f, g, o here, in torch and cuDNN; i, o, f, g in ONNX; i, g, f, o (with 1 added to f) in old TensorFlow.
    torch and cuDNN have two biases, whose sum is b; torch's weights are the transposes, stacked: weight_ih = concat(W_gᵀ).
    ONNX's peepholes (gates that look at c) are not part of this operator. The paper's first version had no forget gate [1].

References
    [1] S. Hochreiter, J. Schmidhuber, "Long Short-Term Memory", Neural Computation 9(8), 1997, section 4.
    [2] F. A. Gers, J. Schmidhuber, F. Cummins, "Learning to Forget: Continual Prediction with LSTM", Neural Computation 12(10),
        2000, equations 2-8.
"""

from typing import NamedTuple

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.numerics import sigmoid, sqrt_of, tanh_derivative
from refimpl.core.propagation import Propagation
from refimpl.laws import carries_nan, causal, hand_off
from refimpl.op import Cost, Form, Law, Op


class State(NamedTuple):
    """The state between two steps, each of shape (..., d); zeros before the first."""

    h: np.ndarray
    c: np.ndarray


def _check(arguments, sizes):
    for name in ("x", "W", "R", "b"):
        if arguments.get(name) is not None and arguments[name].dtype.kind == "c":
            raise TypeError(f"lstm: {name} must be real, got dtype {arguments[name].dtype}")


CONTRACT = Contract(
    "lstm",
    takes="x (..., T, c); W (4, c, d); R (4, d, d); b (4, d); state.h (..., d); state.c (..., d)",
    gives="h (..., T, d)",
    check=_check,
)


@CONTRACT.form
def lstm(x, W, R, b=None, *, state=None, return_state=False):
    """LSTM, equations (1) to (3), one step at a time.

    Parameters
    ----------
    x : ndarray, shape (..., T, c)
        Input.
    W : ndarray, shape (4, c, d)
        Input weights of the gates i, f, g, o, in this order.
    R : ndarray, shape (4, d, d)
        Recurrent weights, acting on h from the right: h R.
    b : ndarray, shape (4, d), optional
    state : State, optional
        (h, c) before the first step; zeros by default.
    return_state : bool
        Also return the final state.

    Returns
    -------
    h : ndarray, shape (..., T, d)
    state : State, only with `return_state`

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit or an array is not numeric.

    Notes
    -----
    8 T d (c + d) operations, T steps of a matrix product each. The error is at most ``error_bound``.

    Examples
    --------
    Gates half open, and a cell input of 1: c is 1/2, then 3/4.

    >>> import numpy as np
    >>> W, R = np.zeros((4, 1, 1)), np.zeros((4, 1, 1))
    >>> W[2] = 50.0
    >>> h, state = lstm(np.ones((2, 1)), W, R, return_state=True)
    >>> state.c
    array([0.75])
    """
    b, h, c = _prepare(x, R, b, state)
    hs = []
    for t in range(x.shape[-2]):
        i, f, g, o = (x[..., t, :] @ W[gate] + h @ R[gate] + b[gate] for gate in range(4))  # (..., d)
        h, c = _cell(i, f, g, o, c)
        hs.append(h)
    y = np.stack(hs, axis=-2) if hs else _nothing(x, h)  # (..., T, d)
    return (y, State(h, c)) if return_state else y


def _cell(i, f, g, o, c):
    """(3), from pre-activations."""
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


@CONTRACT.form
def lstm_fused(x, W, R, b=None, *, state=None, return_state=False):
    """The same in two products: x W of all gates and all steps before the loop, h R of all gates in each step.

    The input's half of the work becomes one large product, which a machine does at its full speed; the loop is left with
    what is truly sequential. The same operations in number, 4 T d more elements in memory.
    """
    b, h, c = _prepare(x, R, b, state)
    from_x = x @ _side_by_side(W) + b.reshape(-1)  # (..., T, 4 d)
    R = _side_by_side(R)  # (d, 4 d)
    hs = []
    for t in range(x.shape[-2]):
        h, c = _cell(*np.split(from_x[..., t, :] + h @ R, 4, axis=-1), c)
        hs.append(h)
    y = np.stack(hs, axis=-2) if hs else _nothing(x, h)  # (..., T, d)
    return (y, State(h, c)) if return_state else y


@CONTRACT.gradient
def lstm_vjp(dy, x, W, R, b=None, *, state=None, dstate=None):
    """Gradient of `lstm`: backpropagation through time.

    With dh, dc the cotangents of the state after step t, dh including dy_t, and ĩ, f̃, g̃, õ the pre-activations:

        (3)  do = dh tanh(c),  dc += dh o (1 - tanh² c);    di = dc g,  df = dc c_{t-1},  dg = dc i,  dc_{t-1} = f dc
        (1)  dĩ = di i (1 - i),  and likewise df̃, dõ;    dg̃ = dg (1 - g²)
             dx = Σ da Wᵀ,  dh_{t-1} = Σ da Rᵀ,  dW += xᵀ da,  dR += h_{t-1}ᵀ da,  db += da        over the four gates a

    Parameters
    ----------
    dy : ndarray, shape (..., T, d)
        Cotangent of h.
    dstate : State, optional
        Cotangent (dh, dc) of the final state; its h is that of the state, in addition to dy.

    Returns
    -------
    dict
        "x", "W", "R", and "b", "state" where given.
    """
    b, h, c = _prepare(x, R, b, state)
    before, gates = [], []
    for t in range(x.shape[-2]):
        before.append(State(h, c))
        gates.append([x[..., t, :] @ W[gate] + h @ R[gate] + b[gate] for gate in range(4)])
        h, c = _cell(*gates[-1], c)
    dh, dc = (np.zeros_like(h), np.zeros_like(c)) if dstate is None else dstate
    das = []
    for t in reversed(range(x.shape[-2])):
        (i, f, g, o), c_before = gates[t], before[t].c
        dh = dh + dy[..., t, :]
        d_o = dh * np.tanh(c) * sigmoid(o) * sigmoid(-o)
        dc = dc + dh * sigmoid(o) * tanh_derivative(c)
        d_i = dc * np.tanh(g) * sigmoid(i) * sigmoid(-i)
        d_f = dc * c_before * sigmoid(f) * sigmoid(-f)
        d_g = dc * sigmoid(i) * tanh_derivative(g)
        das.append(np.stack([d_i, d_f, d_g, d_o], axis=-2))  # (..., 4, d)
        dh = (das[-1][..., None, :] @ _transposed(R))[..., 0, :].sum(axis=-2)  # Σ da Rᵀ
        dc, c = sigmoid(f) * dc, c_before
    if not das:
        return {"x": x, "W": 0 * W, "R": 0 * R, "b": 0 * b, "state": State(dh, dc)}
    da = np.stack(das[::-1], axis=-2)  # (..., 4, T, d)
    h_before = np.stack([s.h for s in before], axis=-2)  # (..., T, d)
    return {
        "x": (da @ _transposed(W)).sum(axis=-3),
        "W": _transposed(x)[..., None, :, :] @ da,  # (..., 4, c, d)
        "R": _transposed(h_before)[..., None, :, :] @ da,  # (..., 4, d, d)
        "b": da.sum(axis=-2),
        "state": State(dh, dc),
    }


@CONTRACT.form
def error_bound(x, W, R, b=None, *, unit, store=0.0, state=None, return_state=False):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`.

    To first order, with Δĩ = Δh R_i + δ and so on for each gate,

        Δc <- f Δc + c_{t-1} f' Δf̃ + g i' Δĩ + i g' Δg̃,        Δh = o (1 - tanh² c) Δc + tanh(c) o' Δõ

    which are the J of `core.propagation` over (h, c). Local errors δ: of a pre-activation 6 √(c + d) u (|x| |W| + |h| |R| + |b|);
    4 u of each gate (absolute: σ is often computed as (1 + tanh(x / 2)) / 2); 3 u of each product and sum in (3); and with
    `store` twice each of these intermediates.
    """
    b, h, c = _prepare(x, R, b, state)
    d = R.shape[-1]
    eye, E, E_c = np.eye(d, dtype=h.dtype), [], np.zeros_like(c)
    errors = Propagation(np.zeros_like(h, shape=(*h.shape[:-1], 2 * d)))
    for t in range(x.shape[-2]):
        before = State(h, c)
        a = [x[..., t, :] @ W[gate] + h @ R[gate] + b[gate] for gate in range(4)]
        size = [abs(x[..., t, :]) @ abs(W[gate]) + abs(h) @ abs(R[gate]) + abs(b[gate]) for gate in range(4)]
        dots = [(unit * (6 * sqrt_of(sum(W.shape[1:]), x) + 6) + 2 * store) * s for s in size]
        h, c = _cell(*a, before.c)
        i, f, g, o = (np.tanh(v) if gate == 2 else sigmoid(v) for gate, v in enumerate(a))
        slopes = [g * i * sigmoid(-a[0]), before.c * f * sigmoid(-a[1]), i * tanh_derivative(a[2])]  # dc/da: (..., d)
        slope_o, slope_c = np.tanh(c) * o * sigmoid(-a[3]), o * tanh_derivative(c)
        rows_c = np.concatenate([sum(w[..., None] * R[gate].T for gate, w in enumerate(slopes)), f[..., None] * eye], axis=-1)
        rows_h = slope_c[..., None] * rows_c + np.concatenate([slope_o[..., None] * R[3].T, 0 * f[..., None] * eye], axis=-1)
        local_c = sum(abs(w) * dots[gate] for gate, w in enumerate(slopes)) + 4 * unit * (abs(g) + abs(before.c) + i)
        local_c = local_c + (3 * unit + 4 * store) * (abs(f * before.c) + abs(i * g))
        local_h = slope_c * local_c + abs(slope_o) * dots[3] + 4 * unit * (abs(np.tanh(c)) + o) + (3 * unit + 4 * store) * abs(h)
        J, local = np.concatenate([rows_h, rows_c], axis=-2), np.concatenate([local_h, local_c], axis=-1)
        E_h, E_c = np.split(errors.step(J, local), 2, axis=-1)
        E.append(E_h)
    y = np.stack(E, axis=-2) if E else _nothing(x, h)  # (..., T, d)
    return (y, State(E[-1] if E else 0 * h, E_c)) if return_state else y


# -- what the forms share --------------------------------------------------------------------------------------------


def _prepare(x, R, b, state):
    """A bias and a state, each (..., d)."""
    b = np.zeros_like(R[:, 0, :]) if b is None else b
    if state is None:
        zeros = np.zeros_like(x, shape=(*x.shape[:-2], R.shape[-1]))
        return b, zeros, zeros
    batch = np.broadcast_shapes(x.shape[:-2], *(s.shape[:-1] for s in state))
    return b, *(np.broadcast_to(s, (*batch, s.shape[-1])) for s in state)


def _nothing(x, h):
    """The result of no steps."""
    return np.zeros_like(x, shape=(*h.shape[:-1], 0, h.shape[-1]))


def _side_by_side(weights):
    """(4, c, d) as (c, 4 d)."""
    return np.concatenate(list(weights), axis=-1)


def _transposed(x):
    return np.swapaxes(x, -1, -2)


def _sample(rng, *, T=7, c=3, d=4, batch=()):
    return {
        "x": rng.standard_normal((*batch, T, c)),
        "W": rng.standard_normal((4, c, d)) / np.sqrt(c),
        "R": 0.7 * rng.standard_normal((4, d, d)) / np.sqrt(d),
        "b": rng.standard_normal((4, d)) / 2,
        "state": State(rng.uniform(-1, 1, (*batch, d)), rng.standard_normal((*batch, d))),
    }


def _with(**changes):
    """A hard call: the sample, with some arrays replaced."""

    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        return call | {name: change(rng, call[name]) for name, change in changes.items()}

    return draw


def _gates(*values):
    """Biases that set the gates i, f, g, o whatever the input: each a number, or None to leave it as it is."""
    return lambda rng, b: np.stack([row if v is None else 0 * row + v for row, v in zip(b, values, strict=True)])


def _cell_only(f, call, bound, rng):
    """Law: with W = R = 0 the gates are constants of b, and c and h follow from the geometric series."""
    b = call.get("b")
    if b is None:
        return
    still = {"x": call["x"], "W": 0 * call["W"], "R": 0 * call["R"], "b": b}
    i, keep, g, o = sigmoid(b[0]), sigmoid(b[1]), np.tanh(b[2]), sigmoid(b[3])
    steps = np.arange(1, call["x"].shape[-2] + 1)[:, None]
    c = i * g * ((1 - keep**steps) / (1 - keep))
    want = np.broadcast_to(o * np.tanh(c), (*call["x"].shape[:-2], *c.shape))
    yield "h of constant gates", f(**still), want.astype(b.dtype), 8 * bound(**still)


def _cost(T, c, d, batch=1, **_):
    return Cost(
        batch * T * (8 * d * (c + d) + 17 * d),
        T * (8 + log2_ceil(d)) + max(log2_ceil(c) - log2_ceil(d), 0),
        max(T + 10, 2 * T + 5) * d * batch + 4 * d,
    )


def _cost_fused(T, c, d, batch=1, **_):
    return Cost(
        batch * T * (8 * d * (c + d) + 17 * d),
        T * (7 + log2_ceil(d)) + max(log2_ceil(c) - log2_ceil(d), 0) + 1,
        batch * (8 * T * d + 6 * d) + 4 * (c + d) * d,
    )


OPS = (
    Op(
        name="lstm",
        summary="LSTM: c <- f c + i g, h = o tanh(c), gates from x W + h R + b",
        contract=CONTRACT,
        forms={"recurrent": Form(lstm, _cost, exact=("work", "depth")), "fused": Form(lstm_fused, _cost_fused, exact=("work",))},
        gradient=lstm_vjp,
        sample=_sample,
        hard={
            "saturated": _with(x=lambda rng, x: 1e6 * x),  # all of it: half way out, kernels differ in what 1 - σ is
            "everything is kept": _with(b=_gates(None, 40.0, None, None)),
            "gates nearly open": _with(b=_gates(7.0, 7.0, None, 7.0)),
            "nothing is kept": _with(b=_gates(None, -1e3, None, None)),
            "nothing is written": _with(b=_gates(-1e3, None, None, None)),
            "a counter": _with(b=_gates(40.0, 40.0, 40.0, None), R=lambda rng, R: 0 * R, W=lambda rng, W: 0 * W),
            "a cell far from 0": _with(state=lambda rng, s: s._replace(c=s.c * 1e4), b=_gates(None, 10.0, None, None)),
            "zeros": _with(x=lambda rng, x: 0 * x, state=lambda rng, s: State(0 * s.h, 0 * s.c), b=lambda rng, b: 0 * b),
            "no initial state": _with(state=lambda rng, s: None),
            "no bias": _with(b=lambda rng, b: None),
        },
        error_bound=error_bound,
        references=("hochreiter1997, section 4", "gers2000, equations 2-8"),
        sizes=({"c": 1, "d": 1}, {"c": 2, "d": 16}, {"c": 4, "d": 4}, {"batch": (2,)}, {"batch": (2, 3)}),
        laws=(causal(CONTRACT, "x"), hand_off(CONTRACT), Law("cell_only", _cell_only, ("W", "R", "b")), carries_nan(CONTRACT, "x")),
    ),
)
