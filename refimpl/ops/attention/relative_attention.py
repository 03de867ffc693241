"""Relative attention (Transformer-XL): what a query says to a key depends on what it is and on how far away it is.

    s_ij = [(q_i + u)·k_j + (q_i + w)·r_{P - j}] / √d,    P = i + offset,    offset = m - n                        (1)
    o_i = Σ_j p_ij v_j,    p = softmax of s over the allowed j                                                  (2)

Four terms: content with content q·k, content with position q·r, and a bias for each, u·k and w·r, that no longer depend on
where the query is [1, section 3.3]. Positions enter as distances only, so a model may look back at hidden states of the
segment before, where absolute positions would repeat. That memory is nothing special here: it is prepended to the keys and
values (m > n), the last query standing at the last key, and no gradient is sent into it by whoever made it.

`r` holds one row per distance, already projected: row 0 for the key at the query's own position. With causal=False a key may
stand after its query. Given m rows, r is then symmetric, the row being |P - j| (at most m - 1); given n + m - 1 rows it is
not, the row being P - j, negative ones counted from the end, as Python counts.

The second term of (1) costs n·m·d for every query's own rows of r, or, noticing that they all are rows of one array, one
product of the queries with all rows and a picking of entries (`shifted`) [1, appendix B].

Glossary
    q, k, v    queries, keys (the content ones), values    q, W_{k,E} h̃, v [1, section 3.3]
    r          one projected row per distance              W_{k,R} R
    u_bias     u                                           u
    v_bias     w here, since v are the values              v

Where implementations differ
    transformers' Transformer-XL and XLNet keep r in falling order of distance and shift rows by reshaping; here it is
    indexed by the distance. XLNet, which looks both ways, has further rows for negative distances: the n + m - 1 here.
    Some codes scale by 1/√d after adding all four terms, as here; some fold it into q and forget the biases.

References
    [1] Z. Dai et al., "Transformer-XL: attentive language models beyond a fixed-length context", ACL 2019, section 3.3 and
        appendix B.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.numerics import masked_matmul, sqrt_of
from refimpl.laws import linear
from refimpl.op import Cost, Form, Law, Op
from refimpl.ops.attention.weighted_mean import growth, mean_error, weights, weights_vjp


def _check(arguments, sizes):
    for name in ("q", "k", "v", "r", "u_bias", "v_bias"):
        if name in arguments and np.iscomplexobj(arguments[name]):
            raise TypeError(f"relative_attention: {name} must be real, got dtype {arguments[name].dtype}")
    causal, n, m, R = arguments.get("causal"), sizes["n"], sizes["m"], sizes["R"]
    if causal is not None and not isinstance(causal, bool):
        raise TypeError(f"relative_attention: causal must be True or False, got {causal!r}")
    if m != R and (causal is True or n + m - 1 != R):
        other = "" if causal else f", or n + m - 1 = {n + m - 1} (distances of both signs)"
        raise ValueError(f"relative_attention: r must have a row per distance, m = {m}{other}; got {R} rows")


CONTRACT = Contract(
    "relative_attention",
    takes="q (..., H?, n, d); k (..., H?, m, d); v (..., H?, m, e); r (H?, R, d); u_bias (H?, d); v_bias (H?, d)",
    gives="o (..., H?, n, e)",
    rules=("d at least 1",),
    check=_check,
)
_as_data = np.errstate(all="ignore")  # infinities and NaN are data here, and masked ones must pass in silence


@CONTRACT.form
@_as_data
def relative_attention(q, k, v, r, u_bias, v_bias, *, causal=True):
    """Attention with relative positions, equations (1) and (2), each query looking up its own rows of r.

    Parameters
    ----------
    q : ndarray, shape (..., H, n, d)
        Queries. Without the axis of heads, in all arrays, it is one head.
    k : ndarray, shape (..., H, m, d)
        Keys, a memory of m - n of them first.
    v : ndarray, shape (..., H, m, e)
        Values.
    r : ndarray, shape (H, m, d)
        What stands for each distance, already projected; with causal=False also (H, n + m - 1, d).
    u_bias, v_bias : ndarray, shape (H, d)
        u and w of (1): what every query adds towards content, and towards position.
    causal : bool
        Query i sees the keys up to its own position i + m - n.

    Returns
    -------
    o : ndarray, shape (..., H, n, e)

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, an array is complex or not numeric, or r has other rows than described.

    Notes
    -----
    H n m (4 d + 2 e + 6) operations and H n m d elements. A row that sees no key (a query before the first, for n > m) is 0.

    Examples
    --------
    One feature, no content: the weights are those of the distances 0 and 1, e^0 and e^log 3.

    >>> import numpy as np
    >>> one, zero = np.ones((2, 1)), np.zeros((2, 1))
    >>> r, u, w = np.log([[1.0], [3.0]]), np.zeros(1), np.ones(1)
    >>> relative_attention(zero, zero, np.array([[4.0], [8.0]]), r, u, w)
    array([[4.],
           [5.]])
    """
    rows, allowed = _distances(q, k, r, causal)
    of_pairs = r[:, rows]  # (H, n, m, d)
    position = ((q + v_bias[:, None])[..., None, :] * of_pairs).sum(axis=-1)  # (..., H, n, m)
    s = np.where(allowed, ((q + u_bias[:, None]) @ k.mT + position) / sqrt_of(q.shape[-1], q), -np.inf)
    return masked_matmul(weights(s), v, s)


@CONTRACT.form
@_as_data
def relative_attention_shifted(q, k, v, r, u_bias, v_bias, *, causal=True):
    """The same from one product with all rows of r: entry [i, x] is query i at distance x, and pair (i, j) picks x = P - j.

    The rows that different queries look up are the same ones, each query's shifted by one against the query's before
    [1, appendix B]. H n (m + R) 2 d operations for the scores, and no array larger than them.
    """
    rows, allowed = _distances(q, k, r, causal)
    _, s = _scores(q, k, r, u_bias, v_bias, rows, allowed)
    return masked_matmul(weights(s), v, s)


def _scores(q, k, r, u_bias, v_bias, rows, allowed):
    """√d, and (1) as `shifted` computes it."""
    root = sqrt_of(q.shape[-1], q)
    by_distance = (q + v_bias[:, None]) @ r.mT  # (..., H, n, R)
    position = by_distance[..., np.arange(q.shape[-2])[:, None], rows]  # (..., H, n, m)
    return root, np.where(allowed, ((q + u_bias[:, None]) @ k.mT + position) / root, -np.inf)


def _distances(q, k, r, causal):
    """The row of r for every pair, and whether the pair is allowed: (n, m)."""
    n, m, R = q.shape[-2], k.shape[-2], r.shape[-2]
    distance = np.arange(n)[:, None] + (m - n) - np.arange(m)
    rows = np.minimum(abs(distance), m - 1) if m == R else distance % max(R, 1)
    return rows, distance >= 0 if causal else np.full((n, m), True)


@CONTRACT.gradient
@_as_data
def relative_attention_vjp(dy, q, k, v, r, u_bias, v_bias, *, causal=True):
    """Gradient of `relative_attention`: that of the softmax, then of the products of (1).

    With ds = p (dp - Σ p dp), dp = dy vᵀ, and dt_ix = Σ_{j at distance x} ds_ij, the shift undone:

        dq = (ds k + dt r) / √d,    dk = dsᵀ (q + u) / √d,    dr = dtᵀ (q + w) / √d,    dv = pᵀ dy

    du and dw are the sums over queries of the two terms of dq. The memory gets a gradient like any key and value: stopping
    it there, as Transformer-XL does in training, is leaving it away.

    Parameters
    ----------
    dy : ndarray, shape (..., H, n, e)
        Cotangent of o.

    Returns
    -------
    dict
        "q", "k", "v", "r", "u_bias", "v_bias".
    """
    rows, allowed = _distances(q, k, r, causal)
    root, s = _scores(q, k, r, u_bias, v_bias, rows, allowed)
    p = weights(s)
    ds = weights_vjp(p, dy @ v.mT, s) / root  # (..., H, n, m)
    dt = np.zeros_like(ds, shape=(*ds.shape[:-1], r.shape[-2]))  # (..., H, n, R)
    for j in range(k.shape[-2]):
        dt[..., np.arange(q.shape[-2]), rows[:, j]] += ds[..., j]
    to_content, to_position = masked_matmul(ds, k, s), dt @ r
    return {
        "q": to_content + to_position,
        "k": masked_matmul(ds.mT, q + u_bias[:, None], s.mT),
        "v": masked_matmul(p.mT, dy, s.mT),
        "r": dt.mT @ (q + v_bias[:, None]),
        "u_bias": to_content.sum(axis=-2),
        "v_bias": to_position.sum(axis=-2),
    }


@CONTRACT.form
@_as_data
def error_bound(q, k, v, r, u_bias, v_bias, *, unit, store=0.0, causal=True):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`.

    A score is two dot products of length d, whose factors have themselves been rounded: u (γ_d + 6) of the products of
    absolute values. What that does to the mean of values is in `weighted_mean`. `store` allows for q + u, q + w, k and r
    rounded to half precision, and each term of the score once.
    """
    rows, allowed = _distances(q, k, r, causal)
    _, s = _scores(q, k, r, u_bias, v_bias, rows, allowed)
    _, size = _scores(abs(q), abs(k), abs(r), abs(u_bias), abs(v_bias), rows, allowed)
    delta = np.where(allowed, (unit * (growth(q.shape[-1]) + 6) + 3 * store) * size, np.zeros_like(s))
    return mean_error(s, weights(s), v, delta, unit=unit, store=store)


# -- laws and the operator -------------------------------------------------------------------------------------------


def _causal(f, call, bound, rng):
    """Keys from `cut` on do not reach queries that stand before it."""
    n, m = call["q"].shape[-2], call["k"].shape[-2]
    if not call.get("causal", True):
        return
    base, limit = f(**call), bound(**call)
    for cut in sorted({1, m // 2, m - 1} & set(range(1, m))):
        past = slice(0, min(max(cut - (m - n), 0), n))
        if past.stop:
            late = (np.arange(m) >= cut)[:, None]
            other = f(**{**call, **{name: np.where(late, (call[name] * -4).astype(call[name].dtype), call[name]) for name in "kv"}})
            yield f"o of queries before key {cut}", other[..., past, :], base[..., past, :], 2 * limit[..., past, :]


def _memory(f, call, bound, rng):
    """The later queries alone, all keys given (the earlier ones as memory), are those of the whole."""
    n, m = call["q"].shape[-2], call["k"].shape[-2]
    if call["r"].shape[-2] != m:
        return
    base, limit = f(**call), bound(**call)
    for cut in sorted({1, n // 2, n - 1} & set(range(1, n))):
        other = f(**{**call, "q": call["q"][..., cut:, :]})
        yield f"o of queries {cut} to {n - 1}, what is before as memory", other, base[..., cut:, :], 2 * limit[..., cut:, :]


def _biases_are_queries(f, call, bound, rng):
    """A number added to all queries and taken from both biases (in quarters, so that formats of few bits agree) is nothing."""
    quarters = lambda x: (np.rint(np.clip(x.astype(np.result_type(x.dtype, np.float32)), -3, 3) * 4) / 4).astype(x.dtype)
    call = {**call, **{name: quarters(call[name]) for name in ("q", "u_bias", "v_bias")}}
    plus = lambda x, number: (x + number).astype(x.dtype)
    moved = {**call, "q": plus(call["q"], 0.5), **{name: plus(call[name], -0.5) for name in ("u_bias", "v_bias")}}
    yield "o with 1/2 moved from the biases to the queries", f(**moved), f(**call), bound(**call) + bound(**moved)


def _sample(rng, *, n=5, m=7, H=2, d=3, e=2, batch=()):
    return {
        "q": rng.standard_normal((*batch, H, n, d)),
        "k": rng.standard_normal((*batch, H, m, d)),
        "v": rng.standard_normal((*batch, H, m, e)) + rng.choice([-1.0, 1.0], e),
        "r": rng.standard_normal((H, m, d)),
        "u_bias": rng.standard_normal((H, d)),
        "v_bias": rng.standard_normal((H, d)),
    }


def _with(options=None, **changes):
    """A hard call: the sample, with some arrays replaced, and options."""

    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        return call | {name: change(rng, call) for name, change in changes.items()} | (options or {})

    return draw


def _both_signs(rng, call):
    H, m, d = call["r"].shape
    return rng.standard_normal((H, max(call["q"].shape[-2] + m - 1, 0), d))


_SCORES = lambda n, m, d, e, H, batch, per: batch * H * n * (m * (per * d + 2 * e + 6) + 2 * d - 1)
_DEPTH = lambda n, m, d: log2_ceil(d) + 3 * log2_ceil(m) + 9

OPS = (
    Op(
        name="relative_attention",
        summary="attention whose scores depend on content and on distance (Transformer-XL)",
        contract=CONTRACT,
        forms={
            "dense": Form(
                relative_attention,
                lambda n, m, d, e, H, R=0, batch=1: Cost(
                    _SCORES(n, m, d, e, H, batch, 4), _DEPTH(n, m, d), H * n * m * d + batch * H * n * m * (d + 3)
                ),
                exact=("work", "depth"),
            ),
            "shifted": Form(
                relative_attention_shifted,
                lambda n, m, d, e, H, R=0, batch=1: Cost(
                    _SCORES(n, m, d, e, H, batch, 2) + batch * H * n * (max(R, m) * 2 * d + m), _DEPTH(n, m, d), batch * H * n * (4 * m + e)
                ),
                exact=("work", "depth"),
            ),
        },
        gradient=relative_attention_vjp,
        sample=_sample,
        options={"causal": (True, False)},
        hard={
            "distances of both signs": _with({"causal": False}, r=_both_signs),
            "equal scores": _with(
                q=lambda rng, c: 0 * c["q"], u_bias=lambda rng, c: 0 * c["u_bias"], v_bias=lambda rng, c: 0 * c["v_bias"]
            ),
            "only positions": _with(k=lambda rng, c: 0 * c["k"], q=lambda rng, c: 0 * c["q"]),
            "only the farthest": _with(
                r=lambda rng, c: c["r"] * np.where(np.arange(c["r"].shape[-2]) == c["r"].shape[-2] - 1, 8, 0.1)[:, None]
            ),
            "large scores": _with(q=lambda rng, c: 30 * c["q"]),
            "far below zero": _with(r=lambda rng, c: 0 * c["r"] - 300.0, v_bias=lambda rng, c: abs(c["v_bias"]) + 1),
            "values that cancel": _with(v=lambda rng, c: c["v"] + 100.0 * np.resize([1.0, -1.0], c["v"].shape[-2])[:, None]),
            "values far from zero": _with(v=lambda rng, c: c["v"] + 50.0),
        },
        error_bound=error_bound,
        references=("dai2019, section 3.3", "dai2019, appendix B"),
        lengths=("n", "m"),
        sizes=({"H": 1}, {"H": 3, "d": 1, "e": 1}, {"d": 64, "e": 7}, {"H": 4, "batch": (2,)}),
        laws=(
            linear(CONTRACT, "v"),
            Law("causal", _causal, ("causal",)),
            Law("memory", _memory, ("q", "r")),
            Law("biases_are_queries", _biases_are_queries, ("u_bias", "v_bias")),
        ),
    ),
)
