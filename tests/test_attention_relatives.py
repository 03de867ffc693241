"""What the relatives of attention have to do with it, and with each other: identities between chapters.

Each is checked on the definitions and, where there are any, on the other forms; tolerances are error bounds.
"""

import functools
import tracemalloc

import numpy as np
import pytest

import refimpl
from refimpl import (
    alibi_bias,
    attention,
    bigbird_mask,
    block_map,
    fixed_mask,
    longformer_mask,
    rope,
    segment_mask,
    sliding_window_mask,
    strided_mask,
)
from refimpl.conformance.mutants import edited

OPS = refimpl.OPS
UNIT = 2.0**-53
ATTENTION_FORMS = pytest.mark.parametrize("form", list(OPS["attention"].forms))


def within(got, want, bound):
    assert got.shape == want.shape
    assert np.all(abs(got - want) <= bound), f"{np.max(abs(got - want) / np.maximum(bound, 1e-300)):.3g} times the bound"


def attention_bound(*args, **options):
    return OPS["attention"].error_bound(*args, unit=UNIT, **options)


def qkv(rng, n=11, m=None, heads=3, d=4):
    m = n if m is None else m
    return rng.standard_normal((heads, n, d)), rng.standard_normal((heads, m, d)), rng.standard_normal((heads, m, d))


def patterns(n):
    rng = np.random.default_rng(n)
    return {
        "sliding": sliding_window_mask(n, window=(3, 0)),
        "strided": strided_mask(n, stride=4),
        "fixed": fixed_mask(n, stride=4),
        "longformer": longformer_mask(n, window=(2, 2), global_tokens=[0]),
        "bigbird": bigbird_mask(n, block=2, random_blocks=1, rng=rng),
        "segments": segment_mask([n // 3, n // 4, n - n // 3 - n // 4], causal=True),
    }


# -- masks -----------------------------------------------------------------------------------------------------------


@ATTENTION_FORMS
@pytest.mark.parametrize("n", [1, 6, 11])
def test_a_window_as_wide_as_the_sequence_is_dense(form, n, rng):
    q, k, v = qkv(rng, n)
    function = OPS["attention"].forms[form].function
    dense, limit = attention(q, k, v), 2 * attention_bound(q, k, v)
    within(function(q, k, v, window=(n - 1, n - 1)), dense, limit)
    within(function(q, k, v, mask=sliding_window_mask(n, window=(n - 1, n - 1))), dense, limit)
    within(
        function(q, k, v, mask=strided_mask(n, stride=n)), attention(q, k, v, causal=True), limit + attention_bound(q, k, v, causal=True)
    )
    within(function(q, k, v, mask=longformer_mask(n, window=(0, 0), global_tokens=range(n))), dense, limit)
    if n > 1:
        narrower = attention(q, k, v, window=(n - 2, n - 2))
        assert np.any(abs(narrower - dense) > limit), "and one narrower is not"


@ATTENTION_FORMS
@pytest.mark.parametrize(("n", "m"), [(9, 9), (4, 9)])
@pytest.mark.parametrize("window", [(2, 0), (1, 3), (None, 1)])
def test_a_window_is_its_mask(form, n, m, window, rng):
    q, k, v = qkv(rng, n, m)
    mask = sliding_window_mask(n, m, window=window)
    within(
        OPS["attention"].forms[form].function(q, k, v, mask=mask),
        attention(q, k, v, window=window),
        2 * attention_bound(q, k, v, mask=mask),
    )


@ATTENTION_FORMS
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_equal_separate_calls(form, causal, rng):
    lengths, key_lengths = [3, 1, 0, 5, 2], [4, 2, 3, 5, 0]
    q, k, v = qkv(rng, sum(lengths) + 2, sum(key_lengths) + 1)  # the rest is padding
    mask = segment_mask(lengths, key_lengths, n=q.shape[-2], m=k.shape[-2], causal=causal)
    packed = OPS["attention"].forms[form].function(q, k, v, mask=mask)
    i = j = 0
    for n, m in zip(lengths, key_lengths, strict=True):
        one = (q[:, i : i + n], k[:, j : j + m], v[:, j : j + m])
        within(packed[:, i : i + n], attention(*one, causal=causal), 2 * attention_bound(*one, causal=causal))
        i, j = i + n, j + m
    assert not packed[:, i:].any(), "padding sees nothing"


def test_gradients_of_packed_sequences_equal_separate_calls(rng):
    lengths = [3, 4]
    q, k, v = qkv(rng, 7)
    do = rng.standard_normal(v.shape)
    packed = refimpl.attention_vjp(do, q, k, v, mask=segment_mask(lengths, causal=True))
    for part in (slice(0, 3), slice(3, 7)):
        alone = refimpl.attention_vjp(do[:, part], q[:, part], k[:, part], v[:, part], causal=True)
        for name in "qkv":
            np.testing.assert_allclose(packed[name][:, part], alone[name], rtol=0, atol=64 * UNIT * np.max(abs(alone[name])))


MISTAKES = {
    "the window's left edge left out": (sliding_window_mask, ("j >= P - left\n", "j > P - left\n"), (9,), {"window": (2, 0)}),
    "starts aligned": (
        sliding_window_mask,
        ("(m - n if offset is None else offset), np", "(0 if offset is None else offset), np"),
        (4, 9),
        {"window": (2, 0)},
    ),
    "the strided window one shorter": (strided_mask, ("j >= P - stride,", "j > P - stride,"), (9,), {"stride": 3, "part": "local"}),
    "not causal": (strided_mask, ('return (j <= P) & _part("strided', 'return (j < 99) & _part("strided'), (9,), {"stride": 3}),
    "segments of the query's position": (fixed_mask, ("local=j // stride == P // stride", "local=P - j < stride"), (9,), {"stride": 3}),
    "the first of each segment": (fixed_mask, ("j % stride >= stride - c", "j % stride < c"), (9,), {"stride": 3}),
    "global tokens only see": (
        longformer_mask,
        ("mask[tokens, :] = mask[:, tokens] = True", "mask[tokens, :] = True"),
        (9,),
        {"window": (1, 1), "global_tokens": [4]},
    ),
    "dilated reach not longer": (longformer_mask, ("P - left * dilation", "P - left"), (9,), {"window": (2, 2), "dilation": 2}),
    "padding is a segment": (segment_mask, (" & (segment_q[:, None] >= 0)", ""), ([3, 2],), {"n": 7}),
    "starts of segments aligned": (
        segment_mask,
        ("to_end_q[:, None] <= to_end_k", "to_end_q[:, None] < to_end_k"),
        ([3, 2], [4, 2]),
        {"causal": True},
    ),
    "slopes from 1": (alibi_bias, ("-8 * (h + 1) / H", "-8 * h / H"), (4, 3, 3), {}),
    "slopes of any H by one formula": (alibi_bias, ("below = 1 << (int(heads).bit_length() - 1)", "below = heads"), (6, 3, 3), {}),
    "every slope of the next power": (alibi_bias, ("2 * rest", "rest"), (6, 3, 3), {}),
    "a reward for distance": (alibi_bias, ("return -_slopes", "return _slopes"), (4, 3, 3), {}),
    "distance from the start": (alibi_bias, ("(m - n if offset", "(0 if offset"), (4, 2, 5), {}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_pattern_shows(mistake):
    """Each of these was made by somebody; the anchors' sizes must tell it from the right pattern, or they prove nothing."""
    function, edit, args, options = MISTAKES[mistake]
    assert not np.array_equal(edited(function, edit)()(*args, **options), function(*args, **options))


# -- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", patterns(23))
@pytest.mark.parametrize("block", [1, 4, 7, 64])
def test_skipping_blocks_changes_nothing(pattern, block, rng):
    q, k, v = qkv(rng, 23)
    mask = patterns(23)[pattern]
    got = refimpl.attention_block_sparse(q, k, v, mask=mask, return_lse=True, block_q=block, block_k=block)
    want, limit = (f(q, k, v, mask=mask, return_lse=True) for f in (attention, attention_bound))
    for g, w, e in zip(got, want, limit, strict=True):
        within(g, w, 2 * e)


class Counted(np.ndarray):
    """An array that counts the operations of the matrix products, and the exponentials, of which it is a part."""

    products = exponentials = 0

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **kwargs):
        plain = [x.view(np.ndarray) if isinstance(x, Counted) else x for x in inputs]
        targets = {"out": tuple(x.view(np.ndarray) if isinstance(x, Counted) else x for x in out)} if out else {}
        result = getattr(ufunc, method)(*plain, **targets, **kwargs)
        if ufunc is np.matmul:
            Counted.products += 2 * result.size * plain[0].shape[-1]
        Counted.exponentials += result.size * (ufunc is np.exp)
        return out[0] if out else _counted(result)

    def __array_function__(self, function, types, args, kwargs):
        return _counted(super().__array_function__(function, types, args, kwargs))


def _counted(x):
    return x.view(Counted) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x


def work(function, *arrays, **options):
    """(operations in matrix products, exponentials) of a call."""
    Counted.products = Counted.exponentials = 0
    function(*map(_counted, arrays), **options)
    return Counted.products, Counted.exponentials


@pytest.mark.parametrize("pattern", patterns(24))
def test_skipped_blocks_are_not_computed(pattern, rng):
    heads, n, d, block = 3, 24, 4, 4
    q, k, v = qkv(rng, n, heads=heads, d=d)
    mask = patterns(n)[pattern]
    visible = int(block_map(mask, block, block).sum())
    assert visible < (n // block) ** 2
    products, exponentials = work(refimpl.attention_block_sparse, q, k, v, mask=mask, block_q=block, block_k=block)
    assert products == heads * visible * block**2 * 2 * (d + d)
    assert exponentials == heads * (visible * block**2 + n), "and one for the sink of each row"
    assert work(attention, q, k, v, mask=mask) == (heads * n * n * 2 * (d + d), heads * (n * n + n))


@pytest.mark.parametrize("form", ["tiled", "block_sparse"])
def test_work_and_memory_under_a_window_grow_with_the_length(form, rng):
    """Twice the length is twice the work and twice the bytes, where the whole map takes four times as much."""
    function = functools.partial(OPS["attention"].forms[form].function, window=(15, 0), block_q=16, block_k=16)

    def peak(f, arrays):
        tracemalloc.start()
        f(*arrays)
        bytes_ = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return bytes_

    short, long = (qkv(rng, n, heads=1, d=4) for n in (256, 512))
    for f, growth in ((function, 2), (functools.partial(attention, window=(15, 0)), 4)):
        assert work(f, *long)[0] / work(f, *short)[0] == pytest.approx(growth, rel=0.05)
        more = peak(f, long) / peak(f, short)
        assert more <= 2.2 if growth == 2 else more > 3


# -- positions -------------------------------------------------------------------------------------------------------


@ATTENTION_FORMS
@pytest.mark.parametrize(("n", "m"), [(6, 6), (2, 6)])
def test_alibi_is_attention_with_the_bias_written_out(form, n, m, rng):
    """e^{-slope |P - j|} as a factor of every weight, in plain Python."""
    heads = 3
    q, k, v = qkv(rng, n, m, heads=heads)
    slopes = [2**-4, 2**-8, 2**-2]
    want = np.zeros(q.shape)
    for h, i in np.ndindex(heads, n):
        weights = [float(np.exp(q[h, i] @ k[h, j] / 2 - slopes[h] * abs(i + m - n - j))) for j in range(i + m - n + 1)]
        want[h, i] = sum(w * v[h, j] for j, w in enumerate(weights)) / sum(weights)
    bias = alibi_bias(heads, n, m)
    got = OPS["attention"].forms[form].function(q, k, v, causal=True, bias=bias)
    within(got, want, 2 * attention_bound(q, k, v, causal=True, bias=bias))


@ATTENTION_FORMS
def test_alibi_of_later_queries_alone(form, rng):
    """Decoding: the bias of the last queries is the last rows of the bias."""
    assert np.array_equal(alibi_bias(4, 2, 9), alibi_bias(4, 9, 9)[:, 7:])
    q, k, v = qkv(rng, 9, heads=4)
    whole, limit = (f(q, k, v, causal=True, bias=alibi_bias(4, 9, 9)) for f in (attention, attention_bound))
    last = OPS["attention"].forms[form].function(q[:, 7:], k, v, causal=True, bias=alibi_bias(4, 2, 9))
    within(last, whole[:, 7:], 2 * limit[:, 7:])


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("shift", [1, -3, 250])
def test_attention_under_rope_knows_only_differences(layout, shift, rng):
    q, k, v = qkv(rng, 7, 9, d=6)
    at = lambda s: (rope(q, np.arange(2, 9) + s, layout=layout), rope(k, np.arange(9) + s, layout=layout), v)
    here, there = attention(*at(0)), attention(*at(shift))
    limit = attention_bound(*at(0)) + attention_bound(*at(shift))
    # what angles in error do to the scores, as an error of the bias; a weight errs by it twice, in numerator and denominator
    turned = sum(
        abs(y) @ e.mT + f @ abs(z).mT
        for s in (0, shift)
        for (y, z, _), e, f in [(at(s), _rope_bound(k, np.arange(9) + s, layout), _rope_bound(q, np.arange(2, 9) + s, layout))]
    )
    spread = 2 * np.max(turned, axis=-1, keepdims=True) * np.max(abs(v), axis=-2, keepdims=True)
    within(there, here, limit + 2 * spread)
    assert np.any(
        abs(attention(rope(q, np.arange(7), layout=layout), rope(k, np.arange(9), layout=layout), v) - here) > 1e3 * (limit + spread)
    )


def _rope_bound(x, positions, layout):
    return OPS["rope"].error_bound(x, positions, layout=layout, unit=UNIT)


@pytest.mark.parametrize("pairs", [2, 3])
def test_layouts_are_a_permutation_of_each_other(pairs, rng):
    x, positions = rng.standard_normal((5, 2 * pairs)), [0, 3, 4, 9, 11]
    to_half = np.arange(2 * pairs).reshape(pairs, 2).T.reshape(-1)
    within(
        rope(x, positions, layout="interleaved")[:, to_half],
        rope(x[:, to_half], positions),
        2 * _rope_bound(x[:, to_half], positions, "half"),
    )


# -- relative attention ----------------------------------------------------------------------------------------------

RELATIVE_FORMS = pytest.mark.parametrize("form", list(OPS["relative_attention"].forms))


def relative_call(rng, n=4, m=4):
    return OPS["relative_attention"].sample(rng, n=n, m=m, H=2, d=3, e=2)


@RELATIVE_FORMS
def test_segment_memory_equals_a_longer_context(form, rng):
    """The second segment, with the first as memory, gives what the whole sequence gives there."""
    f, whole = OPS["relative_attention"].forms[form].function, relative_call(rng, 9, 9)
    limit = 2 * OPS["relative_attention"].error_bound(**whole, unit=UNIT)
    for cut in (1, 4, 8):
        first = {name: x[:, :cut] if name in "qkvr" else x for name, x in whole.items()}
        second = whole | {"q": whole["q"][:, cut:]}
        both = np.concatenate([f(**first), f(**second)], axis=1)
        within(both, f(**whole), limit)


def test_the_gradient_stopped_at_the_memory_is_the_second_segment_s(rng):
    """Without the memory's own gradient, what is left is the sequence's with the loss on the second segment alone."""
    whole, cut = relative_call(rng, 7, 7), 3
    do = rng.standard_normal((2, 7, 2))
    second = refimpl.relative_attention_vjp(do[:, cut:], **whole | {"q": whole["q"][:, cut:]})
    do[:, :cut] = 0
    all_of_it = refimpl.relative_attention_vjp(do, **whole)
    for name in ("k", "v"):
        np.testing.assert_allclose(second[name][:, cut:], all_of_it[name][:, cut:], rtol=0, atol=64 * UNIT * np.max(abs(second[name])))
    np.testing.assert_allclose(second["q"], all_of_it["q"][:, cut:], rtol=0, atol=64 * UNIT * np.max(abs(second["q"])))
    assert np.any(all_of_it["k"][:, :cut]), "which the memory would get, if it were not stopped"


@RELATIVE_FORMS
@pytest.mark.parametrize(("n", "m"), [(5, 5), (2, 6)])
def test_relative_attention_is_attention_with_the_position_as_a_bias(form, n, m, rng):
    call = relative_call(rng, n, m)
    q, k, v, r = (call[name] for name in "qkvr")
    bias = np.array(
        [[[(q[h, i] + call["v_bias"][h]) @ r[h, abs(i + m - n - j)] for j in range(m)] for i in range(n)] for h in range(2)]
    ) / np.sqrt(3)
    q = q + call["u_bias"][:, None]
    want, limit = (f(q, k, v, bias=bias, causal=True) for f in (attention, attention_bound))
    within(
        OPS["relative_attention"].forms[form].function(**call), want, 2 * limit + OPS["relative_attention"].error_bound(**call, unit=UNIT)
    )


# -- attention-free ---------------------------------------------------------------------------------------------------


def aft_call(rng, T=9, d=3):
    return OPS["aft"].sample(rng, T=T, d=d)


def aft_bound(call, **options):
    return OPS["aft"].error_bound(**call, **options, unit=UNIT)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", list(OPS["aft_local"].forms))
def test_aft_local_of_everything_is_aft_full(form, causal, rng):
    call = aft_call(rng)
    for s in (9, 100):
        within(
            OPS["aft_local"].forms[form].function(**call, s=s, causal=causal),
            refimpl.aft(**call, causal=causal),
            2 * aft_bound(call, causal=causal),
        )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", list(OPS["aft_simple"].forms))
def test_aft_simple_is_aft_without_biases(form, causal, rng):
    call = aft_call(rng)
    call["w"] = 0 * call["w"]
    simple = {name: x for name, x in call.items() if name != "w"}
    within(
        OPS["aft_simple"].forms[form].function(**simple, causal=causal),
        refimpl.aft(**call, causal=causal),
        2 * aft_bound(call, causal=causal),
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", list(OPS["aft_conv"].forms))
def test_aft_conv_is_aft_with_a_toeplitz_w(form, causal, rng):
    call, kernel = aft_call(rng), rng.standard_normal(7)
    call["w"] = np.array([[kernel[t - j + 3] if abs(t - j) <= 3 else 0 for j in range(9)] for t in range(9)])
    got = OPS["aft_conv"].forms[form].function(**call | {"w": kernel}, causal=causal)
    within(got, refimpl.aft(**call, causal=causal), 2 * aft_bound(call, causal=causal))


def test_aft_with_a_decay_is_wkv(rng):
    """RWKV's wkv: w_tj = -(t - 1 - j) decay for j < t, and a bonus for the own key; AFT's gate open."""
    if "wkv" not in OPS:
        pytest.skip("the catalogue has no wkv")
    call, decay, bonus, T = aft_call(rng, d=1), 0.7, 0.4, 9
    lag = np.arange(T)[:, None] - np.arange(T)
    call |= {"q": np.full((T, 1), 100.0), "w": np.where(lag > 0, -(lag - 1) * decay, bonus)}
    want = refimpl.wkv(call["k"], call["v"], np.array([decay]), np.array([bonus]))
    within(refimpl.aft(**call, causal=True), want, 2 * aft_bound(call, causal=True))


# -- Linformer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", list(OPS["linformer_attention"].forms))
@pytest.mark.parametrize(("n", "m"), [(5, 5), (3, 8)])
def test_linformer_without_mixing_is_dense(form, n, m, rng):
    """E = F = I; and any one permutation in place of I."""
    q, k, v = qkv(rng, n, m)
    want, limit = attention(q, k, v), attention_bound(q, k, v)
    for E in (np.eye(m), np.eye(m)[rng.permutation(m)]):
        got = OPS["linformer_attention"].forms[form].function(q, k, v, E, E)
        within(got, want, limit + OPS["linformer_attention"].error_bound(q, k, v, E, E, unit=UNIT))


def test_linformer_that_picks_positions_is_attention_to_those(rng):
    q, k, v = qkv(rng, 4, 9)
    E = np.eye(9)[[1, 4, 6]]
    mask = np.isin(np.arange(9), [1, 4, 6])[None]
    limit = attention_bound(q, k, v, mask=mask) + OPS["linformer_attention"].error_bound(q, k, v, E, E, unit=UNIT)
    within(refimpl.linformer_attention(q, k, v, E, E), attention(q, k, v, mask=mask), limit)
