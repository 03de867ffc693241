"""What the chapters on quantisation share: means of matrices, and numbers about whose integers no rounding decides."""

import numpy as np


def check_bits(operator: str, argument: str, bits) -> None:
    """Raise ValueError unless so many bits hold a sign and a value."""
    if isinstance(bits, bool) or not isinstance(bits, int | np.integer) or not 2 <= bits <= 16:
        raise ValueError(f"{operator}: {argument} must be an integer from 2 to 16, got {bits!r}")


def mean_of(w):
    """Of each matrix: (..., 1, 1); of an empty one 0."""
    return np.sum(w, axis=(-2, -1), keepdims=True) / max(w.shape[-2] * w.shape[-1], 1)


def unit_of(scale):
    """The scale, and 1 for 0: what can be divided by."""
    return np.where(scale == 0, np.ones_like(scale), scale)


def _short(x):
    """Numbers of eight bits, as bfloat16 holds them: what is decided about them is so in every precision."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(mantissa * 256) / 256, exponent)


def decided_weights(rng, shape, margin=0.05):
    """Normal weights (..., c, e), none of them near the mean or near half the mean size, where rounding would decide."""
    w = _short(rng.standard_normal(shape))
    for _ in range(1000):
        near = abs(abs(w) / unit_of(mean_of(abs(w))) - 0.5) < margin
        near |= (abs(w - mean_of(w)) < margin * mean_of(abs(w))) & (w.shape[-2] * w.shape[-1] > 1)  # one weight is its mean, exactly
        if not np.any(near):
            break
        w[near] = _short(rng.standard_normal(int(near.sum())))
    return w


def decided_activations(rng, shape, margin=0.05, bits=(8, 4, 2)):
    """Normal tokens (..., c), of which no element is near half way between two integers, at 8, 4 or 2 bits."""
    x = _short(rng.standard_normal(shape))
    for _ in range(1000):
        largest = np.max(abs(x), axis=-1, keepdims=True, initial=0)
        scaled = [abs(x) / unit_of(largest) * (2 ** (b - 1) - 1) for b in bits]
        near = np.any([abs(r - np.floor(r) - 0.5) < margin for r in scaled], axis=0)
        if not np.any(near):
            break
        x[near] = _short((rng.uniform(-1, 1, shape) * largest)[near])
    return x
