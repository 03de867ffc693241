"""Timings, as evidence, and counts: parametrised by the catalogue, so that a new chapter is measured without being listed here.

host     wall time and memory of every form on NumPy
device   end-to-end and device time, and device memory, of every mirrored operator; skipped where there is no GPU
counted  work, depth, traffic and peak counted on runs, and how they grow: the same numbers on every machine
public   our fastest form over a public implementation, taking turns in one process; skipped where it is not installed
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "asv_benchmarks"))  # peers.py
if importlib.util.find_spec("refimpl") is None:  # a bare checkout, in which nothing was installed
    sys.path.insert(0, str(ROOT))
if importlib.util.find_spec("refimpl.gpu") is None:
    import refimpl

    refimpl.__path__.append(str(ROOT))  # where the folder of the mirror is
