"""Signatures of recurrences and convolutions: SciPy, JAX, mambapy, accelerated-scan, causal-conv1d, ONNX."""

from collections.abc import Callable

import numpy as np

from refimpl.conformance.adapters.common import fold, leading, like_operator, refuse, spread, unfold


@like_operator("linear_recurrence")
def lfilter(f: Callable) -> Callable:
    """``f(b, a, x, axis, zi) -> (y, zf)``, SciPy's filter: y_t = a y_{t-1} + x_t is one with constant a, a channel at a time."""

    def linear_recurrence(a, b, *, state=None, reverse=False, return_state=False):
        refuse(a.ndim > 1 and not np.array_equal(a, np.broadcast_to(a[..., :1, :], a.shape), equal_nan=True), "a filter's decay is constant in time")
        refuse(b.shape[-2] == 0, "a filter needs a sample")
        a = a if a.ndim == 1 else a[..., 0, :]
        lead = leading((a, 1), (b, 2), *(((state, 1),) if state is not None else ()))
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


@like_operator("linear_recurrence")
def pscan(f: Callable) -> Callable:
    """``f(A, X)`` on (batch, time, features, state), as mambapy's parallel scan."""

    def linear_recurrence(a, b):
        a, b, lead = _scanned(a, b)
        return unfold(f(a[..., None], b[..., None])[..., 0], lead)

    return linear_recurrence


@like_operator("linear_recurrence")
def gates_and_tokens(f: Callable) -> Callable:
    """``f(gates, tokens, reverse=)`` on (batch, features, time), as accelerated-scan's."""

    def linear_recurrence(a, b, *, reverse=False):
        a, b, lead = _scanned(a, b)
        refuse(b.shape[-2] < 2, "needs two steps")
        h = f(a.swapaxes(-1, -2).contiguous(), b.swapaxes(-1, -2).contiguous(), reverse=reverse)
        return unfold(h.swapaxes(-1, -2), lead)

    return linear_recurrence


@like_operator("linear_recurrence")
def associative_scan(f: Callable) -> Callable:
    """``f(combine, (a, b), reverse=, axis=)``, as JAX's scan with an associative operator."""

    def combine(first, then):
        return then[0] * first[0], then[0] * first[1] + then[1]

    def linear_recurrence(a, b, *, reverse=False):
        a, b, lead = _scanned(a, b)
        return unfold(f(combine, (a, b), reverse=reverse, axis=1)[1], lead)

    return linear_recurrence


def _scanned(a, b):
    """Decay and input as (batch, time, features) of one shape."""
    refuse(b.shape[-2] == 0, "needs a step")
    a = a if a.ndim > 1 else a[None]
    lead = leading((a, 2), (b, 2))
    shape = (*lead, *tuple(b.shape)[-2:])
    return fold(spread(a, shape), 2, lead), fold(spread(b, shape), 2, lead), lead


@like_operator("long_conv")
def fftconvolve(f: Callable) -> Callable:
    """``f(in1, in2, mode="full", axes=)``, as SciPy's fftconvolve and oaconvolve, of which the first T samples are kept."""

    def long_conv(u, kernel):
        T, K = u.shape[-2], kernel.shape[-2]
        refuse(T == 0 or K == 0, "an empty convolution has no shape there")
        refuse(u.dtype.kind == "c" or kernel.dtype.kind == "c", "real signals only")
        lead = leading((u, 2), (kernel, 2))
        u, kernel = spread(u, (*lead, *tuple(u.shape)[-2:])), spread(kernel, (*lead, *tuple(kernel.shape)[-2:]))
        return f(u, kernel, mode="full", axes=-2)[..., :T, :]

    return long_conv


@like_operator("causal_conv1d")
def causal_conv1d_fn(f: Callable) -> Callable:
    """``f(x, weight, bias, activation=)`` on (batch, channels, time), as causal_conv1d_fn."""

    def causal_conv1d(x, weight, bias=None, *, activation=None):
        refuse(x.shape[-2] == 0, "needs a step")
        lead = leading((x, 2))
        return unfold(f(fold(x, 2, lead).swapaxes(-1, -2), weight, bias, activation=activation).swapaxes(-1, -2), lead)

    return causal_conv1d


@like_operator("causal_conv1d")
def onnx_causal_conv(f: Callable) -> Callable:
    """ONNX's operator CausalConvWithState (see `onnx_operator`), on (batch, channels, time)."""

    def causal_conv1d(x, weight, bias=None, *, activation=None, state=None, return_state=False):
        refuse(x.shape[-2] == 0, "needs a step")
        refuse(weight.shape[-1] == 1 and (state is not None or return_state), "with one tap there is no state")
        lead = leading((x, 2), *(((state, 2),) if state is not None else ()))
        inputs = {"input": fold(x, 2, lead).swapaxes(-1, -2), "weight": weight[:, None]}
        if bias is not None:
            inputs["bias"] = bias
        if state is not None:
            inputs["past_state"] = fold(state, 2, lead).swapaxes(-1, -2)
        y, last = f(inputs, ("output", "present_state"), {} if activation is None else {"activation": activation})
        y = unfold(y.swapaxes(-1, -2), lead)
        return (y, unfold(last.swapaxes(-1, -2), lead)) if return_state else y

    return causal_conv1d


@like_operator("linear_recurrence")
def gemma_scan(f: Callable) -> Callable:
    """RecurrentGemmaRglru._rnn_scan of transformers: three-dimensional inputs, and a mask of resets, here none."""

    def linear_recurrence(a, b, *, state=None, return_state=False):
        import torch

        lead = leading((b, 2), (a, 2 if a.ndim > 1 else 1), *(((state, 1),) if state is not None else ()))
        a, b = fold(spread(a, (*lead, *b.shape[-2:])), 2, lead), fold(b, 2, lead)
        never = torch.zeros((*b.shape[:2], 1), dtype=torch.bool)
        h, last = f(None, b, a, never, None if state is None else fold(state, 1, lead), b.dtype)
        return (unfold(h, lead), unfold(last, lead)) if return_state else unfold(h, lead)

    return linear_recurrence
