"""long_conv against SciPy's convolutions, exact fractions and numbers worked by hand."""

from fractions import Fraction

import numpy as np
import pytest
import scipy.signal

from refimpl.ops.recurrence.long_conv import OPS, error_bound, long_conv, long_conv_vjp

(OP,) = OPS
FORMS = pytest.mark.parametrize("form", list(OP.forms))
UNIT = {np.float32: 2.0**-24, np.float64: 2.0**-53}


def within(got, want, bound):
    assert got.shape == want.shape
    assert np.all(abs(got - want) <= bound), f"{np.max(abs(got - want) / np.maximum(bound, 1e-300)):.3g} times the bound"


@FORMS
def test_worked_by_hand(form):
    u = np.array([[1.0], [2.0], [0.0], [-1.0]])
    kernel = np.array([[3.0], [1.0], [4.0]])
    skip = np.array([10.0])
    want = np.array([[3.0 + 10], [6 + 1 + 20.0], [0 + 2 + 4 + 0.0], [-3 + 0 + 8 - 10.0]])
    within(OP.forms[form].function(u, kernel, skip), want, error_bound(u, kernel, skip, unit=2.0**-53))


@FORMS
@pytest.mark.parametrize(("T", "K"), [(1, 1), (5, 3), (3, 5), (64, 64), (100, 7), (7, 100), (257, 129)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_is_scipy_fftconvolve(form, T, K, dtype, rng):
    u, kernel = rng.standard_normal((2, T, 3)).astype(dtype), rng.standard_normal((K, 3)).astype(dtype)
    want = scipy.signal.fftconvolve(u.astype(np.float64), kernel[None].astype(np.float64), axes=1)[:, :T]
    got = OP.forms[form].function(u, kernel)
    assert got.dtype == dtype
    bound = error_bound(u.astype(np.float64), kernel.astype(np.float64), unit=UNIT[dtype])
    within(got, want, bound + error_bound(u.astype(np.float64), kernel.astype(np.float64), unit=2.0**-53))


@FORMS
def test_is_scipy_oaconvolve_and_lfilter(form, rng):
    u, kernel = rng.standard_normal((300, 2)), rng.standard_normal((20, 2))
    got, bound = OP.forms[form].function(u, kernel), 2 * error_bound(u, kernel, unit=2.0**-53)
    within(got, scipy.signal.oaconvolve(u, kernel, axes=0)[:300], bound)
    within(got, np.stack([scipy.signal.lfilter(kernel[:, i], [1.0], u[:, i]) for i in range(2)], axis=-1), bound)


@FORMS
def test_complex_is_scipy_convolve(form, rng):
    u, kernel = rng.standard_normal((2, 19, 2)) @ [1, 1j], rng.standard_normal((2, 30, 2)) @ [1, 1j]
    want = scipy.signal.convolve(u[0], kernel[0], method="direct")[:19, None]
    got = OP.forms[form].function(u[0][:, None], kernel[0][:, None])
    within(got, want, 2 * error_bound(u[0][:, None], kernel[0][:, None], unit=2.0**-53))


def test_against_exact_fractions(rng):
    u, kernel = rng.standard_normal((12, 1)), rng.standard_normal((9, 1))
    exact = [sum((Fraction(kernel[s, 0]) * Fraction(u[t - s, 0]) for s in range(min(t + 1, 9))), Fraction(0)) for t in range(12)]
    got, bound = long_conv(u, kernel), error_bound(u, kernel, unit=2.0**-53)
    for t, value in enumerate(exact):
        assert abs(Fraction(got[t, 0]) - value) <= Fraction(bound[t, 0])


def test_small_integers_are_exact(rng):
    u, kernel = rng.integers(-9, 9, (50, 1)).astype(np.float32), rng.integers(-9, 9, (30, 1)).astype(np.float32)
    np.testing.assert_array_equal(long_conv(u, kernel)[:, 0], np.convolve(u[:, 0].astype(int), kernel[:, 0].astype(int))[:50])


def test_polynomial_product(rng):
    """A convolution multiplies polynomials: (1 + z)^3 has Pascal's row."""
    one_plus_z = np.array([[1.0], [1.0], [0.0], [0.0], [0.0]])
    square = long_conv(one_plus_z, one_plus_z)
    np.testing.assert_array_equal(long_conv(square, one_plus_z)[:, 0], [1, 3, 3, 1, 0])


def test_gradient_worked_by_hand():
    u, kernel, dy = np.array([[1.0], [2.0]]), np.array([[3.0], [5.0], [7.0]]), np.array([[10.0], [100.0]])
    g = long_conv_vjp(dy, u, kernel, np.array([2.0]))
    np.testing.assert_array_equal(g["u"][:, 0], [3 * 10 + 5 * 100 + 20, 3 * 100 + 200])
    np.testing.assert_array_equal(g["kernel"][:, 0], [1 * 10 + 2 * 100, 1 * 100, 0])
    np.testing.assert_array_equal(g["skip"], [1 * 10 + 2 * 100])


def test_gradient_is_scipy_correlate(rng):
    u, kernel, dy = rng.standard_normal((15, 1)), rng.standard_normal((6, 1)), rng.standard_normal((15, 1))
    g = long_conv_vjp(dy, u, kernel)
    within(g["u"][:, 0], scipy.signal.correlate(dy[:, 0], kernel[:, 0], "full")[5:], 64 * error_bound(dy, abs(kernel), unit=2.0**-53).max())
    within(
        g["kernel"][:, 0], scipy.signal.correlate(dy[:, 0], u[:, 0], "full")[14:20], 64 * error_bound(abs(u), abs(dy), unit=2.0**-53).max()
    )


@FORMS
def test_float32_stays_float32(form, rng):
    """float32 transforms, not float64 ones rounded: the error shows which."""
    u, kernel = rng.standard_normal((512, 2)).astype(np.float32), rng.standard_normal((512, 2)).astype(np.float32)
    got = OP.forms[form].function(u, kernel)
    want = scipy.signal.fftconvolve(u.astype(np.float64), kernel.astype(np.float64), axes=0)[:512]
    assert got.dtype == np.float32
    assert np.sqrt(np.mean((got - want) ** 2)) > 1.2 * np.sqrt(np.mean((want.astype(np.float32) - want) ** 2))


@pytest.mark.parametrize("block", [1, 2, 5, 64, 1000])
def test_any_block(block, rng):
    u, kernel = rng.standard_normal((37, 2)), rng.standard_normal((11, 2))
    within(OP.forms["overlap_add"].function(u, kernel, block=block), long_conv(u, kernel), 2 * error_bound(u, kernel, unit=2.0**-53))


@pytest.mark.parametrize("block", [0, -1, 2.0, True])
def test_block_must_be_a_positive_integer(block):
    with pytest.raises(ValueError, match="block must be an integer of at least 1"):
        OP.forms["overlap_add"].function(np.ones((3, 1)), np.ones((2, 1)), block=block)


def test_work_of_the_transform_grows_as_t_log_t():
    cost = OP.forms["fft"].cost
    works = [cost(T=T, K=T, c=1).work / (T * np.log2(T)) for T in (2**10, 2**14, 2**18)]
    assert max(works) / min(works) < 1.2
    assert OP.forms["direct"].cost(T=2**14, K=2**14, c=1).work > 50 * cost(T=2**14, K=2**14, c=1).work


@pytest.mark.peers
def test_is_torch_conv1d_with_the_kernel_reversed(rng):
    torch = pytest.importorskip("torch")
    u, kernel = rng.standard_normal((2, 40, 3)), rng.standard_normal((17, 3))
    x = torch.nn.functional.pad(torch.tensor(u).transpose(1, 2), (16, 0))
    want = torch.nn.functional.conv1d(x, torch.tensor(kernel.T[:, None, ::-1].copy()), groups=3).transpose(1, 2).numpy()
    within(long_conv(u, kernel), want, 2 * error_bound(u, kernel, unit=2.0**-53))
