"""Signatures of gated recurrent networks: mlstm_kernels, xlstm, torch, ONNX."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.conformance.adapters.common import fold, is_jax, is_torch, leading, like_operator, refuse, unfold


@like_operator("mlstm")
def mlstm_kernels(kernel: Callable, *, states: bool = True, chunk: int | None = None) -> Callable:
    """``kernel(q, k, v, i, f, c_initial, n_initial, m_initial, return_last_states, eps)``, as mlstm_kernels' functions.

    Their states hold k unscaled, and scale q instead: C and n there are √d times ours. They begin at m = 0 where the
    contract begins at -∞; the adapter passes -∞. `chunk`: only multiples of it are taken.
    """
    taken = inspect.signature(kernel).parameters

    def run(q, k, v, i, f, eps, state=None, return_state=False):
        refuse(q.shape[-2] == 0, "needs a step")
        refuse(chunk is not None and q.shape[-2] % (chunk or 1) != 0, f"lengths are multiples of {chunk}")
        one_head = q.ndim == 2
        if one_head:
            q, k, v, i, f = (x[None] for x in (q, k, v, i, f))
            state = None if state is None else [x[None] for x in state]
        given = () if state is None else zip(state, (3, 2, 1), strict=True)
        lead = leading((q, 3), (k, 3), (v, 3), (i, 2), (f, 2), *given)
        H, d, e = q.shape[-3], q.shape[-1], v.shape[-1]
        options: dict[str, Any] = {"eps": eps}
        if chunk is not None:
            options["chunk_size"] = chunk
        if states:
            if state is None:
                C, n, m = _zeros(q, (*lead, H, d, e)), _zeros(q, (*lead, H, d)), _zeros(q, (*lead, H)) - math.inf
            else:
                C, n, m = state[0] * math.sqrt(d), state[1] * math.sqrt(d), state[2]
            options |= {"c_initial": fold(C, 3, lead), "n_initial": fold(n, 2, lead), "m_initial": fold(m, 1, lead)[..., None]}
            if "dtype_state" in taken:
                options["dtype_state"] = C.dtype
            if return_state:
                options["return_last_states"] = True
        h = kernel(*(fold(x, 3, lead) for x in (q, k, v)), *(fold(x, 2, lead) for x in (i, f)), **options)
        if not return_state:
            h = unfold(h, lead)
            return h[..., 0, :, :] if one_head else h
        h, (C, n, m) = h
        ends = [unfold(x, lead) for x in (h, C / math.sqrt(d), n / math.sqrt(d), m.reshape(tuple(m.shape)[:2]))]
        if one_head:
            ends = [x.reshape((*lead, *tuple(x.shape)[len(lead) + 1 :])) for x in ends]
        return ends[0], tuple(ends[1:])

    if not states:
        return lambda q, k, v, i, f, *, eps=0.0: run(q, k, v, i, f, eps)

    def mlstm(q, k, v, i, f, *, eps=0.0, state=None, return_state=False):
        return run(q, k, v, i, f, eps, state, return_state)

    return mlstm


def _zeros(like, shape):
    if is_torch(like):
        return like.new_zeros(shape)
    if is_jax(like):
        import jax.numpy as jnp

        return jnp.zeros(shape, like.dtype)
    return np.zeros(shape, like.dtype)


@like_operator("mlstm")
def xlstm_cell(cell: Callable, *, columns: bool = False, chunk: int | None = None) -> Callable:
    """``cell(queries, keys, values, igate_preact, fgate_preact, eps=)``, the cells of the package xlstm.

    `columns`: gates are (batch, heads, time, 1). `chunk`: only multiples of it are taken; the chunkwise cell begins at m = 0
    where the contract begins at -∞, which the adapter passes.
    """

    def mlstm(q, k, v, i, f, *, eps=0.0):
        refuse(q.shape[-2] == 0, "needs a step")
        refuse(chunk is not None and q.shape[-2] % (chunk or 1) != 0, f"lengths are multiples of {chunk}")
        refuse(q.shape[-1] != v.shape[-1], "keys and values are of one size")
        one_head = q.ndim == 2
        if one_head:
            q, k, v, i, f = (x[None] for x in (q, k, v, i, f))
        lead = leading((q, 3), (k, 3), (v, 3), (i, 2), (f, 2))
        gates = [fold(x, 2, lead)[..., None] if columns else fold(x, 2, lead) for x in (i, f)]
        options = {} if chunk is None else {"chunk_size": chunk, "initial_m": gates[0][..., 0] * 0 - math.inf}
        h = unfold(cell(*(fold(x, 3, lead) for x in (q, k, v)), *gates, eps=eps, **options), lead)
        return h[..., 0, :, :] if one_head else h

    return mlstm


@like_operator("slstm")
def xlstm_slstm(forward: Callable, pointwise: Callable) -> Callable:
    """``forward(x, states, R, b, pointwise, constants)``, the vanilla sLSTM of the package xlstm.

    Gates there are in the order i, f, z, o; states in the order h, c, n, m, all zeros at first, which its code reads
    as "nothing yet".
    """
    import torch

    order = [1, 2, 0, 3]  # theirs of ours: z, i, f, o

    def slstm(z, i, f, o, R, bias=None, *, state=None, return_state=False):
        refuse(z.shape[-2] == 0, "needs a step")
        one_head = z.ndim == 2
        gates = [x[None] if one_head else x for x in (z, i, f, o)]
        lead = leading(*((x, 3) for x in gates))
        H, T, d = gates[0].shape[-3:]
        x = torch.stack([fold(gates[j], 3, lead) for j in order])  # (4, B, H, T, d)
        x = x.permute(3, 1, 0, 2, 4).reshape(T, -1, 4 * H * d)
        weights = R[order].permute(1, 0, 2, 3).reshape(H, 4 * d, d)
        b = (x.new_zeros(4, H, d) if bias is None else bias[order]).reshape(-1)
        if state is None:
            first = x.new_zeros(4, x.shape[1], H * d)
        else:
            c, n, h, m = (s[None] if one_head else s for s in state)
            refuse(bool((n == 0).all()) and bool((m > -math.inf).any()), "a normaliser of zeros reads as no state")
            first = torch.stack([fold(s, 2, lead).reshape(-1, H * d) for s in (h, c, n, m)])
        every, last, _ = forward(x, first, weights, b, pointwise, {})
        y = every[0, 1:].reshape(T, -1, H, d).permute(1, 2, 0, 3)
        y = unfold(y, lead)
        y = y[..., 0, :, :] if one_head else y
        if not return_state:
            return y
        h, c, n, m = (unfold(s.reshape(-1, H, d), lead) for s in last)
        end = tuple(s[..., 0, :] if one_head else s for s in (c, n, h, m))
        return y, end

    return slstm


@like_operator("lstm")
def torch_lstm(module: Callable) -> Callable:
    """``module(input_size, hidden_size, batch_first=True)`` with torch.nn.LSTM's parameters and call."""
    import torch

    def lstm(x, W, R, b=None, *, state=None, return_state=False):
        refuse(x.shape[-2] == 0, "needs a step")
        lead = leading((x, 2), *(((state[0], 1), (state[1], 1)) if state is not None else ()))
        d = R.shape[-1]
        net = module(W.shape[1], d, batch_first=True).to(x.dtype)
        first = None if state is None else tuple(fold(s, 1, lead)[None].contiguous() for s in state)
        y, (h, c) = torch.func.functional_call(net, _torch_weights(W, R, b, None), (fold(x, 2, lead), first))
        y = unfold(y, lead)
        return (y, (unfold(h[0], lead), unfold(c[0], lead))) if return_state else y

    return lstm


@like_operator("gru")
def torch_gru(module: Callable) -> Callable:
    """``module(input_size, hidden_size, batch_first=True)`` with torch.nn.GRU's parameters and call."""
    import torch

    def gru(x, W, R, b=None, b_recurrent=None, *, state=None, return_state=False):
        refuse(x.shape[-2] == 0, "needs a step")
        lead = leading((x, 2), *(((state, 1),) if state is not None else ()))
        net = module(W.shape[1], R.shape[-1], batch_first=True).to(x.dtype)
        first = None if state is None else fold(state, 1, lead)[None].contiguous()
        y, h = torch.func.functional_call(net, _torch_weights(W, R, b, b_recurrent), (fold(x, 2, lead), first))
        y = unfold(y, lead)
        return (y, unfold(h[0], lead)) if return_state else y

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


@like_operator("lstm")
def onnx_lstm(f: Callable) -> Callable:
    """ONNX's operator LSTM (see `onnx_operator`): gates i, o, f, c, time first."""
    order = [0, 3, 1, 2]

    def lstm(x, W, R, b=None, *, state=None, return_state=False):
        refuse(x.shape[-2] == 0, "needs a step")
        lead = leading((x, 2), *(((state[0], 1), (state[1], 1)) if state is not None else ()))
        inputs = _onnx_weights(W, R, b, None, order) | {"X": fold(x, 2, lead).swapaxes(0, 1)}
        if state is not None:
            inputs |= {"initial_h": fold(state[0], 1, lead)[None], "initial_c": fold(state[1], 1, lead)[None]}
        y, h, c = f(inputs, ("Y", "Y_h", "Y_c"), {"hidden_size": R.shape[-1]})
        y = unfold(y[:, 0].swapaxes(0, 1), lead)
        return (y, (unfold(h[0], lead), unfold(c[0], lead))) if return_state else y

    return lstm


@like_operator("gru")
def onnx_gru(f: Callable) -> Callable:
    """ONNX's operator GRU (see `onnx_operator`): gates z, r, h, time first."""
    order = [1, 0, 2]

    def gru(x, W, R, b=None, b_recurrent=None, *, linear_before_reset=True, state=None, return_state=False):
        refuse(x.shape[-2] == 0, "needs a step")
        lead = leading((x, 2), *(((state, 1),) if state is not None else ()))
        inputs = _onnx_weights(W, R, b, b_recurrent, order) | {"X": fold(x, 2, lead).swapaxes(0, 1)}
        if state is not None:
            inputs["initial_h"] = fold(state, 1, lead)[None]
        y, h = f(inputs, ("Y", "Y_h"), {"hidden_size": R.shape[-1], "linear_before_reset": int(linear_before_reset)})
        y = unfold(y[:, 0].swapaxes(0, 1), lead)
        return (y, unfold(h[0], lead)) if return_state else y

    return gru


def _onnx_weights(W, R, b, b_recurrent, order: list[int]) -> dict:
    gates, c, d = W.shape
    both = [np.zeros((gates, d), W.dtype) if x is None else x for x in (b, b_recurrent)]
    return {
        "W": W[order].swapaxes(1, 2).reshape(1, gates * d, c),
        "R": R[order].swapaxes(1, 2).reshape(1, gates * d, d),
        "B": np.concatenate([x[order].reshape(-1) for x in both])[None],
    }
