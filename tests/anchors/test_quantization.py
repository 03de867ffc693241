"""Quantisation against exact fractions, every value that can be packed, counted bytes, and BitNet's published formulas."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

import refimpl
from refimpl.ops.quantization import bitlinear as layer

FORMS = pytest.mark.parametrize("form", list(layer.OPS[0].forms))


def exact_ternary(w):
    values = [Fraction(v) for v in w.ravel()]
    scale = sum(map(abs, values), Fraction(0)) / len(values)
    return np.array([max(-1, min(1, round(v / scale))) if scale else 0 for v in values]).reshape(w.shape), scale


def exact_absmax(row, Q):
    values = [Fraction(v) for v in row]
    step = max(map(abs, values)) / Q
    return [round(v / step) if step else 0 for v in values], step  # Python rounds half to even


# -- quantisers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 8), (1, 40)])
def test_ternary_in_fractions(shape, rng):
    for _ in range(20):
        w = rng.standard_normal(shape)
        want, scale = exact_ternary(w)
        for form in refimpl.OPS["ternary_quantize"].forms.values():
            q, got = form.function(w)
            assert q.dtype == np.int8
            assert np.array_equal(q, want)
            assert abs(Fraction(float(got)) - scale) <= scale * (w.size + 2) * Fraction(1, 2**53)


def test_half_goes_to_even():
    w = np.array([[0.5, -0.5, 1.5, -1.5]])  # mean size 1
    assert refimpl.ternary_quantize(w)[0].tolist() == [[0, 0, 1, -1]]
    assert refimpl.absmax_quantize(np.array([2.0, 1.0, -1.0]), bits=2)[0].tolist() == [1, 0, 0]
    assert refimpl.absmax_quantize(np.array([2.0, 1.0, -1.0]))[0].tolist() == [127, 64, -64]


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 12, 16])
def test_absmax_in_fractions(bits, rng):
    x = rng.standard_normal((30, 17))
    q, scale = refimpl.absmax_quantize(x, bits=bits)
    assert q.dtype == (np.int8 if bits <= 8 else np.int16)
    for row, integers, step in zip(x, q, scale, strict=True):
        want, exact = exact_absmax(row, 2 ** (bits - 1) - 1)
        assert integers.tolist() == want
        assert abs(Fraction(float(step)) - exact) <= exact * Fraction(1, 2**52)


@pytest.mark.parametrize("bits", [1, 0, 17, 8.0, True, "8"])
def test_bits_are_checked(bits):
    with pytest.raises(ValueError, match=r"absmax_quantize.*bits"):
        refimpl.absmax_quantize(np.ones(3), bits=bits)
    with pytest.raises(ValueError, match=r"bitlinear.*activation_bits"):
        refimpl.bitlinear(np.ones((2, 3)), np.ones((3, 1)), activation_bits=bits)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 0)])
def test_nothing_is_quantised_to_nothing(shape):
    for quantise in (refimpl.ternary_quantize, refimpl.binary_quantize):
        q, scale = quantise(np.zeros(shape))
        assert q.shape == shape
        assert np.all(scale == 0)


@FORMS
@pytest.mark.parametrize("weights", ["ternary", "binary"])
def test_zeros_give_zeros(form, weights):
    f = layer.OPS[0].forms[form].function
    with np.errstate(all="raise"):
        assert not f(np.zeros((3, 4)), np.ones((4, 2)) * [[1.0, -1.0]], weights=weights).any()
        assert not f(np.ones((3, 4)), np.zeros((4, 2)), weights=weights).any()
        assert np.array_equal(f(np.zeros((3, 4)), np.zeros((4, 2)), np.ones(2), weights=weights), np.ones((3, 2)))


# -- the layer -------------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("bits", [8, 4])
def test_the_layer_in_fractions(form, bits, rng):
    x, w = rng.standard_normal((5, 7)), rng.standard_normal((7, 3))
    w_q, scale = exact_ternary(w)
    want = []
    for row in x:
        x_q, step = exact_absmax(row, 2 ** (bits - 1) - 1)
        want.append([float(sum(a * int(b) for a, b in zip(x_q, column, strict=True)) * step * scale) for column in w_q.T])
    got = layer.OPS[0].forms[form].function(x, w, activation_bits=bits)
    assert np.all(abs(got - want) <= layer.error_bound(x, w, activation_bits=bits, unit=2.0**-53) + 2.0**-53 * abs(np.array(want)))


def test_either_integer_is_right_at_a_boundary():
    """63.5 units are 64 here: the bound covers one less and one more, and not two."""
    x, w = np.array([[127.0, 63.5]]), np.array([[1.0], [-1.0]])
    limit = layer.error_bound(x, w, unit=2.0**-24)
    near = abs(np.array([127.0 - v for v in (62, 63, 64, 65, 66)]) - refimpl.bitlinear(x, w)) <= limit
    assert near.ravel().tolist() == [False, True, True, True, False]


# -- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "count"), [("2bit", 4), ("base3", 5)])
def test_every_value_is_packed_and_unpacked(layout, count):
    """All bytes' worth of weights, and all lengths of a rest."""
    every = np.array(list(itertools.product([-1, 0, 1], repeat=count)), np.int8)
    packed = refimpl.pack_ternary(every, layout=layout)
    assert packed.shape == (3**count, 1)
    assert len(np.unique(packed)) == 3**count
    assert np.array_equal(refimpl.unpack_ternary(packed, count, layout=layout), every)
    for n in range(13):
        q = np.resize(every, (2, 3, n))
        packed = refimpl.pack_ternary(q, layout=layout)
        assert packed.shape == (2, 3, -(-n // count))
        assert np.array_equal(refimpl.unpack_ternary(packed, n, layout=layout), q)


def test_bytes_by_hand():
    assert refimpl.pack_ternary(np.array([1, 0, -1, 1])).tolist() == [0b10_00_01_10]
    assert refimpl.pack_ternary(np.array([1, 0, -1, 1, 1]), layout="base3").tolist() == [2 + 3 * 1 + 0 + 27 * 2 + 81 * 2]


@pytest.mark.parametrize("bad", [np.array([2]), np.array([-2, 0]), np.array(1), np.array([0.5])])
def test_what_is_not_ternary_is_not_packed(bad):
    with pytest.raises((ValueError, TypeError), match=r"pack_ternary.*q"):
        refimpl.pack_ternary(bad)


@pytest.mark.parametrize("length", [8, 3.0, 13, -1])
def test_a_length_must_fit_the_bytes(length):
    with pytest.raises(ValueError, match=r"unpack_ternary.*length"):
        refimpl.unpack_ternary(np.zeros(3, np.uint8), length)


@pytest.mark.parametrize(("weights", "layout", "least"), [("ternary", "2bit", 2.0), ("ternary", "base3", 1.6), ("binary", "base3", 1.0)])
def test_bytes_are_counted(weights, layout, least, rng):
    w = rng.standard_normal((1000, 64)).astype(np.float32)
    packed = refimpl.pack_weights(w, weights=weights, layout=layout)
    stored = len(packed.data.tobytes()) + len(packed.scale.tobytes())
    assert packed.nbytes == stored
    assert packed.bits_per_weight == 8 * stored / w.size
    assert least <= packed.bits_per_weight < least + 0.01
    q, _ = (refimpl.ternary_quantize if weights == "ternary" else refimpl.binary_quantize)(w)
    assert np.array_equal(packed.unpack(), q)


@pytest.mark.parametrize("weights", ["ternary", "binary"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_packed_layer_is_the_layer(weights, dtype, rng):
    call = layer.OPS[0].sample(rng, c=23, e=6, batch=(2, 4))
    call = {n: v.astype(dtype) for n, v in call.items()}
    packed = refimpl.pack_weights(call["w"], weights=weights)
    got = refimpl.bitlinear_packed(call["x"], packed, call["bias"])
    assert got.dtype == dtype
    limit = layer.error_bound(**{n: v.astype(np.float64) for n, v in call.items()}, weights=weights, unit=np.finfo(dtype).eps / 2)
    assert np.all(abs(got - refimpl.bitlinear(**call, weights=weights)) <= 2 * limit)


# -- published formulas ----------------------------------------------------------------------------------------------


@pytest.mark.peers
def test_the_gradient_is_that_of_detached_rounding(rng):
    """x + (q(x) - x).detach(), as BitNet's training notes have it, by torch's autograd."""
    torch = pytest.importorskip("torch")
    call = layer.OPS[0].sample(rng, c=16, e=8)
    x, w = (torch.from_numpy(call[n]).requires_grad_() for n in ("x", "w"))
    scale = 127.0 / x.abs().max(dim=-1, keepdim=True).values
    x_hat = (x * scale).round().clamp(-128, 127) / scale
    mean = w.abs().mean()
    w_hat = (w / mean).round().clamp(-1, 1) * mean
    y = (x + (x_hat - x).detach()) @ (w + (w_hat - w).detach())
    plain = {n: call[n] for n in ("x", "w")}
    assert np.all(abs(y.detach().numpy() - refimpl.bitlinear(**plain)) <= 2 * layer.error_bound(**plain, unit=2.0**-53))
    dy = rng.standard_normal(y.shape)
    y.backward(torch.from_numpy(dy))
    ours = refimpl.bitlinear_vjp(dy, **plain)
    for name, theirs in (("x", x.grad.numpy()), ("w", w.grad.numpy())):
        assert np.max(abs(ours[name] - theirs)) <= 2.0**-46 * np.max(abs(theirs))


@pytest.mark.peers
def test_is_transformers_bitnet(rng):
    torch = pytest.importorskip("torch")
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    call = layer.OPS[0].sample(rng, c=32, e=8)
    inputs = torch.from_numpy(call["x"])
    x_hat = bitnet.ActQuant.apply(inputs).numpy()
    w_hat = bitnet.WeightQuant.apply(torch.from_numpy(call["w"])).numpy()
    plain = {n: call[n] for n in ("x", "w")}
    limit = layer.error_bound(**plain, unit=2.0**-23)  # it computes in float32
    assert np.all(abs(x_hat @ w_hat - refimpl.bitlinear(**plain)) <= limit)
