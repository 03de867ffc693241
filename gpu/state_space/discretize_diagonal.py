"""`discretize_diagonal` on the device, elementwise."""

import cupy as cp
from refimpl.gpu import mirror
from refimpl.gpu.precision import widened

from refimpl.core.options import one_of
from refimpl.ops.state_space.discretize_diagonal import CONTRACT, IMPLICITNESS, METHODS

KERNELS = ()


@mirror.form(CONTRACT)
def discretize_diagonal(a, b, dt, *, method="zoh"):
    """`refimpl.discretize_diagonal` on CuPy arrays; halves are computed in float32.

    Parameters
    ----------
    a, b, dt : cupy.ndarray, shape (...)
        Real or complex; all three broadcast.
    method : {"zoh", "bilinear", "euler", "backward_euler", "mamba"}

    Returns
    -------
    A_bar, B_bar : cupy.ndarray, shape (...)
    """
    one_of("discretize_diagonal", "method", method, METHODS)
    a, b, dt = cp.broadcast_arrays(*widened(*(cp.asarray(x) for x in (a, b, dt))))
    z = dt * a
    if method in ("zoh", "mamba"):
        return cp.exp(z), dt * b if method == "mamba" else dt * mean_exponential(z) * b
    alpha = IMPLICITNESS[method]
    return (1 + (1 - alpha) * z) / (1 - alpha * z), dt * b / (1 - alpha * z)


@mirror.gradient(CONTRACT)
def discretize_diagonal_vjp(dy, a, b, dt, *, method="zoh"):
    """Gradient of `discretize_diagonal`.

    Parameters
    ----------
    dy : tuple of cupy.ndarray
        Cotangents of A_bar and B_bar; None is zero.

    Returns
    -------
    dict
        "a", "b", "dt".
    """
    one_of("discretize_diagonal", "method", method, METHODS)
    if not isinstance(dy, tuple) or len(dy) != 2:
        raise ValueError(f"discretize_diagonal: dy must be a tuple (dA_bar, dB_bar), got {type(dy).__name__}")
    dA_bar, dB_bar = widened(*dy)
    a, b, dt = cp.broadcast_arrays(*widened(*(cp.asarray(x) for x in (a, b, dt))))
    z = dt * a
    if method in ("zoh", "mamba"):
        dA_dz = cp.exp(z)
        gain, slope = (mean_exponential(z), _slope(z)) if method == "zoh" else (cp.ones_like(z), cp.zeros_like(z))
    else:
        alpha = IMPLICITNESS[method]
        gain = 1 / (1 - alpha * z)
        dA_dz, slope = gain * gain, alpha * gain * gain
    dz = cp.conj(dA_dz) * dA_bar + cp.conj(dt * b * slope) * dB_bar
    return {"a": cp.conj(dt) * dz, "b": cp.conj(dt * gain) * dB_bar, "dt": cp.conj(a) * dz + cp.conj(b * gain) * dB_bar}


def mean_exponential(z):
    """(e^z - 1) / z, and 1 at 0, without the cancellation."""
    safe = cp.where(z == 0, 1, z)
    return cp.where(z == 0, 1, _expm1(safe) / safe).astype(z.dtype, copy=False)


def _expm1(z):
    """e^z - 1; of complex numbers by real functions, for CuPy has none: cos y - 1 = -2 sin²(y/2)."""
    if z.dtype.kind != "c":
        return cp.expm1(z)
    x, y = z.real, z.imag
    half = cp.sin(y / 2)
    return (cp.expm1(x) * cp.cos(y) - 2 * half * half) + 1j * (cp.exp(x) * cp.sin(y))


def _slope(z):
    """φ'(z) = (e^z - φ(z)) / z by its series where |z| < 1 would cancel."""
    small = abs(z) < 1
    inner, outer = cp.where(small, z, 0), cp.where(small, 1, z)
    series = cp.ones_like(z)
    for k in range(25, 0, -1):
        series = 1 + inner * ((k + 1) / (k * (k + 2))) * series
    return cp.where(small, series / 2, (cp.exp(outer) - mean_exponential(outer)) / outer).astype(z.dtype, copy=False)
