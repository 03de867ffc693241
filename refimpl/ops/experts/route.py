"""Routing: which k of E experts see a token, and with what weight.

    S = the k experts of the largest logits l_e, the lower index first among equals                              (1)
    w_e = e^{l_e} / Σ_{j in S} e^{l_j}                          order "topk_softmax"                              (2)
    w_e = p_e,  p = softmax(l) over all E experts               order "softmax_topk"                              (3)
    w_e = σ(l_e)                                                order "sigmoid"                                   (4)
    w_e <- w_e / Σ_{j in S} w_j                                 if `renormalize`

softmax and σ keep the order of the logits, so all three choose the same experts and differ in the weights alone. The
choice is a step function, whose gradient is zero wherever it has one: what trains a router is the weights of those that
it chose. Renormalised, (3) is (2): the sum over all cancels.

Glossary
    logits     l = x·W_g, one per token and expert       h(x) [1, eq. 1], H(x) [2, eq. 4]
    k          experts per token                         k [2, section 2.1]
    weights    w of the chosen, by falling weight        G(x) [2, eq. 3], G(x)_i E_i(x)
    experts    their indices                             T = TopK(p) [1, eq. 2]
    noise      standard deviation of what is added to the logits before the choice: here one number, learned per
               expert in [2, eq. 4]

Where implementations differ
    Mixtral's code takes the softmax over the chosen, (2); Switch, GShard, DeepSeek-V2 and Qwen over all, (3), some of
    them renormalised; DeepSeek-V3 takes (4), renormalised (with 1e-20 in the denominator). Frameworks' top-k leave the
    order of equals open; here the lower index comes first, as in JAX.

References
    [1] W. Fedus, B. Zoph, N. Shazeer, "Switch transformers", JMLR 23, 2022, section 2.1.
    [2] N. Shazeer et al., "Outrageously large neural networks", ICLR 2017, section 2.1.
    [3] A. Q. Jiang et al., "Mixtral of experts", arXiv:2401.04088, section 2.1.
    [4] DeepSeek-AI, "DeepSeek-V3 technical report", arXiv:2412.19437, equations 12-15.
"""

import numbers

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.numerics import log_sigmoid, sigmoid, softmax
from refimpl.op import Cost, Form, Law, Op
from refimpl.ops.experts.choice import ORDERS, check_choice, decided_logits, spread


def _check(arguments, sizes):
    """Options that are not there, because only shapes or precision are asked about, are not looked at."""
    if "k" in arguments:
        check_choice("route", arguments["k"], sizes["E"], arguments.get("order", ORDERS[0]))
        sizes["k"] = int(arguments["k"])
    noise = arguments.get("noise")
    if noise is None:
        return
    if isinstance(noise, bool) or not isinstance(noise, numbers.Real) or not 0 <= noise < np.inf:
        raise ValueError(f"route: noise must be a standard deviation of at least 0, got {noise!r}")
    if arguments.get("rng") is None:
        raise ValueError("route: noise needs rng, a numpy.random.Generator or a seed, got None")


CONTRACT = Contract("route", takes="logits (..., T, E)", gives="weights (..., T, k); experts:int (..., T, k)", check=_check)


@CONTRACT.form
def route(logits, k, *, order="topk_softmax", renormalize=False, noise=None, rng=None):
    """The k experts of every token and their weights, equations (1) to (4), by sorting.

    Parameters
    ----------
    logits : ndarray, shape (..., T, E)
        What the router says of every token and expert. -∞ closes an expert to a token.
    k : int
        Experts per token, 1 to E.
    order : {"topk_softmax", "softmax_topk", "sigmoid"}
        Softmax over the chosen (Mixtral), over all (Switch), or a sigmoid of each (DeepSeek-V3).
    renormalize : bool
        Divide the weights of a token by their sum. It changes nothing with "topk_softmax".
    noise : float, optional
        Standard deviation of normal noise on the logits, for exploring; it takes part in choice and weights.
    rng : numpy.random.Generator or int, optional
        Where the noise comes from; needed with `noise`.

    Returns
    -------
    weights : ndarray, shape (..., T, k)
        By falling weight.
    experts : ndarray of int, shape (..., T, k)

    Raises
    ------
    ValueError, TypeError
        If k is not between 1 and E, an option is none of its values, or there is noise without rng.

    Notes
    -----
    E log2 E comparisons and some 5 k operations per token. Renormalised weights are softmaxes of log-weights, so that
    they are right even where all weights underflow. Two logits that are nearer than their own rounding are chosen
    between by that rounding: every implementation of a router has this edge.

    References
    ----------
    [1]_, section 2.1, and [2]_, section 2.1, of the chapter.

    Examples
    --------
    >>> import numpy as np
    >>> weights, experts = route(np.log([[1.0, 3.0, 2.0, 2.0]]), 2)
    >>> experts, weights.round(3)
    (array([[1, 2]]), array([[0.6, 0.4]]))
    >>> route(np.log([[1.0, 3.0, 2.0, 2.0]]), 2, order="softmax_topk")[0].round(3)
    array([[0.375, 0.25 ]])
    """
    logits = _noisy(logits, noise, rng)
    experts = np.argsort(-logits, axis=-1, kind="stable")[..., :k]  # (..., T, k)
    return _weights(logits, experts, order, renormalize), experts


@CONTRACT.form
def route_ranks(logits, k, *, order="topk_softmax", renormalize=False, noise=None, rng=None):
    """The same without sorting: an expert's rank is the number of experts that come before it.

    Those are the ones of larger logits, and the equal ones of lower index; ranks are thus a permutation, and its inverse
    is the sorted order. E² comparisons per token, all independent: what a GPU does for a few experts.
    """
    logits = _noisy(logits, noise, rng)
    E = logits.shape[-1]
    mine, other = logits[..., :, None], logits[..., None, :]  # (..., T, E, 1), (..., T, 1, E)
    earlier = np.arange(E) < np.arange(E)[:, None]
    rank = np.sum((other > mine) | ((other == mine) & earlier), axis=-1)  # (..., T, E)
    experts = np.argmax(rank[..., None, :] == np.arange(k)[:, None], axis=-1)  # (..., T, k)
    return _weights(logits, experts, order, renormalize), experts


@CONTRACT.gradient
def route_vjp(dy, logits, k, *, order="topk_softmax", renormalize=False, noise=None, rng=None):
    """Gradient of `route`: through the weights, the experts held fast.

    A softmax gives dl = w (dw - Σ w dw); (2) over the chosen, (3) over all experts, of which those not chosen have
    dw = 0 and still get a gradient. A sigmoid gives dl = σ(l) σ(-l) dw, renormalised dl = σ(-l) w (dw - Σ w dw).

    Parameters
    ----------
    dy : ndarray, shape (..., T, k), or a tuple of it and None
        Cotangent of the weights.
    rng : numpy.random.Generator or int, optional
        With `noise`: a seed, or a generator in the state that it had at the call.

    Returns
    -------
    dict
        "logits".
    """
    dw = dy[0] if isinstance(dy, tuple) else dy
    logits = _noisy(logits, noise, rng)
    experts = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    w, chosen = _weights(logits, experts, order, renormalize), np.take_along_axis(logits, experts, axis=-1)
    centred = w * (dw - np.sum(w * dw, axis=-1, keepdims=True))
    if order == "sigmoid":
        return {"logits": spread(sigmoid(-chosen) * centred if renormalize else sigmoid(-chosen) * w * dw, experts, logits)}
    if order == "topk_softmax" or renormalize:
        return {"logits": spread(centred, experts, logits)}
    return {"logits": spread(w * dw, experts, logits) - softmax(logits) * np.sum(w * dw, axis=-1, keepdims=True)}


def error_bound(logits, k, *, unit, store=0.0, order="topk_softmax", renormalize=False, noise=None, rng=None):
    """|computed - exact| of the weights; of the experts there is none: they are right or wrong.

    A weight is a quotient, so its error is relative: of its exponential 4 u |l - max l| (the subtraction, and a fast
    exponential's own), with the logarithm of the sum as a number 2 u max |l| more, of a sum of n positive terms n u, and
    some single roundings. Half-precision code that is written out rounds that difference, the exponential, the sum and the
    quotient, and once more what is renormalised.
    """
    logits = _noisy(logits, noise, rng)
    experts = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    w, chosen = _weights(logits, experts, order, renormalize), np.take_along_axis(logits, experts, axis=-1)
    finite = np.where(np.isfinite(logits), abs(logits), 0)
    away = np.max(logits, axis=-1, keepdims=True) - chosen if order != "sigmoid" else abs(chosen)
    shared = 2 * np.max(finite, axis=-1, keepdims=True) if order != "sigmoid" else 0
    away = np.where(np.isfinite(away), away, 0)
    relative = unit * (8 + (1 + renormalize) * logits.shape[-1] + 4 * away + shared) + store * (2 + away)
    if renormalize:
        relative = relative + np.max(relative, axis=-1, keepdims=True)
    return w * (relative + store), np.zeros_like(experts)


# -- what the forms share --------------------------------------------------------------------------------------------


def _noisy(logits, noise, rng):
    if noise is None:
        return logits
    drawn = np.random.default_rng(rng).standard_normal(logits.shape)
    return logits + noise * drawn.astype(logits.dtype)  # the same numbers in every precision


def _weights(logits, experts, order, renormalize):
    """(2) to (4) for the chosen experts."""
    chosen = np.take_along_axis(logits, experts, axis=-1)  # (..., T, k)
    if order == "sigmoid":
        return softmax(log_sigmoid(chosen)) if renormalize else sigmoid(chosen)
    if order == "topk_softmax" or renormalize:
        return softmax(chosen)
    return np.take_along_axis(softmax(logits), experts, axis=-1)


def _sample(rng, *, T=7, E=5, k=2, batch=()):
    return {"logits": decided_logits(rng, (*batch, T, E)), "k": k}


def _with(change, **options):
    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        return call | {"logits": change(rng, call["logits"])} | options

    return draw


def _arrange(call):
    """Sigmoids near 1 lie nearer to each other than float32 can tell: large logits are made equal."""
    return call | {"logits": np.clip(call["logits"], -8, 8)} if call.get("order") == "sigmoid" else call


def _experts_are_equals(f, call, bound, rng):
    logits = call["logits"]
    if logits.dtype.kind not in "fV" or np.any(np.diff(np.sort(logits.astype(np.float64), axis=-1), axis=-1) == 0):
        return  # among equal logits the index decides
    order = rng.permutation(logits.shape[-1])
    (w, e), (w2, e2) = f(**call), f(**call | {"logits": logits[..., order]})
    yield "weights, experts renumbered", w2, w, 2 * bound(**call)[0]
    yield "experts, renumbered", order[e2], np.asarray(e), np.zeros(np.shape(e))


def _tokens_are_equals(f, call, bound, rng):
    order = rng.permutation(call["logits"].shape[-2])
    (w, e), (w2, e2) = f(**call), f(**call | {"logits": call["logits"][..., order, :]})
    yield "weights, tokens in another order", w2, w[..., order, :], 2 * bound(**call)[0][..., order, :]
    yield "experts, tokens in another order", e2, e[..., order, :], np.zeros(np.shape(e))


def _sums_to_one(f, call, bound, rng):
    if call.get("order", "topk_softmax") == "topk_softmax" or call.get("renormalize"):
        total = f(**call)[0].astype(np.float64).sum(axis=-1)
        yield "the sum of a token's weights", total, np.ones_like(total), bound(**call)[0].sum(axis=-1)


def _cost(compare, depth, alive, counted=False):
    def cost(T, E, k=2, batch=1):
        return Cost((compare(E) + counted * k * E + 5 * k - 2) * T * batch, depth(E) + 2 * log2_ceil(k), (alive(E) + 4 * k) * T * batch)

    return cost


OPS = (
    Op(
        name="route",
        summary="the k experts of every token, and their weights",
        contract=CONTRACT,
        forms={
            "sort": Form(route, _cost(lambda E: E * log2_ceil(E), lambda E: log2_ceil(E) + 3, lambda E: 2 * E), exact=("work", "depth")),
            "ranks": Form(
                route_ranks,
                _cost(lambda E: 3 * E * E - E, lambda E: 2 * log2_ceil(E) + 5, lambda E: 0.6 * E * E, counted=True),
                exact=("work", "depth"),
                stops="NaN logits, which have no rank",
            ),
        },
        gradient=route_vjp,
        sample=_sample,
        options={"order": ORDERS, "renormalize": (False, True), "noise": (None,)},
        hard={
            "exact ties": _with(lambda rng, x: rng.integers(0, 2, x.shape) * 1.0),
            "all equal": _with(lambda rng, x: x * 0),
            "a common offset": _with(lambda rng, x: x + 8192),
            "some roundings apart": _with(lambda rng, x: 1 + 2.0**-18 * rng.permuted(np.arange(x.size).reshape(x.shape) % max(x.shape[-1], 1), axis=-1)),
            "far apart": _with(lambda rng, x: 16 * x),
            "all far below zero": _with(lambda rng, x: x - 25),
            "closed experts": _with(lambda rng, x: np.where(rng.random(x.shape) < 0.3, -1e9, x)),
            "some sure, some not": _with(lambda rng, x: x * rng.choice([1 / 8, 1.0, 4.0], (*x.shape[:-1], 1))),
        },
        error_bound=error_bound,
        references=("fedus2022, section 2.1", "shazeer2017, section 2.1", "jiang2024, section 2.1"),
        sizes=({"k": 1}, {"E": 1, "k": 1}, {"E": 8, "k": 8}, {"E": 64, "k": 6}, {"batch": (2, 3)}),
        laws=(
            Law("experts_are_equals", _experts_are_equals, ("logits",)),
            Law("tokens_are_equals", _tokens_are_equals, ("logits",)),
            Law("sums_to_one", _sums_to_one, ("logits",)),
        ),
        arrange=_arrange,
    ),
)
