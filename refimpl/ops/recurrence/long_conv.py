"""Long convolution: y_t = Σ_s kernel_s u_{t-s} + skip·u_t, a filter as long as the sequence.

    y_t = Σ_{s=0}^{min(t, K-1)} kernel_s u_{t-s} + skip·u_t,        t = 0 ... T-1                          (1)

Each channel is filtered by a kernel of its own. This is the other life of every linear recurrence with constant
coefficients: unrolled, S4 and its relatives are long convolutions, and Hyena learns the kernel directly. What looks
like T K operations is a product of polynomials, and so of Fourier transforms [1]:

    y = F⁻¹(F kernel · F u),        F a transform of length at least T + K - 1                             (2)

The length is the whole point: a transform of length T multiplies modulo z^T - 1, and the tail that should fall off the
end comes back at the beginning, so that outputs depend on the future. Kernel rows at K > T meet no input.

Glossary
    u, y     input, output               u, y in [2, section 3.1]
    kernel   K, the impulse response     h in [2], K̄ in S4
    skip     D, a direct path            D in S4, the "bias" of Hyena's filters

Where implementations differ
    Neural "convolutions" (torch conv1d, the weight of causal_conv1d) are correlations: their last tap meets the newest
    sample. Here, as in signal processing, kernel_0 does. Layouts: (B, D, T) in the public CUDA kernels, time here on
    axis -2. Bidirectional kernels (S4, Hyena) run a second kernel over the reversed sequence: a sum of two calls.

References
    [1] A. V. Oppenheim and R. W. Schafer, "Discrete-Time Signal Processing", 3rd ed., 2010, section 8.7 (linear
        convolution by the DFT; overlap-add).
    [2] M. Poli, S. Massaroli, E. Nguyen et al., "Hyena hierarchy", ICML 2023, section 2.
    [3] D. Y. Fu, H. Kumbong, E. Nguyen and C. Ré, "FlashFFTConv", ICLR 2024, section 3.1.
    [4] N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM, 2002, sections 3.1, 24.1.
"""

import math

import numpy as np
import scipy.fft

from refimpl.core.contract import Contract
from refimpl.core.costs import fft_depth, fft_work, log2_ceil
from refimpl.core.options import positive_int
from refimpl.laws import causal, linear, time_invariant
from refimpl.op import Cost, Form, Law, Op
from refimpl.ops.recurrence.monarch import monarch_dft, monarch_matmul_blocks

CONTRACT = Contract(
    "long_conv",
    takes="u (..., T, c); kernel (K, c) | (..., K, c); skip (c)",
    gives="y (..., T, c)",
)


@CONTRACT.form
def long_conv(u, kernel, skip=None):
    """Causal convolution along time, equation (1), one tap at a time.

    Parameters
    ----------
    u : ndarray, shape (..., T, c)
        Input, real or complex. T may be 0.
    kernel : ndarray, shape (K, c) or (..., K, c)
        Impulse response of each channel; kernel_0 meets the newest sample. K may be shorter or longer than T, or 0.
    skip : ndarray, shape (c,), optional
        Coefficient of the direct path, as if added to kernel_0.

    Returns
    -------
    y : ndarray, shape (..., T, c)

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit or an array is not numeric.

    Notes
    -----
    2 T K c operations, K deep. The error of y_t is at most (min(t + 1, K) + 3) u times the same sum of absolute values
    here; the forms by transform add a few u log2 T times ‖kernel‖ ‖u‖ of the channel: they lose relative accuracy
    where the output is far smaller than that.

    References
    ----------
    [1], section 8.7; and "Where implementations differ" in this module's docstring.

    Examples
    --------
    >>> import numpy as np
    >>> long_conv(np.array([[1.0], [0.0], [10.0]]), np.array([[3.0], [2.0], [1.0]]))[:, 0]
    array([ 3.,  2., 31.])
    """
    T, K = u.shape[-2], kernel.shape[-2]
    y = _silence(u, kernel)  # (..., T, c)
    for s in range(min(T, K)):
        y[..., s:, :] += kernel[..., s, None, :] * u[..., : T - s, :]  # what arrives with a delay of s
    return _with_skip(y, u, skip)


@CONTRACT.form
def long_conv_fft(u, kernel, skip=None):
    """The same by (2): transforms turn the convolution into a product, padding keeps it from being circular.

    Three transforms of length n >= T + K - 1, 7.5 n log2 n operations a channel, log n deep. Runs in the precision of
    its input; `scipy.fft.set_workers` spreads the channels over threads.
    """
    T = u.shape[-2]
    kernel = kernel[..., :T, :]
    y = _by_transform(u, kernel)[..., :T, :] if T and kernel.shape[-2] else _silence(u, kernel)
    return _with_skip(y, u, skip)


@CONTRACT.form
def long_conv_overlap_add(u, kernel, skip=None, *, block=None):
    """The same in blocks: u is the sum of its blocks, and the output the sum of theirs.

    A block of B inputs reaches B + K - 1 outputs; the K - 1 that lie beyond it are added to what later blocks give.
    Work T log K in place of T log T, and a block can be given out before the next is read [1]. By default a block is
    as long as the kernel, so that a transform is half padding.
    """
    if block is not None:
        positive_int("long_conv", "block", block)
    T = u.shape[-2]
    kernel = kernel[..., :T, :]
    K = kernel.shape[-2]
    if not (T and K):
        return _with_skip(_silence(u, kernel), u, skip)
    block = K if block is None else int(block)
    pieces = _in_blocks(u, block)  # (..., T/B, B, c)
    count = pieces.shape[-3]
    reach = _in_blocks(_by_transform(pieces, kernel[..., None, :, :]), block)  # (..., T/B, (B+K-1)/B, B, c)
    ahead = reach.shape[-3]
    y = np.zeros_like(reach, shape=(*reach.shape[:-4], count + ahead, block, reach.shape[-1]))
    for i in range(ahead):
        y[..., i : i + count, :, :] += reach[..., i, :, :]  # the part that reaches i blocks ahead
    y = y.reshape(*y.shape[:-3], -1, y.shape[-1])[..., :T, :]  # (..., T, c)
    return _with_skip(y, u, skip)


@CONTRACT.form
def long_conv_monarch(u, kernel, skip=None):
    """The same by (2) with each transform a Monarch matrix: dense products of matrices of size √n, no butterflies.

    16 n^(3/2) operations a transform and channel, more than an FFT does; but they are matrix products, which matrix
    units do an order of magnitude faster [3]. n = rows·columns >= T + K - 1, so any T will do.
    """
    T = u.shape[-2]
    kernel = kernel[..., :T, :]
    if not (T and kernel.shape[-2]):
        return _with_skip(_silence(u, kernel), u, skip)
    rows, columns = _near_square(T + kernel.shape[-2] - 1)
    L, R, order = monarch_dft(rows, columns, np.result_type(u, kernel, np.complex64))

    def transform(x):
        x = np.swapaxes(x, -1, -2)  # (..., c, time)
        x = np.concatenate([x, np.zeros_like(x, shape=(*x.shape[:-1], rows * columns - x.shape[-1]))], axis=-1)
        return monarch_matmul_blocks(x[..., order], L, R)  # (..., c, n)

    spectrum = transform(u) * transform(kernel)
    y = np.conj(monarch_matmul_blocks(np.conj(spectrum)[..., order], L, R)) / (rows * columns)  # F⁻¹ x = conj(F conj(x)) / n
    y = np.swapaxes(y, -1, -2)[..., :T, :]  # (..., T, c)
    return _with_skip(y if np.iscomplexobj(u) or np.iscomplexobj(kernel) else y.real, u, skip)


@CONTRACT.gradient
def long_conv_vjp(dy, u, kernel, skip=None):
    """Gradient of `long_conv`. The adjoint of a filter is the filter run backwards, a correlation:

        du_t = Σ_s conj(kernel_s) dy_{t+s} + conj(skip) dy_t,    dkernel_s = Σ_t conj(u_{t-s}) dy_t,    dskip = Σ_t conj(u_t) dy_t

    With time reversed both correlations are convolutions (1): of dy by the kernel, and of u by dy.

    Parameters
    ----------
    dy : ndarray, shape (..., T, c)
        Cotangent of y.

    Returns
    -------
    dict
        "u", "kernel", and "skip" where one was given. Rows of the kernel beyond T have gradient 0.
    """
    T, K = u.shape[-2], kernel.shape[-2]
    backwards = dy[..., ::-1, :]
    du = long_conv(backwards, np.conj(kernel), None if skip is None else np.conj(skip))[..., ::-1, :]
    lags = long_conv(np.conj(u), backwards)[..., ::-1, :][..., :K, :]  # (..., min(K, T), c)
    beyond = np.zeros_like(lags, shape=(*lags.shape[:-2], max(K - T, 0), lags.shape[-1]))
    return {"u": du, "kernel": np.concatenate([lags, beyond], axis=-2), "skip": np.conj(u) * dy}


def error_bound(u, kernel, skip=None, *, unit, store=0.0):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`.

    Sums in any order keep (min(t + 1, K) + 3) u of the same sum of absolute values [4, section 3.1] (3 and not 1 for
    complex products and the skip). Transforms of length n keep 3 u log2 n of ‖kernel‖ ‖u‖ a channel: each of the
    three is backward stable to a small multiple of u log2 n in the 2-norm [4, section 24.1], and every output is a sum
    over all frequencies. Operands kept in a half precision add `store` twice; transforms that keep their stages so
    add it three times, relative to the norms.
    """
    T, K = u.shape[-2], kernel.shape[-2]
    scale = long_conv(abs(u), abs(kernel), None if skip is None else abs(skip))  # (..., T, c)
    terms = np.minimum(np.arange(1, T + 1), K)[:, None]
    norms = _norm(u) * _norm(kernel)  # (..., 1, c), all K rows: who transforms them all is right too
    levels = math.log2(2 * max(T + K, 1))
    return (unit * (terms + 3) + 2 * store) * scale + 3 * (unit * levels + store) * norms


# -- what the forms share --------------------------------------------------------------------------------------------


def _silence(u, kernel):
    """Zeros of the result's shape and kind."""
    like = u[..., :0, :].sum(axis=-2) * kernel[..., :0, :].sum(axis=-2)  # (..., c)
    return np.zeros_like(like, shape=(*like.shape[:-1], *u.shape[-2:]))


def _with_skip(y, u, skip):
    return y if skip is None else y + skip * u


def _by_transform(u, kernel):
    """All T + K - 1 rows of a convolution."""
    length = u.shape[-2] + kernel.shape[-2] - 1
    if np.iscomplexobj(u) or np.iscomplexobj(kernel):
        n = scipy.fft.next_fast_len(length)
        y = scipy.fft.ifft(scipy.fft.fft(u, n, axis=-2) * scipy.fft.fft(kernel, n, axis=-2), axis=-2)
    else:
        n = scipy.fft.next_fast_len(length, real=True)
        y = scipy.fft.irfft(scipy.fft.rfft(u, n, axis=-2) * scipy.fft.rfft(kernel, n, axis=-2), n, axis=-2)
    return y[..., :length, :]


def _in_blocks(x, block):
    """Time cut into blocks, the last one padded with zeros: (..., T, c) -> (..., T/B, B, c)."""
    pad = np.zeros_like(x, shape=(*x.shape[:-2], -x.shape[-2] % block, x.shape[-1]))
    x = np.concatenate([x, pad], axis=-2)
    return x.reshape(*x.shape[:-2], x.shape[-2] // block, block, x.shape[-1])


def _near_square(length):
    """Factors of a number at least `length`, as equal as can be."""
    rows = math.isqrt(max(length - 1, 0)) + 1
    return rows, -(-length // rows)


def _norm(x):
    return np.sqrt((abs(x) ** 2).sum(axis=-2, keepdims=True))  # (..., 1, c)


def _impulse():
    """What a filter answers to a single 1 at the start is its kernel, with the skip added to the first row."""

    def holds(f, call, bound, rng):
        u, kernel, skip = call["u"], call["kernel"], call.get("skip")
        if not u.shape[-2]:
            return
        one = np.zeros_like(u)
        one[..., 0, :] = 1
        call = {**call, "u": one}
        y = f(**call)
        want = np.zeros_like(y)
        rows = min(u.shape[-2], kernel.shape[-2])
        want[..., :rows, :] = kernel[..., :rows, :]
        if skip is not None:
            want[..., 0, :] += skip
        yield "y of a single 1 at t = 0", y, want, bound(**call)

    return Law("impulse", holds, ("u",))


def _sample(rng, *, T=9, K=6, c=3, batch=()):
    return {
        "u": rng.standard_normal((*batch, T, c)),
        "kernel": rng.standard_normal((K, c)),
        "skip": rng.standard_normal(c),
    }


def _with(**changes):
    """A hard call: the sample, with some arrays replaced."""

    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        return call | {name: change(rng, call[name]) for name, change in changes.items()}

    return draw


def _only(row):
    """Zeros but for one row."""
    return lambda rng, x: x * (np.arange(x.shape[-2]) == row % max(x.shape[-2], 1))[:, None]


def _kernel_of_each(rng, *, batch=(), **sizes):
    batch = batch or (2,)
    call = _sample(rng, batch=batch, **sizes)
    return call | {"kernel": rng.standard_normal((*batch, *call["kernel"].shape))}


def _kernel_of_length(length):
    def draw(rng, *, T=9, K=6, **sizes):
        return _sample(rng, T=T, K=length(T), **sizes)

    return draw


def _monarch_cost(T, K, c, batch=1):
    rows, columns = _near_square(max(T + min(T, K) - 1, 1))
    n = rows * columns
    return Cost(
        (20 * n * (rows + columns) + 8 * n) * c * batch,
        2 * (log2_ceil(rows) + log2_ceil(columns)) + 6,
        10 * n * c * batch + n * (rows + columns + 3),
    )


def _overlap_cost(T, K, c, batch=1, block=None):
    K = min(T, K)
    block = block or max(K, 1)
    n, count = block + K, -(-T // block)
    return Cost(
        ((2 * count + 1) * fft_work(n) + (4 * n + block) * count) * c * batch, 2 * fft_depth(n) + K / block, 4 * count * n * c * batch
    )


OPS = (
    Op(
        name="long_conv",
        summary="y_t = Σ_s kernel_s u_{t-s} + skip·u_t, a causal convolution as long as the sequence",
        contract=CONTRACT,
        forms={
            "direct": Form(
                long_conv,
                lambda T, K, c, batch=1: Cost(min(T, K) * (2 * T - min(T, K) + 1) * c * batch, min(T, K) + 1, 2 * T * c * batch),
                exact=("work", "depth", "peak"),
            ),
            "fft": Form(
                long_conv_fft,
                lambda T, K, c, batch=1: Cost(
                    (3 * fft_work(T + min(T, K)) + 5 * T + 3 * min(T, K)) * c * batch,
                    2 * fft_depth(T + min(T, K)) + 2,
                    4 * (T + min(T, K)) * c * batch,
                ),
                on_balls=False,
                stops="non-finite data: a transform spreads its largest value over all",
            ),
            "overlap_add": Form(
                long_conv_overlap_add,
                _overlap_cost,
                on_balls=False,
                stops="non-finite data: a transform spreads its largest value over a block",
            ),
            "monarch": Form(
                long_conv_monarch,
                _monarch_cost,
                on_balls=False,
                stops="non-finite data: a transform spreads its largest value over all",
            ),
        },
        gradient=long_conv_vjp,
        sample=_sample,
        hard={
            "kernel much longer than the input": _kernel_of_length(lambda T: 3 * T + 1),
            "kernel exactly as long as the input": _kernel_of_length(lambda T: T),
            "kernel one longer than the input": _kernel_of_length(lambda T: T + 1),
            "a single tap": _kernel_of_length(lambda T: 1),
            "no tap": _kernel_of_length(lambda T: 0),
            "only the last tap": _with(kernel=_only(-1), skip=lambda rng, s: 0 * s),
            "only the last input": _with(u=_only(-1)),
            "only the first input": _with(u=_only(0)),
            "constant input and kernel": _with(u=lambda rng, u: 1 + 0 * u, kernel=lambda rng, k: 0.1 + 0 * k),
            "cancellation": _with(u=lambda rng, u: u + 1000, kernel=lambda rng, k: k - k.mean(axis=-2, keepdims=True) if k.size else k),
            "channels of other magnitudes": _with(u=lambda rng, u: u * 2.0 ** (12 * (np.arange(u.shape[-1]) % 5 - 2))),
            "a kernel for each batch element": _kernel_of_each,
            "complex": _with(
                u=lambda rng, u: u + 1j * rng.standard_normal(u.shape),
                kernel=lambda rng, k: k + 1j * rng.standard_normal(k.shape),
                skip=lambda rng, s: s * (1 - 1j),
            ),
        },
        error_bound=error_bound,
        references=("oppenheim2010, section 8.7", "poli2023, section 2", "fu2024flashfftconv, section 3.1", "higham2002, section 24.1"),
        lengths=("T", "K"),
        sizes=({"c": 1}, {"c": 64}, {"K": 1}, {"K": 23}, {"batch": (2,)}, {"batch": (2, 3)}),
        laws=(causal(CONTRACT, "u"), linear(CONTRACT, "u"), linear(CONTRACT, "kernel", "skip"), time_invariant(CONTRACT, "u"), _impulse()),
    ),
)
