"""Softmax attention: every output is a mean of values, weighted by how well a query meets each key.

    s_ij = scale q_i·k_j,    s_ij <- c tanh(s_ij / c) (softcap c),    s_ij <- s_ij + bias_ij                    (1)
    p_ij = e^{s_ij} / l_i,    l_i = Σ_{j allowed} e^{s_ij} + e^{sink}                                           (2)
    o_i = Σ_{j allowed} p_ij v_j,    lse_i = log l_i                                                            (3)

Query i stands at position P = i + offset among the keys; by default offset = m - n: the last query stands at the last
key. A pair is allowed where each of these that is given allows it: `causal`: j <= P; `window` = (left, right):
P - left <= j <= P + right, both ends included; `mask`; a bias other than -∞.

As it stands, (2) needs the n×m map of weights. It does not have to: keys can be taken in any portions, since the softmax
of a union is known from the softmaxes of its parts. With (o', lse') and (o'', lse'') from two disjoint sets of keys,

    lse = log(e^{lse'} + e^{lse''}),    o = e^{lse' - lse} o' + e^{lse'' - lse} o''                             (4)

is the result for both together. Portions one after the other, with a running maximum instead of lse: the form `tiled`,
FlashAttention [2, 3]. Portions side by side: `split_kv`, flash-decoding, and ring attention where they are on different
machines [4].

Glossary
    q, k, v        queries, keys, values                      Q, K, V [1, eq. 1]
    s, p           scores and weights                         S, P [2, section 3.1]
    top, total     running maximum and denominator of a row   m, ℓ [2, algorithm 1]
    lse            log-sum-exp of a row                       L [3, section 3.1]
    delta          Σ_j p_ij ∂p_ij = do_i·o_i                  D [3, algorithm 2]
    G              query heads that share one key head; head h reads key head h // G (GQA [5])
    sink           a logit per head that only adds to the denominator [6]; neither scaled nor capped

Where implementations differ
    Causal with n ≠ m: ends aligned here and in flash-attn >= 2.1; starts aligned in torch's `is_causal`, flash-attn < 2.1
    and ONNX without a cache: that is offset=0. A row with nothing allowed: o = 0 and lse = -∞ here and in FlashAttention-3
    (FlashAttention-2 says +∞); NaN from a naive softmax; the mean of v where -∞ is a large finite number. The softcap comes
    before the bias here and in Gemma 2, elsewhere after it. The window's ends are included here and in flash-attn, where -1
    means unbounded (here None; negative numbers are refused); a framework's ``sliding_window=w`` is often left = w - 1.
    The scale is 1/√d unless given.

References
    [1] A. Vaswani et al., "Attention is all you need", NeurIPS 2017, section 3.2.1.
    [2] T. Dao, D. Y. Fu, S. Ermon, A. Rudra, C. Ré, "FlashAttention", NeurIPS 2022, section 3.1 and algorithm 1.
    [3] T. Dao, "FlashAttention-2", ICLR 2024, section 3.1 and algorithms 1-2.
    [4] H. Liu, M. Zaharia, P. Abbeel, "Ring attention with blockwise transformers", ICLR 2024, section 3.
    [5] J. Ainslie et al., "GQA", EMNLP 2023, section 2.2.
    [6] G. Xiao et al., "Efficient streaming language models with attention sinks", ICLR 2024, section 3.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.dtypes import unbroadcast
from refimpl.core.numerics import finite_or_zero, masked_matmul, tanh_derivative
from refimpl.core.options import positive_int
from refimpl.core.parallel import over_threads
from refimpl.op import Cost, Form, Op
from refimpl.ops.attention.attention_bound import bound
from refimpl.ops.attention.attention_cases import HARD, sample
from refimpl.ops.attention.attention_laws import attention_laws
from refimpl.ops.attention.attention_pairs import blocks, check_options, cotangents, join, prepare, products, scores, seen_blocks, tile

__all__ = ["attention_tiled_vjp", "merge_by_lse"]
_MAP = "(..., Hq?, n, m) | (..., 1, n, m) | (..., Hq, 1, m) | (..., 1, 1, m) | (..., Hq, n, 1) | (..., 1, n, 1) | (n, m) | (1, m) | (n, 1)"

CONTRACT = Contract(
    "attention",
    takes=f"q (..., Hq?, n, d); k (..., Hkv?, m, d); v (..., Hkv?, m, e); mask:bool {_MAP}; bias {_MAP}; sink () | (Hq)",
    gives="o (..., Hq?, n, e); lse (..., Hq?, n)",
    rules=("Hkv divides Hq", "d at least 1"),
    check=check_options,
)
_as_data = np.errstate(all="ignore")  # infinities and NaN are data here, and masked ones must pass in silence


@CONTRACT.form
@_as_data
def attention(
    q, k, v, *, causal=False, offset=None, window=None, mask=None, bias=None, scale=None, softcap=None, sink=None, return_lse=False
):
    """Softmax attention, equations (1)-(3), from the whole map of weights.

    Parameters
    ----------
    q : ndarray, shape (..., Hq, n, d)
        Queries. Without the axis of heads, in all arrays, it is one head.
    k : ndarray, shape (..., Hkv, m, d)
        Keys; Hkv divides Hq, and query head h reads key head h // (Hq // Hkv).
    v : ndarray, shape (..., Hkv, m, e)
        Values.
    causal : bool
        Query i sees the keys up to its own position i + offset.
    offset : int, optional
        Position of query 0 among the keys; m - n by default. May be negative.
    window : tuple (left, right), optional
        Query i sees `left` keys before its position and `right` after it, and the one at it; None is unbounded.
    mask : bool ndarray, shape (..., Hq, n, m), optional
        True where a query may attend to a key. Each axis may be 1, leading ones may be missing.
    bias : ndarray, shape (..., Hq, n, m), optional
        Added to the scores, after the softcap; -∞ disallows a pair. Broadcasts as `mask` does.
    scale : float, optional
        1/√d by default.
    softcap : float, optional
        Positive; scores are squashed into (-softcap, softcap).
    sink : float or ndarray, shape () or (Hq,), optional
        Logit of an additional key that has no value.
    return_lse : bool
        Also return the logarithm of each row's denominator.

    Returns
    -------
    o : ndarray, shape (..., Hq, n, e)
    lse : ndarray, shape (..., Hq, n), only with `return_lse`

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, an array is not real, or an option is out of its range.

    Notes
    -----
    Hq n m (2 d + 2 e + 5) operations; 3 Hq n m elements in memory. Each weight's relative error is about the absolute
    error of its score, so scores of size |s| cost |s| units of roundoff (`error_bound`).

    References
    ----------
    [1, section 3.2.1], with the conventions of [3] for rows without keys.

    Examples
    --------
    Two queries, two keys, causal: the first sees one key, the second both, with scores 0 and log 3.

    >>> import numpy as np
    >>> q, k = np.array([[1.0], [1.0]]), np.array([[0.0], [np.log(3.0)]])
    >>> attention(q, k, np.array([[8.0], [16.0]]), causal=True)[:, 0]
    array([ 8., 14.])
    """
    q, k, v, sink, pairs = prepare(q, k, v, causal, offset, window, mask, bias, scale, softcap, sink)
    s = scores(products(q, k, pairs), pairs)  # (..., Hkv, G, n, m)
    p, lse, _ = _softmax(s, sink)
    o = masked_matmul(p, v, s)  # (..., Hkv, G, n, e)
    return _finish(o, lse, return_lse)


def _softmax(s, sink):
    """Weights, lse and the sink's weight of rows of scores; a row without any finite score has weights 0 and lse -∞."""
    top = np.maximum(np.max(s, axis=-1, keepdims=True, initial=-np.inf), sink)  # (..., n, 1)
    shift = finite_or_zero(top)
    w, w_sink = np.exp(s - shift), np.exp(sink - shift)
    total = w.sum(axis=-1, keepdims=True) + w_sink
    lse = shift + np.log(total)
    total = np.where(total == 0, np.ones_like(total), total)
    return w / total, lse, w_sink / total


@CONTRACT.form
@_as_data
def attention_tiled(
    q, k, v, *, causal=False, offset=None, window=None, mask=None, bias=None, scale=None, softcap=None, sink=None, return_lse=False,
    block_q=192, block_k=512
):
    """The same, key block by key block: rule (4) with everything kept relative to the maximum so far [3, algorithm 1].

    When a block brings a larger maximum, what was summed before is rescaled by e^{old - new}, so the sums are always
    those of (2) and (3) over the keys seen, divided by e^{top}. Memory beyond the result is one tile per thread, whatever
    n and m. Blocks that the window or causality hides from all rows of a tile are never visited, others that a mask hides
    are dropped before their products; heads run on several threads. Same operations as `dense`, or half if causal.
    """
    positive_int("attention", "block_q", block_q)
    positive_int("attention", "block_k", block_k)
    q, k, v, sink, pairs = prepare(q, k, v, causal, offset, window, mask, bias, scale, softcap, sink)
    o, lse = _per_head(_tiled_head, (q, k, v, sink), pairs, block_q, block_k)
    return _finish(o, lse, return_lse)


def _tiled_head(q, k, v, sink, pairs, block_q, block_k):
    """One head: q (n, d), k (m, d), v (m, e), sink (1, 1)."""
    o, lse = [], []
    for rows in blocks(0, q.shape[-2], block_q) or [slice(0, 0)]:
        top = np.zeros_like(q[rows, :1]) + sink  # the sink is the first key: weight 1 and no value
        total = np.exp(sink - finite_or_zero(top))
        acc = np.zeros_like(q, shape=(rows.stop - rows.start, v.shape[-1]))
        for keys in seen_blocks(pairs, rows, k.shape[-2], block_k):
            s = scores(products(q[rows], k[keys], pairs), pairs, rows, keys)  # (block_q, block_k)
            larger = np.maximum(top, np.max(s, axis=-1, keepdims=True))
            shift = finite_or_zero(larger)
            s -= shift  # in place: what is made anew for each tile should stay in the cache
            w, keep = np.exp(s), np.exp(top - shift)
            total = keep * total + w.sum(axis=-1, keepdims=True)
            acc = keep * acc + masked_matmul(w, v[keys], s)
            top = larger
        lse.append(finite_or_zero(top) + np.log(total))
        o.append(acc / np.where(total == 0, np.ones_like(total), total))
    return np.concatenate(o), np.concatenate(lse)


@CONTRACT.form
@_as_data
def attention_split_kv(
    q, k, v, *, causal=False, offset=None, window=None, mask=None, bias=None, scale=None, softcap=None, sink=None, return_lse=False,
    splits=4
):
    """The same from independent ranges of keys, merged by rule (4): flash-decoding.

    For few queries and many keys, where the ranges are all the parallelism there is: ranges run on several threads. Same
    operations as `dense`, and its memory. The sink is one more part, with o = 0 and lse = sink.
    """
    positive_int("attention", "splits", splits)
    q, k, v, sink, pairs = prepare(q, k, v, causal, offset, window, mask, bias, scale, softcap, sink)
    n, m = q.shape[-2], k.shape[-2]

    def part(keys):
        s = scores(products(q, k[..., keys, :], pairs), pairs, slice(0, n), keys)  # (..., Hkv, G, n, m / splits)
        p, lse, _ = _softmax(s, np.full_like(sink, -np.inf))
        return masked_matmul(p, v[..., keys, :], s), lse[..., 0]

    parts = over_threads(part, blocks(0, m, max(1, -(-m // splits))) or [slice(0, 0)], q, k, v)
    outputs, logs = zip(*parts, strict=True)
    outputs, logs = (*outputs, np.zeros_like(outputs[0])), (*logs, np.zeros_like(logs[0]) + sink[..., 0])
    o, lse = merge_by_lse(outputs, logs)
    return _finish(o, lse[..., None], return_lse)


def merge_by_lse(outputs, logs):
    """Rule (4): attention to a union of disjoint sets of keys, from attention to each.

    Associative and commutative, so parts may be merged in any grouping: over key ranges (flash-decoding), over machines
    (ring attention), over hash rounds, or with a cached prefix.

    Parameters
    ----------
    outputs : sequence of ndarray, shape (..., n, e)
        o of each part.
    logs : sequence of ndarray, shape (..., n)
        lse of each part; -∞ where a row saw nothing, and then its output does not matter.

    Returns
    -------
    o : ndarray, shape (..., n, e)
    lse : ndarray, shape (..., n)

    Raises
    ------
    ValueError
        If there is no part, or shapes do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> o, lse = merge_by_lse([np.array([[1.0]]), np.array([[5.0]])], [np.log([1.0]), np.log([3.0])])
    >>> o, np.exp(lse)
    (array([[4.]]), array([4.]))
    """
    if len(outputs) == 0 or len(outputs) != len(logs):
        raise ValueError(f"merge_by_lse: outputs and logs must be as many, and at least one, got {len(outputs)} and {len(logs)}")
    for o, lse in zip(outputs, logs, strict=True):
        if np.shape(o)[:-1] != np.shape(lse):
            raise ValueError(f"merge_by_lse: logs must have shape (..., n), outputs (..., n, e), got {np.shape(lse)} and {np.shape(o)}")
    o, logs = np.stack(outputs), np.stack(logs)[..., None]  # (parts, ..., n, e), (parts, ..., n, 1)
    with np.errstate(all="ignore"):
        shift = finite_or_zero(np.max(logs, axis=0))
        w = np.exp(logs - shift)
        total = w.sum(axis=0)
        p = w / np.where(total == 0, np.ones_like(total), total)
        return np.where(w == 0, np.zeros_like(o), p * o).sum(axis=0), (shift + np.log(total))[..., 0]


@CONTRACT.gradient
@_as_data
def attention_vjp(
    dy, q, k, v, *, causal=False, offset=None, window=None, mask=None, bias=None, scale=None, softcap=None, sink=None, return_lse=False
):
    """Gradient of `attention`, from the map of weights.

    (2) gives ∂p_ij/∂s_ik = p_ij (1[j = k] - p_ik) and ∂lse_i/∂s_ij = p_ij, so with dp = do vᵀ

        ds_ij = p_ij (dp_ij - delta_i + dlse_i),   delta_i = Σ_j p_ij dp_ij = do_i·o_i,   dv = pᵀ do                (5)

    The sink is a key with dp = 0; the bias has ds; through the softcap ds is multiplied by 1 - tanh². Then
    dq = scale ds k and dk = scale dsᵀ q. A row with nothing allowed has p = 0, and so no gradient.

    Parameters
    ----------
    dy : ndarray, shape (..., Hq, n, e), or a tuple of it and dlse, shape (..., Hq, n)
        Cotangent of o, or of (o, lse); None is zero.

    Returns
    -------
    dict
        "q", "k", "v", and "bias", "sink" where given.
    """
    q, k, v, sink, pairs = prepare(q, k, v, causal, offset, window, mask, bias, scale, softcap, sink)
    do, dlse = cotangents(dy, q)
    raw = products(q, k, pairs)
    s = scores(raw, pairs)  # (..., Hkv, G, n, m)
    p, _, p_sink = _softmax(s, sink)
    delta = (do * masked_matmul(p, v, s)).sum(axis=-1, keepdims=True)  # (..., n, 1)
    ds, draw = _score_gradients(p, s, raw, do @ v.mT, dlse - delta, pairs)
    return {
        "q": join(pairs.scale * masked_matmul(draw, k, s)),
        "k": (pairs.scale * masked_matmul(draw.mT, q, s.mT)).sum(axis=-3),  # over the G heads that read it
        "v": masked_matmul(p.mT, do, s.mT).sum(axis=-3),
        "bias": join(ds),
        "sink": join(p_sink * (dlse - delta)).sum(axis=(-2, -1)),
    }


@CONTRACT.gradient
@_as_data
def attention_tiled_vjp(
    dy, q, k, v, *, causal=False, offset=None, window=None, mask=None, bias=None, scale=None, softcap=None, sink=None, return_lse=False,
    block_q=192, block_k=512
):
    """The same gradient without the map: weights are made again, tile by tile, as e^{s - lse} [3, algorithm 2].

    Five products per tile where `attention_vjp` keeps p: 5/2 of the forward's operations, memory for one tile per thread
    and the gradients. Takes and returns what `attention_vjp` does.
    """
    positive_int("attention", "block_q", block_q)
    positive_int("attention", "block_k", block_k)
    q, k, v, sink, pairs = prepare(q, k, v, causal, offset, window, mask, bias, scale, softcap, sink)
    do, dlse = cotangents(dy, q)
    dq, dk, dv, ds, dsink = _per_head(_tiled_head_vjp, (q, k, v, sink, do, dlse), pairs, block_q, block_k)
    return {"q": join(dq), "k": dk.sum(axis=-3), "v": dv.sum(axis=-3), "bias": join(ds), "sink": join(dsink)[..., 0, 0]}


def _tiled_head_vjp(q, k, v, sink, do, dlse, pairs, block_q, block_k):
    """One head: q (n, d), k (m, d), v, do (., e), dlse (n, 1)."""
    o, lse = _tiled_head(q, k, v, sink, pairs, block_q, block_k)
    across = dlse - (do * o).sum(axis=-1, keepdims=True)  # (n, 1)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    dbias = None if pairs.bias is None else np.zeros_like(q, shape=pairs.bias.shape)
    for rows in blocks(0, q.shape[-2], block_q):
        for keys in seen_blocks(pairs, rows, k.shape[-2], block_k):
            raw = products(q[rows], k[keys], pairs)
            s = scores(raw, pairs, rows, keys)  # (block_q, block_k)
            p = np.exp(s - finite_or_zero(lse[rows]))
            ds, draw = _score_gradients(p, s, raw, do[rows] @ v[keys].mT, across[rows], pairs)
            dq[rows] += pairs.scale * masked_matmul(draw, k[keys], s)
            dk[keys] += pairs.scale * masked_matmul(draw.mT, q[rows], s.mT)
            dv[keys] += masked_matmul(p.mT, do[rows], s.mT)
            if dbias is not None:
                there = tile(dbias, rows, keys)
                there += unbroadcast(ds, there.shape)
    return dq, dk, dv, dbias, (np.exp(sink - finite_or_zero(lse)) * across).sum(axis=-2, keepdims=True)


def _score_gradients(p, s, raw, dp, across, pairs):
    """(5), and the same before bias and softcap; a disallowed pair has none, whatever stands behind the mask."""
    hidden = np.isneginf(s)
    ds = np.where(hidden, np.zeros_like(s), p * (dp + across))
    if pairs.softcap is None:
        return ds, ds
    return ds, np.where(hidden, np.zeros_like(s), ds * tanh_derivative(raw / pairs.softcap))


@CONTRACT.form
@_as_data
def error_bound(
    q, k, v, *, unit, store=0.0, causal=False, offset=None, window=None, mask=None, bias=None, scale=None, softcap=None, sink=None,
    return_lse=False
):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit` (derived in `attention_bound`)."""
    q, k, v, sink, pairs = prepare(q, k, v, causal, offset, window, mask, bias, scale, softcap, sink)
    raw = products(q, k, pairs)
    s = scores(raw, pairs)  # (..., Hkv, G, n, m)
    p, lse, p_sink = _softmax(s, sink)
    E, E_lse = bound(q, k, v, raw, s, p, lse, sink, p_sink, pairs.scale, pairs.softcap, pairs.bias, unit=unit, store=store)
    return _finish(E, E_lse, return_lse)


# -- what the forms share --------------------------------------------------------------------------------------------


def _finish(o, lse, return_lse):
    return (join(o), join(lse)[..., 0]) if return_lse else join(o)


def _per_head(function, arrays, pairs, *sizes):
    """function of each head, on threads; its results stacked to (..., Hkv, G, rows, columns), None staying None."""
    heads = np.broadcast_shapes(*(x.shape[:-2] for x in (*arrays, pairs.bias, pairs.mask) if x is not None))
    *arrays, bias, mask = [None if x is None else np.broadcast_to(x, heads + x.shape[-2:]) for x in (*arrays, pairs.bias, pairs.mask)]

    def one(head):
        of_head = lambda x: None if x is None else x[head]
        return function(*map(of_head, arrays), pairs._replace(bias=of_head(bias), mask=of_head(mask)), *sizes)

    results = over_threads(one, np.ndindex(heads), *arrays)
    if not results:  # no heads or an empty batch: the shapes of one, zero times
        *nothing, no_bias = [None if x is None else np.zeros_like(x, shape=x.shape[-2:]) for x in (*arrays, bias)]
        shapes = function(*nothing, pairs._replace(bias=no_bias, mask=None), *sizes)
        return [None if x is None else np.zeros_like(x, shape=heads + x.shape) for x in shapes]
    return [None if parts[0] is None else np.stack(parts).reshape(heads + parts[0].shape) for parts in zip(*results, strict=True)]


OPS = (
    Op(
        name="attention",
        summary="o = softmax(scale q kᵀ) v, with grouped heads, masks, windows, bias, softcap and sinks",
        contract=CONTRACT,
        forms={
            "dense": Form(
                attention,
                lambda n, m, d, e, Hq, Hkv, batch=1: Cost(
                    batch * Hq * n * (m * (2 * d + 2 * e + 5) + d + 6), log2_ceil(d) + 3 * log2_ceil(m) + 9, batch * Hq * n * (3 * m + e)
                ),
                exact=("work", "depth"),
            ),
            "tiled": Form(
                attention_tiled,
                lambda n, m, d, e, Hq, Hkv, batch=1, block_q=192, block_k=512: Cost(
                    batch * Hq * n * (m * (2 * d + 2 * e + 4) + (m / block_k) * (2 * e + 5) + d + e),
                    2 * np.ceil(m / block_k) + log2_ceil(d) + 2 * log2_ceil(min(m, block_k)) + 6,
                    batch * Hq * n * (2 * e + 1) + min(n, block_q) * (3 * min(m, block_k) + 2 * e),
                ),
            ),
            "split_kv": Form(
                attention_split_kv,
                lambda n, m, d, e, Hq, Hkv, batch=1, splits=4: Cost(
                    batch * Hq * n * (m * (2 * d + 2 * e + 5) + splits * (3 * e + 19) + d),
                    log2_ceil(d) + 2 * log2_ceil(m / splits) + 3 * splits + 10,
                    batch * Hq * n * max(3 * m / splits + splits * (e + 1), 5 * splits * (e + 1)),
                ),
            ),
        },
        gradient=attention_vjp,
        sample=sample,
        options={
            "causal": (False, True),
            "offset": (None, 0, 2, -1),
            "window": (None, (2, 0), (1, 1), lambda m, **_: (None, m // 5 + 1), lambda m, **_: (m // 4 + 2, None)),  # also wider than a block
            "scale": (None, 0.4),
            "softcap": (None, 1.25),
            "return_lse": (False, True),
        },
        hard=HARD,
        error_bound=error_bound,
        references=(
            "vaswani2017, section 3.2.1",
            "dao2022, algorithm 1",
            "dao2024, algorithms 1-2",
            "liu2024, section 3",
            "ainslie2023, section 2.2",
            "xiao2024, section 3",
        ),
        lengths=("n", "m"),
        sizes=(
            *({"Hq": Hq, "Hkv": Hkv} for Hq, Hkv in ((6, 2), (1, 1), (8, 1), (3, 3))),
            *({"d": d, "e": e} for d, e in ((1, 1), (64, 64), (7, 16))),
        ),
        laws=attention_laws(CONTRACT),
    ),
)
