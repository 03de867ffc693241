"""ssm_kernel against hand-worked numbers, SciPy's impulse responses, exact fractions and closed forms; its forms against each other."""

from fractions import Fraction

import numpy as np
import pytest
import scipy.signal

from refimpl.ops.recurrence.long_conv import long_conv
from refimpl.ops.state_space.discretize_diagonal import discretize_diagonal
from refimpl.ops.state_space.ssm import ssm
from refimpl.ops.state_space.ssm_kernel import OPS, error_bound, ssm_kernel, ssm_kernel_vandermonde, ssm_kernel_vjp

(OP,) = OPS
FORMS = pytest.mark.parametrize("form", list(OP.forms))
UNIT = 2.0**-53


def within(got, want, bound):
    assert got.shape == want.shape
    assert np.all(abs(got - want) <= bound), f"{np.max(abs(got - want) / np.maximum(bound, 1e-300)):.3g} times the bound"


@FORMS
def test_two_states_by_hand(form):
    """3·2·(1/2)^k + 5·(-1)·(-2)^k: 1, 13, -18.5."""
    K = OP.forms[form].function(np.array([[0.5, -2.0]]), np.array([[2.0, -1.0]]), np.array([[3.0, 5.0]]), 3)
    assert K[:, 0].tolist() == [1, 13, -18.5]


@FORMS
def test_a_rotation_by_hand(form):
    """(1 + 2i) i^k: real parts 1, -2, -1, 2; with the conjugate, twice that."""
    call = (np.array([[1j]]), np.array([[1.0]]), np.array([[1 + 2j]]))
    assert OP.forms[form].function(*call, 4)[:, 0].tolist() == [1, -2, -1, 2]
    assert OP.forms[form].function(*call, 4, pairs=True)[:, 0].tolist() == [2, -4, -2, 4]


def test_a_matrix_by_hand():
    """Fibonacci: [[1, 1], [1, 0]]^k from (1, 0), read by its first entry."""
    K = ssm_kernel(np.array([[[1.0, 1.0], [1.0, 0.0]]]), np.array([[1.0, 0.0]]), np.array([[1.0, 0.0]]), 10)
    assert K[:, 0].tolist() == [1, 1, 2, 3, 5, 8, 13, 21, 34, 55]


def test_a_matrix_that_is_not_symmetric_by_hand():
    """Ā = [[0, 2], [0, 0]] brings the second state into the first, twice, and then is done."""
    K = ssm_kernel(np.array([[[0.0, 2.0], [0.0, 0.0]]]), np.array([[0.0, 1.0]]), np.array([[1.0, 10.0]]), 3)
    assert K[:, 0].tolist() == [10, 2, 0]


@FORMS
def test_what_is_shared_serves_all_channels(form, rng):
    A, B, C = rng.uniform(0.1, 0.9, (1, 4)), np.ones((1, 4)), rng.standard_normal((3, 4))
    K = OP.forms[form].function(A, B, C, 9)
    assert np.array_equal(K, OP.forms[form].function(np.tile(A, (3, 1)), np.tile(B, (3, 1)), C, 9))


@pytest.mark.parametrize("length", [-1, 2.0, True, "3", None])
def test_a_length_is_an_integer(length):
    with pytest.raises((ValueError, TypeError), match="ssm_kernel: length must be"):
        ssm_kernel(np.ones((1, 1)), np.ones((1, 1)), np.ones((1, 1)), length)


def test_vandermonde_needs_a_diagonal(rng):
    with pytest.raises(ValueError, match="ssm_kernel: the form 'vandermonde' needs a diagonal A_bar"):
        ssm_kernel_vandermonde(**OP.sample(rng, dense=True))


@FORMS
def test_is_fractions(form, rng):
    A, B, C = (rng.integers(-12, 13, (1, 3)) / 16 for _ in range(3))
    exact = [[Fraction(v) for v in m[0]] for m in (A, B, C)]
    want = [float(sum(c * a**k * b for a, b, c in zip(*exact, strict=True))) for k in range(20)]
    within(OP.forms[form].function(A, B, C, 20)[:, 0], np.array(want), error_bound(A, B, C, 20, unit=UNIT)[:, 0])


def test_is_scipy_dimpulse(rng):
    """dimpulse reads before it writes: its answer comes a step later, and starts with D = 0."""
    n = 5
    A, B, C = 0.4 * rng.standard_normal((n, n)), rng.standard_normal((n, 1)), rng.standard_normal((1, n))
    _, (want,) = scipy.signal.dimpulse((A, B, C, np.zeros((1, 1)), 1.0), n=41)
    within(ssm_kernel(A[None], B.T, C, 40), want[1:], 2 * error_bound(A[None], B.T, C, 40, unit=UNIT))


@FORMS
def test_is_the_sampled_impulse_response(form):
    """Of x' = a x + b u, held: K_k = C e^(a dt k) (e^(a dt) - 1)/a b."""
    a, dt = np.array([[-0.3 + 2j, -1 - 1j]]), 0.25
    A_bar, B_bar = discretize_diagonal(a, np.ones((1, 2)), dt)
    k, C = np.arange(30)[:, None], np.array([[1 - 1j, 2.0]])
    want = (C * np.exp(a * dt * k) * (np.exp(a * dt) - 1) / a).sum(axis=-1, keepdims=True).real
    within(OP.forms[form].function(A_bar, B_bar, C, 30), want, 4 * error_bound(A_bar, B_bar, C, 30, unit=UNIT))


@pytest.mark.parametrize("n", [1, 8, 64])
@pytest.mark.parametrize("length", [17, 1024, 4096])
def test_forms_agree_to_ten_digits(n, length, rng):
    """S4D-Lin's eigenvalues -1/2 + iπn and steps from 0.001 to 0.1, in float64."""
    dt = np.array([[1e-3], [1e-2], [1e-1]])
    A_bar, B_bar = discretize_diagonal(-0.5 + 1j * np.pi * np.arange(n), np.ones(n), dt)
    C = rng.standard_normal((3, n)) + 1j * rng.standard_normal((3, n))
    power, vandermonde = (OP.forms[f].function(A_bar, B_bar, C, length, pairs=True) for f in ("power", "vandermonde"))
    assert np.max(abs(power - vandermonde)) < 1e-10 * np.max(abs(power))


@pytest.mark.parametrize("dense", [False, True])
def test_convolving_with_the_kernel_is_the_recurrence(dense, rng):
    call = OP.sample(rng, L=50, dense=dense)
    length, u = call.pop("length"), rng.standard_normal((50, 3))
    y = ssm(u, **call)
    assert np.max(abs(long_conv(u, ssm_kernel(**call, length=length)) - y)) < 1e-13 * np.max(abs(y))


def test_gradient_of_two_rows_by_hand():
    """K = 2 Re(C B), 2 Re(C A B), with the cotangents 1 and 10."""
    A, B, C = 0.5 + 1j, 2 - 1j, 1 + 3j
    g = ssm_kernel_vjp(np.array([[1.0], [10.0]]), *(np.array([[v]]) for v in (A, B, C)), 2, pairs=True)
    want = {"A_bar": 20 * np.conj(C * B), "B_bar": 2 * np.conj(C) * (1 + 10 * np.conj(A)), "C": 2 * np.conj(B) * (1 + 10 * np.conj(A))}
    assert g.keys() == want.keys()
    for name, value in want.items():
        assert abs(g[name].item() - value) <= 8 * UNIT * abs(value), name


@pytest.mark.peers
@pytest.mark.parametrize("dense", [False, True])
def test_gradient_is_torch_autograd(dense, rng):
    torch = pytest.importorskip("torch")
    call = OP.sample(rng, L=12, dense=dense)
    length = call.pop("length")
    leaves = {name: torch.from_numpy(v.copy()).requires_grad_() for name, v in call.items()}
    x, rows = leaves["B_bar"], []
    for _ in range(length):
        rows.append(2 * (leaves["C"] * x).sum(-1).real)
        x = (leaves["A_bar"] @ x[..., None])[..., 0] if dense else leaves["A_bar"] * x
    dy = rng.standard_normal((length, 3))
    torch.stack(rows).backward(torch.from_numpy(dy))
    for name, g in ssm_kernel_vjp(dy, **call, length=length, pairs=True).items():
        want = leaves[name].grad.numpy()
        within(g, want, 12 * 64 * UNIT * abs(want).max())
