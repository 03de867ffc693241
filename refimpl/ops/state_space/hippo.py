"""HiPPO: the state matrices that remember a function by its coefficients in an orthogonal basis.

A state x of n numbers cannot hold all of the past of u. HiPPO [1] lets it hold the best approximation of that past by n
basis functions, for a measure that says how much each moment counts. The coefficients x_i(t) = ∫ u g_i dμ_t of a basis
that moves with t obey a differential equation, since the derivatives of the g_i are sums of others of them:

    x' = A x + B u        (LegS: x' = (A x + B u) / t)                                                    (1)

with i the row and j the column, both from 0:

    legs   uniform on [0, t], Legendre polynomials, g_i(s) = √(2i+1) P_i(2 s/t - 1)
               A_ij = -√(2i+1) √(2j+1) for i > j,   -(i+1) for i = j,   0 for i < j;      B_i = √(2i+1)           (2)
    legt   uniform on [t-1, t], Legendre polynomials, g_i(s) = √(2i+1) P_i(2 (s - t) + 1)
               A_ij = -√(2i+1) √(2j+1) · (1 for i >= j, (-1)^(i-j) for i < j);            B_i = √(2i+1)           (3)
    lagt   e^-(t-s) on (-∞, t], Laguerre polynomials, g_i(s) = L_i(t - s)
               A_ij = -1 for i >= j,   0 for i < j;                                       B_i = 1                 (4)
    fout   uniform on [t-1, t], Fourier series in the age a = t - s: g_2k = √2 cos 2πka, g_2k+1 = √2 sin 2πka, and g_0 = 1
               A = S - β βᵀ,  S_2k,2k+1 = -2πk,  S_2k+1,2k = 2πk,   0 elsewhere;          B = √2 β
               β_0 = √2,  β_2k = 2 for k > 0,  β_2k+1 = 0                                                         (5)

(2) and (4) hold exactly; (3) and (5) replace u(t-1), which the window forgets, by what the coefficients remember of it.

These matrices are not normal: their eigenvectors are useless in floating point, with condition numbers that grow as 2^n.
But each is a normal matrix less one of rank 1 or 2 [2, theorem 1]: A + p pᵀ is skew-symmetric but for a multiple of the identity,

    p    legs  √(i + 1/2)     legt  √(2i+1), even i in one column, odd in the other     lagt  √(1/2)     fout  β    (6)

so a unitary V diagonalises it: A = V (Λ - P Pᴴ) Vᴴ with P = Vᴴ p, the form in which `s4_kernel` takes it.

Glossary
    measure     which of (2)-(5)
    A, B        continuous system                         A, B
    Lambda      eigenvalues of the normal part            Λ
    P           low-rank part, in V's basis               P ([2], where P may differ from Q; here they are equal)

Where implementations differ
    legs    S4 drops the 1/t of (1): the same A, B, another measure (exponentially warped Legendre polynomials [3]).
    legt    halved in some code, A/2 and B/2: that is a window of length 2; for one of length θ divide (3) by θ. The Legendre
            Memory Unit holds (-1)^i √(2i+1) x_i: its A_ij has (2i+1) in place of the root, and other signs.
    lagt    "tilted" in some code, with -1/2 on the diagonal: coefficients of e^(-(t-s)/2) L_i(t-s), decay shared between
            function and basis. (4) is plain.
    fout    "doubled" here, as in [3]: at a jump a Fourier series takes the mean, so u(t-1) = 2 Σ x_i g_i(t) - u(t), which
            gives -ββᵀ = -2 bbᵀ and B = 2b with b = β/√2. Other code takes u(t-1) = Σ x_i g_i(t), with neither factor of 2, and some
            have πk in place of 2πk. State 1 (the sine of frequency 0) stays 0: it pads the pairs, and n is even.

References
    [1] A. Gu, T. Dao, S. Ermon, A. Rudra and C. Ré, "HiPPO: recurrent memory with optimal polynomial projections", NeurIPS
        2020, theorems 1 and 2.
    [2] A. Gu, K. Goel and C. Ré, "Efficiently modeling long sequences with structured state spaces", ICLR 2022, theorem 1
        and appendix C.1.
    [3] A. Gu, I. Johnson, A. Timalsina, A. Rudra and C. Ré, "How to train your HiPPO: state space models with generalized
        orthogonal basis projections", ICLR 2023, section 3.
"""

import numpy as np

from refimpl.core.options import one_of, positive_int

__all__ = ["hippo", "nplr"]

MEASURES = ("legs", "legt", "lagt", "fout")


def hippo(measure, n):
    """State and input matrix of a HiPPO memory, equations (2)-(5) of this module's docstring.

    Parameters
    ----------
    measure : {"legs", "legt", "lagt", "fout"}
        Legendre, all of the past scaled to one interval; Legendre on a window of length 1; Laguerre, exponentially fading;
        Fourier on a window of length 1.
    n : int
        Number of coefficients, at least 1; even for "fout".

    Returns
    -------
    A : ndarray, shape (n, n)
    B : ndarray, shape (n,)
        float64.

    Raises
    ------
    ValueError
        If the measure is unknown, n is not an integer of at least 1, or odd for "fout".

    Notes
    -----
    Public matrices differ by scalings and tilts; the module's docstring says where, and these are::

        legs   A_ij = -√(2i+1) √(2j+1), i > j;   -(i+1), i = j;   0, i < j          B_i = √(2i+1)
        legt   A_ij = -√(2i+1) √(2j+1), i >= j;  times (-1)^(i-j), i < j            B_i = √(2i+1)    (some halve both)
        lagt   A_ij = -1, i >= j;                 0, i < j                          B_i = 1          (some: A_ii = -1/2)
        fout   A = S - β βᵀ, S_2k+1,2k = 2πk = -S_2k,2k+1                           B = √2 β         (some: A = S - ββᵀ/2, B = β/√2)
               β = (√2, 0, 2, 0, 2, 0, ...)

    The window of legt and fout has length 1: divide A and B by θ for length θ. Entries are right to 2 units in the last place.

    References
    ----------
    [1] and [3] of the module's docstring.

    Examples
    --------
    >>> A, B = hippo("lagt", 3)
    >>> A
    array([[-1.,  0.,  0.],
           [-1., -1.,  0.],
           [-1., -1., -1.]])
    >>> B
    array([1., 1., 1.])
    """
    _check("hippo", measure, n)
    i, j = np.arange(n)[:, None], np.arange(n)
    root = np.sqrt(2 * j + 1.0)
    products = np.sqrt((2 * i + 1.0) * (2 * j + 1))
    if measure == "legs":
        return np.where(i > j, -products, 0.0) - np.diag(j + 1.0), root
    if measure == "legt":
        return np.where((i < j) & ((i - j) % 2 == 1), products, -products), root
    if measure == "lagt":
        return np.where(i >= j, -1.0, 0.0), np.ones(n)
    beta = _low_rank(measure, n)[:, 0]
    turning = 2 * np.pi * np.where(i - j == 1, j // 2 * (j % 2 == 0), 0)
    return turning - turning.T - beta[:, None] * beta, np.sqrt(2.0) * beta


def nplr(measure, n):
    """Normal plus low rank: A = V (diag(Λ) - P Pᴴ) Vᴴ of a HiPPO matrix, V unitary, equation (6) of this module's docstring.

    Parameters
    ----------
    measure, n
        As in `hippo`.

    Returns
    -------
    Lambda : ndarray, shape (n,), complex
        All n eigenvalues of the normal part, by ascending imaginary part (they come as conjugates, not halved); the real
        part is -1/2 for "legs" and "lagt", 0 for "legt" and "fout".
    P : ndarray, shape (n, r), complex
        The low-rank part in the basis of V; r = 2 for "legt", else 1.
    B : ndarray, shape (n,), complex
        Vᴴ B, the input matrix in the basis of V.
    V : ndarray, shape (n, n), complex
        Eigenvectors, a column each, their phases such that Vᴴ B >= 0.

    Raises
    ------
    ValueError
        As `hippo`.

    Notes
    -----
    About 10 n³ operations, once. The skew-symmetric part times -i is Hermitian, so that eigenvalues and V are right to a
    few units of roundoff of ‖A‖, which grows as n². Take one of each pair, and twice the real part, only where the kernel is told so.

    References
    ----------
    [2] of the module's docstring, theorem 1.

    Examples
    --------
    >>> import numpy as np
    >>> A, _ = hippo("legs", 6)
    >>> Lambda, P, B, V = nplr("legs", 6)
    >>> bool(np.allclose(V @ (np.diag(Lambda) - P @ P.conj().T) @ V.conj().T, A))
    True
    """
    _check("nplr", measure, n)
    A, B = hippo(measure, n)
    p = _low_rank(measure, n)
    skew = A + p @ p.T
    frequencies, V = np.linalg.eigh(-1j * (skew - skew.T) / 2)
    entry = V.conj().T @ B
    size = abs(entry)
    V = V * np.where(size > 0, entry / np.where(size > 0, size, 1), 1)
    real = -0.5 if measure in ("legs", "lagt") else 0.0
    Lambda = real + 1j * frequencies
    return Lambda, V.conj().T @ p, V.conj().T @ B, V


def _low_rank(measure, n):
    """(6), (n, r)."""
    i = np.arange(n)
    if measure == "legs":
        return np.sqrt(i + 0.5)[:, None]
    if measure == "legt":
        return np.sqrt(2 * i + 1.0)[:, None] * (i[:, None] % 2 == np.arange(2))
    if measure == "lagt":
        return np.full((n, 1), np.sqrt(0.5))
    return np.where(i % 2 == 0, np.where(i == 0, np.sqrt(2.0), 2.0), 0.0)[:, None]


def _check(operator, measure, n):
    one_of(operator, "measure", measure, MEASURES)
    positive_int(operator, "n", n)
    if measure == "fout" and n % 2:
        raise ValueError(f"{operator}: n must be even for the measure 'fout', got {n}")
