"""The scan on the device: every way through time and memory, against the definition; the same in every run; very large arrays."""

import numpy as np
import pytest

import refimpl
from refimpl.ops.recurrence.linear_recurrence import error_bound, linear_recurrence_vjp

pytestmark = pytest.mark.gpu
cp = pytest.importorskip("cupy")
mirror = pytest.importorskip("refimpl.gpu")

SIZES = (  # (N, T, c): blocks that walk, blocks that share a sequence, warps and blocks a line
    *((3, 1000, 256), (130, 300, 128), (2, 5001, 37), (1, 70, 1)),
    *((1, 20000, 64), (1, 70001, 3)),
)


def _draw(rng, N, T, c):
    return rng.uniform(0.8, 1, (N, T, c)), rng.standard_normal((N, T, c)), rng.standard_normal((N, c))


def _device(x, time_contiguous=False):
    x = cp.asarray(x, cp.float32)
    return cp.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) if time_contiguous and x.ndim == 3 else x


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("time_contiguous", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_every_path(size, time_contiguous, reverse):
    rng = np.random.default_rng(size)
    a, b, state = (x.astype(np.float32).astype(np.float64) for x in _draw(rng, *size))
    dy, _, dstate = (x.astype(np.float32).astype(np.float64) for x in _draw(rng, *size))
    options = {"state": state, "reverse": reverse}
    want = refimpl.linear_recurrence(a, b, return_state=True, **options)
    bound = error_bound(a, b, return_state=True, unit=2.0**-24, **options)
    arrays = [_device(x, time_contiguous) for x in (a, b)]
    given = {"state": _device(state), "reverse": reverse}
    got = mirror.linear_recurrence(*arrays, return_state=True, **given)
    for g, w, e in zip(got, want, bound, strict=True):
        assert np.all(abs(g.get() - w) <= e)
    gradient = mirror.linear_recurrence_vjp(_device(dy, time_contiguous), *arrays, dstate=_device(dstate), **given)
    exact = linear_recurrence_vjp(dy, a, b, dstate=dstate, **options)
    backwards = error_bound(a, abs(dy), state=abs(dstate), reverse=not reverse, unit=2.0**-24).max()  # of the adjoint, and of h
    for name in exact:
        assert float(abs(gradient[name].get() - exact[name]).max()) <= (backwards + bound[0].max()) * (1 + abs(exact[name]).max())


@pytest.mark.parametrize("size", SIZES)
def test_the_same_in_every_run(size):
    arrays = [_device(x) for x in _draw(np.random.default_rng(0), *size)]
    first, *others = (mirror.linear_recurrence(arrays[0], arrays[1], state=arrays[2]) for _ in range(4))
    for other in others:
        np.testing.assert_array_equal(first.get(), other.get())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("offset", [0, 1])
def test_arrays_that_do_not_begin_at_a_pack(dtype, offset):
    rng, (N, T, c) = np.random.default_rng(0), (2, 300, 64)
    a, b, _ = _draw(rng, N, T, c)
    wide = [cp.full((N, T, c + 3), cp.nan, cp.float32).astype(dtype) for _ in range(2)]
    views = [w[..., offset : offset + c] for w in wide]
    for view, x in zip(views, (a, b), strict=True):
        view[...] = cp.asarray(x).astype(dtype)
    plain = mirror.linear_recurrence(*(v.copy() for v in views))
    np.testing.assert_array_equal(mirror.linear_recurrence(*views).astype(cp.float32).get(), plain.astype(cp.float32).get())


@pytest.mark.slow
def test_more_elements_than_an_int_can_count():
    T, c = 2**21 + 1, 1024
    if cp.cuda.Device().mem_info[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of device memory")
    half = cp.full((c,), 0.5, cp.float32)
    b = cp.ones((T, c), cp.float32)  # 2³¹ + 1024 numbers
    h = mirror.linear_recurrence(half, b)
    assert float(h[0].max()) == 1
    assert float(abs(h[1 << 20 :] - 2).max()) <= 2.0**-22
    del h, b
    cp.get_default_memory_pool().free_all_blocks()
