"""Mixture of experts: of E networks, every token is seen by the k that a router chooses.

    l = x W_r,    (w, S) = route(l, k)                                                                           (1)
    y = Σ_{e in S} w_e F_e(x),    F_e(x) = act(x W_in) W_out    or    (act(x W_gate) ⊙ x W_in) W_out              (2)

A layer with E times the parameters at k/E of their cost. The sum (2) runs over E networks, all but k of them with weight
zero; `dense` computes it as it stands. `gathered` turns it round: not every expert for a token, but for every expert its
tokens, in one product. Experts that sit on different machines need buffers of one size, so they take at most `capacity`
tokens each [1, section 3.2]: in the order of the tokens, and of each token's choices by falling weight, pairs go to their
expert's queue; who comes when it is full is dropped, and contributes 0.

Glossary
    router       W_r, shape (d, E)                            W_g [2, section 2.1], W_r [3, eq. 1]
    w_in, w_gate, w_out   an expert's matrices, shapes (E, d, f), (E, d, f), (E, f, d)      w3, w1, w2 in Mixtral's code
    weights, experts, k   of the chosen experts, as in `refimpl.route`
    capacity     pairs per expert                             C [1, algorithm 1]
    place        a pair's number in its expert's queue        c_e [1, algorithm 1]
    dispatch, combine     who is where in the buffers, (T, E, C), and with what weight [1, section 3.2]

Where implementations differ
    GShard and Switch fill the queues with all first choices, then with all second ones [1, algorithm 1]; here the order
    is that of the tokens, all choices of a token together. Each entry of the batch is a group with queues of its own.
    The weights of a dropped token's other experts are not raised. Mixtral's w1 is the gate and w3 the input.

References
    [1] D. Lepikhin et al., "GShard", ICLR 2021, section 3.2 and algorithm 1.
    [2] N. Shazeer et al., "Outrageously large neural networks", ICLR 2017, section 2.
    [3] W. Fedus, B. Zoph, N. Shazeer, "Switch transformers", JMLR 23, 2022, section 2.
    [4] T. Gale, D. Narayanan, C. Young, M. Zaharia, "MegaBlocks", MLSys 2023, section 5.
    [5] A. Q. Jiang et al., "Mixtral of experts", arXiv:2401.04088, section 2.1.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.numerics import gelu, gelu_derivative, silu, silu_derivative
from refimpl.core.options import one_of, positive_int
from refimpl.core.parallel import over_threads
from refimpl.op import Cost, Form, Op
from refimpl.ops.experts.choice import ORDERS, check_choice
from refimpl.ops.experts.moe_laws import decided_tokens, laws
from refimpl.ops.experts.route import route, route_vjp

ACTIVATIONS = {
    "silu": (silu, silu_derivative),
    "gelu": (gelu, gelu_derivative),
    "relu": (lambda a: np.maximum(a, 0), lambda a: np.where(a > 0, np.ones_like(a), np.zeros_like(a))),
}


def _check(arguments, sizes):
    """Options that are not there, because only shapes or precision are asked about, are not looked at."""
    if "k" in arguments:
        check_choice("moe", arguments["k"], sizes["E"], arguments.get("order", ORDERS[0]))
    one_of("moe", "activation", arguments.get("activation", "silu"), tuple(ACTIVATIONS))
    if arguments.get("capacity") is not None:
        positive_int("moe", "capacity", arguments["capacity"])


CONTRACT = Contract(
    "moe",
    takes="x (..., T, d); router (d, E); w_in (E, d, f); w_out (E, f, d); w_gate (E, d, f)",
    gives="y (..., T, d); tokens:int (..., E); dropped:int (...)",
    check=_check,
)


@CONTRACT.form
def moe(
    x, router, w_in, w_out, w_gate=None, *, k, activation="silu", order="topk_softmax", renormalize=False, capacity=None, return_stats=False
):
    """Mixture of experts, equation (2): every expert on every token, masked.

    Parameters
    ----------
    x : ndarray, shape (..., T, d)
        Tokens.
    router : ndarray, shape (d, E)
    w_in : ndarray, shape (E, d, f)
    w_out : ndarray, shape (E, f, d)
    w_gate : ndarray, shape (E, d, f), optional
        With it an expert is gated: (act(x w_gate) · (x w_in)) w_out.
    k : int
        Experts per token, 1 to E.
    activation : {"silu", "gelu", "relu"}
        gelu is the exact one, with erf.
    order, renormalize : see `refimpl.route`
        How weights come from logits.
    capacity : int, optional
        Pairs that an expert takes, per entry of the batch; without it, all.
    return_stats : bool
        Also return who went where.

    Returns
    -------
    y : ndarray, shape (..., T, d)
    tokens : ndarray of int, shape (..., E), only with `return_stats`
        Tokens that each expert took: at most `capacity`.
    dropped : ndarray of int, shape (...), only with `return_stats`
        Pairs of a token and an expert that were dropped; with the tokens taken they make T k.

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, k is not between 1 and E, or an option is none of its values.

    Notes
    -----
    6 T E d f operations with a gate (4 without), E/k times what is needed. The choice of experts is decided by the
    logits' rounding where two of them nearly tie; elsewhere the error is at most ``error_bound``.

    Examples
    --------
    >>> import numpy as np
    >>> x, router = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[5.0, 0.0], [0.0, 5.0]])
    >>> w_in = np.ones((2, 2, 1))
    >>> w_out = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> moe(x, router, w_in, w_out, k=1, activation="relu")
    array([[1., 0.],
           [0., 1.]])
    """
    weights, experts = route(x @ router, k, order=order, renormalize=renormalize)  # (..., T, k)
    kept, tokens, dropped = _queues(experts, capacity, router.shape[-1])
    y = np.zeros_like(x)
    for e in range(router.shape[-1]):
        sent = (experts == e) & kept  # (..., T, k)
        weight = np.sum(np.where(sent, weights, np.zeros_like(weights)), axis=-1, keepdims=True)  # (..., T, 1)
        result = _expert(x, w_in[e], w_out[e], None if w_gate is None else w_gate[e], activation)  # (..., T, d)
        y = y + np.where(np.any(sent, axis=-1, keepdims=True), weight * result, np.zeros_like(y))
    return (y, tokens, dropped) if return_stats else y


@CONTRACT.form
def moe_gathered(
    x, router, w_in, w_out, w_gate=None, *, k, activation="silu", order="topk_softmax", renormalize=False, capacity=None, return_stats=False
):
    """The same sum, turned round: the pairs sorted by expert, and for each expert one product over its tokens.

    Then the pairs go back to where they came from, and each token adds up its k. k/E of the dense work and the sort; the
    form of fast implementations (MegaBlocks [4]). A token's result is computed from its own row alone, in whatever
    company it is. Experts are spread over threads.
    """
    E, d = router.shape[-1], x.shape[-1]
    weights, experts = route(x @ router, k, order=order, renormalize=renormalize)  # (..., T, k)
    kept, tokens, dropped = _queues(experts, capacity, E)
    rows = x.reshape(-1, d)  # (batch·T, d)
    owner = np.where(kept, experts, E).reshape(-1)  # (batch·T·k,): expert of each pair, E for nobody
    by_expert = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner, minlength=E + 1))

    def run(e):
        pairs = by_expert[(ends[e - 1] if e else 0) : ends[e]]
        return _expert(rows[pairs // k], w_in[e], w_out[e], None if w_gate is None else w_gate[e], activation)

    results = over_threads(run, range(E), rows, w_in, w_out)
    nothing = np.zeros_like(rows, shape=(len(owner) - ends[E - 1], d))
    back = np.concatenate([*results, nothing])[np.argsort(by_expert)].reshape(*experts.shape, d)  # (..., T, k, d)
    y = back[..., 0, :] * weights[..., 0, None]
    for j in range(1, k):
        y = y + back[..., j, :] * weights[..., j, None]
    return (y, tokens, dropped) if return_stats else y


@CONTRACT.form
def moe_capacity(
    x, router, w_in, w_out, w_gate=None, *, k, activation="silu", order="topk_softmax", renormalize=False, capacity=None, return_stats=False
):
    """The same with a buffer of C places per expert, filled and read by products with masks [1, section 3.2].

    dispatch_tec is 1 where token t has place c with expert e, combine_tec its weight there: buffers = dispatchᵀ x,
    y = combine F(buffers). All shapes are fixed beforehand, so it compiles and shards; 4 T E C d operations go into
    moving tokens. Without `capacity`, C is the longest queue.
    """
    E, d = router.shape[-1], x.shape[-1]
    weights, experts = route(x @ router, k, order=order, renormalize=renormalize)  # (..., T, k)
    kept, tokens, dropped = _queues(experts, capacity, E)
    place = _places(experts, E)  # (..., T, k)
    C = int(np.max(tokens, initial=0))
    dispatch, combine = (np.zeros_like(x, shape=(*x.shape[:-1], E, C)) for _ in range(2))  # (..., T, E, C)
    for j in range(k):
        here = (experts[..., j, None] == np.arange(E))[..., None] & (place[..., j, None, None] == np.arange(C)) & kept[..., j, None, None]
        dispatch = dispatch + np.where(here, np.ones_like(dispatch), np.zeros_like(dispatch))
        combine = combine + np.where(here, weights[..., j, None, None], np.zeros_like(combine))
    buffers = np.swapaxes(dispatch.reshape(*x.shape[:-1], E * C), -1, -2) @ x  # (..., E·C, d)
    results = _expert(buffers.reshape(*x.shape[:-2], E, C, d), w_in, w_out, w_gate, activation)  # (..., E, C, d)
    y = combine.reshape(*x.shape[:-1], E * C) @ results.reshape(*x.shape[:-2], E * C, d)
    return (y, tokens, dropped) if return_stats else y


@CONTRACT.gradient
def moe_vjp(
    dy,
    x,
    router,
    w_in,
    w_out,
    w_gate=None,
    *,
    k,
    activation="silu",
    order="topk_softmax",
    renormalize=False,
    capacity=None,
    return_stats=False,
):
    """Gradient of `moe`, expert by expert over the tokens that it took.

    With do = w_e dy: dW_out = hᵀ do, dh = do W_outᵀ, then through act to W_in, W_gate and x. What an expert's result
    meets, dw_e = F_e(x)·dy, is the router's lesson, which `route_vjp` turns into dl; drouter = xᵀ dl, dx += dl W_rᵀ. A
    dropped pair teaches nothing, and an expert without tokens learns nothing: their gradients are 0. relu'(0) = 0.

    Parameters
    ----------
    dy : ndarray, shape (..., T, d), or a tuple of it and None
        Cotangent of y.

    Returns
    -------
    dict
        "x", "router", "w_in", "w_out", and "w_gate" where one was given.
    """
    dy = dy[0] if isinstance(dy, tuple) else dy
    E, d = w_in.shape[:2]
    act, slope = ACTIVATIONS[activation]
    logits = x @ router
    weights, experts = route(logits, k, order=order, renormalize=renormalize)  # (..., T, k)
    kept, _, _ = _queues(experts, capacity, E)
    shape, x, dy = x.shape, x.reshape(-1, d), dy.reshape(-1, d)
    weights, experts, kept = (v.reshape(-1, k) for v in (weights, experts, kept))
    dx, dweights = np.zeros_like(x), np.zeros_like(weights)
    dw_in, dw_out, dw_gate = np.zeros_like(w_in), np.zeros_like(w_out), np.zeros_like(w_in)
    for e in range(E):
        rows, choice = np.nonzero((experts == e) & kept)
        a = x[rows] @ w_in[e]  # (tokens of e, f)
        g = a if w_gate is None else x[rows] @ w_gate[e]
        h = act(g) if w_gate is None else act(g) * a
        do = weights[rows, choice][:, None] * dy[rows]  # (tokens of e, d)
        dweights[rows, choice] = np.sum(h @ w_out[e] * dy[rows], axis=-1)
        dw_out[e] = h.T @ do
        dh = do @ w_out[e].T  # (tokens of e, f)
        if w_gate is None:
            da = dh * slope(a)
        else:
            da, dg = dh * act(g), dh * a * slope(g)
            dw_gate[e] = x[rows].T @ dg
            dx[rows] += dg @ w_gate[e].T
        dw_in[e] = x[rows].T @ da
        dx[rows] += da @ w_in[e].T
    dweights = dweights.reshape(*logits.shape[:-1], k)
    dlogits = route_vjp(dweights, logits, k, order=order, renormalize=renormalize)["logits"].reshape(-1, E)
    dx = dx + dlogits @ router.T
    return {"x": dx.reshape(shape), "router": x.T @ dlogits, "w_in": dw_in, "w_out": dw_out, "w_gate": dw_gate}


def error_bound(
    x,
    router,
    w_in,
    w_out,
    w_gate=None,
    *,
    k,
    unit,
    store=0.0,
    activation="silu",
    order="topk_softmax",
    renormalize=False,
    capacity=None,
    return_stats=False,
):
    """|computed - exact| of y, elementwise; the counts are exact. The choice of experts is taken for granted.

    An inner product of n terms is off by (n + 2) u times that of the absolute values, an activation by its slope (at most
    1.2) times the error of its argument and a few roundings, a weight by the errors of the logits (of two, in a softmax)
    and its own roundings. Half-precision kernels may keep logits, weights, x W, h and the experts' results in `store`.
    """
    (d, E), f, size = router.shape, w_in.shape[-1], abs(x)
    logits = x @ router
    weights, experts = route(logits, k, order=order, renormalize=renormalize)
    kept, tokens, dropped = _queues(experts, capacity, E)
    off = (d + 2) * unit * (size @ abs(router)) + store * abs(logits)  # (..., T, E)
    reach = abs(logits) if order == "sigmoid" else np.max(logits, axis=-1, keepdims=True) - logits
    both = 2 if order != "sigmoid" or renormalize else 1
    largest = np.max(off + 4 * unit * reach, axis=-1, keepdims=True)
    of_weight = weights * ((both * largest) + (12 + 2 * E) * unit + 2 * store)  # (..., T, k)

    def product(w):
        y = x @ w
        return y, (d + 2) * unit * (size @ abs(w)) + store * abs(y)

    y = np.zeros_like(x)
    for e in range(E):
        sent = (experts == e) & kept
        weight, weight_off = (np.sum(np.where(sent, v, 0 * v), axis=-1, keepdims=True) for v in (weights, of_weight))  # (..., T, 1)
        a, a_off = product(w_in[e])
        g, g_off = (a, a_off) if w_gate is None else product(w_gate[e])
        act, act_off = ACTIVATIONS[activation][0](g), 1.2 * g_off + 8 * unit * abs(g)
        h, h_off = (act, act_off) if w_gate is None else (act * a, abs(act) * a_off + (abs(a) + a_off) * act_off)
        h_off = h_off + (unit + store) * abs(h)
        result = abs(h) @ abs(w_out[e])
        result_off = h_off @ abs(w_out[e]) + ((f + 2) * unit + store) * result
        y = y + weight * (result_off + (k + 2) * unit * result) + weight_off * (result + result_off)
    return (y, 0 * tokens, 0 * dropped) if return_stats else y


# -- what the forms share --------------------------------------------------------------------------------------------


def _expert(x, w_in, w_out, w_gate, activation):
    """F_e(x) of (2)."""
    act = ACTIVATIONS[activation][0]
    h = act(x @ w_in) if w_gate is None else act(x @ w_gate) * (x @ w_in)
    return h @ w_out


def _places(experts, E):
    """The number of each pair in its expert's queue: how many pairs before it chose the same; (..., T, k)."""
    pairs = experts.reshape(*experts.shape[:-2], -1, 1) == np.arange(E)  # (..., T·k, E)
    before = np.cumsum(pairs, axis=-2) - pairs
    return np.sum(before * pairs, axis=-1).reshape(experts.shape)


def _queues(experts, capacity, E):
    """Which pairs are kept, (..., T, k); how many tokens each expert takes, (..., E); how many pairs are dropped, (...)."""
    kept = np.ones(experts.shape, bool) if capacity is None else _places(experts, E) < capacity
    tokens = np.sum((experts[..., None] == np.arange(E)) & kept[..., None], axis=(-3, -2))
    return kept, tokens, np.asarray(np.sum(~kept, axis=(-2, -1)))


def _sample(rng, *, T=7, d=6, E=4, f=5, batch=()):
    router = rng.permuted(np.linspace(-2, 2, E)[None, :] * np.ones((d, 1)), axis=-1) / np.sqrt(d) * 1.5
    return {
        "x": decided_tokens(rng, router, (*batch, T)),
        "router": router,
        "w_in": rng.standard_normal((E, d, f)) / np.sqrt(d) * 1.5,
        "w_out": rng.standard_normal((E, f, d)) / np.sqrt(f),
        "w_gate": rng.standard_normal((E, d, f)) / np.sqrt(d) * 1.5,
    }


def _with(change, **options):
    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        return call | change(rng, **call) | {"k": min(2, call["router"].shape[-1])} | options

    return draw


def _far_apart(rng, x, router, **_):
    """Logits of about 30, 60, ... for every token."""
    lean = 30.0 * np.arange(1, router.shape[1] + 1)
    return {"x": np.concatenate([np.ones_like(x[..., :1]), x[..., 1:]], axis=-1), "router": np.concatenate([lean[None, :], router[1:] / 64])}


def _leaning(lean):
    """A router that leans towards some experts, by what a feature that is always 1 adds to their logits."""

    def change(rng, x, router, **_):
        router = np.concatenate([lean(router.shape[1])[None, :], router[1:]])
        return {"x": decided_tokens(rng, router, x.shape[:-1], constant=True), "router": router}

    return change


def _integers(rng, x, router, **_):
    """Logits that are exact in any order of summation, and often equal."""
    return {"x": rng.integers(-1, 2, x.shape) * 1.0, "router": rng.integers(-1, 2, router.shape) / 2}


def _some_zero(rng, x, **_):
    return {"x": np.where(rng.random((*x.shape[:-1], 1)) < 0.4, 0, x)}


def _cost(pairs, moved, depth, alive):
    """Work of the experts on so many (token, expert) pairs, of the router, and of what moves tokens and results about."""

    def cost(T, d, E, f, k=2, batch=1):
        n = pairs(T, E, k)
        work = batch * (n * (4 * d * f + 2 * f + 2 * d) + T * (2 * d * E + E * log2_ceil(E) + 5 * k) + moved(T, d, E, k))
        return Cost(work, 2 * log2_ceil(d) + log2_ceil(f) + log2_ceil(E) + log2_ceil(k) + depth(E, T, k), batch * alive(T, d, E, f, k))

    return cost


OPS = (
    Op(
        name="moe",
        summary="mixture of experts: k of E networks for every token",
        contract=CONTRACT,
        forms={
            "dense": Form(
                moe,
                _cost(
                    lambda T, E, k: T * E,
                    lambda T, d, E, k: 4 * T * E * k,
                    lambda E, T, k: E + 4,
                    lambda T, d, E, f, k: T * (2 * f + d + 2 * E + 4 * k),
                ),
            ),
            "gathered": Form(
                moe_gathered,
                _cost(
                    lambda T, E, k: T * k,
                    lambda T, d, E, k: T * k * (2.5 * log2_ceil(T * k) + d),
                    lambda E, T, k: log2_ceil(T * k) + 7,
                    lambda T, d, E, f, k: T * (k * (3 * d + 2) + 2 * f + E),
                ),
            ),
            "capacity": Form(
                moe_capacity,
                _cost(
                    lambda T, E, k: T * k,
                    lambda T, d, E, k: 4 * T * T * k * (d + 1) + T * T * E,
                    lambda E, T, k: 2 * log2_ceil(T) + log2_ceil(T * k) + 15,
                    lambda T, d, E, f, k: T * T * (2.5 * k + 1.25 * E) + T * k * (f + d),
                ),
                stops="NaN and infinities in x, or in a token's result: 0 in a mask times NaN is NaN for all tokens",
            ),
        },
        gradient=moe_vjp,
        sample=_sample,
        options={
            "k": (lambda E, **_: min(2, E), 1, lambda E, **_: E),
            "activation": tuple(ACTIVATIONS),
            "order": ORDERS,
            "renormalize": (False, True),
            "capacity": (None, lambda T, E, **_: max(1, -(-T // E))),
            "return_stats": (False, True),
        },
        hard={
            "an expert without tokens": _with(_leaning(lambda E: np.where(np.arange(E) == E // 2, -20.0, np.arange(E) / 2))),
            "all tokens to the same experts": _with(_leaning(lambda E: -8.0 * np.arange(E)[::-1])),
            "logits beyond the range of exponentials": _with(_far_apart),
            "exact ties": _with(_integers),
            "a router that says nothing": _with(lambda rng, router, **_: {"router": 0 * router}),
            "tokens of zero": _with(_some_zero),
            "large experts": _with(lambda rng, w_in, **_: {"w_in": 30 * w_in}),
            "one token, all experts": lambda rng, **sizes: _sample(rng, **(sizes | {"T": 1})) | {"k": sizes.get("E", 4)},
        },
        error_bound=error_bound,
        references=("lepikhin2021, section 3.2", "shazeer2017, section 2", "fedus2022, section 2", "gale2023, section 5"),
        sizes=({"d": 1}, {"f": 1}, {"E": 1}, {"E": 8, "d": 16, "f": 8}, {"batch": (2, 3)}),
        laws=laws(CONTRACT),
    ),
)
