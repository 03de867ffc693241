"""Signatures of attention: torch, flash-attn, JAX, transformers, ONNX."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.conformance.adapters.common import fold, leading, like_operator, refuse, spread, stock, unfold


class _Heads:
    """q, k and v as (batch, heads, time, features), and the way back."""

    def __init__(self, q, k, v):
        self.one_head = q.ndim == 2
        q, k, v = (x[None] if self.one_head else x for x in (q, k, v))
        self.lead = leading((q, 3), (k, 3), (v, 3))
        self.q, self.k, self.v = (fold(x, 3, self.lead) for x in (q, k, v))
        self.n, self.m, self.heads = q.shape[-2], k.shape[-2], q.shape[-3]
        self.grouped = q.shape[-3] != k.shape[-3]

    def pairs(self, x):
        """A mask or bias as (batch, heads, n, m)."""
        if x is None:
            return None
        return fold(spread(x, (*self.lead, self.heads, self.n, self.m)), 3, self.lead)

    def back(self, o):
        o = unfold(o, self.lead)
        return o[..., 0, :, :] if self.one_head else o

    def starts_aligned(self, offset: int | None) -> bool:
        """Whether query 0 stands at key 0, which is all that ``is_causal`` can say."""
        return offset == 0 if offset is not None else self.n == self.m

    def allowed(self, causal: bool, offset: int | None, window, mask):
        """All rules about pairs as one mask (n, m) or (batch, heads, n, m), or None."""
        rule = np.ones((self.n, self.m), dtype=bool)
        p = np.arange(self.n)[:, None] + (self.m - self.n if offset is None else offset)
        j = np.arange(self.m)
        if causal:
            rule &= j <= p
        if window is not None:
            left, right = window
            rule &= (j >= p - left) if left is not None else True
            rule &= (j <= p + right) if right is not None else True
        if mask is not None:
            return self.pairs(mask) & stock(rule, mask)
        return None if rule.all() and not causal and window is None else stock(rule, self.q)


@like_operator("attention")
def torch_sdpa(f: Callable) -> Callable:
    """``f(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)``, torch's fused attention.

    ``is_causal`` aligns the starts; where the contract aligns otherwise, a mask is passed instead.
    """

    def attention(q, k, v, *, causal=False, offset=None, mask=None, bias=None, scale=None):
        h = _Heads(q, k, v)
        options: dict[str, Any] = {} if scale is None else {"scale": scale}
        if h.grouped:
            options["enable_gqa"] = True
        if causal and mask is None and bias is None and h.starts_aligned(offset):
            return h.back(f(h.q, h.k, h.v, is_causal=True, **options))
        rule = h.allowed(causal, offset, None, mask)
        if bias is not None:
            both = h.pairs(bias)
            rule = both if rule is None else both.masked_fill(~rule, -math.inf)
        return h.back(f(h.q, h.k, h.v, attn_mask=rule, **options))

    return attention


@like_operator("attention")
def flash_attn(f: Callable) -> Callable:
    """``f(q, k, v, softmax_scale, causal, window_size, softcap)`` on (batch, time, heads, features), as flash_attn_func."""

    def attention(q, k, v, *, causal=False, window=None, scale=None, softcap=None):
        h = _Heads(q, k, v)
        options: dict[str, Any] = {"causal": causal}
        if scale is not None:
            options["softmax_scale"] = scale
        if softcap is not None:
            options["softcap"] = softcap
        if window is not None:
            options["window_size"] = tuple(-1 if w is None else w for w in window)
        return h.back(f(*(x.swapaxes(1, 2) for x in (h.q, h.k, h.v)), **options).swapaxes(1, 2))

    return attention


@like_operator("attention")
def jax_attention(f: Callable) -> Callable:
    """``f(query, key, value, bias, mask, scale=, is_causal=, local_window_size=)`` on (batch, time, heads, features), as JAX's.

    ``is_causal`` and ``local_window_size`` count from the starts; where the contract aligns otherwise, causality is
    passed as a mask and a window is not applicable.
    """

    def attention(q, k, v, *, causal=False, offset=None, window=None, mask=None, bias=None, scale=None):
        h = _Heads(q, k, v)
        aligned = h.starts_aligned(offset)
        refuse(h.q.shape[-1] != h.v.shape[-1], "keys and values are of one size")
        refuse(bias is not None and bool((bias == -math.inf).any()), "masked by a finite number, so that a bias of -inf is another thing")
        refuse(window is not None and (not aligned or None in window), "local_window_size counts from the starts, and both ways")
        options: dict[str, Any] = {} if scale is None else {"scale": scale}
        if window is not None:
            options["local_window_size"] = tuple(window)
        if causal and aligned:
            options["is_causal"] = True
        rule = h.allowed(causal and not aligned, offset, None, mask)
        if rule is not None:
            options["mask"] = spread(rule, (h.q.shape[0], h.heads, h.n, h.m))
        o = f(*(x.swapaxes(1, 2) for x in (h.q, h.k, h.v)), bias=h.pairs(bias), **options)
        return h.back(o.swapaxes(1, 2))

    return attention


@like_operator("attention")
def eager_attention(f: Callable, *, softcap: bool = False, sinks: bool = False) -> Callable:
    """``f(module, query, key, value, attention_mask, scaling, ...) -> (output, weights)``, the eager function of transformers' models.

    The mask is additive, with the most negative number where a pair is not allowed, as those models build it. `softcap`
    and `sinks` say that this model's function has them.
    """
    import types

    def call(q, k, v, causal, offset, window, mask, bias, scale, sink=None, **options):
        h = _Heads(q, k, v)
        module = types.SimpleNamespace(num_key_value_groups=h.heads // h.k.shape[1] if h.k.shape[1] else 1, training=False, head_dim=h.q.shape[-1])
        if sinks:
            refuse(sink is None, "this model always has sinks")
            module.sinks = spread(sink, (h.heads,))
        refuse(bias is not None and bool((bias == -math.inf).any()), "these models mask with a finite number, never with -inf")
        rule, additive = h.allowed(causal, offset, window, mask), h.pairs(bias)
        if rule is not None:
            additive = h.q.new_zeros((1, 1, h.n, h.m)) if additive is None else additive
            additive = additive.masked_fill(~rule, _lowest(h.q))
        o, _ = f(module, h.q, h.k, h.v, additive, scaling=1 / math.sqrt(h.q.shape[-1]) if scale is None else scale, dropout=0.0, **options)
        return h.back(o.swapaxes(1, 2))

    if softcap:

        def capped(q, k, v, *, causal=False, offset=None, window=None, mask=None, bias=None, scale=None, softcap=None):
            return call(q, k, v, causal, offset, window, mask, bias, scale, softcap=softcap)

        return capped

    if sinks:

        def sinking(q, k, v, *, causal=False, offset=None, window=None, mask=None, bias=None, scale=None, sink=None):
            return call(q, k, v, causal, offset, window, mask, bias, scale, sink=sink)

        return sinking

    def attention(q, k, v, *, causal=False, offset=None, window=None, mask=None, bias=None, scale=None):
        return call(q, k, v, causal, offset, window, mask, bias, scale)

    return attention


def _lowest(x) -> float:
    import torch

    return torch.finfo(x.dtype).min


@like_operator("attention")
def onnx_attention(f: Callable) -> Callable:
    """ONNX's operator Attention, given as ``f(inputs, outputs, attributes) -> list`` (see `onnx_operator`).

    ``is_causal`` and the window count from the starts unless there is a cache: with more keys than queries the first
    ones are passed as the cache, which aligns the ends. Attributes are float32.
    """

    def attention(q, k, v, *, causal=False, window=None, mask=None, bias=None, scale=None, softcap=None):
        h = _Heads(q, k, v)
        refuse(h.m == 0, "needs a key")
        refuse(h.m < h.n and (causal or window is not None), "with fewer keys than queries, causality counts from the starts")
        refuse(q.dtype == np.float64 and any(x is not None and float(np.float32(x)) != x for x in (scale, softcap)), "attributes are float32")
        attributes: dict[str, Any] = {"is_causal": int(causal)}
        if scale is not None:
            attributes["scale"] = float(scale)
        if softcap is not None:
            attributes["softcap"] = float(softcap)
        if window is not None:
            attributes |= {name: -1 if w is None else int(w) for name, w in zip(("left_window_size", "right_window_size"), window, strict=True)}
        inputs = {"Q": h.q, "K": h.k, "V": h.v}
        rule = h.pairs(mask)
        if bias is not None:
            rule = h.pairs(bias) if rule is None else np.where(rule, h.pairs(bias), q.dtype.type(-np.inf))
        if rule is not None:
            inputs["attn_mask"] = rule
        if (causal or window is not None) and h.m > h.n:
            past = h.m - h.n
            inputs |= {"K": h.k[:, :, past:], "V": h.v[:, :, past:], "past_key": h.k[:, :, :past], "past_value": h.v[:, :, :past]}
            return h.back(f(inputs, ("Y", "present_key", "present_value"), attributes)[0])
        return h.back(f(inputs, ("Y",), attributes)[0])

    return attention


def onnx_operator(name: str) -> Callable:
    """ONNX's reference implementation of an operator as ``f(inputs, outputs, attributes) -> list``."""

    @functools.lru_cache(maxsize=512)
    def model(inputs: tuple[str, ...], outputs: tuple[str, ...], attributes: tuple, order: tuple[str, ...]):
        import onnx
        from onnx.reference import ReferenceEvaluator

        node = onnx.helper.make_node(name, [i if i in inputs else "" for i in order], list(outputs), **dict(attributes))
        values = [onnx.helper.make_tensor_value_info(i, onnx.TensorProto.FLOAT, None) for i in inputs]
        results = [onnx.helper.make_tensor_value_info(o, onnx.TensorProto.FLOAT, None) for o in outputs]
        graph = onnx.helper.make_graph([node], name, values, results)
        opset = onnx.helper.make_opsetid("", onnx.defs.get_schema(name).since_version)
        return ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[opset]))

    def call(inputs: dict, outputs: tuple[str, ...], attributes: dict) -> list:
        import onnx

        formal = [i.name for i in onnx.defs.get_schema(name).inputs]
        order = tuple(formal[: 1 + max(formal.index(i) for i in inputs)])
        return model(tuple(inputs), outputs, tuple(sorted(attributes.items())), order).run(None, inputs)

    call.__name__ = name
    return call


@like_operator("rope")
def llama_rope(embedding: Callable, apply: Callable, config: Callable) -> Callable:
    """LlamaRotaryEmbedding and apply_rotary_pos_emb of transformers, with their configuration's class: angles from positions, then the turn."""

    def rope(x, positions, *, base=10000.0):
        d = x.shape[-1]
        settings = config(hidden_size=d, num_attention_heads=1, head_dim=d, rope_parameters={"rope_type": "default", "rope_theta": base})
        cos, sin = embedding(settings)(x, positions.reshape(-1, positions.shape[-1]))
        cos, sin = (t.reshape(*positions.shape, d) for t in (cos, sin))
        one_head = x.unsqueeze(-3)
        return apply(one_head, one_head, cos, sin, unsqueeze_dim=-3)[0].squeeze(-3)

    return rope
