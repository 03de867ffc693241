"""Monarch matrices: two block-diagonal products with a transposition between them.

    y = P L Pᵀ R x                                                                                     (1)

L and R are block-diagonal, P transposes: it reads a vector as a table by columns and writes it by rows. With √n blocks
of √n by √n a product costs 4 n^(3/2) operations in place of 2 n², all of them dense products of small matrices: what
hardware is fastest at. Permutations let every input reach every output. The family holds the discrete Fourier
transform, which is how a long convolution becomes matrix products (`long_conv`, form "monarch"). In entries, x read as
a table x_kp and y written as y_sl,

    z_kq = Σ_p R_kqp x_kp,        y_sl = Σ_r L_lsr z_rl,        z_kq = z_rl where k·|q| + q = r·|l| + l       (2)

The blocks need not be square, nor as many in L as in R; square ones of size √n are the matrices of [1].

Glossary
    x, y    input and output vectors    [1, definition 3.1]; y of size |s|·|l|
    L, R    blocks of the block-diagonal factors, L (l, s, r) and R (k, q, p): so many blocks, rows, columns

Where implementations differ
    The public kernels take R before L (w1 is the first applied) and call the first axis of both "blocks". Fourier
    libraries on top of Monarch factors differ in whether the frequencies come out in order; here they do.

References
    [1] T. Dao, B. Chen, N. Sohoni et al., "Monarch: expressive structured matrices for efficient and accurate
        training", ICML 2022, section 3.1.
    [2] J. W. Cooley and J. W. Tukey, "An algorithm for the machine calculation of complex Fourier series", Math. Comp.
        19, 1965, pp. 297-301: the factorisation (3).
    [3] D. Y. Fu, H. Kumbong, E. Nguyen and C. Ré, "FlashFFTConv", ICLR 2024, section 3.1.
    [4] N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM, 2002, section 3.5.
"""

import math

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.options import positive_int
from refimpl.laws import linear
from refimpl.op import Cost, Form, Op

__all__ = ("monarch_dft",)


def _fits(arguments, sizes):
    """Sizes that multiply, which the contract's letters cannot say; and the size of the result."""
    n, k, p, q, l, r, s = (sizes[letter] for letter in "nkpqlrs")
    if k * p != n:
        raise ValueError(f"monarch_matmul: R must have blocks·columns = n, got {k}·{p} columns for n = {n}")
    if l * r != k * q:
        raise ValueError(f"monarch_matmul: L's columns must match R's rows, got {l}·{r} columns and {k}·{q} rows")
    sizes["m"] = s * l


CONTRACT = Contract(
    "monarch_matmul",
    takes="x (..., n); L (l, s, r); R (k, q, p)",
    gives="y (..., m)",
    check=_fits,
)


@CONTRACT.form
def monarch_matmul(x, L, R):
    """Product with a Monarch matrix, equation (1) with all four matrices written out.

    Parameters
    ----------
    x : ndarray, shape (..., n)
        Input, n = k·p.
    L : ndarray, shape (l, s, r)
        Blocks of the factor that is applied last: l blocks of s by r, with l·r = k·q.
    R : ndarray, shape (k, q, p)
        Blocks of the factor that is applied first: k blocks of q by p.

    Returns
    -------
    y : ndarray, shape (..., m)
        m = s·l.

    Raises
    ------
    ValueError, TypeError
        If the sizes of the blocks do not chain, or an array is not numeric.

    Notes
    -----
    2 n (kq) + 2 (kq) m operations, as if there were no structure. Each output is a sum of sums, so the error is at
    most (p + r + 2) u times the same product of absolute values.

    References
    ----------
    [1], section 3.1; and "Where implementations differ" in this module's docstring.

    Examples
    --------
    >>> import numpy as np
    >>> blocks = np.ones((2, 2, 2))
    >>> monarch_matmul(np.array([1.0, 2.0, 3.0, 4.0]), blocks, blocks)
    array([10., 10., 10., 10.])
    """
    l, s, r = L.shape
    z = x @ _block_diagonal(R).T  # (..., kq)
    z = z[..., _transposed(r, l)]  # Pᵀ: (..., lr)
    y = z @ _block_diagonal(L).T  # (..., ls)
    return y[..., _transposed(l, s)]  # P: (..., sl)


@CONTRACT.form
def monarch_matmul_blocks(x, L, R):
    """The same by (2), block by block: the zeros are never touched, and the permutations are transpositions.

    2 k q p + 2 l s r operations, p + r deep (or log of it): 4 n^(3/2) for square factors of √n blocks.
    """
    z = _apply(R, _table(x, R.shape[0]))  # (..., k, q)
    z = np.swapaxes(_table(_flat(z), L.shape[2]), -1, -2)  # (..., l, r)
    return _flat(np.swapaxes(_apply(L, z), -1, -2))  # (..., sl)


@CONTRACT.gradient
def monarch_matmul_vjp(dy, x, L, R):
    """Gradient of `monarch_matmul`: (2) read backwards, each factor by its conjugate transpose.

        dz_rl = Σ_s conj(L_lsr) dy_sl,    dL_lsr = dy_sl conj(z_rl),    dx_kp = Σ_q conj(R_kqp) dz_kq,    dR_kqp = dz_kq conj(x_kp)

    Parameters
    ----------
    dy : ndarray, shape (..., m)
        Cotangent of y.

    Returns
    -------
    dict
        "x", "L", "R"; those of L and R summed over the batch.
    """
    s, r, k = L.shape[1], L.shape[2], R.shape[0]
    x = _table(x, k)  # (..., k, p)
    z = np.swapaxes(_table(_flat(_apply(R, x)), r), -1, -2)  # (..., l, r)
    dy = np.swapaxes(_table(dy, s), -1, -2)  # (..., l, s)
    dz = _apply(np.conj(np.swapaxes(L, -1, -2)), dy)  # (..., l, r)
    dL = dy[..., :, None] * np.conj(z)[..., None, :]  # (..., l, s, r)
    dz = _table(_flat(np.swapaxes(dz, -1, -2)), k)  # (..., k, q)
    dx = _apply(np.conj(np.swapaxes(R, -1, -2)), dz)  # (..., k, p)
    dR = dz[..., :, None] * np.conj(x)[..., None, :]  # (..., k, q, p)
    return {"x": _flat(dx), "L": dL, "R": dR}


def monarch_dft(rows, columns, dtype=np.complex128):
    """The discrete Fourier transform of length n = rows·columns as a Monarch matrix.

    With j = columns·j_1 + j_2 and f = f_1 + rows·f_2, ω = exp(-2πi/n), the exponent j f loses a multiple of n [2]:

        Σ_j ω^(jf) x_j = Σ_{j_2} ω^(rows·j_2 f_2) · Σ_{j_1} ω^(f_1 (columns·j_1 + j_2)) x_j                          (3)

    The inner sum is R (its twiddle factor ω^(f_1 j_2) inside), the outer one L. What (2) reads by rows is x by columns,
    so the caller passes ``x[..., order]``; frequencies come out in their order.

    Parameters
    ----------
    rows, columns : int
        The factors of n, at least 1; near √n is cheapest.
    dtype : complex dtype
        Of the factors: complex64, complex128 or clongdouble.

    Returns
    -------
    L : ndarray, shape (rows, columns, columns)
    R : ndarray, shape (columns, rows, rows)
    order : ndarray of int, shape (rows·columns,)

    Raises
    ------
    ValueError
        If a factor is not a positive integer.

    Notes
    -----
    n·(rows + columns) entries (L's blocks are one block, seen `rows` times). Each root of unity is rounded once.

    References
    ----------
    [2]; [3], section 3.1.

    Examples
    --------
    >>> import numpy as np
    >>> from refimpl import monarch_dft, monarch_matmul
    >>> L, R, order = monarch_dft(2, 3)
    >>> x = np.arange(6.0)
    >>> bool(np.allclose(monarch_matmul(x[order], L, R), np.fft.fft(x)))
    True
    """
    positive_int("monarch_dft", "rows", rows)
    positive_int("monarch_dft", "columns", columns)
    n = rows * columns
    roots = _roots_of_unity(n).astype(dtype)  # ω^0 ... ω^(n-1)
    j1, j2 = np.arange(rows), np.arange(columns)
    order = (columns * j1 + j2[:, None]).reshape(-1)
    R = roots[(j1[:, None] * (columns * j1 + j2[:, None, None])) % n]  # (j_2, f_1, j_1)
    block = roots[(rows * j2[:, None] * j2) % n]  # (f_2, j_2)
    return np.broadcast_to(block, (rows, columns, columns)), R, order


def error_bound(x, L, R, *, unit, store=0.0):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`.

    Two sums, of p and of r products in any order: (p + r + 2) u relative to the product of absolute values
    [4, section 3.5], and 3 u more where the arithmetic is complex. Operands and the z between, kept in a half
    precision, add `store` each.
    """
    scale = monarch_matmul_blocks(abs(x), abs(L), abs(R))
    return (unit * (L.shape[2] + R.shape[2] + 5) + 4 * store) * scale


# -- what the forms share --------------------------------------------------------------------------------------------


def _block_diagonal(blocks):
    """All of the matrix that has `blocks` on its diagonal."""
    count, rows, columns = blocks.shape
    full = np.zeros_like(blocks, shape=(count, rows, count, columns))
    for i in range(count):
        full[i, :, i, :] = blocks[i]
    return full.reshape(count * rows, count * columns)


def _transposed(rows, columns):
    """Where each entry of the transposed table stands in the table: v[_transposed(r, c)] is vec of the transpose."""
    return np.arange(rows * columns).reshape(rows, columns).T.reshape(-1)


def _apply(blocks, x):
    """Block i times row i, (i, a, b) and (..., i, b) -> (..., i, a): one matrix product a block, over the whole batch."""
    rows = np.moveaxis(x, -2, 0)  # (i, ..., b)
    y = rows.reshape(x.shape[-2], math.prod(x.shape[:-2]), x.shape[-1]) @ np.swapaxes(blocks, -1, -2)
    return np.moveaxis(y.reshape(*rows.shape[:-1], blocks.shape[1]), 0, -2)


def _table(x, rows):
    return x.reshape(*x.shape[:-1], rows, x.shape[-1] // max(rows, 1))


def _flat(x):
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _roots_of_unity(n):
    """exp(-2πi j/n) in longdouble, the angle exact until its last operation."""
    j = np.arange(n)
    pi = 4 * np.arctan(np.longdouble(1))
    octant, rest = np.divmod(8 * j, n)  # 2πj/n = octant·π/4 + rest·π/(4n)
    angle = pi * (rest / np.longdouble(4 * n))
    half = np.sqrt(np.longdouble(0.5))
    cosine = np.array([1, half, 0, -half, -1, -half, 0, half])[octant]
    sine = np.array([0, half, 1, half, 0, -half, -1, -half])[octant]
    return (cosine * np.cos(angle) - sine * np.sin(angle)) - 1j * (sine * np.cos(angle) + cosine * np.sin(angle))


def _sample(rng, *, k=3, p=4, q=2, l=2, s=5, batch=()):
    return {
        "x": rng.standard_normal((*batch, k * p)),
        "L": rng.standard_normal((l, s, k * q // l)),
        "R": rng.standard_normal((k, q, p)),
    }


def _complex_sample(rng, **sizes):
    call = _sample(rng, **sizes)
    return {name: a * np.exp(1j * rng.uniform(-3, 3, a.shape)) for name, a in call.items()}


def _needle(rng, **sizes):
    call = _sample(rng, **sizes)
    return call | {"x": call["x"] * (np.arange(call["x"].shape[-1]) == 1)}


def _dft(rng, batch=(), **_):
    L, R, order = monarch_dft(4, 3)
    return {"x": rng.standard_normal((*batch, 12))[..., order], "L": L, "R": R}


OPS = (
    Op(
        name="monarch_matmul",
        summary="y = P L Pᵀ R x, two block-diagonal products with a transposition between",
        contract=CONTRACT,
        forms={
            "dense": Form(
                monarch_matmul,
                lambda k, p, q, l, s, batch=1, **_: Cost(
                    2 * k * q * (k * p + l * s) * batch,
                    log2_ceil(k * p) + log2_ceil(k * q) + 2,
                    k * q * (k * p + l * s) + (k * q + s * l) * batch,
                ),
                exact=("work", "depth"),
            ),
            "blocks": Form(
                monarch_matmul_blocks,
                lambda k, p, q, l, s, batch=1, **_: Cost(
                    2 * k * q * (p + s) * batch, log2_ceil(p) + log2_ceil(k * q / max(l, 1)) + 2, (k * q + s * l) * batch
                ),
                exact=("work", "depth"),
            ),
        },
        gradient=monarch_matmul_vjp,
        sample=_sample,
        hard={"complex": _complex_sample, "one needle": _needle, "a Fourier transform": _dft},
        error_bound=error_bound,
        references=("dao2022monarch, section 3.1", "cooley1965", "fu2024flashfftconv, section 3.1"),
        lengths=(),
        sizes=(
            {"k": 1, "p": 1, "q": 1, "l": 1, "s": 1},
            {"k": 4, "p": 4, "q": 4, "l": 4, "s": 4},
            {"k": 8, "p": 3, "q": 3, "l": 6, "s": 7},
            {"batch": (2,)},
        ),
        laws=(linear(CONTRACT, "x"), linear(CONTRACT, "L"), linear(CONTRACT, "R")),
    ),
)
