"""Every mirrored operator under the kit, each in a process of its own: python conform.py FOLDER [--level quick] OP ..."""

import multiprocessing
import os
import sys
import time
from pathlib import Path

DTYPES = ("float32", "float64", "float16", "bfloat16")


def check(op: str, folder: str, level: str) -> None:
    import refimpl.gpu

    import refimpl

    start = time.time()
    try:
        candidate, vjp = getattr(refimpl.gpu, op), getattr(refimpl.gpu, f"{op}_vjp")
        report = refimpl.check(op, candidate, framework="cupy", dtypes=DTYPES, gradients=True, candidate_vjp=vjp, level=level)
        text, verdict = str(report), report.verdict
    except Exception as error:
        import traceback

        text, verdict = traceback.format_exc(), f"{type(error).__name__}"
    Path(folder, f"kit-{op}.txt").write_text(text, encoding="utf-8")
    print(f"{op}: {verdict} ({time.time() - start:.0f} s)\n{text if verdict != 'conforms' else ''}"[:2500], flush=True)


if __name__ == "__main__":
    folder, *ops = sys.argv[1:]
    level = ops.pop(ops.index("--level") + 1) if "--level" in ops else "standard"
    ops = [op for op in ops if op != "--level"]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=check, args=(op, folder, level)) for op in ops]
    for worker in workers:
        worker.start()
    deadline = time.time() + float(os.environ.get("DEADLINE", 100))
    for worker in workers:
        worker.join(max(0.0, deadline - time.time()))
    for op, worker in zip(ops, workers, strict=True):
        if worker.is_alive():
            print(f"{op}: not done in time", flush=True)
            worker.terminate()
