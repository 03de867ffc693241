"""Attention-free transformer: weights from keys and positions alone, a softmax for every channel.

    o_t = Σ_j e^{k_j + w_tj} v_j / Σ_j e^{k_j + w_tj},    y_t = σ(q_t) o_t    elementwise in the channels          (1)

Products of queries with keys are gone: what query t sees is the same for all queries, up to a learned bias w_tj for each pair
of positions, and the query only opens a gate. Since a channel's weights are its own, (1) is attention with as many heads as
channels, each with values of one feature and the scores

    s_tj = k_j + w_tj                                                                                           (2)

and everything known of softmax attention holds: running maxima, online sums, the gradient. With w constant along diagonals
that move by a decay per step, (1) is what RWKV made a recurrence of (`wkv`).

This chapter is AFT-full; `aft_local`, `aft_simple` and `aft_conv` restrict w, and are cheaper.

Glossary
    q, k, v    queries, keys, values, all (T, d)                    Q, K, V [1, section 3.1]
    w          learned pair-wise position biases, shared by channels [1, eq. 2]
    s, p       scores (2) and weights, (..., d, T, T)               (not named)

Where implementations differ
    Public ports take e^{w - max w} times e^{k - max k} (one product of matrices): equal, as long as no row's largest k_j +
    w_tj lies far below the two maxima together, where all underflows. The paper's causal variant sets w_tj = -∞ for j > t:
    causal=True here. w is indexed [query, key].

References
    [1] S. Zhai et al., "An attention free transformer", 2021 (arXiv:2105.14103), section 3.1, equations 2 and 3.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.numerics import finite_or_zero, masked_matmul, sigmoid
from refimpl.core.options import positive_int
from refimpl.op import Cost, Form, Op
from refimpl.ops.attention.aft_shared import as_data, bound, checked, hard, laws, mean, sample_qkv, scores, vjp
from refimpl.ops.attention.weighted_mean import weights

CONTRACT = Contract("aft", takes="q (..., T, d); k (..., T, d); v (..., T, d); w (T, T)", gives="y (..., T, d)", check=checked("aft"))


@CONTRACT.form
@as_data
def aft(q, k, v, w, *, causal=False):
    """AFT-full, equation (1), from the weights of all pairs in all channels.

    Parameters
    ----------
    q, k, v : ndarray, shape (..., T, d)
        Queries, keys, values.
    w : ndarray, shape (T, T)
        Position biases, w[t, j] of query t and key j; -inf excludes a pair.
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
    8 T² d operations and 3 T² d elements; no product of queries with keys. A row whose pairs are all excluded is 0.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v = np.full((2, 1), 100.0), np.log([[1.0], [3.0]]), np.array([[4.0], [8.0]])
    >>> aft(q, k, v, np.zeros((2, 2)))  # weights 1 : 3, the gate open
    array([[7.],
           [7.]])
    """
    s = scores(k, w, causal)
    return sigmoid(q) * mean(weights(s), v, s)


@CONTRACT.form
@as_data
def aft_tiled(q, k, v, w, *, causal=False, block=64):
    """The same, keys in blocks, everything relative to the maximum so far: no array of T² d elements.

    The rule of `attention`'s form ``tiled``, channel by channel: when a block brings a larger maximum, what was summed is
    rescaled by e^{old - new}. Same operations, T d (4 block + 5) elements.
    """
    positive_int("aft", "block", block)
    T = k.shape[-2]
    top = np.full_like(q, -np.inf, shape=np.broadcast_shapes(q.shape, k.shape, v.shape))  # (..., T, d)
    top = top.mT[..., None]  # (..., d, T, 1)
    total, acc = np.zeros_like(top), np.zeros_like(top)
    for start in range(0, T, block):
        keys = slice(start, min(start + block, T))
        s = scores(k[..., keys, :], w[:, keys], causal, start)  # (..., d, T, block)
        larger = np.maximum(top, np.max(s, axis=-1, keepdims=True))
        shift = finite_or_zero(larger)
        e, keep = np.exp(s - shift), np.exp(top - shift)
        total = keep * total + e.sum(axis=-1, keepdims=True)
        acc = keep * acc + masked_matmul(e, v[..., keys, :].mT[..., None], s)
        top = larger
    return sigmoid(q) * (acc / np.where(total == 0, np.ones_like(total), total))[..., 0].mT


@CONTRACT.gradient
@as_data
def aft_vjp(dy, q, k, v, w, *, causal=False):
    """Gradient of `aft`: the gate's, and that of a softmax in every channel.

        dq = dy o σ(q) σ(-q),    do = dy σ(q),    dv_j = Σ_t p_tj do_t,    ds_tj = p_tj do_t (v_j - o_t)

    and by (2) dk_j sums ds over queries, dw_tj over channels.

    Parameters
    ----------
    dy : ndarray, shape (..., T, d)
        Cotangent of y.

    Returns
    -------
    dict
        "q", "k", "v", "w".
    """
    gradients, ds = vjp(dy, q, k, v, scores(k, w, causal))
    return gradients | {"w": ds.sum(axis=-3)}


@CONTRACT.form
@as_data
def error_bound(q, k, v, w, *, unit, store=0.0, causal=False):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`: see `aft_shared`."""
    return bound(q, k, v, w, scores(k, w, causal), causal, unit, store)


def _sample(rng, *, T=7, d=2, batch=()):
    return sample_qkv(rng, (*batch, T, d)) | {"w": rng.standard_normal((T, T))}


OPS = (
    Op(
        name="aft",
        summary="AFT-full: a softmax over keys plus position biases in every channel, gated by the query",
        contract=CONTRACT,
        forms={
            "dense": Form(
                aft,
                lambda T, d, batch=1: Cost(batch * T * d * (8 * T + 1), 3 * log2_ceil(T) + 7, 3 * batch * T * d * (T + 1)),
                exact=("work", "depth", "peak"),
            ),
            "tiled": Form(
                aft_tiled,
                lambda T, d, batch=1, block=64: Cost(
                    batch * T * d * (7 * T + 5 * np.ceil(T / block) + 4),
                    2 * np.ceil(T / block) + 2 * log2_ceil(min(T, block)) + 6,
                    batch * T * d * (4 * min(T, block) + 5),
                ),
                exact=("work",),
            ),
        },
        gradient=aft_vjp,
        sample=_sample,
        options={"causal": (False, True)},
        hard=hard(_sample, own=lambda w: np.eye(len(w))),
        error_bound=error_bound,
        references=("zhai2021, equations 2 and 3",),
        sizes=({"d": 1}, {"d": 8}),
        laws=laws(CONTRACT),
    ),
)
