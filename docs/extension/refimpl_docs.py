"""The Sphinx extension: writes the pages of the book before they are read, and sets equations."""

from pathlib import Path

import claim_pages
import operator_pages
import prose
from docutils import nodes
from docutils.parsers.rst import Directive


class Equations(Directive):
    """Set-off lines of a chapter, numbered as they are there."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        text = "\n".join(self.content)
        return [nodes.raw("", prose.equations_html("\n".join(f"    {line}" for line in text.split("\n"))), format="html")]


def set_subscripts(app, doctree: nodes.document) -> None:
    """In pages by hand: a_t and e^{-m} in running text as the chapters' pages have them."""
    if not app.env.docname.startswith(("essays/", "how_to/")):
        return
    for text in list(doctree.findall(nodes.Text)):
        ancestors = text.parent, text.parent.parent
        if any(isinstance(a, nodes.literal | nodes.literal_block | nodes.raw | nodes.title | nodes.comment | nodes.math | nodes.target) for a in ancestors if a):
            continue
        if new := prose.shifted_html(str(text)):
            text.parent.replace(text, nodes.raw("", new, format="html"))


def escape_bars(app, what, name, object, options, lines: list[str]) -> None:
    """Docstrings write |x| for a size; reStructuredText would look for a substitution of that name."""
    lines[:] = ["``".join(part if i % 2 else part.replace("|", "\\|") for i, part in enumerate(line.split("``"))) for line in lines]


def write(app) -> None:
    operator_pages.write(Path(app.srcdir))
    claim_pages.write(Path(app.srcdir))


def setup(app) -> dict:
    app.add_directive("equations", Equations)
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("doctree-read", set_subscripts)
    app.connect("builder-inited", write)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
