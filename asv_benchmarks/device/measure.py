"""Times on a device: medians of event times after a warm-up, inputs rotated so that the L2 cache is not what is measured.

A row of results holds the work, its shape, its floor, and a time for each contender, all measured in one process; a
file of rows holds what they were measured on. `asv_benchmarks/results/device/` keeps the files.
"""

import datetime
import json
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import cupy as cp
import numpy as np

COPY = 3.02e12  # bytes a second, read and written, of the device that the floors speak of
BF16, FP32, EXP = 700e12, 52e12, 3.9e12  # operations a second


def floor_ms(bytes: float = 0, bf16: float = 0, fp32: float = 0, exps: float = 0) -> float:
    """The least time that the work can take: each byte moved once, each operation at its unit's rate."""
    return 1e3 * max(bytes / COPY, bf16 / BF16, fp32 / FP32, exps / EXP)


HOLD = r"""extern "C" __global__ void hold(long long cycles) {
    for (const long long start = clock64(); clock64() - start < cycles;);
}"""


def hold_back(cycles: int = 5_000_000) -> None:
    """Keep the device busy for a millisecond or two, so that what the host does to start the work is done when it starts."""
    cp.RawKernel(HOLD, "hold")((1,), (1,), (np.int64(cycles),))


def median_ms(function: Callable, sets: Sequence[tuple], repeat: int = 30, warm_up: int = 5) -> float:
    """Median device time of ``function(*set)``, one set of arguments after the other; the host's time to call it is left out."""
    for i in range(warm_up):
        function(*sets[i % len(sets)])
    times = []
    for i in range(repeat):
        start, stop = cp.cuda.Event(), cp.cuda.Event()
        hold_back()
        start.record()
        function(*sets[i % len(sets)])
        stop.record()
        stop.synchronize()
        times.append(cp.cuda.get_elapsed_time(start, stop))
    return statistics.median(times)


class Results:
    """Rows of one run, printed as they come and written at the end."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def add(self, operator: str, work: str, shape: str, floor: float, times: dict[str, float], **more) -> None:
        """Record one row: times in milliseconds by contender, and whatever else is worth keeping (errors, targets)."""
        self.rows.append({"operator": operator, "work": work, "shape": shape, "floor_ms": floor, "ms": times, **more})
        listed = "  ".join(f"{name} {ms:.4f}" for name, ms in times.items())
        print(f"{work:34} {shape:28} floor {floor:.3f}  {listed}  {more or ''}", flush=True)

    def write(self, path: str | Path) -> None:
        """Write all rows with date, device, driver and versions."""
        Path(path).write_text(json.dumps({"measured_on": machine(), "rows": self.rows}, indent=1) + "\n", encoding="utf-8")


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    device = cp.cuda.runtime.getDeviceProperties(cp.cuda.Device().id)
    query = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    found = {
        "device": device["name"].decode(),
        "driver": query.stdout.strip(),
        "cuda": str(cp.cuda.runtime.runtimeGetVersion()),
        "cupy": cp.__version__,
        "numpy": np.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit,
    }
    try:
        import torch

        found["torch"] = torch.__version__
    except ImportError:
        pass
    return found
