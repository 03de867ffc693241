"""Inputs for attention: a sample in which everything matters, and those at which implementations break."""

import numpy as np


def sample(rng, *, n=5, m=7, Hq=4, Hkv=2, d=3, e=2, batch=()):
    """All arrays of a call. Values stand off zero, so that the sum of weights shows; no row is wholly masked."""
    mask = rng.random((*batch, 1, n, m)) < 0.75
    mask = mask | _one_each(mask)
    return {
        "q": rng.standard_normal((*batch, Hq, n, d)),
        "k": rng.standard_normal((*batch, Hkv, m, d)),
        "v": rng.standard_normal((*batch, Hkv, m, e)) + rng.choice([-1.0, 1.0], e),
        "mask": mask,
        "bias": rng.standard_normal((*batch, Hq, n, m)),
        "sink": rng.uniform(-0.5, 1.5, Hq),
    }


def _one_each(pairs):
    """One key for every query."""
    n, m = pairs.shape[-2:]
    return np.arange(n)[:, None] % max(m, 1) == np.arange(m)


def _with(options=None, **changes):
    """A hard call: the sample, with some arrays replaced, and options."""

    def draw(rng, **sizes):
        call = sample(rng, **sizes)
        return call | {name: change(call[name]) for name, change in changes.items()} | (options or {})

    return draw


def _along(x, pattern):
    """A pattern over the rows of x."""
    return np.resize(pattern, x.shape[-2])[:, None]


def _needle(k):
    """One key of each head stands out by far."""
    return k * np.where(np.arange(k.shape[-2]) == k.shape[-2] // 2, 12.0, 1.0)[:, None]


def _mask_per_head(rng, **sizes):
    """Every head sees what the first does, some keys further on."""
    call = sample(rng, **sizes)
    shifted = [np.roll(call["mask"], h, axis=-1) for h in range(call["q"].shape[-3])]
    return call | {"mask": np.concatenate(shifted, axis=-3)}


HARD = {
    "first rows see nothing": _with({"causal": True, "offset": -2}),
    "first rows see nothing, with lse": _with({"causal": True, "offset": -2, "return_lse": True}),
    "window beyond the keys": _with({"window": (1, 0), "offset": 3}),
    "fully masked rows": _with(mask=lambda mask: mask & _along(mask, [True, False, True])),
    "a mask for each head": _mask_per_head,
    "biases that disallow": _with(bias=lambda bias: np.where(_along(bias, [True, False, True]) & (bias < 1), bias, -np.inf)),
    "one key each": _with({"window": (0, 0)}),
    "equal scores": _with(k=np.zeros_like),
    "equal keys and values": _with(k=lambda k: k[..., :1, :] + 0 * k, v=lambda v: v[..., :1, :] + 0 * v),
    "needle": _with(k=_needle),
    "rising scores": _with(q=lambda q: abs(q) + 0.5, k=lambda k: abs(k) * np.linspace(-4, 4, k.shape[-2])[:, None]),
    "large scores": _with(q=lambda q: 40 * q),
    "scores beyond half precision": _with(q=lambda q: 2000 * q, k=lambda k: 32 * k),
    "huge scores, capped": _with({"softcap": 20.0}, q=lambda q: 1000 * q),
    "huge common offset": _with(bias=lambda bias: bias + 3000.0),
    "scores far below zero": _with(bias=lambda bias: bias - 30000.0, sink=lambda sink: sink - 30000.0),  # and below -1e4, where some begin a maximum
    "sink above all": _with(sink=lambda sink: sink + 60.0),
    "sink whose exponential overflows": _with({"return_lse": True}, sink=lambda sink: sink + 120.0),
    "sink below all": _with(sink=lambda sink: sink - 300.0),
    "values that cancel": _with(v=lambda v: v + 100.0 * _along(v, [1.0, -1.0])),
    "values far from zero": _with(v=lambda v: v + 50.0),
    "large values of equal weight": _with(k=np.zeros_like, v=lambda v: v * 2.0**10),  # sums before the division are beyond float16
    "tiny values": _with(v=lambda v: v * 2.0**-9),
}
