"""Hyena: long convolutions and elementwise gates in turn, an attention-like operator without attention.

    z_1 = v,        z_{k+1} = gate_k · (kernel_k * z_k + skip_k z_k),    k = 1 ... N,        y = z_{N+1}           (1)

Both steps are cheap and linear in z. A convolution carries what was said anywhere in the past to here, without looking
at the data; a gate looks at the data, without carrying anything. Alternated they do both: for fixed gates, (1) is a
product of matrices that depend on the input only through their diagonals [1, section 3.2],

    y = H v,        H = D_N S_N ... D_2 S_2 D_1 S_1,        D_k = diag(gate_k),    (S_k)_ts = kernel_k[t-s] + skip_k [t = s]   (2)

one T×T matrix for each channel, lower triangular because each factor is. With N = 2 and gates that are projections of
the input, H_ts = q_t (S_2 diag(k) S_1)_ts is an attention map in which scores are filtered where softmax would compare.
H is never needed: (1) takes N transforms of length 2T. `h3` is the case N = 2 with a shift and a state space model for
filters; kernels of any length from few parameters come from `hyena_filter`.

Glossary
    v           input of the chain                      v, z^1 in [1, definition 3.1]
    gates       N arrays like v                         x^1 ... x^N, projections of the input
    kernels     one filter for each gate, (N, K, c)     h^1 ... h^N
    skips       the filters' direct paths, (N, c)       the bias of the published code's convolution
    z, y        the chain, its end                      z^n, y = z^{N+1}

Where implementations differ
    The published code gates first: it multiplies v by one gate, and then N - 1 times convolves and gates, so that N gates
    take N - 1 filters. That is `hyena(v * first, others, kernels, skips)` here. There the gates come out of one
    projection, last gate first, after a short `causal_conv1d`; here they are given. Layouts: (batch, c, T) there, time on
    axis -2 here.

References
    [1] M. Poli, S. Massaroli, E. Nguyen, D. Y. Fu et al., "Hyena hierarchy: towards larger convolutional language
        models", ICML 2023, definition 3.1, sections 3.1-3.2 and 3.4.
    [2] N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM, 2002, sections 3.1, 3.5 and 24.1.
"""

import numpy as np

from refimpl.core.contract import Contract, tuple_of
from refimpl.core.costs import fft_depth, fft_work, log2_ceil, taps
from refimpl.laws import causal, linear, time_invariant
from refimpl.op import Cost, Form, Law, Op
from refimpl.ops.recurrence.long_conv import error_bound as convolution_bound
from refimpl.ops.recurrence.long_conv import long_conv, long_conv_fft, long_conv_vjp

CONTRACT = Contract(
    "hyena",
    takes="v (..., T, c); gates[N] (..., T, c); kernels (N, K, c); skips (N, c)",
    gives="y (..., T, c)",
)


@CONTRACT.form
def hyena(v, gates, kernels, skips=None):
    """Hyena, equation (1), each convolution one tap at a time.

    Parameters
    ----------
    v : ndarray, shape (..., T, c)
        Input, real or complex. T may be 0.
    gates : tuple of N ndarrays, each of shape (..., T, c)
        The first is applied first. With none, y is v.
    kernels : ndarray, shape (N, K, c)
        The filter before each gate; row 0 meets the newest sample. K may be shorter or longer than T.
    skips : ndarray, shape (N, c), optional
        The filters' direct paths, as if added to row 0 of the kernels.

    Returns
    -------
    y : ndarray, shape (..., T, c)

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, the numbers of gates and kernels differ, `gates` is no tuple or an array not numeric.

    Notes
    -----
    N T (2 K + 3) c operations, N (K + 3) deep; O(N T log T) by the form ``fft``. The error is at most ``error_bound``: a
    few K u for every stage of the chain that takes absolute values throughout, which may be far above y where terms cancel.

    References
    ----------
    [1], definition 3.1; and "Where implementations differ" in this module's docstring.

    Examples
    --------
    An echo of what came a step before, heard only where the gate is open:

    >>> import numpy as np
    >>> v, gate = np.array([[1.0], [2.0], [3.0], [4.0]]), np.array([[1.0], [0.0], [0.0], [1.0]])
    >>> hyena(v, (gate,), kernels=np.array([[[1.0], [0.1]]]))[:, 0]
    array([1. , 0. , 0. , 4.3])
    """
    z = _spread(v, gates)
    for gate, kernel, skip in _stages(gates, kernels, skips):
        z = gate * long_conv(z, kernel, skip)  # (..., T, c)
    return z


@CONTRACT.form
def hyena_fft(v, gates, kernels, skips=None):
    """The same by N pairs of transforms: each convolution is a product of spectra, padded so that nothing wraps around.

    N (7.5 n log2 n + ...) operations a channel for n = 2T, a logarithm of the length deep: what makes (1) subquadratic
    [1, section 3.4].
    """
    z = _spread(v, gates)
    for gate, kernel, skip in _stages(gates, kernels, skips):
        z = gate * long_conv_fft(z, kernel, skip)  # (..., T, c)
    return z


@CONTRACT.form
def hyena_matrix(v, gates, kernels, skips=None):
    """The same by (2): the matrix of every channel is multiplied out, Toeplitz factors and diagonals in turn, and meets v last.

    2 N T³ operations a channel, where (1) takes 2 N T²: not a way to compute y, but to see what attends to what.
    """
    T, H = v.shape[-2], None
    for gate, kernel, skip in _stages(gates, kernels, skips):
        factor = np.swapaxes(gate, -1, -2)[..., None] * _toeplitz(kernel, skip, T)  # (..., c, T, T)
        H = factor if H is None else factor @ H
    if H is None:
        return v
    return np.swapaxes((H @ np.swapaxes(v, -1, -2)[..., None])[..., 0], -1, -2)  # (..., T, c)


@CONTRACT.gradient
def hyena_vjp(dy, v, gates, kernels, skips=None):
    """Gradient of `hyena`: the chain backwards. With s_k = kernel_k * z_k + skip_k z_k, and g_{N+1} = dy,

        dgate_k = conj(s_k) g_{k+1},        g_k = (the adjoint of filter k) applied to conj(gate_k) g_{k+1},        dv = g_1

    The adjoint of a filter runs it backwards in time; it and the gradients of kernel and skip are `long_conv_vjp`'s.

    Parameters
    ----------
    dy : ndarray, shape (..., T, c)
        Cotangent of y.

    Returns
    -------
    dict
        "v", "gates" (a tuple), "kernels", and "skips" where they were given.
    """
    stages = list(_stages(gates, kernels, skips))
    chain = [_spread(v, gates)]
    for gate, kernel, skip in stages:
        filtered = long_conv(chain[-1], kernel, skip)
        chain[-1:] = [(chain[-1], filtered), gate * filtered]
    g, parts = dy, []
    for (gate, kernel, skip), (z, filtered) in zip(reversed(stages), reversed(chain[:-1]), strict=True):
        through = long_conv_vjp(np.conj(gate) * g, z, kernel, skip)
        parts.append((np.conj(filtered) * g, through["kernel"], through.get("skip")))
        g = through["u"]  # (..., T, c)
    d_gates, d_kernels, d_skips = zip(*reversed(parts), strict=True) if parts else ((), (), ())
    return {
        "v": g,
        "gates": d_gates,
        "kernels": np.stack(d_kernels) if parts else kernels,
        "skips": np.stack(d_skips) if parts and skips is not None else skips,
    }


def error_bound(v, gates, kernels, skips=None, *, unit, store=0.0):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`.

    With M the chain (1) of absolute values, whatever order the factors of (2) are multiplied in, each of the N filters is
    off by `long_conv`'s bound at M, of sums and of transforms, and each gate by a rounding; later filters carry that on
    [2, section 3.5]. A matrix that is multiplied out meets v in one more sum of t + 1 terms. `store` allows for operands
    and intermediate z kept in a half precision.
    """
    M = abs(_spread(v, gates))
    E = 0 * M
    for gate, kernel, skip in _stages(gates, kernels, skips):
        gate, kernel, skip = abs(gate), abs(kernel), None if skip is None else abs(skip)
        off = long_conv(E, kernel, skip) + convolution_bound(M + E, kernel, skip, unit=unit, store=store)
        M = gate * long_conv(M, kernel, skip)  # (..., T, c)
        E = gate * off + (2 * unit + 2 * store) * M
    return E + unit * np.arange(1, v.shape[-2] + 1)[:, None] * M if len(gates) else E


# -- what the forms share --------------------------------------------------------------------------------------------


def _spread(v, gates):
    """The input with the batch axes of all gates."""
    batch = np.broadcast_shapes(v.shape[:-2], *(gate.shape[:-2] for gate in gates))
    return np.broadcast_to(v, (*batch, *v.shape[-2:]))


def _stages(gates, kernels, skips):
    """(gate, kernel, skip) of every stage, in order."""
    return zip(gates, kernels, [None] * len(gates) if skips is None else skips, strict=True)


def _toeplitz(kernel, skip, T):
    """The matrix of a filter for every channel, (c, T, T): kernel_{t-s} at [t, s], 0 where that row does not exist."""
    K, c = kernel.shape
    kernel = np.concatenate([kernel, np.zeros_like(kernel, shape=(1, c))])  # a row of zeros for every delay that has none
    delay = np.arange(T)[:, None] - np.arange(T)  # t - s
    S = np.moveaxis(kernel[np.where((delay >= 0) & (delay < K), delay, K)], -1, 0)
    return S if skip is None else S + np.where(delay == 0, skip[:, None, None], np.zeros_like(skip)[:, None, None])


# -- laws ------------------------------------------------------------------------------------------------------------


def _multilinear(f, call, bound, rng):
    """y is linear in each gate and in each filter: factors 2^i on gate i and 4^-i on filter i come out as their product."""
    N = len(call["gates"])
    powers = [2.0 ** (i + 1) for i in range(N)]
    filters = np.array([4.0 ** -(i % 3) for i in range(N)], dtype=call["kernels"].real.dtype)
    scaled = {**call, "gates": tuple_of("gates", (p * g for p, g in zip(powers, call["gates"], strict=True)))}
    scaled["kernels"] = filters[:, None, None] * call["kernels"]
    if call.get("skips") is not None:
        scaled["skips"] = filters[:, None] * call["skips"]
    factor = float(np.prod(powers) * np.prod(filters))
    yield "y of scaled gates and filters", f(**scaled), factor * f(**call), 2 * factor * bound(**call)


# -- the catalogue ---------------------------------------------------------------------------------------------------


def _sample(rng, *, T=9, K=6, c=3, N=2, batch=()):
    return {
        "v": rng.standard_normal((*batch, T, c)),
        "gates": tuple_of("gates", (rng.standard_normal((*batch, T, c)) for _ in range(N))),
        "kernels": rng.standard_normal((N, K, c)) / np.sqrt(max(K, 1)),
        "skips": rng.uniform(0.3, 1, (N, c)) * rng.choice([-1, 1], (N, c)),
    }


def _with(**changes):
    """A hard call: the sample, with some arrays (of the gates, each) replaced."""

    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        for name, change in changes.items():
            call[name] = tuple_of(name, (change(rng, g) for g in call[name])) if name == "gates" else change(rng, call[name])
        return call

    return draw


def _last_tap(rng, **sizes):
    """The last that reaches: of those beyond, all but nothing would come, of which a transform leaves its noise, and gradients multiply it."""
    call = _sample(rng, **sizes)
    last = min(call["v"].shape[-2], call["kernels"].shape[-2]) - 1
    kernels = call["kernels"] * (np.arange(call["kernels"].shape[-2]) == last)[:, None]
    return call | {"kernels": kernels, "skips": 0 * call["skips"]}


def _turned(rng, x):
    return x * np.exp(1j * rng.uniform(-3, 3, x.shape))


def _of_length(length):
    def draw(rng, *, T=9, K=6, **sizes):
        return _sample(rng, T=T, K=length(T), **sizes)

    return draw


OPS = (
    Op(
        name="hyena",
        summary="z <- gate_k · (kernel_k * z + skip_k z), N times: long convolutions and gates in turn",
        contract=CONTRACT,
        forms={
            "direct": Form(
                hyena,
                lambda T, K, c, N, batch=1: Cost((2 * taps(T, K) + 3 * T) * N * c * batch, N * (min(T, K) + 3), 3 * T * c * batch),
            ),
            "fft": Form(
                hyena_fft,
                lambda T, K, c, N, batch=1: Cost(
                    (3 * fft_work(T + min(T, K)) + 6 * T + 3 * min(T, K)) * N * c * batch,
                    N * (2 * fft_depth(T + min(T, K)) + 3),
                    4 * (T + min(T, K)) * c * batch,
                ),
                on_balls=False,
                stops="non-finite data: a transform spreads its largest value over all",
            ),
            "matrix": Form(
                hyena_matrix,
                lambda T, K, c, N, batch=1: Cost(
                    (2 * T**3 * max(N - 1, 0) + 2 * N * T * T + 2 * T * T) * c * batch, N * (log2_ceil(T) + 1) + 1, 3 * T * T * c * batch
                ),
                stops="non-finite data: 0 times what lies ahead is NaN",
            ),
        },
        gradient=hyena_vjp,
        sample=_sample,
        hard={
            "gates of 0 and 1": _with(gates=lambda rng, g: np.where(rng.random(g.shape) < 0.5, 0.0, 1.0)),
            "a gate of zeros from the middle on": _with(gates=lambda rng, g: g * (np.arange(g.shape[-2]) < g.shape[-2] // 2)[:, None]),
            "only the last tap": _last_tap,
            "only the skips": _with(kernels=lambda rng, k: 0 * k),
            "kernels longer than the input": _of_length(lambda T: 2 * T + 1),
            "one needle": _with(v=lambda rng, v: v * (np.arange(v.shape[-2]) == v.shape[-2] // 3)[:, None]),
            "cancellation": _with(v=lambda rng, v: v + 1000, kernels=lambda rng, k: k - k.mean(axis=-2, keepdims=True) if k.size else k),
            "channels of other magnitudes": _with(v=lambda rng, v: v * 2.0 ** (12 * (np.arange(v.shape[-1]) % 5 - 2))),
            "complex": _with(v=_turned, gates=_turned, kernels=_turned, skips=_turned),
        },
        error_bound=error_bound,
        references=("poli2023, definition 3.1 and section 3.2", "higham2002, sections 3.5 and 24.1"),
        lengths=("T", "K"),
        sizes=({"N": 1}, {"N": 3}, {"c": 1}, {"K": 1}, {"K": 23}, {"batch": (2,)}, {"batch": (2, 3), "N": 3}),
        laws=(
            causal(CONTRACT, "v", "gates"),
            linear(CONTRACT, "v"),
            time_invariant(CONTRACT, "v", "gates"),
            Law("multilinear", _multilinear, ("gates", "kernels")),
        ),
    ),
)
