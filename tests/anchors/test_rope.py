"""RoPE against quarter turns, Python's complex numbers, decimals of large angles, and the Llama and GPT-J of transformers."""

import cmath
from decimal import Decimal, getcontext

import numpy as np
import pytest

import refimpl
from refimpl import rope, rope_vjp

OP = refimpl.OPS["rope"]
FORMS = pytest.mark.parametrize("form", list(OP.forms))
UNIT = {np.float32: 2.0**-24, np.float64: 2.0**-53}
QUARTER = np.array([np.pi / 2])


def within(got, want, bound):
    assert got.shape == want.shape
    assert np.all(abs(got - want) <= bound), f"{np.max(abs(got - want) / np.maximum(bound, 1e-300)):.3g} times the bound"


def bound(*args, **options):
    return OP.error_bound(*args, unit=2.0**-53, **options)


@FORMS
@pytest.mark.parametrize(
    ("position", "half", "interleaved"),
    [
        (0, [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
        (1, [-3, -4, 1, 2, 5], [-2, 1, -4, 3, 5]),
        (2, [-1, -2, -3, -4, 5], [-1, -2, -3, -4, 5]),
        (-1, [3, 4, -1, -2, 5], [2, -1, 4, -3, 5]),
    ],
)
def test_quarter_turns(form, position, half, interleaved):
    """Four features turn, by 90 degrees a position; the fifth stays."""
    x, quarters = np.array([[1.0, 2, 3, 4, 5]]), np.repeat(QUARTER, 2)
    for layout, want in (("half", half), ("interleaved", interleaved)):
        options = {"inv_freq": quarters, "layout": layout}
        got = OP.forms[form].function(x, [position], **options)
        within(got, np.array([want], float), bound(x, [position], **options))


@FORMS
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_is_a_product_of_complex_numbers(form, layout, dtype, rng):
    x, positions = rng.standard_normal((2, 5, 6)).astype(dtype), [0, 3, 4, 700, -2]
    want = np.zeros(x.shape)
    for b, t in np.ndindex(2, 5):
        for i in range(3):
            first, second = (i, i + 3) if layout == "half" else (2 * i, 2 * i + 1)
            z = complex(x[b, t, first], x[b, t, second]) * cmath.exp(1j * positions[t] * 10000.0 ** (-2 * i / 6))
            want[b, t, first], want[b, t, second] = z.real, z.imag
    got = OP.forms[form].function(x, np.array(positions), layout=layout)
    assert got.dtype == dtype
    wide = x.astype(np.float64)
    within(got, want, OP.error_bound(wide, positions, unit=UNIT[dtype], layout=layout) + bound(wide, positions, layout=layout))


def test_late_positions_against_decimals():
    """cos of a hundred thousand radians, by its series in sixty digits."""
    getcontext().prec = 80
    x, p = Decimal(100_000), 100_000
    two_pi = 2 * Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")
    x = x - two_pi * (x / two_pi).to_integral_value()
    cos = term = Decimal(1)
    for k in range(1, 60):
        term = -term * x * x / ((2 * k - 1) * (2 * k))
        cos += term
    got = rope(np.array([[1.0, 0.0]]), [p])
    within(got[:, 0], np.array([float(cos)]), bound(np.array([[1.0, 0.0]]), [p])[:, 0])
    single = rope(np.array([[1.0, 0.0]], np.float32), [p])
    assert abs(single[0, 0] - float(cos)) < 1e-6, "numbers and frequency are exact here: float32 loses nothing"


def test_only_the_first_dims_turn(rng):
    x = rng.standard_normal((4, 10))
    y = rope(x, range(4), dims=4)
    assert np.array_equal(y[:, 4:], x[:, 4:])
    within(y[:, :4], rope(x[:, :4], range(4)), bound(x[:, :4], range(4)))


def test_positions_of_sequences_broadcast_over_heads(rng):
    x, positions = rng.standard_normal((2, 3, 4, 6)), np.array([[0, 1, 2, 3], [5, 6, 0, 1]])
    y = rope(x, positions[:, None])
    for b, h in np.ndindex(2, 3):
        within(y[b, h], rope(x[b, h], positions[b]), 2 * bound(x[b, h], positions[b]))


def test_gradient_worked_by_hand():
    """One pair turned by 90 degrees: y = (-b, a)."""
    x, dy = np.array([[2.0, 3.0]]), np.array([[10.0, 100.0]])
    g = rope_vjp(dy, x, np.array([1.0]), inv_freq=QUARTER)
    np.testing.assert_allclose(g["x"], [[100, -10]], rtol=1e-14)
    dtheta = 10 * -2 + 100 * -3  # dy/dθ = (-a, -b) at 90 degrees
    np.testing.assert_allclose(g["positions"], [dtheta * np.pi / 2], rtol=1e-14)
    np.testing.assert_allclose(g["inv_freq"], [dtheta], rtol=1e-14)
    assert set(rope_vjp(dy, x, np.array([1]))) == {"x"}, "integers have no gradient, and no frequency was given"


@pytest.mark.parametrize(
    ("options", "d", "says"),
    [
        ({"dims": 3}, 6, "dims must be even"),
        ({"dims": 8}, 6, "at most d = 6"),
        ({"dims": -2}, 6, "at least 0"),
        ({"dims": 2.0}, 6, "dims must be an even integer"),
        ({}, 5, "dims must be even"),
        ({"inv_freq": np.ones(4)}, 6, "8 from inv_freq of 4 entries"),
        ({"inv_freq": np.ones(2), "dims": 6}, 6, "inv_freq must have dims / 2 entries"),
        ({"base": 0.0}, 6, "base must be a positive number"),
        ({"base": np.inf}, 6, "base must be a positive number"),
        ({"layout": "llama"}, 6, "layout must be one of 'half', 'interleaved'"),
    ],
)
def test_bad_options_are_refused(options, d, says):
    with pytest.raises((ValueError, TypeError), match=f"rope: .*{says}"):
        rope(np.ones((3, d)), np.arange(3), **options)


def test_complex_numbers_are_refused():
    with pytest.raises(TypeError, match="rope: x must be real"):
        rope(np.ones((3, 2), complex), np.arange(3))


def test_no_dims_is_the_identity(rng):
    x = rng.standard_normal((3, 5))
    assert np.array_equal(rope(x, range(3), dims=0), x)


@pytest.mark.peers
def test_is_llama_of_transformers(rng):
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k, positions = rng.standard_normal((2, 4, 9, 16)), rng.standard_normal((2, 2, 9, 16)), np.array([np.arange(9), np.arange(9) + 30])
    config = llama.LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    rotary = llama.LlamaRotaryEmbedding(config)
    rotary.inv_freq = rotary.inv_freq.double()  # its float32 values
    theta = torch.einsum("bt,f->btf", torch.tensor(positions).double(), rotary.inv_freq)
    cos, sin = (f(torch.cat([theta, theta], dim=-1)) for f in (torch.cos, torch.sin))
    want_q, want_k = llama.apply_rotary_pos_emb(torch.tensor(q), torch.tensor(k), cos, sin)
    for x, want in ((q, want_q), (k, want_k)):
        options = {"inv_freq": rotary.inv_freq.numpy()}
        within(rope(x, positions[:, None], **options), want.numpy(), 2 * bound(x, positions[:, None], **options))
    single = q.astype(np.float32)
    cos, sin = llama.LlamaRotaryEmbedding(config)(torch.tensor(single), torch.tensor(positions))
    want, _ = llama.apply_rotary_pos_emb(torch.tensor(single), torch.tensor(single), cos, sin)
    within(
        want.numpy(),
        rope(single.astype(np.float64), positions[:, None]),
        OP.error_bound(single.astype(np.float64), positions[:, None], unit=2.0**-24),
    )


@pytest.mark.peers
def test_is_gptj_of_transformers(rng):
    torch = pytest.importorskip("torch")
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    x, dims = rng.standard_normal((2, 9, 3, 16)).astype(np.float32), 8  # (batch, time, heads, features)
    table = gptj.create_sinusoidal_positions(64, dims)
    sin, cos = (part[None].repeat(2, 1, 1) for part in torch.split(table[:9], dims // 2, dim=-1))
    turned = gptj.apply_rotary_pos_emb(torch.tensor(x[..., :dims]), sin, cos).numpy()
    want = np.concatenate([turned, x[..., dims:]], axis=-1).transpose(0, 2, 1, 3)
    wide = x.astype(np.float64).transpose(0, 2, 1, 3)
    options = {"dims": dims, "layout": "interleaved"}
    within(want, rope(wide, np.arange(9), **options), OP.error_bound(wide, np.arange(9), unit=2.0**-24, **options))
