"""Mistakes in mixtures of experts: who is chosen, with what weight, who is dropped, and what the router learns from it."""

import numpy as np

from refimpl.conformance.mutants import Mutant, edited
from refimpl.core.numerics import softmax
from refimpl.ops.experts import expert_choice as ec
from refimpl.ops.experts import losses as lo
from refimpl.ops.experts import moe as mo
from refimpl.ops.experts import route as ro

EVERYWHERE = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")  # it only stands for others


def _ties(logits, k, queues=False):
    """The tokens that have equal logits among their k + 1 largest; with queues, those behind them too."""
    largest = -np.sort(-logits, axis=-1)[..., : k + 1]
    tied = np.any(largest[..., :-1] - largest[..., 1:] <= 1e-6 * abs(largest).max(axis=-1, keepdims=True, initial=0), axis=-1)
    return np.maximum.accumulate(tied, axis=-1) if queues else tied


def _one_balance(logits, experts):
    batch = np.broadcast_shapes(logits.shape[:-1], experts.shape[:-1])
    logits, experts = (np.broadcast_to(x, (*batch, x.shape[-1])).reshape(-1, x.shape[-1]) for x in (logits, experts))
    return lo.load_balance_loss(logits, experts) if len(logits) else np.asarray(np.nan, logits.dtype)  # a mean over nothing


def _one_z(logits):
    logits = logits.reshape(-1, logits.shape[-1])
    return lo.router_z_loss(logits) if len(logits) else np.asarray(np.nan, logits.dtype)


_CHOICE = "    experts = np.argsort(-logits, axis=-1, kind=\"stable\")[..., :k]  # (..., T, k)\n"
_OVER_CHOSEN = "    if order == \"topk_softmax\" or renormalize:\n        return softmax(chosen)\n    return np.take"

_ROUTE = (
    Mutant(
        "route",
        "ties_elsewhere",
        "of equal logits others are chosen (torch.topk promises no order): ties go to the lower index",
        lambda: ro.route,
        variant=True,
        hidden=EVERYWHERE,
        undecided=lambda call: _ties(call["logits"], call["k"]),
    ),
    Mutant(
        "route",
        "softmax_over_all",
        "the weights are a softmax over all experts where the order is topk_softmax: there the softmax is over the k chosen, and sums to 1",
        edited(ro.route, (_OVER_CHOSEN, "    if renormalize:\n        return softmax(chosen)\n    return np.take")),
        variant=True,
    ),
    Mutant(
        "route",
        "softmax_over_chosen",
        "the weights are a softmax over the chosen where the order is softmax_topk: there the softmax is over all experts, before the choice",
        edited(ro.route, (_OVER_CHOSEN, "    if True:\n        return softmax(chosen)\n    return np.take")),
        variant=True,
    ),
    Mutant(
        "route",
        "renormalisation_missing",
        "renormalize is ignored: the weights of a token are divided by their sum",
        edited(
            ro.route,
            (_OVER_CHOSEN, "    if order == \"topk_softmax\":\n        return softmax(chosen)\n    return np.take"),
            ("softmax(log_sigmoid(chosen)) if renormalize else sigmoid(chosen)", "sigmoid(chosen)"),
        ),
        variant=True,
    ),
    Mutant(
        "route",
        "always_renormalised",
        "the weights are divided by their sum unasked: only renormalize does that",
        edited(
            ro.route,
            (_OVER_CHOSEN, "    if True:\n        return softmax(chosen)\n    return np.take"),
            ("softmax(log_sigmoid(chosen)) if renormalize else sigmoid(chosen)", "softmax(log_sigmoid(chosen))"),
        ),
    ),
    Mutant(
        "route",
        "ties_to_the_higher_index",
        "among equal logits the expert of the higher index is chosen: the lower index comes first",
        edited(ro.route, (_CHOICE, "    experts = logits.shape[-1] - 1 - np.argsort(-logits[..., ::-1], axis=-1, kind=\"stable\")[..., :k]\n")),
        variant=True,
    ),
    Mutant(
        "route",
        "by_rising_weight",
        "the chosen come by rising weight: the largest comes first",
        edited(ro.route, (_CHOICE, _CHOICE + "    experts = experts[..., ::-1]\n")),
    ),
    Mutant(
        "route",
        "by_index",
        "the chosen come by index: they come by falling weight",
        edited(ro.route, (_CHOICE, _CHOICE + "    experts = np.sort(experts, axis=-1)\n")),
    ),
    Mutant(
        "route",
        "the_smallest",
        "the k experts of the smallest logits are chosen: a sort that rises, and no sign before it",
        edited(ro.route, (_CHOICE, _CHOICE.replace("-logits", "logits"))),
    ),
    Mutant(
        "route",
        "sigmoid_is_softmax",
        "the order sigmoid gives a softmax: it is a sigmoid of each expert's own logit",
        edited(ro.route, ("softmax(log_sigmoid(chosen)) if renormalize else sigmoid(chosen)", "softmax(chosen)")),
    ),
    Mutant(
        "route",
        "unstable_softmax",
        "the exponentials overflow: the largest logit is subtracted first",
        edited(
            ro.route,
            ("    return np.take_along_axis(softmax(logits), experts, axis=-1)", "    return np.exp(chosen) / np.exp(logits).sum(-1, keepdims=True)"),
            ("        return softmax(chosen)\n", "        return np.exp(chosen) / np.exp(chosen).sum(-1, keepdims=True)\n"),
        ),
    ),
    Mutant(
        "route",
        "gradient_to_the_chosen_only",
        "with softmax_topk the experts that were not chosen get no gradient: they stand in the denominator, and get -p_e Σ w dw",
        edited(
            ro.route_vjp,
            ("{\"logits\": spread(w * dw, experts, logits) - softmax(logits) * np.sum(w * dw, axis=-1, keepdims=True)}",
             "{\"logits\": spread(w * dw - w * np.sum(w * dw, axis=-1, keepdims=True), experts, logits)}"),
        ),
        of_gradient=True,
    ),
    Mutant(
        "route",
        "gradient_not_centred",
        "dl = w dw: what the denominator gives, -w Σ w dw, is missing",
        edited(ro.route_vjp, ("w * (dw - np.sum(w * dw, axis=-1, keepdims=True))", "w * dw")),
        of_gradient=True,
    ),
    Mutant(
        "route",
        "gradient_around_renormalisation",
        "the gradient takes the sum of the weights for a constant: it depends on the logits as the weights do",
        edited(
            ro.route_vjp,
            ("if order == \"topk_softmax\" or renormalize:\n        return {", "if order == \"topk_softmax\":\n        return {"),
            ("sigmoid(-chosen) * centred if renormalize else sigmoid(-chosen) * w * dw", "sigmoid(-chosen) * w * dw"),
        ),
        of_gradient=True,
    ),
)

_TERM = "y = y + np.where(np.any(sent, axis=-1, keepdims=True), weight * result, np.zeros_like(y))"
_GATED = "    h = act(x @ w_in) if w_gate is None else act(x @ w_gate) * (x @ w_in)\n"
_KEPT = "    kept = np.ones(experts.shape, bool) if capacity is None else _places(experts, E) < capacity\n"
_ROUTED = "    weights, experts = route(x @ router, k, order=order, renormalize=renormalize)  # (..., T, k)\n    kept, tokens, dropped = _queues(experts, capacity, router.shape[-1])\n"


def _turned(source):
    """The definition's routing with another order of the queues: `source` gives kept from experts and weights."""
    return edited(mo.moe, (_ROUTED, _ROUTED + source + "    tokens = np.sum((experts[..., None] == np.arange(router.shape[-1])) & kept[..., None], axis=(-3, -2))\n"))


_MOE = (
    Mutant(
        "moe",
        "ties_elsewhere",
        "of equal logits others are chosen (torch.topk promises no order): ties go to the lower index",
        lambda: mo.moe,
        variant=True,
        hidden=EVERYWHERE,
        undecided=lambda call: _ties(call["x"] @ call["router"], call["k"], call.get("capacity") is not None),
    ),
    Mutant(
        "moe",
        "weights_not_applied",
        "the chosen experts' results are added without their weights: y = Σ w_e F_e(x)",
        edited(mo.moe, (_TERM, _TERM.replace("weight * result", "result"))),
    ),
    Mutant(
        "moe",
        "weights_on_the_input",
        "the weight multiplies the token before its expert, which is not linear: it multiplies the expert's result (some models do this on purpose)",
        edited(
            mo.moe,
            ("_expert(x, w_in[e], w_out[e], None if w_gate is None else w_gate[e], activation)  # (..., T, d)\n", "_expert(weight * x, w_in[e], w_out[e], None if w_gate is None else w_gate[e], activation)\n"),
            (_TERM, _TERM.replace("weight * result", "result")),
        ),
        variant=True,
    ),
    Mutant(
        "moe",
        "empty_expert_gives_nan",
        "the results are divided by the number of tokens of the expert and multiplied again, so an expert without tokens gives 0/0: it gives nothing",
        edited(mo.moe, (_TERM, "count = int(np.sum(sent)) * np.ones_like(weight)\n        y = y + (weight * result / count) * count")),
    ),
    Mutant(
        "moe",
        "activation_on_the_wrong_branch",
        "act(x w_in) multiplies x w_gate: the activation belongs to the gate, act(x w_gate)·(x w_in)",
        edited(mo.moe, (_GATED, "    h = act(x @ w_in) if w_gate is None else act(x @ w_in) * (x @ w_gate)\n")),
    ),
    Mutant(
        "moe",
        "gate_not_activated",
        "the gate is linear: it is act(x w_gate)",
        edited(mo.moe, (_GATED, "    h = act(x @ w_in) if w_gate is None else (x @ w_gate) * (x @ w_in)\n")),
    ),
    Mutant(
        "moe",
        "dropped_tokens_pass_through",
        "a token that all its experts dropped comes out as it went in: it gives 0 (the residual connection is outside of the layer)",
        edited(mo.moe, ("    return (y, tokens, dropped) if return_stats else y\n\n\n@CONTRACT.form\ndef moe_gathered(", "    y = np.where(np.any(kept, axis=-1, keepdims=True), y, x)\n    return (y, tokens, dropped) if return_stats else y\n\n\n@CONTRACT.form\ndef moe_gathered(")),
        variant=True,
    ),
    Mutant(
        "moe",
        "heaviest_first",
        "a full expert keeps the tokens of the largest weights: it keeps those that come first",
        _turned(
            "    if capacity is not None:\n"
            "        pairs = ((experts[..., None] == np.arange(router.shape[-1])) * (weights[..., None] + 1)).reshape(*x.shape[:-2], -1, router.shape[-1])\n"
            "        rank = np.argsort(np.argsort(-pairs, axis=-2, kind=\"stable\"), axis=-2)\n"
            "        kept = np.take_along_axis(rank.reshape(*experts.shape, -1), experts[..., None], axis=-1)[..., 0] < capacity\n"
        ),
        variant=True,
    ),
    Mutant(
        "moe",
        "first_choices_first",
        "the queues take all first choices before any second (GShard's algorithm 1): here they take the tokens in order, all choices of each together",
        _turned("    if capacity is not None:\n        kept = np.swapaxes(_places(np.swapaxes(experts, -1, -2), router.shape[-1]), -1, -2) < capacity\n"),
        variant=True,
    ),
    Mutant(
        "moe",
        "last_come_first_served",
        "a full expert keeps the tokens that come last: it keeps those that come first",
        _turned("    if capacity is not None:\n        kept = _places(experts[..., ::-1, ::-1], router.shape[-1])[..., ::-1, ::-1] < capacity\n"),
    ),
    Mutant(
        "moe",
        "capacity_off_by_one",
        "an expert takes capacity + 1 tokens: places are counted from 0",
        edited(mo.moe, (_KEPT, _KEPT.replace("< capacity", "<= capacity"))),
    ),
    Mutant(
        "moe",
        "renormalised_after_dropping",
        "the weights of the experts that kept a token are raised to sum to 1: what is dropped is missing from the sum",
        _turned("    left = np.sum(np.where(kept, weights, 0 * weights), axis=-1, keepdims=True)\n    weights = weights * np.where(left == 0, 1, np.sum(weights, axis=-1, keepdims=True) / np.where(left == 0, 1, left))\n"),
    ),
    Mutant(
        "moe",
        "one_expert_for_all",
        "every token is seen by expert 0, weighted as if by its own: a grouped product that reads the first group's weights",
        edited(mo.moe, ("_expert(x, w_in[e], w_out[e], None", "_expert(x, w_in[0], w_out[e], None")),
    ),
    Mutant(
        "moe",
        "sorted_back_wrongly",
        "the pairs sorted by expert are put back with the permutation instead of its inverse",
        edited(mo.moe_gathered, ("[np.argsort(by_expert)]", "[by_expert]")),
    ),
    Mutant(
        "moe",
        "router_learns_nothing",
        "the router has no gradient: it learns through the weights, dw_e = F_e(x)·dy",
        edited(mo.moe_vjp, ("[\"logits\"].reshape(-1, E)", "[\"logits\"].reshape(-1, E) * 0")),
        of_gradient=True,
    ),
    Mutant(
        "moe",
        "token_learns_nothing_of_the_router",
        "dx lacks what comes through the router: dl W_rᵀ",
        edited(mo.moe_vjp, ("    dx = dx + dlogits @ router.T\n", "")),
        of_gradient=True,
    ),
    Mutant(
        "moe",
        "gradient_without_weight",
        "the experts' gradients lack the weight of the token: do = w_e dy",
        edited(mo.moe_vjp, ("weights[rows, choice][:, None] * dy[rows]  #", "dy[rows]  #")),
        of_gradient=True,
    ),
    Mutant(
        "moe",
        "gate_has_the_other_gradient",
        "the gradients of gate and input are exchanged: da = dh act(g), dg = dh a act'(g)",
        edited(mo.moe_vjp, ("da, dg = dh * act(g), dh * a * slope(g)", "dg, da = dh * act(g), dh * a * slope(g)")),
        of_gradient=True,
    ),
)

_BALANCE = "    return np.asanyarray(logits.shape[-1] * np.sum(f * P, axis=-1))\n"

_LOSSES = (
    Mutant(
        "load_balance_loss",
        "one_for_the_batch",
        "one loss for the tokens of the whole batch: here every batch entry has its own",
        lambda: _one_balance,
        variant=True,
    ),
    Mutant(
        "router_z_loss",
        "one_for_the_batch",
        "one loss for the tokens of the whole batch: here every batch entry has its own",
        lambda: _one_z,
        variant=True,
    ),
    Mutant(
        "load_balance_loss",
        "factor_of_experts_missing",
        "the loss is Σ f P, which falls as 1/E with the number of experts: it is E Σ f P, 1 when balanced",
        edited(lo.load_balance_loss, (_BALANCE, "    return np.asanyarray(np.sum(f * P, axis=-1))\n")),
    ),
    Mutant(
        "load_balance_loss",
        "probabilities_only",
        "the loss is E Σ P²: one factor is the share of choices, f",
        edited(lo.load_balance_loss, (_BALANCE, "    return np.asanyarray(logits.shape[-1] * np.sum(P * P, axis=-1))\n")),
    ),
    Mutant(
        "load_balance_loss",
        "counts_only",
        "the loss is E Σ f², which has no gradient: one factor is the mean probability, P",
        edited(lo.load_balance_loss, (_BALANCE, "    return np.asanyarray(logits.shape[-1] * np.sum(f * f, axis=-1))\n")),
    ),
    Mutant(
        "load_balance_loss",
        "share_of_tokens",
        "f is the share of tokens that chose an expert, so that the loss is k when balanced (transformers'): here it is the share of pairs, and the loss 1",
        edited(lo.load_balance_loss, ("max(experts.shape[-2] * experts.shape[-1], 1)", "max(experts.shape[-2], 1)")),
        variant=True,
    ),
    Mutant(
        "load_balance_loss",
        "first_choice_only",
        "only the first choice of a token is counted: all k are",
        edited(lo.load_balance_loss, ("P, f = _mean_probability(logits), _shares(experts, logits)", "P, f = _mean_probability(logits), _shares(experts[..., :1], logits)")),
        variant=True,
    ),
    Mutant(
        "load_balance_loss",
        "sum_over_tokens",
        "P is the sum of the probabilities over the tokens: it is their mean",
        edited(lo.load_balance_loss, ("np.sum(softmax(logits), axis=-2) / max(logits.shape[-2], 1)", "np.sum(softmax(logits), axis=-2)")),
    ),
    Mutant(
        "load_balance_loss",
        "gradient_not_centred",
        "dl = p f: the softmax's own denominator gives -p (p·f) more",
        edited(lo.load_balance_loss_vjp, ("scale * p * (f - np.sum(p * f, axis=-1, keepdims=True))", "scale * p * f")),
        of_gradient=True,
    ),
    Mutant(
        "load_balance_loss",
        "router_learns_nothing",
        "the loss has no gradient: that of P reaches the router's logits",
        edited(lo.load_balance_loss_vjp, ("{\"logits\": scale * p", "{\"logits\": 0 * scale * p")),
        of_gradient=True,
    ),
    Mutant(
        "router_z_loss",
        "not_squared",
        "the loss is the mean of log Σ e^l: it is the mean of its square",
        edited(lo.router_z_loss, ("np.sum(lse * lse, axis=-1)", "np.sum(lse, axis=-1)")),
    ),
    Mutant(
        "router_z_loss",
        "sum_over_tokens",
        "the loss is the sum over the tokens: it is their mean",
        edited(lo.router_z_loss, ("np.sum(lse * lse, axis=-1) / max(logits.shape[-2], 1)", "np.sum(lse * lse, axis=-1)")),
    ),
    Mutant(
        "router_z_loss",
        "square_of_the_mean",
        "the mean of log Σ e^l is squared: the squares are averaged",
        edited(lo.router_z_loss, ("np.sum(lse * lse, axis=-1) / max(logits.shape[-2], 1)", "(np.sum(lse, axis=-1) / max(logits.shape[-2], 1)) ** 2")),
    ),
    Mutant(
        "router_z_loss",
        "squares_of_the_logits",
        "the loss is the mean square of the logits: it is that of their log-sum-exp",
        edited(lo.router_z_loss, ("lse = logsumexp(logits)  # (..., T)", "lse = np.sqrt(np.sum(logits * logits, axis=-1))")),
    ),
    Mutant(
        "router_z_loss",
        "maximum_for_log_sum_exp",
        "log Σ e^l is replaced by the largest logit, which it exceeds by up to log E",
        edited(lo.router_z_loss, ("lse = logsumexp(logits)  # (..., T)", "lse = np.max(logits, axis=-1)")),
    ),
    Mutant(
        "router_z_loss",
        "overflows",
        "the exponentials overflow: the largest logit is subtracted first",
        edited(lo.router_z_loss, ("lse = logsumexp(logits)  # (..., T)", "lse = np.log(np.sum(np.exp(logits), axis=-1))")),
    ),
    Mutant(
        "router_z_loss",
        "gradient_without_2",
        "the factor 2 of the square's derivative is missing: dl = 2/T lse p",
        edited(lo.router_z_loss_vjp, ("2 * dy[..., None, None]", "dy[..., None, None]")),
        of_gradient=True,
    ),
    Mutant(
        "router_z_loss",
        "gradient_to_all_alike",
        "every logit of a token gets the same gradient: that of log Σ e^l is softmax(l)",
        edited(lo.router_z_loss_vjp, ("lse * softmax(logits)", "lse * (0 * logits + 1) / logits.shape[-1]")),
        of_gradient=True,
    ),
)

_EXPERT_CHOICE = (
    Mutant(
        "expert_choice",
        "ties_elsewhere",
        "of equal probabilities other tokens are taken (torch.topk promises no order): ties go to the earlier token",
        lambda: ec.expert_choice,
        variant=True,
        hidden=EVERYWHERE,
        undecided=lambda call: _ties(np.swapaxes(softmax(call["logits"]), -1, -2), call["capacity"]),
        undecided_axis="E",
    ),
    Mutant(
        "expert_choice",
        "softmax_over_tokens",
        "the softmax runs over the tokens: it runs over the experts, for each token",
        edited(ec.expert_choice, ("p = np.swapaxes(softmax(logits), -1, -2)  # (..., E, T)", "p = softmax(np.swapaxes(logits, -1, -2)) if logits.size else np.swapaxes(logits, -1, -2)")),
    ),
    Mutant(
        "expert_choice",
        "chosen_by_logits",
        "the tokens are chosen by their logits: by their probabilities, in which a token's other logits count",
        edited(ec.expert_choice, ("tokens = np.argsort(-p, axis=-1", "tokens = np.argsort(-np.swapaxes(logits, -1, -2), axis=-1")),
    ),
    Mutant(
        "expert_choice",
        "ties_to_the_later_token",
        "among equals the later token is taken: the earlier one comes first",
        edited(ec.expert_choice, ("tokens = np.argsort(-p, axis=-1, kind=\"stable\")[", "tokens = p.shape[-1] - 1 - np.argsort(-p[..., ::-1], axis=-1, kind=\"stable\")[")),
        variant=True,
    ),
    Mutant(
        "expert_choice",
        "by_place",
        "the tokens come in the order of the sequence: they come by falling weight",
        edited(ec.expert_choice, ("[..., :capacity]  # (..., E, C)\n    return", "[..., :capacity]\n    tokens = np.sort(tokens, axis=-1)\n    return")),
        variant=True,
    ),
    Mutant(
        "expert_choice",
        "renormalised",
        "the weights of an expert's tokens are divided by their sum: they are probabilities of experts, and stay what they are",
        edited(ec.expert_choice, ("return np.take_along_axis(p, tokens, axis=-1), tokens\n", "w = np.take_along_axis(p, tokens, axis=-1)\n    return w / np.sum(w, axis=-1, keepdims=True), tokens\n")),
    ),
    Mutant(
        "expert_choice",
        "gradient_to_the_chosen_only",
        "only the chosen pairs get a gradient: a chosen probability depends on all logits of its token",
        edited(ec.expert_choice_vjp, ("p * (dp - np.sum(p * dp, axis=-1, keepdims=True))", "p * (1 - p) * dp")),
        of_gradient=True,
    ),
)

MUTANTS = _ROUTE + _MOE + _LOSSES + _EXPERT_CHOICE
