"""What every right linear attention satisfies beside causality and hand-off: what a memory of d × e holds, and what is no decay."""

import numpy as np

from refimpl.op import Law
from refimpl.ops.linear_attention.feature_maps import width


def _decays(f, call, bound, rng):
    """A log-decay of 0 is no decay: retention and GLA are linear attention then; and channels that decay alike are a head that does."""
    call = {n: x for n, x in call.items() if n != "decay"} | {"return_state": False}
    k = call["k"]
    g = rng.uniform(-0.7, 0.1, k.shape[:-1]).astype(k.dtype)
    g_many = np.repeat(g[..., None], width(call.get("feature_map"), k), axis=-1)
    want, limit = f(**call), 2 * bound(**call)
    yield "o with a log-decay of 0", f(**call, decay=0 * g), want, limit
    yield "o with log-decays of 0 in all channels", f(**call, decay=0 * g_many), want, limit
    call["decay"] = g
    yield "o with the head's log-decay in all channels", f(**call | {"decay": g_many}), f(**call), 2 * bound(**call)


def _units(f, call, bound, rng):
    """A decay is a change of units: with F_t the sum of log-decays so far, v and decay give e^F_t times what v_t e^-F_t gives without."""
    call = {n: x for n, x in call.items() if n != "decay"} | {"return_state": False}
    k, like = call["k"], call["v"].dtype
    if like.itemsize < 4 or not k.shape[-2]:
        return  # a multiple of log 2 is too far from a half-precision number
    F = rng.integers(-3, 4, k.shape[:-1])
    g = np.diff(F, axis=-1, prepend=0) * np.log(np.asarray(2, dtype=like))
    unit, other = np.ldexp(np.ones((), dtype=like), F)[..., None], dict(call)
    other["v"] = call["v"] / unit
    group = call["q"].shape[-3] // k.shape[-3] if k.ndim > 2 else 1
    unit = np.repeat(unit, group, axis=-3) if group > 1 else unit
    call["decay"] = g.astype(like)
    yield "o in units that decay", f(**call), unit * f(**other), 2 * bound(**call) + 2 * unit * bound(**other)


def _memory(call, rng):
    """d orthonormal keys in a random order, and steps that write them, write over the first half of them, and read all."""
    like, d, e = call["q"], call["q"].shape[-1], call["v"].shape[-1]
    basis = np.linalg.qr(rng.standard_normal((d, d)))[0][None].astype(like.dtype)
    first, second = (rng.standard_normal((1, d, e)).astype(like.dtype) for _ in range(2))
    half = d // 2
    keys = np.concatenate([basis, basis[:, :half], basis], axis=-2)
    values = np.concatenate([first, second[:, :half], 0 * first], axis=-2)
    reads = np.arange(keys.shape[-2]) >= d + half
    written = np.concatenate([second[:, :half], first[:, half:]], axis=-2)
    return {"q": keys, "k": keys, "v": values, "beta": np.where(reads, 0, 1)[None].astype(like.dtype), "scale": 1.0}, written


def _overwrites(f, call, bound, rng):
    """With β = 1, d orthonormal keys recall the d values written last under them, and nothing else: the capacity of the memory."""
    call, written = _memory(call, rng)
    d = written.shape[-2]
    yield "what orthonormal keys recall", f(**call)[..., -d:, :], written, 2 * bound(**call)[..., -d:, :]


def _added(f, call, bound, rng):
    """Without β the same steps recall sums: what was written twice is there twice."""
    call, _ = _memory(call, rng)
    d, beta = call["q"].shape[-1], call.pop("beta")
    values = call["v"] * beta[..., None]
    total = values[..., :d, :] + np.concatenate([values[..., d : d + d // 2, :], 0 * values[..., d // 2 : d, :]], axis=-2)
    yield "what orthonormal keys recall", f(**call)[..., -d:, :], total, 2 * bound(**call)[..., -d:, :]


def _mean(f, call, bound, rng):
    """Normalised, o is a weighted mean: values that are all alike are what it is, whatever the weights and their decay."""
    keep = {n: call[n] for n in ("decay",) if call.get(n) is not None and call[n].ndim < call["k"].ndim}
    q, k, v = abs(call["q"]) + 1, abs(call["k"]) + 1, call["v"]
    value = rng.uniform(1, 2, v.shape[-1]).astype(v.dtype)
    call = keep | {"q": q, "k": k, "v": np.broadcast_to(value, v.shape).copy(), "normalize": True}
    for what, factor in (("", 1), (" and a normaliser below 0", -1)):
        call["q"] = factor * q
        o = f(**call)
        yield f"o of equal values{what}", o, np.broadcast_to(value, o.shape), 2 * bound(**call)


def unless(option, law):
    """A law that an option switches off."""
    return Law(law.name, lambda f, call, bound, rng: () if call.get(option) else law.holds(f, call, bound, rng), law.arguments)


DECAYS = Law("decays", _decays, ("decay",))
UNITS = Law("units", _units, ("decay",))
OVERWRITES = Law("overwrites", _overwrites, ("beta",))
ADDS = Law("adds", _added, ("q", "k", "v"))
MEAN = Law("weighted_mean", _mean, ("normalize",))
