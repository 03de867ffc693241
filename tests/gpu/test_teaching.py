"""The teaching kernels in Numba's simulator, each in a process of its own: the simulator is chosen before Numba is loaded."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import refimpl

needs_numba = pytest.mark.skipif(
    not (importlib.util.find_spec("numba") and importlib.util.find_spec("numba_cuda")), reason="not run: numba-cuda is not installed"
)
HERE = {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(Path(refimpl.__file__).parents[1])}

SCAN = """
import numpy as np
import refimpl
from refimpl.gpu.teaching.scan import CHUNK, linear_recurrence
from refimpl.ops.recurrence.linear_recurrence import error_bound

rng = np.random.default_rng(0)
for T, c, reverse, dtype, turned in [(1, 1, False, "float64", 0), (CHUNK, 1, False, "float64", 0), (2 * CHUNK + 9, 2, False, "float32", 0), (CHUNK + 5, 2, True, "float64", 1)]:
    a = rng.uniform(0.5, 1.2, (T, c)) * np.exp(1j * turned * rng.uniform(-3, 3, (T, c)))  # steps that do not commute
    a, b, state = (x if turned else x.real.astype(dtype) for x in (a, rng.standard_normal((T, c)) + 0j, rng.standard_normal(c) + 0j))
    wide = [x.astype(np.clongdouble if turned else np.longdouble) for x in (a, b, state)]
    got = linear_recurrence(a, b, state=state, reverse=reverse, return_state=True)
    want = refimpl.linear_recurrence(wide[0], wide[1], state=wide[2], reverse=reverse, return_state=True)
    bound = error_bound(wide[0], wide[1], state=wide[2], reverse=reverse, return_state=True, unit=np.finfo(got[0].dtype).eps / 2)
    for g, w, e in zip(got, want, bound):
        print(T, bool((abs(g - w) <= e).all()), g.shape == w.shape)
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | HERE, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split("\n")[:-1]


@needs_numba
def test_scan_is_the_linear_recurrence():
    lines = run(SCAN)
    assert len(lines) == 8
    assert all(line.endswith("True True") for line in lines), lines


@needs_numba
def test_a_scan_that_swaps_the_order_of_steps_is_caught():
    """The test above would see the classic mistake: operands of the down-sweep the other way round."""
    wrong = SCAN.replace(
        "from refimpl.gpu.teaching.scan import", "import importlib.util, inspect, sys, types\n" + SWAPPED + "\nfrom swapped import"
    )
    lines = run(wrong)
    assert any(" False " in line for line in lines), lines


SWAPPED = """
from pathlib import Path
source = Path(importlib.util.find_spec("refimpl.gpu.teaching.scan").origin).read_text(encoding="utf-8")
right = "b_tree[second] = a_first * b_tree[second] + b_first"
assert right in source
swapped = types.ModuleType("swapped")
sys.modules["swapped"] = swapped
exec(compile(source.replace(right, "b_tree[second] = a_tree[second] * b_first + b_tree[second]"), "swapped", "exec"), swapped.__dict__)
"""
