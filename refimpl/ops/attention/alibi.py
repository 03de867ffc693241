"""ALiBi: positions as a penalty on scores that grows with the distance.

    bias_hij = -slope_h |i + offset - j|                                                                       (1)
    slope_h = 2^{-8 (h + 1) / H},    h = 0 ... H - 1,    H a power of two                                       (2)

Added to the scores of attention, (1) makes far keys count less, by a factor e^{-slope} a step; nothing is added to the
embeddings, and nothing learned, so lengths never seen in training have a meaning. The slopes (2) are a geometric sequence
from 2^{-8/H} to 2^{-8}.

For H between powers of two, the published code takes the slopes of the power of two below, H', and fills up with every
other slope of 2H': 2^{-4/H'}, 2^{-12/H'} ... So half of a model's heads do not move when heads are added.

The bias is no operator of data: it has no array argument, so it has no gradient and no precision of its own (float64). It is
used as `attention(q, k, v, bias=alibi_bias(H, n, m))`; positions as in attention, the ends aligned unless offset is given.

Glossary
    slope     m [1, section 3]
    heads     H, n in [1]

Where implementations differ
    Bloom adds slope·j instead of -slope·(i - j): the same under the softmax of a causal row, from which slope·i drops out;
    not the same lse, and not the same without a causal mask. |i - j| on both sides is the symmetric variant of encoders;
    flash-attn's `alibi_slopes` computes it with aligned ends, as here. Slopes for H not a power of two: interleaved as
    said in ALiBi's code and Bloom; other ports use (2) for any H.

References
    [1] O. Press, N. A. Smith, M. Lewis, "Train short, test long: attention with linear biases enables input length
        extrapolation", ICLR 2022, section 3 and figure 3; slopes for other H: function `get_slopes` of its code.
"""

import numpy as np

__all__ = ["alibi_bias", "alibi_slopes"]


def alibi_slopes(heads):
    """The slope of each head, equation (2), and as published where `heads` is not a power of two.

    Parameters
    ----------
    heads : int
        At least 1.

    Returns
    -------
    ndarray, shape (heads,)

    Raises
    ------
    ValueError, TypeError
        If `heads` is not an integer of at least 1.

    Examples
    --------
    >>> alibi_slopes(4)
    array([0.25      , 0.0625    , 0.015625  , 0.00390625])
    >>> alibi_slopes(6)[4:]  # the first and third of eight
    array([0.5  , 0.125])
    """
    _integer("alibi_slopes", "heads", heads, least=1)
    return _slopes(heads)


def alibi_bias(heads, n, m, *, offset=None):
    """The bias of all heads, equation (1).

    Parameters
    ----------
    heads : int
        At least 1.
    n, m : int
        Queries and keys.
    offset : int, optional
        Position of query 0 among the keys; m - n by default.

    Returns
    -------
    ndarray, shape (heads, n, m)

    Raises
    ------
    ValueError, TypeError
        If an argument is not an integer in its range.

    Notes
    -----
    Two roundings an element, in float64; exact for a power of two up to 8 heads. What a kernel should not do is to
    materialise it: heads · n · m elements, each a multiplication away from i and j.

    Examples
    --------
    >>> alibi_bias(8, 3, 3)[0]
    array([[-0. , -0.5, -1. ],
           [-0.5, -0. , -0.5],
           [-1. , -0.5, -0. ]])
    """
    _integer("alibi_bias", "heads", heads, least=1)
    _integer("alibi_bias", "n", n, least=0)
    _integer("alibi_bias", "m", m, least=0)
    if offset is not None:
        _integer("alibi_bias", "offset", offset)
    P = np.arange(n)[:, None] + (m - n if offset is None else offset)
    distance = abs(P - np.arange(m))  # (n, m)
    return -_slopes(heads)[:, None, None] * distance


def _slopes(heads):
    below = 1 << (int(heads).bit_length() - 1)  # the power of two at or below
    of_power_of_two = lambda H, h: 2.0 ** (-8 * (h + 1) / H)
    rest = np.arange(heads - below)
    return np.concatenate([of_power_of_two(below, np.arange(below)), of_power_of_two(2 * below, 2 * rest)])


def _integer(who, name, value, least=None):
    rule = "an integer" if least is None else f"an integer of at least {least}"
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise TypeError(f"{who}: {name} must be {rule}, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{who}: {name} must be {rule}, got {value!r}")
