"""hyena_filter against numbers worked by hand, trigonometric identities, flint's intervals, and torch's layers in the published arrangement."""

import math

import numpy as np
import pytest

from refimpl.ops.recurrence.hyena_filter import OPS, error_bound, hyena_filter, hyena_filter_vjp, hyena_positions

(OP,) = OPS
UNIT = 2.0**-53


def within(got, want, bound):
    assert got.shape == want.shape
    assert np.all(abs(got - want) <= bound), f"{np.max(abs(got - want) / np.maximum(bound, 1e-300)):.3g} times the bound"


def test_a_single_wave_under_a_window():
    """sin(ω (w t + b)) e^(-d t) + the floor's share, from `math`."""
    t = np.linspace(0, 1, 5)
    call = {"z": t[:, None], "t": t, "w_in": np.array([[3.0]]), "b_in": np.array([0.5]), "w_inner": np.zeros((0, 1, 1))}
    call |= {
        "b_inner": np.zeros((0, 1)),
        "w_out": np.array([[[2.0]], [[-1.0]]]),
        "frequency": np.array([4.0]),
        "decay": np.array([[1.0], [2.0]]),
    }
    got = hyena_filter(**call, shift=0.25)
    for k, time in enumerate(t):
        wave = math.sin(4 * (3 * time + 0.5))
        for n, (gain, rate) in enumerate([(2, 1), (-1, 2)]):
            want = gain * wave * (math.exp(-rate * time) + 0.25)
            assert abs(got[n, k, 0] - want) <= 2 * error_bound(**call, shift=0.25, unit=UNIT)[n, k, 0]


def test_two_layers_against_intervals(rng):
    """Entry by entry in flint's real balls of 200 bits, from their own sine and exponential."""
    flint = pytest.importorskip("flint")
    call = OP.sample(rng, K=3, p=3, f=4, M=1, N=2, c=2)
    got, bound = hyena_filter(**call, shift=0.1), error_bound(**call, shift=0.1, unit=UNIT)
    exact = lambda v: [exact(x) for x in v] if np.ndim(v) else flint.arb(float(v))
    dot = lambda x, y: sum((a * b for a, b in zip(x, y, strict=True)), flint.arb(0))
    before, flint.ctx.prec = flint.ctx.prec, 200
    try:
        for k in range(3):
            h = exact(call["z"][k])
            for w, b in [(call["w_in"], call["b_in"]), (call["w_inner"][0], call["b_inner"][0])]:
                h = [(flint.arb(float(call["frequency"][j])) * (dot(h, exact(w[:, j])) + float(b[j]))).sin() for j in range(4)]
            for n, c in np.ndindex(2, 2):
                window = (-flint.arb(float(call["decay"][n, c])) * float(call["t"][k])).exp() + flint.arb(0.1)
                off = abs(flint.arb(float(got[n, k, c])) - dot(h, exact(call["w_out"][n, :, c])) * window)
                assert off <= float(bound[n, k, c])
    finally:
        flint.ctx.prec = before


def test_positions_are_roots_of_unity():
    """Frequency 1 over a horizon of 8: eighth turns, clockwise; the last column of each half is the fastest."""
    z, t = hyena_positions(8, bands=2)
    half = math.sqrt(0.5)
    np.testing.assert_allclose(z[:3, 2], [1, half, 0], atol=1e-15)
    np.testing.assert_allclose(z[:3, 4], [0, -half, -1], atol=1e-15)
    np.testing.assert_allclose(t, np.arange(8) / 7, rtol=1e-15)
    np.testing.assert_allclose(z[:, [1, 2]] ** 2 + z[:, [3, 4]] ** 2, 1, rtol=1e-14)


def test_positions_of_a_longer_model():
    z, t = hyena_positions(5, 3, horizon=20)
    whole, times = hyena_positions(20, 3)
    np.testing.assert_array_equal(z, whole[:5])
    np.testing.assert_array_equal(t, times[:5])
    assert hyena_positions(0, 3)[0].shape == (0, 7)
    np.testing.assert_array_equal(hyena_positions(1, 1)[1], [0])


@pytest.mark.parametrize(
    ("length", "bands", "horizon", "word"),
    [(-1, 2, None, "length"), (3, 0, None, "bands"), (3, 2.0, None, "bands"), (3, 2, "8", "horizon")],
)
def test_positions_refuse(length, bands, horizon, word):
    with pytest.raises(ValueError, match=f"hyena_positions: {word} must be an integer"):
        hyena_positions(length, bands, horizon=horizon)


def test_published_rates_fade_to_a_hundredth():
    """Rates are such that the slowest channel falls to 1 % at t = 1.5 and the fastest at t = 0.3."""
    decay = np.log(100) * np.linspace(1 / 1.5, 1 / 0.3, 4)
    t = np.array([0.0, 0.3, 1.5])
    flat = {"z": t[:, None], "t": t, "w_in": np.zeros((1, 1)), "b_in": np.array([np.pi / 2]), "w_inner": np.zeros((0, 1, 1))}
    got = hyena_filter(**flat, b_inner=np.zeros((0, 1)), w_out=np.ones((1, 1, 4)), frequency=np.ones(1), decay=decay)
    np.testing.assert_allclose(got[0, 0], 1, rtol=1e-15)
    np.testing.assert_allclose([got[0, 1, 3], got[0, 2, 0]], 0.01, rtol=1e-13)


@pytest.mark.peers
def test_is_torch_linears_and_sines(rng):
    """Linear, sine, Linear, sine, Linear without bias, under an exponential modulation; and torch's gradients."""
    torch = pytest.importorskip("torch")
    call = OP.sample(rng, K=21, p=5, f=8, M=1, N=2, c=3)
    dy = rng.standard_normal((2, 21, 3))

    class Sine(torch.nn.Module):
        def __init__(self, w):
            super().__init__()
            self.frequency = torch.nn.Parameter(w)

        def forward(self, x):
            return torch.sin(self.frequency * x)

    def linear(w, b=None):
        layer = torch.nn.Linear(*w.shape, bias=b is not None, dtype=torch.float64)
        layer.weight.data = torch.from_numpy(w.T.copy())
        if b is not None:
            layer.bias.data = torch.from_numpy(b.copy())
        return layer

    sine = Sine(torch.from_numpy(call["frequency"].copy()))
    first, second = linear(call["w_in"], call["b_in"]), linear(call["w_inner"][0], call["b_inner"][0])
    last = linear(np.moveaxis(call["w_out"], 0, 1).reshape(8, 6))
    z, t, decay = (torch.from_numpy(call[n].copy()).requires_grad_() for n in ("z", "t", "decay"))
    h = torch.nn.Sequential(first, sine, second, sine, last)(z).reshape(21, 2, 3).transpose(0, 1)
    kernels = h * (torch.exp(-t[:, None] * decay[:, None]) + 0.05)
    within(hyena_filter(**call, shift=0.05), kernels.detach().numpy(), 2 * error_bound(**call, shift=0.05, unit=UNIT))
    kernels.backward(torch.from_numpy(dy))
    g = hyena_filter_vjp(dy, **call, shift=0.05)
    want = {
        "z": z.grad,
        "t": t.grad,
        "decay": decay.grad,
        "frequency": sine.frequency.grad,
        "w_in": first.weight.grad.T,
        "b_in": first.bias.grad,
    }
    want |= {
        "w_inner": second.weight.grad.T[None],
        "b_inner": second.bias.grad[None],
        "w_out": last.weight.grad.T.reshape(8, 2, 3).transpose(0, 1),
    }
    assert g.keys() == want.keys()
    for name in g:
        assert np.max(abs(g[name] - want[name].numpy())) <= 2.0**-42 * np.max(abs(want[name].numpy())), name
