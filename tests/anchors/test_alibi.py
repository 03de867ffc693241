"""ALiBi against the slopes printed in the paper, rationals, and the Bloom of transformers."""

from fractions import Fraction

import numpy as np
import pytest

import refimpl
from refimpl import alibi_bias, alibi_slopes, attention


def test_slopes_of_the_paper():
    """Section 3: for 8 heads 1/2, 1/4 ... 1/256; for 16 the sequence from 2^-0.5 by 2^-0.5."""
    assert alibi_slopes(8).tolist() == [1 / 2**h for h in range(1, 9)]
    assert np.array_equal(alibi_slopes(16)[1::2], alibi_slopes(8))
    np.testing.assert_array_max_ulp(alibi_slopes(16)[::2], [2 ** (h + 0.5) / 2 ** (2 * h + 1) for h in range(8)], 1)
    assert alibi_slopes(1).tolist() == [2**-8]
    assert alibi_slopes(2).tolist() == [2**-4, 2**-8]


@pytest.mark.parametrize(
    ("heads", "want"),
    [
        (3, ["1/16", "1/256", "1/4"]),
        (6, ["1/4", "1/16", "1/64", "1/256", "1/2", "1/8"]),
        (7, ["1/4", "1/16", "1/64", "1/256", "1/2", "1/8", "1/32"]),
    ],
)
def test_slopes_between_powers_of_two(heads, want):
    assert [Fraction(s) for s in alibi_slopes(heads)] == [Fraction(w) for w in want]


@pytest.mark.parametrize(("n", "m", "offset"), [(5, 5, None), (1, 7, None), (3, 6, 0), (4, 2, None), (0, 3, None)])
def test_bias_is_slope_times_distance(n, m, offset):
    got = alibi_bias(8, n, m, offset=offset)
    assert got.shape == (8, n, m)
    for h, i, j in np.ndindex(8, n, m):
        assert Fraction(got[h, i, j]) == -Fraction(1, 2 ** (h + 1)) * abs(i + (m - n if offset is None else offset) - j)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: alibi_bias(0, 2, 2), "alibi_bias: heads must be an integer of at least 1, got 0"),
        (lambda: alibi_bias(2.0, 2, 2), "alibi_bias: heads must be an integer"),
        (lambda: alibi_bias(2, -1, 2), "alibi_bias: n must be an integer of at least 0, got -1"),
        (lambda: alibi_bias(2, 1, True), "alibi_bias: m must be an integer"),
        (lambda: alibi_bias(2, 1, 1, offset=0.5), "alibi_bias: offset must be an integer, got 0.5"),
        (lambda: alibi_slopes("8"), "alibi_slopes: heads must be an integer"),
    ],
)
def test_bad_input_is_refused_by_name(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call()


@pytest.mark.peers
@pytest.mark.parametrize("heads", [1, 4, 5, 12, 16])
def test_is_bloom_of_transformers(heads, rng):
    """Bloom's bias is slope·j: attention with it equals ours, under the causal mask."""
    torch = pytest.importorskip("torch")
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    n = 9
    theirs = bloom.build_alibi_tensor(torch.ones(1, n), heads, torch.float64).numpy().reshape(heads, 1, n)
    slopes = alibi_slopes(heads)[:, None, None]
    unit = (heads + 2) * 2.0**-24  # they take powers, up to the count of heads, of a base in float32
    np.testing.assert_allclose(theirs, slopes * np.arange(n), rtol=unit)
    q, k, v = rng.standard_normal((3, heads, n, 4))
    want = attention(q, k, v, causal=True, bias=theirs)
    bias = alibi_bias(heads, n, n)
    limit = refimpl.OPS["attention"].error_bound(q, k, v, causal=True, bias=bias, unit=unit)
    assert np.all(abs(attention(q, k, v, causal=True, bias=bias) - want) <= limit)
