"""A matrix memory in chunks against the fused recurrence, on a device: python chunkwise.py FOLDER [PART ...]

In one run, in this order, each part by itself so that one that fails costs no other: `compile` (kernels, all cores at once), `tensor`
(the kernel on tensor cores, and under the kit at level standard), `gradients` (the same of its gradients), `agree` (all methods at
sizes of the kit's and at large ones, against the definition in float64 and each other, and the stream test), `time` (all methods,
forward and gradient, chunks of 64 and 128), `kit` (level quick under the kit, each operator and precision). `FOLDER/chunkwise.json` has
the rows, `FOLDER/kit-*.txt` the reports.
"""

import functools
import multiprocessing
import subprocess
import sys
import time
import traceback
from pathlib import Path

import cupy as cp
import ml_dtypes
import numpy as np
import refimpl.gpu
from measure import Results, hold_back, median_ms
from mirrored import normal, uniform

import refimpl

BF16 = np.dtype(ml_dtypes.bfloat16)
METHODS = {
    "fused": {"method": "fused"},
    "chunks of 64": {"method": "chunkwise", "chunk_length": 64},
    "chunks of 128": {"method": "chunkwise", "chunk_length": 128},
    "tensor": {"method": "tensor"},
}


def ssd(dtype, B=8, H=32, T=8192, p=64, n=128):
    return {
        "x": normal(B, H, T, p, dtype=dtype), "dt": uniform(0.001, 0.1, B, H, T, dtype=dtype), "A": -uniform(1, 16, H, dtype=dtype),
        "B": normal(B, 1, T, n, dtype=dtype), "C": normal(B, 1, T, n, dtype=dtype), "D": normal(H, dtype=dtype),
    }  # fmt: skip


def mlstm(dtype, B=8, H=8, T=4096, d=128, e=256):
    return {
        "q": normal(B, H, T, d, dtype=dtype), "k": normal(B, H, T, d, dtype=dtype), "v": normal(B, H, T, e, dtype=dtype),
        "i": normal(B, H, T, dtype=dtype), "f": (3 + normal(B, H, T)).astype(dtype),
    }  # fmt: skip


def linear_attention(dtype, B=8, H=16, T=4096, d=128, kind="retention"):
    call = {
        "q": normal(B, H, T, d, dtype=dtype), "k": normal(B, H, T, d, dtype=dtype, scale=d**-0.5), "v": normal(B, H, T, d, dtype=dtype),
        "decay": -uniform(0.001, 0.05, B, H, T, *((d,) if kind == "per channel" else ()), dtype=dtype),
    }  # fmt: skip
    return call | ({"beta": uniform(0, 1, B, H, T, dtype=dtype)} if kind == "delta rule" else {})


ROWS = (  # operator, work, call of a dtype, floor, target, peer
    ("ssd", "Mamba-2", ssd, 0.18, 0.7, "mamba_ssm 1.43, gradient 4.56"),
    ("mlstm", "mLSTM", mlstm, 0.13, 0.6, "mlstm_kernels 1.14, gradient 2.65"),
    ("linear_attention", "retention", linear_attention, 0.18, 0.4, "fla 0.704"),
    ("linear_attention", "per channel", functools.partial(linear_attention, kind="per channel"), 0.22, 0.6, "fla 1.585"),
    ("linear_attention", "delta rule", functools.partial(linear_attention, kind="delta rule"), 0.18, None, None),
)


def first(y):
    return y[0] if isinstance(y, tuple) else y


def wide(x):
    return x.astype(cp.float32) if x.dtype.itemsize == 2 else x


def difference(a, b) -> float:
    """Largest difference, relative to the largest value, where a half can hold what it should be."""
    held = abs(b) < (65504 if a.dtype == np.float16 else np.inf)
    a, b = wide(a)[held], wide(b)[held]
    return float(abs(a - b).max() / abs(b).max())


def agree(results: Results) -> None:
    """Both methods at a length that is no multiple of a chunk: results and every gradient; and at the full size, results alone."""
    small = {"ssd": {"B": 2, "H": 4, "T": 777}, "mlstm": {"B": 2, "H": 2, "T": 777}, "linear_attention": {"B": 2, "H": 2, "T": 777}}
    for op, work, make, *_ in ROWS:
        f, vjp = getattr(refimpl.gpu, op), getattr(refimpl.gpu, f"{op}_vjp")
        for dtype in (np.dtype(np.float64), np.dtype(np.float32), BF16, np.dtype(np.float16)):
            try:
                call = make(dtype, **small[op])
                exact = {name: wide(x).astype(cp.float64) for name, x in call.items()}
                want = f(**exact)
                want_vjp = vjp(want, **exact)
                found = {}
                for name, more in METHODS.items():
                    y = f(**call, **more)
                    gradients = vjp(y, **call, **more)
                    found[name] = {"y": difference(y, want)} | {k: difference(g, want_vjp[k]) for k, g in gradients.items()}
                worst = {name: max(v.values()) for name, v in found.items()}
                results.rows.append({"operator": op, "work": work, "dtype": dtype.name, "errors": found})
                print(f"agree {op} {work} {dtype.name}: {worst}", flush=True)
            except Exception:
                print(f"agree {op} {work} {dtype.name}: {traceback.format_exc()}"[-2500:], flush=True)
        waits_for_nothing(op, make)


def waits_for_nothing(op: str, make) -> None:
    """The call comes back while the stream is still busy."""
    call, f = make(np.dtype(np.float32), B=1, T=512), functools.partial(getattr(refimpl.gpu, op), method="chunkwise")
    try:
        first(f(**call))
        cp.cuda.get_current_stream().synchronize()
        event = cp.cuda.Event()
        hold_back(400_000_000)
        f(**call)
        event.record()
        print(f"waits for nothing {op}: {not event.done}", flush=True)
        cp.cuda.get_current_stream().synchronize()
    except Exception:
        print(f"waits for nothing {op}: {traceback.format_exc()}"[-1500:], flush=True)


def timed(results: Results) -> None:
    for dtype in (BF16, np.dtype(np.float32)):
        for op, work, make, floor, target, peer in ROWS:
            f, vjp = getattr(refimpl.gpu, op), getattr(refimpl.gpu, f"{op}_vjp")
            times, gradients = {}, {}
            try:
                call = make(dtype)
            except Exception:
                print(traceback.format_exc()[-1500:], flush=True)
                continue
            for name, more in METHODS.items():
                try:
                    y = f(**call, **more)
                    times[name] = median_ms(lambda f=f, call=call, more=more: f(**call, **more), [()], 7, 2)
                    if dtype == BF16:
                        gradients[name] = median_ms(lambda vjp=vjp, y=y, call=call, more=more: vjp(y, **call, **more), [()], 3, 1)
                except Exception:
                    print(f"time {op} {work} {name}: {traceback.format_exc()}"[-1500:], flush=True)
                cp.get_default_memory_pool().free_all_blocks()
            shape = " ".join(f"{name}{tuple(x.shape)}" for name, x in call.items())
            more = {"target_ms": target, "peer": peer} if dtype == BF16 else {}
            results.add(op, f"{work}, {dtype.name}", shape, floor, times, **more)
            if gradients:
                results.add(op, f"{work}, {dtype.name}, gradient", shape, 2.2 * floor, gradients, **more)


def conforms(op: str, folder: str) -> None:
    """The kernel on tensor cores under the kit, level standard."""
    f, vjp = (functools.partial(getattr(refimpl.gpu, name), method="tensor") for name in (op, f"{op}_vjp"))
    start = time.time()
    try:
        report = refimpl.check(op, f, framework="cupy", dtypes=["bfloat16"], gradients=True, candidate_vjp=vjp, level="standard")
        text, verdict = str(report), report.verdict
    except Exception as error:
        text, verdict = traceback.format_exc(), type(error).__name__
    Path(folder, f"kit-{op}-tensor.txt").write_text(text, encoding="utf-8")
    print(f"kit {op} tensor: {verdict} ({time.time() - start:.0f} s)\n{text if verdict != 'conforms' else ''}"[:3000], flush=True)


def under_the_kit(ops, folder: Path, seconds: float) -> None:
    """`conforms` of every operator, in processes beside each other, each for so long at most."""
    started = [multiprocessing.get_context("spawn").Process(target=conforms, args=(op, str(folder))) for op in ops]
    for process in started:
        process.start()
    for process in started:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            print("kit: not done in time", flush=True)


def tensor(results: Results, folder: Path) -> None:
    """The kernel on tensor cores: against the definition in float64 at many lengths, under the kit, and timed, whole and by itself."""
    from refimpl.gpu import chunk_tensor

    small = {"ssd": {"B": 2, "H": 4}, "mlstm": {"B": 2, "H": 2}, "linear_attention": {"B": 2, "H": 2}}
    for op, _, make, *_ in ROWS[:3]:
        for T in (1, 63, 64, 65, 777):
            call, f = make(BF16, **small[op], T=T), getattr(refimpl.gpu, op)
            want = f(**{name: wide(x).astype(cp.float64) for name, x in call.items()}, method="fused")
            errors = [difference(f(**call, method=method), want) for method in ("tensor", "chunkwise", "fused")]
            print(f"agree {op} T={T}: tensor, chunkwise, fused {errors}", flush=True)
    read, seen = chunk_tensor.read, []
    for op, work, make, floor, target, peer in ROWS[:3]:
        call, f = make(BF16), getattr(refimpl.gpu, op)
        chunk_tensor.read = lambda *arguments, **more: seen.append((arguments, more)) or read(*arguments, **more)
        one = f(**call, method="tensor")
        chunk_tensor.read = read
        again, (arguments, more) = f(**call, method="tensor"), seen.pop()
        times = {
            name: median_ms(lambda f=f, call=call, how=how: f(**call, **how), [()], 9, 3)
            for name, how in METHODS.items()
            if name != "fused"
        }
        times["the kernel of it"] = median_ms(lambda arguments=arguments, more=more: read(*arguments, **more), [()], 9, 3)
        off = difference(one, f(**call, method="chunkwise"))
        results.add(
            op, f"{work}, bfloat16", "", floor, times, target_ms=target, peer=peer, off_chunkwise=off, same_again=bool((one == again).all())
        )
        vjp, y = getattr(refimpl.gpu, f"{op}_vjp"), again
        times = {
            name: median_ms(lambda vjp=vjp, y=y, call=call, how=how: vjp(y, **call, **how), [()], 5, 1)
            for name, how in METHODS.items()
            if name != "fused"
        }
        results.add(op, f"{work}, bfloat16, gradient", "", 2.2 * floor, times, peer=peer)
        del arguments, more, one, again
        cp.get_default_memory_pool().free_all_blocks()
    under_the_kit(small, folder, seconds=100)


def parts(x):
    return x if isinstance(x, tuple) else (x,)


def kernels_of(function) -> dict[str, float]:
    """Milliseconds of each of the mirror's own kernels in one call, by events around its launches."""
    from refimpl.gpu import launch

    call, seen = launch.Kernel.__call__, []

    def timed(kernel, *arguments, **more):
        events = [cp.cuda.Event(), cp.cuda.Event()]
        events[0].record()
        call(kernel, *arguments, **more)
        events[1].record()
        seen.append((kernel.name, events))

    launch.Kernel.__call__ = timed
    try:
        hold_back()
        function()
        cp.cuda.get_current_stream().synchronize()
    finally:
        launch.Kernel.__call__ = call
    found: dict[str, float] = {}
    for name, (start, stop) in seen:
        found[name] = found.get(name, 0.0) + cp.cuda.get_elapsed_time(start, stop)
    return found


def gradients(results: Results, folder: Path) -> None:
    """Gradients on tensor cores: against the definition's in float64 at many lengths, the same bits twice, timed, whole and kernel by kernel."""
    small = {"ssd": {"B": 2, "H": 4}, "mlstm": {"B": 2, "H": 2}, "linear_attention": {"B": 2, "H": 2}}
    for op, work, make, floor, _, peer in ROWS[:3]:
        f, vjp = getattr(refimpl.gpu, op), getattr(refimpl.gpu, f"{op}_vjp")
        for T in (1, 64, 65, 777):
            try:
                call = make(BF16, **small[op], T=T)
                exact = {name: wide(x).astype(cp.float64) for name, x in call.items()}
                dy = normal(*f(**call, method="tensor").shape, dtype=BF16)
                want = vjp(wide(dy).astype(cp.float64), **exact, method="fused")
                found = {}
                for method in ("tensor", "chunkwise"):
                    got = vjp(dy, **call, method=method)
                    found[method] = {n: max(difference(a, b) for a, b in zip(parts(got[n]), parts(want[n]), strict=True)) for n in call}
                print(f"agree {op} T={T}: {found}", flush=True)
            except Exception:
                print(f"agree {op} T={T}: {traceback.format_exc()}"[-1500:], flush=True)
        try:
            call = make(BF16)
            dy = normal(*f(**call, method="tensor").shape, dtype=BF16)
            runs = [vjp(dy, **call, method="tensor") for _ in range(2)]
            same = all(bool((a == b).all()) for n in call for a, b in zip(*(parts(run[n]) for run in runs), strict=True))
            other = vjp(dy, **call, method="chunkwise")
            off = {n: difference(runs[0][n], other[n]) for n in call}
            del runs, other
            cp.get_default_memory_pool().free_all_blocks()
            times = {"tensor": median_ms(lambda vjp=vjp, dy=dy, call=call: vjp(dy, **call, method="tensor"), [()], 9, 3)}
            each = kernels_of(lambda vjp=vjp, dy=dy, call=call: vjp(dy, **call, method="tensor"))
            more = {"peer": peer, "kernels_ms": each, "off_chunkwise": off, "same_again": same}
            results.add(op, f"{work}, bfloat16, gradient", "", 2.2 * floor, times, **more)
        except Exception:
            print(f"time {op} {work}: {traceback.format_exc()}"[-1500:], flush=True)
        cp.get_default_memory_pool().free_all_blocks()
    under_the_kit(small, folder, seconds=150)


def channels(results: Results) -> None:
    """Decays of each channel on tensor cores: long and short, many memories and few; and the launches of the gradient by themselves."""
    from refimpl.gpu import channel_tensor

    f, vjp = refimpl.gpu.linear_attention, refimpl.gpu.linear_attention_vjp
    methods = {name: METHODS[name] for name in ("tensor", "chunks of 64", "fused")}
    for sizes in ({}, {"B": 1}, {"B": 1, "H": 4, "T": 16384}, {"B": 1, "H": 4, "T": 2048}, {"B": 2, "H": 8, "T": 512}):
        call = linear_attention(BF16, kind="per channel", **sizes)
        y, shape = f(**call, method="tensor"), " ".join(f"{n}{x}" for n, x in sizes.items()) or "B8 H16 T4096 d128"
        for work, function in (
            ("", lambda how, call=call: f(**call, **how)),
            (", gradient", lambda how, call=call, y=y: vjp(y, **call, **how)),
        ):
            times = {name: median_ms(lambda how=how, function=function: function(how), [()], 5, 1) for name, how in methods.items()}
            results.add("linear_attention", f"per channel, bfloat16{work}", shape, 0.22 if not work else 0.4, times)
            cp.get_default_memory_pool().free_all_blocks()
        if not sizes:
            q, k, v, w, dy = (x.reshape(-1, 1, *x.shape[-2:]) for x in (*call.values(), y))
            kept = cp.empty((len(q), 1, q.shape[2] // channel_tensor.KEPT, v.shape[3], q.shape[3]), BF16)
            launches = {
                "forward": lambda q=q, k=k, v=v, w=w: channel_tensor._start(False, q, k, v, w),
                "states": lambda k=k, v=v, w=w, kept=kept: channel_tensor._start(True, k, k, v, w, states=kept, silent=True),
                "dv": lambda q=q, k=k, w=w, dy=dy, kept=kept: channel_tensor._start(True, k, q, dy, w, states=kept, back=True),
            }
            results.add("linear_attention", "launches", shape, 0, {n: median_ms(launch, [()], 9, 2) for n, launch in launches.items()})


def kit(folder: Path) -> None:
    for op in ("ssd", "mlstm", "linear_attention"):
        f, vjp = (functools.partial(getattr(refimpl.gpu, name), method="chunkwise", chunk_length=8) for name in (op, f"{op}_vjp"))
        for dtype in ("float32", "bfloat16", "float16", "float64"):
            start = time.time()
            try:
                report = refimpl.check(op, f, framework="cupy", dtypes=[dtype], gradients=True, candidate_vjp=vjp, level="quick")
                text, verdict = str(report), report.verdict
            except Exception as error:
                text, verdict = traceback.format_exc(), type(error).__name__
            Path(folder, f"kit-{op}-{dtype}-chunkwise.txt").write_text(text, encoding="utf-8")
            print(f"kit {op} {dtype}: {verdict} ({time.time() - start:.0f} s)\n{text if verdict != 'conforms' else ''}"[:1500], flush=True)


def main(folder: str, parts: list[str]) -> None:
    results = Results()
    jobs = {
        "compile": lambda: subprocess.run(
            [sys.executable, str(Path(__file__).with_name("precompile.py")), "chunk_", "memory_", "matrix_memory<", "mlstm_", "sum_heads"]
        ),
        "tensor": lambda: tensor(results, Path(folder)),
        "gradients": lambda: gradients(results, Path(folder)),
        "channels": lambda: channels(results),
        "agree": lambda: agree(results),
        "time": lambda: timed(results),
        "kit": lambda: kit(Path(folder)),
    }
    for part, job in jobs.items():
        if parts and part not in parts:
            continue
        start = time.time()
        try:
            job()
        except Exception:
            print(f"{part}: {traceback.format_exc()}"[-2500:], flush=True)
        cp.get_default_memory_pool().free_all_blocks()
        results.write(Path(folder, "chunkwise.json"))
        print(f"{part}: {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    np.seterr(all="ignore")
    main(sys.argv[1], sys.argv[2:])
