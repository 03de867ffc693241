"""Scans on a device, checked and then timed: ``python scans.py -o FOLDER [SECTION ...]``; each section in a process of its own.

What is timed is a call of the mirror, with its conversions and allocations, without the host's part. A check compares
a few channels of the timed call with the definition in float64. Variants are other tiles of the same kernel.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import cupy as cp
import ml_dtypes
import numpy as np
import refimpl.gpu
from measure import Results, floor_ms, median_ms
from refimpl.gpu import launch
from refimpl.gpu.recurrence import causal_conv1d, linear_recurrence, rg_lru
from refimpl.gpu.state_space import selective_scan

import refimpl

HALF = ml_dtypes.bfloat16
CHANNELS = 2  # that a check looks at
WALK = [(2, 8, 8, 3), (2, 8, 16, 3), (2, 16, 8, 3)]
SPLIT = [(1, 16, 16, 2), (1, 32, 16, 1)]
LINES = [(1, 4, 1, 32), (1, 8, 1, 16), (1, 8, 1, 24), (1, 8, 1, 32)]
SELECTIVE = [(2, 8, 128, 8, 3, 1), (2, 8, 128, 8, 2, 1), (4, 4, 128, 8, 2, 2)]
GRADIENT = [(4, 4, 256, 16, 2), (4, 4, 128, 16, 4)]


def normal(rng, shape, dtype="float32"):
    return rng.standard_normal(shape, dtype=cp.float32).astype(dtype)


def uniform(rng, shape, low, dtype="float32"):
    return (low + (1 - low) * rng.random(shape, dtype=cp.float32)).astype(dtype)


def time_contiguous(x):
    return cp.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)


def wide(x):
    """On the host, in float64."""
    return cp.asnumpy(x.astype(cp.float32) if x.dtype.itemsize == 2 else x).astype(np.float64)


def error(got, want) -> float:
    return float(np.linalg.norm(wide(got) - want) / np.linalg.norm(want))


@contextlib.contextmanager
def planned(module, name, plan):
    """Other tiles than the module chooses."""
    kept = getattr(module, name)
    setattr(module, name, plan)
    try:
        yield
    finally:
        setattr(module, name, kept)


def without_strips():
    """The selective scan's kernels for every type in place of those for bfloat16."""
    return planned(selective_scan._Prepared, "strips", 0)


def scans(results: Results) -> None:
    rng, f = cp.random.default_rng(0), refimpl.gpu.linear_recurrence
    for N, T, c in [(8, 2048, 2048), (8, 16384, 1024), (1, 65536, 256), (1, 1 << 20, 32)]:
        shape = f"B{N} T{T} C{c} float32"
        sets = [(uniform(rng, (N, T, c), 0.8), normal(rng, (N, T, c))) for _ in range(3)]
        few = [wide(x[:1, :, :CHANNELS]) for x in sets[0]]
        checked = error(f(*sets[0])[:1, :, :CHANNELS], refimpl.linear_recurrence(*few))
        copies = [(cp.empty((N, T, c), "float32"), a) for a, _ in sets]
        times = {"1.5 copies": 1.5 * median_ms(cp.copyto, copies), "ours": median_ms(f, sets), "ours again": median_ms(f, sets)}
        name, tiles = ("walking", WALK) if N > 1 else ("splitting", SPLIT)
        for numbers in tiles:
            plan = linear_recurrence.Tiles(*numbers)
            with planned(linear_recurrence, name, lambda policy, dtype, plan=plan, many=N > 1: (plan,) if many else plan):
                times[f"{name} {numbers}"] = median_ms(f, sets, repeat=15)
        floor = floor_ms(bytes=12 * N * T * c)
        results.add("linear_recurrence", "forward, rows", shape, floor, times, error=checked)
        lines = [tuple(map(time_contiguous, s)) for s in sets]
        times = {"ours": median_ms(f, lines)}
        for numbers in LINES if N > 1 else ():
            plan = linear_recurrence.Tiles(*numbers)
            with planned(linear_recurrence, "along_lines", lambda policy, dtype, plan=plan: (plan, plan)):
                times[f"lines {numbers}"] = median_ms(f, lines, repeat=15)
        results.add("linear_recurrence", "forward, lines", shape, floor, times)
        del lines, copies
        backwards = median_ms(refimpl.gpu.linear_recurrence_vjp, [(b, a, b) for a, b in sets], repeat=10)
        results.add("linear_recurrence", "gradient, rows", shape, floor_ms(bytes=32 * N * T * c), {"ours": backwards})


def mamba(rng, N, T, c, n, dtype):
    """u, delta, A, B, C, D, z, delta_bias."""
    A = (-cp.exp(rng.standard_normal((c, n), dtype=cp.float32))).astype(dtype)
    arrays = [normal(rng, shape, dtype) for shape in ((N, T, c), (N, T, c), (N, T, n), (N, T, n), (c,), (N, T, c), (c,))]
    return (*arrays[:2], A, *arrays[2:])


def _slice(x, T, c):
    """Of one argument, what the first sequence's first channels need: 2048 steps of them."""
    if x.shape[:1] == (c,):
        return x[:CHANNELS]
    return x[:1, :2048, :CHANNELS] if x.shape[1:] == (T, c) else x[:1, :2048]


def selective(results: Results) -> None:
    rng, Tiles = cp.random.default_rng(0), selective_scan.Tiles
    forward = lambda *a: refimpl.gpu.selective_scan(*a, delta_softplus=True)
    backward = lambda *a: refimpl.gpu.selective_scan_vjp(a[0], *a, delta_softplus=True)
    cases = [((8, 2048, 2048, 16), HALF), ((4, 2048, 2048, 16), HALF), ((8, 2048, 2048, 16), np.float32), ((1, 65536, 2048, 16), HALF)]
    for (N, T, c, n), dtype in cases:
        shape, size = f"B{N} T{T} C{c} N{n} {np.dtype(dtype).name}", np.dtype(dtype).itemsize
        sets = [mamba(rng, N, T, c, n, dtype) for _ in range(3 if N > 1 else 2)]
        want = refimpl.selective_scan(*(wide(_slice(x, T, c)) for x in sets[0]), delta_softplus=True)
        checked = error(forward(*sets[0])[:1, :2048, :CHANNELS], want)
        times = {"ours": median_ms(forward, sets), "ours again": median_ms(forward, sets)}
        for numbers in SELECTIVE:
            with planned(selective_scan, "FAST", selective_scan.FAST | {16: Tiles(*numbers)}), without_strips():
                times[str(numbers)] = median_ms(forward, sets, repeat=12)
        floor = floor_ms(bytes=4 * size * N * T * c, exps=(n + 3) * N * T * c)
        results.add("selective_scan", "forward, z D softplus", shape, floor, times, error=checked)
        if N > 1:
            times = {"ours": median_ms(backward, sets, repeat=10)}
            for numbers in GRADIENT:
                plan = selective_scan.FAST_GRADIENT | {16: Tiles(*numbers)}
                with planned(selective_scan, "FAST_GRADIENT", plan), without_strips():
                    times[f"sums over lanes {numbers}"] = median_ms(backward, sets, repeat=10)
            floor = floor_ms(bytes=8 * size * N * T * c, exps=(2 * n + 4) * N * T * c)
            results.add("selective_scan", "gradient, z D softplus", shape, floor, times)
        del sets


def small(results: Results) -> None:
    rng, (N, T, c) = cp.random.default_rng(0), (8, 2048, 2048)
    convolve = lambda x, w, b: refimpl.gpu.causal_conv1d(x, w, b, activation="silu")
    back = lambda x, w, b: refimpl.gpu.causal_conv1d_vjp(x, x, w, b, activation="silu")
    for dtype in (np.float32, HALF):
        name, size = np.dtype(dtype).name, np.dtype(dtype).itemsize * N * T * c
        sets = [(normal(rng, (N, T, c), dtype), normal(rng, (c, 4), dtype), normal(rng, (c,), dtype)) for _ in range(3)]
        lines = [(time_contiguous(x), w, b) for x, w, b in sets]
        for work, f, bytes in (("forward", convolve, 2 * size), ("gradient", back, 3 * size)):
            times = {"rows": median_ms(f, sets), "lines": median_ms(f, lines)}
            results.add("causal_conv1d", work, f"B{N} T{T} C{c} W4 {name}", floor_ms(bytes=bytes), times)
        del sets, lines
        gates = [
            (
                normal(rng, (N, T, c), dtype),
                uniform(rng, (N, T, c), 0.1, dtype),
                uniform(rng, (N, T, c), 0.1, dtype),
                -uniform(rng, (c,), 0.1, dtype),
            )
            for _ in range(2)
        ]
        for work, f, bytes in (
            ("forward", refimpl.gpu.rg_lru, 4 * size),
            ("gradient", lambda *a: refimpl.gpu.rg_lru_vjp(a[0], *a), 8 * size),
        ):
            results.add("rg_lru", work, f"B{N} T{T} C{c} {name}", floor_ms(bytes=bytes), {"ours": median_ms(f, gates, repeat=10)})


def kit(results: Results) -> None:
    for op in ("linear_recurrence", "selective_scan", "causal_conv1d", "rg_lru", "discretize_diagonal", "discretize"):
        report = refimpl.check(
            op, getattr(refimpl.gpu, op), framework="cupy", dtypes=("float32", "float64", "bfloat16", "float16"),
            gradients=True, candidate_vjp=getattr(refimpl.gpu, f"{op}_vjp"), level="standard",
        )  # fmt: skip
        print(op, report.verdict if report.verdict == "conforms" else str(report)[:2500], flush=True)


SECTIONS = {"scans": scans, "selective": selective, "small": small, "kit": kit}


def compile_ahead() -> None:
    """Every kernel that is measured, at once on all cores, where they would be compiled one by one when first used."""
    found = [*linear_recurrence.KERNELS, *selective_scan.KERNELS, *causal_conv1d.KERNELS, *rg_lru.KERNELS]
    for make, plans in ((linear_recurrence._walk, WALK), (linear_recurrence._split, SPLIT), (linear_recurrence._lines, LINES)):
        found += [make("Forward", "float32", linear_recurrence.Tiles(*numbers)) for numbers in plans]
    for types in (("bfloat16", "bfloat16", "float32"), ("float32", "float32", "float32")):
        found += [selective_scan._kernel(mode, types, selective_scan.Tiles(*t)) for t in SELECTIVE for mode in ("RESULTS", "STATES")]
        found += [selective_scan._gradient_kernel(types, selective_scan.Tiles(*t)) for t in GRADIENT]

    def one(kernel):
        with cp.cuda.Device(0):
            launch._function(kernel, 0)

    start = time.time()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, dict.fromkeys(found)))
    print(f"compiled in {time.time() - start:.1f} s", flush=True)


def main(arguments) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", help="folder for the results, a file a section, and for what was printed")
    parser.add_argument("--alone", action="store_true", help="run one section in this process")
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=[])
    chosen = parser.parse_args(arguments)
    if chosen.alone:
        (name,), results = chosen.sections, Results()
        SECTIONS[name](results)
        if chosen.o and results.rows:
            results.write(f"{chosen.o}/{name}.json")
        return
    compile_ahead()
    for name in chosen.sections or SECTIONS:
        command = [sys.executable, __file__, "--alone", *(["-o", chosen.o] if chosen.o else []), name]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if chosen.o:
            with open(f"{chosen.o}/log.txt", "a", encoding="utf-8") as log:
                log.write(f"== {name}\n{done.stdout}\n")
        print(f"== {name}, status {done.returncode}\n{done.stdout[-3500:] if done.returncode == 0 else done.stdout[:2500]}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
