"""LSH attention where it must be dense attention, and its hashing."""

import numpy as np
import pytest

import refimpl

OPTIONS = {"n_hashes": 2, "n_buckets": 4, "bucket_size": 4, "rng": 0}


def limit(qk, v, **options):
    return 2 * refimpl.OPS["lsh_attention"].error_bound(qk, v, unit=2.0**-53, **options)


@pytest.mark.parametrize("causal", [False, True])
def test_one_bucket_is_dense_attention_under_the_same_rules(rng, causal):
    qk, v = rng.standard_normal((2, 3, 12, 4))
    options = {"n_hashes": 3, "n_buckets": 1, "bucket_size": 12, "causal": causal, "rng": 0}
    k = qk / np.linalg.norm(qk, axis=-1, keepdims=True)
    mask = ~np.eye(12, dtype=bool)
    if causal:
        mask = np.tril(mask)
        mask[0, 0] = True  # the first position has only itself
    want = refimpl.attention(qk, k, v, mask=mask)
    assert np.all(abs(refimpl.lsh_attention(qk, v, **options) - want) <= limit(qk, v, **options))


def test_opposite_clusters_do_not_meet(rng):
    """Two groups of equal vectors, x and -x: whatever R is, they hash apart, and each averages its own values."""
    x = rng.standard_normal(4)
    side = np.resize([1.0, -1.0], 10)
    v = rng.standard_normal((10, 2))
    o = refimpl.lsh_attention(side[:, None] * x, v, n_hashes=2, n_buckets=8, bucket_size=5, rng=5)
    for i in range(10):
        others = [j for j in range(10) if side[j] == side[i] and j != i]
        np.testing.assert_allclose(o[i], v[others].mean(axis=0), rtol=1e-13)


def test_nearer_vectors_meet_more_often():
    """The collision probability falls with the angle, as locality-sensitive hashing promises."""
    from refimpl.ops.attention.lsh_attention import _buckets

    angles = np.array([0.05, 0.5, 1.0, 1.5])
    points = np.concatenate([[[1.0, 0.0]], np.stack([np.cos(angles), np.sin(angles)], axis=-1)])
    meets = np.mean([b[1:] == b[0] for b in _buckets(points, 4000, 8, 0)], axis=0)
    assert np.all(np.diff(meets) < 0)


def test_generator_and_seed_are_the_same_choice(rng):
    qk, v = rng.standard_normal((2, 9, 4))
    seed, generator = (refimpl.lsh_attention(qk, v, **{**OPTIONS, "rng": r}) for r in (7, np.random.default_rng(7)))
    np.testing.assert_array_equal(seed, generator)


@pytest.mark.parametrize("change, message", [
    ({"n_buckets": 3}, "n_buckets must be 1 or even"),
    ({"bucket_size": 0}, "bucket_size"),
    ({"n_hashes": 1.5}, "n_hashes"),
])  # fmt: skip
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        refimpl.lsh_attention(np.ones((4, 2)), np.ones((4, 2)), **{**OPTIONS, **change})
