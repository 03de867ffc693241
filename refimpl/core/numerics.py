"""Elementary functions without overflow or cancellation, in whatever arithmetic they are given.

All run on float32, float64, longdouble and on object arrays of intervals. Nothing here changes precision.
"""

import numpy as np
import scipy.special


def constant(value, like: np.ndarray):
    """A number in the precision of `like` (a Python float would limit longdouble to 53 bits)."""
    if like.dtype.kind == "O":
        return value
    return np.asarray(value, dtype=np.empty(0, like.dtype).real.dtype)[()]


def sqrt_of(number, like: np.ndarray):
    """√number, rounded once to the precision of `like`; exact balls stay balls."""
    if like.dtype.kind == "O":
        return np.sqrt(np.zeros_like(like, shape=(1,)) + number)[0]
    return np.sqrt(constant(number, like))


def sigmoid(x):
    """σ(x) = 1 / (1 + e^-x), full relative accuracy in both tails."""
    if x.dtype.kind == "O":
        return 1 / (1 + np.exp(-x))
    return scipy.special.expit(x)


def log_sigmoid(x):
    """log σ(x) = -softplus(-x)."""
    return -softplus(-x)


def softplus(x):
    """log(1 + e^x), full relative accuracy in both tails: e^x for x -> -∞, x for x -> ∞.

    There is no threshold beyond which x is returned (torch has one, at 20, where e^-20 = 2e-9 is lost).
    """
    if x.dtype.kind == "O":
        return np.log1p(np.exp(x))
    return np.maximum(x, 0) + np.log1p(np.exp(-abs(x)))


def silu(x):
    """x σ(x), the gate of Mamba and of SwiGLU; -0 for x -> -∞."""
    return x * sigmoid(x)


def silu_derivative(x):
    """d/dx x σ(x) = σ(x) (1 + x (1 - σ(x))), with 1 - σ(x) = σ(-x)."""
    return sigmoid(x) * (1 + x * sigmoid(-x))


def silu_rounding(z, store):
    """How far z σ(z) may be off with every step of σ = 1 / (1 + e^-z) rounded to a half precision of roundoff `store`.

    e^-z, its sum with 1, and the quotient. In float16 σ is subnormal left of -9.7, and 0 where e^-z exceeds the range;
    bfloat16 has float32's range.
    """
    y = abs(silu(z))
    off = store * (2 + sigmoid(-z)) * y
    if store == 2.0**-11:
        off = off + np.where(z < -11, y, abs(z) * 2.0**-25)
    return off


def exp_of_difference(a, b):
    """e^(a - b) where a <= b, and 0 where a = -∞ (also if b = -∞, where the difference is NaN)."""
    empty = np.isneginf(a) if a.dtype.kind == "f" else np.equal(a, -np.inf)
    safe = np.where(empty, np.zeros_like(a), a - np.where(empty, np.zeros_like(b), b))
    return np.where(empty, np.zeros_like(safe), np.exp(safe))


def tanh_derivative(x):
    """1 - tanh² x = 4 e^-2|x| / (1 + e^-2|x|)², full relative accuracy where tanh is nearly 1."""
    small = np.exp(-2 * abs(x))
    return 4 * small / (1 + small) ** 2


def finite_or_zero(x):
    """x, with 0 for -∞: what can be subtracted from -∞ without NaN."""
    return np.where(np.isneginf(x), np.zeros_like(x), x)


def masked_matmul(w, x, score):
    """w x, where w_ij is a weight that is 0 for every pair of score -∞.

    Such a pair contributes 0, also if x_j is NaN or infinite (where a plain product would make NaN of 0·NaN); any
    other pair contributes w_ij x_j, whatever that is.
    """
    finite = np.isfinite(x)
    if np.all(finite):
        return w @ x
    y = w @ np.where(finite, x, np.zeros_like(x))
    rest = np.where(finite, np.zeros_like(x), x)
    for j in np.flatnonzero(~np.all(finite, axis=(*range(x.ndim - 2), -1))):
        one, row = w[..., j : j + 1], rest[..., j : j + 1, :]
        y = y + np.where(np.isneginf(score[..., j : j + 1]), np.zeros_like(y), one * row)
    return y


def gate_exponents(log_decay, log_input):
    """log_decay_{j+1} + ... + log_decay_t + log_input_j at [t, j]: the log of what is left at time t of step j; -∞ for j > t.

    Sums, not differences of running sums, which cancel (and are NaN after a decay of 0). What comes after t, be it NaN,
    is not looked at in row t.
    """
    T = log_decay.shape[-1]
    sums = np.full_like(log_decay, -np.inf, shape=(*np.broadcast_shapes(log_decay.shape, log_input.shape), T))
    exponents = sums.copy()  # (..., T, T)
    for t in range(T):
        sums[..., t, :t] = sums[..., t - 1, :t] + log_decay[..., t, None]
        sums[..., t, t] = 0
        exponents[..., t, : t + 1] = sums[..., t, : t + 1] + log_input[..., : t + 1]
    return exponents


def phi1(z):
    """φ(z) = (e^z - 1) / z, and 1 at z = 0, without the cancellation: the mean of e^(s z) over s in [0, 1]."""
    zero = z == 0
    safe = np.where(zero, np.ones_like(z), z)
    return np.where(zero, np.ones_like(z), np.expm1(safe) / safe)


def phi1_derivative(z):
    """φ'(z) = (e^z - φ(z)) / z, and 1/2 at z = 0; by its series Σ (k+1) z^k / (k+2)! where |z| < 1 would cancel."""
    if z.dtype.kind == "O":
        zero = z == 0
        safe = np.where(zero, np.ones_like(z), z)
        return np.where(zero, np.ones_like(z) / 2, (np.exp(safe) - phi1(safe)) / safe)
    small = abs(z) < 1
    inner, outer = np.where(small, z, np.zeros_like(z)), np.where(small, np.ones_like(z), z)
    series = np.ones_like(z)
    for k in range(25, 0, -1):
        series = 1 + inner * (k + 1) / (k * (k + 2)) * series
    return np.where(small, series / 2, (np.exp(outer) - phi1(outer)) / outer)


def pi_of(like: np.ndarray):
    """π in the precision of `like`."""
    return 4 * np.arctan(np.ones_like(like, shape=(1,)))[0]


def softmax(x):
    """e^x / Σ e^x along the last axis; -∞ has weight 0."""
    e = exp_of_difference(x, np.max(x, axis=-1, keepdims=True))
    return e / np.sum(e, axis=-1, keepdims=True)


def logsumexp(x):
    """log Σ e^x along the last axis, without overflow."""
    top = np.max(x, axis=-1, keepdims=True)
    return np.log(np.sum(exp_of_difference(x, top), axis=-1)) + top[..., 0]


def normal_cdf(x):
    """Φ(x) = erfc(-x/√2) / 2, full relative accuracy in the lower tail (where (1 + erf(x/√2)) / 2 has none left)."""
    if x.dtype.kind == "O":
        return scipy.special.erfc(-x / sqrt_of(2, x)) / 2
    return _normal_cdf_by_series(x) if x.dtype.char == "g" else scipy.special.ndtr(x)


def normal_pdf(x):
    """φ(x) = e^(-x²/2) / √(2π)."""
    return np.exp(-(x * x) / 2) / np.sqrt(2 * pi_of(x))


def _normal_cdf_by_series(x):
    """Φ for longdouble, which SciPy does not have.

    Near 0, Φ(x) = 1/2 + φ(x) (x + x³/3 + x⁵/(3·5) + ...), whose terms have one sign; beyond 7/4, where 1/2 less that sum
    would cancel, Φ(-x) = φ(x) times the continued fraction 1/(x + 1/(x + 2/(x + 3/(x + ...)))), from behind (Abramowitz
    and Stegun, 26.2.11 and 26.2.14).
    """
    size = np.minimum(abs(x), 200)  # Φ(-200) = 0
    near, far = np.minimum(size, 1.75), np.maximum(size, 1.75)
    series = np.zeros_like(near)
    for k in range(40, 0, -1):
        series = (1 + series) * near * near / (2 * k + 1)
    fraction = far
    for k in range(300, 0, -1):
        fraction = far + k / fraction
    tail = np.where(size < 1.75, constant(1, x) / 2 - _pdf(near) * near * (1 + series), _pdf(far) / fraction)
    return np.where(np.isnan(x), x, np.where(x < 0, tail, 1 - tail))


def _pdf(x):
    """φ, with x² as the square of a short number and a rest, so that e^(-x²/2) keeps its digits where x² is large."""
    short = np.rint(x * 1024) / 1024
    return np.exp(-(short * short) / 2) * np.exp(-(x - short) * (x + short) / 2) / np.sqrt(2 * pi_of(x))


def gelu(x):
    """x Φ(x), the Gaussian error linear unit."""
    return x * normal_cdf(x)


def gelu_derivative(x):
    """Φ(x) + x φ(x)."""
    return normal_cdf(x) + x * normal_pdf(x)


def times_exp(x, a):
    """x e^a, where it is representable though e^a overflows or is too small to be precise; 0 for x = 0."""
    if x.dtype.kind == "O":
        return x * np.exp(a)
    info = np.finfo(a.dtype)
    enough = 2 * np.log(info.max) * (1 - 4 * info.eps)  # beyond, any normal x overflows
    half = np.exp(np.minimum(a, enough) / 2)
    return x * half * half
