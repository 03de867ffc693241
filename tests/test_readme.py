"""The README says what is so: its example prints what stands there, its table is the catalogue."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def readme():
    spec = importlib.util.spec_from_file_location("readme_tool", ROOT / "tools" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_up_to_date(readme):
    text = readme.README.read_text(encoding="utf-8")
    assert readme.render(text) == text, "run: python tools/readme.py"


def test_stale_parts_are_seen(readme):
    text = readme.README.read_text(encoding="utf-8")
    assert "`linear_recurrence` sequential" in text
    assert readme.render(text.replace("`linear_recurrence` sequential", "`linear` sequential")) == text
    assert readme.render(text.replace("is WRONG", "conforms")) == text


def test_the_two_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test", "test-peers", "lint", "bench"):
        assert f"\n{target}: " in makefile
