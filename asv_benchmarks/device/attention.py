"""Attention on the device: checked against float64, then timed beside torch's kernels.

python asv_benchmarks/device/attention.py results.json [check] [time]
"""

import functools
import importlib
import statistics
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import cupy as cp
import measure
import ml_dtypes
import numpy as np
from refimpl.gpu.launch import Kernel, _function

import refimpl

mirror = importlib.import_module("refimpl.gpu.attention.attention")
chapter = importlib.import_module("refimpl.ops.attention.attention")
DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
KINDS = ("float64", "float32", "float16", "bfloat16")


def section(function):
    """Run; a failure is printed and does not end the rest."""
    start = time.perf_counter()
    try:
        function()
    except Exception:
        traceback.print_exc(limit=-6)
    print(f"-- {getattr(function, '__name__', 'section')}: {time.perf_counter() - start:.1f} s", flush=True)


def compile_all(chosen):
    cp.RawModule(code='extern "C" __global__ void f() {}').get_function("f")

    def one(kernel):
        try:
            _function(kernel, 0)
        except Exception as error:
            print("DOES NOT COMPILE", kernel.name, str(error)[:2000], flush=True)

    device = cp.cuda.Device()

    def with_device(kernel):
        with device:
            one(kernel)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(with_device, chosen))


CASES = [  # B, Hq, Hkv, n, m, d, e, options
    (1, 1, 1, 128, 128, 128, 128, {}),
    (1, 2, 2, 128, 128, 64, 64, {}),
    (2, 4, 2, 300, 300, 128, 128, {"causal": True}),
    (2, 4, 1, 257, 513, 64, 64, {"causal": True, "return_lse": True}),
    (1, 2, 2, 513, 257, 128, 64, {"causal": True, "return_lse": True}),
    (1, 4, 2, 400, 650, 128, 128, {"window": (100, 30), "softcap": 3.0, "sink": True, "return_lse": True}),
    (1, 4, 2, 400, 650, 64, 64, {"window": (70, None), "offset": 40, "sink": True, "return_lse": True}),
    (1, 2, 1, 200, 300, 72, 40, {"bias": True, "mask": True, "causal": True, "return_lse": True}),
    (2, 2, 1, 150, 300, 128, 128, {"bias": True, "mask": True, "softcap": 2.0, "return_lse": True}),
    (1, 3, 3, 70, 90, 37, 19, {"causal": True, "scale": 0.3}),
    (1, 2, 1, 60, 130, 200, 300, {"softcap": 2.0, "sink": True, "return_lse": True}),
    (2, 8, 2, 1, 1000, 128, 128, {"return_lse": True, "sink": True}),
    (2, 8, 2, 4, 700, 128, 128, {"causal": True, "return_lse": True}),
    (1, 4, 4, 3, 600, 64, 64, {"window": (200, 0), "softcap": 2.0, "return_lse": True}),
]


def draw(case, dtype, rng):
    B, Hq, Hkv, n, m, d, e, options = case
    options = dict(options)

    def array(*shape):
        return rng.standard_normal(shape).astype(np.float32).astype(DTYPES[dtype])

    call = {"q": array(B, Hq, n, d), "k": array(B, Hkv, m, d), "v": array(B, Hkv, m, e)}
    if options.pop("mask", False):
        mask = rng.random((B, 1, n, m)) < 0.5
        mask[..., : n // 2, m // 4 :] = False
        mask[..., 5, :] = False
        call["mask"] = mask
    if options.pop("bias", False):
        call["bias"] = array(Hq, n, m)
        call["bias"][..., 7, ::3] = -np.inf
    if options.pop("sink", False):
        call["sink"] = array(Hq)
    return call, options


def on_device(call):
    return {name: cp.asarray(x) for name, x in call.items()}


def check(dtypes=KINDS, cases=CASES, gradients=True):
    """Every path, by the bound of the chapter, and the gradient by its relative error."""
    rng = np.random.default_rng(int(time.time()))
    for dtype in dtypes:
        for case in cases:
            try:
                call, options = draw(case, dtype, rng)
                wide = {name: x if x.dtype == bool else x.astype(np.float64) for name, x in call.items()}
                want, limit = refimpl.attention(**wide, **options), None
                unit, store = (ROUNDOFF[dtype], 0.0) if dtype in ("float64", "float32") else (2.0**-24, ROUNDOFF[dtype])
                limit = chapter.error_bound(**wide, **options, unit=unit, store=store)
                poison = cp.full(1 << 22, cp.nan, cp.float32)
                del poison
                got = mirror.attention(**on_device(call), **options)
                out = []
                several = isinstance(want, tuple)
                for g, w, b in zip(got, want, limit, strict=True) if several else [(got, want, limit)]:
                    g = cp.asnumpy(g).astype(np.float64)
                    both = np.isneginf(w) & np.isneginf(g)
                    w, g = np.where(both, 0, w), np.where(both, 0, g)
                    off = abs(g - w)
                    out.append(
                        f"{np.linalg.norm(off) / np.linalg.norm(w):.1e} ({np.max(off / (b + ROUNDOFF[dtype] * abs(w) + 1e-300)):.2f})"
                    )
                line = f"{dtype:9} {case!s:110} {' '.join(out)}"
                if gradients:
                    names = ("q", "k", "v", "bias", "sink")
                    dy = tuple(
                        rng.standard_normal(np.shape(w)).astype(np.float32).astype(DTYPES[dtype]) for w in (want if several else (want,))
                    )
                    right = refimpl.OPS["attention"].gradient(
                        tuple(x.astype(np.float64) for x in dy) if several else dy[0].astype(np.float64), **wide, **options
                    )
                    mine = mirror.attention_vjp(tuple(map(cp.asarray, dy)) if several else cp.asarray(dy[0]), **on_device(call), **options)
                    for name in names:
                        if name in right:
                            g, w = cp.asnumpy(mine[name]).astype(np.float64), right[name]
                            line += f" d{name} {np.linalg.norm(g - w) / np.linalg.norm(w):.1e}"
                print(line, flush=True)
            except Exception as error:
                print(f"{dtype:9} {case} FAILED {type(error).__name__}: {str(error)[:1500]}", flush=True)


def times(function, sets, inner=8, repeat=7, events=cp.cuda):
    """Median of means over `inner` calls in a row: the host's part of a call hides behind the device's."""
    for i in range(10):
        function(*sets[i % len(sets)])
    found = []
    for _ in range(repeat):
        start, stop = (
            (events.Event(), events.Event()) if events is cp.cuda else (events.Event(enable_timing=True), events.Event(enable_timing=True))
        )
        start.record()
        for i in range(inner):
            function(*sets[i % len(sets)])
        stop.record()
        stop.synchronize()
        found.append(cp.cuda.get_elapsed_time(start, stop) / inner if events is cp.cuda else start.elapsed_time(stop) / inner)
    return statistics.median(found)


class Launches:
    """What a call starts on the device, kept to be started again without the host's part of the call."""

    def __init__(self, function, *arguments):
        original, self.kept = Kernel.__call__, []

        def keep(kernel, grid, block, args, shared=0):
            original(kernel, grid, block, args, shared)
            self.kept.append((_function(kernel, 0), grid, block, args, shared))

        Kernel.__call__ = keep
        try:
            function(*arguments)
        finally:
            Kernel.__call__ = original
        counters = {a.data.ptr: a for launch in self.kept for a in launch[3] if isinstance(a, cp.ndarray) and a.dtype == np.int32}
        stream = cp.cuda.get_current_stream().ptr
        self.clear = [functools.partial(cp.cuda.runtime.memsetAsync, a.data.ptr, 0, a.nbytes, stream) for a in counters.values()]

    def __call__(self):
        for clear in self.clear:
            clear()
        for function, grid, block, args, shared in self.kept:
            function(grid, block, args, shared_mem=shared)


def device_times(function, sets, **how):
    """The same for a function of ours, of its launches alone."""
    launches = [Launches(function, *s) for s in sets]
    return times(lambda launch: launch(), [(x,) for x in launches], **how)


WORK = [  # name, B, Hq, Hkv, n, m, d, causal, target
    ("attention fwd causal", 4, 16, 16, 4096, 4096, 128, True, 0.468),
    ("attention fwd full", 4, 16, 16, 4096, 4096, 128, False, 0.860),
    ("attention fwd causal", 1, 16, 16, 16384, 16384, 128, True, 1.809),
    ("attention fwd causal", 4, 32, 32, 4096, 4096, 64, True, 0.640),
]


def torch_times(arrays, causal, group, gradient=False):
    """torch's kernels on the same arrays: forward, or the gradient alone."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    cp.cuda.Device().synchronize()
    found = {}
    sets = [tuple(torch.from_dlpack(x) for x in s) for s in arrays]
    backends = {"FlashAttention-2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
    if sets[0][0].dtype == torch.float32:
        backends = {"efficient": SDPBackend.EFFICIENT_ATTENTION}
    sdpa = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=causal, enable_gqa=group)
    for name, backend in backends.items():
        try:
            with sdpa_kernel(backend):
                if not gradient:
                    found[name] = times(sdpa, sets, events=torch.cuda)
                    continue
                q, k, v = (x.clone().requires_grad_() for x in sets[0][:3])
                o = sdpa(q, k, v)
                found[name] = times(
                    lambda o, q, k, v, do: torch.autograd.grad(o, (q, k, v), do, retain_graph=True),
                    [(o, q, k, v, sets[0][3])],
                    events=torch.cuda,
                )
        except Exception as error:
            print(name, str(error)[:300])
    torch.cuda.synchronize()
    return found


def normal(shape, dtype, seed):
    import torch

    torch.manual_seed(seed)
    return cp.from_dlpack(torch.randn(shape, device="cuda", dtype=getattr(torch, dtype)))


def problem(q, k, v, causal):
    return mirror.prepare(q, k, v, causal, None, None, None, None, None, None, None)


def time_forward(results, only=None):
    for name, B, Hq, Hkv, n, m, d, causal, target in WORK[:only]:
        arrays = [
            tuple(normal((B, H, s, d), "bfloat16", 3 * i + j) for j, (H, s) in enumerate(((Hq, n), (Hkv, m), (Hkv, m)))) for i in range(2)
        ]
        flops = 4 * B * Hq * n * m * d / (2 if causal else 1)
        problems = [(problem(*s, causal),) for s in arrays]
        found = {"refimpl": device_times(mirror.hopper, problems)}
        found["again"] = device_times(mirror.hopper, problems)
        found |= torch_times(arrays, causal, False)
        results.add("attention", name + " bf16", f"B{B} H{Hq} T{n} d{d}", measure.floor_ms(bf16=flops), found, target=target)


def time_backward(results):
    for causal, target in ((True, 1.360), (False, None)):
        B, Hq, n, d = 4, 16, 4096, 128
        arrays = [tuple(normal((B, Hq, n, d), "bfloat16", j) for j in range(4))]
        q, k, v, do = arrays[0]
        p = problem(q, k, v, causal)
        o, lse = mirror.hopper(p)
        flops = 10 * B * Hq * n * n * d / (2 if causal else 1)
        found = {"refimpl": device_times(mirror.hopper_backward, [(p, do, o, lse, None)], inner=4)}
        found |= torch_times(arrays, causal, False, gradient=True)
        results.add(
            "attention",
            f"attention bwd {'causal' if causal else 'full'} bf16",
            f"B{B} H{Hq} T{n} d{d}",
            measure.floor_ms(bf16=flops),
            found,
            target=target,
        )


def time_decode(results):
    B, Hq, Hkv, m, d = 16, 32, 8, 32768, 128
    sets = [tuple(normal(s, "bfloat16", j) for j, s in enumerate(((B, Hq, 1, d), (B, Hkv, m, d), (B, Hkv, m, d))))]
    p = problem(*sets[0], False)
    found = {"refimpl": device_times(mirror.decode, [(p,)])}
    found["copy of as many bytes"] = times(cp.copyto, [(cp.empty_like(sets[0][1]), sets[0][1])])
    found |= torch_times(sets, False, True)
    bytes = 2 * B * Hkv * m * d * 2
    results.add("attention", "decode GQA bf16", f"B{B} H{Hq}/{Hkv} T{m} d{d}", measure.floor_ms(bytes=bytes), found, target=0.707)


def time_float32(results):
    B, Hq, n, d = 4, 16, 4096, 128
    sets = [tuple(normal((B, Hq, n, d), "float32", j) for j in range(3))]
    found = {"refimpl": device_times(mirror.tiled, [(problem(*sets[0], True),)], inner=2, repeat=5)}
    found |= torch_times(sets, True, False)
    results.add(
        "attention", "attention fwd causal fp32", f"B{B} H{Hq} T{n} d{d}", measure.floor_ms(fp32=2 * B * Hq * n * n * d), found, target=6.0
    )


def main(arguments):
    results = measure.Results()
    wanted = arguments[1:] or ["check", "time"]
    print(measure.machine(), flush=True)
    section(functools.partial(compile_all, mirror.KERNELS))
    if "check" in wanted:
        section(check)
    if "time" in wanted:
        for part in (time_forward, time_backward, time_decode, time_float32):
            section(functools.partial(part, results))
    results.write(arguments[0])


if __name__ == "__main__":
    main(sys.argv[1:])
