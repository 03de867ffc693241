"""Attention on the device: the kit, every kernel at sizes of several tiles, arrays as they lie, the same bits twice, streams, errors."""

import importlib

import numpy as np
import pytest

import refimpl

pytestmark = pytest.mark.gpu
cp = pytest.importorskip("cupy")
mirror = pytest.importorskip("refimpl.gpu")
attention = importlib.import_module("refimpl.gpu.attention.attention")
chapter = importlib.import_module("refimpl.ops.attention.attention")

DTYPES = ("float64", "float32", "float16", "bfloat16")
ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
CASES = [  # B, Hq, Hkv, n, m, d, e, options; True stands for a drawn array
    (1, 1, 1, 128, 128, 128, 128, {}),
    (2, 4, 2, 300, 300, 128, 128, {"causal": True}),
    (2, 4, 1, 257, 513, 64, 64, {"causal": True, "return_lse": True}),
    (1, 2, 2, 513, 257, 128, 64, {"causal": True, "return_lse": True}),  # the first half sees nothing
    (1, 4, 2, 400, 650, 128, 128, {"window": (100, 30), "softcap": 3.0, "sink": True, "return_lse": True}),
    (1, 4, 2, 400, 650, 64, 64, {"window": (70, None), "offset": 40, "sink": True, "return_lse": True}),
    (1, 2, 1, 200, 300, 72, 40, {"bias": True, "mask": True, "causal": True, "return_lse": True}),
    (2, 2, 1, 150, 300, 128, 128, {"bias": True, "mask": True, "softcap": 2.0, "return_lse": True}),
    (1, 4, 2, 400, 650, 128, 128, {"window": (100, 30), "sink": True, "return_lse": True}),
    (1, 4, 1, 400, 650, 72, 128, {"window": (70, None), "offset": 40, "return_lse": True}),
    (1, 2, 1, 1111, 1300, 128, 128, {"causal": True}),  # gradient: ten blocks add to a tile
    (1, 4, 2, 300, 450, 100, 130, {"window": (100, 30), "sink": True, "return_lse": True}),
    (1, 3, 3, 70, 90, 37, 19, {"causal": True, "scale": 0.3}),
    (1, 2, 1, 60, 130, 200, 300, {"softcap": 2.0, "sink": True, "return_lse": True}),
    (2, 8, 2, 1, 1000, 128, 128, {"return_lse": True, "sink": True}),  # decoding
    (2, 8, 2, 4, 700, 128, 128, {"causal": True, "return_lse": True}),
    (1, 4, 4, 3, 600, 64, 64, {"window": (200, 0), "softcap": 2.0, "return_lse": True}),
]


def _draw(case, dtype, rng):
    B, Hq, Hkv, n, m, d, e, options = case
    options = dict(options)
    kind = _type(dtype)
    array = lambda *shape: rng.standard_normal(shape).astype(np.float32).astype(kind)
    call = {"q": array(B, Hq, n, d), "k": array(B, Hkv, m, d), "v": array(B, Hkv, m, e)}
    if options.pop("mask", False):
        call["mask"] = rng.random((B, 1, n, m)) < 0.5
        call["mask"][..., : n // 2, m // 4 :] = False  # tiles of nothing
        call["mask"][..., 5, :] = False
    if options.pop("bias", False):
        call["bias"] = array(Hq, n, m)
        call["bias"][..., 7, ::3] = -np.inf
    if options.pop("sink", False):
        call["sink"] = array(Hq)
    return call, options


def _type(dtype):
    if dtype != "bfloat16":
        return np.dtype(dtype)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def _wide(x):
    return x if x.dtype == bool else x.astype(np.float64)


def _on_device(call):
    return {name: cp.asarray(x) for name, x in call.items()}


@pytest.mark.slow
def test_conforms():
    report = refimpl.check(
        "attention", "refimpl.gpu:attention", framework="cupy", dtypes=DTYPES, gradients=True,
        candidate_vjp="refimpl.gpu:attention_vjp", isolate=True, level="standard",
    )  # fmt: skip
    assert report.verdict == "conforms", str(report)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kernel_within_the_bound(case, dtype):
    rng = np.random.default_rng(0)
    call, options = _draw(case, dtype, rng)
    wide = {name: _wide(x) for name, x in call.items()}
    unit, store = (ROUNDOFF[dtype], 0.0) if dtype in ("float64", "float32") else (2.0**-24, ROUNDOFF[dtype])
    names = chapter.CONTRACT.named
    want, limit = names(refimpl.attention(**wide, **options)), names(chapter.error_bound(**wide, **options, unit=unit, store=store))
    cp.full(1 << 22, cp.nan, cp.float32)  # what is not written shows
    got = names(mirror.attention(**_on_device(call), **options))
    for name, w in want.items():
        g = got[name].get().astype(np.float64)
        with np.errstate(invalid="ignore"):
            near = abs(g - w) <= limit[name] + ROUNDOFF[dtype] * abs(w)
        assert np.all(near | (g == w)), name


@pytest.mark.parametrize("dtype, five", [*((dtype, 1024) for dtype in DTYPES), ("float16", 0), ("bfloat16", 0)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient(case, dtype, five, monkeypatch):
    monkeypatch.setattr(attention, "FIVE_PRODUCTS", five)
    rng = np.random.default_rng(1)
    call, options = _draw(case, dtype, rng)
    wide = {name: _wide(x) for name, x in call.items()}
    shapes = [x.shape for x in chapter.CONTRACT.named(refimpl.attention(**wide, **options)).values()]
    dy = tuple(rng.standard_normal(s).astype(np.float32).astype(_type(dtype)) for s in shapes)
    pair = (lambda x: tuple(x)) if options.get("return_lse") else (lambda x: x[0])
    want = refimpl.OPS["attention"].gradient(pair([_wide(x) for x in dy]), **wide, **options)
    got = mirror.attention_vjp(pair([cp.asarray(x) for x in dy]), **_on_device(call), **options)
    again = mirror.attention_vjp(pair([cp.asarray(x) for x in dy]), **_on_device(call), **options)
    for name, w in want.items():
        g = got[name].get()
        np.testing.assert_array_equal(g, again[name].get())  # sums in a fixed order
        assert np.linalg.norm(g.astype(np.float64) - w) <= 40 * ROUNDOFF[dtype] * np.linalg.norm(w), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_far_below_zero_and_a_tile_that_is_not_full(dtype, monkeypatch, farthest):
    """e^-lse is infinite here: whoever lets keys beyond the last weigh that, and multiplies it by their zeros, gets NaN."""
    monkeypatch.setattr(attention, "FIVE_PRODUCTS", 0)
    rng = np.random.default_rng(4)
    call, _ = _draw((1, 2, 1, 130, 140, 128, 128, {}), dtype, rng)
    call["q"], call["k"] = (4 + call["q"] / 8).astype(_type(dtype)), (-4 + call["k"] / 8).astype(_type(dtype))  # scores of about -180
    dy = call["q"]
    got = {name: g.get() for name, g in mirror.attention_vjp(cp.asarray(dy), **_on_device(call)).items()}
    assert all(np.all(np.isfinite(g.astype(np.float64))) for g in got.values())
    assert farthest("attention", call, dy, None, got, dtype) <= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arrays_as_they_lie(dtype):
    """Heads behind time, features in steps of two, rows from an odd place: the same bits as of contiguous copies."""
    rng = np.random.default_rng(2)
    array = lambda *shape: cp.asarray(rng.standard_normal(shape).astype(np.float32).astype(_type(dtype)))
    q, k, v = array(2, 150, 4, 64).swapaxes(1, 2), array(2, 2, 150, 128)[..., ::2], array(2, 2, 151, 65)[:, :, 1:, 1:]
    dy = array(2, 4, 150, 64)
    straight = [cp.ascontiguousarray(x) for x in (q, k, v)]
    np.testing.assert_array_equal(mirror.attention(q, k, v, causal=True).get(), mirror.attention(*straight, causal=True).get())
    one, two = mirror.attention_vjp(dy, q, k, v, causal=True), mirror.attention_vjp(dy, *straight, causal=True)
    for name in one:
        np.testing.assert_array_equal(one[name].get(), two[name].get())


def test_runs_on_the_current_stream_and_waits_for_nothing():
    q = cp.asarray(np.random.default_rng(3).standard_normal((1, 2, 512, 64)), cp.float16)
    both = lambda: (mirror.attention(q, q, q, causal=True), mirror.attention_vjp(q, q, q, q, causal=True)["q"])
    want = both()
    stream, event = cp.cuda.Stream(non_blocking=True), cp.cuda.Event()
    code = 'extern "C" __global__ void occupy(long long n) { long long start = clock64(); while (clock64() - start < n) {} }'
    occupy = cp.RawKernel(code, "occupy")
    with stream:
        both()  # memory for this stream
        stream.synchronize()
        occupy((1,), (1,), (np.int64(400_000_000),))
        got = both()
        event.record()
        assert not event.done, "the call came back only when the device was done"
        stream.synchronize()
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g.get(), w.get())


def test_more_keys_than_32_bits_count():
    """An array of more than 2^31 numbers, its last keys the only ones that matter."""
    m = 2**24 + 70
    if cp.cuda.Device().mem_info[0] < 3 * 2 * m * 128:
        pytest.skip("not run: too little memory on the device")
    k = cp.zeros((1, 1, m, 128), cp.float16)
    k[..., -1, :] = 8
    v = cp.zeros((1, 1, m, 128), cp.float16)
    v[..., -1, :] = 3
    q = cp.ones((1, 1, 1, 128), cp.float16)  # score 1024 / sqrt(128) = 90 against 0
    assert float(abs(mirror.attention(q, k, v) - 3).max()) == 0
    rows = cp.ones((1, 1, 40, 128), cp.float16)
    assert float(abs(mirror.attention(rows, k, v) - 3).max()) == 0


def test_refuses_arrays_in_host_memory():
    q = np.ones((4, 8), np.float32)
    with pytest.raises(TypeError, match="attention: arrays must be on the device"):
        mirror.attention(q, q, q)


def test_a_failed_launch_says_which_kernel_and_what_the_device_allows():
    from refimpl.gpu.launch import LaunchError

    with pytest.raises(LaunchError, match=r"attention_merge<float16>.*the device allows 1024 threads"):
        attention._merge("float16")((1,), (2048,), (np.zeros(1, attention.CALL), *[np.uintp(0)] * 5))
