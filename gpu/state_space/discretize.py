"""`discretize` on the device: matrix exponentials by scaling and squaring in batched products, solves by cuSOLVER.

One integer comes to the host where a matrix exponential is taken, the number of squarings, and one status where a
system is solved: everything else stays on the device.
"""

import math

import cupy as cp
import cupyx
import numpy as np
from refimpl.gpu import mirror
from refimpl.gpu.precision import widened

from refimpl.core.options import one_of
from refimpl.ops.state_space.discretize import CONTRACT, IMPLICITNESS, METHODS

KERNELS = ()


@mirror.form(CONTRACT)
def discretize(A, B, dt, *, method="zoh"):
    """`refimpl.discretize` on CuPy arrays; halves are computed in float32.

    Parameters
    ----------
    A : cupy.ndarray, shape (..., n, n)
    B : cupy.ndarray, shape (..., n) or (..., n, m)
    dt : float or cupy.ndarray, shape () or (...)
    method : {"zoh", "bilinear", "euler", "backward_euler", "mamba"}

    Returns
    -------
    A_bar : cupy.ndarray, shape (..., n, n)
    B_bar : cupy.ndarray, shape (..., n) or (..., n, m), as B

    Raises
    ------
    ValueError
        If the method is unknown, or I - α dt A has no inverse.
    """
    one_of("discretize", "method", method, METHODS)
    A, B, dt, column = _together(A, B, dt)
    if method == "zoh":
        A_bar, B_bar = _held(dt * A, dt * B)
    elif method == "mamba":
        A_bar, B_bar = _exponential(dt * A), dt * B
    else:
        A_bar, B_bar = _split(_solve(*_implicit_step(dt * A, dt * B, IMPLICITNESS[method]), method), A.shape[-1])
    return A_bar, B_bar[..., 0] if column else B_bar


@mirror.gradient(CONTRACT)
def discretize_vjp(dy, A, B, dt, *, method="zoh"):
    """Gradient of `discretize`.

    Parameters
    ----------
    dy : tuple of cupy.ndarray
        Cotangents of A_bar and B_bar; None is zero.

    Returns
    -------
    dict
        "A", "B", "dt".
    """
    one_of("discretize", "method", method, METHODS)
    if not isinstance(dy, tuple) or len(dy) != 2:
        raise ValueError(f"discretize: dy must be a tuple (dA_bar, dB_bar), got {type(dy).__name__}")
    A, B, dt, column = _together(A, B, dt)
    dA_bar, dB_bar = widened(*dy)
    dB_bar = dB_bar[..., None] if column else dB_bar
    X, Y = dt * A, dt * B
    if method == "zoh":
        dX, dY = _held_vjp(dA_bar, dB_bar, X, Y)
    elif method == "mamba":
        dX, dY = _exponential_derivative(_adjoint(X), dA_bar), dB_bar
    else:
        alpha = IMPLICITNESS[method]
        M, R = _implicit_step(X, Y, alpha)
        dR = _solve(_adjoint(M), cp.concatenate([dA_bar, dB_bar], axis=-1), method)
        dM = -dR @ _adjoint(_solve(M, R, method))
        dR_A, dY = _split(dR, A.shape[-1])
        dX = (1 - alpha) * dR_A - alpha * dM
    ddt = (cp.conj(A) * dX).sum(axis=(-2, -1)) + (cp.conj(B) * dY).sum(axis=(-2, -1))
    dB = cp.conj(dt) * dY
    return {"A": cp.conj(dt) * dX, "B": dB[..., 0] if column else dB, "dt": ddt}


def _together(A, B, dt):
    """All batch axes on all three, B as a matrix, dt as (..., 1, 1); and whether B was a single column."""
    column = CONTRACT.axis("n", A=A, B=B, dt=dt)["B"] == -1
    A, B, dt = widened(*(cp.asarray(x) for x in (A, B, dt)))  # a step may be a plain number
    B = B[..., None] if column else B
    batch = np.broadcast_shapes(A.shape[:-2], B.shape[:-2], dt.shape)
    A, B = cp.broadcast_to(A, (*batch, *A.shape[-2:])), cp.broadcast_to(B, (*batch, *B.shape[-2:]))
    return A, B, cp.broadcast_to(dt, batch)[..., None, None], column


def _held(A, B):
    """The block of exp([[A, B], [0, 0]]), B with entries of at most 1."""
    n, m = B.shape[-2:]
    size = _largest(B)
    top = cp.concatenate([A, B / size], axis=-1)
    E = _exponential(cp.concatenate([top, cp.zeros((*top.shape[:-2], m, n + m), top.dtype)], axis=-2))
    return E[..., :n, :n], E[..., :n, n:] * size


def _held_vjp(dA_bar, dB_bar, A, B):
    n, m = B.shape[-2:]
    size = _largest(B)
    left = cp.concatenate([_adjoint(A), _adjoint(B / size)], axis=-2)
    X = cp.concatenate([left, cp.zeros((*left.shape[:-1], m), left.dtype)], axis=-1)
    top = cp.concatenate([dA_bar, dB_bar * size], axis=-1)
    G = _exponential_derivative(X, cp.concatenate([top, cp.zeros((*top.shape[:-2], m, n + m), top.dtype)], axis=-2))
    return G[..., :n, :n], G[..., :n, n:] / size


def _exponential(x):
    """e^x: halve until the norm is 1/2 at most, a series, and as many squarings."""
    if not x.size:
        return x
    norm = abs(x).sum(axis=-2).max(axis=-1)
    halvings = cp.maximum(cp.frexp(cp.where(cp.isfinite(norm), norm, 0))[1] + 1, 0)  # (...)
    x = x * cp.ldexp(cp.ones_like(norm), -halvings)[..., None, None]
    eye, terms = cp.eye(x.shape[-1], dtype=x.dtype), 1
    while 0.5**terms / math.factorial(terms + 1) > np.finfo(x.dtype).eps / 8:
        terms += 1
    phi = cp.broadcast_to(eye, x.shape)
    for k in range(terms, 0, -1):
        phi = eye + x @ phi / (k + 1)
    y = eye + x @ phi
    for j in range(int(halvings.max())):
        left = (j < halvings)[..., None, None]
        again = cp.where(left, y, 0)
        y = cp.where(left, again @ again, y)
    return y


def _exponential_derivative(x, e):
    """The derivative of e^x in the direction e: the corner of exp([[x, e], [0, x]])."""
    size, n = _largest(e), x.shape[-1]
    dtype = np.result_type(x.dtype, e.dtype)
    x, e = (v.astype(dtype, copy=False) for v in cp.broadcast_arrays(x, e))
    top, bottom = cp.concatenate([x, e / size], axis=-1), cp.concatenate([cp.zeros_like(x), x], axis=-1)
    return _exponential(cp.concatenate([top, bottom], axis=-2))[..., :n, n:] * size


def _implicit_step(A, B, alpha):
    eye = cp.eye(A.shape[-1], dtype=A.dtype)
    return eye - alpha * A, cp.concatenate([eye + (1 - alpha) * A, B], axis=-1)


def _solve(M, R, method):
    if not R.size:
        return R
    dtype = np.result_type(M.dtype, R.dtype)
    try:
        with cupyx.errstate(linalg="raise"):
            return cp.linalg.solve(M.astype(dtype, copy=False), R.astype(dtype, copy=False))
    except np.linalg.LinAlgError:
        alpha = {"bilinear": "dt/2", "backward_euler": "dt"}.get(method, "0")
        raise ValueError(f"discretize: I - {alpha} A must have an inverse for the method {method!r}, got a singular matrix") from None


def _split(columns, n):
    return columns[..., :n], columns[..., n:]


def _adjoint(x):
    return cp.conj(cp.swapaxes(x, -1, -2))


def _largest(x):
    """The largest |entry| of each matrix, 1 where all are 0."""
    size = abs(x).max(axis=(-2, -1), keepdims=True) if x.size else cp.ones((*x.shape[:-2], 1, 1), abs(x).dtype)
    return cp.where(size == 0, 1, size)
