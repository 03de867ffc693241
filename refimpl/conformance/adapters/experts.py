"""Signatures of mixtures of experts: transformers."""

import types
from collections.abc import Callable
from typing import Any

from refimpl.conformance.adapters.common import like_operator, refuse

__all__ = ["mixtral_block", "mixtral_router"]


@like_operator("moe")
def mixtral_block(block: Callable, config: Callable) -> Callable:
    """MixtralSparseMoeBlock of transformers, with its configuration's class: gates and inputs of an expert in one matrix, rows first."""

    def moe(x, router, w_in, w_out, w_gate=None, *, k, activation="silu"):
        import torch

        refuse(w_gate is None, "takes experts with a gate")
        experts, d, f = w_in.shape
        sizes = {"hidden_size": d, "intermediate_size": f, "num_local_experts": experts, "num_experts_per_tok": k}
        settings = config(**sizes, hidden_act=activation, router_jitter_noise=0.0)
        settings._experts_implementation = "eager"
        weights = {
            "gate.weight": router.T,
            "experts.gate_up_proj": torch.cat([w_gate, w_in], dim=-1).transpose(1, 2),
            "experts.down_proj": w_out.transpose(1, 2),
        }
        tokens = x.reshape(1, -1, d)
        return torch.func.functional_call(block(settings), weights, (tokens,)).reshape(x.shape)

    return moe


@like_operator("route")
def mixtral_router(router: Any) -> Callable:
    """MixtralTopKRouter of transformers, whose weight is the identity: then its logits are what it is given."""

    def route(logits, k):
        import torch

        experts = logits.shape[-1]
        itself = types.SimpleNamespace(hidden_dim=experts, weight=torch.eye(experts, dtype=logits.dtype), top_k=k)
        _, weights, chosen = router.forward(itself, logits)
        return tuple(x.reshape(*logits.shape[:-1], k) for x in (weights, chosen))

    return route
