"""The pytest plugin, as the documentation shows it; and that it leaves other people's runs alone."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import refimpl
from refimpl.conformance.cases import CLASSES

pytest_plugins = ["pytester"]
ROOT = Path(refimpl.__file__).parents[1]
PAGE = ROOT / "docs" / "how_to" / "check_with_pytest.md"
RIGHT = "import refimpl\n\ndef scan(a, b, *, state=None, reverse=False, return_state=False):\n    return refimpl.linear_recurrence(a, b, state=state, reverse=reverse, return_state=return_state)\n"
WRONG = RIGHT.replace("state=state", "state=None")


@pytest.fixture
def run(pytester, monkeypatch):
    """``run(tests, kernels)``: the outcomes by test id, and all that was printed."""

    def go(tests, kernels=RIGHT, *arguments):
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(pytester.path)]))
        (pytester.path / "my_kernels.py").write_text(kernels)
        (pytester.path / "test_kernels.py").write_text(tests)
        result = pytester.runpytest_subprocess("-v", "-p", "refimpl.pytest_plugin", *arguments)
        text = result.stdout.str()
        return dict(re.findall(r"test_kernels\.py::(\S+) (PASSED|FAILED|SKIPPED|ERROR)", text)), text + result.stderr.str()

    return go


def documented(name="test_kernels.py"):
    """The files of that name that the page writes, as one."""
    found = re.findall(rf'"{re.escape(name)}"\)\.write_text\("""(.*?)"""\)', PAGE.read_text(), re.DOTALL)
    assert found, f"the page writes no {name}"
    return "\n\n".join(found)


def test_the_documented_tests_pass_for_a_right_one(run):
    outcomes, text = run(documented(), documented("my_kernels.py"))
    assert set(outcomes.values()) <= {"PASSED", "SKIPPED"}, text
    assert outcomes["test_scan_as_one"] == "PASSED"
    assert outcomes["test_scan[verdict]"] == "PASSED"
    assert outcomes["test_scan[float32-hard]"] == "PASSED"
    assert {name for name in outcomes if name.startswith("test_scan[")} == {f"test_scan[float32-{c}]" for c in CLASSES if c != "gradients"} | {"test_scan[verdict]"}


def test_and_fail_by_class_for_a_wrong_one(run):
    wrong = documented("my_kernels.py").replace("if t else 0", "if t % 32 else 0")
    outcomes, text = run(documented(), wrong)
    assert outcomes["test_scan[float32-sizes]"] == "FAILED"
    assert outcomes["test_scan[verdict]"] == "FAILED"
    assert outcomes["test_scan[float32-options]"] == "PASSED"
    assert "linear_recurrence: scan is WRONG" in text
    assert "reproduce" in text
    assert "pytest_plugin.py" not in text.replace("refimpl.pytest_plugin", ""), "no traceback of the plugin's"


def test_the_check_is_made_once(run):
    counting = RIGHT.replace("    return", "    open('calls', 'a').write('.')\n    return", 1)
    marked = "import pytest, my_kernels\n@pytest.mark.refimpl('linear_recurrence', my_kernels.scan, dtypes=['float32'], level='quick')\ndef test_a(refimpl_check):\n    refimpl_check()\n"
    outcomes, text = run(marked, counting)
    assert outcomes["test_a[verdict]"] == "PASSED", text
    assert len(Path("calls").read_text()) < 200


def test_what_is_refused_has_no_verdict(run):
    refusing = RIGHT.replace("    return", "    if b.shape[-2] > 1:\n        raise NotImplementedError('one step')\n    return", 1)
    outcomes, text = run(documented(), refusing)  # with a state, unlike the page's
    assert outcomes["test_scan[verdict]"] == "FAILED"
    assert "could not be judged" in text


def test_options(run, pytester):
    marked = "import pytest, my_kernels\n@pytest.mark.refimpl('linear_recurrence', dtypes=['float32'])\ndef test_a(refimpl_check):\n    refimpl_check(my_kernels.scan)\n"
    outcomes, _ = run(marked, WRONG, "--refimpl-level", "quick", "--refimpl-reports", "kept")
    assert "FAILED" in outcomes.values()
    (found,) = (pytester.path / "kept").glob("*.json")
    assert json.loads(found.read_text())["settings"]["level"] == "quick"
    assert found.with_suffix(".html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("body", ["refimpl_check()", "refimpl_check('linear_recurrence')", "refimpl_check(1, 2, 3)"])
def test_wrong_use_is_said(run, body):
    outcomes, text = run(f"def test_a(refimpl_check):\n    {body}\n")
    assert outcomes["test_a"] == "FAILED"
    assert "takes an operator and a candidate" in text


def test_it_loads_nothing_and_changes_nothing():
    """Neither NumPy nor the kit is there after a session of tests that do not ask for it, and no test is added or changed."""
    code = "import sys, pytest\nclass After:\n    def pytest_sessionfinish(self): print('LOADED', sorted(m for m in sys.modules if m.split('.')[0] in ('numpy', 'scipy') or m.startswith('refimpl.')))\n"
    code += "import tempfile, pathlib\nfolder = tempfile.mkdtemp()\np = pathlib.Path(folder, 'test_a.py')\np.write_text('import pytest\\n@pytest.mark.parametrize(\"x\", [1, 2])\\ndef test_a(x): pass\\n')\n"
    code += "pytest.main(['-q', '--strict-markers', '-p', 'no:cacheprovider', '-p', 'refimpl.pytest_plugin', '--rootdir', folder, '-c', '/dev/null', str(p)], plugins=[After()])"
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd="/").stdout
    assert "2 passed" in text
    assert "LOADED ['refimpl.pytest_plugin']" in text


def test_it_is_found_by_pytest():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["pytest11"] == {"refimpl": "refimpl.pytest_plugin"}


@pytest.mark.parametrize("operator", ["attention", "linear_recurrence", "rms_norm"])
def test_every_class_has_a_name(operator):
    more = {"gradients": True, "candidate_vjp": refimpl.OPS[operator].gradient}
    report = refimpl.check(operator, refimpl.OPS[operator].definition, dtypes=["float32"], **more)
    assert {c.klass for c in report.cases} <= set(CLASSES)
    parts = [report.part("float32", klass) for klass in CLASSES]
    assert sum(len(p.cases) for p in parts) == len(report.cases)
