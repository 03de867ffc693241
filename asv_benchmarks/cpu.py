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
from refimpl.complexity import predict

LENGTHS = (64, 256, 1024, 4096)
LIMIT = 0.6  # seconds that a call may be expected to take
FURTHER = {"attention": (3e10, 2.4)}  # operations and seconds of what the others are held against
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


def rows(op, rounds: int = 2):
    """One row for each length: seconds by form, and how many elements the first result has."""
    last: dict[str, tuple[float, float]] = {}  # by form: operations and seconds
    most, limit = FURTHER.get(op.name, (calls.WORK, LIMIT))
    for length in LENGTHS:
        ready, work, size = {}, {}, {}
        for form in op.forms:
            work[form] = float(predict(op, form, **calls.sizes(op, length)).work)
            if form in last and last[form][1] * work[form] / last[form][0] > limit:
                continue
            try:
                call = calls.draw(f"{op.name}.{form}", "float32", length, work=most)
            except NotImplementedError:
                continue

            def run(function=op.forms[form].function, call=call, size=size):
                result = function(**call)
                size["elements"] = int(np.size(result[0] if isinstance(result, tuple) else result))

            ready[form] = run
        if not ready:
            break
        seconds = race(ready, rounds, time.process_time, min)
        last |= {form: (work[form], s) for form, s in seconds.items()}
        sizes = {k: v for k, v in calls.sizes(op, length).items() if isinstance(v, int) and k not in op.lengths}
        yield {"operator": op.name, "T": length, "sizes": sizes, **size, "seconds": {k: float(f"{v:.4g}") for k, v in seconds.items()}}


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
    if asked.operator and asked.output.is_file():  # only some, measured anew
        found = [row for row in json.loads(asked.output.read_text(encoding="utf-8"))["rows"] if row["operator"] not in asked.operator]
    for name in asked.operator or refimpl.OPS:
        found += list(rows(refimpl.OPS[name]))
        print(name, {form: f"{s:.3g}" for form, s in found[-1]["seconds"].items()}, "at", found[-1]["T"], flush=True)
        keep(asked.output, about, found)


def keep(path: Path, about: dict, found: list[dict]) -> None:
    """Write what was found so far, in the catalogue's order."""
    order = list(refimpl.OPS)
    lines = ",\n".join(json.dumps(row) for row in sorted(found, key=lambda row: (order.index(row["operator"]), row["T"])))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"machine": {json.dumps(about)},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
