"""GRU: a recurrent net whose one gate z says how much of the old state stays.

    r = σ(x W_r + b_r + h R_r + b'_r),        z = σ(x W_z + b_z + h R_z + b'_z)                          (1)
    n = tanh(x W_n + b_n + r (h R_n + b'_n))                     with `linear_before_reset`               (2)
    n = tanh(x W_n + b_n + (r h) R_n + b'_n)                     without                                  (2')
    h_t = (1 - z) n + z h_{t-1}                                                                          (3)

with x = x_t, h = h_{t-1}, all of them rows. (3) is a weighted mean of the old state and the candidate n, so that one gate
does what the LSTM has two for; r lets the candidate ignore the past.

Glossary
    x                   input x_t
    W, R                W_r, W_z, W_n, in this order, likewise R; they act from the right, as on rows
    b, b_recurrent      b and b'; in (2) b'_n is inside the reset, everywhere else only the sum counts
    h                   the state, and the result
    z                   1 keeps the old state, 0 replaces it

Where implementations differ
    (2) is torch's and cuDNN's (one product h R for all gates), (2') the first paper's [1]; ONNX and Keras have both, ONNX's
    default is (2'). In [1] z is what (3) calls it, in the later journal literature 1 - z and z are often exchanged. Order of
    the gates: r, z, n here, in torch and cuDNN; z, r, h in ONNX and Keras. torch's weights are the transposes, stacked.

References
    [1] K. Cho, B. van Merriënboer, C. Gulcehre, D. Bahdanau, F. Bougares, H. Schwenk, Y. Bengio, "Learning Phrase
        Representations using RNN Encoder-Decoder for Statistical Machine Translation", EMNLP 2014, section 2.3, equations 5-8.
    [2] J. Chung, C. Gulcehre, K. Cho, Y. Bengio, "Empirical Evaluation of Gated Recurrent Neural Networks on Sequence
        Modeling", 2014, section 3.2.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.numerics import sigmoid, sqrt_of, tanh_derivative
from refimpl.core.propagation import Propagation
from refimpl.laws import carries_nan, causal, hand_off
from refimpl.op import Cost, Form, Law, Op


def _check(arguments, sizes):
    for name in ("x", "W", "R", "b", "b_recurrent"):
        if arguments.get(name) is not None and arguments[name].dtype.kind == "c":
            raise TypeError(f"gru: {name} must be real, got dtype {arguments[name].dtype}")
    flag = arguments.get("linear_before_reset", True)
    if not isinstance(flag, bool | np.bool_):
        raise ValueError(f"gru: linear_before_reset must be True or False, got {flag!r}")


CONTRACT = Contract(
    "gru",
    takes="x (..., T, c); W (3, c, d); R (3, d, d); b (3, d); b_recurrent (3, d); state (..., d)",
    gives="h (..., T, d)",
    check=_check,
)


@CONTRACT.form
def gru(x, W, R, b=None, b_recurrent=None, *, linear_before_reset=True, state=None, return_state=False):
    """GRU, equations (1) to (3), one step at a time.

    Parameters
    ----------
    x : ndarray, shape (..., T, c)
        Input.
    W : ndarray, shape (3, c, d)
        Input weights of r, z, n, in this order.
    R : ndarray, shape (3, d, d)
        Recurrent weights, acting on h from the right: h R.
    b, b_recurrent : ndarray, shape (3, d), optional
    linear_before_reset : bool
        True: the reset gate acts on h R_n + b'_n, equation (2). False: on h, equation (2').
    state : ndarray, shape (..., d), optional
        h before the first step; 0 by default.
    return_state : bool
        Also return the last h.

    Returns
    -------
    h : ndarray, shape (..., T, d)
    state : ndarray, shape (..., d), only with `return_state`

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, an array is not numeric, or the option is not a boolean.

    Notes
    -----
    6 T d (c + d) operations, T steps of a matrix product each. The error is at most ``error_bound``.

    Examples
    --------
    z = 1/2 and a candidate of 1: the state goes half the way in each step.

    >>> import numpy as np
    >>> W, R = np.zeros((3, 1, 1)), np.zeros((3, 1, 1))
    >>> W[2] = 50.0
    >>> gru(np.ones((3, 1)), W, R)[:, 0]
    array([0.5  , 0.75 , 0.875])
    """
    b, b_recurrent, h = _prepare(x, R, b, b_recurrent, state)
    hs = []
    for t in range(x.shape[-2]):
        h = _step(x[..., t, :], h, W, R, b, b_recurrent, linear_before_reset)[0]
        hs.append(h)
    y = np.stack(hs, axis=-2) if hs else _nothing(x, h)  # (..., T, d)
    return (y, h) if return_state else y


def _step(x, h, W, R, b, b_recurrent, linear_before_reset):
    """One step, and what the gradient asks of it: pre-activations of r, z, n and, in (2), what r multiplies."""
    r, z = (x @ W[gate] + b[gate] + h @ R[gate] + b_recurrent[gate] for gate in (0, 1))  # (..., d)
    past = h @ R[2] + b_recurrent[2] if linear_before_reset else (sigmoid(r) * h) @ R[2] + b_recurrent[2]
    n = x @ W[2] + b[2] + (sigmoid(r) * past if linear_before_reset else past)
    return sigmoid(-z) * np.tanh(n) + sigmoid(z) * h, (r, z, n, past)


@CONTRACT.form
def gru_fused(x, W, R, b=None, b_recurrent=None, *, linear_before_reset=True, state=None, return_state=False):
    """The same with x W of all gates and steps in one product before the loop, and one product h R in each step.

    Only (2) lets all three gates share h R: that is why cuDNN has it, and why there are two GRUs. Without
    `linear_before_reset` R_n waits for r, and each step has two products, one after the other.
    """
    b, b_recurrent, h = _prepare(x, R, b, b_recurrent, state)
    W = np.concatenate(list(W), axis=-1)  # (c, 3 d)
    joined = np.concatenate(list(R if linear_before_reset else R[:2]), axis=-1)  # (d, 3 d) or (d, 2 d)
    from_x = x @ W + b.reshape(-1)  # (..., T, 3 d)
    hs = []
    for t in range(x.shape[-2]):
        x_r, x_z, x_n = np.split(from_x[..., t, :], 3, axis=-1)
        from_h = np.split(h @ joined, 3 if linear_before_reset else 2, axis=-1)
        r = sigmoid(x_r + from_h[0] + b_recurrent[0])
        z = x_z + from_h[1] + b_recurrent[1]
        past = r * (from_h[2] + b_recurrent[2]) if linear_before_reset else (r * h) @ R[2] + b_recurrent[2]
        h = sigmoid(-z) * np.tanh(x_n + past) + sigmoid(z) * h
        hs.append(h)
    y = np.stack(hs, axis=-2) if hs else _nothing(x, h)  # (..., T, d)
    return (y, h) if return_state else y


@CONTRACT.gradient
def gru_vjp(dy, x, W, R, b=None, b_recurrent=None, *, linear_before_reset=True, state=None, dstate=None):
    """Gradient of `gru`: backpropagation through time.

    With dh the cotangent of h_t, dy_t included, h = h_{t-1}, and r̃, z̃, ñ the pre-activations:

        (3)   dz = dh (h - n),  dn = dh (1 - z),  dh_{t-1} = z dh;      dz̃ = dz z (1 - z),  dñ = dn (1 - n²)
        (2)   p = h R_n + b'_n:  dr = dñ p,  dp = dñ r,  dh_{t-1} += dp R_nᵀ,  dR_n += hᵀ dp,  db'_n += dp
        (2')  q = r h:           dq = dñ R_nᵀ,  dr = dq h,  dh_{t-1} += dq r,  dR_n += qᵀ dñ,  db'_n += dñ
        (1)   dr̃ = dr r (1 - r);  dh_{t-1} += dr̃ R_rᵀ + dz̃ R_zᵀ,  dR += hᵀ da;   dx = Σ da Wᵀ,  dW += xᵀ da,  db += da

    Parameters
    ----------
    dy : ndarray, shape (..., T, d)
        Cotangent of h.
    dstate : ndarray, shape (..., d), optional
        Cotangent of the final state, in addition to dy.

    Returns
    -------
    dict
        "x", "W", "R", and "b", "b_recurrent", "state" where given.
    """
    b, b_recurrent, h = _prepare(x, R, b, b_recurrent, state)
    before, gates = [], []
    for t in range(x.shape[-2]):
        before.append(h)
        h, inner = _step(x[..., t, :], h, W, R, b, b_recurrent, linear_before_reset)
        gates.append(inner)
    dh = np.zeros_like(h) if dstate is None else dstate
    das, dps, reads = [], [], []
    for t in reversed(range(x.shape[-2])):
        (r, z, n, past), h = gates[t], before[t]
        dh = dh + dy[..., t, :]
        d_z = dh * (h - np.tanh(n)) * sigmoid(z) * sigmoid(-z)
        d_n = dh * sigmoid(-z) * tanh_derivative(n)
        dh = sigmoid(z) * dh
        if linear_before_reset:
            d_r, d_past, read = d_n * past, d_n * sigmoid(r), h
            dh = dh + d_past @ R[2].T
        else:
            d_reset, d_past, read = d_n @ R[2].T, d_n, sigmoid(r) * h
            d_r, dh = d_reset * h, dh + d_reset * sigmoid(r)
        d_r = d_r * sigmoid(r) * sigmoid(-r)
        dh = dh + d_r @ R[0].T + d_z @ R[1].T
        das.append(np.stack([d_r, d_z, d_n], axis=-2))  # of what x W + b adds to: (..., 3, d)
        dps.append(np.stack([d_r, d_z, d_past], axis=-2))  # of what R and b' add to
        reads.append(np.stack([h, h, read], axis=-2))  # what R multiplies
    if not das:
        return {"x": x, "W": 0 * W, "R": 0 * R, "b": 0 * b, "b_recurrent": 0 * b_recurrent, "state": dh}
    da, dp, read = (np.stack(s[::-1], axis=-2) for s in (das, dps, reads))  # (..., 3, T, d)
    return {
        "x": (da @ _transposed(W)).sum(axis=-3),
        "W": _transposed(x)[..., None, :, :] @ da,  # (..., 3, c, d)
        "R": _transposed(read) @ dp,  # (..., 3, d, d)
        "b": da.sum(axis=-2),
        "b_recurrent": dp.sum(axis=-2),
        "state": dh,
    }


@CONTRACT.form
def error_bound(x, W, R, b=None, b_recurrent=None, *, unit, store=0.0, linear_before_reset=True, state=None, return_state=False):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`.

    To first order, with Δr̃ = Δh R_r + δ and so on,

        Δh <- z Δh + (h - n) z' Δz̃ + (1 - z) n' Δñ,     Δñ = δ + p r' Δr̃ + r Δh R_n  (2),   or δ + (h r' Δr̃ + r Δh) R_n  (2')

    which is the J of `core.propagation`. Local errors: of a pre-activation 6 √(c + d) u (|x| |W| + |h| |R| + |b| + |b'|); 4 u of
    each gate (absolute: σ is often computed as (1 + tanh(x / 2)) / 2); 3 u of each product and sum in (3); and with `store`
    twice each of these intermediates.
    """
    b, b_recurrent, h = _prepare(x, R, b, b_recurrent, state)
    bias = abs(b) + abs(b_recurrent)
    eye, E, errors = np.eye(R.shape[-1], dtype=h.dtype), [], Propagation(np.zeros_like(h))
    for t in range(x.shape[-2]):
        old = h
        h, (r, z, n, past) = _step(x[..., t, :], old, W, R, b, b_recurrent, linear_before_reset)
        size = [abs(x[..., t, :]) @ abs(W[gate]) + abs(old) @ abs(R[gate]) + bias[gate] for gate in range(3)]
        local_r, local_z, local_n = ((unit * (6 * sqrt_of(sum(W.shape[1:]), x) + 6) + 2 * store) * s for s in size)
        gate_r, gate_z, gate_n = sigmoid(r), sigmoid(z), np.tanh(n)
        slope_r, slope_z, slope_n = gate_r * sigmoid(-r), (old - gate_n) * gate_z * sigmoid(-z), sigmoid(-z) * tanh_derivative(n)
        error_r = slope_r * local_r + 4 * unit + 2 * store * gate_r
        rows_r, rows_z = slope_r[..., None] * R[0].T, slope_z[..., None] * R[1].T  # (..., d, d): [.., to, from]
        if linear_before_reset:
            rows_n = past[..., None] * rows_r + gate_r[..., None] * R[2].T
            local_n = local_n + abs(past) * error_r
        else:
            rows_n = R[2].T @ (old[..., None] * rows_r + gate_r[..., None] * eye)
            local_n = local_n + (abs(old) * error_r) @ abs(R[2])
        J = gate_z[..., None] * eye + rows_z + slope_n[..., None] * rows_n
        local = abs(slope_z) * local_z + slope_n * local_n + 4 * unit * (abs(old) + abs(gate_n) + sigmoid(-z))
        local = local + (4 * unit + 4 * store) * (abs(gate_z * old) + abs(sigmoid(-z) * gate_n))
        local = local + 2 * store * abs(gate_z * gate_n)  # 1 - z, from a z that was rounded
        E.append(errors.step(J, local))
    y = np.stack(E, axis=-2) if E else _nothing(x, h)  # (..., T, d)
    return (y, E[-1] if E else 0 * h) if return_state else y


# -- what the forms share --------------------------------------------------------------------------------------------


def _prepare(x, R, b, b_recurrent, state):
    """Biases and a state."""
    zeros = np.zeros_like(R[:, 0, :])
    b, b_recurrent = zeros if b is None else b, zeros if b_recurrent is None else b_recurrent
    if state is None:
        return b, b_recurrent, np.zeros_like(x, shape=(*x.shape[:-2], R.shape[-1]))
    batch = np.broadcast_shapes(x.shape[:-2], state.shape[:-1])
    return b, b_recurrent, np.broadcast_to(state, (*batch, state.shape[-1]))


def _nothing(x, h):
    """The result of no steps."""
    return np.zeros_like(x, shape=(*h.shape[:-1], 0, h.shape[-1]))


def _transposed(x):
    return np.swapaxes(x, -1, -2)


def _sample(rng, *, T=7, c=3, d=4, batch=()):
    return {
        "x": rng.standard_normal((*batch, T, c)),
        "W": rng.standard_normal((3, c, d)) / np.sqrt(c),
        "R": 0.8 * rng.standard_normal((3, d, d)) / np.sqrt(d),
        "b": rng.standard_normal((3, d)) / 2,
        "b_recurrent": rng.standard_normal((3, d)),
        "state": rng.standard_normal((*batch, d)),
    }


def _with(**changes):
    """A hard call: the sample, with some arrays replaced."""

    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        return call | {name: change(rng, call[name]) for name, change in changes.items()}

    return draw


def _gates(*values):
    """Biases that set the gates r, z, n whatever the input: each a number, or None to leave it as it is."""
    return lambda rng, b: np.stack([row if v is None else 0 * row + v for row, v in zip(b, values, strict=True)])


def _between(f, call, bound, rng):
    """Law: h_t lies between h_{t-1} and a number in [-1, 1], by (3)."""
    h, limit = f(**{**call, "return_state": False}), bound(**{**call, "return_state": False})
    first = call.get("state")
    before = np.concatenate(
        [np.broadcast_to(0 * h[..., :1, :] if first is None else first[..., None, :], h[..., :1, :].shape), h[..., :-1, :]], axis=-2
    )
    inside = np.clip(h, np.minimum(before, -1), np.maximum(before, 1))
    yield "h against the nearest weighted mean", h, inside, 2 * limit


def _cost(T, c, d, batch=1, **_):
    return Cost(batch * T * (6 * d * (c + d) + 17 * d), _depth(T, c, d), max(T + 6, 2 * T) * d * batch + 3 * d)


def _depth(T, c, d):
    return T * (9 + log2_ceil(d)) + max(log2_ceil(c) - log2_ceil(d), 0) + 1


def _cost_fused(T, c, d, batch=1, **_):
    return Cost(batch * T * (6 * d * (c + d) + 17 * d), _depth(T, c, d), batch * (5 * T * d + 6 * d) + 3 * (c + d + 1) * d)


OPS = (
    Op(
        name="gru",
        summary="GRU: h <- (1 - z) n + z h, gates from x W + b and h R + b'",
        contract=CONTRACT,
        forms={"recurrent": Form(gru, _cost, exact=("work",)), "fused": Form(gru_fused, _cost_fused, exact=("work",))},
        gradient=gru_vjp,
        sample=_sample,
        options={"linear_before_reset": (True, False)},
        hard={
            "saturated": _with(x=lambda rng, x: 1e6 * x),  # all of it: half way out, kernels differ in what 1 - σ is
            "everything is kept": _with(b=_gates(None, 1e3, None)),
            "nothing is kept": _with(b=_gates(None, -1e3, None)),
            "nothing is read": _with(b=_gates(-1e3, None, None)),
            "a state far from 0": _with(state=lambda rng, h: 1e4 * h, b=_gates(None, 6.0, None)),
            "zeros": _with(x=lambda rng, x: 0 * x, state=lambda rng, h: 0 * h, b=lambda rng, b: 0 * b, b_recurrent=lambda rng, b: 0 * b),
            "no initial state": _with(state=lambda rng, h: None),
            "no bias": _with(b=lambda rng, b: None, b_recurrent=lambda rng, b: None),
        },
        error_bound=error_bound,
        references=("cho2014, section 2.3, equations 5-8", "chung2014, section 3.2"),
        sizes=({"c": 1, "d": 1}, {"c": 2, "d": 16}, {"c": 4, "d": 4}, {"batch": (2,)}, {"batch": (2, 3)}),
        laws=(causal(CONTRACT, "x"), hand_off(CONTRACT), Law("between", _between, ("state",)), carries_nan(CONTRACT, "x")),
    ),
)
