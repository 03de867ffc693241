"""Counts over the whole of tests/meta, printed at the end."""

import json
from collections import Counter

import pytest

collect_ignore_glob = ["exploits/*"]  # never imported here: some replace parts of what imports them
_COUNTS: Counter = Counter()


@pytest.fixture
def tally():
    """``tally("mutants", "float32", caught=True)`` counts one, and one caught."""

    def count(kind, dtype, **flags):
        _COUNTS[kind, dtype, "total"] += 1
        for flag, value in flags.items():
            _COUNTS[kind, dtype, flag] += bool(value)

    return count


def pytest_sessionfinish(session):
    worker = getattr(session.config, "workeroutput", None)
    if worker is not None:
        worker["tally"] = json.dumps([[*k, v] for k, v in _COUNTS.items()])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    for *key, value in json.loads(node.workeroutput.get("tally", "[]")) if hasattr(node, "workeroutput") else []:
        _COUNTS[tuple(key)] += value


def pytest_terminal_summary(terminalreporter):
    if not _COUNTS:
        return
    terminalreporter.section("the kit's two numbers")
    for kind, dtype in sorted({k[:2] for k in _COUNTS}):
        total = _COUNTS[kind, dtype, "total"]
        flags = ", ".join(f"{k[2]} {v}" for k, v in sorted(_COUNTS.items()) if k[:2] == (kind, dtype) and k[2] != "total")
        terminalreporter.write_line(f"{kind:<10} {dtype:<16} {flags} of {total}")
