"""Linformer: attention to r mixtures of the keys, in place of m keys.

    k̃ = E k,    ṽ = F v,    E, F of r rows and a column per position                                            (1)
    o_i = Σ_{a=1..r} p_ia ṽ_a,    p = softmax(scale q k̃ᵀ)                                                      (2)

The map of weights of a trained attention is nearly of low rank, so its m columns can be mixed into r < m of them before the
softmax, by learned matrices over the positions: n·r pairs in place of n·m, with r fixed as sequences grow. What a query
attends to is a mixture of positions, not a position; so there is nothing that a causal mask could hide, and the length m is
built into E and F. With E = F = I it is attention.

Glossary
    E, F       projections over positions, shared by heads     E_i, F_i [1, eq. 7]
    r          rows of the projections                         k [1, section 4]
    k̃, ṽ       projected keys and values: `keys`, `values`     E_i K W_i^K, F_i V W_i^V
    p          weights over mixtures, (n, r)                   P̄ [1, eq. 7]

Where implementations differ
    E and F are shared by all heads here, and may be the same array ("key-value sharing"). Per-head projections are so many
    calls. Some ports pad short sequences with zeros up to the length of E, which is taking E's first columns.

References
    [1] S. Wang, B. Z. Li, M. Khabsa, H. Fang, H. Ma, "Linformer: self-attention with linear complexity", 2020
        (arXiv:2006.04768), section 4, equation 7.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.numerics import constant, sqrt_of
from refimpl.core.options import positive_int
from refimpl.laws import linear
from refimpl.op import Cost, Form, Law, Op
from refimpl.ops.attention.weighted_mean import growth, mean_error, weights, weights_vjp


def _check(arguments, sizes):
    for name in ("q", "k", "v", "E", "F"):
        if name in arguments and np.iscomplexobj(arguments[name]):
            raise TypeError(f"linformer_attention: {name} must be real, got dtype {arguments[name].dtype}")
    scale = arguments.get("scale")
    try:
        good = scale is None or (np.ndim(scale) == 0 and not isinstance(scale, bool | str) and bool(np.isfinite(scale)))
    except TypeError:
        good = False
    if not good:
        raise ValueError(f"linformer_attention: scale must be a finite number or None (1/√d), got {scale!r}")


CONTRACT = Contract(
    "linformer_attention",
    takes="q (..., H?, n, d); k (..., H?, m, d); v (..., H?, m, e); E (r, m); F (r, m)",
    gives="o (..., H?, n, e)",
    rules=("d at least 1",),
    check=_check,
)
_as_data = np.errstate(all="ignore")  # infinities and NaN are data here


@CONTRACT.form
@_as_data
def linformer_attention(q, k, v, E, F, *, scale=None):
    """Attention to projected keys and values, equations (1) and (2).

    Parameters
    ----------
    q : ndarray, shape (..., H, n, d)
        Queries. Without the axis of heads, in q, k and v, it is one head.
    k : ndarray, shape (..., H, m, d)
        Keys.
    v : ndarray, shape (..., H, m, e)
        Values.
    E, F : ndarray, shape (r, m)
        Projections of keys and of values over the positions, the same for all heads.
    scale : float, optional
        Of the scores; 1/√d by default.

    Returns
    -------
    o : ndarray, shape (..., H, n, e)

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, an array is complex or not numeric, or scale is not a finite number.

    Notes
    -----
    2 H r (m + n) (d + e) operations and H r (n + d + e) elements: linear in both lengths.

    Examples
    --------
    Two halves of four positions, each one mixture; the query prefers neither.

    >>> import numpy as np
    >>> E = np.array([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    >>> v = np.array([[1.0], [2.0], [3.0], [4.0]])
    >>> linformer_attention(np.zeros((1, 1)), np.ones((4, 1)), v, E, E / 2)  # the mean of the means 1.5 and 3.5
    array([[2.5]])
    """
    keys, values = E @ k, F @ v  # (..., H, r, d), (..., H, r, e)
    s = _scale(q, scale) * (q @ keys.mT)  # (..., H, n, r)
    return weights(s) @ values


@CONTRACT.form
@_as_data
def linformer_attention_streamed(q, k, v, E, F, *, scale=None, block=256):
    """The same with (1) summed over blocks of positions, as they come: a sequence too long to hold has r rows to keep.

    Same operations; beside the result, H r (d + e) elements and a block.
    """
    positive_int("linformer_attention", "block", block)
    m = k.shape[-2]
    keys, values = E[:, :0] @ k[..., :0, :], F[:, :0] @ v[..., :0, :]
    for start in range(0, m, block):
        at = slice(start, min(start + block, m))
        keys, values = keys + E[:, at] @ k[..., at, :], values + F[:, at] @ v[..., at, :]
    return weights(_scale(q, scale) * (q @ keys.mT)) @ values


@CONTRACT.form
@_as_data
def linformer_attention_map(q, k, v, E, F, *, scale=None):
    """The same with the products taken the other way: scores of all pairs, mixed by Eᵀ; weights spread over positions by F.

    o = [softmax(scale (q kᵀ) Eᵀ) F] v. The matrix in brackets, n × m and of rank r at most, is what stands in for the map of
    attention [1, theorem 2]. Its rows need not sum to 1. Costs what attention does, and more: for looking at, not for speed.
    """
    s = _scale(q, scale) * ((q @ k.mT) @ E.T)
    return (weights(s) @ F) @ v


@CONTRACT.gradient
@_as_data
def linformer_attention_vjp(dy, q, k, v, E, F, *, scale=None):
    """Gradient of `linformer_attention`: attention's, then that of the projections.

        dṽ = pᵀ dy,    dk̃ = scale dsᵀ q,    dk = Eᵀ dk̃,    dE = Σ dk̃ kᵀ,    dv = Fᵀ dṽ,    dF = Σ dṽ vᵀ

    with ds = p (dp - Σ p dp), dp = dy ṽᵀ, the sums over heads and batch.

    Parameters
    ----------
    dy : ndarray, shape (..., H, n, e)
        Cotangent of o.

    Returns
    -------
    dict
        "q", "k", "v", "E", "F".
    """
    scale = _scale(q, scale)
    keys, values = E @ k, F @ v
    s = scale * (q @ keys.mT)
    p = weights(s)
    ds = scale * weights_vjp(p, dy @ values.mT, s)  # (..., H, n, r)
    dkeys, dvalues = ds.mT @ q, p.mT @ dy  # (..., H, r, d), (..., H, r, e)
    return {"q": ds @ keys, "k": E.T @ dkeys, "v": F.T @ dvalues, "E": dkeys @ k.mT, "F": dvalues @ v.mT}


@CONTRACT.form
@_as_data
def error_bound(q, k, v, E, F, *, unit, store=0.0, scale=None):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`.

    Scores and values are sums over positions, in error by u γ_m of the sums of absolute values, in whichever order their
    products are taken: for the scores u (γ_m + γ_d + 6) |scale| |q| (|E| |k|)ᵀ, for the values u (γ_m + γ_r + 6) |F| |v|. The
    first goes through the softmax (`weighted_mean`), the second through the mean. `store` allows for q, k̃, ṽ and the scores
    rounded to half precision.
    """
    scale = _scale(q, scale)
    keys, values = E @ k, F @ v
    s = scale * (q @ keys.mT)
    p, (r, m), d = weights(s), E.shape, q.shape[-1]
    delta = unit * (growth(m) + growth(d) + 6) * abs(scale) * (abs(q) @ (abs(E) @ abs(k)).mT)
    delta = delta + store * (3 * abs(scale) * (abs(q) @ abs(keys).mT) + abs(s))
    off = unit * (growth(m) + growth(r) + 6) * (abs(F) @ abs(v)) + store * abs(values)
    of_mean = lambda v: mean_error(s, p, v, delta, unit=unit, store=store)
    return of_mean(values) + p @ off + of_mean(off)


def _scale(q, scale):
    return 1 / sqrt_of(q.shape[-1], q) if scale is None else constant(scale, q)


# -- laws and the operator -------------------------------------------------------------------------------------------


def _order_of_positions(f, call, bound, rng):
    """Positions are known by their columns of E and F alone."""
    order = rng.permutation(call["k"].shape[-2])
    moved = {**call, **{x: call[x][..., order, :] for x in "kv"}, **{x: call[x][:, order] for x in "EF"}}
    yield "o with positions in another order", f(**moved), f(**call), 2 * bound(**call)


def _order_of_mixtures(f, call, bound, rng):
    """Mixtures are a set."""
    order = rng.permutation(call["E"].shape[0])
    moved = {**call, **{x: call[x][order] for x in "EF"}}
    yield "o with the rows of E and F in another order", f(**moved), f(**call), 2 * bound(**call)


def _unseen_position(f, call, bound, rng):
    """A position whose columns of E and F are zero does not matter."""
    m = call["k"].shape[-2]
    if m == 0:
        return
    hidden = np.arange(m) == rng.integers(m)
    call = {**call, **{x: np.where(hidden, np.zeros_like(call[x]), call[x]) for x in "EF"}}
    other = {**call, **{x: np.where(hidden[:, None], (call[x] * 64).astype(call[x].dtype), call[x]) for x in "kv"}}
    yield "o with larger numbers at a position that E and F leave out", f(**other), f(**call), bound(**call) + bound(**other)


def _sample(rng, *, n=5, m=7, r=4, H=2, d=3, e=2, batch=()):
    return {
        "q": rng.standard_normal((*batch, H, n, d)),
        "k": rng.standard_normal((*batch, H, m, d)),
        "v": rng.standard_normal((*batch, H, m, e)) + rng.choice([-1.0, 1.0], e),
        "E": rng.standard_normal((r, m)) * 1.5 / np.sqrt(max(m, 1)),
        "F": rng.standard_normal((r, m)) * 1.5 / np.sqrt(max(m, 1)),
    }


def _with(options=None, **changes):
    """A hard call: the sample, with some arrays replaced, and options."""

    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        return call | {name: change(call[name]) for name, change in changes.items()} | (options or {})

    return draw


_WORK = lambda n, m, r, d, e: 2 * r * (m + n) * (d + e) + 6 * n * r - n
_DEPTH = lambda m, r, d: log2_ceil(m) + log2_ceil(d) + 3 * log2_ceil(r) + 8

OPS = (
    Op(
        name="linformer_attention",
        summary="attention to r learned mixtures of the positions",
        contract=CONTRACT,
        forms={
            "dense": Form(
                linformer_attention,
                lambda n, m, d, e, r, H, batch=1: Cost(
                    batch * H * _WORK(n, m, r, d, e), _DEPTH(m, r, d), batch * H * (r * (3 * n + d + e) + n * e)
                ),
                exact=("work", "depth"),
            ),
            "streamed": Form(
                linformer_attention_streamed,
                lambda n, m, d, e, r, H, batch=1, block=256: Cost(
                    batch * H * (_WORK(n, m, r, d, e) + np.ceil(m / block) * r * (d + e)),
                    np.ceil(m / block) + _DEPTH(min(m, block), r, d),
                    batch * H * (r * (2 * n + 2 * d + 2 * e) + n * e),
                ),
                exact=("work", "depth"),
            ),
            "map": Form(
                linformer_attention_map,
                lambda n, m, d, e, r, H, batch=1: Cost(
                    batch * H * n * (m * (2 * d + 2 * e + 4 * r) + 6 * r - 1),
                    _DEPTH(m, r, d) + log2_ceil(m) + 1,
                    batch * H * n * (m + 2 * r + e),
                ),
                exact=("work", "depth"),
            ),
        },
        gradient=linformer_attention_vjp,
        sample=_sample,
        options={"scale": (None, 0.4)},
        hard={
            "equal mixtures": _with(E=lambda E: E[:1] + 0 * E),
            "rows that pick": _with(E=lambda E: np.eye(*E.shape), F=lambda F: np.eye(*F.shape)),
            "keys that cancel": _with(
                k=lambda k: k[..., :1, :] + 0 * k, E=lambda E: E - E.mean(axis=1, keepdims=True) if E.shape[1] else E
            ),
            "large scores": _with(q=lambda q: 40 * q),
            "far above zero": _with(q=lambda q: abs(q) + 20, k=lambda k: abs(k) + 2, E=lambda E: 4 * (abs(E) + 1) / E.shape[-1]),
            "a mixture that stands out": _with(E=lambda E: E * np.where(np.arange(len(E)) == len(E) // 2, 12.0, 1.0)[:, None]),
            "values that cancel": _with(v=lambda v: v + 100.0 * np.resize([1.0, -1.0], v.shape[-2])[:, None]),
        },
        error_bound=error_bound,
        references=("wang2020, equation 7", "wang2020, theorem 2"),
        lengths=("n", "m"),
        sizes=({"r": 1}, {"r": 16, "d": 16, "e": 5}, {"H": 1, "d": 1, "e": 1}, {"H": 3, "batch": (2,)}),
        laws=(
            linear(CONTRACT, "v"),
            Law("linear_in_F", linear(CONTRACT, "F").holds, ("F",)),
            Law("order_of_positions", _order_of_positions, ("k", "v", "E", "F")),
            Law("order_of_mixtures", _order_of_mixtures, ("E", "F")),
            Law("unseen_position", _unseen_position, ("E", "F")),
        ),
    ),
)
