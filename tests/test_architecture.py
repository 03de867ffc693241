"""The house as it is built: which room may import which, what a chapter is, what an import costs."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import refimpl
from refimpl.catalogue import chapters, public_names

ROOT = Path(refimpl.__file__).parent
FILES = sorted(p for p in ROOT.rglob("*.py") if "__pycache__" not in p.parts)
GPU = ROOT.parent / "gpu"

# Who may import what: the prefixes of refimpl that each room sees, beside itself. The longest matching room counts.
ROOMS = {
    "refimpl.core": (),
    "refimpl.op": ("refimpl.core",),
    "refimpl.laws": ("refimpl.core", "refimpl.op"),
    "refimpl.ops": ("refimpl.core", "refimpl.op", "refimpl.laws"),
    "refimpl.catalogue": ("refimpl.core", "refimpl.op", "refimpl.ops"),
    "refimpl.show": ("refimpl.core", "refimpl.op", "refimpl.laws", "refimpl.catalogue", "refimpl.conformance"),
    "refimpl.conformance": ("refimpl.core", "refimpl.op", "refimpl.laws", "refimpl.ops", "refimpl.catalogue", "refimpl.complexity"),
    "refimpl.complexity": ("refimpl.core", "refimpl.op", "refimpl.laws", "refimpl.ops", "refimpl.catalogue"),
    "refimpl.models": ("refimpl.core", "refimpl.op", "refimpl.laws", "refimpl.ops", "refimpl.catalogue"),
}
FOREIGN = {"torch", "jax", "cupy", "triton", "transformers", "tensorflow", "onnx", "fla", "numba", "cuda"}
OPTIONAL = {"flint": {"refimpl.core.balls"}}  # imported at the top only by the module that is nothing without it


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, top_level_only=False) -> list[tuple[str, int]]:
    """Absolute names that a file imports: ``from refimpl.core import x`` counts as both of its readings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = _outside_functions(tree) if top_level_only else ast.walk(tree)
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def _outside_functions(tree):
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from _outside_functions(node)


def room_of(name: str) -> str | None:
    matching = [r for r in ROOMS if name == r or name.startswith(r + ".")]
    return max(matching, key=len, default=None)


def forbidden(name: str, imported: str) -> str | None:
    """Why a module may not import something; None if it may."""
    if imported.split(".")[0] != "refimpl":
        return None
    if imported.startswith("refimpl.gpu"):
        return "the mirror is loaded by name, on demand"
    room = room_of(name)
    if room is None or imported == "refimpl.__version__":
        return None
    allowed = (room, *ROOMS[room])
    if any(imported == a or imported.startswith(a + ".") for a in allowed):
        return None
    return f"{room} sees only {', '.join(allowed)}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_run_one_way(path):
    name = module_name(path)
    for imported, line in imports(path):
        reason = forbidden(name, imported)
        assert reason is None, f"{path}:{line} imports {imported}: {reason}"


@pytest.mark.parametrize(
    ("name", "imported"),
    [
        ("refimpl.core.numerics", "refimpl.op.Op"),
        ("refimpl.op", "refimpl.catalogue.catalogue"),
        ("refimpl.ops.attention.attention", "refimpl.conformance.check"),
        ("refimpl.ops.attention.attention", "refimpl.OPS"),
        ("refimpl.catalogue", "refimpl.conformance.cases"),
        ("refimpl.conformance.check", "refimpl.cli.main"),
        ("refimpl.cli", "refimpl.gpu.attention.attention"),
    ],
)
def test_a_forbidden_import_would_be_seen(name, imported):
    assert forbidden(name, imported)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_optional_packages_are_imported_on_demand(path):
    for imported, line in imports(path, top_level_only=True):
        package = imported.split(".")[0]
        allowed = OPTIONAL.get(package, set())
        if package in FOREIGN or (package in OPTIONAL and module_name(path) not in allowed):
            pytest.fail(f"{path}:{line} imports {package} at the top: it may be missing; import it where it is used")


@pytest.mark.parametrize("path", [p for p in FILES if (ROOT / "ops") in p.parents], ids=module_name)
def test_the_book_never_imports_a_framework(path):
    found = {i.split(".")[0] for i, _ in imports(path)} & FOREIGN
    assert not found, f"{path} imports {found}"


def test_the_mirror_imports_its_chapter_and_no_more():
    for path in sorted(GPU.rglob("*.py")):
        for imported, line in imports(path):
            legal = ("refimpl.core", "refimpl.op", "refimpl.ops", "refimpl.gpu")
            assert not imported.startswith("refimpl") or imported.startswith(legal), f"{path}:{line} imports {imported}"


@pytest.mark.parametrize("path", sorted((ROOT / "ops").rglob("__init__.py")), ids=module_name)
def test_a_part_is_introduced_by_a_docstring_and_nothing_else(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert len(tree.body) == 1, f"{path} holds more than a docstring"
    assert ast.get_docstring(tree), f"{path} has no docstring"


@pytest.mark.parametrize("name", list(chapters()))
def test_a_chapter_is_short_enough_to_read(name):
    path = Path(importlib.import_module(name).__file__)
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 450, f"{path.name} has {lines} lines: one subject a file; what is shared goes to core"


@pytest.mark.parametrize("name", [c for c in chapters() if hasattr(importlib.import_module(c), "OPS")])
def test_every_public_function_of_a_chapter_is_reachable(name):
    """As a form, a gradient, an error bound, or by ``refimpl.<name>``; else nobody can call it and nothing tests it."""
    module = importlib.import_module(name)
    known = set(map(id, public_names().values()))
    for op in module.OPS:
        known |= {id(f.function) for f in op.forms.values()} | {
            id(op.gradient),
            id(op.error_bound),
            id(op.sample),
            *map(id, op.hard.values()),
        }
    for attribute, value in vars(module).items():
        own = callable(value) and getattr(value, "__module__", None) == name and not attribute.startswith("_")
        if own and not isinstance(value, type):
            assert id(value) in known, f"{name}.{attribute} is neither in an Op nor in __all__"


@pytest.mark.parametrize("path", FILES + sorted(GPU.rglob("*.py")), ids=lambda p: p.stem)
def test_modules_say_what_they_are_for(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if tree.body:
        assert ast.get_docstring(tree), f"{path} has no docstring"


@pytest.mark.parametrize("path", [p for p in FILES if (ROOT / "ops") in p.parents or (ROOT / "core") in p.parents], ids=module_name)
def test_bad_input_is_not_left_to_assert(path):
    """Assertions vanish under ``python -O``."""
    lines = [n.lineno for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Assert)]
    assert not lines, f"{path}: assert at lines {lines}"


def _python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent, timeout=60
    ).stdout.strip()


def test_import_is_lazy():
    """Neither the book nor SciPy nor any framework is loaded by ``import refimpl``."""
    loaded = _python("import sys, refimpl; print([m for m in sys.modules if m.split('.')[0] == 'scipy' or m.startswith('refimpl.')])")
    assert loaded == "[]"


def test_import_is_fast():
    """Under 0.15 s beyond NumPy; the best of three, since other processes share the machine."""
    code = "import numpy, time; t = time.perf_counter(); import refimpl; print(time.perf_counter() - t)"
    assert min(float(_python(code)) for _ in range(3)) < 0.15
