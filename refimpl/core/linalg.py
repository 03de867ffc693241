"""Matrix functions in whatever arithmetic they are given: float32 to longdouble, complex, and intervals.

LAPACK ends at float64; the truth of a float64 result does not. All functions work on stacks of matrices.
"""

import math

import numpy as np


def solve(a, b):
    """a⁻¹ b by Gaussian elimination with partial pivoting.

    Parameters
    ----------
    a : ndarray, shape (..., n, n)
    b : ndarray, shape (..., n, m)

    Returns
    -------
    ndarray, shape (..., n, m)

    Raises
    ------
    numpy.linalg.LinAlgError
        If a matrix is exactly singular.
    """
    if a.dtype.char not in "gG" and b.dtype.char not in "gG":
        return np.linalg.solve(a, b)
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    x = np.empty((*batch, *b.shape[-2:]), dtype=np.result_type(a, b))
    a, b = np.broadcast_to(a, (*batch, *a.shape[-2:])), np.broadcast_to(b, (*batch, *b.shape[-2:]))
    for index in np.ndindex(batch):
        x[index] = _eliminate(a[index], b[index])
    return x


def _eliminate(a, b):
    """One system, in the arithmetic of its entries."""
    n = a.shape[-1]
    rows = np.concatenate([a, b], axis=-1)  # (n, n + m)
    for j in range(n):
        pivot = j + int(np.argmax(abs(rows[j:, j])))
        if rows[pivot, j] == 0:
            raise np.linalg.LinAlgError("Singular matrix")
        rows[[j, pivot]] = rows[[pivot, j]]
        rows[j + 1 :] = rows[j + 1 :] - (rows[j + 1 :, j] / rows[j, j])[:, None] * rows[j]
    x = rows[:, n:]
    for j in reversed(range(n)):
        x[j] = (x[j] - rows[j, j + 1 : n] @ x[j + 1 :]) / rows[j, j]
    return x


def solve_unit_lower(a, b):
    """(I + a)⁻¹ b, where a is strictly lower triangular: what stands on its diagonal and above is not looked at.

    Halves: x_1 = (I + a_11)⁻¹ b_1, then x_2 = (I + a_22)⁻¹ (b_2 - a_21 x_1). That is forward substitution, in products of
    blocks; a row of x depends on that row of b and those before it, and on nothing else, be it NaN.

    Parameters
    ----------
    a : ndarray, shape (..., n, n)
    b : ndarray, shape (..., n, m)

    Returns
    -------
    ndarray, shape (..., n, m)
    """
    n = b.shape[-2]
    if n < 2:
        return b
    h = n // 2
    top = solve_unit_lower(a[..., :h, :h], b[..., :h, :])
    bottom = solve_unit_lower(a[..., h:, h:], b[..., h:, :] - a[..., h:, :h] @ top)
    return np.concatenate([top, bottom], axis=-2)


def expm(x):
    """The matrix exponential e^x = Σ x^k / k!, by scaling and squaring.

    e^x = (e^(x/2^s))^(2^s): with ‖x/2^s‖₁ <= 1/2 a dozen terms of the series reach the precision, and s squarings
    bring it back. Each squaring rounds, so the error grows with ‖x‖, as the exponential's condition does.
    On intervals, flint's.

    Parameters
    ----------
    x : ndarray, shape (..., n, n)

    Returns
    -------
    ndarray, shape (..., n, n)

    References
    ----------
    C. Moler and C. Van Loan, "Nineteen dubious ways to compute the exponential of a matrix, twenty-five years later",
    SIAM Review 45(1), 2003, method 3.
    """
    if x.dtype.kind == "O":
        from refimpl.core.balls import matrix_exponential

        return matrix_exponential(x)
    s = squarings(x)
    y = exp_and_phi1(halved(x, s))[0]
    for j in range(s.max(initial=0)):
        left = (j < s)[..., None, None]
        again = np.where(left, y, np.zeros_like(y))  # those that are done must not overflow on the way
        y = np.where(left, again @ again, y)
    return y


def squarings(x):
    """How often a matrix must be halved for a norm of at most 1/2: (..., n, n) -> integers (...)."""
    norm = abs(x).sum(axis=-2).max(axis=-1, initial=0)
    _, exponent = np.frexp(np.where(np.isfinite(norm), norm, 0))  # norm < 2^exponent
    return np.maximum(exponent + 1, 0)


def halved(x, s):
    """x / 2^s, exactly, a power for each matrix."""
    return x * np.ldexp(np.ones_like(abs(x), shape=s.shape), -s)[..., None, None]


def exp_and_phi1(x):
    """e^x = I + x φ(x) and φ(x) = Σ x^k / (k+1)! of matrices of norm 1/2 at most, by the series (Horner's rule)."""
    eye = np.broadcast_to(np.eye(x.shape[-1], dtype=x.dtype), x.shape)
    terms = 1
    while 0.5**terms / math.factorial(terms + 1) > np.finfo(x.dtype).eps / 8:
        terms += 1
    phi = eye
    for k in range(terms, 0, -1):
        phi = eye + x @ phi / (k + 1)
    return eye + x @ phi, phi


def expm_derivative(x, e):
    """The derivative of the exponential at x in the direction e: the limit of (exp(x + h e) - exp(x)) / h.

    It stands in the corner of an exponential twice the size, exp([[x, e], [0, x]]) = [[e^x, L(x, e)], [0, e^x]]
    (N. J. Higham, "Functions of Matrices", SIAM, 2008, equation (3.16)). It is linear in e, whose size, taken out
    first, would cost the exponential accuracy. Its adjoint is the derivative at xᴴ.
    """
    e = np.broadcast_to(e, np.broadcast_shapes(x.shape, e.shape))
    x = np.broadcast_to(x, e.shape)
    size = largest(e)
    top = np.concatenate([x, e / size], axis=-1)
    bottom = np.concatenate([np.zeros_like(x), x], axis=-1)
    n = x.shape[-1]
    return expm(np.concatenate([top, bottom], axis=-2))[..., :n, n:] * size


def largest(x):
    """The largest |entry| of each matrix, 1 where all are 0: (..., n, m) -> (..., 1, 1)."""
    if not x.size:
        return np.ones_like(abs(x), shape=(*x.shape[:-2], 1, 1))
    size = abs(x).max(axis=(-2, -1), keepdims=True)
    return np.where(size == 0, np.ones_like(size), size)
