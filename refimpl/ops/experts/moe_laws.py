"""Laws of mixtures of experts, and tokens whose choice of experts no rounding changes."""

import numpy as np

from refimpl.op import Law

MARGIN, LARGEST = 1 / 8, 9.0  # bfloat16 rounds a logit of 9 by 1/64 at most; sigmoids of larger ones are all 1 in float32


def decided_tokens(rng, router, shape, constant=False):
    """Normal tokens (*shape, d) for which the logits x·router lie apart; the first feature is 1 if `constant`.

    Two logits that nearly tie are decided by rounding, and every implementation rounds in its own way: a call with such
    a token has no right result. So they are drawn again.
    """
    d, E = router.shape
    x = rng.standard_normal((*shape, d))
    for attempt in range(1000):
        x[..., :1] = np.where(constant, 1.0, x[..., :1])
        logits = np.sort(x @ router, axis=-1)
        undecided = np.any(np.diff(logits, axis=-1) < MARGIN, axis=-1) | (logits[..., -1:].max(axis=-1, initial=-np.inf) > LARGEST)
        if E < 2 or not np.any(undecided):
            return x
        x[undecided] = rng.standard_normal((int(undecided.sum()), d)) * (1 + attempt % 8 / 4)
    raise ValueError("decided_tokens: this router cannot tell its experts apart")


def laws(contract):
    """What every mixture of experts obeys; calls with exact ties among the logits are left out where these decide."""

    def named(f, call):
        return contract.named(f(**call))

    def experts_are_equals(f, call, bound, rng):
        """Experts renumbered, with their columns of the router."""
        order = rng.permutation(call["router"].shape[-1])
        other = call | {n: call[n][order] for n in ("w_in", "w_out", "w_gate") if call.get(n) is not None}
        one, two, limit = named(f, call), named(f, other | {"router": call["router"][:, order]}), named(bound, call)
        yield "y, experts renumbered", two["y"], one["y"], 2 * limit["y"]
        if "tokens" in one:
            yield "tokens, experts renumbered", two["tokens"], one["tokens"][..., order], 0 * limit["tokens"]
            yield "dropped, experts renumbered", np.asarray(two["dropped"]), np.asarray(one["dropped"]), 0 * limit["dropped"]

    def tokens_are_equals(f, call, bound, rng):
        """Tokens in another order; with a capacity, the order decides who is dropped."""
        if call.get("capacity") is None:
            order = rng.permutation(call["x"].shape[-2])
            one, two, limit = named(f, call), named(f, call | {"x": call["x"][..., order, :]}), named(bound, call)
            yield "y, tokens in another order", two["y"], one["y"][..., order, :], 2 * limit["y"][..., order, :]

    def first_come(f, call, bound, rng):
        """Tokens that come later take nothing from those before."""
        T = call["x"].shape[-2]
        call = {n: v for n, v in call.items() if n != "return_stats"}
        for cut in sorted({T // 2, T - 1} & set(range(1, T))):
            part = call | {"x": call["x"][..., :cut, :]}
            yield f"y before t = {cut}", f(**part), f(**call)[..., :cut, :], 2 * bound(**part)

    def all_is_dense(f, call, bound, rng):
        """With k = E and weights from a softmax, y is the mixture of all experts, each asked alone."""
        E = call["router"].shape[-1]
        call = {n: v for n, v in call.items() if n not in ("capacity", "return_stats", "renormalize", "order")}
        wide = np.result_type(call["x"].dtype, np.float64) if call["x"].dtype.kind == "f" else np.float64
        logits = call["x"].astype(wide) @ call["router"].astype(wide)
        p = np.exp(logits - logits.max(axis=-1, keepdims=True))
        p = p / p.sum(axis=-1, keepdims=True)
        total, limit = np.zeros_like(p @ call["router"].astype(wide).T), 2 * bound(**call | {"k": E})
        for e in range(E):
            alone = {n: call[n][e : e + 1] for n in ("w_in", "w_out", "w_gate") if call.get(n) is not None}
            alone = call | alone | {"router": call["router"][:, e : e + 1], "k": 1}
            total = total + p[..., e, None] * f(**alone).astype(wide)
            limit = limit + 2 * p[..., e, None] * bound(**alone)
        yield "y of all experts", f(**call | {"k": E}), total, limit

    def nobody_is_lost(f, call, bound, rng):
        """Taken and dropped pairs make T k, and no expert takes more than its capacity."""
        T, k = call["x"].shape[-2], call["k"]
        for capacity in (None, 1, 2):
            got = named(f, call | {"capacity": capacity, "return_stats": True})
            tokens, dropped = np.asarray(got["tokens"]), np.asarray(got["dropped"])
            yield "taken and dropped", tokens.sum(axis=-1) + dropped, np.full(dropped.shape, T * k), np.zeros(dropped.shape)
            at_most = T if capacity is None else capacity
            yield "taken", np.minimum(tokens, at_most), tokens, np.zeros(tokens.shape)

    return (
        Law("experts_are_equals", experts_are_equals, ("router", "w_in", "w_out", "w_gate")),
        Law("tokens_are_equals", tokens_are_equals, ("x",)),
        Law("first_come", first_come, ("x",)),
        Law("all_is_dense", all_is_dense, ("k", "order")),
        Law("nobody_is_lost", nobody_is_lost, ("capacity", "return_stats")),
    )

