"""Every kernel of the mirror once more, on small cases, under NVIDIA's compute-sanitizer: python tests/gpu/sanitize.py results.json [OP ...]

memcheck finds accesses outside of an array, racecheck shared memory that is read while another thread writes it, initcheck reads
of memory that nobody wrote, synccheck barriers that not all threads reach. The tool slows a kernel down a hundredfold, so cases are small.

racecheck follows neither one lane that arrives for its warp nor a barrier that some pass without waiting, so it is given builds in which
every lane arrives for itself (``gpu/cuda/barriers.cuh``). That it sees what is left out of these builds is tried too: with each mistake
of `PLANTED` it must report something.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

IN_CHUNKS = ("linear_attention", "ssd", "mlstm")
TOOLS = ("racecheck", "memcheck", "initcheck", "synccheck")
SLOW = ("attention", "linear_attention", "selective_scan")  # these first, one case a run
LIMIT = 100  # seconds of one run
PLAIN = {"mask": None, "bias": None}
HEADS = {"Hq": 2, "Hkv": 1}
FEW = {"multiprocessors": lambda: 2}  # what takes the whole of a device with more


class Case(NamedTuple):
    """Sizes of a sample and arguments that are left out (None); options; what constants of the operator's module are.

    Poisoned: memory is full of NaN at first, and results must be finite. This is for kernels that read what the copy engine has
    written to memory, which initcheck does not see.
    """

    sizes: dict
    options: dict = {}
    constants: dict = {}
    poisoned: bool = False


CASES = {
    "long_conv": (
        *(Case({"T": 9, "K": 6}), Case({"T": 100, "K": 100, "batch": (3,)}), Case({"T": 700, "K": 700, "c": 2})),
        *(Case({"T": 2500, "K": 2500, "c": 2, "batch": (3,)}), Case({"T": 8192, "K": 40, "c": 1}), Case({"T": 9001, "K": 9001, "c": 1})),
        Case({"T": 16500, "K": 16500, "c": 1}),  # two segments
    ),
    "linear_attention": (
        *(Case({"T": 37}), Case({"T": 20, "d": 40, "e": 20}), Case({"T": 20, "per_channel": True})),
        Case({"T": 150, "d": 100, "e": 72, "beta": None, **HEADS}),
        Case({"T": 150, "d": 100, "e": 72, "per_channel": True, "beta": None, **HEADS}),
        Case({"T": 150, "d": 64, "e": 136, "per_channel": True, "beta": None, **HEADS}),
    ),
    "ssd": (Case({"T": 37}), Case({"T": 20, "p": 20, "n": 70}), Case({"T": 150, "H": 2, "G": 1, "p": 64, "n": 64})),
    "mlstm": (Case({"T": 37}), Case({"T": 300})),
    "slstm": (Case({"T": 20}), Case({"T": 5, "d": 40}), Case({"T": 4, "d": 90})),
    "wkv": (Case({"T": 37}),),
    "wkv6": (Case({"T": 37}),),
    "wkv7": (Case({"T": 37}),),
    "route": (Case({}, {"k": 2}), Case({"E": 64}, {"k": 6})),
    "moe": (Case({}, {"k": 2}), Case({"T": 70, "d": 16, "f": 8}, {"k": 2})),
    "linear_recurrence": (Case({"T": 37}), Case({"T": 5000})),
    "selective_scan": (
        *(Case({"T": 37}), Case({"T": 500})),
        Case({"T": 37, "c": 80, "n": 16}),  # strips of 16 channels in the gradient
        Case({"T": 250, "c": 32, "n": 16}, {}, FEW),  # a ring, twice around
        Case({"T": 70, "c": 144, "n": 16}, {}, FEW),  # two warps a strip
    ),
    "causal_conv1d": (Case({"T": 37}),),
    "rg_lru": (Case({"T": 37}),),
    "discretize": (Case({}, {"method": "zoh"}),),
    "attention": (
        Case({}),
        Case({"n": 70, "m": 270, "d": 64, "e": 64, **HEADS}, {}, FEW),
        Case({"n": 200, "m": 300, "d": 64, "e": 64, **HEADS, **PLAIN}, {"causal": True}, FEW),  # some blocks take several tiles
        Case({"n": 200, "m": 300, "d": 128, "e": 128, **HEADS, **PLAIN}, {}, FEW),
        Case({"n": 200, "m": 300, "d": 128, "e": 128, **HEADS, **PLAIN}, {"causal": True}, {"FIVE_PRODUCTS": 0}, poisoned=True),
        Case({"n": 130, "m": 260, "d": 128, "e": 128, **HEADS, **PLAIN}, {"softcap": 5.0}, FEW),
        Case({"n": 3, "m": 600, "d": 128, "e": 128, **HEADS, **PLAIN}),  # decoding
    ),
}
PLANTED = (  # operator, its case; file, what is there and what instead: nobody waits, or not for all
    ("attention", 3, "kernel_attention_float.cu", "if (used_before) barrier_wait(free + copy.stage, copy.phase ^ 1);", ""),
    ("attention", 3, "kernel_attention_hopper_gradient.cu", "barrier_init_for_warps(free + s, 8)", "barrier_init_for_warps(free + s, 7)"),
    ("attention", 4, "kernel_attention_hopper_ordered.cu", "barrier_init(free + s, 256)", "barrier_init(free + s, 224)"),
    ("selective_scan", 3, "kernel_selective_scan_ring.cu", "meet(TEAMS + team, 128);", ""),
    ("selective_scan", 3, "kernel_selective_scan_ring.cu", "meet(team, 64);\n        fetch", "fetch"),
    ("linear_attention", 4, "kernel_memory_channels.cu", "meet(FULL + b % STAGES, READING);", ""),
    (
        "linear_attention",
        4,
        "kernel_memory_channels.cu",
        "meet(b < STAGES ? OWN + group : EMPTY + b % STAGES, b < STAGES ? GROUP : READING);",
        "",
    ),
    ("linear_attention", 3, "kernel_memory.cu", "if (c > 0) meet(1, THREADS);", ""),
)


def run_once(op: str, numbers: list[int], mistake: int | None) -> None:
    """Cases of one operator and its gradient, in float32 and, where arrays allow, in bfloat16."""
    import importlib
    import unittest.mock

    import cupy as cp
    import ml_dtypes
    import numpy as np
    import refimpl.gpu
    from refimpl.gpu import launch

    import refimpl

    def on_device(value, dtype):
        if isinstance(value, tuple):
            return type(value)(*(on_device(v, np.float32) for v in value))
        floating = isinstance(value, np.ndarray) and value.dtype.kind == "f"
        return cp.asarray(value.astype(dtype)) if floating else cp.asarray(value) if isinstance(value, np.ndarray) else value

    if mistake is not None:
        right, (*_, file, old, new) = launch.Kernel.source.fget, PLANTED[mistake]
        assert old in (launch.FOLDER / file).read_text(encoding="utf-8"), f"{file} has changed"
        launch.Kernel.source = property(lambda kernel: right(kernel).replace(old, new) if kernel.file == file else right(kernel))

    def full_of_nan(size):
        memory = cp.cuda.MemoryPointer(cp.cuda.Memory(size), 0)
        memory.memset(0xFF, size)
        return memory

    f, vjp = getattr(refimpl.gpu, op), getattr(refimpl.gpu, f"{op}_vjp", None)
    module = importlib.import_module(f.__module__)
    for number in numbers:
        sizes, options, constants, poisoned = CASES[op][number]
        cp.cuda.set_allocator(full_of_nan if poisoned else None)  # every array an allocation of its own, with ends that the tool sees
        for dtype in (np.float32, ml_dtypes.bfloat16):
            own = {n: v for n, v in sizes.items() if v is not None}
            drawn = {n: x for n, x in refimpl.OPS[op].sample(np.random.default_rng(0), **own).items() if n not in sizes or n in own}
            arranged = refimpl.OPS[op].arrange(drawn) if refimpl.OPS[op].arrange else drawn
            call = {n: on_device(v, np.float32 if n == "state" else dtype) for n, v in arranged.items()} | options
            methods = ({"method": "fused"}, {"method": "chunkwise", "chunk_length": 16}, {"method": "tensor"})
            for more in methods if op in IN_CHUNKS else ({},):
                with unittest.mock.patch.dict(vars(module), constants):
                    y = f(**call, **more)
                    found = {} if vjp is None else vjp(y, **call, **more)
                if poisoned and not all(np.isfinite(cp.asnumpy(x).astype(np.float32)).all() for x in (y, *found.values())):
                    sys.exit(f"{op}, case {number}: what nobody wrote has become a result")
            cp.cuda.Device().synchronize()


class Job(NamedTuple):
    tool: str
    operator: str
    cases: tuple[int, ...]
    mistake: int | None = None


def once(job: Job) -> tuple[tuple[str, ...], dict]:
    """The command that runs a job's cases, and its environment."""
    build = {"REFIMPL_EVERY_LANE_ARRIVES": "1"} if job.tool == "racecheck" else {}
    return (sys.executable, __file__, "--once", job.operator, json.dumps(job.cases), json.dumps(job.mistake)), os.environ | build


def compile_ahead(job: Job) -> None:
    """Without a tool, so that each kernel is compiled once, and CuPy keeps it."""
    command, environment = once(job)
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, env=environment, capture_output=True, timeout=2 * LIMIT)


def sanitize(job: Job) -> dict:
    tool, op, cases, mistake = job
    more = ("--racecheck-report", "analysis") if tool == "racecheck" else ()
    run, environment = once(job)
    command = ("compute-sanitizer", "--tool", tool, *more, "--error-exitcode", "9", "--print-limit", "20", *run)
    start = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment)
        code, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        code, output = -1, f"not done in {late.timeout} s"
    lines = [line for line in output.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
    summary = lines[-1].strip("= ") if lines else output[-300:]
    clean = None if code not in (0, 9) else code == 0 and (tool != "racecheck" or ": 0 hazards" in summary)  # None: not to its end
    found = {"operator": op, "tool": tool, "cases": cases, "clean": clean, "summary": summary}
    if mistake is not None:
        found["planted"] = PLANTED[mistake][2:]
    if not clean:
        found["output"] = "\n".join(line for line in output.splitlines() if "[0x" not in line)[:8000]  # without foreign frames
    verdict = {True: "clean", False: "NOT CLEAN", None: "not run"}[clean] if mistake is None else {False: "seen"}.get(clean, "NOT SEEN")
    print(f"{time.monotonic() - start:4.0f} s  {op:18} {cases!s:18} {tool:9} {verdict:9}  {summary[:110]}", flush=True)
    return found


def machine() -> dict:
    def said(*command):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    device, driver = said("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").split("\n")[0].split(", ")
    tool = [line for line in said("compute-sanitizer", "--version").splitlines() if "ersion" in line][-1:]
    date, commit = time.strftime("%Y-%m-%d", time.gmtime()), said("git", "rev-parse", "--short", "HEAD")
    return {"device": device, "driver": driver, "cuda": " ".join(tool), "date": date, "commit": commit}


def main(path: str, ops: list[str]) -> int:
    def jobs(tool: str) -> list[Job]:
        numbers = {op: range(len(CASES[op])) for op in sorted(ops or CASES, key=lambda op: op not in SLOW)}
        return [Job(tool, op, c) for op in numbers for c in ([(n,) for n in numbers[op]] if op in SLOW else [tuple(numbers[op])])]

    planted = [Job("racecheck", row[0], (row[1],), i) for i, row in enumerate(PLANTED) if row[0] in (ops or CASES)]
    rows, found = [], {"measured_on": machine()}
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(compile_ahead, jobs("racecheck") + jobs("memcheck")))
        for ran in as_completed([pool.submit(sanitize, job) for job in (*planted, *(job for tool in TOOLS for job in jobs(tool)))]):
            rows.append(ran.result())
            Path(path).write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n", encoding="utf-8")  # kept, should the rest not end
    return int(not all(row["clean"] is ("planted" not in row) for row in rows))


if __name__ == "__main__":
    if sys.argv[1] == "--once":
        run_once(sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4]))
    else:
        sys.exit(main(sys.argv[1], sys.argv[2:]))
