"""Code written out in a half precision, every intermediate result rounded, as eager frameworks run it, is right.

ml_dtypes' arrays round after each operation of NumPy; sums are kept in float32, as frameworks keep them.
"""

import numpy as np
import pytest
import scipy.special

import refimpl


def mean(x):
    return x.astype(np.float32).mean(axis=-1, keepdims=True).astype(x.dtype)


def of(x, number):
    """A number in an array's own precision."""
    return np.asarray(number).astype(x.dtype)


def erf(x):
    return scipy.special.erf(x.astype(np.float32)).astype(x.dtype)


def silu(x):
    return x / (of(x, 1) + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(-abs(x))) + np.maximum(x, of(x, 0))


def gelu(x, *, approximate="none"):
    half, one = of(x, 0.5), of(x, 1)
    if approximate == "tanh":
        return half * x * (one + np.tanh(of(x, np.sqrt(2 / np.pi)) * (x + of(x, 0.044715) * x * x * x)))
    return half * x * (one + erf(x * of(x, np.sqrt(0.5))))


def swiglu(gate, up):
    return silu(gate) * up


def geglu(gate, up, *, approximate="none"):
    return gelu(gate, approximate=approximate) * up


def rms_norm(x, weight=None, *, eps=1e-6):
    y = x / np.sqrt(mean(x * x) + of(x, eps))
    return y if weight is None else y * weight


def layer_norm(x, weight=None, bias=None, *, eps=1e-5):
    away = x - mean(x)
    y = away / np.sqrt(mean(away * away) + of(x, eps))
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def group_norm(x, groups, weight=None, bias=None, *, eps=1e-5):
    y = layer_norm(x.reshape(*x.shape[:-1], groups, -1), eps=eps).reshape(x.shape)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def route(logits, k, *, order="topk_softmax", renormalize=False):
    experts = np.argsort(-logits.astype(np.float32), axis=-1, kind="stable")[..., :k]
    if order == "sigmoid":
        weights = of(logits, 1) / (of(logits, 1) + np.exp(-logits))
    else:
        kept = np.take_along_axis(logits, experts, -1) if order == "topk_softmax" else logits
        weights = np.exp(kept - kept.max(axis=-1, keepdims=True))
        weights = weights / total(weights)
    if order != "topk_softmax":
        weights = np.take_along_axis(weights, experts, -1)
    return (weights / total(weights) if renormalize and order != "topk_softmax" else weights), experts


def total(x):
    return x.astype(np.float32).sum(axis=-1, keepdims=True).astype(x.dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("function", [silu, softplus, gelu, swiglu, geglu, rms_norm, layer_norm, group_norm, route], ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_conforms(function, dtype):
    report = refimpl.check(function.__name__, function, dtypes=[dtype])
    assert report.ok, report
