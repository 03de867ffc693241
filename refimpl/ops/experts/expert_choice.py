"""Expert choice: not every token chooses its experts, every expert chooses its tokens.

    p_t = softmax(l_t) over the experts                                                                          (1)
    expert e takes the C tokens of the largest p_te, the earlier token first among equals, with weight p_te      (2)

All experts are filled evenly, by construction, and no loss is needed for it. Tokens may get many experts or none. And
since whether a token is taken depends on all others, those after it too, it is not causal: a decoder cannot use it as
it stands.

Glossary
    logits       l, one per token and expert                  X·W_g [1, section 3.2]
    capacity     C, tokens per expert                         k = n c / e [1, eq. 1]
    p            probabilities of the experts, per token      S [1, eq. 2]
    weights, tokens   of the chosen, by falling weight        G, I [1, eq. 2]

Where implementations differ
    Some take the softmax over the tokens, or the logits themselves, for the choice: [1] takes (1).

References
    [1] Y. Zhou et al., "Mixture-of-experts with expert choice routing", NeurIPS 2022, section 3.2.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.numerics import softmax
from refimpl.core.options import positive_int
from refimpl.op import Cost, Form, Law, Op
from refimpl.ops.experts.choice import spread


def _check(arguments, sizes):
    """The capacity is not there where only shapes or precision are asked about."""
    if "capacity" in arguments:
        positive_int("expert_choice", "capacity", arguments["capacity"])
        sizes["C"] = min(int(arguments["capacity"]), sizes["T"])


CONTRACT = Contract("expert_choice", takes="logits (..., T, E)", gives="weights (..., E, C); tokens:int (..., E, C)", check=_check)


@CONTRACT.form
def expert_choice(logits, capacity):
    """The tokens that every expert takes, and their weights, equations (1) and (2).

    Parameters
    ----------
    logits : ndarray, shape (..., T, E)
        What the router says of every token and expert.
    capacity : int
        Tokens per expert; all, if there are fewer.

    Returns
    -------
    weights : ndarray, shape (..., E, C), C = min(capacity, T)
        By falling weight.
    tokens : ndarray of int, shape (..., E, C)

    Raises
    ------
    ValueError, TypeError
        If capacity is not an integer of at least 1, or logits is not numeric.

    Notes
    -----
    T E log2 T comparisons. Two probabilities that are nearer than their rounding are chosen between by it.

    Examples
    --------
    >>> import numpy as np
    >>> weights, tokens = expert_choice(np.log([[3.0, 1.0], [1.0, 1.0], [1.0, 4.0]]), 1)
    >>> tokens.ravel(), weights.ravel().round(2)
    (array([0, 2]), array([0.75, 0.8 ]))
    """
    p = np.swapaxes(softmax(logits), -1, -2)  # (..., E, T)
    tokens = np.argsort(-p, axis=-1, kind="stable")[..., :capacity]  # (..., E, C)
    return np.take_along_axis(p, tokens, axis=-1), tokens


@CONTRACT.gradient
def expert_choice_vjp(dy, logits, capacity):
    """Gradient of `expert_choice`, through the weights, the choice held fast: dl_t = p_t (dp_t - p_t·dp_t).

    Parameters
    ----------
    dy : ndarray, shape (..., E, C), or a tuple of it and None
        Cotangent of the weights.

    Returns
    -------
    dict
        "logits".
    """
    dweights = dy[0] if isinstance(dy, tuple) else dy
    _, tokens = expert_choice(logits, capacity)
    p = softmax(logits)  # (..., T, E)
    dp = np.swapaxes(spread(dweights, tokens, np.swapaxes(p, -1, -2)), -1, -2)  # (..., T, E)
    return {"logits": p * (dp - np.sum(p * dp, axis=-1, keepdims=True))}


def error_bound(logits, capacity, *, unit, store=0.0):
    """|computed - exact| of the weights; the tokens are right or wrong.

    A softmax's relative error, as in `refimpl.route`: 4 u for each unit of max l - l, 2 u max |l| (the log-sum-exp as a
    number), u for each term of the sum. Kernels may keep the probabilities in half precision.
    """
    weights, tokens = expert_choice(logits, capacity)
    away = np.max(logits, axis=-1, keepdims=True) - logits
    relative = unit * (8 + logits.shape[-1] + 4 * away + 2 * np.max(abs(logits), axis=-1, keepdims=True)) + store  # (..., T, E)
    return weights * np.take_along_axis(np.swapaxes(relative, -1, -2), tokens, axis=-1), 0 * tokens


def _sample(rng, *, T=7, E=4, capacity=3, batch=()):
    """Logits in sixteenths, which every precision holds; tokens whose probability nearly equals another's are drawn again."""
    logits = _drawn(rng, (*batch, T, E))
    for _ in range(200):
        p = np.log(softmax(logits))
        order = np.argsort(p, axis=-2)
        near = np.diff(np.take_along_axis(p, order, axis=-2), axis=-2, prepend=-np.inf) < 2.0**-16  # (..., T, E)
        again = np.zeros(p.shape, bool)
        np.put_along_axis(again, order, near, axis=-2)
        again = np.any(again, axis=-1)
        if E < 2 or not np.any(again):
            break
        logits[again] = _drawn(rng, (int(again.sum()), E))
    return {"logits": logits, "capacity": capacity}


def _drawn(rng, shape):
    return np.clip(np.rint(rng.standard_normal(shape) * 32) / 16, -7, 7)


def _with(change):
    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        return call | {"logits": change(rng, call["logits"])}

    return draw


def _some_undecided(rng, logits):
    """Tokens that say nothing have equal probabilities, exactly 1/E: the place decides."""
    return np.where(rng.random((*logits.shape[:-1], 1)) < 0.4, 0, logits)


def _tokens_are_equals(f, call, bound, rng):
    if call["logits"].shape[-1] > 1:  # of one expert all tokens are certain: ties, which the place decides
        order = rng.permutation(call["logits"].shape[-2])
        (w, t), (w2, t2) = f(**call), f(**call | {"logits": call["logits"][..., order, :]})
        yield "weights, tokens in another order", w2, np.asarray(w), 2 * bound(**call)[0]
        yield "tokens, in another order", order[t2] if order.size else t2, np.asarray(t), np.zeros(np.shape(t))


def _experts_are_equals(f, call, bound, rng):
    order = rng.permutation(call["logits"].shape[-1])
    (w, t), (w2, t2) = f(**call), f(**call | {"logits": call["logits"][..., order]})
    yield "weights, experts renumbered", w2, w[..., order, :], 2 * bound(**call)[0][..., order, :]
    yield "tokens, experts renumbered", t2, t[..., order, :], np.zeros(np.shape(t))


def _all_are_taken(f, call, bound, rng):
    """With a capacity of T every token is taken by all experts, and its weights sum to 1."""
    T = call["logits"].shape[-2]
    if T:
        call = call | {"capacity": T}
        w, t = f(**call)
        total = np.sum(np.take_along_axis(w.astype(np.float64), np.argsort(t, axis=-1), axis=-1), axis=-2)  # (..., T)
        yield "the sum of a token's weights", total, np.ones_like(total), bound(**call)[0].max(axis=-1).sum(axis=-1, keepdims=True)


OPS = (
    Op(
        name="expert_choice",
        summary="the tokens that every expert takes",
        contract=CONTRACT,
        forms={
            "sort": Form(
                expert_choice,
                lambda T, E, capacity=1, batch=1: Cost(
                    (T * E * log2_ceil(T) + 5 * T * E) * batch, log2_ceil(E) + 2 * log2_ceil(T) + 5, 4 * T * E * batch
                ),
            )
        },
        gradient=expert_choice_vjp,
        sample=_sample,
        hard={
            "tokens that say nothing": _with(_some_undecided),
            "nothing to choose": _with(lambda rng, x: 0 * x),
            "a common offset": _with(lambda rng, x: x + 8),
        },
        error_bound=error_bound,
        references=("zhou2022, section 3.2",),
        sizes=({"E": 1}, {"E": 8, "capacity": 1}, {"capacity": 100}, {"batch": (2, 3)}),
        laws=(
            Law("tokens_are_equals", _tokens_are_equals, ("logits",)),
            Law("experts_are_equals", _experts_are_equals, ("logits",)),
            Law("all_are_taken", _all_are_taken, ("logits", "capacity")),
        ),
    ),
)
