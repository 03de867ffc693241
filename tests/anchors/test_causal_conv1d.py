"""causal_conv1d against SciPy's lfilter and correlate, numbers worked by hand, and torch."""

import numpy as np
import pytest
import scipy.signal
import scipy.special

from refimpl.ops.recurrence.causal_conv1d import OPS, causal_conv1d, causal_conv1d_vjp, error_bound

(OP,) = OPS
FORMS = pytest.mark.parametrize("form", list(OP.forms))
UNIT = 2.0**-53


def within(got, want, bound):
    assert got.shape == want.shape
    assert np.all(abs(got - want) <= bound), f"{np.max(abs(got - want) / np.maximum(bound, 1e-300)):.3g} times the bound"


@FORMS
def test_worked_by_hand(form):
    x, weight, bias = np.array([[1.0], [2.0], [4.0]]), np.array([[100.0, 10.0, 1.0]]), np.array([0.5])
    before = np.array([[7.0], [8.0]])  # 7 is the older
    y, state = OP.forms[form].function(x, weight, bias, state=before, return_state=True)
    np.testing.assert_array_equal(y[:, 0], [700 + 80 + 1.5, 800 + 10 + 2.5, 100 + 20 + 4.5])
    np.testing.assert_array_equal(state[:, 0], [2, 4])


@FORMS
def test_final_state_of_a_sequence_shorter_than_the_filter(form):
    before = np.array([[1.0], [2.0], [3.0]])
    _, state = OP.forms[form].function(np.array([[9.0]]), np.ones((1, 4)), state=before, return_state=True)
    np.testing.assert_array_equal(state[:, 0], [2, 3, 9])
    _, state = OP.forms[form].function(np.zeros((0, 1)), np.ones((1, 4)), state=before, return_state=True)
    np.testing.assert_array_equal(state, before)
    _, state = OP.forms[form].function(np.array([[9.0]]), np.ones((1, 1)), return_state=True)
    assert state.shape == (0, 1)


@FORMS
@pytest.mark.parametrize("W", [1, 2, 4, 9])
def test_is_scipy_lfilter(form, W, rng):
    """lfilter's coefficients stand newest first."""
    x, weight = rng.standard_normal((30, 3)), rng.standard_normal((3, W))
    want = np.stack([scipy.signal.lfilter(weight[c, ::-1], [1.0], x[:, c]) for c in range(3)], axis=-1)
    within(OP.forms[form].function(x, weight), want, 2 * error_bound(x, weight, unit=UNIT))


@FORMS
def test_silu_is_x_times_expit(form, rng):
    x, weight, bias = 5 * rng.standard_normal((20, 2)), rng.standard_normal((2, 3)), rng.standard_normal(2)
    z = np.stack([scipy.signal.correlate(np.pad(x[:, c], (2, 0)), weight[c], "valid") for c in range(2)], axis=-1) + bias
    want = z * scipy.special.expit(z)
    within(
        OP.forms[form].function(x, weight, bias, activation="silu"), want, 2 * error_bound(x, weight, bias, unit=UNIT, activation="silu")
    )


def test_gradient_worked_by_hand():
    x, weight = np.array([[2.0], [3.0]]), np.array([[10.0, 1.0]])
    g = causal_conv1d_vjp(np.array([[1.0], [5.0]]), x, weight, np.zeros(1), state=np.array([[7.0]]), dstate=np.array([[100.0]]))
    np.testing.assert_array_equal(g["x"][:, 0], [1 + 5 * 10, 5 + 100])
    np.testing.assert_array_equal(g["state"][:, 0], [10])
    np.testing.assert_array_equal(g["weight"], [[7 * 1 + 2 * 5, 2 * 1 + 3 * 5]])
    np.testing.assert_array_equal(g["bias"], [6])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="causal_conv1d: activation must be one of None, 'silu', got 'swish'"):
        causal_conv1d(np.ones((3, 2)), np.ones((2, 2)), activation="swish")
    with pytest.raises(ValueError, match="causal_conv1d: W at least 1 is required"):
        causal_conv1d(np.ones((3, 2)), np.ones((2, 0)))
    with pytest.raises(ValueError, match="causal_conv1d: state must have shape"):
        causal_conv1d(np.ones((3, 2)), np.ones((2, 4)), state=np.ones((4, 2)))
    with pytest.raises(ValueError, match="'silu' needs real arrays"):
        causal_conv1d(np.ones((3, 2)) * 1j, np.ones((2, 4)), activation="silu")


@pytest.mark.peers
@pytest.mark.parametrize("activation", [None, "silu"])
def test_is_torch_conv1d_and_its_gradient(activation, rng):
    torch = pytest.importorskip("torch")
    x, weight, bias, dy = (
        rng.standard_normal((2, 11, 3)),
        rng.standard_normal((3, 4)),
        rng.standard_normal(3),
        rng.standard_normal((2, 11, 3)),
    )
    leaves = [torch.tensor(a, requires_grad=True) for a in (x, weight, bias)]
    y = torch.nn.functional.conv1d(leaves[0].transpose(1, 2), leaves[1][:, None], leaves[2], padding=3, groups=3)[..., :11].transpose(1, 2)
    y = torch.nn.functional.silu(y) if activation else y
    bound = 2 * error_bound(x, weight, bias, unit=UNIT, activation=activation)
    within(causal_conv1d(x, weight, bias, activation=activation), y.detach().numpy(), bound)
    y.backward(torch.tensor(dy))
    g = causal_conv1d_vjp(dy, x, weight, bias, activation=activation)
    for name, leaf in zip(("x", "weight", "bias"), leaves, strict=True):
        within(g[name], leaf.grad.numpy(), 256 * UNIT * abs(g[name]).max())
