"""What is added to the loss of a mixture of experts, so that its router stays balanced and its logits small.

    load balance    L = E Σ_e f_e P_e,    f_e = share of the pairs (token, choice) that chose e,                  (1)
                                          P_e = mean over tokens of softmax(l)_e                                   (2)
    z               L = mean over tokens of (log Σ_e e^{l_e})²                                                     (3)

f counts, and has no gradient; P has one. Their product is least, and 1, when both are uniform: the gradient of (1) lowers
the probability of the experts that are chosen too often. (3) pulls all logits of a token towards 0 together, which (1)
and the weights do not see: softmax does not change when they drift, but its rounding does.

Glossary
    logits     l, one per token and expert                    h(x) [1, eq. 1], x_j^(i) [2, eq. 5]
    experts    indices of the chosen, k per token, as `refimpl.route` gives them
    f, P       shares of choices and of probability           f_i, P_i [1, eqs. 5, 6]

Where implementations differ
    f_e is a share of the T k pairs here, so that uniform routing gives 1 for every k; transformers counts tokens, and
    gives k. (k = 1, where both agree, is what [1] treats.) Each entry of the batch has its own loss here, as a group has
    in GShard; a loss of the whole batch is that of its tokens in one row. Coefficients (1e-2 and 1e-3) are the caller's.

References
    [1] W. Fedus, B. Zoph, N. Shazeer, "Switch transformers", JMLR 23, 2022, section 2.2, equations 4-6.
    [2] B. Zoph et al., "ST-MoE", arXiv:2202.08906, section 3.3, equation 5.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.numerics import logsumexp, softmax
from refimpl.laws import carries_nan
from refimpl.op import Cost, Form, Law, Op


def _check(arguments, sizes):
    experts = arguments.get("experts")
    if experts is not None and experts.size and not (np.min(experts) >= 0 and np.max(experts) < sizes["E"]):
        found = f"{np.min(experts)} to {np.max(experts)}"
        raise ValueError(f"load_balance_loss: experts must be indices from 0 to {sizes['E'] - 1}, got {found}")


BALANCE = Contract("load_balance_loss", takes="logits (..., T, E); experts:int (..., T, k)", gives="loss (...)", check=_check)
Z = Contract("router_z_loss", takes="logits (..., T, E)", gives="loss (...)")


@BALANCE.form
def load_balance_loss(logits, experts):
    """Load balance loss of Switch transformers, equation (1).

    Parameters
    ----------
    logits : ndarray, shape (..., T, E)
        All logits of the router (without noise, if the probabilities are to be those of the router itself).
    experts : ndarray of int, shape (..., T, k)
        The experts that were chosen, 0 to E - 1.

    Returns
    -------
    loss : ndarray, shape (...)
        1 for uniform routing, E if one expert gets every token with certainty; 0 for no tokens.

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, or an expert is none of 0 to E - 1.

    Notes
    -----
    6 T E operations. All terms are positive, so the error is relative, ``error_bound``.

    Examples
    --------
    >>> import numpy as np
    >>> float(load_balance_loss(np.zeros((4, 2)), np.array([[0], [1], [0], [1]])))
    1.0
    >>> float(load_balance_loss(np.array([[50.0, 0.0]] * 4), np.zeros((4, 1), int)))
    2.0
    """
    P, f = _mean_probability(logits), _shares(experts, logits)  # (..., E)
    return np.asanyarray(logits.shape[-1] * np.sum(f * P, axis=-1))


@BALANCE.form
def load_balance_loss_pairs(logits, experts):
    """The same as a mean over pairs: each pair pays E times the mean probability of the expert that it chose.

    Σ_e f_e P_e is that mean, since f_e is how often P_e occurs in it. No counts are kept.
    """
    P = _mean_probability(logits)[..., None, :]  # (..., 1, E)
    batch = np.broadcast_shapes(P.shape[:-2], experts.shape[:-2])
    pairs = np.broadcast_to(experts, (*batch, *experts.shape[-2:])).reshape(*batch, 1, -1)
    paid = np.take_along_axis(np.broadcast_to(P, (*batch, *P.shape[-2:])), pairs, axis=-1)[..., 0, :]  # (..., T·k)
    return np.asanyarray(logits.shape[-1] * np.sum(paid, axis=-1) / max(paid.shape[-1], 1))


@BALANCE.gradient
def load_balance_loss_vjp(dy, logits, experts):
    """Gradient of `load_balance_loss`: dl_t = dy E/T · p_t (f - p_t·f), the gradient of a softmax whose cotangent is f.

    Parameters
    ----------
    dy : ndarray, shape (...)
        Cotangent of the loss.

    Returns
    -------
    dict
        "logits".
    """
    p, f = softmax(logits), _shares(experts, logits)[..., None, :]  # (..., T, E), (..., 1, E)
    scale = logits.shape[-1] * dy[..., None, None] / max(logits.shape[-2], 1)
    return {"logits": scale * p * (f - np.sum(p * f, axis=-1, keepdims=True))}


def balance_bound(logits, experts, *, unit, store=0.0):
    """|computed - exact| of the load balance loss.

    Relative errors of probabilities (as in `refimpl.route`: 4 u for each unit of max l - l, 2 u max |l|, E u), averaged
    with the probabilities themselves, and T + E roundings of the sums; nothing cancels. Kernels may keep probabilities
    in half precision.
    """
    T, E = logits.shape[-2:]
    p, f = softmax(logits), _shares(experts, logits)
    off = np.sum(p * (_relative(logits, unit) + store), axis=-2) / max(T, 1)
    loss = E * np.sum(f * _mean_probability(logits), axis=-1)
    return np.asanyarray(E * np.sum(f * off, axis=-1) + (T + E + experts.shape[-1] + 6) * unit * loss)


@Z.form
def router_z_loss(logits):
    """z-loss of a router, equation (3).

    Parameters
    ----------
    logits : ndarray, shape (..., T, E)

    Returns
    -------
    loss : ndarray, shape (...)
        0 for no tokens.

    Raises
    ------
    ValueError, TypeError
        If logits has less than two axes or is not numeric.

    Notes
    -----
    4 T E operations. The logarithm's error is absolute, u times the largest logit; see ``error_bound``.

    Examples
    --------
    >>> import numpy as np
    >>> float(router_z_loss(np.array([[2.0], [4.0]])))
    10.0
    """
    lse = logsumexp(logits)  # (..., T)
    return np.asanyarray(np.sum(lse * lse, axis=-1) / max(logits.shape[-2], 1))


@Z.gradient
def router_z_loss_vjp(dy, logits):
    """Gradient of `router_z_loss`: dl_t = dy 2/T · lse_t · softmax(l_t).

    Parameters
    ----------
    dy : ndarray, shape (...)
        Cotangent of the loss.

    Returns
    -------
    dict
        "logits".
    """
    lse = logsumexp(logits)[..., None]  # (..., T, 1)
    return {"logits": 2 * dy[..., None, None] / max(logits.shape[-2], 1) * lse * softmax(logits)}


def z_bound(logits, *, unit, store=0.0):
    """|computed - exact| of the z-loss.

    log Σ e^l is off by the rounding of the largest logit's size and by the relative error of the sum, E + 8 roundings;
    its square by twice that times itself, and the mean over T by T roundings more.
    """
    T, E = logits.shape[-2:]
    lse = logsumexp(logits)
    off = unit * (3 * np.max(abs(logits), axis=-1) + 2 * abs(lse) + E + 8)
    return np.asanyarray(np.sum(2 * abs(lse) * off + off * off + (T + 3) * unit * lse * lse, axis=-1) / max(T, 1))


# -- what they share -------------------------------------------------------------------------------------------------


def _mean_probability(logits):
    """P of (2)."""
    return np.sum(softmax(logits), axis=-2) / max(logits.shape[-2], 1)  # (..., E)


def _shares(experts, like):
    """f of (1), in the arithmetic of `like`."""
    counts = np.sum(experts[..., None] == np.arange(like.shape[-1]), axis=(-3, -2))  # (..., E)
    return np.ones_like(like, shape=counts.shape) * counts.astype(like.dtype) / max(experts.shape[-2] * experts.shape[-1], 1)


def _relative(logits, unit):
    away = np.max(logits, axis=-1, keepdims=True) - logits
    return unit * (8 + logits.shape[-1] + 4 * away + 2 * np.max(abs(logits), axis=-1, keepdims=True))


def _sample_balance(rng, *, T=7, E=5, k=2, batch=(12,)):
    logits = rng.standard_normal((*batch, T, E)) * 2
    uneven = rng.standard_normal((*batch, T, E)) + np.linspace(0, 3, E)
    return {"logits": logits, "experts": np.argsort(-uneven, axis=-1)[..., :k]}


def _sample_z(rng, *, T=7, E=5, batch=(12,)):
    return {"logits": rng.standard_normal((*batch, T, E)) * 1.5 + 1}


def _with(sample, change):
    def draw(rng, **sizes):
        call = sample(rng, **sizes)
        return call | {"logits": change(rng, call["logits"])}

    return draw


def _uniform_is_one(f, call, bound, rng):
    if call["logits"].shape[-2]:
        call = call | {"logits": 0 * call["logits"]}
        yield "the loss of uniform probabilities", np.asarray(f(**call)), np.ones_like(f(**call)), bound(**call)


def _experts_are_equals(f, call, bound, rng):
    order = rng.permutation(call["logits"].shape[-1])
    other = {"logits": call["logits"][..., np.argsort(order)], "experts": order[call["experts"]]}
    yield "the loss, experts renumbered", np.asarray(f(**other)), np.asarray(f(**call)), 2 * bound(**call)


def _tokens_are_equals(f, call, bound, rng):
    order = rng.permutation(call["logits"].shape[-2])
    other = {n: v[..., order, :] for n, v in call.items()}
    yield "the loss, tokens in another order", np.asarray(f(**other)), np.asarray(f(**call)), 2 * bound(**call)


def _a_mean_of_tokens(f, call, bound, rng):
    logits = call["logits"]
    T = logits.shape[-2]
    if T:
        each = [np.asarray(f(logits=logits[..., t : t + 1, :]), dtype=np.float64) for t in range(T)]
        yield "the loss of all tokens", np.asarray(f(**call)), np.mean(each, axis=0), 3 * bound(**call)


def _one_expert(f, call, bound, rng):
    """Of one expert the loss is the mean square of its logits."""
    one = {"logits": call["logits"][..., :1]}
    if one["logits"].size:
        square = np.mean(one["logits"].astype(np.float64) ** 2, axis=(-2, -1))
        yield "the loss of one expert", np.asarray(f(**one)), square, 2 * bound(**one)


def _cost(work, counted=False):
    return lambda T, E, k=1, batch=1: Cost(
        work(T, E, k) * batch, log2_ceil(T) + 2 * log2_ceil(E) + 6 + log2_ceil(E) * counted, T * (4.125 * E + 1) * batch
    )


_HARD = {
    "a common offset": lambda rng, x: x + 8192,
    "far apart": lambda rng, x: 6 * x,
    "all equal": lambda rng, x: 0 * x,
    "very negative": lambda rng, x: x - 2000,
}

OPS = (
    Op(
        name="load_balance_loss",
        summary="E Σ f_e P_e: least where the router uses its experts evenly",
        contract=BALANCE,
        forms={
            "counts": Form(
                load_balance_loss,
                _cost(lambda T, E, k: T * (6 * E - 2) + 2 * T * min(k, E) * (E + 1) + 3 * E, counted=True),
                exact=("work", "depth", "peak"),
            ),
            "pairs": Form(
                load_balance_loss_pairs,
                _cost(lambda T, E, k: T * (6 * E - 2) + 3 * T * min(k, E) + 1, counted=True),
                exact=("work", "peak"),
            ),
        },
        gradient=load_balance_loss_vjp,
        sample=_sample_balance,
        hard={name: _with(_sample_balance, change) for name, change in _HARD.items()},
        error_bound=balance_bound,
        references=("fedus2022, section 2.2",),
        sizes=({"k": 1}, {"E": 1, "k": 1}, {"E": 8, "k": 8}, {"batch": ()}, {"batch": (2, 3)}),
        laws=(
            Law("uniform_is_one", _uniform_is_one, ("logits",)),
            Law("experts_are_equals", _experts_are_equals, ("logits", "experts")),
            Law("tokens_are_equals", _tokens_are_equals, ("logits", "experts")),
        ),
    ),
    Op(
        name="router_z_loss",
        summary="mean square of the logits' log-sum-exp",
        contract=Z,
        forms={"definition": Form(router_z_loss, _cost(lambda T, E, k: 4 * T * E + 2 * T), exact=("work", "depth", "peak"))},
        gradient=router_z_loss_vjp,
        sample=_sample_z,
        hard={name: _with(_sample_z, change) for name, change in _HARD.items()},
        error_bound=z_bound,
        references=("zoph2022, section 3.3",),
        sizes=({"E": 1}, {"E": 64}, {"batch": ()}, {"batch": (2, 3)}),
        laws=(
            carries_nan(Z, "logits"),
            Law("a_mean_of_tokens", _a_mean_of_tokens, ("logits",)),
            Law("one_expert", _one_expert, ("logits",)),
        ),
    ),
)
