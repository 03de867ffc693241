"""LSH attention (Reformer): each query meets the keys that hash to its bucket.

    k̂_j = k_j / |k_j|,    s_ij = scale q_i·k̂_j,    q = k = qk: one array for both                                 (1)
    bucket of x in round r:  argmax [x R_r, -x R_r],    R_r a d × n_buckets/2 matrix of standard normals            (2)

In round r positions are sorted by (bucket, position) and cut into chunks of `bucket_size`. Position i meets j if j is in i's
chunk or in the one before it, and in i's bucket; if j <= i, where causal; and itself only if it meets nothing else. Each
round is a softmax over the pairs that it allows; rounds are merged by their log-sum-exps, rule (4) of `attention`:

    o_i = Σ_r e^{lse_i^r - lse_i} o_i^r,    lse_i = log Σ_r e^{lse_i^r}                                             (3)

Near vectors share a bucket with high probability, and a softmax is mostly its largest terms; so few pairs, T·2·bucket_size
per round instead of T², may do. What (3) computes is exact for given R; how near it is to attention is another question.
With one bucket holding all it is dense attention under k̂ and the self rule.

Glossary
    qk        shared queries and keys     Q = K [1, section 2]
    rounds    independent hashes          n_rounds [1, section 2, "multi-round"]
    order     positions sorted by (bucket, position)

Where implementations differ
    The paper normalises k and scales scores by 1/√d; at least one public port leaves the scale out. A pair that meets in
    several rounds counts in each (the paper subtracts the log of how often it does [1, appendix A]; ports differ). The first
    chunk looks back at nothing; ports wrap round to the last chunk, whose buckets differ unless one bucket fills both.
    Ports refuse a T that is no multiple of the bucket size; here the last chunk is shorter.

References
    [1] N. Kitaev, Ł. Kaiser, A. Levskaya, "Reformer: the efficient transformer", ICLR 2020, section 2, equations 4-5.
    [2] A. Andoni et al., "Practical and optimal LSH for angular distance", NeurIPS 2015, section 4.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.numerics import constant, finite_or_zero, masked_matmul, sqrt_of
from refimpl.core.options import one_of, positive_int
from refimpl.op import Cost, Form, Law, Op
from refimpl.ops.attention.attention import merge_by_lse
from refimpl.ops.attention.weighted_mean import mean_error


def _check(arguments, sizes):
    for name in ("qk", "v"):
        if arguments[name].dtype.kind == "c":
            raise TypeError(f"lsh_attention: {name} must be real, got dtype {arguments[name].dtype}")
    for name in ("n_hashes", "n_buckets", "bucket_size"):
        positive_int("lsh_attention", name, arguments.get(name, 1))
    one_of("lsh_attention", "causal", arguments.get("causal", False), (False, True))
    scale = arguments.get("scale")
    if scale is not None and (isinstance(scale, bool | str) or not np.isscalar(scale) or not np.isfinite(scale)):
        raise ValueError(f"lsh_attention: scale must be a finite number or None (1/√d), got {scale!r}")
    rng = arguments.get("rng", 0)
    if not isinstance(rng, int | np.integer | np.random.Generator | np.random.BitGenerator | np.random.SeedSequence):
        raise TypeError(f"lsh_attention: rng must be a numpy.random.Generator or a seed of one, got {rng!r}")
    n_buckets = arguments.get("n_buckets", 1)
    if n_buckets % 2 and n_buckets != 1:
        raise ValueError(f"lsh_attention: n_buckets must be 1 or even, as hyperplanes make pairs of buckets, got {n_buckets}")


CONTRACT = Contract("lsh_attention", takes="qk (..., T, d); v (..., T, e)", gives="o (..., T, e)", rules=("d at least 1",), check=_check)
_as_data = np.errstate(all="ignore")


@CONTRACT.form
@_as_data
def lsh_attention(qk, v, *, n_hashes, n_buckets, bucket_size, causal=False, scale=None, rng):
    """LSH attention, equations (1)-(3), with the whole map of allowed pairs of each round.

    Parameters
    ----------
    qk : ndarray, shape (..., T, d)
        Queries, which are also the keys. Heads are batch axes.
    v : ndarray, shape (..., T, e)
        Values.
    n_hashes : int
        Rounds.
    n_buckets : int
        Buckets per round: even, or 1.
    bucket_size : int
        Length of a chunk.
    causal : bool
        Position i meets j <= i only.
    scale : float, optional
        1/√d by default.
    rng : numpy.random.Generator, or a seed of one
        Draws R as ``standard_normal((n_hashes, d, n_buckets // 2))``, the same for all batch entries.

    Returns
    -------
    o : ndarray, shape (..., T, e)

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, or an option is out of its range.

    Notes
    -----
    n_hashes T² (2 d + 2 e + 8) operations in this form. The hash is a discrete choice: a position whose two largest entries
    of (2) are nearer than their rounding may hash otherwise in another arithmetic; the error bound speaks of equal hashes.
    A vector 0 has no direction: k̂ = 0, and its bucket is the first.

    References
    ----------
    [1, section 2, equations 4-5].

    Examples
    --------
    With one bucket for all it is attention with normalised keys, in which a position does not see itself.

    >>> import numpy as np
    >>> from refimpl import attention
    >>> qk, v = np.random.default_rng(0).standard_normal((2, 6, 4))
    >>> k = qk / np.linalg.norm(qk, axis=-1, keepdims=True)
    >>> o = lsh_attention(qk, v, n_hashes=1, n_buckets=1, bucket_size=6, rng=0)
    >>> bool(np.allclose(o, attention(qk, k, v, mask=~np.eye(6, dtype=bool))))
    True
    """
    s = _scores(qk, scale)  # (..., T, T)
    outputs, logs = [], []
    for allowed in _rounds(qk, n_hashes, n_buckets, bucket_size, causal, rng):  # (..., T, T)
        hidden = np.where(allowed, s, -np.inf)
        p, lse = _softmax(hidden)
        o = masked_matmul(p, v, hidden)
        outputs.append(o)
        logs.append(np.broadcast_to(lse, o.shape[:-1]))
    return merge_by_lse(outputs, logs)[0]


@CONTRACT.form
@_as_data
def lsh_attention_chunked(qk, v, *, n_hashes, n_buckets, bucket_size, causal=False, scale=None, rng):
    """The same, chunk by chunk in sorted order: no pair outside a chunk and the one before it is ever formed.

    Equal because the others are not allowed. n_hashes T 2 bucket_size (2 d + 2 e + 8) operations, 2 n_hashes T log2 T of
    them to sort, and memory for one round's chunks: all but linear in T.
    """
    T = qk.shape[-2]
    batch = np.broadcast_shapes(qk.shape[:-2], v.shape[:-2])
    qk, v = (np.broadcast_to(x, (*batch, *x.shape[-2:])) for x in (qk, v))
    k = _normalised(qk)
    factor = 1 / sqrt_of(qk.shape[-1], qk) if scale is None else constant(scale, qk)
    outputs, logs = [], []
    for bucket in _buckets(qk, n_hashes, n_buckets, rng):
        order = np.argsort(bucket, axis=-1, kind="stable")  # (..., T)
        back = np.argsort(order, axis=-1)
        q_, k_, v_ = (np.take_along_axis(x, order[..., None], axis=-2) for x in (qk, k, v))
        b_ = np.take_along_axis(bucket, order, axis=-1)
        o, lse = [], []
        for start in range(0, T, bucket_size):
            rows, keys = slice(start, start + bucket_size), slice(max(0, start - bucket_size), start + bucket_size)
            allowed = _meet(b_[..., rows], b_[..., keys], order[..., rows], order[..., keys], causal)
            s = np.where(allowed, factor * (q_[..., rows, :] @ k_[..., keys, :].mT), -np.inf)  # (..., bucket_size, 2 bucket_size)
            p, log = _softmax(s)
            o.append(masked_matmul(p, v_[..., keys, :], s))
            lse.append(np.broadcast_to(log, o[-1].shape[:-1]))
        o = np.concatenate(o, axis=-2) if o else v_
        lse = np.concatenate(lse, axis=-1) if lse else v_[..., 0]
        outputs.append(np.take_along_axis(o, back[..., None], axis=-2))
        logs.append(np.take_along_axis(lse, back, axis=-1))
    return merge_by_lse(outputs, logs)[0]


@CONTRACT.gradient
@_as_data
def lsh_attention_vjp(dy, qk, v, *, n_hashes, n_buckets, bucket_size, causal=False, scale=None, rng):
    """Gradient of `lsh_attention`, the hashes held fast.

    (3) makes one softmax of all rounds: the weight of a pair in round r is p^r_ij = e^{s_ij - lse_i}, so the pair's weight in
    all is P_ij = c_ij e^{s_ij - lse_i}, c_ij the number of rounds in which it meets, and

        dv = Pᵀ do,    ds_ij = P_ij (do_i·v_j - do_i·o_i),    dq = scale ds k̂,    dk̂ = scale dsᵀ q                    (4)

    Through the normalisation, dk = (dk̂ - k̂ (k̂·dk̂)) / |k|; and qk receives dq + dk.

    Parameters
    ----------
    dy : ndarray, shape (..., T, e)
        Cotangent of o.

    Returns
    -------
    dict
        "qk", "v".
    """
    k = _normalised(qk)
    factor = 1 / sqrt_of(qk.shape[-1], qk) if scale is None else constant(scale, qk)
    s = _scores(qk, scale)
    count = sum(allowed.astype(int) for allowed in _rounds(qk, n_hashes, n_buckets, bucket_size, causal, rng))
    hidden = np.where(count > 0, s, -np.inf)
    top = finite_or_zero(np.max(hidden, axis=-1, keepdims=True, initial=-np.inf))
    weight = count * np.exp(hidden - top)
    P = weight / np.where(weight.sum(axis=-1, keepdims=True) == 0, np.ones_like(top), weight.sum(axis=-1, keepdims=True))
    dp = dy @ v.mT
    ds = P * (dp - (P * dp).sum(axis=-1, keepdims=True))
    dk = factor * (ds.mT @ qk)
    norm = _norm(qk)
    through = (dk - k * (k * dk).sum(axis=-1, keepdims=True)) / np.where(norm == 0, np.ones_like(norm), norm)
    return {"qk": factor * (ds @ k) + np.where(norm == 0, np.zeros_like(through), through), "v": P.mT @ dy}


def error_bound(qk, v, *, unit, store=0.0, n_hashes, n_buckets, bucket_size, causal=False, scale=None, rng):
    """|computed - exact|, elementwise, for equal hashes: `weighted_mean`'s bound for the one softmax that (3) makes.

    Scores err by u (d + 8) Σ_c |q_c k̂_c|: the product, the norm, the scale.
    """
    with np.errstate(all="ignore"):
        factor = abs(1 / np.sqrt(qk.shape[-1]) if scale is None else scale)
        s = _scores(qk, scale)
        count = sum(a.astype(int) for a in _rounds(qk, n_hashes, n_buckets, bucket_size, causal, rng))
        s = np.where(count > 0, s + np.log(np.maximum(count, 1)), -np.inf)
        top = finite_or_zero(np.max(s, axis=-1, keepdims=True, initial=-np.inf))
        weight = np.exp(s - top)
        p = weight / np.where(weight.sum(axis=-1, keepdims=True) == 0, 1, weight.sum(axis=-1, keepdims=True))
        delta = ((qk.shape[-1] + 8) * unit + 4 * store) * factor * (abs(qk) @ abs(_normalised(qk)).mT)
        return mean_error(s, p, v, delta, unit=unit * (2 + n_hashes), store=2 * store)


# -- hashing ---------------------------------------------------------------------------------------------------------


def _norm(x):
    """|x|, scaled so that squares neither overflow nor vanish."""
    largest = np.max(abs(x), axis=-1, keepdims=True)
    safe = np.where(largest == 0, np.ones_like(largest), largest)
    return largest * np.sqrt(((x / safe) ** 2).sum(axis=-1, keepdims=True))


def _normalised(x):
    norm = _norm(x)
    return x / np.where(norm == 0, np.ones_like(norm), norm)


def _scores(qk, scale):
    factor = 1 / sqrt_of(qk.shape[-1], qk) if scale is None else constant(scale, qk)
    return factor * (qk @ _normalised(qk).mT)  # (..., T, T)


def _buckets(qk, n_hashes, n_buckets, rng):
    """(2): one array of buckets (..., T) per round."""
    R = np.random.default_rng(rng).standard_normal((n_hashes, qk.shape[-1], n_buckets // 2))
    for r in range(n_hashes):
        if n_buckets == 1:
            yield np.zeros(qk.shape[:-1], dtype=int)
        else:
            x = qk @ R[r]  # float64 or wider: the hash should not depend on the precision of qk
            yield np.argmax(np.concatenate([x, -x], axis=-1), axis=-1)


def _rounds(qk, n_hashes, n_buckets, bucket_size, causal, rng):
    """The allowed pairs (..., T, T) of every round."""
    T = qk.shape[-2]
    place = np.broadcast_to(np.arange(T), qk.shape[:-1])
    for bucket in _buckets(qk, n_hashes, n_buckets, rng):
        rank = np.argsort(np.argsort(bucket, axis=-1, kind="stable"), axis=-1)  # where each position stands in sorted order
        chunk = rank // bucket_size
        behind = chunk[..., :, None] - chunk[..., None, :]
        yield _meet(bucket, bucket, place, place, causal, (behind == 0) | (behind == 1))


def _meet(bucket_q, bucket_k, place_q, place_k, causal, near=True):
    """Which pairs are allowed: near, of one bucket, in causal order; the self only where there is nothing else."""
    allowed = (bucket_q[..., :, None] == bucket_k[..., None, :]) & near
    if causal:
        allowed = allowed & (place_k[..., None, :] <= place_q[..., :, None])
    self_ = place_q[..., :, None] == place_k[..., None, :]
    others = allowed & ~self_
    return others | (self_ & ~others.any(axis=-1, keepdims=True))


def _softmax(s):
    """Weights and log-sum-exp; every row allows something."""
    top = finite_or_zero(np.max(s, axis=-1, keepdims=True, initial=-np.inf))
    e = np.exp(s - top)
    total = e.sum(axis=-1, keepdims=True)
    return e / np.where(total == 0, np.ones_like(total), total), (top + np.log(total))[..., 0]


# -- the record ------------------------------------------------------------------------------------------------------


def _values_are_linear(f, call, bound, rng):
    """Linear in v, the hashes being those of qk."""
    limit = bound(**call)
    yield "o of twice the values", f(**{**call, "v": 2 * call["v"]}), 2 * f(**call), 4 * limit


def _sample(rng, *, T=11, d=4, e=3, batch=()):
    return {"qk": rng.standard_normal((*batch, T, d)) * rng.uniform(0.5, 3, (*batch, T, 1)), "v": rng.standard_normal((*batch, T, e)) + 0.5}


def _with(options, **changes):
    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        basic = {"n_hashes": 2, "n_buckets": 4, "bucket_size": 4, "rng": 3}
        return call | {name: change(rng, call[name]) for name, change in changes.items()} | basic | options

    return draw


def _cost(T, d, e, batch=1, pairs=None, n_hashes=2):
    pairs = T if pairs is None else min(T, pairs)
    return Cost(
        batch * n_hashes * T * (pairs * (2 * d + 2 * e + 8) + 2 * log2_ceil(T) + 6 * d),
        log2_ceil(T) + log2_ceil(d) + 3 * log2_ceil(pairs) + 16,
        batch * T * (pairs * 5 + n_hashes * (6 * e + 2) + 4 * d),
    )


OPS = (
    Op(
        name="lsh_attention",
        summary="attention among positions that hash to one bucket (Reformer)",
        contract=CONTRACT,
        forms={
            "masked": Form(lsh_attention, _cost, on_balls=False),
            "chunked": Form(
                lsh_attention_chunked, lambda T, d, e, batch=1, bucket_size=4: _cost(T, d, e, batch, 2 * bucket_size), on_balls=False
            ),
        },
        gradient=lsh_attention_vjp,
        sample=_sample,
        options={
            "n_hashes": (2, 1, 3),
            "n_buckets": (4, 2, 1, 8),
            "bucket_size": (4, 1, 7, 64),
            "causal": (False, True),
            "scale": (None, 0.7),
            "rng": (3, 11),
        },
        hard={
            "one bucket": _with({"n_buckets": 1, "bucket_size": 200}),
            "chunks of one": _with({"bucket_size": 1}),
            "positions alone": _with({"n_buckets": 64, "causal": True}),
            "long and short vectors": _with({}, qk=lambda rng, x: x * 2.0 ** rng.integers(-6, 7, (*x.shape[:-1], 1))),
            "equal vectors": _with({}, qk=lambda rng, x: x[..., :1, :] + 0 * x),
            "large scores": _with({"scale": 8.0}),
            "values that cancel": _with({}, v=lambda rng, v: v + 100.0 * (-1.0) ** np.arange(v.shape[-2])[:, None]),
        },
        error_bound=error_bound,
        references=("kitaev2020, section 2, equations 4-5", "andoni2015, section 4"),
        sizes=({"d": 1, "e": 1}, {"d": 16, "e": 16}, {"batch": (2,)}, {"batch": (2, 3)}),
        laws=(Law("linear_in_values", _values_are_linear, ("v",)),),
    ),
)
