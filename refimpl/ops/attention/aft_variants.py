"""AFT with fewer position biases: local, convolutional, none; in time linear in the length.

All are `aft` with a w that is zero for all but a band of pairs:

    local     w_tj as given for |t - j| < s, else 0                                                             (1)
    conv      w_tj = ω_{h, t - j} for |t - j| < s, else 0; h the head                                           (2)
    simple    w = 0                                                                                             (3)

A zero bias is not a mask: pairs outside of the band still attend, with weight e^{k_j}. This is what makes them cheap. Outside
of the band, what query t sees is a sum over all earlier keys, and one over all later ones, that do not depend on t but for
where they end:

    Σ_j e^{k_j + w_tj} v_j = Σ_{j <= t-s} e^{k_j} v_j + Σ_{|t-j| < s} e^{k_j + w_tj} v_j + Σ_{j >= t+s} e^{k_j} v_j         (4)

the same for the denominator: two running sums and a band, T (2s + 1) d terms instead of T² d. Each of the three parts is kept
as (maximum, denominator, numerator), which makes sums of any keys, and merging them, safe (rule (4) of `attention`).

The paper writes the band as a correction, (e^{w} - 1) e^{k} on top of the sum over all keys, which is a convolution. That
form subtracts: where a bias of -30 is meant to silence a large key, the key's full weight is added and taken away again, and
with it all digits of the others. So the parts of (4) are disjoint here.

Glossary
    s         half-width of the band: |t - j| < s          s [1, section 3.2]
    w         of conv: one row of 2s - 1 biases a head, w[h, t - j + s - 1]
    past, future   the running sums of (4)

Where implementations differ
    Whether positions outside of the band attend: they do in the paper and here; code that calls itself local often masks
    them. Of conv, the paper re-parametrises w (its scale and offset are learned): pass the result. Causal conv in public code
    has s biases, for t - j = 0 ... s - 1; here it has the same 2s - 1 and does not look at those of later keys.

References
    [1] S. Zhai et al., "An attention free transformer", 2021 (arXiv:2105.14103), section 3.2 (AFT-local, equation 3;
        AFT-simple, equation 4; AFT-conv, equation 5).
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.numerics import finite_or_zero, sigmoid
from refimpl.core.options import positive_int
from refimpl.op import Cost, Form, Op
from refimpl.ops.attention.aft_shared import as_data, bound, checked, hard, laws, mean, sample_qkv, scores, vjp
from refimpl.ops.attention.weighted_mean import weights


def _checked_local(arguments, sizes):
    checked("aft_local")(arguments, sizes)
    positive_int("aft_local", "s", arguments.get("s", 1))


def _checked_conv(arguments, sizes):
    checked("aft_conv")(arguments, sizes)
    if sizes["K"] % 2 == 0:
        raise ValueError(f"aft_conv: w must have an odd number of biases, for distances -(s - 1) ... s - 1, got {sizes['K']}")


_QKV = "q (..., T, d); k (..., T, d); v (..., T, d)"
_HEADS = "q (..., H?, T, d); k (..., H?, T, d); v (..., H?, T, d)"
LOCAL = Contract("aft_local", takes=f"{_QKV}; w (T, T)", gives="y (..., T, d)", check=_checked_local)
SIMPLE = Contract("aft_simple", takes=_QKV, gives="y (..., T, d)", check=checked("aft_simple"))
CONV = Contract("aft_conv", takes=f"{_HEADS}; w (H?, K)", gives="y (..., H?, T, d)", check=_checked_conv)


@LOCAL.form
@as_data
def aft_local(q, k, v, w, *, s, causal=False):
    """AFT-local, equation (1): `aft` with the biases outside of a band set to zero.

    Parameters
    ----------
    q, k, v : ndarray, shape (..., T, d)
        Queries, keys, values.
    w : ndarray, shape (T, T)
        Position biases, w[t, j] of query t and key j; only those with |t - j| < s are looked at.
    s : int
        At least 1; T or more is `aft`.
    causal : bool
        Only keys j <= t.

    Returns
    -------
    y : ndarray, shape (..., T, d)

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, an array is complex or not numeric, or s is not a positive integer.

    Notes
    -----
    8 T² d operations, as `aft`; the form ``banded`` takes 20 T (s + 2) d.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v, w = np.full((3, 1), 100.0), np.zeros((3, 1)), np.array([[3.0], [6.0], [9.0]]), np.full((3, 3), np.log(4))
    >>> aft_local(q, k, v, w, s=1)  # its own key counts four times, the others once
    array([[4.5],
           [6. ],
           [7.5]])
    """
    scored = scores(k, _banded(w, s), causal)
    return sigmoid(q) * mean(weights(scored), v, scored)


@LOCAL.form
@as_data
def aft_local_banded(q, k, v, w, *, s, causal=False):
    """The same by (4): running sums for what is outside of the band, the band diagonal by diagonal."""
    t = np.arange(k.shape[-2])
    diagonal = lambda lag: w[t, np.clip(t - lag, 0, max(t.size - 1, 0))][:, None]  # w_{t, t - lag}: (T, 1)
    return sigmoid(q) * _by_parts(k, v, diagonal, min(s, max(t.size, 1)), causal)


@LOCAL.gradient
@as_data
def aft_local_vjp(dy, q, k, v, w, *, s, causal=False):
    """Gradient of `aft_local`: that of `aft`, with none for the biases outside of the band.

    Parameters
    ----------
    dy : ndarray, shape (..., T, d)
        Cotangent of y.

    Returns
    -------
    dict
        "q", "k", "v", "w".
    """
    gradients, ds = vjp(dy, q, k, v, scores(k, _banded(w, s), causal))
    return gradients | {"w": _banded(ds.sum(axis=-3), s)}


@SIMPLE.form
@as_data
def aft_simple(q, k, v, *, causal=False):
    """AFT-simple, equation (3): a softmax over time in every channel, without positions.

    Parameters
    ----------
    q, k, v : ndarray, shape (..., T, d)
        Queries, keys, values.
    causal : bool
        Only keys j <= t.

    Returns
    -------
    y : ndarray, shape (..., T, d)

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit or an array is complex or not numeric.

    Notes
    -----
    8 T² d operations as written; 66 T d in the form ``scan``.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v = np.full((2, 1), 100.0), np.log([[1.0], [3.0]]), np.array([[4.0], [8.0]])
    >>> aft_simple(q, k, v, causal=True)  # 4, and (1·4 + 3·8) / 4
    array([[4.],
           [7.]])
    """
    scored = scores(k, _no_bias(k), causal)
    return sigmoid(q) * mean(weights(scored), v, scored)


@SIMPLE.form
@as_data
def aft_simple_scan(q, k, v, *, causal=False):
    """The same by (4) with a band of nothing but the query's own key: a running sum, which decoding would carry along."""
    return sigmoid(q) * _by_parts(k, v, lambda lag: np.zeros_like(k[..., :1]), 1, causal)


@SIMPLE.gradient
@as_data
def aft_simple_vjp(dy, q, k, v, *, causal=False):
    """Gradient of `aft_simple`: that of `aft`.

    Parameters
    ----------
    dy : ndarray, shape (..., T, d)
        Cotangent of y.

    Returns
    -------
    dict
        "q", "k", "v".
    """
    return vjp(dy, q, k, v, scores(k, _no_bias(k), causal))[0]


@CONV.form
@as_data
def aft_conv(q, k, v, w, *, causal=False):
    """AFT-conv, equation (2): biases that depend on the distance and on the head.

    Parameters
    ----------
    q, k, v : ndarray, shape (..., H, T, d)
        Queries, keys, values. Without the axis of heads, in all arrays, it is one head.
    w : ndarray, shape (H, 2s - 1)
        w[h, t - j + s - 1] for query t and key j; -inf excludes a distance. An odd number.
    causal : bool
        Only keys j <= t.

    Returns
    -------
    y : ndarray, shape (..., H, T, d)

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, an array is complex or not numeric, or w has an even number of biases.

    Notes
    -----
    8 H T² d operations as written; 10 H T (K + 6) d in the form ``banded``.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v = np.full((3, 1), 100.0), np.zeros((3, 1)), np.array([[3.0], [6.0], [9.0]])
    >>> aft_conv(q, k, v, np.log([1.0, 1.0, 4.0]))  # the key before counts four times
    array([[6. ],
           [4.5],
           [6. ]])
    """
    scored = scores(k, _toeplitz(w, k), causal)
    return sigmoid(q) * mean(weights(scored), v, scored)


@CONV.form
@as_data
def aft_conv_banded(q, k, v, w, *, causal=False):
    """The same by (4): running sums for what is outside of the kernel, the kernel bias by bias."""
    s = (w.shape[-1] + 1) // 2
    diagonal = lambda lag: w[:, lag + s - 1][:, None, None]  # (H, 1, 1)
    return sigmoid(q) * _by_parts(k, v, diagonal, s, causal)


@CONV.gradient
@as_data
def aft_conv_vjp(dy, q, k, v, w, *, causal=False):
    """Gradient of `aft_conv`: that of `aft`, summed over each diagonal.

    Parameters
    ----------
    dy : ndarray, shape (..., H, T, d)
        Cotangent of y.

    Returns
    -------
    dict
        "q", "k", "v", "w".
    """
    gradients, ds = vjp(dy, q, k, v, scores(k, _toeplitz(w, k), causal))
    T, s = k.shape[-2], (w.shape[-1] + 1) // 2
    dw = np.zeros_like(ds, shape=(*ds.shape[:-3], w.shape[-1]))
    for lag in range(max(1 - s, 1 - T), min(s, T)):
        t = np.arange(max(lag, 0), min(T, T + lag))
        dw[..., lag + s - 1] = ds.sum(axis=-3)[..., t, t - lag].sum(axis=-1)
    return gradients | {"w": dw}


@LOCAL.form
@as_data
def error_bound_local(q, k, v, w, *, s, unit, store=0.0, causal=False):
    """|computed - exact|, elementwise, of any form of `aft_local`: that of `aft` for the biases that count, zero outside of the band.

    It holds for (4) too: its sums are of the same terms, all of one sign in the denominator, and every step of a running sum
    rounds what is there once and rescales it once, errors of mixed signs that grow like those of any long sum.
    """
    w = _banded(w, s)
    return bound(q, k, v, w, scores(k, w, causal), causal, unit, store)


@SIMPLE.form
@as_data
def error_bound_simple(q, k, v, *, unit, store=0.0, causal=False):
    """|computed - exact|, elementwise, of any form of `aft_simple`: that of `aft` for no biases.

    It holds for (4) too: its sums are of the same terms, all of one sign in the denominator, and every step of a running sum
    rounds what is there once and rescales it once, errors of mixed signs that grow like those of any long sum.
    """
    return bound(q, k, v, _no_bias(k), scores(k, _no_bias(k), causal), causal, unit, store)


@CONV.form
@as_data
def error_bound_conv(q, k, v, w, *, unit, store=0.0, causal=False):
    """|computed - exact|, elementwise, of any form of `aft_conv`: that of `aft` for the biases spread along diagonals.

    It holds for (4) too: its sums are of the same terms, all of one sign in the denominator, and every step of a running sum
    rounds what is there once and rescales it once, errors of mixed signs that grow like those of any long sum.
    """
    w = _toeplitz(w, k)
    return bound(q, k, v, w, scores(k, w, causal), causal, unit, store)


# -- what the variants share -----------------------------------------------------------------------------------------


def _lags(T):
    """t - j: (T, T)."""
    return np.arange(T)[:, None] - np.arange(T)


def _banded(w, s):
    return np.where(abs(_lags(w.shape[-1])) < s, w, np.zeros_like(w))


def _toeplitz(w, k):
    """w_tj of (2): (H, T, T)."""
    s, lags = (w.shape[-1] + 1) // 2, _lags(k.shape[-2])
    spread = w[:, np.clip(lags, 1 - s, s - 1) + s - 1]
    return np.where(abs(lags) < s, spread, np.zeros_like(spread))


def _no_bias(k):
    return np.zeros_like(k, shape=(k.shape[-2], k.shape[-2]))


def _by_parts(k, v, diagonal, s, causal):
    """o by (4); `diagonal(lag)` is w_{t, t - lag}, broadcast to (..., T, d)."""
    T = k.shape[-2]
    k, v = np.broadcast_arrays(k, v, subok=True)
    one = np.where(np.isneginf(k), np.zeros_like(k), np.ones_like(k))
    single = (k, one, np.where(one == 0, np.zeros_like(v), v))  # each key alone: maximum, denominator, numerator
    past = _running(single)  # entry t: keys before t
    parts = [tuple(_at(x, np.arange(T) - s + 1) for x in past)]
    for lag in range(0 if causal else 1 - s, s):
        top, den, num = (_shifted(x, lag, empty) for x, empty in zip(single, (-np.inf, 0, 0), strict=True))
        parts.append((top + diagonal(lag), den, num))
    if not causal:
        future = _running(tuple(x[..., ::-1, :] for x in single))  # entry i: the last i keys
        parts.append(tuple(_at(x, T - s - np.arange(T)) for x in future))
    _, den, num = _merged(parts)
    return num / np.where(den == 0, np.ones_like(den), den)


def _running(single):
    """(maximum, denominator, numerator) of the first 0, 1 ... T keys: (..., T + 1, d)."""
    nothing = tuple(np.full_like(x[..., :1, :].sum(axis=-2), empty) for x, empty in zip(single, (-np.inf, 0, 0), strict=True))
    sums = [nothing]
    for t in range(single[0].shape[-2]):
        sums.append(_merged([sums[-1], tuple(x[..., t, :] for x in single)]))
    return tuple(np.stack(x, axis=-2) for x in zip(*sums, strict=True))


def _merged(parts):
    """Disjoint sets of keys as one."""
    top = parts[0][0]
    for other, _, _ in parts[1:]:
        top = np.maximum(top, other)
    shift = finite_or_zero(top)
    factors = [np.exp(t - shift) for t, _, _ in parts]
    keep = lambda factor, x: np.where(factor == 0, np.zeros_like(x), factor * x)
    den = sum(keep(f, den) for f, (_, den, _) in zip(factors, parts, strict=True))
    return top, den, sum(keep(f, num) for f, (_, _, num) in zip(factors, parts, strict=True))


def _at(x, places):
    """Rows of x, the first one (nothing) for places before it."""
    return x[..., np.maximum(places, 0), :]


def _shifted(x, lag, empty):
    """Row t - lag at row t, `empty` beyond the ends."""
    T = x.shape[-2]
    j = np.arange(T) - lag
    inside = (j >= 0) & (j < T)
    return np.where(inside[:, None], x[..., np.clip(j, 0, max(T - 1, 0)), :], np.full_like(x, empty))


def _sample_local(rng, *, T=7, d=2, batch=()):
    return sample_qkv(rng, (*batch, T, d)) | {"w": rng.standard_normal((T, T))}


def _sample_simple(rng, *, T=7, d=2, batch=()):
    return sample_qkv(rng, (*batch, T, d))


def _sample_conv(rng, *, T=7, H=2, d=2, K=5, batch=()):
    return sample_qkv(rng, (*batch, H, T, d)) | {"w": rng.standard_normal((H, K))}


_DENSE = lambda T, d, H=1, K=0, batch=1: Cost(batch * H * T * d * (8 * T + 1), 3 * log2_ceil(T) + 7, 3 * batch * H * T * d * (T + 1))
_BANDED = lambda band: (
    lambda T, d, H=1, K=1, batch=1: Cost(
        batch * H * T * d * (10 * band(K) + 56), 3 * T + 7.5 - band(K) / 2, batch * H * T * d * (4 * band(K) + 26)
    )
)

OPS = (
    Op(
        name="aft_local",
        summary="AFT whose position biases are zero beyond a distance",
        contract=LOCAL,
        forms={"dense": Form(aft_local, _DENSE, exact=("work", "depth")), "banded": Form(aft_local_banded, _BANDED(lambda K: 5))},
        gradient=aft_local_vjp,
        sample=_sample_local,
        options={"s": (3, 1, 9, lambda T, **_: 3 * T // 4 + 1), "causal": (False, True)},
        hard=hard(lambda rng, **sizes: _sample_local(rng, **sizes) | {"s": 3}, own=lambda w: np.eye(len(w))),
        error_bound=error_bound_local,
        sizes=({"d": 1}, {"d": 8}),
        laws=laws(LOCAL),
        references=("zhai2021, section 3.2",),
    ),
    Op(
        name="aft_simple",
        summary="AFT without position biases: a softmax over time in every channel",
        contract=SIMPLE,
        forms={"dense": Form(aft_simple, _DENSE, exact=("work", "depth")), "scan": Form(aft_simple_scan, _BANDED(lambda K: 1))},
        gradient=aft_simple_vjp,
        sample=_sample_simple,
        options={"causal": (False, True)},
        hard=hard(_sample_simple),
        error_bound=error_bound_simple,
        sizes=({"d": 1}, {"d": 8}),
        laws=laws(SIMPLE),
        references=("zhai2021, section 3.2",),
    ),
    Op(
        name="aft_conv",
        summary="AFT whose position biases depend on distance and head",
        contract=CONV,
        forms={"dense": Form(aft_conv, _DENSE, exact=("work", "depth")), "banded": Form(aft_conv_banded, _BANDED(lambda K: K))},
        gradient=aft_conv_vjp,
        sample=_sample_conv,
        options={"causal": (False, True)},
        hard=hard(_sample_conv, own=lambda w: np.arange(w.shape[-1]) == w.shape[-1] // 2),
        error_bound=error_bound_conv,
        sizes=({"d": 1, "H": 1}, {"d": 8, "K": 1}, {"H": 3, "K": 21}),
        laws=laws(CONV),
        references=("zhai2021, section 3.2",),
    ),
)
