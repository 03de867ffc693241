"""Inputs of `selective_scan`: generic ones, and those at which implementations break."""

import numpy as np


def sample(rng, *, T=7, c=4, n=3, G=0, batch=()):
    """Steps of 0.3 to 1.6 before softplus and rates of -0.05 to -1.5, so that past, present and every option show; G = 0: no axis of groups."""
    groups = (G,) if G else ()
    return {
        "u": rng.standard_normal((*batch, T, c)),
        "delta": rng.uniform(0.1, 1, (*batch, T, c)),
        "A": -rng.uniform(0.05, 1.5, (c, n)),
        "B": rng.standard_normal((*batch, T, *groups, n)),
        "C": rng.standard_normal((*batch, T, *groups, n)),
        "D": rng.uniform(0.5, 1.5, c) * rng.choice([-1, 1], c),
        "z": rng.standard_normal((*batch, T, c)),
        "delta_bias": rng.uniform(0.2, 0.6, c),
        "state": rng.standard_normal((*batch, c, n)),
    }


def _with(*, options=None, **changes):
    """A hard call: the sample with some arrays replaced, and options."""

    def draw(rng, **sizes):
        call = sample(rng, **sizes)
        return call | {name: change(rng, call[name]) for name, change in changes.items()} | (options or {})

    return draw


def _sometimes(value, often):
    return lambda rng, x: np.where(rng.random(x.shape) < often, value, x)


def _turned(rng, x):
    """Complex numbers of the given sizes."""
    return x * np.exp(1j * rng.uniform(-3, 3, x.shape))


def _needle(rng, x):
    return x * (np.arange(x.shape[-2]) == x.shape[-2] // 3)[:, None]


def _first(rng, x):
    return x * (np.arange(x.shape[-2]) == 0)[:, None]


def _alternating(rng, x):
    """Pairs +x, -x along the states, 0 where one is left over."""
    n = x.shape[-1]
    signs = np.where(np.arange(n) < n - n % 2, (-1.0) ** np.arange(n), 0.0)
    return np.broadcast_to(x[..., :1], x.shape) * signs


HARD = {
    "decay exactly 0": _with(A=_sometimes(-1e4, 0.4)),
    "decay exactly 1": _with(A=lambda rng, A: 0 * A),
    "decay nearly 1": _with(A=lambda rng, A: A * 2.0**-12),
    "decay slightly above 1": _with(A=lambda rng, A: -A * 2.0**-8),
    "steps of zero": _with(delta=_sometimes(0.0, 0.4), delta_bias=lambda rng, b: 0 * b),
    "steps of a thousand": _with(delta=_sometimes(1e3, 0.2)),
    "softplus where it bends": _with(options={"delta_softplus": True}, delta=lambda rng, d: rng.uniform(-4, 12, d.shape)),
    "softplus in both tails": _with(
        options={"delta_softplus": True},
        delta=lambda rng, d: np.where(rng.random(d.shape) < 0.3, rng.choice([-1e3, 100.0], d.shape), d),
    ),
    "long steps by the bias": _with(options={"delta_softplus": True}, delta_bias=lambda rng, b: b + 4),
    "steps nearly shut": _with(options={"delta_softplus": True}, delta=lambda rng, d: d - 14),
    "one input, then strong decay": _with(u=_first, delta=lambda rng, d: 0 * d + 1, A=lambda rng, A: A - 22, state=lambda rng, s: 0 * s),
    "gate in both tails": _with(z=lambda rng, z: np.where(rng.random(z.shape) < 0.5, rng.choice([-1e3, -30.0, -8.0, 50.0, 1e3], z.shape), z)),
    "one needle": _with(u=_needle, state=lambda rng, s: 0 * s),
    "cancelling states": _with(
        A=lambda rng, A: np.broadcast_to(A[:, :1], A.shape), B=lambda rng, B: np.broadcast_to(B[..., :1], B.shape), C=_alternating
    ),
    "nothing read out": _with(C=lambda rng, C: C * (rng.random(C.shape[:-1]) < 0.5)[..., None]),
    "large state": _with(state=lambda rng, s: 1e4 * s),
    "complex rates": _with(A=lambda rng, A: A + 1j * rng.uniform(-3, 3, A.shape)),
    "complex throughout": _with(A=lambda rng, A: A + 1j * rng.uniform(-3, 3, A.shape), B=_turned, C=_turned, state=_turned),
}
