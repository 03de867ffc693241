"""Long convolution on the device: every length of transform, several segments, both layouts; and what is the same each time."""

import numpy as np
import pytest

import refimpl
from refimpl.ops.recurrence.long_conv import error_bound

pytestmark = pytest.mark.gpu
cp = pytest.importorskip("cupy")
mirror = pytest.importorskip("refimpl.gpu")

LENGTHS = (
    *((1, 1), (64, 64), (65, 20), (200, 300), (1000, 1000), (2048, 2048), (2049, 2049), (4096, 4096), (8191, 8191), (8192, 8192)),
    *((9002, 700), (16384, 16384)),
    *((16385, 16385), (50000, 50000), (40000, 100)),  # more than one segment
)


def _draw(rng, B, T, K, c):
    decay = np.exp(-np.arange(K) / K * 4)[:, None]
    return rng.standard_normal((B, T, c)), rng.standard_normal((K, c)) * decay, rng.standard_normal(c)


@pytest.mark.parametrize(("T", "K"), LENGTHS)
@pytest.mark.parametrize("time_contiguous", [False, True])
def test_every_transform(T, K, time_contiguous):
    u, kernel, skip = (x.astype(np.float32) for x in _draw(np.random.default_rng(T), 3, T, K, 2))
    u[1] *= 1e5  # what is large in one row must not show in another
    on_device = cp.asarray(u)
    if time_contiguous:
        on_device = cp.ascontiguousarray(on_device.swapaxes(1, 2)).swapaxes(1, 2)
    y = mirror.long_conv(on_device, cp.asarray(kernel), cp.asarray(skip)).get()
    wide = u.astype(np.float64), kernel.astype(np.float64), skip.astype(np.float64)
    exact = refimpl.OPS["long_conv"].forms["fft"].function(*wide)
    norms = np.linalg.norm(u.astype(np.float64), axis=1, keepdims=True) * np.linalg.norm(wide[1], axis=0)
    allowed = 3 * 2.0**-24 * np.log2(2 * (T + K)) * norms + 4 * 2.0**-24 * abs(wide[2] * wide[0])
    assert np.all(abs(y - exact) <= allowed)


@pytest.mark.parametrize(("T", "K"), [(100, 100), (9000, 9000)])
def test_gradient_is_the_same_each_time(T, K):
    u, kernel, skip = (cp.asarray(x, cp.float32) for x in _draw(np.random.default_rng(0), 4, T, K, 3))
    one, two = (mirror.long_conv_vjp(u, u, kernel, skip) for _ in range(2))
    for name in one:
        np.testing.assert_array_equal(one[name].get(), two[name].get())


def test_gradient_over_several_segments():
    rng = np.random.default_rng(5)
    u, kernel, skip = _draw(rng, 3, 18000, 17000, 2)
    dy = rng.standard_normal(u.shape)
    got = mirror.long_conv_vjp(*(cp.asarray(x, cp.float32) for x in (dy, u, kernel, skip)))
    want = mirror.long_conv_vjp(*map(cp.asarray, (dy, u, kernel, skip)))  # float64, by cuFFT
    sizes = {"u": np.linalg.norm(dy) * np.linalg.norm(kernel)} | dict.fromkeys(("kernel", "skip"), np.linalg.norm(dy) * np.linalg.norm(u))
    for name, size in sizes.items():
        assert float(abs(got[name] - want[name]).max()) <= 3 * 2.0**-24 * np.log2(4 * 18000) * size


def test_silence_beside_noise_stays_silence():
    u = cp.zeros((2, 300, 1), cp.float32)
    u[1] = cp.random.standard_normal((300, 1), dtype=cp.float32)
    kernel = cp.random.standard_normal((300, 1), dtype=cp.float32)
    assert not mirror.long_conv(u, kernel)[0].any()


@pytest.mark.slow
def test_more_elements_than_an_int_can_count():
    c, T = 2**26 + 3, 32
    if cp.cuda.Device().mem_info[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of device memory")
    kernel = cp.full((T, c), 0.5, cp.float32)
    u = cp.ones((c, T), cp.float32).T  # 2³¹ + 96 numbers
    y = mirror.long_conv(u, kernel)
    want = 0.5 * np.arange(1, T + 1)
    for channel in (0, c // 2, c - 1):
        exact = error_bound(np.ones((T, 1)), np.full((T, 1), 0.5), unit=2.0**-24)[:, 0]
        assert np.all(abs(y[:, channel].get() - want) <= exact)
    del y, u, kernel
    cp.get_default_memory_pool().free_all_blocks()
    k = cp.zeros((T, c), cp.float32)
    v = cp.broadcast_to(cp.arange(T, dtype=cp.float32)[:, None], (T, c))
    y = mirror.wkv(k, v, cp.zeros(c, cp.float32), cp.zeros(c, cp.float32))
    for channel in (0, c // 2, c - 1):
        np.testing.assert_allclose(y[:, channel].get(), np.arange(T) / 2, rtol=2.0**-18)
