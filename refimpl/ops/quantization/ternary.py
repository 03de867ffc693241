"""Quantisation to one, two, three or 2^b values: small integers, and one number that says what a unit of them is worth.

    ternary   γ = mean |w|,      q = clip(round(w / γ), -1, 1)                 w ≈ q γ                            (1)
    binary    γ = mean |w|,      q = +1 where w > mean w, else -1              w ≈ q γ                            (2)
    absmax    s = max |x| / Q,   q = clip(round(x / s), -Q - 1, Q)             x ≈ q s,   Q = 2^(b-1) - 1         (3)

Weights have one γ for a whole matrix, (1) and (2); activations one s for every token, (3). A matrix of ternary weights
needs no multiplication: its product adds, subtracts and skips. Half way between two integers, round goes to the even
one; so at |w| = γ/2 it is 0. Where all is zero, the scale is 0 and q is what it is: nothing is divided by it.

Glossary
    w, x      weights, activations                        W, x [1, section 2]
    q         the integers                                W̃ [1, eq. 1], x̃ [2, eq. 4]
    scale     γ in (1) and (2), s in (3); what q is multiplied by      γ [1, eq. 3], β [2, eq. 12]
    bits      b of (3)                                    b [2, eq. 4]

Where implementations differ
    Public code adds 1e-5 to γ, or clips max |x| at 1e-5, in place of a rule for zero; it shows for tiny weights. Some keep
    the reciprocal, Q / max |x|, as the scale. BitNet's activations are clipped at -Q - 1, which (3) never reaches. Some
    take γ per row. torch, NumPy and CUDA's rint go half way to even, C's round away from zero.

References
    [1] S. Ma et al., "The era of 1-bit LLMs: all large language models are in 1.58 bits", arXiv:2402.17764, section 2.
    [2] H. Wang et al., "BitNet: scaling 1-bit transformers for large language models", arXiv:2310.11453, section 2.1.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.op import Cost, Form, Law, Op
from refimpl.ops.quantization.shared import check_bits, decided_activations, decided_weights, mean_of, unit_of

TERNARY = Contract("ternary_quantize", takes="w (..., c, e)", gives="q:int (..., c, e); scale (...)")
BINARY = Contract("binary_quantize", takes="w (..., c, e)", gives="q:int (..., c, e); scale (...)")


ABSMAX = Contract(
    "absmax_quantize",
    takes="x (..., c)",
    gives="q:int (..., c); scale (...)",
    check=lambda arguments, sizes: check_bits("absmax_quantize", "bits", arguments.get("bits", 8)),
)


@TERNARY.form
def ternary_quantize(w):
    """Weights -1, 0, 1 and their unit, equation (1).

    Parameters
    ----------
    w : ndarray, shape (..., c, e)
        A matrix, or a stack of them, each with a scale of its own.

    Returns
    -------
    q : ndarray of int8, shape (..., c, e)
    scale : ndarray, shape (...)
        Mean of |w|; 0 for a matrix of zeros, whose q is 0.

    Raises
    ------
    ValueError, TypeError
        If w is no matrix, or not numeric.

    Notes
    -----
    5 c e operations. log2 3 = 1.58 bits for a weight, 1.6 as `refimpl.pack_ternary` packs them.

    Examples
    --------
    >>> import numpy as np
    >>> q, scale = ternary_quantize(np.array([[1.0, -0.25], [0.5, 2.25]]))
    >>> q, float(scale)
    (array([[1, 0],
           [0, 1]], dtype=int8), 1.0)
    """
    scale = mean_of(abs(w))  # (..., 1, 1)
    return _integers(np.clip(np.rint(w / unit_of(scale)), -1, 1), 8), scale[..., 0, 0]


@TERNARY.form
def ternary_quantize_threshold(w):
    """The same without division or rounding: 0 up to γ/2, else the sign.

    round(w / γ) is 0 where |w| / γ <= 1/2, the bound included, since half way goes to even; and at least 1 in size beyond.
    """
    scale = mean_of(abs(w))  # (..., 1, 1)
    return _integers(np.where(2 * abs(w) > scale, np.sign(w), np.zeros_like(w)), 8), scale[..., 0, 0]


def ternary_bound(w, *, unit, store=0.0):
    """|computed - exact| of the scale; the integers are right or wrong.

    The sum of c e positive terms is off by at most a roundoff for each, whatever its order, and the division adds one.
    """
    c, e = w.shape[-2:]
    return np.zeros(w.shape, np.int8), np.asarray((c * e + 2) * unit * mean_of(abs(w))[..., 0, 0])


@BINARY.form
def binary_quantize(w):
    """Weights -1 and 1 and their unit, equation (2).

    Parameters
    ----------
    w : ndarray, shape (..., c, e)
        A matrix, or a stack of them, each with a mean and a scale of its own.

    Returns
    -------
    q : ndarray of int8, shape (..., c, e)
        +1 above the mean, -1 elsewhere; all -1 where all weights are equal.
    scale : ndarray, shape (...)
        Mean of |w|; 0 for a matrix of zeros.

    Raises
    ------
    ValueError, TypeError
        If w is no matrix, or not numeric.

    Notes
    -----
    3 c e operations, 1 bit for a weight. The mean only decides the signs; it is not part of the result, q γ.

    Examples
    --------
    >>> import numpy as np
    >>> q, scale = binary_quantize(np.array([[3.0, 1.0], [2.5, -0.5]]))
    >>> q, float(scale)
    (array([[ 1, -1],
           [ 1, -1]], dtype=int8), 1.75)
    """
    above = w > mean_of(w)  # (..., c, e)
    return _integers(np.where(above, np.ones_like(w), -np.ones_like(w)), 8), mean_of(abs(w))[..., 0, 0]


@ABSMAX.form
def absmax_quantize(x, *, bits=8):
    """Integers of so many bits, and their unit, for every row, equation (3).

    Parameters
    ----------
    x : ndarray, shape (..., c)
        Tokens.
    bits : int
        2 to 16.

    Returns
    -------
    q : ndarray of int8 or int16, shape (..., c)
        -Q to Q, Q = 2^(bits - 1) - 1.
    scale : ndarray, shape (...)
        max |x| / Q; 0 for a row of zeros, whose q is 0.

    Raises
    ------
    ValueError, TypeError
        If bits is not an integer from 2 to 16, or x is not numeric.

    Notes
    -----
    6 c operations per row. |x - q scale| <= scale / 2.

    Examples
    --------
    >>> import numpy as np
    >>> q, scale = absmax_quantize(np.array([[12.7, -5.0, 0.04], [0.0, 0.0, 0.0]]))
    >>> q, scale.round(3)
    (array([[127, -50,   0],
           [  0,   0,   0]], dtype=int8), array([0.1, 0. ]))
    """
    Q = 2 ** (int(bits) - 1) - 1
    largest = np.max(abs(x), axis=-1, keepdims=True, initial=0)  # (..., 1)
    return _integers(np.clip(np.rint(x / unit_of(largest) * Q), -Q - 1, Q), bits), largest[..., 0] / Q


def absmax_bound(x, *, unit, store=0.0, bits=8):
    """|computed - exact| of the scale, one division; the integers are right or wrong.

    The largest of numbers is exact. Some take the reciprocal first and divide by it, which is two roundings.
    """
    scale = np.max(abs(x), axis=-1, initial=0) / (2 ** (int(bits) - 1) - 1)
    return np.zeros(x.shape, np.int16), np.asarray(4 * unit * scale)


# -- what they share -------------------------------------------------------------------------------------------------


def _integers(q, bits):
    """Whole numbers as integers; intervals stay, and NaN, of which no integer tells, is 0."""
    if q.dtype.kind == "O":
        return q
    return np.where(np.isnan(q), 0, q).astype(np.int8 if bits <= 8 else np.int16)


def _exact_ties(rng, w):
    """Weights of which the mean size is 1 exactly, in any order of summation, and some are exactly half of it."""
    size = w.shape[-2] * w.shape[-1]
    pairs = np.resize([0.5, 1.5], (*w.shape[:-2], size)) if size % 2 == 0 else np.ones((*w.shape[:-2], size))
    return rng.permuted(pairs, axis=-1).reshape(w.shape) * rng.choice([-1.0, 1.0], w.shape)


def _exactly_half(rng, x):
    """Rows of which the largest is a power of two, and some elements half of it.

    In units of 1 or 1/127 of the largest, x/γ·Q, x/(γ/Q) and x (Q/γ) are all Q/2, exactly; of 1/7 one of them is 3.4999998.
    """
    x = np.where(rng.random(x.shape) < 0.5, rng.choice([-1.0, 1.0, 2.0, -2.0], x.shape), 0 * x)
    return np.concatenate([np.full_like(x[..., :1], 2.0), x[..., 1:]], axis=-1)


def _beyond_eight_bits(rng, x):
    """Integers of up to 200 beside 511, or 512 where a half rounds that: none is half way between two of ten bits."""
    return np.concatenate([np.full_like(x[..., :1], 511.0), rng.integers(-200, 201, x[..., 1:].shape)], axis=-1)


def _weights(rng, *, c=4, e=3, batch=(5,)):
    return {"w": decided_weights(rng, (*batch, c, e))}


def _activations(rng, *, c=9, batch=(7,)):
    return {"x": decided_activations(rng, (*batch, c))}


def _with(sample, change, **options):
    def draw(rng, **sizes):
        return {n: change(rng, v) for n, v in sample(rng, **sizes).items()} | options

    return draw


def _at_the_mean(rng, w):
    """-1, 0 or two of them, 1, in balance: the mean is 0 in any order of the sum."""
    number = np.arange(w.size).reshape(w.shape) - (w.size - 1) / 2
    return np.sign(np.trunc(number))


def _times_two(f, call, bound, rng):
    """Twice the numbers have the same integers and exactly twice the scale."""
    (q, scale), (q2, scale2) = f(**call), f(**{n: 2 * v if isinstance(v, np.ndarray) else v for n, v in call.items()})
    yield "q of twice the numbers", q2, q, np.zeros(q.shape)
    yield "scale of twice the numbers", np.asarray(scale2), np.asarray(2 * scale), 2 * bound(**call)[1]


def _turned(f, call, bound, rng):
    """The negative numbers have the negative integers and the same scale."""
    (q, scale), (q2, scale2) = f(**call), f(**{n: -v if isinstance(v, np.ndarray) else v for n, v in call.items()})
    yield "q of the negative", q2, -q, np.zeros(q.shape)
    yield "scale of the negative", np.asarray(scale2), np.asarray(scale), bound(**call)[1]


def _transposed(f, call, bound, rng):
    """Rows and columns are alike: one scale for the matrix."""
    (q, scale), (q2, scale2) = f(**call), f(w=np.swapaxes(call["w"], -1, -2))
    yield "q of the transpose", np.swapaxes(q2, -1, -2), q, np.zeros(q.shape)
    yield "scale of the transpose", np.asarray(scale2), np.asarray(scale), 2 * bound(**call)[1]


def _each_row(f, call, bound, rng):
    """Every row has a scale of its own."""
    order = rng.permutation(call["x"].shape[0]) if call["x"].ndim > 1 else ...
    (q, scale), (q2, scale2) = f(**call), f(**call | {"x": call["x"][order] * 1})
    yield "q of rows in another order", q2, q[order], np.zeros(q.shape)
    yield "scale of rows in another order", np.asarray(scale2), np.asarray(scale)[order], 0 * np.asarray(bound(**call)[1])
    if call["x"].ndim > 1 and len(call["x"]):
        q1, scale1 = f(**call | {"x": call["x"][:1]})
        yield "q of the first row alone", q1, q[:1], np.zeros(q1.shape)
        yield "scale of the first row alone", np.asarray(scale1), np.asarray(scale)[:1], 0 * np.asarray(bound(**call)[1])[:1]


def _nearest(f, call, bound, rng):
    """What the integers stand for is half a unit away, at most."""
    q, scale = f(**call)
    unit, off = (np.asarray(v).astype(np.float64)[..., None] for v in (scale, bound(**call)[1]))
    away = abs(q * unit - call["x"].astype(np.float64))
    yield "distance of x from q scale", np.maximum(away, unit / 2), np.broadcast_to(unit / 2, away.shape), (abs(q) + 2.0) * off


def _cost(each, depth, once=0):
    return lambda c, e=1, batch=1: Cost((each * c * e + once) * batch, log2_ceil(c * e) + depth, 3 * c * e * batch)


_HARD = {
    "all zero": _with(_weights, lambda rng, w: 0 * w),
    "one matrix of zeros": lambda rng, **sizes: {"w": np.stack([_weights(rng, **sizes)["w"] * v for v in (0.0, 1.0)])},
    "mostly zero": _with(_weights, lambda rng, w: w * (np.arange(w.size).reshape(w.shape) % 5 == 0)),
    "tiny": _with(_weights, lambda rng, w: w * 2.0**-40),
    "large": _with(_weights, lambda rng, w: w * 2.0**40),
}

OPS = (
    Op(
        name="ternary_quantize",
        summary="weights -1, 0, 1 in units of their mean size",
        contract=TERNARY,
        forms={
            "round": Form(ternary_quantize, _cost(5, 6, 1), exact=("work", "depth")),
            "threshold": Form(ternary_quantize_threshold, _cost(3, 2), exact=("work", "depth")),
        },
        gradient=None,
        sample=_weights,
        hard=_HARD | {"exact ties": _with(_weights, _exact_ties)},
        error_bound=ternary_bound,
        references=("ma2024, section 2, equations 1-3",),
        lengths=(),
        sizes=({"c": 1, "e": 1}, {"c": 1}, {"c": 40, "e": 30}, {"batch": ()}, {"batch": (2, 3)}),
        laws=(Law("times_two", _times_two, ("w",)), Law("turned", _turned, ("w",)), Law("transposed", _transposed, ("w",))),
    ),
    Op(
        name="binary_quantize",
        summary="weights -1 and 1 in units of their mean size",
        contract=BINARY,
        forms={"sign": Form(binary_quantize, _cost(3, 2), exact=("work", "depth"))},
        gradient=None,
        sample=_weights,
        hard=_HARD | {"at the mean": _with(_weights, _at_the_mean), "a common offset": _with(_weights, lambda rng, w: np.rint(4 * w) / 4 + 8 + 4 * np.sign(w))},
        error_bound=ternary_bound,
        references=("wang2023, section 2.1, equations 1-3",),
        lengths=(),
        sizes=({"c": 1, "e": 1}, {"c": 1}, {"c": 40, "e": 30}, {"batch": ()}, {"batch": (2, 3)}),
        laws=(Law("times_two", _times_two, ("w",)), Law("transposed", _transposed, ("w",))),
    ),
    Op(
        name="absmax_quantize",
        summary="rows of integers in units of their largest size",
        contract=ABSMAX,
        forms={"round": Form(absmax_quantize, _cost(6, 6, 2), exact=("work",))},
        gradient=None,
        sample=_activations,
        options={"bits": (8, 4, 2)},
        hard={
            "all zero": _with(_activations, lambda rng, x: 0 * x),
            "some rows of zeros": _with(_activations, lambda rng, x: x * (rng.random((*x.shape[:-1], 1)) < 0.5)),
            "rows of many sizes": _with(_activations, lambda rng, x: x * 2.0 ** rng.integers(-30, 30, (*x.shape[:-1], 1))),
            "exactly half": _with(_activations, _exactly_half, bits=8),
            "ten bits": _with(_activations, _beyond_eight_bits, bits=10),
            "half a unit": _with(_activations, _exactly_half, bits=2),
            "one outlier": _with(_activations, lambda rng, x: np.where(np.arange(x.shape[-1]) == 0, 512.0, x / 64)),
        },
        error_bound=absmax_bound,
        references=("wang2023, section 2.1, equations 4-5",),
        lengths=(),
        sizes=({"c": 1}, {"c": 256}, {"batch": ()}, {"batch": (2, 3)}),
        laws=(
            Law("times_two", _times_two, ("x",)),
            Law("turned", _turned, ("x",)),
            Law("each_row", _each_row, ("x",)),
            Law("nearest", _nearest, ("x",)),
        ),
    ),
)
