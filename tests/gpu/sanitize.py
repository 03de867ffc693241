"""Every kernel of the mirror once more, on small cases, under NVIDIA's compute-sanitizer: python tests/gpu/sanitize.py results.json [OP ...]

memcheck finds accesses outside of an array, racecheck shared memory that is read while another thread writes it, initcheck reads
of memory that nobody wrote, synccheck barriers that not all threads reach. The tool slows a kernel down a hundredfold, so cases are small.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

IN_CHUNKS = ("linear_attention", "ssd", "mlstm")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OPS = {  # sizes, and arguments that are left out
    "long_conv": (
        *({"T": 9, "K": 6}, {"T": 100, "K": 100, "batch": (3,)}, {"T": 700, "K": 700, "c": 2}),
        {"T": 16500, "K": 16500, "c": 1},  # two segments
    ),
    "linear_attention": (
        *({"T": 37}, {"T": 20, "d": 40, "e": 20}, {"T": 20, "per_channel": True}),
        *({"T": 150, "d": 100, "e": 72, "beta": None}, {"T": 150, "d": 100, "e": 72, "per_channel": True, "beta": None}),
    ),
    "ssd": ({"T": 37}, {"T": 20, "p": 20, "n": 70}),
    "mlstm": ({"T": 37}, {"T": 300}),
    "slstm": ({"T": 20}, {"T": 5, "d": 40}, {"T": 4, "d": 90}),
    "wkv": ({"T": 37},),
    "wkv6": ({"T": 37},),
    "wkv7": ({"T": 37},),
    "route": ({}, {"E": 64, "k": 6}),
    "moe": ({}, {"T": 70, "d": 16, "f": 8}),
    "linear_recurrence": ({"T": 37}, {"T": 5000}),
    "selective_scan": (
        *({"T": 37}, {"T": 500}),
        *(
            {"T": 37, "c": 80, "n": 16},
            {"T": 120, "c": 1088, "n": 16},
            {"T": 20, "c": 4352, "n": 16},
        ),  # strips of 16 channels, a ring, two warps each
    ),
    "causal_conv1d": ({"T": 37},),
    "rg_lru": ({"T": 37},),
    "discretize": ({},),
    "attention": ({}, {"n": 130, "m": 130, "d": 64, "e": 64}, {"n": 200, "m": 300, "d": 128, "e": 128, "mask": None, "bias": None}),
}


def run_once(op: str) -> None:
    """One operator and its gradient, in float32 and, where arrays allow, in bfloat16."""
    import cupy as cp
    import ml_dtypes
    import numpy as np
    import refimpl.gpu

    import refimpl

    def on_device(value, dtype):
        if isinstance(value, tuple):
            return type(value)(*(on_device(v, np.float32) for v in value))
        floating = isinstance(value, np.ndarray) and value.dtype.kind == "f"
        return cp.asarray(value.astype(dtype)) if floating else cp.asarray(value) if isinstance(value, np.ndarray) else value

    cp.cuda.set_allocator(None)  # every array an allocation of its own, with ends that the tool sees
    f, vjp = getattr(refimpl.gpu, op), getattr(refimpl.gpu, f"{op}_vjp", None)
    for sizes in OPS[op]:
        for dtype in (np.float32, ml_dtypes.bfloat16):
            own = {n: v for n, v in sizes.items() if v is not None and not (op == "route" and n == "k")}
            drawn = {n: x for n, x in refimpl.OPS[op].sample(np.random.default_rng(0), **own).items() if n not in sizes or n in own}
            arranged = refimpl.OPS[op].arrange(drawn) if refimpl.OPS[op].arrange else drawn
            call = {n: on_device(v, np.float32 if n == "state" else dtype) for n, v in arranged.items()}
            call |= {"k": sizes.get("k", 2)} if op in ("route", "moe") else {}
            call |= {"method": "zoh"} if op == "discretize" else {}
            for more in (
                ({"method": "fused"}, {"method": "chunkwise", "chunk_length": 16}, {"method": "tensor"}) if op in IN_CHUNKS else ({},)
            ):
                y = f(**call, **more)
                if vjp is not None:
                    vjp(y, **call, **more)
            cp.cuda.Device().synchronize()


def sanitize(job: tuple[str, str]) -> dict:
    op, tool = job
    more = ["--racecheck-report", "all"] if tool == "racecheck" else []
    command = [
        "compute-sanitizer",
        "--tool",
        tool,
        *more,
        "--error-exitcode",
        "9",
        "--print-limit",
        "5",
        sys.executable,
        __file__,
        "--once",
        op,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        code, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        code, output = -1, f"not done in {late.timeout} s"
    lines = [line for line in output.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
    clean = True if code == 0 else False if code == 9 else None  # None: it did not run to its end
    found = {"operator": op, "tool": tool, "clean": clean, "summary": lines[-1].strip("= ") if lines else output[-300:]}
    if code:
        found["output"] = "\n".join(line for line in output.splitlines() if "[0x" not in line)[:6000]  # without foreign frames
    print(f"{op:20} {tool:10} { {True: 'clean', False: 'NOT CLEAN', None: 'not run'}[clean]:9}  {found['summary'][:120]}", flush=True)
    return found


def main(path: str, ops: list[str]) -> int:
    jobs = [(op, tool) for tool in TOOLS for op in ops or OPS]  # a kernel compiles once, under the first tool
    with ThreadPoolExecutor(16) as pool:
        rows = list(pool.map(sanitize, jobs))
    Path(path).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(not all(row["clean"] for row in rows))


if __name__ == "__main__":
    if sys.argv[1] == "--once":
        run_once(sys.argv[2])
    else:
        sys.exit(main(sys.argv[1], sys.argv[2:]))
