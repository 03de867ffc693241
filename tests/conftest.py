"""Markers that are not run unless asked for, and are then reported as not run, never as passed.

``pytest --run slow --run peers`` adds them; ``pytest -m peers`` runs only those.
"""

import os
import re
from pathlib import Path

for _variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")  # small products, several workers: more threads only wait for each other
os.environ.setdefault("REFIMPL_CACHE", str(Path(__file__).parents[1] / ".pytest_cache" / "refimpl"))  # not the user's

import numpy as np
import pytest

ASKED_FOR = {
    "slow": "takes long; pytest --run slow, or make test",
    "thorough": "the kit's whole table; pytest tests/meta --run thorough, an hour or two",
    "peers": "needs public implementations; make test-peers",
    "gpu": "needs a CUDA device; pytest --run gpu",
}
_not_run: dict[str, int] = {}


def pytest_addoption(parser):
    parser.addoption("--run", action="append", default=[], choices=sorted(ASKED_FOR), help="also run the tests with this marker")


def pytest_collection_modifyitems(config, items):
    wanted = set(config.getoption("--run")) | set(re.findall(r"\w+", config.option.markexpr or ""))
    left_out = {}
    for item in items:
        for marker in ASKED_FOR:
            if marker not in wanted and item.get_closest_marker(marker):
                left_out[item] = marker
                break
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
    _not_run.clear()
    for marker in left_out.values():
        _not_run[marker] = _not_run.get(marker, 0) + 1
    if hasattr(config, "workeroutput"):
        config.workeroutput["not_run"] = dict(_not_run)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    _not_run.update(getattr(node, "workeroutput", {}).get("not_run", {}))


def pytest_terminal_summary(terminalreporter):
    for marker, count in _not_run.items():
        terminalreporter.write_line(f"NOT RUN: {count} marked {marker} ({ASKED_FOR[marker]})", yellow=True)


@pytest.fixture
def rng(request):
    """A generator of its own for each test, the same in every run."""
    seed = [ord(letter) for letter in request.node.nodeid]
    return np.random.default_rng(seed)
