"""discretize_diagonal against SciPy's exprel and cont2discrete, exact fractions and closed forms."""

from fractions import Fraction

import numpy as np
import pytest
import scipy.signal
import scipy.special

from refimpl.ops.state_space.discretize_diagonal import OPS, discretize_diagonal, discretize_diagonal_vjp, error_bound

(OP,) = OPS
FORMS = pytest.mark.parametrize("form", list(OP.forms))
UNIT = 2.0**-53
SCIPY = {"zoh": "zoh", "bilinear": "bilinear", "euler": "euler", "backward_euler": "backward_diff"}


def within(got, want, bound):
    for x, y, b in zip(got, want, bound, strict=True):
        assert x.shape == y.shape
        assert np.all(abs(x - y) <= b), f"{np.max(abs(x - y) / np.maximum(b, 1e-300)):.3g} times the bound"


@FORMS
def test_half_lives(form):
    """After ln 2 a unit rate has lost half, and gained half of what a constant input would give for ever."""
    a, b, dt = np.array([-1.0, -2.0, 0.0, 1.0]), np.ones(4), np.full(4, np.log(2))
    want = np.array([0.5, 0.25, 1, 2]), np.array([0.5, 0.375, np.log(2), 1])
    within(OP.forms[form].function(a, b, dt), want, [2 * E for E in error_bound(a, b, dt, unit=UNIT)])


@FORMS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_hold_is_scipy_exprel(form, dtype, rng):
    """Over 30 orders of magnitude of dt a, where (e^z - 1)/z loses everything below 1e-7 or 1e-16."""
    z = np.concatenate([-(10.0 ** np.arange(-28.0, 2)), 10.0 ** np.arange(-28.0, 1), [0.0]]).astype(dtype)
    one = np.ones_like(z)
    got = OP.forms[form].function(z, one, one)
    assert all(x.dtype == dtype for x in got)
    wide = z.astype(np.float64)
    want = np.exp(wide), scipy.special.exprel(wide)
    within(
        got,
        want,
        [
            E + 2 * F
            for E, F in zip(
                error_bound(wide, one, one, unit=2.0**-24 if dtype == np.float32 else UNIT),
                error_bound(wide, one, one, unit=UNIT),
                strict=True,
            )
        ],
    )


@FORMS
def test_hold_of_a_short_complex_step_in_fractions(form):
    """φ(z) = 1 + z/2 + z²/6 + z³/24 for |z| = 2^-14, whose next term is far below the last bit."""
    re, im = Fraction(-1, 2**14), Fraction(3, 2**14)
    z2 = (re * re - im * im, 2 * re * im)
    z3 = (z2[0] * re - z2[1] * im, z2[0] * im + z2[1] * re)
    z4 = (z2[0] ** 2 - z2[1] ** 2, 2 * z2[0] * z2[1])
    want = complex(float(1 + re / 2 + z2[0] / 6 + z3[0] / 24 + z4[0] / 120), float(im / 2 + z2[1] / 6 + z3[1] / 24 + z4[1] / 120))
    a, one = np.array([complex(float(re), float(im))]), np.ones(1)
    got = OP.forms[form].function(a, one, one)[1]
    assert abs(got - want) <= error_bound(a, one, one, unit=UNIT)[1]


@FORMS
@pytest.mark.parametrize("method", list(SCIPY))
def test_is_scipy_cont2discrete_of_a_diagonal(form, method, rng):
    a, b, dt = -rng.uniform(0.1, 3, 6), rng.standard_normal(6), 0.4
    A_bar, B_bar = scipy.signal.cont2discrete((np.diag(a), b[:, None], np.eye(6), np.zeros((6, 1))), dt, method=SCIPY[method])[:2]
    got = OP.forms[form].function(a, b, dt, method=method)
    within(got, (np.diag(A_bar), B_bar[:, 0]), [4 * E for E in error_bound(a, b, dt, unit=UNIT, method=method)])


def test_bilinear_maps_the_imaginary_axis_to_the_circle(rng):
    a = 1j * rng.uniform(-9, 9, 20)
    A_bar, _ = discretize_diagonal(a, np.ones(20), 0.7, method="bilinear")
    assert np.all(abs(abs(A_bar) - 1) <= error_bound(a, np.ones(20), 0.7, unit=UNIT, method="bilinear")[0])


def test_gradient_near_zero_is_the_series():
    """φ'(z) = 1/2 + z/3 + z²/8 + z³/30 ... , where (e^z - φ)/z cancels."""
    z = np.array([0.0, 1e-12, -1e-5, 2.0**-10])
    g = discretize_diagonal_vjp((None, np.ones(4)), z, np.ones(4), np.ones(4))
    want = 0.5 + z / 3 + z**2 / 8 + z**3 / 30 + z**4 / 144
    assert np.all(abs(g["a"] - want) <= 4 * UNIT)


def test_shapes_of_mamba(rng):
    a, b, dt = -rng.uniform(0.5, 1, (3, 4)), rng.standard_normal((2, 5, 1, 4)), rng.uniform(0.1, 1, (2, 5, 3, 1))
    A_bar, B_bar = discretize_diagonal(a, b, dt, method="mamba")
    np.testing.assert_array_equal(B_bar, np.broadcast_to(dt * b, (2, 5, 3, 4)))
    assert np.all(abs(A_bar - np.exp(dt * a)) <= error_bound(a, b, dt, unit=UNIT)[0])
    g = discretize_diagonal_vjp((np.ones_like(A_bar), np.ones_like(B_bar)), a, b, dt, method="mamba")
    assert {name: x.shape for name, x in g.items()} == {"a": a.shape, "b": b.shape, "dt": dt.shape}


def test_scalars_are_arrays_without_axes():
    A_bar, B_bar = discretize_diagonal(-1.0, 2.0, 0.0)
    assert A_bar.shape == B_bar.shape == ()
    assert (A_bar, B_bar) == (1, 0)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"discretize_diagonal: method must be one of .*, got 'exact'"):
        discretize_diagonal(-1.0, 1.0, 0.1, method="exact")
    with pytest.raises(ValueError, match="discretize_diagonal: batch axes must broadcast together"):
        discretize_diagonal(np.ones(3), np.ones(2), 0.1)
