"""The cache against attention to everything, to a window, and within its own bounds."""

import numpy as np
import pytest

import refimpl


def fill(cache, k, v, step=1):
    for t in range(0, k.shape[-2], step):
        cache.append(k[..., t : t + step, :], v[..., t : t + step, :])
    return cache


@pytest.fixture
def problem(rng):
    T = 75
    return [rng.standard_normal(s) for s in ((2, 3, T, 8), (2, 3, T, 8), (2, 3, T, 6))]


@pytest.mark.parametrize("step", [1, 4, 75])
def test_growing_keeps_everything(problem, step):
    _, k, v = problem
    for got, want in zip(fill(refimpl.KVCache(), k, v, step).view(), (k, v), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("window", [1, 5, 40, 200])
def test_rolling_is_windowed_attention_at_every_step(problem, window):
    q, k, v = problem
    whole = refimpl.attention(q, k, v, causal=True, window=(window - 1, 0))
    limit = 2 * refimpl.OPS["attention"].error_bound(q, k, v, unit=2.0**-53, causal=True, window=(window - 1, 0))
    cache = refimpl.KVCache(window=window)
    for t in range(k.shape[-2]):
        cache.append(k[..., t : t + 1, :], v[..., t : t + 1, :])
        keys, values = cache.view()
        assert keys.shape[-2] == min(window, t + 1) and cache.start == max(0, t + 1 - window)
        now = refimpl.attention(q[..., t : t + 1, :], keys, values)
        assert np.all(abs(now - whole[..., t : t + 1, :]) <= limit[..., t : t + 1, :])


def test_rolling_takes_constant_memory(problem):
    _, k, v = problem
    sizes = []
    cache = refimpl.KVCache(window=10)
    for _ in range(4):
        sizes.append(fill(cache, k, v).bytes())
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("window", [None, 37])
def test_quantised_entries_and_outputs_within_their_bounds(problem, rng, bits, window, dtype):
    q, k, v = problem
    k = (k + 30 * (np.arange(8) == 3)).astype(dtype)  # a channel that is large throughout
    v = v.astype(dtype)
    cache = fill(refimpl.KVCache(bits=bits, window=window, group=16), k, v, 3)
    keys, values = cache.view()
    exact = [x[..., cache.start :, :].astype(np.float64) for x in (k, v)]
    for got, want, limit in zip((keys, values), exact, cache.entry_error(), strict=True):
        assert got.dtype == dtype and np.all(abs(got - want) <= limit)
    o = refimpl.attention(q, *(x.astype(np.float64) for x in (keys, values)))
    moved = abs(o - refimpl.attention(q, *exact))
    assert np.all(moved <= cache.output_error(q) + 1e3 * np.finfo(float).eps * 50)  # and the rounding of two attentions
    assert moved.max() > 0


def test_the_bound_is_near_the_error(problem):
    """Not vacuous: half a step is reached, and the output's bound is within a factor of a hundred of what happens."""
    q, k, v = problem
    cache = fill(refimpl.KVCache(bits=4, group=25), k, v)
    keys, values = cache.view()
    limit = cache.entry_error()[0]
    assert np.max(abs(keys - k)[limit > 0] / limit[limit > 0]) > 0.95
    moved = abs(refimpl.attention(q, keys, values) - refimpl.attention(q, k, v))
    assert np.median(cache.output_error(q) / np.maximum(moved, 1e-12)) < 100


def test_keys_by_channel_are_closer_than_by_token(problem):
    """Why groups of keys run along tokens: one large channel does not coarsen the others."""
    _, k, v = problem
    k = k + 30 * (np.arange(8) == 3)
    error = [abs(fill(refimpl.KVCache(bits=4, group=25), *pair).view()[i] - k).max() for pair, i in (((k, v), 0), ((v, k), 1))]
    assert error[0] < error[1] / 3


def test_bytes_are_counted():
    """float32, group 32: a code of b bits and 8 bytes per group of 32 entries."""
    k = np.random.default_rng(0).standard_normal((1, 64, 32)).astype(np.float32)
    full = fill(refimpl.KVCache(), k, k, 64).bytes()
    assert full == 2 * 64 * 32 * 4
    for bits in (8, 4):
        assert fill(refimpl.KVCache(bits=bits), k, k, 64).bytes() == 2 * 64 * 32 * bits // 8 + 2 * 64 * 8


def test_constant_entries_are_exact():
    k = np.full((1, 40, 4), 3.25)
    keys, values = fill(refimpl.KVCache(bits=4, group=8), k, -k, 40).view()
    np.testing.assert_array_equal(keys, k)
    np.testing.assert_array_equal(values, -k)


@pytest.mark.parametrize("options, message", [
    ({"bits": 3}, "bits must be 8, 4 or None, got 3"),
    ({"window": 0}, "window must be an integer of at least 1, got 0"),
    ({"group": 0}, "group"),
])  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        refimpl.KVCache(**options)


def test_bad_shapes():
    cache = refimpl.KVCache()
    with pytest.raises(ValueError, match="nothing was appended"):
        cache.view()
    with pytest.raises(ValueError, match="k and v must have shapes"):
        cache.append(np.zeros((2, 3, 4)), np.zeros((2, 2, 4)))
    cache.append(np.zeros((2, 3, 4)), np.zeros((2, 3, 5)))
    with pytest.raises(ValueError, match="k must continue shape"):
        cache.append(np.zeros((2, 3, 6)), np.zeros((2, 3, 5)))
