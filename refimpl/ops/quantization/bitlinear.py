"""BitLinear: a linear layer of ternary or binary weights on eight-bit activations.

    x_q = clip(round(x Q / max |x|), -Q - 1, Q) for every token,    Q = 2^(b-1) - 1                              (1)
    w_q, γ = the ternary or binary weights and their unit                                                        (2)
    y = (x_q w_q) · max |x| / Q · γ + bias                                                                        (3)

The product in (3) is one of small integers: exact, and without multiplications. The layer is trained in floating point;
the gradient takes rounding for the identity ("straight-through"): with x̂ = x_q max|x|/Q and ŵ = w_q γ, the values that
the integers stand for,

    dx = dy ŵᵀ,    dw = x̂ᵀ dy,    dbias = Σ dy                                                                    (4)

as if x̂ were x plus a constant and ŵ were w plus a constant. Nothing flows through max |x|, γ, or the mean: they are part
of the rounding.

Glossary
    x, w, bias     activations (..., c), weights (c, e), (e)              x, W [1, eq. 11]
    x_q, w_q       their integers                                         x̃ [1, eq. 4], W̃ [1, eq. 1; 2, eq. 1]
    step           max |x| / Q, what a unit of x_q is worth               γ / Q_b [1, eq. 12]
    scale          γ of (2)                                               β [1, eq. 12], γ [2, eq. 3]
    weights        "ternary" (b1.58) or "binary" (b1)
    activation_bits    b

Where implementations differ
    BitNet's layers normalise x first (see `refimpl.rms_norm`); here the norm is the caller's, as in transformers. Its
    weights are stored (e, c), as torch's are. Public training code rounds in the precision of the activations: in bfloat16
    that moves integers by one and more; here half precisions compute in float32. It adds 1e-5 to scales.

References
    [1] H. Wang et al., "BitNet: scaling 1-bit transformers for large language models", arXiv:2310.11453, section 2.
    [2] S. Ma et al., "The era of 1-bit LLMs: all large language models are in 1.58 bits", arXiv:2402.17764, section 2.
    [3] Y. Bengio, N. Léonard, A. Courville, "Estimating or propagating gradients through stochastic neurons for
        conditional computation", arXiv:1308.3432, section 4: the straight-through estimator.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.options import one_of
from refimpl.op import Cost, Form, Law, Op
from refimpl.ops.quantization.shared import check_bits, decided_activations, decided_weights

WEIGHTS = ("ternary", "binary")


def _check(arguments, sizes):
    one_of("bitlinear", "weights", arguments.get("weights", "ternary"), WEIGHTS)
    check_bits("bitlinear", "activation_bits", arguments.get("activation_bits", 8))


CONTRACT = Contract("bitlinear", takes="x (..., c); w (c, e); bias (e)", gives="y (..., e)", check=_check)


@CONTRACT.form
def bitlinear(x, w, bias=None, *, weights="ternary", activation_bits=8):
    """Linear layer of quantised weights and activations, equation (3).

    Parameters
    ----------
    x : ndarray, shape (..., c)
        Activations; each token (row) is quantised by itself.
    w : ndarray, shape (c, e)
        Weights in floating point; quantised in every call.
    bias : ndarray, shape (e,), optional
        Not quantised.
    weights : {"ternary", "binary"}
        -1, 0, 1 in units of the mean size (BitNet b1.58), or -1, 1 around the mean (BitNet b1).
    activation_bits : int
        2 to 16.

    Returns
    -------
    y : ndarray, shape (..., e)

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit or an option is none of its values.

    Notes
    -----
    2 c e operations per token. The sum of integers is exact; y is right to a few roundings, except where an x or a w lies
    within its rounding of half way between two integers: there one more or less is as right, and ``error_bound`` has a
    unit for it.

    Examples
    --------
    >>> import numpy as np
    >>> x, w = np.array([[127.0, -63.2, 0.3]]), np.array([[2.0, -1.0], [1.0, 0.1], [-1.5, 0.4]])
    >>> bitlinear(x, w)  # mean |w| = 1
    array([[  64., -127.]])
    """
    x_q, step = _activations(x, activation_bits)  # (..., c), (..., 1)
    w_q, scale = _weights(w, weights)
    y = (x_q @ w_q) * (step * scale)
    return y if bias is None else y + bias


@CONTRACT.form
def bitlinear_dequantised(x, w, bias=None, *, weights="ternary", activation_bits=8):
    """The same from the values that the integers stand for: y = x̂ ŵ, the form of training code.

    The scales go through the sum, since they are the same for all its terms; but every term is rounded now.
    """
    x_q, step = _activations(x, activation_bits)
    w_q, scale = _weights(w, weights)
    y = (x_q * step) @ (w_q * scale)
    return y if bias is None else y + bias


@CONTRACT.form
def bitlinear_additions(x, w, bias=None, *, weights="ternary", activation_bits=8):
    """The same without a product: the activations that meet +1, less those that meet -1, as integers.

    What hardware for such weights does. c e additions or fewer per token, exact in integers.
    """
    x_q, step = _activations(x, activation_bits)
    w_q, scale = _weights(w, weights)
    x_q = x_q.astype(np.int64)
    sums = [np.sum(x_q[..., w_q[:, j] > 0], axis=-1) - np.sum(x_q[..., w_q[:, j] < 0], axis=-1) for j in range(w.shape[-1])]
    whole = np.stack(sums, axis=-1).astype(x.dtype) if sums else np.zeros_like(x, shape=(*x.shape[:-1], 0))
    y = whole * (step * scale)
    return y if bias is None else y + bias


@CONTRACT.gradient
def bitlinear_vjp(dy, x, w, bias=None, *, weights="ternary", activation_bits=8):
    """Gradient of `bitlinear`, straight-through: equation (4).

    Parameters
    ----------
    dy : ndarray, shape (..., e)
        Cotangent of y.

    Returns
    -------
    dict
        "x", "w", and "bias" where one was given.
    """
    x_hat, w_hat = _values(x, w, weights, activation_bits)
    dw = x_hat.reshape(-1, w.shape[0]).T @ dy.reshape(-1, w.shape[1])
    return {"x": dy @ w_hat.T, "w": dw, "bias": dy}


def _tangent(call):
    """What (4) differentiates: the layer of x and w plus what rounding adds to those of `call`."""
    x, w = call["x"], call["w"]
    x_hat, w_hat = _values(x, w, call.get("weights", "ternary"), call.get("activation_bits", 8))
    more_x, more_w = x_hat - x, w_hat - w

    def layer(x, w, bias=None, **options):
        y = (x + more_x) @ (w + more_w)
        return y if bias is None else y + bias

    return layer


def error_bound(x, w, bias=None, *, unit, store=0.0, weights="ternary", activation_bits=8):
    """|computed - exact|, elementwise, of any form.

    Of right integers: c + 8 roundings of a sum of products of their values, and those of the mean that is γ, of n = c e
    numbers: 4 √n + 8, the size that the roundings of any summation reach with certainty enough [4 √n deviations of
    random ones]. Where an x lies within 8 u of half way between two integers, relative to what is rounded, or a weight
    within what γ or the mean may be off, either integer is right, and a unit of it is added: not where x is half of
    its largest, a power of two, and the unit is 1 or 1/127 of that: x/γ·Q, x/(γ/Q), x (Q/γ) are all Q/2 in any precision. Half-precision code that is
    written out rounds twice on the way to an integer, and the product, γ, the step and their products.
    """
    x_q, step = _activations(x, activation_bits)
    w_q, scale = _weights(w, weights)
    x_size, w_size = abs(x_q * step), abs(w_q * scale)
    of_mean = (4 * np.sqrt(w.size) + 8) * unit
    level = abs(x) / _nonzero(step)
    near = abs(level - np.floor(level) - 0.5) <= (8 * unit + 3 * store) * level
    largest = np.max(abs(x), axis=-1, keepdims=True, initial=0)
    exact = (activation_bits in (2, 8)) & (2 * abs(x) == largest) & (np.frexp(largest)[0] == 0.5)
    x_off = np.where(near & ~exact & (step != 0), step, 0 * x)
    if weights == "ternary":
        w_off = np.where(abs(abs(w) / _nonzero(scale) - 0.5) <= of_mean + 2 * store, scale, 0 * w)
    else:
        w_off = np.where(abs(w - _mean(w)) <= (of_mean + 2 * store) * scale, 2 * scale, 0 * w)
    total = x_size @ w_size
    y = (w.shape[0] + 8) * unit * total + of_mean * total + 5 * store * abs((x_q @ w_q) * (step * scale))
    y = y + x_off @ (w_size + w_off) + x_size @ w_off
    return y if bias is None else y + 2 * unit * abs(bias) + store * abs((x_q @ w_q) * (step * scale))


# -- what the forms share --------------------------------------------------------------------------------------------


def _activations(x, bits):
    """(1): integers as floating-point numbers, and what a unit of them is worth."""
    Q = 2 ** (int(bits) - 1) - 1
    largest = np.max(abs(x), axis=-1, keepdims=True, initial=0)  # (..., 1)
    return np.clip(np.rint(x / _nonzero(largest) * Q), -Q - 1, Q), largest / Q


def _weights(w, weights):
    """(2), as `refimpl.ternary_quantize` and `refimpl.binary_quantize`, in floating-point numbers."""
    scale = _mean(abs(w))
    if weights == "ternary":
        return np.clip(np.rint(w / _nonzero(scale)), -1, 1), scale
    return np.where(w > _mean(w), np.ones_like(w), -np.ones_like(w)), scale


def _values(x, w, weights, bits):
    """x̂ and ŵ of (4)."""
    (x_q, step), (w_q, scale) = _activations(x, bits), _weights(w, weights)
    return x_q * step, w_q * scale


def _mean(w):
    return np.sum(w) / max(w.size, 1)


def _nonzero(scale):
    return np.where(scale == 0, np.ones_like(scale), scale)


def _sample(rng, *, c=6, e=5, batch=(7,)):
    return {
        "x": decided_activations(rng, (*batch, c)),
        "w": decided_weights(rng, (c, e)),
        "bias": rng.standard_normal(e) + 1,
    }


def _with(options=None, **changes):
    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        return call | {n: change(rng, call[n]) for n, change in changes.items()} | (options or {})

    return draw


def _exactly_half(rng, x):
    """The largest of a row is a power of two, and other elements are half of it: 63.5 units, 3.5, or 0.5."""
    x = rng.choice([-2.0, -1.0, 0.0, 1.0], x.shape)
    return np.concatenate([np.full_like(x[..., :1], 2.0), x[..., 1:]], axis=-1)


def _plain(call):
    return {n: v for n, v in call.items() if n != "bias"}


def _on_the_grid(f, call, bound, rng):
    """What is made of the integers already is not rounded: y is the plain product."""
    c, e = call["w"].shape
    if c * e > 1 and call["x"].shape[-1]:
        Q = 2 ** (call.get("activation_bits", 8) - 1) - 1
        x = rng.integers(-Q, Q + 1, call["x"].shape)
        x[..., 0] = Q
        w = rng.permuted(np.resize([1, -1], c * e)).reshape(c, e)
        given = _plain(call) | {"x": x.astype(call["x"].dtype), "w": w.astype(call["w"].dtype)}
        if np.all(given["x"] == x):  # a half has fewer digits than integers of 16 bits
            yield "y of integers", f(**given), (x @ w).astype(np.float64), bound(**given)


def _each_token(f, call, bound, rng):
    """A token's result is its own: twice the token, twice the result (without the bias), whatever the others are."""
    call = _plain(call)
    if call["x"].ndim > 1:
        factors = 2.0 ** rng.integers(-3, 4, (*call["x"].shape[:-1], 1))
        scaled = call | {"x": (call["x"] * factors.astype(np.float32)).astype(call["x"].dtype)}
        yield "y of tokens times powers of two", f(**scaled), (f(**call) * factors).astype(np.float64), 2 * bound(**scaled)


def _weights_times_two(f, call, bound, rng):
    call = _plain(call)
    yield "y of twice the weights", f(**call | {"w": 2 * call["w"]}), 2 * np.asarray(f(**call)), 4 * bound(**call)


def _bias_is_added(f, call, bound, rng):
    if call.get("bias") is not None:
        shown = np.asarray(f(**_plain(call))).astype(np.float64) + call["bias"].astype(np.float64)
        yield "y with a bias", f(**call), shown, 2 * bound(**call) + bound(**_plain(call))


def _cost(c, e, batch=1):
    return Cost(
        2 * c * e * batch + (6 * c + e + 3) * batch + 5 * c * e + 1,
        log2_ceil(c) + log2_ceil(c * e) + 9,
        (2 * c + 2 * e) * batch + 2.5 * c * e,
    )


def _cost_additions(c, e, batch=1):
    """A third of ternary weights is 0, and nothing is multiplied."""
    product = _cost(c, e, batch)
    return Cost(4 / 3 * c * e * batch + 6 * c * batch + 5 * c * e, product.depth, product.peak)


OPS = (
    Op(
        name="bitlinear",
        summary="linear layer of ternary or binary weights and eight-bit activations",
        contract=CONTRACT,
        forms={
            "integers": Form(bitlinear, _cost, exact=("work",)),
            "dequantised": Form(bitlinear_dequantised, _cost),
            "additions": Form(
                bitlinear_additions, _cost_additions, on_balls=False, stops="NaN and infinities, which no integer stands for"
            ),
        },
        gradient=bitlinear_vjp,
        sample=_sample,
        options={"weights": WEIGHTS, "activation_bits": (8, 4, 2)},
        hard={
            "tokens of zeros": _with(x=lambda rng, x: x * (rng.random((*x.shape[:-1], 1)) < 0.5)),
            "weights of zeros": _with(w=lambda rng, w: 0 * w),
            "tokens of many sizes": _with(x=lambda rng, x: x * 2.0 ** rng.integers(-30, 30, (*x.shape[:-1], 1))),
            "tiny weights": _with(w=lambda rng, w: w * 2.0**-40),
            "one outlier": _with(x=lambda rng, x: np.where(np.arange(x.shape[-1]) == 0, 512.0, x / 64)),
            "exactly half": _with(x=_exactly_half),
            "sixteen bits": _with(options={"activation_bits": 16}, x=lambda rng, x: rng.uniform(-2, 2, x.shape)),
            "all of one sign": _with(x=lambda rng, x: abs(x) + 1, w=lambda rng, w: abs(w) + 1),
            "weights at their mean": _with(
                options={"weights": "binary"}, w=lambda rng, w: np.sign(np.trunc(np.arange(w.size).reshape(w.shape) - (w.size - 1) / 2))
            ),
            "weights of one size": _with(w=lambda rng, w: np.where(np.arange(w.size).reshape(w.shape) % 3 == 0, 1.0, -1.0)),
        },
        error_bound=error_bound,
        references=("wang2023, section 2", "ma2024, section 2", "bengio2013, section 4"),
        lengths=(),
        sizes=({"c": 1}, {"e": 1}, {"c": 64, "e": 48}, {"batch": ()}, {"batch": (2, 3)}),
        laws=(
            Law("on_the_grid", _on_the_grid, ("x", "w")),
            Law("each_token", _each_token, ("x",)),
            Law("weights_times_two", _weights_times_two, ("w",)),
            Law("bias_is_added", _bias_is_added, ("bias",)),
        ),
        tangent=_tangent,
    ),
)
