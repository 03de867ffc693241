"""Scans on a device: checked first against float64, then timed. ``python scans.py [-o results.json] [SECTION ...]``"""

import argparse
import os
import subprocess
import sys
import time
import traceback

import cupy as cp
import ml_dtypes
import numpy as np
from measure import Results, floor_ms, median_ms

import refimpl

RESULTS = Results()
HALF = ml_dtypes.bfloat16


def arrays(rng, shape, dtype, count=1, low=None):
    """Device arrays of normal numbers, or uniform ones in [low, 1)."""
    def one():
        x = rng.standard_normal(shape, dtype=cp.float32) if low is None else low + (1 - low) * rng.random(shape, dtype=cp.float32)
        return x.astype(dtype)
    return [one() for _ in range(count)]


def compile_ahead(kernels):
    """All at once, on all cores, where they would be compiled one by one when first used."""
    from concurrent.futures import ThreadPoolExecutor

    from refimpl.gpu import launch

    def one(kernel):
        try:
            with cp.cuda.Device(0):
                launch._function(kernel, 0)
        except Exception as e:
            print("does not compile:", kernel.name, str(e)[:500], flush=True)

    start = time.time()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, kernels))
    print(f"compiled {len(kernels)} in {time.time() - start:.1f} s", flush=True)


def error(got, want):
    got = got.astype(np.float64) if isinstance(got, np.ndarray) else cp.asnumpy(got.astype(cp.float32) if got.dtype.itemsize == 2 else got).astype(np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def check_kit(name, dtypes, **options):
    import refimpl.gpu

    start = time.time()
    report = refimpl.check(name, getattr(refimpl.gpu, name), framework="cupy", dtypes=dtypes, gradients=True, candidate_vjp=getattr(refimpl.gpu, name + "_vjp"), **options)
    print(f"KIT {name} {dtypes}: {report.verdict} in {time.time() - start:.1f} s", flush=True)
    if report.verdict != "conforms":
        print(str(report)[:2500], flush=True)


def kit_of(*names, dtypes=("float32", "float64", "bfloat16", "float16"), level="quick"):
    def section():
        for name in names:
            try:
                check_kit(name, list(dtypes), level=level)
            except Exception:
                traceback.print_exc(limit=-4)
    return section


def linear_large():
    """Against the float64 definition at sizes that take every path: both layouts, few and many channels, odd T."""
    import refimpl.gpu

    rng = np.random.default_rng(1)
    for (N, T, c), lines, reverse in [((3, 1000, 256), False, False), ((3, 1000, 256), False, True), ((2, 5001, 37), False, False), ((3, 4096, 33), True, False),
                                       ((3, 1001, 70), True, True), ((1, 20000, 64), False, True), ((1, 20000, 8), True, False), ((130, 300, 128), False, False)]:  # fmt: skip
        a, b, s = rng.uniform(0.8, 1, (N, T, c)), rng.standard_normal((N, T, c)), rng.standard_normal((N, c))
        dy, ds = rng.standard_normal((N, T, c)), rng.standard_normal((N, c))
        want, last = refimpl.linear_recurrence(a, b, state=s, reverse=reverse, return_state=True)
        grads = refimpl.ops.recurrence.linear_recurrence.linear_recurrence_vjp(dy, a, b, state=s, reverse=reverse, dstate=ds)
        def dev(x):
            x = cp.asarray(x.astype(np.float32))
            return cp.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2) if lines and x.ndim == 3 else x
        args = [dev(a), dev(b)]
        got, gl = refimpl.gpu.linear_recurrence(*args, state=dev(s), reverse=reverse, return_state=True)
        again = refimpl.gpu.linear_recurrence(*args, state=dev(s), reverse=reverse)
        g = refimpl.gpu.linear_recurrence_vjp(dev(dy), *args, state=dev(s), reverse=reverse, dstate=dev(ds))
        print("linear", (N, T, c), "lines" if lines else "rows", reverse, f"h {error(got, want):.1e} last {error(gl, last):.1e}", "same" if bool((got == again).all()) else "DIFFERS",
              {k: f"{error(g[k], grads[k]):.1e}" for k in g}, flush=True)  # fmt: skip


def selective_large():
    import refimpl.gpu
    from refimpl.ops.state_space.selective_scan import selective_scan_chunked, selective_scan_vjp

    rng = np.random.default_rng(2)
    for (N, T, c, n), dtype in [((2, 150, 128, 16), np.float32), ((2, 150, 72, 16), np.float32), ((1, 700, 16, 16), np.float32), ((1, 100, 64, 64), np.float32), ((1, 70, 32, 100), np.float32),
                                ((2, 100, 64, 3), np.float32), ((2, 150, 128, 16), HALF), ((40, 40, 256, 16), np.float32), ((2, 60, 40, 20), np.float64)]:  # fmt: skip
        make = lambda *shape: rng.standard_normal(shape)
        call = {"u": make(N, T, c), "delta": make(N, T, c) - 1, "A": -np.exp(make(c, n)), "B": make(N, T, n), "C": make(N, T, n), "D": make(c), "z": make(N, T, c), "delta_bias": make(c), "state": make(N, c, n)}
        call = {k: v.astype(dtype) if k != "state" else v.astype(np.float64 if dtype is np.float64 else np.float32) for k, v in call.items()}
        exact = {k: v.astype(np.float64) for k, v in call.items()}
        dy, ds = make(N, T, c).astype(dtype), make(N, c, n).astype(call["state"].dtype)
        want, last = selective_scan_chunked(**exact, delta_softplus=True, return_state=True)
        grads = selective_scan_vjp(dy.astype(np.float64), **exact, delta_softplus=True, dstate=ds.astype(np.float64))
        dev = {k: cp.asarray(v) for k, v in call.items()}
        got, gl = refimpl.gpu.selective_scan(**dev, delta_softplus=True, return_state=True)
        g = refimpl.gpu.selective_scan_vjp(cp.asarray(dy), **dev, delta_softplus=True, dstate=cp.asarray(ds))
        print("selective", (N, T, c, n), np.dtype(dtype).name, f"y {error(got, want):.1e} last {error(gl, last):.1e}", {k: f"{error(g[k], grads[k]):.1e}" for k in g}, flush=True)


def time_linear():
    import refimpl.gpu
    from refimpl.gpu.recurrence import linear_recurrence as module

    rng = cp.random.default_rng(0)
    for N, T, c in [(8, 2048, 2048), (8, 16384, 1024), (1, 65536, 256), (1, 1 << 20, 32)]:
        sets = [(*arrays(rng, (N, T, c), "float32", low=0.8), *arrays(rng, (N, T, c), "float32")) for _ in range(3)]
        copies = [(cp.empty((N, T, c), "float32"), a) for a, _ in sets]
        copy = median_ms(lambda to, x: cp.copyto(to, x), copies) * 1.5
        times = {"1.5 copies": copy, "ours": median_ms(refimpl.gpu.linear_recurrence, sets), "ours again": median_ms(refimpl.gpu.linear_recurrence, sets)}
        plans = module.walking, module.splitting, module.along_lines
        if N > 1:
            for t in WALK:
                module.walking = lambda policy, dtype, t=module.Tiles(*t): (t,)
                times[f"walk {t}"] = median_ms(refimpl.gpu.linear_recurrence, sets, repeat=15)
        else:
            for t in SPLIT:
                module.splitting = lambda policy, dtype, t=module.Tiles(*t): t
                times[f"split {t}"] = median_ms(refimpl.gpu.linear_recurrence, sets, repeat=15)
        module.walking, module.splitting, module.along_lines = plans
        floor = floor_ms(bytes=12 * N * T * c)
        RESULTS.add("linear_recurrence", "forward, rows", f"B{N} T{T} C{c} float32", floor, times)
        lines = [tuple(cp.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in s) for s in sets]
        times = {"ours": median_ms(refimpl.gpu.linear_recurrence, lines)}
        if N > 1:
            for t in LINES:
                module.along_lines = lambda policy, dtype, t=module.Tiles(*t): (t, t)
                times[f"lines {t}"] = median_ms(refimpl.gpu.linear_recurrence, lines, repeat=15)
            module.along_lines = plans[2]
        RESULTS.add("linear_recurrence", "forward, lines", f"B{N} T{T} C{c} float32", floor, times)
        del lines
        grads = [(b, a, b) for a, b in sets]
        times = {"ours": median_ms(refimpl.gpu.linear_recurrence_vjp, grads, repeat=10)}
        if N > 1:
            for t in BACK:
                module.walking = lambda policy, dtype, t=module.Tiles(*t): (t,) if policy == "Adjoint" else plans[0](policy, dtype)
                times[f"back {t}"] = median_ms(refimpl.gpu.linear_recurrence_vjp, grads, repeat=10)
            module.walking = plans[0]
        RESULTS.add("linear_recurrence", "gradient, rows", f"B{N} T{T} C{c} float32", floor_ms(bytes=32 * N * T * c), times)
        del sets, copies, grads


def mamba(rng, N, T, c, n, dtype, count):
    make = lambda *shape: arrays(rng, shape, dtype)[0]
    shared = {"A": -cp.exp(rng.standard_normal((c, n), dtype=cp.float32)), "D": rng.standard_normal(c, dtype=cp.float32), "bias": rng.standard_normal(c, dtype=cp.float32)}
    shared = {k: v.astype(dtype) for k, v in shared.items()}
    return [(make(N, T, c), make(N, T, c), shared["A"], make(N, T, n), make(N, T, n), shared["D"], make(N, T, c), shared["bias"]) for _ in range(count)]


def time_selective():
    import refimpl.gpu
    from refimpl.gpu.state_space import selective_scan as module

    rng = cp.random.default_rng(0)
    Tiles = module.Tiles
    call = lambda *a: refimpl.gpu.selective_scan(*a, delta_softplus=True)
    for (N, T, c, n), dtype, variants in [
        ((8, 2048, 2048, 16), HALF, TIMED),
        ((8, 2048, 2048, 16), np.float32, TIMED),
        ((1, 65536, 2048, 16), HALF, [(S, t) for S in (8, 16) for t in TIMED[:4]]),
    ]:
        sets = mamba(rng, N, T, c, n, dtype, 3 if N > 1 else 2)
        size = np.dtype(dtype).itemsize
        times = {"ours": median_ms(call, sets), "ours again": median_ms(call, sets)}
        plan, segments = module.FAST[16], module._segments
        for variant in variants:
            S, numbers = variant if isinstance(variant[1], tuple) else (None, variant)
            try:
                module.FAST[16] = Tiles(*numbers)
                module._segments = segments if S is None else lambda p, tiles, S=S: (S, p.T // S)
                times[str(variant)] = median_ms(call, sets, repeat=12)
            except Exception as e:
                print("variant", variant, str(e)[:300])
        module.FAST[16], module._segments = plan, segments
        RESULTS.add("selective_scan", "forward, z D softplus", f"B{N} T{T} C{c} N{n} {np.dtype(dtype).name}", floor_ms(bytes=4 * size * N * T * c, exps=(n + 4) * N * T * c), times)
        if N > 1 and dtype is HALF:
            times = {}
            backward = lambda *a: refimpl.gpu.selective_scan_vjp(a[0], *a, delta_softplus=True)
            for numbers in TIMED_GRADIENTS:
                try:
                    module.FAST_GRADIENT[16] = Tiles(*numbers)
                    times[str(numbers)] = median_ms(backward, sets, repeat=10)
                except Exception as e:
                    print("variant", numbers, str(e)[:300])
            module.FAST_GRADIENT[16] = Tiles(4, 4, 256, 16, 2)
            RESULTS.add("selective_scan", "gradient, z D softplus", f"B{N} T{T} C{c} N{n} {np.dtype(dtype).name}", floor_ms(bytes=8 * size * N * T * c, exps=36 * N * T * c), times)
        del sets


def time_small():
    import refimpl.gpu

    rng = cp.random.default_rng(0)
    N, T, c = 8, 2048, 2048
    for dtype in (np.float32, HALF):
        size = np.dtype(dtype).itemsize
        sets = [tuple(arrays(rng, (N, T, c), dtype)) + (arrays(rng, (c, 4), dtype)[0], arrays(rng, (c,), dtype)[0]) for _ in range(3)]
        call = lambda x, w, b: refimpl.gpu.causal_conv1d(x, w, b, activation="silu")
        back = lambda x, w, b: refimpl.gpu.causal_conv1d_vjp(x, x, w, b, activation="silu")
        lines = [(cp.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2), w, b) for x, w, b in sets]
        shape = f"B{N} T{T} C{c} W4 {np.dtype(dtype).name}"
        RESULTS.add("causal_conv1d", "forward", shape, floor_ms(bytes=2 * size * N * T * c), {"rows": median_ms(call, sets), "lines": median_ms(call, lines)})
        RESULTS.add("causal_conv1d", "gradient", shape, floor_ms(bytes=3 * size * N * T * c), {"rows": median_ms(back, sets), "lines": median_ms(back, lines)})
        sets = [(*arrays(rng, (N, T, c), dtype), *arrays(rng, (N, T, c), dtype, 2, low=0.1), -arrays(rng, (c,), dtype, low=0.1)[0]) for _ in range(2)]
        RESULTS.add("rg_lru", "forward", f"B{N} T{T} C{c} {np.dtype(dtype).name}", floor_ms(bytes=4 * size * N * T * c), {"ours": median_ms(refimpl.gpu.rg_lru, sets)})
        RESULTS.add("rg_lru", "gradient", f"B{N} T{T} C{c} {np.dtype(dtype).name}", floor_ms(bytes=8 * size * N * T * c), {"ours": median_ms(lambda *a: refimpl.gpu.rg_lru_vjp(a[0], *a), sets, repeat=8)})


WALK = [(2, 8, 8, 3), (2, 8, 8, 2), (2, 16, 8, 2), (1, 16, 8, 3), (4, 8, 8, 2), (4, 8, 4, 3), (2, 8, 16, 3), (2, 8, 4, 4), (1, 16, 16, 2)]
SPLIT = [(1, 16, 16, 2), (1, 8, 16, 2), (2, 8, 16, 1), (1, 16, 16, 1), (1, 24, 16, 1), (1, 16, 32, 1), (1, 32, 16, 1)]
LINES = [(1, 4, 1, 16), (1, 4, 1, 24), (1, 4, 1, 32), (1, 8, 1, 12), (1, 8, 1, 16), (1, 4, 2, 10), (1, 4, 4, 6), (1, 8, 8, 2)]
BACK = [(2, 8, 8, 2), (1, 8, 8, 3), (1, 16, 8, 2), (2, 4, 8, 3), (2, 8, 4, 3), (2, 4, 16, 2)]
TIMED = [(4, 4, 128, 32, 2, 2), (4, 4, 128, 32, 3, 2), (4, 4, 256, 32, 2, 1), (4, 4, 128, 32, 4, 1), (4, 4, 256, 16, 2, 1), (4, 4, 128, 16, 3, 2), (4, 4, 64, 32, 4, 2), (2, 8, 128, 32, 2, 1)]
TIMED_GRADIENTS = [(4, 4, 256, 16, 2), (4, 4, 128, 16, 3), (4, 4, 128, 16, 4), (4, 4, 256, 32, 1), (8, 2, 256, 16, 2)]


def needed():
    """Every kernel of the mirror that is measured here, and the variants."""
    from refimpl.gpu.recurrence import causal_conv1d, linear_recurrence, rg_lru
    from refimpl.gpu.state_space import selective_scan

    found = [*linear_recurrence.KERNELS, *selective_scan.KERNELS, *causal_conv1d.KERNELS, *rg_lru.KERNELS]
    Tiles = linear_recurrence.Tiles
    for make, policy, plans in (("_walk", "Forward", WALK), ("_split", "Forward", SPLIT), ("_lines", "Forward", LINES), ("_walk", "Adjoint", BACK)):
        found += [getattr(linear_recurrence, make)(policy, "float32", Tiles(*t)) for t in plans]
    for numbers in TIMED:
        tiles = selective_scan.Tiles(*numbers)
        for types in (("bfloat16", "bfloat16", "float32"), ("float32", "float32", "float32")):
            found += [selective_scan._kernel("RESULTS", types, tiles), selective_scan._kernel("STATES", types, tiles)]
    found += [selective_scan._gradient_kernel(("bfloat16", "bfloat16", "float32"), selective_scan.Tiles(*t)) for t in TIMED_GRADIENTS]
    return list(dict.fromkeys(found))


SECTIONS = {
    "linear_large": linear_large,
    "selective_large": selective_large,
    "time_linear": time_linear,
    "time_selective": time_selective,
    "kit": kit_of("linear_recurrence", "selective_scan", "causal_conv1d", "rg_lru", "discretize_diagonal", "discretize"),
    "time_small": time_small,
    "standard": kit_of("linear_recurrence", "selective_scan", "causal_conv1d", "rg_lru", "discretize", level="standard"),
}


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", help="folder for the results, a file a section, and what was printed")
    parser.add_argument("--alone", action="store_true", help="run one section here; else each runs in a process of its own")
    parser.add_argument("sections", nargs="*", default=list(SECTIONS))
    chosen = parser.parse_args(arguments)
    if chosen.alone:
        (name,) = chosen.sections
        SECTIONS[name]()
        if chosen.o and RESULTS.rows:
            RESULTS.write(f"{chosen.o}/{name}.json")
        return
    compile_ahead(needed())
    for name in chosen.sections or SECTIONS:
        start = time.time()
        print(f"== {name}", flush=True)
        done = subprocess.run([sys.executable, __file__, "--alone", *(["-o", chosen.o] if chosen.o else []), name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if chosen.o:
            with open(f"{chosen.o}/log.txt", "a", encoding="utf-8") as log:
                log.write(f"== {name}\n{done.stdout}\n")
        print(done.stdout[-3500:] if done.returncode == 0 else done.stdout[:2500], flush=True)
        print(f"== {name}: {time.time() - start:.1f} s, {done.returncode}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
