"""What every right linear attention satisfies beside causality and hand-off: what a memory of d × e holds, and what is no decay."""

import numpy as np

from refimpl.op import Law


def _plain(f, call, bound, rng):
    """A log-decay of zero, per head or per channel, is no decay: retention and GLA without forgetting are linear attention."""
    call = {n: x for n, x in call.items() if n != "decay"}
    call["return_state"] = False
    k, state = call["k"], call.get("state")
    want, limit = f(**call), 2 * bound(**call)
    yield "o with a log-decay of 0", f(**call, decay=np.zeros_like(k[..., 0])), want, limit
    if call.get("feature_map") is None and (state is None or isinstance(state, tuple) or state.shape[-2] == k.shape[-1]):
        yield "o with log-decays of 0 per channel", f(**call, decay=np.zeros_like(k)), want, limit


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


def _scale_cancels(f, call, bound, rng):
    """Normalised, o is a weighted mean: queries twice as long give the same, bit by bit."""
    call = {"q": abs(call["q"]) + 1, "k": abs(call["k"]) + 1, "v": call["v"], "normalize": True}
    yield "o of twice the queries", f(**call | {"q": 2 * call["q"]}), f(**call), 2 * bound(**call)


def unless(option, law):
    """A law that an option switches off."""
    return Law(law.name, lambda f, call, bound, rng: () if call.get(option) else law.holds(f, call, bound, rng), law.arguments)


PLAIN = Law("no_decay", _plain, ("decay",))
OVERWRITES = Law("overwrites", _overwrites, ("beta",))
ADDS = Law("adds", _added, ("q", "k", "v"))
SCALE_CANCELS = Law("scale_cancels", _scale_cancels, ("normalize",))
