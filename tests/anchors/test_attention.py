"""attention against numbers worked by hand, rationals, decimal arithmetic, SciPy, ONNX's reference and torch."""

import decimal
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import scipy.special

from refimpl.ops.attention.attention import OPS, attention, attention_tiled, attention_tiled_vjp, attention_vjp, error_bound, merge_by_lse

(OP,) = OPS
FORMS = pytest.mark.parametrize("form", list(OP.forms))
VJPS = pytest.mark.parametrize(
    "vjp",
    [attention_vjp, attention_tiled_vjp, lambda *a, **k: attention_tiled_vjp(*a, **k, block_q=2, block_k=3)],
    ids=["dense", "tiled", "blocks"],
)
UNIT = 2.0**-53
NAN, INF = np.nan, np.inf


def run(form, *arrays, **options):
    """A form, with small blocks so that several are visited."""
    blocks = {"dense": {}, "tiled": {"block_q": 2, "block_k": 3}, "split_kv": {"splits": 3}}[form]
    return OP.forms[form].function(*arrays, **options, **blocks)


def within(got, want, bound):
    for g, w, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, want, bound)), strict=True):
        assert g.shape == np.shape(w)
        assert np.array_equal(np.isneginf(g), np.isneginf(w))
        g, w, b = (np.broadcast_to(x, g.shape)[~np.isneginf(w)] for x in (g, w, b))
        assert np.all(abs(g - w) <= b), f"{np.max(abs(g - w) / np.maximum(b, 1e-300)):.3g} times the bound"


def agree(form, q, k, v, want, unit=UNIT, **options):
    """A form equals `want`, itself a float64 computation, within twice the bound."""
    bound = error_bound(q, k, v, **options, unit=2 * unit)
    within(run(form, q, k, v, **options), want, bound)


# -- by hand and by rationals ----------------------------------------------------------------------------------------


@FORMS
def test_two_by_two_worked_by_hand(form):
    """q k^T/√d = [[0, log 3], [log 3, 0]]: weights 1/4 and 3/4, so 1/4·8 + 3/4·16 = 14 and 3/4·8 + 1/4·16 = 10."""
    a = math.log(3) * math.sqrt(2)
    q = np.array([[1.0, 0.0], [0.0, 1.0]])
    k = np.array([[0.0, a], [a, 0.0]])
    v = np.array([[8.0], [16.0]])
    agree(form, q, k, v, (np.array([[14.0], [10.0]]), np.array([math.log(4)] * 2)), return_lse=True)
    agree(form, q, k, v, np.array([[8.0], [10.0]]), causal=True)
    agree(form, q, k, v, np.array([[14.0], [16.0]]), window=(0, 1))
    # a sink of logit log 4 doubles the denominator
    agree(form, q, k, v, (np.array([[7.0], [5.0]]), np.array([math.log(8)] * 2)), sink=math.log(4), return_lse=True)
    # a bias of log 9 on the first key: weights 9 and 3 of 12, and 27 and 1 of 28
    agree(form, q, k, v, np.array([[10.0], [(27 * 8 + 16) / 28]]), bias=np.array([[math.log(9), 0.0]]))


@FORMS
@pytest.mark.parametrize("sink", [None, 5])
def test_integer_weights_give_rationals(form, sink, rng):
    """Scores that are logarithms of integers: the weights are fractions."""
    w, v = rng.integers(1, 50, (4, 11)), rng.integers(-9, 10, (11, 2))
    k = np.log(w).T  # d = 4, and queries pick a row of it
    total = [sum(map(int, row)) + (sink or 0) for row in w]
    want = np.array([[float(Fraction(int(np.dot(w[i], v[:, c])), total[i])) for c in range(2)] for i in range(4)])
    lse = np.array([math.log(t) for t in total])
    agree(form, np.eye(4), k, v.astype(float), (want, lse), scale=1.0, sink=None if sink is None else math.log(sink), return_lse=True)


@FORMS
@pytest.mark.parametrize(
    ("options", "n", "m", "seen"),
    [
        ({"causal": True}, 3, 3, ["0", "01", "012"]),
        ({"causal": True}, 2, 5, ["0123", "01234"]),
        ({"causal": True, "offset": 0}, 2, 5, ["0", "01"]),
        ({"causal": True}, 4, 2, ["", "", "0", "01"]),
        ({"causal": True, "offset": -1}, 3, 3, ["", "0", "01"]),
        ({"causal": True, "offset": 7}, 2, 3, ["012", "012"]),
        ({"window": (1, 0)}, 2, 5, ["23", "34"]),
        ({"window": (1, 1), "offset": 0}, 3, 4, ["01", "012", "123"]),
        ({"window": (0, 0)}, 3, 3, ["0", "1", "2"]),
        ({"window": (None, 1), "offset": 0}, 2, 4, ["01", "012"]),
        ({"window": (1, None)}, 3, 4, ["0123", "123", "23"]),
        ({"window": (2, 2), "causal": True}, 4, 4, ["0", "01", "012", "123"]),
        ({"window": (1, 0), "offset": 4}, 3, 4, ["3", "", ""]),
        ({"window": (0, 0), "offset": -2}, 4, 3, ["", "", "0", "1"]),
        ({}, 2, 0, ["", ""]),
    ],
)
def test_which_pairs_are_seen(form, options, n, m, seen):
    """Equal scores and one-hot values: o shows the keys that each query sees, all with the same weight."""
    q, k = np.zeros((n, 2)), np.ones((m, 2))
    want = np.array([[1 / max(len(keys), 1) if str(j) in keys else 0.0 for j in range(m)] for keys in seen]).reshape(n, m)
    lse = np.array([math.log(len(keys)) if keys else -INF for keys in seen])
    agree(form, q, k, np.eye(m), (want, lse), **options, return_lse=True)
    mask = np.array([[str(j) in keys for j in range(m)] for keys in seen], dtype=bool).reshape(n, m)
    agree(form, q, k, np.eye(m), (want, lse), mask=mask, return_lse=True)
    agree(form, q, k, np.eye(m), (want, lse), bias=np.where(mask, 0.0, -INF), return_lse=True)


@FORMS
def test_a_row_with_nothing_allowed(form):
    q, k, v = np.ones((2, 1)), np.ones((3, 1)), np.ones((3, 2))
    mask = np.array([[False] * 3, [True] * 3])
    o, lse = run(form, q, k, v, mask=mask, return_lse=True)
    assert np.array_equal(o[0], [0, 0])
    assert lse[0] == -INF
    o, lse = run(form, q, k, v, mask=mask, sink=0.25, return_lse=True)
    assert np.array_equal(o[0], [0, 0])
    assert lse[0] == 0.25


@FORMS
def test_groups_of_heads_read_their_key_head(form, rng):
    """Six query heads, three key heads: values say which head was read, 0 0 1 1 2 2; bias and sink go with query heads."""
    q, k = rng.standard_normal((6, 4, 3)), rng.standard_normal((3, 5, 3))
    v = np.broadcast_to(np.arange(3.0)[:, None, None], (3, 5, 1))
    o = run(form, q, k, v)
    within(o, np.broadcast_to(np.array([0.0, 0, 1, 1, 2, 2])[:, None, None], (6, 4, 1)), error_bound(q, k, v, unit=UNIT))
    bias, sink = rng.standard_normal((6, 1, 5)), rng.standard_normal(6)
    alone = [attention(q[h], k[h // 2], v[h // 2], bias=bias[h], sink=sink[h]) for h in range(6)]
    agree(form, q, k, v, np.stack(alone), bias=bias, sink=sink)


# -- other arithmetics -----------------------------------------------------------------------------------------------


def in_decimal(q, k, v, *, scale, softcap, bias, allowed, sink):
    """(1)-(3), one number at a time with 50 digits."""
    D = decimal.Decimal

    def tanh(x):
        e = (2 * x).exp()
        return (e - 1) / (e + 1)

    o, lse = np.zeros((len(q), v.shape[1])), np.zeros(len(q))
    with decimal.localcontext(decimal.Context(prec=50)):
        for i in range(len(q)):
            total, sums = D(float(sink)).exp(), [D(0)] * v.shape[1]
            for j in range(len(k)):
                if not allowed[i, j]:
                    continue
                s = D(scale) * sum((D(float(a)) * D(float(b)) for a, b in zip(q[i], k[j], strict=True)), D(0))
                w = (D(softcap) * tanh(s / D(softcap)) + D(float(bias[i, j]))).exp()
                total += w
                sums = [x + w * D(float(y)) for x, y in zip(sums, v[j], strict=True)]
            o[i], lse[i] = [float(x / total) for x in sums], float(total.ln())
    return o, lse


@FORMS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_against_decimal_arithmetic(form, dtype, rng):
    q, k, v, bias = (rng.standard_normal(s).astype(dtype) for s in ((5, 4), (9, 4), (9, 3), (5, 9)))
    q, sink, allowed = q * dtype(6), dtype(0.75), rng.random((5, 9)) < 0.7
    want = in_decimal(q, k, v, scale=0.625, softcap=3.5, bias=bias, allowed=allowed, sink=sink)
    wide = {"scale": 0.625, "softcap": 3.5, "bias": bias.astype(float), "mask": allowed, "sink": np.array(sink, float), "return_lse": True}
    got = run(form, q, k, v, scale=0.625, softcap=3.5, bias=bias, mask=allowed, sink=np.array(sink), return_lse=True)
    assert all(g.dtype == dtype for g in got)
    within(got, want, error_bound(q.astype(float), k.astype(float), v.astype(float), **wide, unit=float(np.finfo(dtype).eps) / 2))


@FORMS
def test_is_scipy_softmax_and_logsumexp(form, rng):
    q, k, v = rng.standard_normal((2, 4, 6, 8)), rng.standard_normal((2, 4, 10, 8)), rng.standard_normal((2, 4, 10, 5))
    mask = np.tri(6, 10, 4, dtype=bool)
    s = np.where(mask, np.einsum("bhid,bhjd->bhij", q, k) / np.sqrt(8), -INF)
    want = np.einsum("bhij,bhje->bhie", scipy.special.softmax(s, axis=-1), v), scipy.special.logsumexp(s, axis=-1)
    agree(form, q, k, v, want, causal=True, return_lse=True)


def onnx_attention(q, k, v, mask=None, **attributes):
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    arrays = {"Q": q, "K": k, "V": v} | ({} if mask is None else {"M": mask})
    kinds = {
        name: onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for name, x in arrays.items()
    }
    node = onnx.helper.make_node("Attention", list(arrays), ["Y"], **attributes)
    out = onnx.helper.make_tensor_value_info("Y", onnx.TensorProto.DOUBLE, None)
    graph = onnx.helper.make_graph([node], "attention", list(kinds.values()), [out])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    return ReferenceEvaluator(model).run(None, arrays)[0]


@FORMS
def test_is_onnx_reference_attention(form, rng):
    """ONNX aligns starts (our offset=0) and groups heads as we do."""
    q, k, v = rng.standard_normal((2, 6, 5, 4)), rng.standard_normal((2, 2, 9, 4)), rng.standard_normal((2, 2, 9, 3))
    mask, bias = rng.random((5, 9)) < 0.6, rng.standard_normal((2, 6, 5, 9))
    agree(form, q, k, v, onnx_attention(q, k, v))
    agree(form, q, k, v, onnx_attention(q, k, v, is_causal=1), causal=True, offset=0)
    agree(form, q, k, v, onnx_attention(q, k, v, scale=0.25), scale=0.25)  # its root is taken in float32
    agree(form, q, k, v, onnx_attention(q, k, v, softcap=0.75), softcap=0.75)
    mask[:, 0] = True
    agree(form, q, k, v, onnx_attention(q, k, v, mask), mask=mask)
    agree(form, q, k, v, onnx_attention(q, k, v, bias), bias=bias)


# -- what must not leak, overflow or lose accuracy ------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_nothing_behind_a_mask_is_seen(form, bad, rng):
    q, k, v = (rng.standard_normal((2, 7, 3)) for _ in range(3))
    poisoned = [x.copy() for x in (k, v)]
    for x in poisoned:
        x[:, -1] = bad
    for options in ({"mask": np.arange(7) != 6}, {"bias": np.where(np.arange(7) == 6, -INF, 0.5)}):
        options = {name: x[None] for name, x in options.items()}
        agree(form, q, *poisoned, attention(q, k, v, **options, return_lse=True), **options, return_lse=True)
    o = run(form, q, *poisoned, causal=True)
    agree(form, q[:, :6], k[:, :6], v[:, :6], o[:, :6], causal=True)
    o = run(form, q, k, poisoned[1], causal=True)
    agree(form, q[:, :6], k[:, :6], v[:, :6], o[:, :6], causal=True)
    assert np.array_equal(o[:, 6], np.full_like(o[:, 6], bad), equal_nan=True), "in front of the mask it is seen"
    if np.isnan(bad):
        assert np.all(np.isnan(run(form, q, poisoned[0], v, causal=True)[:, 6]))


@VJPS
@pytest.mark.parametrize("bad", [NAN, INF])
def test_no_gradient_from_behind_a_mask(vjp, bad, rng):
    q, k, v, do = (rng.standard_normal((2, 7, 3)) for _ in range(4))
    mask = np.ones((7, 7), dtype=bool)
    mask[:, 5] = False
    mask[3] = False
    poisoned = [x.copy() for x in (q, k, v, do)]
    for x, row in zip(poisoned, (3, 5, 5, 3), strict=True):
        x[:, row] = bad
    want = vjp(do, q, k, v, mask=mask)
    got = vjp(poisoned[3], *poisoned[:3], mask=mask)
    for name in want:
        assert np.array_equal(got[name], want[name]), name
    assert not np.any(got["q"][:, 3])
    assert not np.any(got["k"][:, 5])
    assert not np.any(got["v"][:, 5])


@FORMS
def test_common_offsets_and_large_scores_do_not_overflow(form, rng):
    q, k, v = (rng.standard_normal((6, 4)).astype(np.float32) for _ in range(3))
    for bias in (np.float32(5000), np.float32(-5000)):
        bias = np.full((1, 6), bias)
        o, lse = run(form, q, k, v, bias=bias, return_lse=True)
        assert np.all(np.isfinite(o))
        wide = [x.astype(float) for x in (q, k, v)]
        bound = error_bound(*wide, bias=bias.astype(float), return_lse=True, unit=2.0**-24)
        want = attention(*wide, return_lse=True)
        within((o, lse), (want[0], want[1] + bias[0, 0]), bound)


def test_scores_overflow_no_sooner_than_they_must():
    q = np.full((1, 4), 1e20, dtype=np.float32)
    k = np.array([[1e18] * 4, [-1e18] * 4], dtype=np.float32)
    assert np.array_equal(attention(q, k, np.array([[1.0], [2.0]], np.float32), scale=1e-20), [[1.0]])
    assert np.array_equal(attention(q * 1e18, k / 1e18, np.array([[1.0], [2.0]], np.float32), scale=0.5), [[1.0]])


# -- gradients -------------------------------------------------------------------------------------------------------


def roundings(want, terms):
    """`terms` summands, some ten roundings each, relative to the largest gradient."""
    return 10 * terms * np.finfo(want.dtype).eps * np.max(abs(want), initial=0)


@VJPS
def test_gradient_worked_by_hand(vjp):
    """Weights 1/4, 3/4 and values 8, 16: ∂o/∂s = p (v - o) = (1/4·(8 - 14), 3/4·(16 - 14)) = (-3/2, 3/2); ∂lse/∂s = p."""
    q, k, v = np.ones((1, 1)), np.array([[0.0], [math.log(3)]]), np.array([[8.0], [16.0]])
    zero = np.zeros((1, 2))
    got = vjp((np.array([[1.0]]), np.array([2.0])), q, k, v, bias=zero, return_lse=True)
    want = {"bias": [[-1.5 + 0.5, 1.5 + 1.5]], "k": [[-1.0], [3.0]], "q": [[3 * math.log(3)]], "v": [[0.25], [0.75]]}
    for name in want:
        assert np.all(abs(got[name] - want[name]) <= roundings(np.array(want[name]), 4)), name
    # a sink of log 4 halves the weights: o = 7; ∂o/∂sink = -o·1/2 and ∂lse/∂sink = 1/2
    got = vjp((np.array([[1.0]]), np.array([2.0])), q, k, v, bias=zero, sink=np.array(math.log(4)), return_lse=True)
    want = {"bias": [[0.125 * (8 - 7 + 2), 0.375 * (16 - 7 + 2)]], "sink": -3.5 + 1.0, "v": [[0.125], [0.375]]}
    for name in want:
        assert np.all(abs(got[name] - want[name]) <= roundings(np.array(want[name]), 4)), name
    assert got["sink"].shape == ()


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (3, 1), "offset": 1}, {"softcap": 1.5, "return_lse": True}])
def test_the_tiled_gradient_is_the_gradient(options, rng):
    call = OP.sample(rng, n=23, m=31, Hq=6, batch=(2,)) | options
    call["bias"] = call["bias"][:, :, :1]  # one row of bias for all queries: its gradient is summed
    result = attention(**call)
    dy = tuple(rng.standard_normal(r.shape) for r in result) if isinstance(result, tuple) else rng.standard_normal(result.shape)
    want = attention_vjp(dy, **call)
    for blocks in ({}, {"block_q": 1, "block_k": 1}, {"block_q": 7, "block_k": 5}):
        got = attention_tiled_vjp(dy, **call, **blocks)
        assert got.keys() == want.keys() == {"q", "k", "v", "bias", "sink"}
        for name in want:
            assert got[name].shape == want[name].shape == call[name].shape
            assert np.all(abs(got[name] - want[name]) <= roundings(want[name], 31)), name


# -- the merge rule --------------------------------------------------------------------------------------------------


def test_merging_in_any_grouping(rng):
    q, k, v = rng.standard_normal((2, 5, 4)), rng.standard_normal((2, 12, 4)), rng.standard_normal((2, 12, 3))
    parts = [attention(q, k[:, a:b], v[:, a:b], return_lse=True) for a, b in ((0, 2), (2, 2), (2, 9), (9, 12))]
    left = parts[0]
    for part in parts[1:]:
        left = merge_by_lse(*zip(left, part, strict=True))
    bound = error_bound(q, k, v, return_lse=True, unit=2 * UNIT)
    within(left, attention(q, k, v, return_lse=True), bound)
    within(merge_by_lse(*zip(*parts[::-1], strict=True)), left, bound)


def test_merging_nothing_seen():
    o, lse = merge_by_lse([np.full((1, 2), NAN), np.ones((1, 2))], [np.array([-INF]), np.array([0.5])])
    assert np.array_equal(o, [[1, 1]])
    assert np.array_equal(lse, [0.5])
    o, lse = merge_by_lse([np.ones((1, 2))], [np.array([-INF])])
    assert np.array_equal(o, [[0, 0]])
    assert np.array_equal(lse, [-INF])


@pytest.mark.parametrize(("outputs", "logs"), [([], []), ([np.ones((2, 3))], [np.ones(3)]), ([np.ones((2, 3))], [])])
def test_merging_refuses(outputs, logs):
    with pytest.raises(ValueError, match="merge_by_lse"):
        merge_by_lse(outputs, logs)


# -- precisions, threads, bad input ----------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precisions_are_rounded_once(form, dtype, rng):
    q, k, v = (rng.standard_normal((6, 4)).astype(dtype) for _ in range(3))
    got = run(form, q, k, v)
    single = run(form, *(x.astype(np.float32) for x in (q, k, v)))
    assert got.dtype == dtype
    assert np.array_equal(got, single.astype(dtype))


def test_threads_change_nothing(rng, monkeypatch):
    q, k, v = (rng.standard_normal((2, 4, 300, 16)).astype(np.float32) for _ in range(3))
    results = []
    for threads in ("1", "3", "3"):
        monkeypatch.setenv("REFIMPL_NUM_THREADS", threads)
        results.append(attention_tiled(q, k, v, causal=True))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[1], results[2])
    wide = [x.astype(float) for x in (q, k, v)]
    within(results[0], attention(*wide, causal=True), error_bound(*wide, causal=True, unit=2.0**-24))


A = np.ones((2, 4, 3))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"q": A[0, 0]}, "q must have shape"),
        ({"k": A[..., :2]}, "k must have shape.*d = 3 from q, got 2"),
        ({"v": A[:, :2]}, "v must have shape.*m = 4 from k, got 2"),
        ({"k": np.ones((3, 4, 3)), "v": np.ones((3, 4, 3))}, "Hkv divides Hq is required, got Hkv = 3, Hq = 2"),
        ({"q": A * 1j}, "q must be real"),
        ({"q": np.array([["a"]])}, "q must be numeric"),
        ({"mask": np.ones((4, 4))}, "mask must be boolean"),
        ({"mask": np.ones((4, 3), bool)}, "mask must have shape"),
        ({"bias": np.ones((3, 4, 4))}, "bias must have shape"),
        ({"sink": np.ones(3)}, "sink must have shape"),
        ({"softcap": 0}, "softcap must be positive, got 0"),
        ({"softcap": -1.0}, "softcap must be positive, got -1.0"),
        ({"softcap": INF}, "softcap must be a finite number, got inf"),
        ({"scale": NAN}, "scale must be a finite number"),
        ({"scale": "1"}, "scale must be"),
        ({"window": 3}, r"window must be a pair \(left, right\) or None, got 3"),
        ({"window": (-1, -1)}, "window must hold integers of at least 0, or None"),
        ({"window": (1.5, 0)}, "window must hold integers"),
        ({"offset": 0.5}, "offset must be an integer"),
        ({"causal": "yes"}, "causal must be True or False"),
        ({"is_causal": True}, "unknown argument 'is_causal'"),
        ({"q": np.ones((2, 4, 0)), "k": np.ones((2, 4, 0))}, "d at least 1"),
    ],
)
@FORMS
def test_bad_input(form, arguments, says):
    with pytest.raises((ValueError, TypeError), match=f"attention: {says}"):
        OP.forms[form].function(**({"q": A, "k": A, "v": A} | arguments))


# -- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.peers
@FORMS
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_is_torch_scaled_dot_product_attention(form, dtype, rng):
    torch = pytest.importorskip("torch")
    sdpa = torch.nn.functional.scaled_dot_product_attention
    unit = float(np.finfo(dtype).eps) / 2
    q, k, v = (rng.standard_normal(s).astype(dtype) for s in ((2, 6, 33, 16), (2, 2, 47, 16), (2, 2, 47, 16)))
    mask, bias = rng.random((2, 1, 33, 47)) < 0.8, rng.standard_normal((2, 6, 33, 47)).astype(dtype)
    mask[..., 0] = True
    t = torch.from_numpy
    for ours, theirs in (
        ({}, {}),
        ({"causal": True, "offset": 0}, {"is_causal": True}),
        ({"scale": 0.5}, {"scale": 0.5}),
        ({"mask": mask}, {"attn_mask": t(mask)}),
        ({"bias": bias}, {"attn_mask": t(bias)}),
    ):
        want = sdpa(t(q), t(k), t(v), enable_gqa=True, **theirs).numpy()
        wide = {n: x.astype(float) if getattr(x, "dtype", None) == dtype else x for n, x in ours.items()}
        within(run(form, q, k, v, **ours), want, error_bound(*(x.astype(float) for x in (q, k, v)), **wide, unit=2 * unit))


@pytest.mark.peers
@VJPS
def test_gradient_is_torch_autograd(vjp, rng):
    torch = pytest.importorskip("torch")
    call = OP.sample(rng, n=6, m=9, Hq=6, batch=(2,))
    names = ["q", "k", "v", "bias", "sink"]
    leaf = {n: torch.from_numpy(call[n]).requires_grad_() for n in names}
    k, v = (leaf[n].repeat_interleave(3, dim=1) for n in "kv")
    s = 1.5 * torch.tanh(leaf["q"] @ k.mT / 3**0.5 / 1.5) + leaf["bias"]
    s = s.masked_fill(~(torch.from_numpy(call["mask"]) & torch.ones(6, 9).tril(3).bool()), -INF)
    s = torch.cat([s, leaf["sink"][None, :, None, None].expand(2, 6, 6, 1)], dim=-1)
    o, lse = s.softmax(-1)[..., :-1] @ v, s.logsumexp(-1)
    do, dlse = rng.standard_normal(o.shape), rng.standard_normal(lse.shape)
    want = dict(zip(names, torch.autograd.grad([o, lse], list(leaf.values()), [torch.from_numpy(do), torch.from_numpy(dlse)]), strict=True))
    got = vjp((do, dlse), **call, causal=True, softcap=1.5, return_lse=True)
    for name in names:
        assert np.all(abs(got[name] - want[name].numpy()) <= roundings(want[name].numpy(), 9)), name
