"""What `refimpl show` and the documentation say about an operator is in its chapter, and nothing is missing there."""

import json

import pytest

import refimpl
from refimpl import show

DOC = """Title of it.

    y = x        (1)

Some words.

Glossary
    x, y    in and out
    z       a long story
            that goes on

Where implementations differ
    They do.

References
    [1] A. Author, "Title",
        Journal, 1999.
    [2] B. Author.
"""


@pytest.mark.parametrize("name", list(refimpl.OPS))
def test_chapters_are_complete(name):
    page, op = show.page(name), refimpl.OPS[name]
    for part in ("title", "introduction", "equations", "glossary", "references", "error_bound", "variants"):
        assert getattr(page, part), f"{page.module} has no {part}"
    for row in (*page.arguments, *page.options):
        assert row.says, f"{name}: the docstring of the definition does not describe {row.name}"
    assert [row.name for row in page.forms] == list(op.forms)
    for form in page.forms:
        assert form.says, f"{name}: the form {form.name} has no docstring"
        assert form.cost is not None, f"{name}: the cost of {form.name} cannot be computed from {page.sizes}"
        assert min(form.cost.work, form.cost.depth, form.cost.peak) >= 0
    assert bool(page.gradient) == (op.gradient is not None)
    assert [law.name for law in page.laws] == [law.name for law in op.laws]
    json.dumps(page.to_dict())


def test_sections():
    found = show.sections(DOC)
    assert list(found) == ["", "Glossary", "Where implementations differ", "References"]
    assert list(show.equations(found[""])) == ["y = x        (1)"]
    assert list(show.glossary(found["Glossary"])) == [("x, y", "in and out"), ("z", "a long story that goes on")]
    assert found["Where implementations differ"] == "They do."
    assert list(show.references(found["References"])) == ['[1] A. Author, "Title", Journal, 1999.', "[2] B. Author."]


def test_growth_of_cost():
    forms = {form.name: form for form in show.page("linear_recurrence").forms}
    assert forms["sequential"].growth.depth == 2
    assert forms["blelloch"].growth.depth == pytest.approx(42 / 38)  # 4 log2 T - 2


def test_unknown():
    with pytest.raises(ValueError, match="did you mean"):
        show.page("linear_recurrnce")
