"""monarch_matmul against explicit block-diagonal matrices, Fourier transforms and numbers worked by hand."""

import numpy as np
import pytest
import scipy.fft
import scipy.linalg

from refimpl.ops.recurrence.monarch import OPS, error_bound, monarch_dft, monarch_matmul

(OP,) = OPS
FORMS = pytest.mark.parametrize("form", list(OP.forms))


@FORMS
def test_worked_by_hand(form):
    x = np.array([1.0, 10.0, 100.0, 1000.0])
    R = np.array([[[1.0, 2.0], [0.0, 1.0]], [[1.0, 0.0], [3.0, 1.0]]])  # z = (21, 10 | 100, 1300)
    L = np.array([[[1.0, 1.0], [1.0, -1.0]], [[2.0, 0.0], [0.0, 1.0]]])  # of (21, 100) and (10, 1300): (121, -79), (20, 1300)
    np.testing.assert_array_equal(OP.forms[form].function(x, L, R), [121, 20, -79, 1300])


@FORMS
def test_is_the_product_of_scipy_block_diagonals(form, rng):
    L, R, x = rng.standard_normal((3, 5, 4)), rng.standard_normal((6, 2, 7)), rng.standard_normal((2, 42))
    to_blocks = np.zeros((12, 12))  # row (l, r) takes column (r, l)
    for a in range(3):
        for b in range(4):
            to_blocks[a * 4 + b, b * 3 + a] = 1
    to_rows = np.zeros((15, 15))
    for a in range(3):
        for b in range(5):
            to_rows[b * 3 + a, a * 5 + b] = 1
    M = to_rows @ scipy.linalg.block_diag(*L) @ to_blocks @ scipy.linalg.block_diag(*R)
    got = OP.forms[form].function(x, L, R)
    assert np.all(abs(got - x @ M.T) <= 16 * error_bound(x, L, R, unit=2.0**-53))


@FORMS
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (7, 1), (4, 4), (8, 3), (5, 13), (16, 32)])
@pytest.mark.parametrize(("dtype", "unit"), [(np.complex64, 2.0**-24), (np.complex128, 2.0**-53)])
def test_fourier_transform_is_a_monarch_matrix(form, rows, columns, dtype, unit, rng):
    L, R, order = monarch_dft(rows, columns, dtype)
    x = (rng.standard_normal((2, rows * columns)) + 1j * rng.standard_normal((2, rows * columns))).astype(dtype)
    got = OP.forms[form].function(x[..., order], L, R)
    assert got.dtype == dtype
    want = scipy.fft.fft(x.astype(np.clongdouble))
    assert np.all(abs(got - want) <= error_bound(x[..., order], L, R, unit=unit) + 4 * unit * abs(x).sum(axis=-1, keepdims=True))


def test_roots_of_unity_are_right_to_the_last_bit():
    """Of a transform whose frequencies are known exactly: cos and sin of multiples of 30 and 45 degrees."""
    for n, exact in [
        (12, {1: np.sqrt(3) / 2 - 0.5j, 2: 0.5 - 1j * np.sqrt(3) / 2, 3: -1j, 6: -1}),
        (8, {1: np.sqrt(0.5) * (1 - 1j), 4: -1, 5: np.sqrt(0.5) * (-1 + 1j)}),
    ]:
        L, _, _ = monarch_dft(1, n)
        for j, value in exact.items():
            assert abs(L[0, 1, j] - value) <= 2.0**-53, (n, j)


def test_hadamard_is_a_monarch_matrix(rng):
    H = scipy.linalg.hadamard(4).astype(float)
    x = rng.integers(-9, 9, 16).astype(float)
    np.testing.assert_array_equal(monarch_matmul(x, np.stack([H] * 4), np.stack([H] * 4)), scipy.linalg.hadamard(16) @ x)


def test_sizes_must_chain():
    with pytest.raises(ValueError, match="monarch_matmul: R must have blocks·columns = n"):
        monarch_matmul(np.ones(5), np.ones((2, 2, 2)), np.ones((2, 2, 2)))
    with pytest.raises(ValueError, match="monarch_matmul: L's columns must match R's rows"):
        monarch_matmul(np.ones(4), np.ones((3, 2, 2)), np.ones((2, 2, 2)))
    with pytest.raises(ValueError, match="rows must be an integer of at least 1"):
        monarch_dft(0, 3)
