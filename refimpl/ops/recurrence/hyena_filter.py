"""Hyena's filters: kernels of any length from a small network of sines over positions, under an exponential window.

    h_0 = z,        h_{m+1} = sin(ω · (h_m W_m + b_m)),    m = 0 ... M                                          (1)
    kernel_n[k] = (h_{M+1}[k] W_n^out) · (exp(-decay_n t_k) + shift)                                            (2)

A kernel as long as the sequence, given number by number, would have as many parameters as the sequence has steps. Here
a row of it is a function of where it stands: a network reads an encoding z of position k, some waves of a fixed set of
frequencies, and gives one number for each channel of each of N filters. Sines let a few layers make fast waves out of
slow ones [2]; the window makes what is long ago count less, at a rate of its own for each channel, down to `shift` [1,
section 3.3]. Rows do not depend on each other, so a kernel may be made a part at a time, or longer than was trained for.

Glossary
    z, t             encoding and time of each position, by `hyena_positions`    PositionalEncoding(t), t in [1, equation 7]
    w_in, b_in       first layer, (p, f) and (f,)                                FFN in [1, equation 7]
    w_inner, b_inner M further layers, (M, f, f) and (M, f)
    w_out            a readout for each filter, (N, f, c), without a bias
    frequency        ω, a factor on each feature before every sine               ω_a in [1, appendix D.3]
    decay, shift     rates and floor of the window                               α, b in [1, section 3.3]

Where implementations differ
    The published code has one vector of frequencies for all layers, trained (ω = 1, 10 or 14 at the start); ports fix it,
    or give each layer its own. It reads the imaginary parts as -sin, starts its frequencies at 10⁻⁴ where the paper has 0,
    and trains z but not t, which is why both are arguments here. Its rates are spaced evenly, decay = log(100) / pct with
    1/pct from 1/1.5 to 1/0.3 over all N c channels, and shift = 0 (once 0.05). Some normalise kernels afterwards.

References
    [1] M. Poli, S. Massaroli, E. Nguyen, D. Y. Fu et al., "Hyena hierarchy: towards larger convolutional language
        models", ICML 2023, section 3.3, equation 7, and appendix D.3.
    [2] V. Sitzmann, J. N. P. Martel et al., "Implicit neural representations with periodic activation functions",
        NeurIPS 2020, section 3.1.
    [3] N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM, 2002, sections 3.1 and 3.5.
"""

import math

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.laws import linear
from refimpl.op import Cost, Form, Law, Op

__all__ = ["hyena_positions"]


def _check(arguments, sizes):
    """What shapes cannot say."""
    shift = arguments.get("shift", 0.0)
    real = isinstance(shift, int | float | np.floating | np.integer) and not isinstance(shift, bool)
    if not real or not math.isfinite(shift):
        raise ValueError(f"hyena_filter: shift must be a finite real number, got {shift!r}")


CONTRACT = Contract(
    "hyena_filter",
    takes="z:real (K, p); t:real (K); w_in:real (p, f); b_in:real (f); w_inner:real (M, f, f); b_inner:real (M, f);"
    "w_out:real (N, f, c); frequency:real (f); decay:real (c) | (N, c)",
    gives="kernels (N, K, c)",
    check=_check,
)


@CONTRACT.form
def hyena_filter(z, t, w_in, b_in, w_inner, b_inner, w_out, frequency, decay, *, shift=0.0):
    """Kernels from positions, equations (1) and (2).

    Parameters
    ----------
    z : ndarray, shape (K, p)
        Encoding of each position; `hyena_positions` makes the published one.
    t : ndarray, shape (K,)
        Time of each position, from 0 to 1, which the window reads.
    w_in, b_in : ndarray, shape (p, f) and (f,)
        First layer.
    w_inner, b_inner : ndarray, shape (M, f, f) and (M, f)
        Further layers; M may be 0.
    w_out : ndarray, shape (N, f, c)
        Readout of each of N filters.
    frequency : ndarray, shape (f,)
        Factor on each feature before every sine.
    decay : ndarray, shape (N, c) or (c,)
        Rate of each channel's window, in units of 1/t. The kit tries none below 0, of which published code takes the absolute value.
    shift : float
        What the window decays to.

    Returns
    -------
    kernels : ndarray, shape (N, K, c)
        As `hyena` takes them.

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, an array is not real, or `shift` is not a finite number.

    Notes
    -----
    2 K f (p + M f + N c) operations and K f (M + 1) sines. Every layer multiplies errors by up to ω times the norm of its
    weights: with ω = 10, three layers lose three digits and more.

    Examples
    --------
    A wave under a window, 2^-t sin(π t):

    >>> import numpy as np
    >>> t, one = np.arange(3) / 2, np.ones((1, 1))
    >>> kernels = hyena_filter(t[:, None], t, one, np.zeros(1), np.zeros((0, 1, 1)), np.zeros((0, 1)), one[None],
    ...                        frequency=np.array([np.pi]), decay=np.log([2.0]))
    >>> kernels[0, :, 0].round(6)
    array([0.      , 0.707107, 0.      ])
    """
    h = z  # (K, p)
    for w, b in _layers(w_in, b_in, w_inner, b_inner):
        h = np.sin(frequency * (h @ w + b))  # (K, f)
    return (h @ w_out) * _window(t, decay, shift)  # (N, K, c)


@CONTRACT.gradient
def hyena_filter_vjp(dy, z, t, w_in, b_in, w_inner, b_inner, w_out, frequency, decay, *, shift=0.0):
    """Gradient of `hyena_filter`: window and readout, then the layers from the last to the first. With a_m = h_m W_m + b_m,

        da_m = ω cos(ω a_m) dh_{m+1},    dW_m = h_mᵀ da_m,    db_m = Σ_k da_m,    dh_m = da_m W_mᵀ,    dω = Σ_m Σ_k a_m cos(ω a_m) dh_{m+1}

    The window e = exp(-decay t) takes e times the cotangent of each kernel before it: d decay = -Σ_k t e de, and so t.

    Parameters
    ----------
    dy : ndarray, shape (N, K, c)
        Cotangent of the kernels.

    Returns
    -------
    dict
        A gradient for each array.
    """
    layers, hs, sums = _layers(w_in, b_in, w_inner, b_inner), [z], []
    for w, b in layers:
        sums.append(hs[-1] @ w + b)  # (K, f)
        hs.append(np.sin(frequency * sums[-1]))
    window = _window(t, decay, shift)  # (N, K, c) or (1, K, c)
    through_window = dy * (hs[-1] @ w_out)  # (N, K, c)
    d_rate = through_window * (window - shift)  # of the exponents -decay t
    d_out = dy * window
    dh = (d_out @ np.swapaxes(w_out, -1, -2)).sum(axis=0)  # (K, f)
    d_frequency, d_layers = np.zeros_like(frequency), []
    for (w, _), h, a in zip(reversed(layers), reversed(hs[:-1]), reversed(sums), strict=True):
        bent = np.cos(frequency * a) * dh
        d_frequency = d_frequency + (a * bent).sum(axis=0)
        da = frequency * bent  # (K, f)
        d_layers.append((h.T @ da, da.sum(axis=0)))
        dh = da @ w.T
    d_w, d_b = zip(*reversed(d_layers), strict=True)
    rates = decay if decay.ndim == 2 else decay[None, :]  # (N or 1, c)
    return {
        "z": dh,
        "t": -(rates[:, None, :] * d_rate).sum(axis=(0, 2)),
        "w_in": d_w[0],
        "b_in": d_b[0],
        "w_inner": np.stack(d_w[1:]) if len(w_inner) else w_inner,
        "b_inner": np.stack(d_b[1:]) if len(b_inner) else b_inner,
        "w_out": hs[-1].T @ d_out,
        "frequency": d_frequency,
        "decay": -(t[:, None] * d_rate).sum(axis=1),
    }


def error_bound(z, t, w_in, b_in, w_inner, b_inner, w_out, frequency, decay, *, unit, store=0.0, shift=0.0):
    """|computed - exact|, elementwise, in arithmetic of unit roundoff `unit`: running error analysis, layer by layer.

    A product of matrices of inner size n is off by (n + 2) u of the same product of absolute values [3, section 3.5], and
    carries what its operand was off by; a sine passes on ω times that, and 2 u of its argument and itself, and never more
    than 2. The exponent of the window makes its rounding relative to decay t. `store` allows for operands and activations
    kept in a half precision.
    """
    h, E = z, 0 * z
    for w, b in _layers(w_in, b_in, w_inner, b_inner):
        sums = abs(h) @ abs(w) + abs(b)
        E = abs(frequency) * (E @ abs(w) + ((w.shape[0] + 4) * unit + 3 * store) * sums) + 2 * unit + store
        E = np.minimum(E, 2)
        h = np.sin(frequency * (h @ w + b))
    size = abs(h) @ abs(w_out)
    off = E @ abs(w_out) + ((w_out.shape[1] + 2) * unit + 2 * store) * size
    fade = _window(t, decay, 0.0)
    exponents = abs(np.log(fade))
    return (
        abs(fade + shift) * (off + (2 * unit + store) * size)
        + ((2 * exponents + 3) * unit + 2 * store) * fade * size
        + unit * abs(shift) * size
    )


def hyena_positions(length, bands, *, horizon=None):
    """The published encoding of positions: time, and the real and imaginary parts of `bands` complex waves.

        t_k = k / (horizon - 1),        z_k = (t_k, cos(f_j φ_k) for all j, -sin(f_j φ_k) for all j),        φ_k = 2π k / horizon

    with frequencies f_j evenly spaced from 10⁻⁴ to bands - 1 (in the paper from 0: waves that fit the horizon).

    Parameters
    ----------
    length : int
        Number of positions.
    bands : int
        Number of frequencies.
    horizon : int, optional
        The length for which times run from 0 to 1; `length` by default. A model that was trained at one length keeps it.

    Returns
    -------
    z : ndarray, shape (length, 1 + 2 bands)
    t : ndarray, shape (length,)

    Raises
    ------
    ValueError
        If `length` is negative, or `bands` or `horizon` is below 1.

    References
    ----------
    [1], appendix D.3.

    Examples
    --------
    >>> z, t = hyena_positions(4, bands=2)
    >>> t
    array([0.        , 0.33333333, 0.66666667, 1.        ])
    >>> z[:, [2, 4]].round(3) + 0.0  # the wave of frequency 1, cos and -sin: quarter turns
    array([[ 1.,  0.],
           [ 0., -1.],
           [-1.,  0.],
           [ 0.,  1.]])
    """
    for name, value, least in (("length", length, 0), ("bands", bands, 1), ("horizon", length if horizon is None else horizon, 0)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"hyena_positions: {name} must be an integer of at least {least}, got {value!r}")
    horizon = max(length if horizon is None else horizon, 1)
    k = np.arange(length)
    t = k / max(horizon - 1, 1)
    waves = np.exp(-2j * np.pi * k[:, None] / horizon * np.linspace(1e-4, bands - 1, bands))  # (length, bands)
    return np.concatenate([t[:, None], waves.real, waves.imag], axis=-1), t


# -- what the functions share ----------------------------------------------------------------------------------------


def _layers(w_in, b_in, w_inner, b_inner):
    return [(w_in, b_in), *zip(w_inner, b_inner, strict=True)]


def _window(t, decay, shift):
    """exp(-decay t) + shift: (N, K, c), or (1, K, c) where all filters fade alike."""
    rates = decay if decay.ndim == 2 else decay[None, :]
    return np.exp(-rates[:, None, :] * t[:, None]) + shift


# -- laws ------------------------------------------------------------------------------------------------------------


def _rows(f, call, bound, rng):
    """A row depends on its own position only: half of the positions give half of the rows."""
    half = call["z"].shape[0] // 2
    some = {**call, "z": call["z"][half:], "t": call["t"][half:]}
    yield "kernels of the later positions", f(**some), f(**call)[:, half:], 2 * bound(**call)[:, half:]


def _window_is_a_factor(f, call, bound, rng):
    """Without a floor, kernels are those that do not fade, times exp(-decay t)."""
    fading = {n: v for n, v in call.items() if n != "shift"}
    lasting = {**fading, "decay": 0 * call["decay"]}
    window = _window(call["t"], call["decay"], 0.0)
    yield "kernels under the window", f(**fading), f(**lasting) * window, 2 * bound(**fading) + window * bound(**lasting)


# -- the catalogue ---------------------------------------------------------------------------------------------------


def _sample(rng, *, K=9, p=5, f=6, M=2, N=2, c=3, batch=()):
    """Filters have no batch axes: `batch` is taken, as by every sample, and changes nothing."""

    def weights(*shape):
        return rng.standard_normal(shape) / np.sqrt(max(shape[-2], 1))

    t = np.sort(rng.random(K))
    return {
        "z": np.concatenate([t[:, None], rng.uniform(-1, 1, (K, max(p - 1, 0)))], axis=-1)[:, :p],
        "t": t,
        "w_in": weights(p, f),
        "b_in": rng.uniform(-1, 1, f),
        "w_inner": weights(M, f, f),
        "b_inner": rng.uniform(-1, 1, (M, f)),
        "w_out": weights(N, f, c),
        "frequency": rng.uniform(0.7, 1.5, f),
        "decay": rng.uniform(0.5, 4, (N, c)),
    }


def _with(**changes):
    """A hard call: the sample, with some arrays or options replaced."""

    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        return call | {name: change(rng, call.get(name)) for name, change in changes.items()}

    return draw


def _published(rng, *, K=9, p=5, **sizes):
    """Positions as published, and the rates."""
    bands = max(p // 2, 1)
    call = _sample(rng, K=K, p=2 * bands + 1, **sizes)
    call["z"], call["t"] = hyena_positions(K, bands)
    rates = np.linspace(1 / 1.5, 1 / 0.3, call["decay"].size)
    return call | {"decay": np.log(100) * rates.reshape(call["decay"].shape), "shift": 0.05}


OPS = (
    Op(
        name="hyena_filter",
        summary="kernels from positions: a network of sines under an exponential window",
        contract=CONTRACT,
        forms={
            "definition": Form(
                hyena_filter,
                lambda K, p, f, M, N, c, batch=1: Cost(
                    K * (2 * f * (p + M * f + N * c) + 3 * f * (M + 1) + 4 * N * c),
                    (M + 1) * (log2_ceil(max(p, f)) + 4) + log2_ceil(f) + 2,
                    2 * K * (f + N * c),
                ),
            ),
        },
        gradient=hyena_filter_vjp,
        sample=_sample,
        options={"shift": (0.0, 0.3, -0.2)},
        hard={
            "positions as published": _published,
            "fast sines": _with(frequency=lambda rng, w: 10 + 0 * w),
            "no decay": _with(decay=lambda rng, d: 0 * d),
            "what has faded": _with(decay=lambda rng, d: 60 * d),
            "no waves": _with(w_in=lambda rng, w: 0 * w, b_in=lambda rng, b: 0 * b, b_inner=lambda rng, b: 0 * b),
            "one rate for all filters": _with(decay=lambda rng, d: d[0]),
        },
        error_bound=error_bound,
        references=("poli2023, section 3.3", "sitzmann2020, section 3.1", "higham2002, section 3.5"),
        lengths=("K",),
        sizes=({"M": 0}, {"N": 1}, {"N": 3, "M": 1}, {"p": 1}, {"f": 1}, {"c": 1, "f": 16}),
        laws=(linear(CONTRACT, "w_out"), Law("rows", _rows, ("z", "t")), Law("window", _window_is_a_factor, ("decay",))),
    ),
)
