"""What is installed: one package, `refimpl`, with `refimpl.gpu` inside, complete, light to import, and the same as wheel and in place."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import refimpl

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HERE = {"PYTHONPATH": str(Path(refimpl.__file__).parents[1])}  # also where PYTHONPATH is a relative one


def python(code, cwd, executable=sys.executable, **more):
    done = subprocess.run([executable, "-c", code], cwd=cwd, env=os.environ | more, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_every_package_is_listed():
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "refimpl").rglob("__init__.py")}
    found |= {".".join(("refimpl", *p.parent.relative_to(ROOT).parts)) for p in (ROOT / "gpu").rglob("__init__.py")}
    assert sorted(found) == sorted(PROJECT["tool"]["setuptools"]["packages"])


def test_the_linters_of_pre_commit_are_those_of_the_project():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    pinned = PROJECT["project"]["optional-dependencies"]["lint"]
    assert all("==" in pin for pin in pinned)
    assert re.findall(r'"((?:ruff|mypy)==[^"]+)"', hooks) == pinned


def test_citation_names_this_version():
    assert f"\nversion: {refimpl.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_no_top_level_module_called_gpu(tmp_path):
    installed = importlib.util.find_spec("refimpl")
    assert installed is not None
    code = "import importlib.util, refimpl; found = importlib.util.find_spec('gpu'); print(found.origin if found else 'none')"
    if os.environ.get("PYTHONPATH"):  # the checkout itself is on the path, and so is its folder
        pytest.skip("refimpl is not installed here, but on PYTHONPATH")
    assert python(code, tmp_path) == "none"


def test_gpu_without_cupy_says_what_to_install(tmp_path):
    code = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "cupy" else found(name, *more)
spec = importlib.util.spec_from_file_location("refimpl.gpu", ORIGIN)
try:
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
except ImportError as error:
    print(error.name, error)
""".replace("ORIGIN", repr(str(ROOT / "gpu" / "__init__.py")))
    message = python(code, tmp_path, **HERE, NUMBA_ENABLE_CUDASIM="0")
    for word in ("cupy", "CuPy", "refimpl[cuda12]", "refimpl[cuda13]"):
        assert word in message


def test_nothing_loads_the_mirror_or_a_framework(tmp_path):
    code = """
import sys, refimpl
import refimpl.cli, refimpl.show, refimpl.conformance.survey
refimpl.OPS, refimpl.check
print(sorted({m.partition(".")[0] for m in sys.modules} & {"torch", "jax", "cupy", "onnx", "transformers", "flint", "matplotlib", "jinja2"} | {m for m in sys.modules if m.startswith("refimpl.gpu")}))
"""
    assert python(code, tmp_path, **HERE) == "[]"


def test_import_is_quick(tmp_path):
    code = "import time, numpy; start = time.perf_counter(); import refimpl; print(time.perf_counter() - start)"
    assert min(float(python(code, tmp_path, **HERE)) for _ in range(5)) < 0.15


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(tmp_path):
    dist, target = tmp_path / "dist", tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", dist, ROOT], check=True, cwd=tmp_path)
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"refimpl"}
    for name in ("refimpl/py.typed", "refimpl/gpu/__init__.py", "refimpl/ops/recurrence/linear_recurrence.py"):
        assert name in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True, cwd=tmp_path)
    here = {"PYTHONPATH": str(target)}
    assert python("import refimpl; print(refimpl.__file__)", tmp_path, **here).startswith(str(target))
    assert python("import importlib.util; print(importlib.util.find_spec('gpu'))", tmp_path, **here) == "None"
    assert "linear_recurrence" in python("import refimpl; print(list(refimpl.OPS))", tmp_path, **here)
    code = "import refimpl; print(refimpl.check('linear_recurrence', refimpl.linear_recurrence, level='quick').verdict)"
    assert python(code, tmp_path, **here) == "conforms"
