"""What every right mLSTM satisfies beside causality and hand-off: the stabiliser is a choice of units, the memory recalls."""

import numpy as np

from refimpl.op import Law


def _same_memory(f, call, bound, rng):
    """(C, n, m) and (4 C, 4 n, m - log 4) are the same memory, while eps = 0."""
    if call.get("state") is None or call.get("eps"):
        return
    call = {**call, "return_state": False}
    C, n, m = call["state"]
    other = call["state"]._replace(C=4 * C, n=4 * n, m=m - np.log(np.asarray(4, dtype=m.dtype)))
    yield "h, the state written in other units", f(**{**call, "state": other}), f(**call), 4 * bound(**call)


def _recalls(f, call, bound, rng):
    """d orthogonal keys, written with gates of 1, give back d values: the capacity of a d × e memory."""
    like, d, e = call["q"], call["q"].shape[-1], call["v"].shape[-1]
    keys, nothing = np.eye(d, dtype=like.dtype)[None], np.zeros((1, d, d), dtype=like.dtype)
    v = rng.standard_normal((1, d, e)).astype(like.dtype)
    first_half = (np.arange(2 * d) < d)[None]
    written_then_read = {
        "q": np.concatenate([nothing, keys], axis=-2),
        "k": np.concatenate([keys, nothing], axis=-2) * np.sqrt(np.asarray(d, dtype=like.dtype)),
        "v": np.concatenate([v, 0 * v], axis=-2),
        "i": np.where(first_half, 0, -200).astype(like.dtype),
        "f": np.zeros((1, 2 * d), dtype=like.dtype),
        "forget": "exp",
    }
    h = f(**written_then_read)
    yield "what orthogonal keys recall", h[..., d:, :], v, 2 * bound(**written_then_read)[..., d:, :]


SAME_MEMORY = Law("same_memory", _same_memory, ("state",))
RECALLS = Law("recalls", _recalls, ("q", "k", "v"))
