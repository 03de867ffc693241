"""The ring against attention as a whole, and what its steps may and may not do."""

import numpy as np
import pytest

import refimpl

OPTIONS = [{}, {"causal": True}, {"window": (3, 1)}, {"causal": True, "softcap": 2.0, "offset": 1}, {"scale": 0.3}]


def shards(x, sizes):
    return np.split(x, np.cumsum(sizes)[:-1], axis=-2)


@pytest.fixture
def problem(rng):
    return [rng.standard_normal((2, *s)) for s in ((4, 13, 3), (2, 17, 3), (2, 17, 5))]


def limit(problem, options):
    return 2 * refimpl.OPS["attention"].error_bound(*problem, unit=2.0**-53, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", [((13,), (17,)), ((4, 0, 9), (5, 11, 1)), ((1, 6, 6), (0, 8, 9))], ids=str)
def test_shards_of_any_size_give_attention(problem, sizes, options):
    q, k, v = problem
    o = refimpl.ring_attention(shards(q, sizes[0]), shards(k, sizes[1]), shards(v, sizes[1]), **options)
    assert np.all(abs(np.concatenate(o, axis=-2) - refimpl.attention(q, k, v, **options)) <= limit(problem, options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradient_of_shards_is_that_of_attention(problem, rng, options):
    q, k, v = problem
    do = rng.standard_normal((2, 4, 13, 5))
    parts = [shards(x, sizes) for x, sizes in ((do, (4, 0, 9)), (q, (4, 0, 9)), (k, (5, 11, 1)), (v, (5, 11, 1)))]
    ours = refimpl.ring_attention_vjp(*parts, **options)
    whole = refimpl.attention_vjp(do, q, k, v, **options)
    for name in "qkv":
        scale = 1e3 * np.finfo(float).eps * abs(whole[name]).max()  # roundoff of sums of a few hundred products
        assert np.all(abs(np.concatenate(ours[name], axis=-2) - whole[name]) <= scale)


def test_schedule_is_a_ring():
    for devices in (1, 2, 5):
        schedule = refimpl.ring_schedule(devices)
        assert all(sorted(row) == list(range(devices)) for row in schedule.tolist())  # a step uses every shard once
        assert all(sorted(column) == list(range(devices)) for column in schedule.T.tolist())  # a device sees every shard once
        np.testing.assert_array_equal(schedule[0], np.arange(devices))  # it begins with its own
        if devices > 1:
            np.testing.assert_array_equal(schedule[1], np.roll(schedule[0], 1))  # and then its neighbour's


def test_half_precision_is_rounded_once(problem):
    q, k, v = (x.astype(np.float16) for x in problem)
    o = np.concatenate(refimpl.ring_attention(shards(q, (5, 8)), shards(k, (9, 8)), shards(v, (9, 8))), axis=-2)
    assert o.dtype == np.float16
    exact = refimpl.attention(*(x.astype(np.float64) for x in (q, k, v)))
    assert np.all(abs(o - exact) <= 2.0**-11 * abs(exact) + 2.0**-24 * 64 * abs(v.astype(float)).max())


@pytest.mark.parametrize("bad, message", [
    (lambda q, k, v: ([q], [k, k], [v, v]), "as many shards"),
    (lambda q, k, v: ([], [], []), "at least one"),
    (lambda q, k, v: ([q], [k[..., :2]], [v]), "k must have shape"),
])  # fmt: skip
def test_bad_shards(problem, bad, message):
    with pytest.raises(ValueError, match=message):
        refimpl.ring_attention(*bad(*problem))


def test_unknown_option(problem):
    q, k, v = problem
    with pytest.raises(TypeError, match="dropout"):
        refimpl.ring_attention([q], [k], [v], dropout=0.1)
