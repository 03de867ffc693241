"""The tiled attention for teaching in Numba's simulator, in a process of its own: the simulator is chosen before Numba is loaded."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import refimpl

pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec("numba") and importlib.util.find_spec("numba_cuda")), reason="not run: numba-cuda is not installed"
)
HERE = {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(Path(refimpl.__file__).parents[1])}

COMPARED = """
import numpy as np
import refimpl
from refimpl.gpu.teaching.tiled_attention import KEYS, ROWS, attention
from refimpl.ops.attention.attention import error_bound

rng = np.random.default_rng(0)
for Hq, Hkv, n, m, dtype, options in [
    (1, 1, 1, 1, "float64", {}),
    (2, 1, 5, 2 * KEYS, "float64", {}),
    (1, 1, ROWS + 3, ROWS + 3, "float32", {"causal": True}),
    (1, 1, 6, KEYS + 3, "float64", {"window": (2, 1), "offset": -3}),
    (1, 1, 4, 20, "float64", {"window": (3, 0), "softcap": 1.5, "scale": 0.7}),
]:
    q, k, v = (rng.standard_normal(s).astype(dtype) for s in ((Hq, n, 3), (Hkv, m, 3), (Hkv, m, 2)))
    k *= np.linspace(0.2, 4, m, dtype=dtype)[:, None]  # later tiles bring larger scores
    got = attention(q, k, v, return_lse=True, **options)
    wide = [x.astype(np.longdouble) for x in (q, k, v)]
    want = refimpl.attention(*wide, return_lse=True, **options)
    bound = error_bound(*wide, return_lse=True, unit=np.finfo(dtype).eps / 2, **options)
    for g, w, e in zip(got, want, bound):
        print(n, m, bool(((g == w) | (abs(g - np.where(np.isinf(w), 0, w)) <= e)).all()), g.shape == w.shape)
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | HERE, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split("\n")[:-1]


def test_tiles_give_the_attention_of_the_whole_map():
    lines = run(COMPARED)
    assert len(lines) == 10
    assert all(line.endswith("True True") for line in lines), lines


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("acc[x] *= keep", "pass"),  # what was summed is not brought to the new unit
        ("larger if larger > nothing else 0.0", "larger"),  # -inf - -inf
        ("first + ROWS - 1 + above + 1", "first + above + 1"),  # tiles that only later rows see are left out
    ],
)
def test_a_mistake_is_caught(right, wrong):
    broken = f"""
import importlib.util, sys, types
from pathlib import Path
source = Path(importlib.util.find_spec("refimpl.gpu.teaching.tiled_attention").origin).read_text(encoding="utf-8")
assert {right!r} in source
broken = types.ModuleType("broken")
sys.modules["broken"] = broken
exec(compile(source.replace({right!r}, {wrong!r}), "broken", "exec"), broken.__dict__)
"""
    lines = run(broken + COMPARED.replace("from refimpl.gpu.teaching.tiled_attention import", "from broken import"))
    assert any(" False " in line for line in lines), lines
