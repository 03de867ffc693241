"""What the attention-free transformers share: scores, the mean of each channel, its gradient and its error.

Not a chapter: `aft` tells the story, and its letters are used here.
"""

import numpy as np

from refimpl.core.numerics import finite_or_zero, masked_matmul, sigmoid
from refimpl.laws import causal as causal_law
from refimpl.laws import linear
from refimpl.op import Law
from refimpl.ops.attention.weighted_mean import mean_error, weights, weights_vjp

as_data = np.errstate(all="ignore")  # infinities and NaN are data here, and masked ones must pass in silence


def checked(operator):
    """A contract's check: real arrays, and `causal` True or False."""

    def check(arguments, sizes):
        for name in "qkvw":
            if name in arguments and np.iscomplexobj(arguments[name]):
                raise TypeError(f"{operator}: {name} must be real, got dtype {arguments[name].dtype}")
        if not isinstance(arguments.get("causal", False), bool):
            raise TypeError(f"{operator}: causal must be True or False, got {arguments['causal']!r}")

    return check


def scores(k, w, causal, start=0):
    """(2), -∞ where not allowed: (..., d, T, keys); w (..., T, keys), the keys being those from `start` on."""
    s = k.mT[..., None, :] + w[..., None, :, :]
    t, j = np.arange(s.shape[-2])[:, None], start + np.arange(s.shape[-1])
    excluded = np.isneginf(w)[..., None, :, :] | (j > t) if causal else np.isneginf(w)[..., None, :, :]
    return np.where(excluded, -np.inf, s)


def mean(p, v, s):
    """o of (1): (..., T, d)."""
    return masked_matmul(p, v.mT[..., None], s)[..., 0].mT


def vjp(dy, q, k, v, s):
    """Gradients of q, k, v, and ds, (..., d, T, T)."""
    p, gate = weights(s), sigmoid(q)
    do = (dy * gate).mT[..., None]  # (..., d, T, 1)
    ds = weights_vjp(p, do @ v.mT[..., None, :], s)
    dv = masked_matmul(p.mT, do, s.mT)[..., 0].mT
    return {"q": dy * mean(p, v, s) * gate * sigmoid(-q), "k": ds.sum(axis=-2).mT, "v": dv}, ds


def bound(q, k, v, w, s, causal, unit, store):
    """The error of (1) from scores s, for k and w that may be exponentiated apart.

    Of a score: u (2 |k_j| + 2 |w_tj|), and as much for the largest |k| and |w|, of which maxima may be subtracted before
    e^k and e^w are multiplied, and 40 u for that. Then a weighted mean (`weighted_mean`), and a gate in error by 40 u of
    itself, and by 2 u of 1, as by tanh. `store` allows for k + w, e^k, e^w, the mean and the gate rounded to half precision.
    """
    size_k, size_w = abs(k).mT[..., None, :], abs(np.where(np.isneginf(w), np.zeros_like(w), w))[..., None, :, :]
    largest = lambda x: np.max(x, axis=-1, keepdims=True, initial=0)
    delta = 2 * unit * (size_k + size_w + largest(size_k) + largest(size_w) + 20) + store * (2 + abs(finite_or_zero(s)))
    p, gate = weights(s), sigmoid(q)
    v_of_channel = v.mT[..., None]
    E = mean_error(s, p, v_of_channel, np.where(np.isneginf(s), np.zeros_like(s), delta), unit=unit, store=store)[..., 0].mT
    o, smallest = abs(mean(p, v, s)), 2.0**-126 if unit > 2.0**-50 else 2.0**-1022
    return (gate + 2 * unit) * E + ((40 * unit + 2 * store) * gate + 2 * unit) * o + 4 * smallest * (o + 1)


def laws(contract):
    """The laws of every variant."""

    def causal(f, call, bound, rng):
        return causal_law(contract, "k", "v").holds(f, {**call, "causal": True}, bound, rng)

    def shift(f, call, bound, rng):
        """A number added to all keys of a channel cancels. In integers: exact in any format."""
        whole = np.clip(np.rint(call["k"].astype(np.result_type(call["k"].dtype, np.float32))), -3, 3).astype(call["k"].dtype)
        call = {**call, "k": whole}
        moved = {**call, "k": (whole + 4).astype(whole.dtype)}
        yield "y with 4 added to every key", f(**moved), f(**call), bound(**call) + bound(**moved)

    def gate(f, call, bound, rng):
        """σ(0) = 1/2: a query of zeros lets half through of what an open gate does."""
        half, wide = {**call, "q": 0 * call["q"]}, {**call, "q": (0 * call["q"] + 100).astype(call["q"].dtype)}
        yield "y of an open gate, and twice that of a half-open one", f(**wide), 2 * f(**half), bound(**wide) + 2 * bound(**half)

    return (linear(contract, "v"), Law("causal", causal, ("causal",)), Law("shift", shift, ("k",)), Law("gate", gate, ("q",)))


def sample_qkv(rng, shape):
    """q, k, v; values off zero, so that the sum of weights shows."""
    q, k, v = (rng.standard_normal(shape) for _ in range(3))
    return {"q": q, "k": k, "v": v + rng.choice([-1.0, 1.0], shape[-1:])}


def hard(sample, own=None):
    """Inputs at which implementations break, from a sample; `own(w)` is 1 for biases of a query with its own key, else 0."""

    def changed(options=None, **changes):
        def draw(rng, **sizes):
            call = sample(rng, **sizes)
            return call | {name: change(call[name]) for name, change in changes.items()} | (options or {})

        return draw

    ramp = lambda x: np.linspace(-20, 20, x.shape[-2])[:, None]
    pattern = lambda x: np.resize([1.0, -1.0], x.shape[-2])[:, None]
    needle = lambda x: np.where(np.arange(x.shape[-2]) == x.shape[-2] // 2, 20.0, 1.0)[:, None]
    found = {
        "rising keys": changed(k=lambda k: k + ramp(k)),
        "falling keys, causal": changed({"causal": True}, k=lambda k: k - 4 * ramp(k)),
        "rising keys, causal": changed({"causal": True}, k=lambda k: k + 20 * ramp(k)),
        "equal keys": changed(k=lambda k: 0 * k),
        "needle": changed(k=lambda k: k * needle(k)),
        "huge keys": changed(k=lambda k: k + 1000.0),
        "keys far below zero": changed(k=lambda k: k - 20000.0),
        "closed and open gates": changed(q=lambda q: 60 * q),
        "values that cancel": changed(v=lambda v: v + 100.0 * pattern(v)),
    }
    if own is not None:
        spike = lambda k: 20.0 * (np.arange(k.shape[-2]) == k.shape[-2] // 2)[:, None]
        found["biases that undo the keys"] = changed(k=lambda k: k + 200.0, w=lambda w: w - 200.0)
        found["a large key silenced"] = changed(k=lambda k: k + spike(k), w=lambda w: w - 30 * own(w))
    return found
