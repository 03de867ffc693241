"""What layer norm and group norm share: the normalised vector, its gradient and its error, and rows at which norms break."""

import numpy as np

from refimpl.core.numerics import constant


def normalised(x, eps):
    """(x - μ) / √(v + ε) over the last axis, and 1 / √(v + ε)."""
    away = x - _mean(x)
    r = 1 / np.sqrt(_mean(away * away) + constant(eps, x))  # (..., 1)
    return away * r, r


def normalised_vjp(dn, n, r):
    """The gradient of x, from that of n."""
    return r * (dn - _mean(dn) - n * _mean(n * dn))


def normalised_bound(x, eps, unit, store=0.0):
    """n, and what it may be off.

    The mean is off by c + 1 roundings of mean |x|, which moves all deviations d; the variance by 2 |d| times that (and its
    square), and by c + 4 roundings of its own; n by the deviation's error over √(v + ε), and by half the variance's
    relative error. Half-precision code that is written out rounds the mean, which moves all deviations together (the
    variance by the square only, as they sum to 0), the deviations, their squares, the variance, with ε, its root and n.
    """
    c, mean = x.shape[-1], _mean(x)
    away = x - mean
    of_mean = (c + 1) * unit * _mean(abs(x))
    total = _mean(away * away) + constant(eps, x)
    of_away = of_mean + unit * abs(away)
    of_total = _mean(2 * abs(away) * of_away + of_away * of_away) + (c + 4) * unit * total
    safe = np.where(total == 0, np.ones_like(total), total)
    n, shift = away / np.sqrt(safe), store * abs(mean)
    of_root = of_total / safe + 4 * unit + (shift * shift + 2 * underflow(store)) / (2 * safe) + 4 * store
    return n, (of_away + shift + store * abs(away)) / np.sqrt(safe) + abs(n) * of_root


def underflow(store):
    """What the square of a small number, or a small ε, loses in float16, whose least number is 2^-24."""
    return 2.0**-24 if store == 2.0**-11 else 0.0


def _mean(x):
    return np.sum(x, axis=-1, keepdims=True) / max(x.shape[-1], 1)  # (..., 1)


def small_rows(x, factor):
    """Rows made small, and the first one large: float16 holds that not, as little as it holds the small ones' squares and eps."""
    first = (np.arange(x.size // max(x.shape[-1], 1)) == 0).reshape(*x.shape[:-1], 1)
    return x * np.where(first, 2.0**40, factor)


def hard_rows(sample):
    """Rows at which norms break, of a sample with x."""

    def draws(change, options=None):
        def draw(rng, **sizes):
            call = sample(rng, **sizes)
            return call | {"x": change(rng, call["x"])} | (options or {})

        return draw

    return {
        "rows of zeros": draws(lambda rng, x: x * (rng.random((*x.shape[:-1], 1)) < 0.5)),
        "constant rows": draws(lambda rng, x: 0 * x + x[..., :1]),
        "far from 0": draws(lambda rng, x: x + 4096),
        "far from 0, one of them a step further": draws(lambda rng, x: 256 + 2.0 * (np.arange(x.shape[-1]) == x.shape[-1] // 2) + 0 * x),
        "narrower than eps": draws(lambda rng, x: x * 2.0**-10),
        "narrow, and a smaller eps": draws(lambda rng, x: small_rows(x, 2.0**-13), {"eps": 1e-12}),
        "very narrow, and hardly an eps": draws(lambda rng, x: small_rows(x, 2.0**-24), {"eps": 1e-20}),
        "large": draws(lambda rng, x: x * 2.0**40),
        # float16 code that squares as it is overflows beyond 256, which the contract lets it
        "one needle": draws(lambda rng, x: np.where(np.arange(x.shape[-1]) == 0, 200.0, x / 1000)),
    }
