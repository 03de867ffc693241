"""The selective scan on the device: every plan of tiles, tails of time, channels and states, groups; the same in every run."""

import ml_dtypes
import numpy as np
import pytest

import refimpl
from refimpl.ops.state_space.selective_scan import error_bound, selective_scan_vjp

pytestmark = pytest.mark.gpu
cp = pytest.importorskip("cupy")
mirror = pytest.importorskip("refimpl.gpu")

SIZES = (  # (N, T, c, n)
    *((2, 150, 128, 16), (2, 150, 72, 16), (40, 40, 256, 16)),
    *((1, 900, 16, 16), (1, 100, 64, 64), (1, 70, 32, 100), (2, 100, 64, 3)),
    *((1, 250, 1088, 16), (2, 37, 2560, 16), (3, 20, 80, 16)),  # bfloat16: a ring, two warps to a strip, part of a block
)


def _draw(rng, N, T, c, n, dtype=np.float32):
    make = lambda *shape: rng.standard_normal(shape)
    call = {
        "u": make(N, T, c), "delta": make(N, T, c) - 1, "A": -np.exp(make(c, n)), "B": make(N, T, n), "C": make(N, T, n),
        "D": make(c), "z": make(N, T, c), "delta_bias": make(c), "state": make(N, c, n),
    }  # fmt: skip
    return {name: x.astype(np.float32 if name == "state" else dtype) for name, x in call.items()}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_every_plan(size, dtype):
    rng = np.random.default_rng(size)
    call = _draw(rng, *size, dtype)
    exact = {name: x.astype(np.float64) for name, x in call.items()}
    half = dtype is not np.float32
    options = {"delta_softplus": True, "return_state": True}
    want = refimpl.selective_scan(**exact, **options)
    bound = error_bound(**exact, **options, unit=2.0**-24, store=2.0**-8 if half else 0.0)
    got = mirror.selective_scan(**{name: cp.asarray(x) for name, x in call.items()}, **options)
    for g, w, e in zip(got, want, bound, strict=True):
        rounding = 2.0**-8 * abs(w) if half and w is want[0] else 0
        assert np.all(abs(g.get().astype(np.float64) - w) <= e + rounding)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_gradient_of_every_plan(size, dtype):
    rng = np.random.default_rng(size)
    call = _draw(rng, *size, dtype)
    dy = rng.standard_normal(call["u"].shape).astype(dtype)
    dstate = rng.standard_normal(call["state"].shape).astype(np.float32)
    exact = {name: x.astype(np.float64) for name, x in call.items()}
    want = selective_scan_vjp(dy.astype(np.float64), **exact, dstate=dstate.astype(np.float64), delta_softplus=True)
    on_device = {name: cp.asarray(x) for name, x in call.items()}
    got, again = (mirror.selective_scan_vjp(cp.asarray(dy), **on_device, dstate=cp.asarray(dstate), delta_softplus=True) for _ in range(2))
    unit = 2.0**-20 if dtype is np.float32 else 2.0**-7  # bfloat16: of factors and results
    for name, w in want.items():
        terms = np.sqrt(size[0] * size[1]) if name in ("A", "D", "delta_bias") and dtype is np.float32 else 1  # sums over time
        assert np.linalg.norm(got[name].get().astype(np.float64) - w) <= unit * terms * np.linalg.norm(w), name
        np.testing.assert_array_equal(got[name].get().astype(np.float64), again[name].get().astype(np.float64))


@pytest.mark.parametrize("grouped", [1, 2, 4])
def test_groups_that_are_no_multiple_of_a_block(grouped):
    rng = np.random.default_rng(grouped)
    call = _draw(rng, 2, 40, 88, 5)
    call["B"], call["C"] = (rng.standard_normal((2, 40, grouped, 5)).astype(np.float32) for _ in range(2))
    exact = {name: x.astype(np.float64) for name, x in call.items()}
    want = refimpl.selective_scan(**exact, delta_softplus=True)
    bound = error_bound(**exact, delta_softplus=True, unit=2.0**-24)
    got = mirror.selective_scan(**{name: cp.asarray(x) for name, x in call.items()}, delta_softplus=True)
    assert np.all(abs(got.get() - want) <= bound)


def test_more_states_than_the_kernels_hold_are_refused():
    call = {name: cp.asarray(x) for name, x in _draw(np.random.default_rng(0), 1, 3, 2, 129).items()}
    with pytest.raises(NotImplementedError, match="at most 128 states a channel, got n = 129"):
        mirror.selective_scan(**call)


@pytest.mark.slow
def test_more_elements_than_an_int_can_count():
    T, c = 2**20 + 1, 2048
    if cp.cuda.Device().mem_info[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of device memory")
    u = cp.ones((T, c), ml_dtypes.bfloat16)  # 2³¹ + 2048 numbers
    B = cp.ones((T, 1), ml_dtypes.bfloat16)
    A = cp.full((c, 1), -0.6931472, cp.float32).astype(ml_dtypes.bfloat16)
    y = mirror.selective_scan(u, u, A, B, B)
    assert float(y[0].astype(cp.float32).max()) == 1
    assert float(abs(y[1 << 19 :].astype(cp.float32) - 2).max()) <= 2.0**-6
    del y, u, B
    cp.get_default_memory_pool().free_all_blocks()
