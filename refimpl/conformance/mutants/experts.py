"""Mistakes in mixtures of experts: who is chosen, with what weight, who is dropped, and what the router learns from it."""

from refimpl.conformance.mutants import Mutant, edited
from refimpl.ops.experts import route as ro

_CHOICE = "    experts = np.argsort(-logits, axis=-1, kind=\"stable\")[..., :k]  # (..., T, k)\n"
_OVER_CHOSEN = "    if order == \"topk_softmax\" or renormalize:\n        return softmax(chosen)\n    return np.take"

_ROUTE = (
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

MUTANTS = _ROUTE
