"""hyena against numbers worked by hand, SciPy's filters, exact fractions, and the order in which the published code gates."""

from fractions import Fraction

import numpy as np
import pytest
import scipy.signal

from refimpl.ops.recurrence.hyena import OPS, error_bound, hyena, hyena_vjp

(OP,) = OPS
FORMS = pytest.mark.parametrize("form", list(OP.forms))
UNIT = 2.0**-53


def within(got, want, bound):
    assert got.shape == want.shape
    assert np.all(abs(got - want) <= bound), f"{np.max(abs(got - want) / np.maximum(bound, 1e-300)):.3g} times the bound"


def column(*numbers):
    return np.array(numbers, dtype=float)[:, None]


def by_hand():
    """z_1 = (1, 2, 3); filtered (2, 5, 8), gated (2, 0, 16); filtered (-2, 6, -16), gated (-10, 42, 16)."""
    return {
        "v": column(1, 2, 3),
        "gates": (column(1, 0, 2), column(5, 7, -1)),
        "kernels": np.stack([column(1, 1), column(0, 3)]),
        "skips": np.array([[1.0], [-1.0]]),
    }


@FORMS
def test_worked_by_hand(form):
    call = by_hand()
    within(OP.forms[form].function(**call), column(-10, 42, 16), error_bound(**call, unit=UNIT))


def test_gradient_worked_by_hand():
    g = hyena_vjp(np.ones((3, 1)), **by_hand())
    np.testing.assert_array_equal(g["gates"][1], column(-2, 6, -16))
    np.testing.assert_array_equal(g["gates"][0], column(32, -50, 8))
    np.testing.assert_array_equal(g["v"], column(32, 2, 4))
    np.testing.assert_array_equal(g["kernels"], np.stack([column(22, 4), column(-6, 14)]))
    np.testing.assert_array_equal(g["skips"], [[22], [-6]])


@FORMS
@pytest.mark.parametrize("N", [1, 2, 3])
def test_is_scipy_lfilter_and_products(form, N, rng):
    call = OP.sample(rng, T=70, K=40, c=2, N=N)
    want = call["v"]
    for gate, kernel, skip in zip(call["gates"], call["kernels"], call["skips"], strict=True):
        filters = kernel + skip * (np.arange(40) == 0)[:, None]
        want = gate * np.stack([scipy.signal.lfilter(filters[:, i], [1.0], want[:, i]) for i in range(2)], axis=-1)
    within(OP.forms[form].function(**call), want, 2 * error_bound(**call, unit=UNIT))


@FORMS
def test_published_order_of_gating(form, rng):
    """The published code multiplies by the last projection, then convolves by transforms and gates, N - 1 times."""
    x = rng.standard_normal((4, 2, 31, 3))  # three gates and v, as slices of one projection
    filters, bias = rng.standard_normal((2, 31, 3)), rng.standard_normal((2, 3))
    *gates, v = x
    z = v * gates[-1]
    for i, gate in enumerate(reversed(gates[:-1])):
        spectrum = np.fft.rfft(z, n=62, axis=1) * np.fft.rfft(filters[i], n=62, axis=0)
        z = (np.fft.irfft(spectrum, n=62, axis=1)[:, :31] + bias[i] * z) * gate
    call = {"v": v * gates[-1], "gates": tuple(reversed(gates[:-1])), "kernels": filters, "skips": bias}
    within(OP.forms[form].function(**call), z, 2 * error_bound(**call, unit=UNIT))


@FORMS
def test_no_gates_and_gates_of_one(form, rng):
    v = rng.standard_normal((11, 2))
    nothing = OP.forms[form].function(v, (), np.zeros((0, 4, 2)))
    np.testing.assert_array_equal(nothing, v)
    kernel = rng.standard_normal((1, 7, 2))
    want = scipy.signal.fftconvolve(v, kernel[0], axes=0)[:11]
    within(OP.forms[form].function(v, (np.ones((11, 2)),), kernel), want, 2 * error_bound(v, (np.ones((11, 2)),), kernel, unit=UNIT))


def test_against_exact_fractions(rng):
    call = OP.sample(rng, T=9, K=5, c=1, N=3)
    z = [Fraction(x) for x in call["v"][:, 0]]
    for gate, kernel, skip in zip(call["gates"], call["kernels"], call["skips"], strict=True):
        filtered = [sum((Fraction(kernel[s, 0]) * z[t - s] for s in range(min(t + 1, 5))), Fraction(skip[0]) * z[t]) for t in range(9)]
        z = [Fraction(g) * f for g, f in zip(gate[:, 0], filtered, strict=True)]
    got, bound = hyena(**call), error_bound(**call, unit=UNIT)
    for t, value in enumerate(z):
        assert abs(Fraction(got[t, 0]) - value) <= Fraction(bound[t, 0])


def test_its_matrix_is_lower_triangular_and_made_of_toeplitz_factors(rng):
    """The answers to unit impulses, column by column, are the product of equation (2), which SciPy's Toeplitz matrices give."""
    call = OP.sample(rng, T=8, K=5, c=1, N=2)
    columns = [hyena(**call | {"v": np.eye(8)[:, s : s + 1]})[:, 0] for s in range(8)]
    S = [
        scipy.linalg.toeplitz(np.r_[kernel[:, 0], np.zeros(3)], np.zeros(8)) + skip * np.eye(8)
        for kernel, skip in zip(call["kernels"], call["skips"], strict=True)
    ]
    one, two = (np.diag(gate[:, 0]) for gate in call["gates"])
    H = np.stack(columns, axis=-1)
    np.testing.assert_array_equal(np.triu(H, 1), 0)
    limit = np.stack([error_bound(**call | {"v": np.eye(8)[:, s : s + 1]}, unit=UNIT)[:, 0] for s in range(8)], axis=-1)
    within(H, two @ S[1] @ one @ S[0], 4 * limit + UNIT * 64 * abs(two) @ abs(S[1]) @ abs(one) @ abs(S[0]))


def test_work_of_the_transforms_grows_as_t_log_t():
    costs = {form: [OP.forms[form].cost(T=T, K=T, c=1, N=2).work for T in (2**10, 2**14, 2**18)] for form in OP.forms}
    per = [w / (T * np.log2(T)) for w, T in zip(costs["fft"], (2**10, 2**14, 2**18), strict=True)]
    assert max(per) / min(per) < 1.2
    assert costs["direct"][1] > 50 * costs["fft"][1]
    assert costs["matrix"][1] > 1000 * costs["direct"][1]


@pytest.mark.peers
def test_gradient_is_torch_autograd(rng):
    torch = pytest.importorskip("torch")
    call = OP.sample(rng, T=17, K=9, N=3, batch=(2,))
    dy = rng.standard_normal((2, 17, 3))
    leaf = lambda v: torch.from_numpy(v.copy()).requires_grad_()
    v, gates, kernels, skips = leaf(call["v"]), [leaf(g) for g in call["gates"]], leaf(call["kernels"]), leaf(call["skips"])
    z = v
    for i, gate in enumerate(gates):
        padded = torch.nn.functional.pad(z.transpose(1, 2), (8, 0))
        filtered = torch.nn.functional.conv1d(padded, kernels[i].T[:, None].flip(-1), groups=3).transpose(1, 2)
        z = gate * (filtered + skips[i] * z)
    within(hyena(**call), z.detach().numpy(), 2 * error_bound(**call, unit=UNIT))
    z.backward(torch.from_numpy(dy))
    g = hyena_vjp(dy, **call)
    for got, want in zip([g["v"], *g["gates"], g["kernels"], g["skips"]], [v, *gates, kernels, skips], strict=True):
        want = want.grad.numpy()
        assert np.max(abs(got - want)) <= 2.0**-42 * np.max(abs(want))
