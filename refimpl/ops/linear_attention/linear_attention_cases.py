"""Inputs of linear attention: a generic call, how a call's arrays follow its options, and where implementations break."""

import numpy as np

from refimpl.ops.linear_attention.feature_maps import feature_map_of, width
from refimpl.ops.linear_attention.state import State


def sample(rng, *, Hq=4, Hkv=2, T=7, d=4, e=3, per_channel=False, batch=()):
    """Keys of length 0.7 to 1.15 and learning rates of 0.4 to 1.5, so that the delta rule forgets; decays of 0.5 to 1.1 a step."""
    heads = (*batch, Hkv)
    k = rng.standard_normal((*heads, T, d))
    return {
        "q": rng.standard_normal((*batch, Hq, T, d)),
        "k": k / np.sqrt((k * k).sum(axis=-1, keepdims=True)) * rng.uniform(0.7, 1.15, (*heads, T, 1)),
        "v": rng.standard_normal((*heads, T, e)),
        "decay": rng.uniform(-0.7, 0.1, (*heads, T, d) if per_channel else (*heads, T)),
        "beta": rng.uniform(0.4, 1.5, (*heads, T)),
        "state": rng.standard_normal((*heads, d, e)),
    }


def arrange(call):
    """A call whose arrays fit its options.

    With a feature map the state and a decay per channel get its width, and beta is small enough for the longer keys not to
    make the memory explode; with `normalize` there is no beta, the state is (S, z), q·z is not near 0 and does not grow on and on.
    """
    call, option = dict(call), call.get("feature_map")
    if call.get("normalize"):
        call.pop("beta", None)
        for name in ("q", "k"):
            x = call[name]
            channels = {None: slice(None), "relu": slice(0, 1)}.get(option, slice(0, 0))
            if not np.all(x[..., channels] > 0):
                call[name] = x.copy()
                call[name][..., channels] = abs(x[..., channels]) + x.dtype.type(0.125)
        if call.get("decay") is not None:
            g, time = call["decay"], -2 if call["decay"].ndim == call["k"].ndim else -1
            call["decay"] = np.where(np.cumsum(g, axis=time) > 60, np.minimum(g, 0), g)
    if option is not None and call.get("beta") is not None:
        phi = feature_map_of(option)(call["k"])
        call["beta"] = np.minimum(call["beta"], 1.5 / ((phi * phi).sum(axis=-1) + 2.0**-20)).astype(call["beta"].dtype)
    m, state = width(option, call["k"]), call.get("state")
    if call.get("decay") is not None and call["decay"].ndim == call["k"].ndim:
        call["decay"] = _resized(call["decay"], m, -1)
    if state is None:
        return call
    S, z = state if isinstance(state, tuple) else (state, abs(state).sum(axis=-1) + state.dtype.type(0.5))
    S, z = _resized(S, m, -2), _resized(z, m, -1)
    return call | {"state": State(S, z) if call.get("normalize") else S}


def _resized(x, size, axis):
    """The same entries over and over along an axis, or only its first ones."""
    return np.take(x, np.arange(size) % max(x.shape[axis], 1), axis=axis)


def _with(*, per_channel=False, options=None, **changes):
    """A hard call: the sample, with some arrays replaced, and options."""

    def draw(rng, **sizes):
        call = sample(rng, **{"per_channel": per_channel, **sizes})
        call |= {name: change(rng, call[name]) for name, change in changes.items()}
        return arrange({name: x for name, x in call.items() if x is not None} | (options or {}))

    return draw


def _gates(value, often=0.3):
    return lambda rng, g: np.where(rng.random(g.shape) < often, value, g)


def _spikes(axis):
    """-40 and, two steps later, +40: next to nothing is left, and then e^40 times what was written in between.

    Not more: where two such memories meet in a gradient, dS ∘ S before it is multiplied by e^-40, float32 holds e^80.
    """

    def change(rng, g):
        spikes = np.select([np.arange(g.shape[axis]) % 5 == 1, np.arange(g.shape[axis]) % 5 == 3], [-40.0, 40.0], 0.0)
        return g + (spikes if axis == -1 else spikes[:, None])

    return change


def _grows_from_nothing(rng, g):
    """+3 a step for the first half of the steps, while nothing has been written: a huge factor times 0."""
    return np.where(np.arange(g.shape[-1]) < g.shape[-1] // 2, 3.0, g)


HARD = {
    "decays of 0": _with(decay=_gates(-1e3)),
    "decays of 0 in channels": _with(per_channel=True, decay=_gates(-1e3)),
    "gates of -40 and +40": _with(decay=_spikes(-1)),
    "gates of -40 and +40 in channels": _with(per_channel=True, decay=_spikes(-2), beta=lambda rng, b: None),
    "a negative scale": _with(options={"scale": -0.6}),
    "a scale of 0": _with(options={"scale": 0.0, "normalize": False}),
    "growth of nothing": _with(
        options={"feature_map": None},  # the others make something of keys of 0
        decay=_grows_from_nothing,
        k=lambda rng, k: k * (np.arange(k.shape[-2]) >= k.shape[-2] // 2)[:, None],
        state=lambda rng, S: None,
    ),
    "one key over and over": _with(
        k=lambda rng, k: 0 * k + k[..., :1, :] / np.sqrt((k[..., :1, :] ** 2).sum(axis=-1, keepdims=True)) if k.shape[-2] else k,
        beta=lambda rng, b: 0 * b + 1,
        decay=lambda rng, g: 0 * g,
    ),
    "reflections": _with(
        k=lambda rng, k: k / np.sqrt((k * k).sum(axis=-1, keepdims=True)), beta=lambda rng, b: 0 * b + 2, decay=lambda rng, g: 0 * g
    ),
    "keys and queries of zeros": _with(
        per_channel=True,
        q=lambda rng, x: x * (rng.random((*x.shape[:-1], 1)) < 0.5),
        k=lambda rng, x: x * (rng.random((*x.shape[:-1], 1)) < 0.5),
    ),
    "values that cancel": _with(
        v=lambda rng, v: v * np.where(np.arange(v.shape[-2]) % 2, -1e3, 1e3)[:, None], beta=lambda rng, b: None, decay=lambda rng, g: 0 * g
    ),
    "normalised, decays of 0": _with(decay=_gates(-1e3), options={"normalize": True, "feature_map": "elu+1"}),
    "normalised, small queries": _with(
        q=lambda rng, q: abs(q) * 2.0**-17 + 2.0**-20, k=lambda rng, k: abs(k) + 0.125, options={"normalize": True}
    ),
    "features where relu bends": _with(
        q=lambda rng, x: x * (rng.random(x.shape) < 0.5),
        k=lambda rng, x: x * (rng.random(x.shape) < 0.5),
        options={"normalize": False, "feature_map": "relu"},
    ),
    "queries beyond the range of exp": _with(  # the branch of elu that is not taken overflows
        q=lambda rng, x: x + 90.0 * (rng.random(x.shape) < 0.2), options={"normalize": False, "feature_map": "elu+1"}
    ),
    "features in both tails": _with(
        q=lambda rng, x: x * rng.choice([1.0, 8.0], x.shape),
        k=lambda rng, x: x * rng.choice([1.0, 8.0], x.shape),
        options={"normalize": True, "feature_map": "taylor"},
    ),
}
