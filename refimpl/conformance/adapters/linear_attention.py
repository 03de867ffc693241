"""Signatures of linear attention: ONNX, opengdn, fla, transformers."""

import math
from collections.abc import Callable
from typing import Any

from refimpl.conformance.adapters.common import fold, leading, like_operator, refuse, unfold


@like_operator("linear_attention")
def onnx_linear_attention(f: Callable) -> Callable:
    """ONNX's operator LinearAttention (see `onnx_operator`), on (batch, time, heads · features). Computes in float32."""

    def linear_attention(q, k, v, *, decay=None, beta=None, scale=None, state=None, return_state=False):
        one_head = q.ndim == 2
        arrays: list[Any] = [None if x is None else x[None] if one_head else x for x in (q, k, v, decay, beta, state)]
        q, k, v, decay, beta, state = arrays
        per_channel = decay is not None and decay.ndim == k.ndim
        cores = (3, 3, 3, 3 if per_channel else 2, 2, 3)
        lead = leading(*((x, core) for x, core in zip((q, k, v, decay, beta, state), cores, strict=True) if x is not None))
        H, G = q.shape[-3], k.shape[-3]
        refuse(per_channel and k.shape[-1] == 1, "one channel cannot be told from one decay per head")

        def packed(x, core):  # (batch, time, heads · features)
            x = fold(x, core, lead)
            return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], x.shape[1] * math.prod(x.shape[3:]))

        inputs = {"query": packed(q, 3), "key": packed(k, 3), "value": packed(v, 3)}
        if decay is not None:
            inputs["decay"] = packed(decay, 3 if per_channel else 2)
        if beta is not None:
            inputs["beta"] = packed(beta, 2)
        if state is not None:
            inputs["past_state"] = fold(state, 3, lead)
        rule = ("gated_delta" if beta is not None else "gated") if decay is not None else "delta" if beta is not None else "linear"
        attributes: dict[str, Any] = {"q_num_heads": H, "kv_num_heads": G, "update_rule": rule}
        if scale is not None:
            refuse(scale == 0, "a scale of 0 reads as none")
            attributes["scale"] = float(scale)
        o, last = f(inputs, ("output", "present_state"), attributes)
        o = unfold(o.reshape(o.shape[0], o.shape[1], H, v.shape[-1]).swapaxes(1, 2), lead)
        last = unfold(last, lead)
        if one_head:
            o, last = o[..., 0, :, :], last[..., 0, :, :]
        return (o, last) if return_state else o

    return linear_attention


@like_operator("linear_attention")
def gated_delta_rule(f: Callable, *, alpha: bool = False) -> Callable:
    """``f(q, k, v, g, beta, initial_state=, output_final_state=)`` on (batch, time, heads, features), as fla's and transformers'.

    `alpha`: the decay is passed in (0, 1), the state transposed, nothing scaled, as the package opengdn has it.
    """

    def linear_attention(q, k, v, *, decay=None, beta=None, state=None, return_state=False):
        refuse(beta is None, "this is the delta rule")
        refuse(decay is not None and decay.ndim == k.ndim, "one decay per head")
        refuse(q.shape[-2] == 0, "needs a step")
        one_head = q.ndim == 2
        given: list[Any] = [None if x is None else x[None] if one_head else x for x in (q, k, v, decay, beta, state)]
        q, k, v, decay, beta, state = given
        refuse(q.shape[-3] != k.shape[-3], "q has k's heads")
        lead = leading(*((x, core) for x, core in zip(given, (3, 3, 3, 2, 2, 3), strict=True) if x is not None))
        decay = beta * 0 if decay is None else decay
        d = q.shape[-1]
        arrays = [fold(x, 3, lead).transpose(1, 2) for x in (q, k, v)] + [fold(x, 2, lead).transpose(1, 2) for x in (decay, beta)]
        first = None if state is None else fold(state, 3, lead)
        if alpha:
            arrays[0], arrays[3] = arrays[0] / math.sqrt(d), arrays[3].exp()
            o, last = f(*arrays, state=None if first is None else first.transpose(-1, -2))
            last = last.transpose(-1, -2)
        else:
            o, last = f(*arrays, initial_state=first, output_final_state=True)
        o, last = unfold(o.transpose(1, 2), lead), unfold(last, lead)
        if one_head:
            o, last = o[..., 0, :, :], last[..., 0, :, :]
        return (o, last) if return_state else o

    return linear_attention


@like_operator("wkv")
def rwkv_attention(f: Callable) -> Callable:
    """rwkv_linear_attention_cpu of transformers: the decay is exp(-exp(time_decay)), of three-dimensional inputs."""

    def wkv(k, v, w, u, *, state=None, return_state=False):
        lead = leading((k, 2), (v, 2), *((x, 1) for x in state or ()))
        first = None if state is None else [fold(x, 1, lead) for x in state]
        y, last = f(w.log(), u, fold(k, 2, lead), fold(v, 2, lead), state=first, return_state=return_state)
        y = unfold(y, lead)
        return (y, tuple(unfold(x, lead) for x in last)) if return_state else y

    return wkv
