"""rg_lru against exact numbers, SciPy's lfilter, a statistical law, and RecurrentGemma."""

import numpy as np
import pytest
import scipy.signal

from refimpl.ops.recurrence.rg_lru import OPS, error_bound, rg_lru, rg_lru_vjp

(OP,) = OPS
FORMS = pytest.mark.parametrize("form", list(OP.forms))
UNIT = 2.0**-53


def within(got, want, bound):
    assert got.shape == want.shape
    assert np.all(abs(got - want) <= bound), f"{np.max(abs(got - want) / np.maximum(bound, 1e-300)):.3g} times the bound"


@FORMS
def test_worked_by_hand(form):
    """log a = log(3/5)/8, so that fully open gates give a_t = 3/5 and √(1 - 9/25) = 4/5, exact numbers."""
    x, one = np.array([[5.0], [10.0], [0.0], [20.0]]), np.ones((4, 1))
    i, log_a, first = np.array([[1.0], [0.5], [1.0], [0.25]]), np.log([0.6]) / 8, np.array([10.0])
    reset = np.array([False, False, False, True])
    h, state = OP.forms[form].function(x, one, i, log_a, reset=reset, state=first, return_state=True)
    want = np.array([[6 + 4], [6 + 4], [6 + 0], [5.0]])
    bound = error_bound(x, one, i, log_a, unit=UNIT, reset=reset, state=first)
    within(h, want, bound)
    within(state, want[-1], bound[-1])


@FORMS
@pytest.mark.parametrize("exponent", [8.0, 1])
def test_constant_gates_are_scipy_lfilter(form, exponent, rng):
    x, log_a, gate = rng.standard_normal((60, 2)), np.array([-0.1, -0.01]), 0.5
    r = np.full_like(x, gate)
    a = np.exp(exponent * gate * log_a)
    want = np.stack([scipy.signal.lfilter([np.sqrt(1 - a[c] ** 2)], [1, -a[c]], 0.3 * x[:, c]) for c in range(2)], axis=-1)
    within(
        OP.forms[form].function(x, r, np.full_like(x, 0.3), log_a, exponent=exponent),
        want,
        2 * error_bound(x, r, np.full_like(x, 0.3), log_a, unit=UNIT, exponent=exponent),
    )


def test_keeps_the_variance(rng):
    """Independent inputs of variance 1 give states of variance 1: the mean of n squares is within 5 √(2/n) of 1."""
    T, n = 200, 4000
    h = rg_lru(rng.standard_normal((T, n)), rng.uniform(0, 1, (T, n)), np.ones((T, n)), np.full(n, -0.05))
    assert abs(np.mean(h[-1] ** 2) - 1) < 5 * np.sqrt(2 / n)


def test_long_memory_needs_expm1():
    """1 - a² for log a_t = -2^-40: the root is 2^-19.5, of which 1 - a_t² in float64 has 13 bits."""
    h = rg_lru(np.ones((1, 1)), np.ones((1, 1)), np.ones((1, 1)), np.array([-(2.0**-40)]), exponent=1.0)
    w = 2.0**-39
    assert abs(h[0, 0] - np.sqrt(w - w**2 / 2)) <= 4 * UNIT * np.sqrt(w)


def test_gradient_worked_by_hand():
    """One step: h = a s + √(1-a²) i x at a = 3/5; dh/dw = a s - a²/√(1-a²) i x."""
    x, r, i, log_a, s = np.array([[5.0]]), np.ones((1, 1)), np.array([[0.5]]), np.log([0.6]) / 8, np.array([2.0])
    g = rg_lru_vjp(np.ones((1, 1)), x, r, i, log_a, state=s)
    slope = 0.6 * 2 - 0.36 / 0.8 * 2.5
    want = {"x": 0.4, "i": 4.0, "state": 0.6, "r": slope * np.log(0.6), "log_a": 8 * slope}
    for name, value in want.items():
        assert abs(g[name].item() - value) <= 16 * UNIT * max(1, abs(value)), name


def test_gradient_at_a_decay_of_one_is_finite():
    g = rg_lru_vjp(np.ones((3, 1)), np.ones((3, 1)), np.ones((3, 1)), np.ones((3, 1)), np.zeros(1), state=np.ones(1))
    assert all(np.isfinite(a).all() for a in g.values())


@pytest.mark.parametrize("exponent", [0, -1.0, True, "8"])
def test_exponent_must_be_positive(exponent):
    one = np.ones((2, 1))
    with pytest.raises(ValueError, match="rg_lru: exponent must be a positive number"):
        rg_lru(one, one, one, -np.ones(1), exponent=exponent)


@pytest.mark.peers
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_is_recurrent_gemma(dtype, rng):
    torch = pytest.importorskip("torch")
    gemma = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    config = gemma.RecurrentGemmaConfig(lru_width=6, num_attention_heads=2, hidden_size=6)
    layer = gemma.RecurrentGemmaRglru(config)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.tensor(rng.standard_normal(p.shape)))
    layer = layer.to(getattr(torch, dtype))
    x = torch.tensor(rng.standard_normal((2, 12, 6)), dtype=getattr(torch, dtype))
    positions = torch.tensor([[*range(12)], [*range(5), *range(7)]])  # the second row holds two segments
    blocks = x.reshape(2, 12, 2, 3)
    r, i = (
        torch.sigmoid(torch.einsum("bthi,hij->bthj", blocks, w) + b).reshape(2, 12, 6)
        for w, b in ((layer.recurrent_gate_weight, layer.recurrent_gate_bias), (layer.input_gate_weight, layer.input_gate_bias))
    )
    log_a = -torch.nn.functional.softplus(layer.recurrent_param)
    arrays = [a.detach().numpy() for a in (x, r, i, log_a)]
    reset = positions.numpy() == 0
    want = layer(x, positions).detach().numpy()
    unit = 2.0**-24  # its scan runs in float32 whatever the input
    bound = error_bound(*(a.astype(np.float64) for a in arrays), unit=unit, reset=reset)
    within(rg_lru(*arrays, reset=reset), want, bound + 8 * unit * abs(want))
