"""Short causal convolution: every step sees the last W inputs of its channel.

    z_t = bias + Σ_{j=0}^{W-1} weight_j x_{t-(W-1)+j},        y_t = z_t or silu(z_t)                        (1)

Three to four taps, one filter a channel, in front of almost every recurrent layer since H3: what a recurrence with
data-dependent gates is bad at, looking exactly one or two steps back, this does for nothing. weight_{W-1} meets the
newest sample. What a stream must remember is the last W - 1 inputs, oldest first: that is the state, and x_{-1},
x_{-2} ... of the first steps are its rows, zeros at the start.

Glossary
    x, y      input, output           [1]
    weight    w, shape (c, W)         torch's layout of a depthwise filter, without its axis of 1
    state     x_{t-W+1} ... x_{t-1}   "conv_state" in [1]

Where implementations differ
    The public kernels keep (B, D, T); their conv_state has W columns, not W - 1, the newest last. torch's conv1d pads both
    sides: padding=W-1 and cutting the last W - 1 outputs is (1). `long_conv` takes its kernel the other way round,
    newest first: weight_j = kernel_{W-1-j}.

References
    [1] T. Dao, "causal-conv1d", 2023, the reference function of the package.
    [2] A. Gu and T. Dao, "Mamba", 2023, section 3.4, figure 3.
    [3] N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM, 2002, section 3.1.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.numerics import silu, silu_derivative, silu_rounding
from refimpl.core.options import one_of
from refimpl.laws import carries_nan, causal, hand_off
from refimpl.op import Cost, Form, Law, Op


def _activation_is_real(arguments, sizes):
    one_of("causal_conv1d", "activation", arguments.get("activation"), (None, "silu"))
    if arguments.get("activation") == "silu" and any(np.iscomplexobj(arguments.get(n)) for n in ("x", "weight", "bias", "state")):
        raise ValueError("causal_conv1d: activation 'silu' needs real arrays, got a complex one")


CONTRACT = Contract(
    "causal_conv1d",
    takes="x (..., T, c); weight (c, W); bias (c); state (..., W-1, c)",
    gives="y (..., T, c)",
    rules=("W at least 1",),
    check=_activation_is_real,
)


@CONTRACT.form
def causal_conv1d(x, weight, bias=None, *, activation=None, state=None, return_state=False):
    """Short causal convolution, equation (1), tap by tap.

    Parameters
    ----------
    x : ndarray, shape (..., T, c)
        Input. T may be 0, or less than W.
    weight : ndarray, shape (c, W)
        Taps of each channel, W >= 1; the last meets the newest sample.
    bias : ndarray, shape (c,), optional
        Added before the activation.
    activation : {None, "silu"}
        Applied to every output.
    state : ndarray, shape (..., W-1, c), optional
        The W - 1 inputs before the first, oldest first; zeros by default.
    return_state : bool
        Also return the last W - 1 inputs, to go on from (of the state's, where T < W - 1).

    Returns
    -------
    y : ndarray, shape (..., T, c)
    state : ndarray, shape (..., W-1, c), only with `return_state`

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, an array is not numeric, or the activation is unknown.

    Notes
    -----
    2 T W c operations, W deep. The error is at most (W + 3) u times the same sum of absolute values, and a few u of the
    activation's.

    References
    ----------
    [1]; and "Where implementations differ" in this module's docstring.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0], [10.0], [100.0]])
    >>> y, state = causal_conv1d(x, np.array([[3.0, 2.0]]), return_state=True)
    >>> y[:, 0].tolist(), state.tolist()
    ([2.0, 23.0, 230.0], [[100.0]])
    """
    seen, T, W = _after_state(x, weight, state), x.shape[-2], weight.shape[-1]
    z = sum(weight[:, j] * seen[..., j : j + T, :] for j in range(W))  # (..., T, c)
    return _finish(z, bias, activation, seen[..., T:, :], return_state)


@CONTRACT.form
def causal_conv1d_windows(x, weight, bias=None, *, activation=None, state=None, return_state=False):
    """The same as products with windows of the input, "im2col": a view of overlapping windows, nothing copied.

    One sum over the last axis of (..., T, c, W): the form that matrix units like, and the largest array.
    """
    seen, T, W = _after_state(x, weight, state), x.shape[-2], weight.shape[-1]
    window = np.arange(T)[:, None] + np.arange(W)  # which rows each step sees: (T, W)
    z = (np.swapaxes(seen[..., window, :], -1, -2) * weight).sum(axis=-1)  # (..., T, c)
    return _finish(z, bias, activation, seen[..., T:, :], return_state)


@CONTRACT.form
def causal_conv1d_stream(x, weight, bias=None, *, activation=None, state=None, return_state=False):
    """The same as decoding does it: keep the last W - 1 inputs, take one step, drop the oldest.

    T steps of 2 W c operations, memory for W rows and not for T.
    """
    T, W = x.shape[-2], weight.shape[-1]
    seen = _after_state(x, weight, state)
    memory, rows = seen[..., : W - 1, :], seen[..., W - 1 :, :]
    zs = []
    for t in range(T):
        window = np.concatenate([memory, rows[..., t : t + 1, :]], axis=-2)  # (..., W, c)
        zs.append((window * np.swapaxes(weight, 0, 1)).sum(axis=-2))
        memory = window[..., 1:, :]
    z = np.stack(zs, axis=-2) if zs else rows
    return _finish(z, bias, activation, memory, return_state)


@CONTRACT.gradient
def causal_conv1d_vjp(dy, x, weight, bias=None, *, activation=None, state=None, dstate=None):
    """Gradient of `causal_conv1d`: every tap read backwards.

        dz_t = dy_t silu'(z_t),    dx_s = Σ_j conj(weight_j) dz_{s+W-1-j},    dweight_j = Σ_t conj(x_{t-(W-1)+j}) dz_t,    dbias = Σ_t dz_t

    where x runs through the state; the cotangent of the final state is added to the rows that it consists of.

    Parameters
    ----------
    dy : ndarray, shape (..., T, c)
        Cotangent of y.
    dstate : ndarray, shape (..., W-1, c), optional
        Cotangent of the final state.

    Returns
    -------
    dict
        "x", "weight", and "bias", "state" where they were given.
    """
    seen, T, W = _after_state(x, weight, state), x.shape[-2], weight.shape[-1]
    dz = dy
    if activation == "silu":
        dz = dy * silu_derivative(causal_conv1d(x, weight, bias, state=state))
    dseen = np.zeros_like(np.conj(weight[:, 0]) * dz[..., :0, :].sum(axis=-2), shape=seen.shape)
    dweight = []
    for j in range(W):
        dseen[..., j : j + T, :] += np.conj(weight[:, j]) * dz
        dweight.append((np.conj(seen[..., j : j + T, :]) * dz).sum(axis=-2))  # (..., c)
    if dstate is not None:
        dseen[..., T:, :] += dstate
    return {"x": dseen[..., W - 1 :, :], "weight": np.stack(dweight, axis=-1), "bias": dz.sum(axis=-2), "state": dseen[..., : W - 1, :]}


def error_bound(x, weight, bias=None, *, unit, store=0.0, activation=None, state=None, return_state=False):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`.

    A sum of W + 1 terms in any order: (W + 3) u of the sum of absolute values [3, section 3.1]. silu passes an error on
    at most 1.1 times, and rounds a few times itself; an exponential of -z, done as a power of 2, is |z| u off. Where
    e^-z overflows a right silu may be 0. Operands and z kept in a half precision add `store` three times, and silu its own steps. The
    state is copied, not computed.
    """
    W = weight.shape[-1]
    absolute = [None if a is None else abs(a) for a in (bias, state)]
    scale = causal_conv1d(abs(x), abs(weight), absolute[0], state=absolute[1])
    E = (unit * (W + 3) + 3 * store) * scale
    if activation == "silu":
        z = causal_conv1d(x, weight, bias, state=state)
        y = abs(silu(z))
        E = 1.1 * E + unit * (6 + abs(z)) * y + silu_rounding(z, store) + unit**4 * abs(z)
    if not return_state:
        return E
    last = causal_conv1d(x, weight, state=state, return_state=True)[1]
    return E, 0 * abs(last)


# -- what the forms share --------------------------------------------------------------------------------------------


def _after_state(x, weight, state):
    """The state's rows and then x: row t + j is what tap j sees at step t. (..., W-1+T, c)"""
    before = np.zeros_like(x, shape=(*x.shape[:-2], weight.shape[-1] - 1, x.shape[-1])) if state is None else state
    batch = np.broadcast_shapes(before.shape[:-2], x.shape[:-2])
    return np.concatenate([np.broadcast_to(a, (*batch, *a.shape[-2:])) for a in (before, x)], axis=-2)


def _finish(z, bias, activation, memory, return_state):
    z = z if bias is None else z + bias
    y = silu(z) if activation == "silu" else z
    return (y, memory.copy()) if return_state else y


def _newest_tap_last():
    """With a weight of zeros but for a 1 at its end, the output is the input."""

    def holds(f, call, bound, rng):
        weight = np.zeros_like(call["weight"])
        weight[:, -1] = 1
        call = {k: v for k, v in call.items() if k not in ("bias", "activation", "return_state")} | {"weight": weight}
        y = f(**call)
        yield "y of the newest tap alone", y, np.broadcast_to(call["x"], y.shape), bound(**call)

    return Law("newest_tap_last", holds, ("weight",))


def _sample(rng, *, T=7, c=3, W=4, batch=()):
    return {
        "x": rng.standard_normal((*batch, T, c)),
        "weight": rng.standard_normal((c, W)),
        "bias": rng.standard_normal(c),
        "state": rng.standard_normal((*batch, W - 1, c)),
    }


def _with(**changes):
    """A hard call: the sample, with some arrays replaced."""

    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        return call | {name: change(rng, call[name]) for name, change in changes.items()}

    return draw


OPS = (
    Op(
        name="causal_conv1d",
        summary="depthwise causal convolution with a few taps, its state the last W - 1 inputs",
        contract=CONTRACT,
        forms={
            "taps": Form(
                causal_conv1d,
                lambda T, c, W, batch=1: Cost(2 * T * W * c * batch, W + 1, (4 * T + W - 1) * c * batch),
                exact=("work", "depth"),
            ),
            "windows": Form(
                causal_conv1d_windows,
                lambda T, c, W, batch=1: Cost((2 * W - 1) * T * c * batch, 1 + log2_ceil(W), (2 * T * W + T + W - 1) * c * batch),
                exact=("work", "depth"),
            ),
            "stream": Form(
                causal_conv1d_stream,
                lambda T, c, W, batch=1: Cost((2 * W - 1) * T * c * batch, 1 + log2_ceil(W), (3 * T + 3 * W) * c * batch),
                exact=("work", "depth"),
            ),
        },
        gradient=causal_conv1d_vjp,
        sample=_sample,
        options={"activation": (None, "silu")},
        hard={
            "one tap": lambda rng, *, W=4, **sizes: _sample(rng, W=1, **sizes),
            "more taps than steps": lambda rng, *, T=7, W=4, **sizes: _sample(rng, T=min(T, 3), W=6, **sizes),
            "cancellation": _with(
                x=lambda rng, x: x + 1000, weight=lambda rng, w: w - w.mean(axis=-1, keepdims=True), state=lambda rng, s: s + 1000
            ),
            "one needle": _with(x=lambda rng, x: x * (np.arange(x.shape[-2]) == x.shape[-2] // 2)[:, None], state=lambda rng, s: s * 0),
            "only the state": _with(x=lambda rng, x: x * 0),
            "large": _with(x=lambda rng, x: 20 * x, state=lambda rng, s: 20 * s),
            "zeros": _with(x=lambda rng, x: 0 * x, weight=lambda rng, w: 0 * w, state=lambda rng, s: 0 * s),
        },
        error_bound=error_bound,
        references=("dao2023causalconv1d", "gu2023mamba, section 3.4", "higham2002, section 3.1"),
        sizes=({"c": 1}, {"c": 64}, {"W": 1}, {"W": 2}, {"W": 9}, {"batch": (2,)}, {"batch": (2, 3)}),
        laws=(causal(CONTRACT, "x"), hand_off(CONTRACT), _newest_tap_last(), carries_nan(CONTRACT, "x")),
    ),
)
