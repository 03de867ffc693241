"""Inputs of `ssd`: generic ones, and those at which implementations break; and a law of its own."""

import numpy as np

from refimpl.op import Law


def sample(rng, *, H=4, G=2, T=7, p=3, n=4, batch=()):
    """Steps of 0.3 to 1.6 before softplus and rates of -0.1 to -1.5, so that past, present, limits and every option show."""
    return {
        "x": rng.standard_normal((*batch, H, T, p)),
        "dt": rng.uniform(0.1, 1, (*batch, H, T)),
        "A": -rng.uniform(0.1, 1.5, H),
        "B": rng.standard_normal((*batch, G, T, n)),
        "C": rng.standard_normal((*batch, G, T, n)),
        "D": rng.uniform(0.5, 1.5, H) * rng.choice([-1, 1], H),
        "z": rng.standard_normal((*batch, H, T, p)),
        "dt_bias": rng.uniform(0.2, 0.6, H),
        "state": rng.standard_normal((*batch, H, n, p)),
    }


def _with(*, options=None, **changes):
    """A hard call: the sample with some arrays replaced, and options."""

    def draw(rng, **sizes):
        call = sample(rng, **sizes)
        return call | {name: change(rng, call[name]) for name, change in changes.items()} | (options or {})

    return draw


def _sometimes(value, often):
    return lambda rng, v: np.where(rng.random(v.shape) < often, value, v)


def _cancels(rng, v):
    """Pairs +v, -v along the states, 0 where one is left over."""
    n = v.shape[-1]
    return np.broadcast_to(v[..., :1], v.shape) * np.where(np.arange(n) < n - n % 2, (-1.0) ** np.arange(n), 0.0)


HARD = {
    "decay exactly 0": _with(A=_sometimes(-1e4, 0.4)),
    "decay exactly 1": _with(A=lambda rng, A: 0 * A),
    "decay nearly 1": _with(A=lambda rng, A: A * 2.0**-12),
    "decay slightly above 1": _with(A=lambda rng, A: -A * 2.0**-8),
    "negative steps, which are clipped": _with(dt=_sometimes(-2.0, 0.4), options={"dt_limit": (0.0, np.inf)}),
    "steps of a thousand": _with(dt=_sometimes(1e3, 0.2)),
    "softplus where it bends": _with(options={"dt_softplus": True}, dt=lambda rng, d: rng.uniform(-4, 12, d.shape)),
    "softplus in both tails": _with(
        options={"dt_softplus": True}, dt=lambda rng, d: np.where(rng.random(d.shape) < 0.3, rng.choice([-1e3, 100.0], d.shape), d)
    ),
    "long steps by the bias": _with(options={"dt_softplus": True}, dt_bias=lambda rng, b: b + 4),
    "steps nearly shut": _with(options={"dt_softplus": True}, dt=lambda rng, d: d - 14),
    "one input, then strong decay": _with(
        x=lambda rng, x: x * (np.arange(x.shape[-2]) == 0)[:, None], dt=lambda rng, d: 0 * d + 1, A=lambda rng, A: A - 4, state=lambda rng, s: 0 * s
    ),
    "gate in both tails": _with(z=lambda rng, z: np.where(rng.random(z.shape) < 0.5, rng.choice([-1e3, -30.0, -8.0, 50.0, 1e3], z.shape), z)),
    "one needle": _with(x=lambda rng, x: x * (np.arange(x.shape[-2]) == x.shape[-2] // 3)[:, None], state=lambda rng, s: 0 * s),
    "cancelling states": _with(B=lambda rng, B: np.broadcast_to(B[..., :1], B.shape), C=_cancels),
}


def _holds(f, call, bound, rng):
    """A step of length 0 between two others, whatever it brings, leaves everything else as it is."""
    low, _ = call.get("dt_limit", (0.0, np.inf))
    T = call["x"].shape[-2]
    if low != 0 or T == 0:
        return
    at = int(rng.integers(T))
    longer = dict(call)
    for name in ("x", "B", "C", "z"):
        if call.get(name) is not None:
            longer[name] = np.insert(call[name], at, call[name][..., at, :], axis=-2)
    none = 0.0 if call.get("dt_bias") is None else -call["dt_bias"]
    longer["dt"] = np.insert(call["dt"], at, -1e4 if call.get("dt_softplus") else none, axis=-1)  # 0 after the bias, or after softplus
    without_state = {"return_state": False}
    y, limit, other = f(**(call | without_state)), bound(**(call | without_state)), f(**(longer | without_state))
    yield "y without the step of 0", np.delete(other, at, axis=-2), y, 2 * limit


NOTHING_TAKES_NO_TIME = Law("nothing_takes_no_time", _holds, ("dt",))
