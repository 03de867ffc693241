"""What the documentation is made of, without building it: ``make docs`` does that, and checks the built pages."""

import doctest
import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import refimpl
from refimpl.catalogue import catalogue, chapter_of
from refimpl.conformance.mutants import mutants
from refimpl.core.costs import log2_ceil
from refimpl.op import Cost
from refimpl.show import page

DOCS = Path(refimpl.__file__).parents[1] / "docs"
pytestmark = pytest.mark.skipif(not (DOCS / "conf.py").exists(), reason="an installed package has no docs folder beside it")
NAMES = list(catalogue())
PAGES = sorted(p for p in DOCS.rglob("*.md") if not {"_build", "operators", "chapters"} & set(p.relative_to(DOCS).parts))


@pytest.fixture(scope="module", autouse=True)
def extension():
    sys.path.insert(0, str(DOCS / "extension"))
    yield
    sys.path.remove(str(DOCS / "extension"))


def load(name: str):
    return importlib.import_module(name)


# -- operator pages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_chapter_has_what_its_page_needs(name):
    about = page(name)
    missing = [f for f in ("title", "introduction", "equations", "glossary", "variants", "references", "error_bound", "example") if not getattr(about, f)]
    assert not missing, f"{chapter_of(name)} lacks {', '.join(missing)}"
    assert all(form.says for form in about.forms)


@pytest.mark.parametrize("name", NAMES)
def test_every_reference_has_a_bibtex_entry(name):
    bibliography = load("bibliography")
    entries = tuple(bibliography.parse(text) for text in page(name).references)
    for key in catalogue()[name].references:
        assert bibliography.cited(key, entries), f"{name}: the key {key!r} is not in the chapter's list of references"
    for entry in entries:
        text = bibliography.bibtex(entry)
        assert text.count("{") == text.count("}") and entry.year.isdigit() and re.fullmatch(r"[a-z]+\d{4}[a-z0-9]+", entry.key), text


def test_keys_mean_one_work_each():
    bibliography = load("bibliography")
    titles: dict[str, set] = {}
    for name in NAMES:
        for entry in map(bibliography.parse, page(name).references):
            titles.setdefault(entry.key, set()).add(re.sub(r"\W", "", entry.title.lower()))
    for key, found in titles.items():
        assert all(t.startswith(min(found, key=len)[:12]) for t in found), f"{key} stands for {found}"


@pytest.mark.parametrize("text", ["no number", '[1] A. Author, "Title", no year.', "[2] A. Author, Title, 2020."])
def test_a_reference_that_cannot_be_read_is_refused(text):
    with pytest.raises(ValueError, match="reference"):
        load("bibliography").parse(text)


@pytest.mark.parametrize("module", ["bibliography", "prose", "formulas"])
def test_examples_of_the_extension(module):
    result = doctest.testmod(load(module))
    assert result.attempted and not result.failed


def test_formulas_say_what_the_function_computes():
    def cost(T, c, batch=1, chunk=64, **_):
        return Cost((3 * T + max(T, 2)) * c * batch, -(-T // chunk) * np.ceil(np.log2(max(T, 2))) + 2 ** log2_ceil(T), T * (c - 1) / 2)

    assert load("formulas").formulas(cost) == ("(3 T + T) c batch", "⌈T / chunk⌉ ⌈log₂ T⌉ + 2^⌈log₂ T⌉", "T (c - 1) / 2")
    assert load("formulas").formulas(lambda T: Cost(T if T == 3 else [T][T], 1, 1)) is None, "more than arithmetic"


def test_most_costs_have_a_formula():
    formulas = load("formulas").formulas
    costs = [form.cost for op in catalogue().values() for form in op.forms.values()]
    assert sum(formulas(cost) is not None for cost in costs) > 0.9 * len(costs)


@pytest.mark.parametrize("name", ["linear_recurrence", "attention", "moe"])
def test_an_operator_page_says_what_was_asked(name):
    text = load("operator_pages").operator_page(catalogue()[name])
    for heading in ("Arguments and results", "Glossary", "Forms", "Cost", "Gradient", "Accuracy", "Laws", "Where implementations differ", "What people get wrong",
                    "Check yours", "References"):  # fmt: skip
        assert f"## {heading}\n" in text, heading
    assert all(f"{{tab-item}} {form}\n" in text for form in catalogue()[name].forms)
    assert f"{name}: mine conforms" in text and "@misc{" in text
    for mutant in mutants(name):
        assert mutant.name.replace("_", " ").replace("`", "") in text.replace("\\", "")


def test_prose_is_escaped():
    prose = load("prose")
    assert prose.inline("a * b < c_1 [2] `x_1`", cite={"2": "#r2"}.get) == "a \\* b \\< <i>c</i><sub>1</sub> [\\[2\\]](#r2) `x_1`"
    assert prose.inline("2^r and a -> b") == "2<sup><i>r</i></sup> and a → b"
    html = prose.equations_html("    p_ij = e^{s_ij} / l_i     (2)")
    assert html.count("<tr>") == 1 and "(2)" in html and "<sub>" in html and "_" not in html


# -- pages by hand ---------------------------------------------------------------------------------------------------


def cells(path: Path) -> list[str]:
    return re.findall(r"^```\{code-cell\}[^\n]*\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(DOCS).as_posix())
def test_no_python_is_shown_that_was_not_run(path):
    """Python stands in cells, which the build runs, or in files of docs/examples, which are run and recorded."""
    text = path.read_text(encoding="utf-8")
    assert "```python" not in text and "```py\n" not in text, f"{path} shows Python that nothing runs"
    for name in re.findall(r"\{literalinclude\} (\S+)", text):
        target = (path.parent / name).resolve()
        assert target.exists(), f"{path}: {name}"
        if target.suffix == ".py" and target.parent == DOCS / "examples":
            assert target.with_suffix(".txt").exists(), f"{name} was never recorded: python docs/examples/record.py {target.stem}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(DOCS).as_posix())
def test_every_picture_has_an_alternative_text(path):
    for cell in cells(path):
        if "plt.show()" in cell:
            assert re.search(r"^[: ]+alt: \"?.{30,}\"?$", cell, re.MULTILINE), f"{path}: a picture without an alt text:\n{cell[:200]}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(DOCS).as_posix())
def test_cells_are_python(path):
    for cell in cells(path):
        code = re.sub(r"\A---\n.*?^---\n", "", cell, flags=re.MULTILINE | re.DOTALL)
        code = re.sub(r"\A(:.*\n)+|^[!%].*$", "", code, flags=re.MULTILINE)
        compile(code, str(path), "exec")


def test_the_first_page_leads_to_the_check():
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    assert "Check my function\n:link: how_to/check_function" in text


def test_a_broken_link_and_a_picture_without_words_are_found(tmp_path):
    check = load("check_html")
    (tmp_path / "how_to").mkdir()
    (tmp_path / "how_to" / "check_function.html").write_text("<p id='here'>x</p>")
    (tmp_path / "index.html").write_text("<a href='how_to/check_function.html#here'>y</a>")
    assert check.wrong(tmp_path) == []
    (tmp_path / "index.html").write_text("<a href='how_to/check_function.html#there'>y</a> <a href='gone.html'>z</a> <img src='a.png' alt='a.png'>")
    assert len(check.wrong(tmp_path)) == 3
    (tmp_path / "index.html").write_text("<a href='#'>y</a>")
    assert check.wrong(tmp_path) == ["index.html: no link to how_to/check_function.html"]


@pytest.mark.peers
@pytest.mark.parametrize("name", ["torch_attention", "triton_scan", "cupy_scan"])
def test_recorded_examples_still_come_out_so(name):
    for package in re.findall(r"^import (torch|triton|cupy)\b", (DOCS / "examples" / f"{name}.py").read_text(encoding="utf-8"), re.MULTILINE):
        pytest.importorskip(package)
    sys.path.insert(0, str(DOCS / "examples"))
    try:
        record = load("record")
    finally:
        sys.path.remove(str(DOCS / "examples"))
    recorded = (DOCS / "examples" / f"{name}.txt").read_text(encoding="utf-8")
    assert record.verdicts(record.run(name)) == record.verdicts(recorded)
