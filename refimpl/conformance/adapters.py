"""Well-known signatures, turned into the contract's.

An adapter takes a function with a published signature and returns one that `refimpl.check` can call: it moves axes, says
the contract's names, and translates conventions that both sides document (where a mask starts, how a state is scaled).
It never repairs a result. What a signature cannot express, its adapter leaves out of its own, or refuses with
NotImplementedError: not applicable, and counted as such.

    refimpl.check("attention", refimpl.adapters.flash_attn(my_kernel), framework="torch", device="cuda", dtypes=["bfloat16"])

`refimpl.conformance.survey` holds the public functions themselves against the reference by these.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np

# -- what adapters share ---------------------------------------------------------------------------------------------


def _is_torch(x: Any) -> bool:
    return type(x).__module__.partition(".")[0] == "torch"


def _is_jax(x: Any) -> bool:
    return not isinstance(x, np.ndarray) and hasattr(x, "at")


def _spread(x, shape: tuple[int, ...]):
    """Broadcast, in the array's own framework."""
    if _is_torch(x):
        return x.expand(shape)
    if _is_jax(x):
        import jax.numpy as jnp

        return jnp.broadcast_to(x, shape)
    return np.broadcast_to(x, shape)


def _lead(*pairs: tuple[Any, int]) -> tuple[int, ...]:
    """The batch axes common to arrays, each given with its number of other axes."""
    return np.broadcast_shapes(*(tuple(x.shape)[: x.ndim - core] for x, core in pairs if x is not None))


def _fold(x, core: int, lead: tuple[int, ...]):
    """All batch axes as one: ``(batch, *core)``."""
    if x is None:
        return None
    shape = tuple(x.shape)[x.ndim - core :]
    return _spread(x, (*lead, *shape)).reshape((math.prod(lead), *shape))


def _unfold(x, lead: tuple[int, ...]):
    return x.reshape((*lead, *tuple(x.shape)[1:]))


def _refuse(condition: bool, why: str) -> None:
    if condition:
        raise NotImplementedError(why)


def _stock(array, like):
    """A NumPy array in another's framework, on its device."""
    if _is_torch(like):
        import torch

        return torch.from_numpy(np.ascontiguousarray(array)).to(like.device)
    if _is_jax(like):
        import jax.numpy as jnp

        return jnp.asarray(array)
    return array


def _like_operator(operator: str) -> Callable:
    """Name an adapter's result after the operator and the function adapted, for reports."""

    def name(adapter: Callable) -> Callable:
        @functools.wraps(adapter)
        def build(f, *args, **kwargs):
            candidate = adapter(f, *args, **kwargs)
            candidate.__name__ = candidate.__qualname__ = f"{adapter.__name__}({getattr(f, '__name__', type(f).__name__)})"
            return candidate

        build.operator = operator  # type: ignore[attr-defined]
        return build

    return name


# -- attention -------------------------------------------------------------------------------------------------------


class _Heads:
    """q, k and v as (batch, heads, time, features), and the way back."""

    def __init__(self, q, k, v):
        self.one_head = q.ndim == 2
        q, k, v = (x[None] if self.one_head else x for x in (q, k, v))
        self.lead = _lead((q, 3), (k, 3), (v, 3))
        self.q, self.k, self.v = (_fold(x, 3, self.lead) for x in (q, k, v))
        self.n, self.m, self.heads = q.shape[-2], k.shape[-2], q.shape[-3]
        self.grouped = q.shape[-3] != k.shape[-3]

    def pairs(self, x):
        """A mask or bias as (batch, heads, n, m)."""
        if x is None:
            return None
        return _fold(_spread(x, (*self.lead, self.heads, self.n, self.m)), 3, self.lead)

    def back(self, o):
        o = _unfold(o, self.lead)
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
            return self.pairs(mask) & _stock(rule, mask)
        return None if rule.all() and not causal and window is None else _stock(rule, self.q)


@_like_operator("attention")
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


@_like_operator("attention")
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


@_like_operator("attention")
def jax_attention(f: Callable) -> Callable:
    """``f(query, key, value, bias, mask, scale=, is_causal=, local_window_size=)`` on (batch, time, heads, features), as JAX's.

    ``is_causal`` and ``local_window_size`` count from the starts; where the contract aligns otherwise, causality is
    passed as a mask and a window is not applicable.
    """

    def attention(q, k, v, *, causal=False, offset=None, window=None, mask=None, bias=None, scale=None):
        h = _Heads(q, k, v)
        aligned = h.starts_aligned(offset)
        _refuse(h.q.shape[-1] != h.v.shape[-1], "keys and values are of one size")
        _refuse(bias is not None and bool((bias == -math.inf).any()), "masked by a finite number, so that a bias of -inf is another thing")
        _refuse(window is not None and (not aligned or None in window), "local_window_size counts from the starts, and both ways")
        options: dict[str, Any] = {} if scale is None else {"scale": scale}
        if window is not None:
            options["local_window_size"] = tuple(window)
        if causal and aligned:
            options["is_causal"] = True
        rule = h.allowed(causal and not aligned, offset, None, mask)
        if rule is not None:
            options["mask"] = _spread(rule, (h.q.shape[0], h.heads, h.n, h.m))
        o = f(*(x.swapaxes(1, 2) for x in (h.q, h.k, h.v)), bias=h.pairs(bias), **options)
        return h.back(o.swapaxes(1, 2))

    return attention


@_like_operator("attention")
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
            _refuse(sink is None, "this model always has sinks")
            module.sinks = _spread(sink, (h.heads,))
        _refuse(bias is not None and bool((bias == -math.inf).any()), "these models mask with a finite number, never with -inf")
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


@_like_operator("attention")
def onnx_attention(f: Callable) -> Callable:
    """ONNX's operator Attention, given as ``f(inputs, outputs, attributes) -> list`` (see `onnx_operator`).

    ``is_causal`` and the window count from the starts unless there is a cache: with more keys than queries the first
    ones are passed as the cache, which aligns the ends. Attributes are float32.
    """

    def attention(q, k, v, *, causal=False, window=None, mask=None, bias=None, scale=None, softcap=None):
        h = _Heads(q, k, v)
        _refuse(h.m == 0, "needs a key")
        _refuse(h.m < h.n and (causal or window is not None), "with fewer keys than queries, causality counts from the starts")
        _refuse(q.dtype == np.float64 and any(x is not None and float(np.float32(x)) != x for x in (scale, softcap)), "attributes are float32")
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


# -- recurrences and convolutions ------------------------------------------------------------------------------------


@_like_operator("linear_recurrence")
def lfilter(f: Callable) -> Callable:
    """``f(b, a, x, axis, zi) -> (y, zf)``, SciPy's filter: y_t = a y_{t-1} + x_t is one with constant a, a channel at a time."""

    def linear_recurrence(a, b, *, state=None, reverse=False, return_state=False):
        _refuse(a.ndim > 1 and not np.array_equal(a, np.broadcast_to(a[..., :1, :], a.shape), equal_nan=True), "a filter's decay is constant in time")
        _refuse(b.shape[-2] == 0, "a filter needs a sample")
        a = a if a.ndim == 1 else a[..., 0, :]
        lead = _lead((a, 1), (b, 2), *(((state, 1),) if state is not None else ()))
        T, c = b.shape[-2:]
        rows = [np.broadcast_to(x, (*lead, c)).reshape(-1) for x in (a, np.zeros_like(b[..., 0, :]) if state is None else state)]
        x = np.moveaxis(np.broadcast_to(b, (*lead, T, c)), -2, -1).reshape(-1, T)
        x = x[:, ::-1] if reverse else x
        one = np.ones(1, rows[0].dtype)
        y = np.stack([f(one, np.array([1, -decay], one.dtype), series, zi=np.array([decay * h]))[0] for decay, h, series in zip(*rows, x, strict=True)])
        last = y[:, -1].reshape(*lead, c)
        y = np.moveaxis((y[:, ::-1] if reverse else y).reshape(*lead, c, T), -1, -2)
        return (y, last) if return_state else y

    return linear_recurrence


@_like_operator("linear_recurrence")
def pscan(f: Callable) -> Callable:
    """``f(A, X)`` on (batch, time, features, state), as mambapy's parallel scan."""

    def linear_recurrence(a, b):
        a, b, lead = _scanned(a, b)
        return _unfold(f(a[..., None], b[..., None])[..., 0], lead)

    return linear_recurrence


@_like_operator("linear_recurrence")
def gates_and_tokens(f: Callable) -> Callable:
    """``f(gates, tokens, reverse=)`` on (batch, features, time), as accelerated-scan's."""

    def linear_recurrence(a, b, *, reverse=False):
        a, b, lead = _scanned(a, b)
        _refuse(b.shape[-2] < 2, "needs two steps")
        h = f(a.swapaxes(-1, -2).contiguous(), b.swapaxes(-1, -2).contiguous(), reverse=reverse)
        return _unfold(h.swapaxes(-1, -2), lead)

    return linear_recurrence


@_like_operator("linear_recurrence")
def associative_scan(f: Callable) -> Callable:
    """``f(combine, (a, b), reverse=, axis=)``, as JAX's scan with an associative operator."""

    def combine(first, then):
        return then[0] * first[0], then[0] * first[1] + then[1]

    def linear_recurrence(a, b, *, reverse=False):
        a, b, lead = _scanned(a, b)
        return _unfold(f(combine, (a, b), reverse=reverse, axis=1)[1], lead)

    return linear_recurrence


def _scanned(a, b):
    """Decay and input as (batch, time, features) of one shape."""
    _refuse(b.shape[-2] == 0, "needs a step")
    a = a if a.ndim > 1 else a[None]
    lead = _lead((a, 2), (b, 2))
    shape = (*lead, *tuple(b.shape)[-2:])
    return _fold(_spread(a, shape), 2, lead), _fold(_spread(b, shape), 2, lead), lead


@_like_operator("long_conv")
def fftconvolve(f: Callable) -> Callable:
    """``f(in1, in2, mode="full", axes=)``, as SciPy's fftconvolve and oaconvolve, of which the first T samples are kept."""

    def long_conv(u, kernel):
        T, K = u.shape[-2], kernel.shape[-2]
        _refuse(T == 0 or K == 0, "an empty convolution has no shape there")
        _refuse(u.dtype.kind == "c" or kernel.dtype.kind == "c", "real signals only")
        lead = _lead((u, 2), (kernel, 2))
        u, kernel = _spread(u, (*lead, *tuple(u.shape)[-2:])), _spread(kernel, (*lead, *tuple(kernel.shape)[-2:]))
        return f(u, kernel, mode="full", axes=-2)[..., :T, :]

    return long_conv


@_like_operator("causal_conv1d")
def causal_conv1d_fn(f: Callable) -> Callable:
    """``f(x, weight, bias, activation=)`` on (batch, channels, time), as causal_conv1d_fn."""

    def causal_conv1d(x, weight, bias=None, *, activation=None):
        _refuse(x.shape[-2] == 0, "needs a step")
        lead = _lead((x, 2))
        return _unfold(f(_fold(x, 2, lead).swapaxes(-1, -2), weight, bias, activation=activation).swapaxes(-1, -2), lead)

    return causal_conv1d


@_like_operator("causal_conv1d")
def onnx_causal_conv(f: Callable) -> Callable:
    """ONNX's operator CausalConvWithState (see `onnx_operator`), on (batch, channels, time)."""

    def causal_conv1d(x, weight, bias=None, *, activation=None, state=None, return_state=False):
        _refuse(x.shape[-2] == 0, "needs a step")
        _refuse(weight.shape[-1] == 1 and (state is not None or return_state), "with one tap there is no state")
        lead = _lead((x, 2), *(((state, 2),) if state is not None else ()))
        inputs = {"input": _fold(x, 2, lead).swapaxes(-1, -2), "weight": weight[:, None]}
        if bias is not None:
            inputs["bias"] = bias
        if state is not None:
            inputs["past_state"] = _fold(state, 2, lead).swapaxes(-1, -2)
        y, last = f(inputs, ("output", "present_state"), {} if activation is None else {"activation": activation})
        y = _unfold(y.swapaxes(-1, -2), lead)
        return (y, _unfold(last.swapaxes(-1, -2), lead)) if return_state else y

    return causal_conv1d


# -- state space models ----------------------------------------------------------------------------------------------


@_like_operator("discretize")
def cont2discrete(f: Callable) -> Callable:
    """``f((A, B, C, D), dt, method) -> (A, B, C, D, dt)``, SciPy's, a system at a time. Its C and D are not looked at."""
    methods = {"zoh": "zoh", "bilinear": "bilinear", "euler": "euler", "backward_euler": "backward_diff"}

    def discretize(A, B, dt, *, method="zoh"):
        _refuse(method not in methods, f"has no method {method!r}")
        n = A.shape[-1]
        _refuse(n == 0, "needs a state")
        vector = B.ndim < A.ndim or B.shape[-2:-1] != (n,) or (B.ndim == A.ndim and B.ndim > 2 and B.shape[:-1] == A.shape[:-2] and B.shape[-1] == n and B.shape[-2] != n)
        core = 1 if vector else 2
        dt = np.asarray(dt, dtype=A.real.dtype)
        lead = _lead((A, 2), (B, core), (dt, 0))
        A, B, dt = _fold(A, 2, lead), _fold(B, core, lead), _fold(dt, 0, lead)
        m = 1 if vector else B.shape[-1]
        systems = [f((a, b.reshape(n, m), np.zeros((1, n)), np.zeros((1, m))), float(step), method=methods[method])[:2] for a, b, step in zip(A, B, dt, strict=True)]
        if not systems:
            return A.reshape(*lead, n, n), B.reshape(*lead, *B.shape[1:])
        return np.stack([a for a, _ in systems]).reshape(*lead, n, n), np.stack([b.reshape(B.shape[1:]) for _, b in systems]).reshape(*lead, *B.shape[1:])

    return discretize


@_like_operator("selective_scan")
def mamba_ssm(f: Callable, *, groups: bool = True) -> Callable:
    """``f(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)`` on (batch, channels, time), as mamba_ssm's.

    There is no initial state. `groups`: B and C may be (batch, groups, state, time).
    """

    def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, *, delta_softplus=False, return_state=False):
        _refuse(any(x.is_complex() for x in (A, B, C)), "complex B and C are laid out otherwise")
        _refuse(u.shape[-2] == 0, "needs a step")
        core = 2 if B.ndim <= u.ndim else 3
        _refuse(core == 3 and not groups, "B and C are shared by all channels")
        lead = _lead((u, 2), (delta, 2), (B, core), (C, core), *(((z, 2),) if z is not None else ()))
        u, delta, z = (None if x is None else _fold(x, 2, lead).swapaxes(-1, -2) for x in (u, delta, z))
        B, C = (_fold(x, core, lead) for x in (B, C))
        B, C = (x.swapaxes(-1, -2) if core == 2 else x.permute(0, 2, 3, 1) for x in (B, C))
        options: dict[str, Any] = {"D": D, "z": z, "delta_bias": delta_bias, "delta_softplus": delta_softplus}
        y = f(u, delta, A, B, C, **options, **({"return_last_state": True} if return_state else {}))
        if return_state:
            return _unfold(y[0].swapaxes(-1, -2), lead), _unfold(y[1], lead)
        return _unfold(y.swapaxes(-1, -2), lead)

    return selective_scan


@_like_operator("selective_scan")
def mambapy_scan(f: Callable) -> Callable:
    """``f(x, delta, A, B, C, D)`` on (batch, time, channels), after the softplus: mambapy's MambaBlock.selective_scan."""

    def selective_scan(u, delta, A, B, C, D=None):
        _refuse(B.ndim > u.ndim, "B and C are shared by all channels")
        _refuse(u.shape[-2] == 0, "needs a step")
        _refuse(A.is_complex(), "y = 2 Re(C h) is the caller's to take")
        lead = _lead((u, 2), (delta, 2), (B, 2), (C, 2))
        u, delta, B, C = (_fold(x, 2, lead) for x in (u, delta, B, C))
        return _unfold(f(u, delta, A, B, C, A.new_zeros(A.shape[0]) if D is None else D), lead)

    return selective_scan


@_like_operator("ssd")
def chunk_scan(f: Callable, *, chunk: int = 16) -> Callable:
    """``f(x, dt, A, B, C, chunk, D, dt_bias, initial_states, dt_softplus, dt_limit, return_final_states)``, as mamba_chunk_scan_combined.

    On (batch, time, heads, features); states there are transposed.
    """

    def ssd(x, dt, A, B, C, D=None, dt_bias=None, *, dt_softplus=False, dt_limit=(0.0, math.inf), state=None, return_state=False):
        _refuse(x.shape[-2] == 0, "needs a step")
        one_head = x.ndim == 2
        A, D, dt_bias = (None if v is None else v.reshape(-1) for v in (A, D, dt_bias))
        if one_head:
            x, dt, B, C, state = (None if v is None else v[None] for v in (x, dt, B, C, state))
        lead = _lead((x, 3), (dt, 2), (B, 3), (C, 3), *(((state, 3),) if state is not None else ()))
        x, B, C = (_fold(v, 3, lead).swapaxes(1, 2) for v in (x, B, C))
        options: dict[str, Any] = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit, "return_final_states": True}
        if state is not None:
            options["initial_states"] = _fold(state, 3, lead).swapaxes(-1, -2)
        y, last = f(x, _fold(dt, 2, lead).swapaxes(1, 2), A, B, C, chunk, **options)
        y, last = _unfold(y.swapaxes(1, 2), lead), _unfold(last.swapaxes(-1, -2), lead)
        if one_head:
            y, last = y[..., 0, :, :], last[..., 0, :, :]
        return (y, last) if return_state else y

    return ssd


# -- gated recurrent networks ----------------------------------------------------------------------------------------


@_like_operator("mlstm")
def mlstm_kernels(kernel: Callable, *, states: bool = True, chunk: int | None = None) -> Callable:
    """``kernel(q, k, v, i, f, c_initial, n_initial, m_initial, return_last_states, eps)``, as mlstm_kernels' functions.

    Their states hold k unscaled, and scale q instead: C and n there are √d times ours. They begin at m = 0 where the
    contract begins at -∞; the adapter passes -∞. `chunk`: only multiples of it are taken.
    """
    taken = inspect.signature(kernel).parameters

    def run(q, k, v, i, f, eps, state=None, return_state=False):
        _refuse(q.shape[-2] == 0, "needs a step")
        _refuse(chunk is not None and q.shape[-2] % (chunk or 1) != 0, f"lengths are multiples of {chunk}")
        one_head = q.ndim == 2
        if one_head:
            q, k, v, i, f = (x[None] for x in (q, k, v, i, f))
            state = None if state is None else [x[None] for x in state]
        given = () if state is None else zip(state, (3, 2, 1), strict=True)
        lead = _lead((q, 3), (k, 3), (v, 3), (i, 2), (f, 2), *given)
        H, d, e = q.shape[-3], q.shape[-1], v.shape[-1]
        options: dict[str, Any] = {"eps": eps}
        if chunk is not None:
            options["chunk_size"] = chunk
        if states:
            if state is None:
                C, n, m = _zeros(q, (*lead, H, d, e)), _zeros(q, (*lead, H, d)), _zeros(q, (*lead, H)) - math.inf
            else:
                C, n, m = state[0] * math.sqrt(d), state[1] * math.sqrt(d), state[2]
            options |= {"c_initial": _fold(C, 3, lead), "n_initial": _fold(n, 2, lead), "m_initial": _fold(m, 1, lead)[..., None]}
            if "dtype_state" in taken:
                options["dtype_state"] = C.dtype
            if return_state:
                options["return_last_states"] = True
        h = kernel(*(_fold(x, 3, lead) for x in (q, k, v)), *(_fold(x, 2, lead) for x in (i, f)), **options)
        if not return_state:
            h = _unfold(h, lead)
            return h[..., 0, :, :] if one_head else h
        h, (C, n, m) = h
        ends = [_unfold(x, lead) for x in (h, C / math.sqrt(d), n / math.sqrt(d), m.reshape(tuple(m.shape)[:2]))]
        if one_head:
            ends = [x.reshape((*lead, *tuple(x.shape)[len(lead) + 1 :])) for x in ends]
        return ends[0], tuple(ends[1:])

    if not states:
        return lambda q, k, v, i, f, *, eps=0.0: run(q, k, v, i, f, eps)

    def mlstm(q, k, v, i, f, *, eps=0.0, state=None, return_state=False):
        return run(q, k, v, i, f, eps, state, return_state)

    return mlstm


def _zeros(like, shape):
    if _is_torch(like):
        return like.new_zeros(shape)
    if _is_jax(like):
        import jax.numpy as jnp

        return jnp.zeros(shape, like.dtype)
    return np.zeros(shape, like.dtype)


@_like_operator("mlstm")
def xlstm_cell(cell: Callable, *, columns: bool = False, chunk: int | None = None) -> Callable:
    """``cell(queries, keys, values, igate_preact, fgate_preact, eps=)``, the cells of the package xlstm.

    `columns`: gates are (batch, heads, time, 1). `chunk`: only multiples of it are taken; the chunkwise cell begins at m = 0
    where the contract begins at -∞, which the adapter passes.
    """

    def mlstm(q, k, v, i, f, *, eps=0.0):
        _refuse(q.shape[-2] == 0, "needs a step")
        _refuse(chunk is not None and q.shape[-2] % (chunk or 1) != 0, f"lengths are multiples of {chunk}")
        _refuse(q.shape[-1] != v.shape[-1], "keys and values are of one size")
        one_head = q.ndim == 2
        if one_head:
            q, k, v, i, f = (x[None] for x in (q, k, v, i, f))
        lead = _lead((q, 3), (k, 3), (v, 3), (i, 2), (f, 2))
        gates = [_fold(x, 2, lead)[..., None] if columns else _fold(x, 2, lead) for x in (i, f)]
        options = {} if chunk is None else {"chunk_size": chunk, "initial_m": gates[0][..., 0] * 0 - math.inf}
        h = _unfold(cell(*(_fold(x, 3, lead) for x in (q, k, v)), *gates, eps=eps, **options), lead)
        return h[..., 0, :, :] if one_head else h

    return mlstm


@_like_operator("slstm")
def xlstm_slstm(forward: Callable, pointwise: Callable) -> Callable:
    """``forward(x, states, R, b, pointwise, constants)``, the vanilla sLSTM of the package xlstm.

    Gates there are in the order i, f, z, o; states in the order h, c, n, m, all zeros at first, which its code reads
    as "nothing yet".
    """
    import torch

    order = [1, 2, 0, 3]  # theirs of ours: z, i, f, o

    def slstm(z, i, f, o, R, bias=None, *, state=None, return_state=False):
        _refuse(z.shape[-2] == 0, "needs a step")
        one_head = z.ndim == 2
        gates = [x[None] if one_head else x for x in (z, i, f, o)]
        lead = _lead(*((x, 3) for x in gates))
        H, T, d = gates[0].shape[-3:]
        x = torch.stack([_fold(gates[j], 3, lead) for j in order])  # (4, B, H, T, d)
        x = x.permute(3, 1, 0, 2, 4).reshape(T, -1, 4 * H * d)
        weights = R[order].permute(1, 0, 2, 3).reshape(H, 4 * d, d)
        b = (x.new_zeros(4, H, d) if bias is None else bias[order]).reshape(-1)
        if state is None:
            first = x.new_zeros(4, x.shape[1], H * d)
        else:
            c, n, h, m = (s[None] if one_head else s for s in state)
            _refuse(bool((n == 0).all()) and bool((m > -math.inf).any()), "a normaliser of zeros reads as no state")
            first = torch.stack([_fold(s, 2, lead).reshape(-1, H * d) for s in (h, c, n, m)])
        every, last, _ = forward(x, first, weights, b, pointwise, {})
        y = every[0, 1:].reshape(T, -1, H, d).permute(1, 2, 0, 3)
        y = _unfold(y, lead)
        y = y[..., 0, :, :] if one_head else y
        if not return_state:
            return y
        h, c, n, m = (_unfold(s.reshape(-1, H, d), lead) for s in last)
        end = tuple(s[..., 0, :] if one_head else s for s in (c, n, h, m))
        return y, end

    return slstm


@_like_operator("lstm")
def torch_lstm(module: Callable) -> Callable:
    """``module(input_size, hidden_size, batch_first=True)`` with torch.nn.LSTM's parameters and call."""
    import torch

    def lstm(x, W, R, b=None, *, state=None, return_state=False):
        _refuse(x.shape[-2] == 0, "needs a step")
        lead = _lead((x, 2), *(((state[0], 1), (state[1], 1)) if state is not None else ()))
        d = R.shape[-1]
        net = module(W.shape[1], d, batch_first=True).to(x.dtype)
        first = None if state is None else tuple(_fold(s, 1, lead)[None].contiguous() for s in state)
        y, (h, c) = torch.func.functional_call(net, _torch_weights(W, R, b, None), (_fold(x, 2, lead), first))
        y = _unfold(y, lead)
        return (y, (_unfold(h[0], lead), _unfold(c[0], lead))) if return_state else y

    return lstm


@_like_operator("gru")
def torch_gru(module: Callable) -> Callable:
    """``module(input_size, hidden_size, batch_first=True)`` with torch.nn.GRU's parameters and call."""
    import torch

    def gru(x, W, R, b=None, b_recurrent=None, *, state=None, return_state=False):
        _refuse(x.shape[-2] == 0, "needs a step")
        lead = _lead((x, 2), *(((state, 1),) if state is not None else ()))
        net = module(W.shape[1], R.shape[-1], batch_first=True).to(x.dtype)
        first = None if state is None else _fold(state, 1, lead)[None].contiguous()
        y, h = torch.func.functional_call(net, _torch_weights(W, R, b, b_recurrent), (_fold(x, 2, lead), first))
        y = _unfold(y, lead)
        return (y, _unfold(h[0], lead)) if return_state else y

    return gru


def _torch_weights(W, R, b, b_recurrent) -> dict:
    """Gates stacked, and transposed: torch multiplies from the left."""
    gates, c, d = W.shape
    zero = W.new_zeros(gates * d)
    return {
        "weight_ih_l0": W.transpose(1, 2).reshape(gates * d, c),
        "weight_hh_l0": R.transpose(1, 2).reshape(gates * d, d),
        "bias_ih_l0": zero if b is None else b.reshape(-1),
        "bias_hh_l0": zero if b_recurrent is None else b_recurrent.reshape(-1),
    }


@_like_operator("lstm")
def onnx_lstm(f: Callable) -> Callable:
    """ONNX's operator LSTM (see `onnx_operator`): gates i, o, f, c, time first."""
    order = [0, 3, 1, 2]

    def lstm(x, W, R, b=None, *, state=None, return_state=False):
        _refuse(x.shape[-2] == 0, "needs a step")
        lead = _lead((x, 2), *(((state[0], 1), (state[1], 1)) if state is not None else ()))
        inputs = _onnx_weights(W, R, b, None, order) | {"X": _fold(x, 2, lead).swapaxes(0, 1)}
        if state is not None:
            inputs |= {"initial_h": _fold(state[0], 1, lead)[None], "initial_c": _fold(state[1], 1, lead)[None]}
        y, h, c = f(inputs, ("Y", "Y_h", "Y_c"), {"hidden_size": R.shape[-1]})
        y = _unfold(y[:, 0].swapaxes(0, 1), lead)
        return (y, (_unfold(h[0], lead), _unfold(c[0], lead))) if return_state else y

    return lstm


@_like_operator("gru")
def onnx_gru(f: Callable) -> Callable:
    """ONNX's operator GRU (see `onnx_operator`): gates z, r, h, time first."""
    order = [1, 0, 2]

    def gru(x, W, R, b=None, b_recurrent=None, *, linear_before_reset=True, state=None, return_state=False):
        _refuse(x.shape[-2] == 0, "needs a step")
        lead = _lead((x, 2), *(((state, 1),) if state is not None else ()))
        inputs = _onnx_weights(W, R, b, b_recurrent, order) | {"X": _fold(x, 2, lead).swapaxes(0, 1)}
        if state is not None:
            inputs["initial_h"] = _fold(state, 1, lead)[None]
        y, h = f(inputs, ("Y", "Y_h"), {"hidden_size": R.shape[-1], "linear_before_reset": int(linear_before_reset)})
        y = _unfold(y[:, 0].swapaxes(0, 1), lead)
        return (y, _unfold(h[0], lead)) if return_state else y

    return gru


def _onnx_weights(W, R, b, b_recurrent, order: list[int]) -> dict:
    gates, c, d = W.shape
    both = [np.zeros((gates, d), W.dtype) if x is None else x for x in (b, b_recurrent)]
    return {
        "W": W[order].swapaxes(1, 2).reshape(1, gates * d, c),
        "R": R[order].swapaxes(1, 2).reshape(1, gates * d, d),
        "B": np.concatenate([x[order].reshape(-1) for x in both])[None],
    }


# -- linear attention ------------------------------------------------------------------------------------------------


@_like_operator("linear_attention")
def onnx_linear_attention(f: Callable) -> Callable:
    """ONNX's operator LinearAttention (see `onnx_operator`), on (batch, time, heads · features). Computes in float32."""

    def linear_attention(q, k, v, *, decay=None, beta=None, scale=None, state=None, return_state=False):
        one_head = q.ndim == 2
        arrays: list[Any] = [None if x is None else x[None] if one_head else x for x in (q, k, v, decay, beta, state)]
        q, k, v, decay, beta, state = arrays
        per_channel = decay is not None and decay.ndim == k.ndim
        cores = (3, 3, 3, 3 if per_channel else 2, 2, 3)
        lead = _lead(*((x, core) for x, core in zip((q, k, v, decay, beta, state), cores, strict=True) if x is not None))
        H, G = q.shape[-3], k.shape[-3]
        _refuse(per_channel and k.shape[-1] == 1, "one channel cannot be told from one decay per head")

        def packed(x, core):  # (batch, time, heads · features)
            x = _fold(x, core, lead)
            return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], x.shape[1] * math.prod(x.shape[3:]))

        inputs = {"query": packed(q, 3), "key": packed(k, 3), "value": packed(v, 3)}
        if decay is not None:
            inputs["decay"] = packed(decay, 3 if per_channel else 2)
        if beta is not None:
            inputs["beta"] = packed(beta, 2)
        if state is not None:
            inputs["past_state"] = _fold(state, 3, lead)
        rule = ("gated_delta" if beta is not None else "gated") if decay is not None else "delta" if beta is not None else "linear"
        attributes: dict[str, Any] = {"q_num_heads": H, "kv_num_heads": G, "update_rule": rule}
        if scale is not None:
            _refuse(scale == 0, "a scale of 0 reads as none")
            attributes["scale"] = float(scale)
        o, last = f(inputs, ("output", "present_state"), attributes)
        o = _unfold(o.reshape(o.shape[0], o.shape[1], H, v.shape[-1]).swapaxes(1, 2), lead)
        last = _unfold(last, lead)
        if one_head:
            o, last = o[..., 0, :, :], last[..., 0, :, :]
        return (o, last) if return_state else o

    return linear_attention


@_like_operator("linear_attention")
def gated_delta_rule(f: Callable, *, alpha: bool = False) -> Callable:
    """``f(q, k, v, g, beta, initial_state=, output_final_state=)`` on (batch, time, heads, features), as fla's and transformers'.

    `alpha`: the decay is passed in (0, 1), the state transposed, nothing scaled, as the package opengdn has it.
    """

    def linear_attention(q, k, v, *, decay=None, beta=None, state=None, return_state=False):
        _refuse(beta is None, "this is the delta rule")
        _refuse(decay is not None and decay.ndim == k.ndim, "one decay per head")
        _refuse(q.shape[-2] == 0, "needs a step")
        one_head = q.ndim == 2
        given: list[Any] = [None if x is None else x[None] if one_head else x for x in (q, k, v, decay, beta, state)]
        q, k, v, decay, beta, state = given
        _refuse(q.shape[-3] != k.shape[-3], "q has k's heads")
        lead = _lead(*((x, core) for x, core in zip(given, (3, 3, 3, 2, 2, 3), strict=True) if x is not None))
        decay = beta * 0 if decay is None else decay
        d = q.shape[-1]
        arrays = [_fold(x, 3, lead).transpose(1, 2) for x in (q, k, v)] + [_fold(x, 2, lead).transpose(1, 2) for x in (decay, beta)]
        first = None if state is None else _fold(state, 3, lead)
        if alpha:
            arrays[0], arrays[3] = arrays[0] / math.sqrt(d), arrays[3].exp()
            o, last = f(*arrays, state=None if first is None else first.transpose(-1, -2))
            last = last.transpose(-1, -2)
        else:
            o, last = f(*arrays, initial_state=first, output_final_state=True)
        o, last = _unfold(o.transpose(1, 2), lead), _unfold(last, lead)
        if one_head:
            o, last = o[..., 0, :, :], last[..., 0, :, :]
        return (o, last) if return_state else o

    return linear_attention
