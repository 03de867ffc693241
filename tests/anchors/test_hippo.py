"""HiPPO against matrices worked by hand, and against what it is for: projections by SciPy's polynomials and quadrature."""

import numpy as np
import pytest
import scipy.integrate
import scipy.special

import refimpl
from refimpl.ops.state_space.discretize import discretize
from refimpl.ops.state_space.hippo import MEASURES, hippo, nplr

EPS = np.finfo(float).eps
R2, R3, R5 = np.sqrt([2.0, 3.0, 5.0])
BY_HAND = {
    ("legs", 1): ([[-1]], [1]),
    ("legs", 2): ([[-1, 0], [-R3, -2]], [1, R3]),
    ("legs", 3): ([[-1, 0, 0], [-R3, -2, 0], [-R5, -R3 * R5, -3]], [1, R3, R5]),
    ("legt", 2): ([[-1, R3], [-R3, -3]], [1, R3]),
    ("legt", 3): ([[-1, R3, -R5], [-R3, -3, R3 * R5], [-R5, -R3 * R5, -5]], [1, R3, R5]),
    ("lagt", 2): ([[-1, 0], [-1, -1]], [1, 1]),
    ("fout", 2): ([[-2, 0], [0, 0]], [2, 0]),
    ("fout", 4): ([[-2, 0, -2 * R2, 0], [0, 0, 0, 0], [-2 * R2, 0, -4, -2 * np.pi], [0, 0, 2 * np.pi, 0]], [2, 0, 2 * R2, 0]),
}
EACH = pytest.mark.parametrize("measure", MEASURES)


@pytest.mark.parametrize(("measure", "n"), list(BY_HAND))
def test_matrices_by_hand(measure, n):
    for got, want in zip(hippo(measure, n), BY_HAND[measure, n], strict=True):
        np.testing.assert_allclose(got, want, rtol=4 * EPS, atol=0)


def legendre(i, s):
    return np.sqrt(2 * i + 1) * scipy.special.eval_legendre(i, 2 * s - 1)


def fourier(i, a):
    if i == 0:
        return np.ones_like(a)
    return np.sqrt(2) * (np.sin if i % 2 else np.cos)(2 * np.pi * (i // 2) * a)


NODES, WEIGHTS = (x / 2 for x in np.polynomial.legendre.leggauss(60))
NODES = NODES + 0.5  # on [0, 1]


def coefficients(measure, n, u, t, weight=lambda s: 1.0):
    """∫ u g_i dμ at time t by quadrature."""
    if measure == "lagt":
        ages, w = scipy.special.roots_laguerre(40)
        return np.array([np.sum(w * weight(t - ages) * u(t - ages) * scipy.special.eval_laguerre(i, ages)) for i in range(n)])
    if measure == "fout":
        values = weight(t - NODES) * u(t - NODES)
        return np.array([np.sum(WEIGHTS * values * fourier(i, NODES)) for i in range(n)])
    s = t * NODES if measure == "legs" else t - 1 + NODES
    return np.array([np.sum(WEIGHTS * weight(s) * u(s) * legendre(i, NODES)) for i in range(n)])


@pytest.mark.parametrize("degree", [0, 1, 3])
@EACH
def test_the_equation_of_the_coefficients(measure, degree, rng):
    """x' = A x + B u where it is exact: for a polynomial u (of degree 1 at most in fout, whose series has its mean at a jump)."""
    n, t = 6, 1.7
    degree = min(degree, 1) if measure == "fout" else degree
    u = np.polynomial.Polynomial(rng.standard_normal(degree + 1))
    A, B = hippo(measure, n)
    x = coefficients(measure, n, u, t)
    # x' = ∫ u' g dμ for a measure that moves with t; for one that stretches with it, a point at s moves with s/t
    slope = coefficients(measure, n, u.deriv(), t, weight=lambda s: s if measure == "legs" else 1.0)
    size = abs(A) @ abs(x) + abs(B * u(t))
    assert np.all(abs(A @ x + B * u(t) - slope) <= 1000 * EPS * (size.max() + abs(slope).max()))


def test_fout_of_a_periodic_input():
    u = lambda s: 0.5 + np.cos(2 * np.pi * s) - 2 * np.sin(4 * np.pi * s)
    slope = lambda s: -2 * np.pi * np.sin(2 * np.pi * s) - 8 * np.pi * np.cos(4 * np.pi * s)
    A, B = hippo("fout", 8)
    np.testing.assert_allclose(A @ coefficients("fout", 8, u, 0.3) + B * u(0.3), coefficients("fout", 8, slope, 0.3), atol=1e-11)


def online(n, u, t):
    """LegS driven sample by sample: t x' = A x + B u, one exact step of a hold in log t (the system is autonomous there)."""
    A, B = hippo("legs", n)
    x = B * (np.arange(n) == 0) * u(t[0])  # the projection of a constant
    for start, stop in zip(t[:-1], t[1:], strict=True):
        A_bar, B_bar = discretize(A, B, np.log(stop / start))
        x = A_bar @ x + B_bar * u((start + stop) / 2)
    return x


def test_legs_remembers_more_with_more_coefficients():
    u = lambda s: np.sin(9 * s) * np.exp(-s) + 0.3 * s
    t = np.linspace(1e-3, 1, 400)
    s = np.linspace(0.01, 1, 200)
    errors = []
    for n in (2, 4, 8, 16):
        x = online(n, u, t)
        past = sum(x[i] * legendre(i, s) for i in range(n))
        errors.append(np.sqrt(np.mean((past - u(s)) ** 2)))
        best = coefficients("legs", n, u, 1.0)
        assert np.max(abs(x - best)) < 1e-3 * np.linalg.norm(best)  # held inputs: O(step²)
    assert errors[1] < errors[0] and errors[2] < errors[1] / 10 and errors[3] < errors[2] / 10, errors


@pytest.mark.parametrize(
    ("past", "rate"),
    [
        (lambda s: np.where(s > 0.4, 1.0, 0.0), 0.5),
        (lambda s: np.maximum(s - 0.4, 0.0), 1.5),
        (lambda s: np.where(s > 0.4, (s - 0.4) ** 2, 0.0), 2.5),
    ],
    ids=["a jump", "a kink", "a jump of the curvature"],
)
def test_legs_remembers_as_well_as_theory_says(past, rate):
    """Legendre coefficients of a function whose k-th derivative jumps fall as i^-(k+1), so that the error falls as n^-(k+1/2)."""
    t = np.geomspace(1e-3, 1, 6000)
    s, weights = scipy.special.roots_legendre(3000)
    s = (s + 1) / 2
    sizes, errors = (6, 12, 24, 48), []
    for n in sizes:
        A, B = hippo("legs", n)
        A_bar, B_bar = discretize(A, B, np.log(t[1] / t[0]))  # in log t the system is constant: all steps are alike
        x = np.zeros(n)
        for middle in (t[1:] + t[:-1]) / 2:
            x = A_bar @ x + B_bar * past(middle)
        off = sum(x[i] * legendre(i, s) for i in range(n)) - past(s)
        errors.append(np.sqrt((off**2 * weights).sum() / 2))
    slope = -np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert abs(slope - rate) < 0.25, (slope, errors)


def test_legt_and_fout_forget_what_left_the_window():
    """An input that ended more than a window ago leaves less, the more coefficients there are to notice."""
    left = {}
    for measure in ("legt", "fout"):
        for n in (4, 16):
            A, B = hippo(measure, n)
            A_bar, B_bar = discretize(A, B, 1 / 256)
            x = np.zeros(n)
            for step in range(256):
                x = A_bar @ x + B_bar * np.sin(np.pi * step / 256) ** 2
            full = np.linalg.norm(x)
            for _ in range(320):
                x = A_bar @ x
            left[measure, n] = np.linalg.norm(x) / full
        assert left[measure, 16] < left[measure, 4] < 0.3, left
        assert left[measure, 16] < 0.05, left


@pytest.mark.parametrize("n", [1, 2, 3, 8, 33, 64])
@EACH
def test_normal_plus_low_rank(measure, n):
    if measure == "fout" and n % 2:
        n += 1
    A, B = hippo(measure, n)
    Lambda, P, B_, V = nplr(measure, n)
    assert (Lambda.shape, P.shape, B_.shape, V.shape) == ((n,), (n, 2 if measure == "legt" else 1), (n,), (n, n))
    rounding = 8 * n * EPS * np.linalg.norm(A)
    np.testing.assert_allclose(V.conj().T @ V, np.eye(n), atol=8 * n * EPS)
    np.testing.assert_allclose(V @ (np.diag(Lambda) - P @ P.conj().T) @ V.conj().T, A, atol=rounding, rtol=0)
    np.testing.assert_allclose(V @ B_, B, atol=8 * n * EPS * np.linalg.norm(B), rtol=0)
    assert np.all(Lambda.real == (-0.5 if measure in ("legs", "lagt") else 0))
    assert np.all(np.diff(Lambda.imag) >= 0)
    np.testing.assert_allclose(Lambda.imag, -Lambda.imag[::-1], atol=rounding)
    assert np.all(B_.real >= -8 * n * EPS * np.linalg.norm(B)) and np.all(abs(B_.imag) <= 8 * n * EPS * np.linalg.norm(B))


def test_eigenvalues_by_hand():
    """legs, n = 2: the skew part has ±√3/2 beside the diagonal; fout: multiples of 2π."""
    np.testing.assert_allclose(nplr("legs", 2)[0], -0.5 + np.array([-1j, 1j]) * R3 / 2, rtol=8 * EPS)
    np.testing.assert_allclose(nplr("fout", 6)[0].imag / (2 * np.pi), [-2, -1, 0, 0, 1, 2], atol=16 * EPS)


@EACH
def test_memories_are_stable(measure):
    """No direction grows: the symmetric part of A has no positive eigenvalue (for each, minus a multiple of I and of p pᵀ)."""
    A, _ = hippo(measure, 8)
    assert np.linalg.eigvalsh((A + A.T) / 2).max() <= 64 * EPS * np.linalg.norm(A)


@pytest.mark.parametrize("function", [hippo, nplr])
@pytest.mark.parametrize(
    ("measure", "n", "says"),
    [
        ("legz", 4, "measure must be one of"),
        (None, 4, "measure must be one of"),
        ("legs", 0, "n must be an integer of at least 1"),
        ("legs", 2.0, "n must be"),
        ("legs", True, "n must be"),
        ("fout", 3, "n must be even"),
    ],
)
def test_bad_input(function, measure, n, says):
    with pytest.raises(ValueError, match=f"{function.__name__}: {says}"):
        function(measure, n)


def test_public():
    assert refimpl.hippo is hippo and refimpl.nplr is nplr
