"""Operators on the device under the kit, each in a process of its own: every precision, gradients, laws, layouts, poisoned memory."""

import functools

import ml_dtypes
import numpy as np
import pytest

import refimpl

pytestmark = pytest.mark.gpu
cp = pytest.importorskip("cupy")
mirror = pytest.importorskip("refimpl.gpu")

SCANS = ("linear_recurrence", "selective_scan", "causal_conv1d", "rg_lru", "discretize_diagonal")
IN_CHUNKS = ("linear_attention", "ssd", "mlstm")  # have several methods; small calls take the fused one by default
OPS = (*SCANS, "long_conv", "linear_attention", "ssd", "mlstm", "slstm", "wkv", "wkv6", "wkv7", "route", "moe")
SIZES = {
    "linear_recurrence": {"T": 2048, "c": 256},
    "selective_scan": {"T": 512, "c": 256, "n": 16},
    "causal_conv1d": {"T": 2048, "c": 256},
    "rg_lru": {"T": 2048, "c": 256},
    "discretize_diagonal": {"n": 4096},
    "long_conv": {"T": 9000, "K": 9000, "c": 64},
    "linear_attention": {"T": 512, "d": 64, "e": 64},
    "ssd": {"T": 512, "p": 64, "n": 64},
    "mlstm": {"T": 512, "d": 64, "e": 64},
    "slstm": {"T": 512, "d": 64},
    "wkv": {"T": 512, "c": 256},
    "wkv6": {"T": 512, "d": 64, "e": 64},
    "wkv7": {"T": 512, "d": 64, "e": 64},
    "route": {"T": 4096, "E": 16},
    "moe": {"T": 512, "d": 128, "f": 256, "E": 8},
}


def _call(op: str) -> dict:
    """A call of float32 arrays on the device, of a size that keeps it busy."""
    drawn = refimpl.OPS[op].sample(np.random.default_rng(0), **SIZES[op])
    call = {name: _on_device(value) for name, value in drawn.items()}
    return call | ({"k": 2} if op in ("route", "moe") else {})


def _on_device(value):
    if isinstance(value, tuple):
        return type(value)(*map(_on_device, value))
    if isinstance(value, np.ndarray):
        return cp.asarray(value, bool if value.dtype == bool else cp.float32)
    return value


def _exact(value):
    """An argument of the device in the host's float64."""
    return type(value)(*map(_exact, value)) if isinstance(value, tuple) else value.astype(cp.float32).get().astype(np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("op", [*OPS, "discretize"])
def test_conforms(op):
    report = refimpl.check(
        op, f"refimpl.gpu:{op}", framework="cupy", dtypes=("float32", "float64", "float16", "bfloat16"),
        gradients=True, candidate_vjp=f"refimpl.gpu:{op}_vjp", isolate=True, level="standard",
    )  # fmt: skip
    assert report.verdict == "conforms", str(report)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("op", IN_CHUNKS)
def test_conforms_in_chunks(op, dtype):
    f, vjp = (functools.partial(getattr(mirror, name), method="chunkwise", chunk_length=8) for name in (op, f"{op}_vjp"))
    report = refimpl.check(op, f, framework="cupy", dtypes=[dtype], gradients=True, candidate_vjp=vjp, level="standard")
    assert report.verdict == "conforms", str(report)


@pytest.mark.slow
@pytest.mark.parametrize("op", IN_CHUNKS)
def test_conforms_on_tensor_cores(op):
    f, vjp = (functools.partial(getattr(mirror, name), method="tensor") for name in (op, f"{op}_vjp"))
    report = refimpl.check(op, f, framework="cupy", dtypes=["bfloat16"], gradients=True, candidate_vjp=vjp, level="standard")
    assert report.verdict == "conforms", str(report)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", IN_CHUNKS)
def test_all_methods_agree(op, dtype, farthest):
    """At a length and sizes that are no multiple of anything; the bound covers what products of halves lose."""
    kind, store = (np.dtype(np.float32), 0.0) if dtype == "float32" else (np.dtype(ml_dtypes.bfloat16), 2.0**-8)
    drawn = refimpl.OPS[op].sample(np.random.default_rng(0), **SIZES[op] | {"T": 777})
    call = {name: _on_device(x) if name == "state" else _on_device(x).astype(kind) for name, x in drawn.items()}
    exact = {name: _exact(x) for name, x in call.items()}
    bound = refimpl.OPS[op].error_bound(**exact, unit=2.0**-24, store=store)
    methods = [{"method": name} for name in ("fused", "chunkwise", "tensor")]
    y, *others = (getattr(mirror, op)(**call, **more).astype(cp.float32).get() for more in methods)
    for other in others:
        assert np.all(abs(y - other) <= 2 * bound + 2 * store * abs(y))
    dy, given = _on_device(y).astype(kind), {n: x if n == "state" else x.astype(kind) for n, x in exact.items()}
    for more in methods:
        gradients = {name: _exact(x) for name, x in getattr(mirror, f"{op}_vjp")(dy, **call, **more).items()}
        assert farthest(op, given, _exact(dy).astype(kind), None, gradients, dtype) <= 1


@pytest.mark.parametrize("op", [*OPS, *(f"{op}:{method}" for op in IN_CHUNKS for method in ("chunkwise", "tensor"))])
def test_runs_on_the_current_stream_and_waits_for_nothing(op):
    op, _, method = op.partition(":")
    call, f, vjp = _call(op), getattr(mirror, op), getattr(mirror, f"{op}_vjp")
    if method == "tensor":
        call = {n: v.astype(ml_dtypes.bfloat16) if isinstance(v, cp.ndarray) and n != "state" else v for n, v in call.items()}
    call |= {"method": method} if method else {}

    def both():
        result = f(**call)
        first = result[0] if isinstance(result, tuple) else result
        return first, vjp(result if op == "discretize_diagonal" else first, **call)

    want, _ = both()
    stream, event = cp.cuda.Stream(non_blocking=True), cp.cuda.Event()
    with stream:
        both()  # memory for this stream
        stream.synchronize()
        _occupy()
        got, _ = both()
        event.record()
        assert not event.done, "the call came back only when the device was done"
        stream.synchronize()
    np.testing.assert_array_equal(got.get(), want.get())


def test_arrays_that_are_not_aligned_or_not_contiguous_in_chunks():
    """Halves that begin in the middle of an access: copied where cuBLAS or a kernel could not take them."""
    call = {n: v.astype(ml_dtypes.bfloat16) for n, v in _call("ssd").items() if n != "state"}
    moved = {}
    for name, x in call.items():
        room = cp.zeros(x.size + 1, x.dtype)
        room[1:] = x.ravel()
        moved[name] = room[1:].reshape(x.shape)
    turned = {n: cp.ascontiguousarray(x.swapaxes(0, -1)).swapaxes(0, -1) for n, x in call.items()}
    exact = {n: _exact(x) for n, x in call.items()}
    want, bound = refimpl.ssd(**exact), refimpl.OPS["ssd"].error_bound(**exact, unit=2.0**-24, store=2.0**-8)
    for other in (moved, turned):
        for method in ("chunkwise", "tensor"):
            got = _exact(mirror.ssd(**other, method=method))
            assert np.all(abs(got - want) <= 2 * bound + 2.0**-8 * abs(want))


@pytest.mark.parametrize("op", OPS)
def test_refuses_arrays_in_host_memory(op):
    call = {n: v.get() if isinstance(v, cp.ndarray) else v for n, v in _call(op).items()}
    with pytest.raises(TypeError, match=f"{op}: arrays must be on the device"):
        getattr(mirror, op)(**call)


def test_a_failed_launch_says_which_kernel_and_what_the_device_allows():
    from refimpl.gpu.launch import LaunchError
    from refimpl.gpu.linear_attention.wkv import KERNELS

    with pytest.raises(LaunchError, match=r"wkv<float>.*the device allows 1024 threads"):
        KERNELS[0]((1,), (2048,), (np.uint64(0),) * 13 + (np.int64(0),) * 3)


def _occupy(cycles: int = 400_000_000) -> None:
    """Keep the stream busy for some 0.2 s."""
    code = 'extern "C" __global__ void occupy(long long n) { long long start = clock64(); while (clock64() - start < n) {} }'
    cp.RawKernel(code, "occupy")((1,), (1,), (np.int64(cycles),))
