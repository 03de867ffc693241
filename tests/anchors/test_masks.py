"""Masks against definitions written out pair by pair, pictures, and the Longformer and BigBird of transformers."""

import functools
import inspect

import numpy as np
import pytest

import refimpl
from refimpl import (
    attention,
    bigbird_mask,
    block_map,
    fixed_mask,
    longformer_mask,
    segment_mask,
    sliding_window_mask,
    strided_mask,
)


def by_pairs(n, m, offset, rule):
    """The mask of a rule about P and j, in plain Python."""
    return np.array([[rule(i + offset, j) for j in range(m)] for i in range(n)], dtype=bool).reshape(n, m)


def picture(text):
    return np.array([[c == "x" for c in row] for row in text.split()])


SIZES = pytest.mark.parametrize(
    ("n", "m", "offset"), [(7, 7, None), (1, 9, None), (5, 3, None), (4, 6, 0), (6, 4, -3), (0, 3, None), (3, 0, None)]
)


@SIZES
@pytest.mark.parametrize("window", [(0, 0), (2, 0), (1, 2), (None, 0), (None, None), (3, None), (50, 50)])
def test_sliding_window(n, m, offset, window):
    left, right = (10**6 if side is None else side for side in window)
    want = by_pairs(n, m, m - n if offset is None else offset, lambda P, j: P - left <= j <= P + right)
    assert np.array_equal(sliding_window_mask(n, m, window=window, offset=offset), want)


@SIZES
@pytest.mark.parametrize("stride", [1, 2, 3, 100])
def test_strided_is_section_4_3(n, m, offset, stride):
    """A(1) = {t ... i}, t = max(0, i - l); A(2) = {j : (i - j) mod l = 0}."""
    place = m - n if offset is None else offset
    local = by_pairs(n, m, place, lambda P, j: j <= P and j >= max(0, P - stride))
    strided = by_pairs(n, m, place, lambda P, j: j <= P and (P - j) % stride == 0)
    options = {"stride": stride, "offset": offset}
    assert np.array_equal(strided_mask(n, m, part="local", **options), local)
    assert np.array_equal(strided_mask(n, m, part="strided", **options), strided)
    assert np.array_equal(strided_mask(n, m, **options), local | strided)


@SIZES
@pytest.mark.parametrize(("stride", "c"), [(1, 1), (3, 1), (4, 2), (4, 4), (3, 0)])
def test_fixed_is_section_4_3(n, m, offset, stride, c):
    """A(1) = {j : ⌊j/l⌋ = ⌊i/l⌋}; A(2) = {j : j mod l ∈ {t ... l - 1}}, t = l - c."""
    place = m - n if offset is None else offset
    local = by_pairs(n, m, place, lambda P, j: j <= P and j // stride == P // stride)
    summary = by_pairs(n, m, place, lambda P, j: j <= P and j % stride in range(stride - c, stride))
    options = {"stride": stride, "c": c, "offset": offset}
    assert np.array_equal(fixed_mask(n, m, part="local", **options), local)
    assert np.array_equal(fixed_mask(n, m, part="summary", **options), summary)
    assert np.array_equal(fixed_mask(n, m, **options), local | summary)


def test_two_sparse_steps_reach_every_earlier_position():
    """What factorised attention promises [section 4.2]: a path of length p + 1 between any two."""
    everything = np.tri(24, dtype=bool)
    for two in (
        [strided_mask(24, stride=5, part=p) for p in ("local", "strided")],
        [fixed_mask(24, stride=5, part=p) for p in ("local", "summary")],
    ):
        local, far = (mask.astype(int) for mask in two)
        within = local @ far + local + far + far @ local
        assert np.array_equal(local @ far @ local + within > 0, everything)


def test_longformer_pictures():
    assert np.array_equal(longformer_mask(6, window=(1, 1)), picture("xx.... xxx... .xxx.. ..xxx. ...xxx ....xx"))
    assert np.array_equal(longformer_mask(6, window=(1, 1), dilation=2), picture("x.x... .x.x.. x.x.x. .x.x.x ..x.x. ...x.x"))
    assert np.array_equal(longformer_mask(6, window=(1, 0), global_tokens=[2]), picture("x.x... xxx... xxxxxx ..xx.. ..xxx. ..x.xx"))
    assert np.array_equal(longformer_mask(4, window=(0, 0), global_tokens=[-1]), picture("x..x .x.x ..xx xxxx"))
    assert np.array_equal(longformer_mask(9, window=(None, None)), np.ones((9, 9), bool))


def test_segments_pictures():
    assert np.array_equal(segment_mask([1, 3, 0, 2]), picture("x..... .xxx.. .xxx.. .xxx.. ....xx ....xx"))
    assert np.array_equal(segment_mask([1, 2], causal=True), picture("x.. .x. .xx"))
    assert np.array_equal(segment_mask([1, 2], [2, 3]), picture("xx... ..xxx ..xxx"))
    assert np.array_equal(segment_mask([1, 2], [2, 3], causal=True), picture("xx... ..xx. ..xxx"))
    assert np.array_equal(segment_mask([1, 2], [2, 0], causal=True), picture("xx .. .."))
    assert np.array_equal(segment_mask([2], n=3, causal=True), picture("x.. xx. ..."))
    assert np.array_equal(segment_mask([2], n=2, m=3), picture("xx. xx."))
    assert segment_mask([]).shape == (0, 0)


def test_bigbird_has_its_parts(rng):
    n, block, r = 66, 4, 3
    mask = bigbird_mask(n, block=block, random_blocks=r, rng=rng)
    blocks = block_map(mask, block, block)
    assert np.array_equal(np.repeat(np.repeat(blocks, block, 0), block, 1)[:n, :n], mask), "whole blocks"
    count = blocks.shape[0]
    fixed = by_pairs(count, count, 0, lambda I, J: abs(I - J) <= 1 or {0, count - 1} & {I, J})
    assert np.all(blocks[fixed])
    at_random = blocks & ~fixed
    assert np.array_equal(at_random.sum(axis=1)[1:-1], np.full(count - 2, r))
    assert not at_random[[0, -1]].any()


def test_bigbird_draws_evenly():
    """Every block not seen already comes with the same frequency: chi-square over 4000 draws, at a fixed seed."""
    from scipy.stats import chisquare

    rng, counts = np.random.default_rng(7), np.zeros(12)
    for _ in range(4000):
        counts += bigbird_mask(12, block=1, random_blocks=2, rng=rng)[4]
    drawn = np.delete(counts, [0, 3, 4, 5, 11])
    assert np.all(counts[[0, 3, 4, 5, 11]] == 4000)
    assert drawn.sum() == 8000
    assert chisquare(drawn).pvalue > 1e-3


def test_bigbird_is_the_same_for_the_same_seed():
    draw = lambda seed: bigbird_mask(60, block=3, rng=np.random.default_rng(seed))
    assert np.array_equal(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))


@pytest.mark.parametrize("n", [0, 1, 3, 9])
def test_short_sequences_are_seen_wholly(n, rng):
    assert np.all(bigbird_mask(n, block=3, rng=rng))


@pytest.mark.parametrize(("block_q", "block_k"), [(1, 1), (2, 3), (5, 4), (100, 100)])
def test_block_map_is_any_of_each_block(block_q, block_k, rng):
    mask = rng.random((2, 11, 13)) < 0.05
    want = np.array(
        [
            [[mask[b, i : i + block_q, j : j + block_k].any() for j in range(0, 13, block_k)] for i in range(0, 11, block_q)]
            for b in range(2)
        ]
    )
    assert np.array_equal(block_map(mask, block_q, block_k), want)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: sliding_window_mask(-1, window=(1, 0)), "n must be an integer of at least 0, got -1"),
        (lambda: sliding_window_mask(4, window=3), r"window must be a pair \(left, right\), got 3"),
        (lambda: sliding_window_mask(4, window=(-1, 0)), "window must be an integer of at least 0, got -1"),
        (lambda: sliding_window_mask(4, window=(1.0, 0)), "window must be an integer"),
        (lambda: sliding_window_mask(4, window=(1, 0), offset=0.5), "offset must be an integer or None"),
        (lambda: strided_mask(4, stride=0), "stride must be an integer of at least 1, got 0"),
        (lambda: strided_mask(4, stride=2, part="summary"), "part must be one of None, 'local', 'strided'"),
        (lambda: fixed_mask(4, stride=2, c=3), "c must be at most stride = 2, got 3"),
        (lambda: longformer_mask(4, window=(1, 1), global_tokens=[4]), "global_tokens must lie in -4 ... 3, got 4"),
        (lambda: longformer_mask(4, window=(1, 1), global_tokens=[0.5]), "global_tokens must be a sequence of integers"),
        (lambda: longformer_mask(4, window=(1, 1), dilation=0), "dilation must be an integer of at least 1"),
        (lambda: bigbird_mask(9, block=2), "rng must be a numpy.random.Generator where random_blocks > 0, got None"),
        (lambda: bigbird_mask(9, block=2, random_blocks=0, rng=np.random.default_rng()), "rng must be None where random_blocks = 0"),
        (lambda: bigbird_mask(9, block=2, window_blocks=2, rng=np.random.default_rng()), "window_blocks must be odd"),
        (lambda: bigbird_mask(9, block=3, global_blocks=[3], rng=np.random.default_rng()), "global_blocks must lie in -3 ... 2, got 3"),
        (lambda: segment_mask([3, -1]), "lengths must be at least 0, got -1"),
        (lambda: segment_mask([3, 2], n=4), "lengths must sum to at most n = 4, or segments overlap; got a sum of 5"),
        (lambda: segment_mask([3], [4], m=3), "key_lengths must sum to at most m = 3"),
        (lambda: segment_mask([1.0, 2.0]), "lengths must be a sequence of integers"),
        (lambda: segment_mask([[1, 2]]), "lengths must be a sequence of integers"),
        (lambda: segment_mask([1, 2], [3]), "key_lengths must be as many as lengths, got 1 and 2"),
        (lambda: segment_mask([1, 2], causal=1), "causal must be True or False"),
        (lambda: block_map(np.ones((2, 2)), 1, 1), "mask must be boolean"),
        (lambda: block_map(np.ones(2, bool), 1, 1), r"mask must have shape \(..., n, m\)"),
        (lambda: block_map(np.ones((2, 2), bool), 0, 1), "block_q must be an integer of at least 1"),
    ],
)
def test_bad_input_is_refused_by_name(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call()


# -- public implementations ------------------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize("global_tokens", [[], [0, 7]])
def test_longformer_of_transformers_attends_by_this_mask(global_tokens, rng):
    """With the same projections for global tokens as for others, its output is attention under our mask."""
    torch = pytest.importorskip("torch")
    longformer = pytest.importorskip("transformers.models.longformer.modeling_longformer")
    n, heads, d, w = 32, 2, 4, 8
    config = longformer.LongformerConfig(
        hidden_size=heads * d, num_attention_heads=heads, attention_window=[w], attention_probs_dropout_prob=0.0
    )
    layer = longformer.LongformerSelfAttention(config, layer_id=0).eval().double()
    for name in ("query", "key", "value"):
        getattr(layer, f"{name}_global").load_state_dict(getattr(layer, name).state_dict())
    x = torch.tensor(rng.standard_normal((1, n, heads * d)))
    kinds = torch.zeros(1, n).double()
    kinds[0, global_tokens] = 10000.0
    with torch.no_grad():
        options = {
            "attention_mask": kinds,
            "is_index_masked": kinds < 0,
            "is_index_global_attn": kinds > 0,
            "is_global_attn": bool(global_tokens),
        }
        accepted = inspect.signature(layer.forward).parameters
        got = layer(x, **{name: value for name, value in options.items() if name in accepted})[0].numpy()[0]
        q, k, v = (getattr(layer, name)(x[0]).numpy().reshape(n, heads, d).transpose(1, 0, 2) for name in ("query", "key", "value"))
    mask = longformer_mask(n, window=(w // 2, w // 2), global_tokens=global_tokens)
    want, limit = (f(q, k, v, mask=mask) for f in (attention, functools.partial(_bound(), unit=2.0**-24)))
    assert np.all(abs(got.reshape(n, heads, d).transpose(1, 0, 2) - want) <= limit)


@pytest.mark.peers
def test_bigbird_of_transformers_attends_by_this_mask(rng, monkeypatch):
    """Its block-sparse attention, told our random blocks, is attention under our mask."""
    torch = pytest.importorskip("torch")
    bigbird = pytest.importorskip("transformers.models.big_bird.modeling_big_bird")
    heads, d, block, r, n = 2, 4, 4, 2, 64
    config = bigbird.BigBirdConfig(hidden_size=heads * d, num_attention_heads=heads, block_size=block, num_random_blocks=r, use_bias=True)
    layer = bigbird.BigBirdBlockSparseAttention(config, seed=0).eval().double()
    masks = [bigbird_mask(n, block=block, random_blocks=r, rng=rng) for _ in range(heads)]
    count = n // block
    fixed = by_pairs(count, count, 0, lambda I, J: abs(I - J) <= 1 or {0, count - 1} & {I, J})
    chosen = [np.array([np.flatnonzero(row) for row in (block_map(mask, block, block) & ~fixed)[1:-1]]) for mask in masks]
    monkeypatch.setattr(layer, "_bigbird_block_rand_mask_with_head", lambda *args, **kwargs: chosen)
    x = torch.tensor(rng.standard_normal((1, n, heads * d)))
    ones = torch.ones(1, n).double()
    blocked = ones.view(1, count, block)
    band = torch.einsum("blq,blk->blqk", blocked[:, 2:-2], torch.cat([blocked[:, 1:-3], blocked[:, 2:-2], blocked[:, 3:-1]], dim=2))[
        :, None
    ]
    with torch.no_grad():
        got = layer(
            x,
            band_mask=band,
            from_mask=ones[:, None, :, None],
            to_mask=ones[:, None, None],
            from_blocked_mask=blocked,
            to_blocked_mask=blocked,
        )[0]
        q, k, v = (getattr(layer, name)(x[0]).numpy().reshape(n, heads, d).transpose(1, 0, 2) for name in ("query", "key", "value"))
    want, limit = (f(q, k, v, mask=np.array(masks)) for f in (attention, functools.partial(_bound(), unit=2.0**-24)))
    assert np.all(abs(got.numpy()[0].reshape(n, heads, d).transpose(1, 0, 2) - want) <= limit)


def _bound():
    return refimpl.OPS["attention"].error_bound
