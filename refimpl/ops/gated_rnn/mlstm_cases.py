"""Inputs at which mLSTMs break: gates far out, memories that are empty, normalisers near nothing."""

import numpy as np


def hard_inputs(sample):
    """The hard calls of `Op.hard`, each a change of the sample."""

    def with_(**changes):
        """A hard call: the sample, with some arrays replaced and some options set."""

        def draw(rng, **sizes):
            call = sample(rng, **sizes)
            return call | {name: change(rng, call[name]) if name in call else change for name, change in changes.items()}

        return draw

    def sometimes(value):
        return lambda rng, x: np.where(rng.random(x.shape) < 0.3, value + x, x)

    def gates_shut(rng, **sizes):
        """Single steps that write nothing or keep nothing. Not both, and not the first: e^-m would leave the range of floats."""
        call = sample(rng, **sizes)
        which = rng.random(call["i"].shape) * (np.arange(call["i"].shape[-1]) > 0)
        return call | {"i": call["i"] - 1e3 * (which > 0.75), "f": call["f"] - 1e3 * ((which > 0.5) & (which < 0.75))}

    def written_once(rng, **sizes):
        """One write of e^60, then a forget gate of -100 and no more: the stabiliser falls to -40, and the result with it."""
        call = sample(rng, **sizes)
        t = np.arange(call["i"].shape[-1])
        i, f = np.where(t == 0, 60.0, -1e3), np.where(t == 1, -100.0, 30.0)
        return call | {"i": i + 0 * call["i"], "f": f + 0 * call["f"]}

    return {
        "gates of -1e3": gates_shut,
        "written once, then forgotten": written_once,
        "large keys": with_(k=lambda rng, x: 128 * x),
        "gates of +50": with_(i=sometimes(50.0), f=sometimes(50.0)),
        "exponential forget gates of +50": with_(f=sometimes(50.0), forget="exp"),
        "all gates far below": with_(i=lambda rng, x: x - 40, f=lambda rng, x: x - 40, state=lambda rng, s: s._replace(m=s.m - 40)),
        "huge common offset": with_(i=lambda rng, x: x + 300, state=lambda rng, s: s._replace(m=s.m + 300)),
        "queries of zeros": with_(  # m stays below 80: where e^-m vanishes, the whole normaliser would
            q=lambda rng, x: x * (rng.random((*x.shape[:-1], 1)) < 0.5), i=lambda rng, x: x + 60, f=lambda rng, x: -abs(x)
        ),
        "small queries": with_(q=lambda rng, x: x * 2.0**-17, i=lambda rng, x: x + 40, state=lambda rng, s: s._replace(m=s.m + 40)),
        "nothing is forgotten": with_(f=lambda rng, x: 0 * x, forget="exp"),
        "no initial state": with_(state=lambda rng, s: None),
        "empty initial state": with_(state=lambda rng, s: type(s)(0 * s.C, 0 * s.n, np.full_like(s.m, -np.inf))),
        "one needle": with_(
            i=lambda rng, x: 0 * x + np.where(np.arange(x.shape[-1]) == x.shape[-1] // 3, 20.0, -20.0), f=lambda rng, x: x + 8
        ),
    }
