"""Times of every form on this machine's CPU, kept as data for the documentation. ``python asv_benchmarks/cpu.py [-o FILE] [OPERATOR ...]``

float32, the plain call at usual widths, all forms of an operator in turn at each length. Kept is the time that the processor
spent on the call, in one thread, the least of a few rounds: on a shared machine the clock on the wall says what others did. What
the numbers are good for are ratios. With --public, the ratios of our fastest form to every public implementation that is
installed, in ``results/public.json``.
"""

import os

os.environ |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "REFIMPL_NUM_THREADS"), "1")

import argparse
import datetime
import json
import platform
import subprocess
import time
from pathlib import Path

import numpy as np
import scipy
from benchmarks import calls
from peers import race

import refimpl

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
LIMIT = 0.6  # seconds that a call may be expected to take
KEPT = Path(__file__).parent / "results" / "cpu.json"


def machine() -> dict[str, str | int]:
    """What the numbers were measured on."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": 1,
        "load": f"{os.getloadavg()[0]:.1f}",
        "system": platform.system(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip(),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def rows(op, rounds: int = 3):
    """One row for each length: seconds by form, and how many elements the first result has."""
    last: dict[str, float] = {}
    for length in LENGTHS:
        ready, size = {}, 0
        for form in op.forms:
            if last.get(form, 0) > LIMIT / 4:  # twice the length is up to four times the time
                continue
            try:
                call = calls.draw(f"{op.name}.{form}", "float32", length)
            except NotImplementedError:
                continue
            ready[form] = lambda f=op.forms[form].function, call=call: f(**call)
            result = ready[form]()
            size = int(np.size(result[0] if isinstance(result, tuple) else result))
        if not ready:
            break
        seconds = race(ready, rounds, time.process_time, min)
        last |= seconds
        sizes = {k: v for k, v in calls.sizes(op, length).items() if isinstance(v, int) and k not in op.lengths}
        yield {"operator": op.name, "T": length, "sizes": sizes, "elements": size, "seconds": {k: float(f"{v:.4g}") for k, v in seconds.items()}}


def ratios() -> dict[str, float]:
    """Our fastest form over every public implementation that is installed and takes the call."""
    from benchmarks import public

    found = {}
    for known in public.KNOWN:
        contest = public.Ratios()
        try:
            contest.setup(known)
        except NotImplementedError as reason:
            print(known, "left out:", reason, flush=True)
            continue
        seconds = race(contest.ours | {"theirs": contest.theirs}, 3, time.process_time, min)
        found[known] = float(f"{min(seconds[form] for form in contest.ours) / seconds['theirs']:.3g}")
        print(known, found[known], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operator", nargs="*", help="names; all by default")
    parser.add_argument("-o", "--output", type=Path, default=KEPT)
    parser.add_argument("--public", action="store_true", help="ratios to public implementations instead")
    asked = parser.parse_args()
    if asked.public:
        path = asked.output.with_name("public.json")
        path.write_text(json.dumps({"machine": machine(), "ratios": ratios()}, indent=1) + "\n", encoding="utf-8")
        return
    if unknown := set(asked.operator) - refimpl.OPS.keys():
        parser.error(f"no operator is called {min(unknown)!r}")
    about, found = machine(), []
    for name in asked.operator or refimpl.OPS:
        found += list(rows(refimpl.OPS[name]))
        print(name, {form: f"{s:.3g}" for form, s in found[-1]["seconds"].items()}, "at", found[-1]["T"], flush=True)
    lines = ",\n".join(json.dumps(row) for row in found)
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text(f'{{"machine": {json.dumps(about)},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
