"""The pages of the book: one for each operator and one for each chapter's source, from the catalogue and nothing else.

`write(folder)` makes Markdown of ``refimpl.show.page``, of the records, of the chapter's source and of what the build
measures. What is missing from a page is missing from its chapter.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import math
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import bibliography
import measured
import prose
from counted import counted
from formulas import formulas

import refimpl
from refimpl.catalogue import catalogue, chapter_of, chapters
from refimpl.conformance.cases import parameters
from refimpl.conformance.mutants import mutants
from refimpl.op import Op
from refimpl.show import Page, numpydoc, page, parts, typical_sizes

PARTS = {
    "attention": "Attention",
    "linear_attention": "Linear attention",
    "recurrence": "Recurrences and long convolutions",
    "state_space": "State space models",
    "gated_rnn": "Gated recurrent networks",
    "experts": "Mixtures of experts",
    "quantization": "Quantisation",
    "basics": "Norms and activations",
}


def write(folder: Path) -> list[Path]:
    """Write all pages below `folder`; files that would not change are left alone, those of no operator are removed."""
    pages = {f"operators/{op.name}.md": operator_page(op) for op in catalogue().values()}
    pages |= {f"chapters/{name.partition('ops.')[2].replace('.', '/')}.md": chapter_page(name) for name in chapters()}
    pages |= {f"operators/parts/{part}.md": part_page(part) for part in parts()}
    pages["operators/index.md"] = index_page()
    pages["bibliography.md"] = bibliography_page()
    written = []
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
        written.append(path)
    for stale in {*folder.glob("operators/**/*.md"), *folder.glob("chapters/**/*.md")} - set(written):
        stale.unlink()
    return written


def part_title(part: str) -> str:
    return PARTS.get(part, part.replace("_", " ").capitalize())


def linker(source: str) -> Callable[[str], str | None]:
    """Where a name in backticks leads from a page: to the operator of that name."""

    def link(name: str) -> str | None:
        name = re.split(r"[(\s]", name)[0].removeprefix("refimpl.")
        return f"{'../' * source.count('/')}operators/{name}.md" if name in catalogue() and f"operators/{name}.md" != source else None

    return link


def citer(entries: tuple[bibliography.Entry, ...]) -> Callable[[str], str | None]:
    known = {e.number for e in entries}
    return lambda number: f"#reference-{number}" if number in known else None


# -- an operator -----------------------------------------------------------------------------------------------------


def operator_page(op: Op) -> str:
    """Everything there is to say about one operator."""
    about = page(op.name)
    entries = tuple(bibliography.parse(r) for r in about.references)
    say = functools.partial(prose.markdown, link=linker(f"operators/{op.name}.md"), cite=citer(entries))
    line = functools.partial(prose.inline, link=linker(f"operators/{op.name}.md"), cite=citer(entries))
    chapter = "../chapters/" + about.module.partition("ops.")[2].replace(".", "/") + ".md"
    sections = [
        f"# {op.name}",
        f":::{{div}} lead\n{line(_capital(op.summary))}\n:::",
        f"[Check your implementation](#check-yours-{op.name}) · [Read the chapter]({chapter}) · [{part_title(about.part)}](parts/{about.part}.md)",
        f"*{line(about.title)}.*" if about.title else "",
        say(about.introduction),
        *_interface(op, about, line),
        _glossary(about, line),
        *_forms(op, about, say, line),
        _cost(op, about),
        *_gradient(op, say),
        *_accuracy(op, about, say),
        _laws(about, line),
        *_differences(op, about, say, line),
        *_check_yours(op),
        *_references(entries),
    ]
    return f"---\nmyst:\n  html_meta:\n    description: {_quoted(about.summary)}\n---\n\n" + "\n\n".join(s for s in sections if s) + "\n"


def _interface(op: Op, about: Page, line: Callable) -> Iterator[str]:
    yield "## Arguments and results"
    yield f"```python\n{_wrapped(about.signature)}\n```"
    rows = [("", f"`{a.name}`", _shapes(a.shape), _kind(a.kind, a.optional), line(_shortened(a.says))) for a in about.arguments]
    rows += [("→", f"`{a.name}`", _shapes(a.shape), _kind(a.kind, False), line(_shortened(a.says))) for a in about.results]
    yield _table(("", "array", "shape", "", "what it is"), rows, "arrays")
    if about.options:
        yield _table(
            ("option", "default", "what it does"),
            [(f"`{o.name}`", "" if o.default is inspect.Parameter.empty else f"`{o.default!r}`", line(_shortened(o.says))) for o in about.options],
        )
    yield "A missing head axis is inserted, missing batch axes are broadcast, and arrays in another legal shape (“or”) serve every step or the whole batch."


def _glossary(about: Page, line: Callable) -> str:
    if not about.glossary:
        return ""
    return "## Glossary\n\n" + _table(("in the code", "what it is, and what papers call it"), [(f"`{n}`" if n else "", line(says)) for n, says in about.glossary])


def _forms(op: Op, about: Page, say: Callable, line: Callable) -> Iterator[str]:
    yield "## Forms"
    if len(about.forms) > 1:
        yield f"One operator, {len(about.forms)} algorithms; the first is the definition, and every other equals it, which the test suite checks on every option."
    tabs, shared = [], {}
    for row in about.forms:
        function = op.forms[row.name].function
        code, helpers = _code(function), _helpers(function)
        shared |= helpers
        parts = [say(_body(function))]
        if row.stops:
            parts.append(f"**Stops at:** {line(row.stops)}.")
        if not op.forms[row.name].stabilised:
            parts.append("Not stabilised: the equation as a textbook writes it, for where it is finite.")
        parts.append(f"```python\n{code}\n```")
        tabs.append(f"::::{{tab-item}} {row.name}\n\n" + "\n\n".join(parts) + "\n\n::::")
    yield ":::::{tab-set}\n\n" + "\n\n".join(tabs) + "\n\n:::::"
    if shared:
        yield _dropdown("Functions that the forms share", [f"```python\n{code}\n```" for code in shared.values()])


def _cost(op: Op, about: Page) -> str:
    if all(f.cost is None for f in about.forms):
        return ""
    sizes = ", ".join(f"{k} = {v}" for k, v in about.sizes.items() if v)
    rows = []
    for row in about.forms:
        if row.cost is None:
            continue
        text = formulas(op.forms[row.name].cost) or ("", "", "")
        cells = [f"`{row.name}`"]
        for formula, value in zip(text, dataclasses.astuple(row.cost), strict=True):
            cells.append(f"<span class='formula'>{_formula(formula)}</span><br>{_count(value)}" if formula else _count(value))
        growth = [] if row.growth is None or not op.lengths else [f"{row.growth.work:.3g}"]
        rows.append((*cells, *growth))
    heads = ("form", "work", "depth", "peak", "× at 2T".replace("T", op.lengths[0]) if op.lengths else "")[: max(map(len, rows))]
    return (
        "## Cost\n\nWork is the number of floating-point operations, depth the longest chain of operations that depend on each other, peak the most numbers"
        " alive at once beside the arguments. Below each formula is its value"
        f" for {sizes}{'; the last column is what twice the length does to the work' if op.lengths else ''}.\n\n" + _table(heads, rows, "cost") + _counted(op)
    )


def _counted(op: Op) -> str:
    """Counts of real runs beside the formulas, where the room that counts exists."""
    rows = []
    for c in counted(op):
        growth = "" if c.growth is None else f"{c.growth:.2f}"
        deeper = "" if c.deeper is None else f"{c.deeper:.2f}"
        pairs = (f"{_count(c.work)} / {_count(c.says_work)}", f"{_count(c.depth)} / {_count(c.says_depth)}")
        rows.append((f"`{c.form}`", *pairs, _count(c.peak), growth, deeper))
    if not rows:
        return ""
    small = ", ".join(f"{k} = 64" for k in op.lengths) or "the sample's sizes"
    return (
        f"\n\nThe same counted, operation by operation, on real runs at {small} and small widths, beside what the formulas say there; and the exponents with"
        " which the counts grow when the length doubles.\n\n"
        + _table(("form", "work, counted / formula", "depth, counted / formula", "peak, counted", "exponent of work", "exponent of depth"), rows, "cost")
    )


def _gradient(op: Op, say: Callable) -> Iterator[str]:
    if op.gradient is None:
        return
    yield "## Gradient"
    yield say(_body(op.gradient))
    helpers = _helpers(op.gradient)
    yield _dropdown(f"The code of {op.gradient.__name__}", [f"```python\n{_code(op.gradient)}\n```", *(f"```python\n{c}\n```" for c in helpers.values())])


def _accuracy(op: Op, about: Page, say: Callable) -> Iterator[str]:
    yield "## Accuracy"
    yield say(_body(op.error_bound))
    yield _dropdown("The bound as code", [f"```python\n{_code(op.error_bound)}\n```"])
    rows = []
    for a in measured.accuracy(op):
        rows.append((f"`{a.form}`", str(a.calls), f"{a.error:.1e}" if a.error else "", f"{a.share:.3f}" if a.calls else "", prose.escape(a.worst)))
    yield (
        "Measured when this page was built, in float32 against the definition in float64. An implementation conforms where its error stays below what the"
        " bound allows, in every element.\n\n"
        + _table(("form", "calls", "error, of the largest entry", "largest share of what is allowed", "met at"), rows)
    )


def _laws(about: Page, line: Callable) -> str:
    if not about.laws:
        return ""
    rows = [(f"`{law.name}`", ", ".join(f"`{a}`" for a in law.arguments), line(_sentence(law.says))) for law in about.laws]
    return "## Laws\n\nWhat every right implementation obeys, whatever its algorithm; the kit tests each.\n\n" + _table(("law", "speaks of", ""), rows)


def _differences(op: Op, about: Page, say: Callable, line: Callable) -> Iterator[str]:
    known = mutants(op.name)
    yield "## Where implementations differ"
    yield say(about.variants)
    variants = [m for m in known if m.variant]
    if variants:
        yield "The kit knows these by name; its verdict on them is “deviates”, not “wrong”:"
        yield _definitions((m.name, m.says) for m in variants)
    wrong = [m for m in known if not m.variant]
    if wrong:
        yield "## What people get wrong"
        yield "Each of these is in the kit's catalogue of mistakes. A candidate that makes one is caught, and told so:"
        yield _definitions((m.name + (" (gradient)" if m.of_gradient else ""), m.says) for m in wrong)


def _check_yours(op: Op) -> Iterator[str]:
    yield f"(check-yours-{op.name})=\n## Check yours"
    code = snippet(op)
    yield f"```python\n{code}\n```"
    yield f"```text\n{measured.run(code)}\n```"
    yield (
        f"That was ours. Put your function in its place, or from the command line: `refimpl check {op.name} my_file.py:mine`. For torch, JAX and CuPy say"
        f" `framework=`; see [how to check a torch function](../how_to/check_torch.md) and [a kernel](../how_to/check_kernel.md)."
    )


def snippet(op: Op) -> str:
    """Python that checks an implementation of the operator: run as it stands, it checks the definition."""
    required, optional, options = parameters(op)
    asked = [n for n, default in options.items() if default is inspect.Parameter.empty]
    keywords = "**options" if optional or options or op.stateful else ""
    head = ", ".join(filter(None, [*required, *(["*"] if asked else []), *asked, keywords]))
    call = ", ".join(filter(None, [*required, *(f"{n}={n}" for n in asked), keywords]))
    return textwrap.dedent(f"""\
        import refimpl

        def mine({head}):
            return refimpl.{op.name}({call})  # yours here

        report = refimpl.check("{op.name}", mine, dtypes=["float32"], level="quick")
        print(report)""")


def _references(entries: tuple[bibliography.Entry, ...]) -> Iterator[str]:
    yield "## References"
    yield "\n\n".join(f"(reference-{e.number})=\n\\[{e.number}\\] {prose.escape(e.text)}" for e in entries)
    yield _dropdown("BibTeX", ["```bibtex\n" + "\n\n".join(map(bibliography.bibtex, entries)) + "\n```"])


# -- other pages -----------------------------------------------------------------------------------------------------


def chapter_page(name: str) -> str:
    """A chapter as it is written, top to bottom."""
    module = importlib.import_module(name)
    short = name.partition("ops.")[2]
    path = Path(str(module.__file__))
    depth = "../" * (short.count(".") + 1)
    ops = [op.name for op in getattr(module, "OPS", ())]
    links = f"Its page: {', '.join(f'[{n}]({depth}operators/{n}.md)' for n in ops)}." if ops else ""
    if len(ops) > 1:
        links = links.replace("Its page", "Its pages")
    text = path.read_text(encoding="utf-8").rstrip("\n")
    fence = "```" if "```" not in text else "`````"
    return f"---\norphan: true\n---\n\n# {short.replace('.', '/')}.py\n\nThe source, as it is run. {links}\n\n{fence}{{code-block}} python\n:linenos:\n\n{text}\n{fence}\n"


def part_page(part: str) -> str:
    ops = parts()[part]
    introduction = inspect.getdoc(importlib.import_module(f"refimpl.ops.{part}")) or ""
    rows = [(f"[{op.name}](../{op.name}.md)", prose.inline(op.summary), ", ".join(f"`{f}`" for f in op.forms)) for op in ops]
    toctree = "\n".join(f"../{op.name}" for op in ops)
    return (
        f"# {part_title(part)}\n\n{prose.markdown(introduction, link=linker(f'operators/parts/{part}.md'))}\n\n"
        + _table(("operator", "in a line", "forms"), rows)
        + f"\n\n```{{toctree}}\n:hidden:\n\n{toctree}\n```\n"
    )


def index_page() -> str:
    found = parts()
    order = [p for p in PARTS if p in found] + sorted(set(found) - set(PARTS))
    sections = []
    for part in order:
        rows = [(f"[{op.name}]({op.name}.md)", prose.inline(op.summary)) for op in found[part]]
        sections.append(f"## [{part_title(part)}](parts/{part}.md)\n\n" + _table(("operator", ""), rows))
    more = []
    for name in chapters():
        module = importlib.import_module(name)
        functions = [f for f in getattr(module, "__all__", ()) if callable(getattr(module, f))]
        if functions and not hasattr(module, "OPS"):
            title = (inspect.getdoc(module) or "").partition("\n")[0].rstrip(".")
            listed = ", ".join(f"`refimpl.{f}`" for f in functions)
            more.append((f"[{name.rpartition('.')[2]}](../chapters/{name.partition('ops.')[2].replace('.', '/')}.md)", prose.inline(title), listed))
    if more:
        text = "Tools that operators share, and algorithms that are no function of arrays alone; each is a chapter to read, with its tests."
        sections.append(f"## Chapters beside the operators\n\n{text}\n\n" + _table(("chapter", "", "functions"), more))
    toctree = "\n".join(f"parts/{part}" for part in order)
    count = len(catalogue())
    return (
        f"# Operators\n\n{count} operators. Each page is made from the operator's chapter: its equations, every form with its code and cost, gradient, error"
        " bound, where implementations differ and what people get wrong, references; and a snippet that checks yours.\n\n"
        + "\n\n".join(sections)
        + f"\n\n```{{toctree}}\n:hidden:\n:maxdepth: 1\n\n{toctree}\n../bibliography\n```\n"
    )


def bibliography_page() -> str:
    """Every reference of every chapter, once."""
    entries: dict[str, tuple[bibliography.Entry, set[str]]] = {}
    for name in catalogue():
        for text in page(name).references:
            entry = bibliography.parse(text)
            kept, users = entries.get(entry.key, (entry, set()))
            longer = max(kept, entry, key=lambda e: (len(e.authors), len(e.title)))
            entries[entry.key] = longer, users | {name}
    rows, blocks = [], []
    for key in sorted(entries):
        entry, users = entries[key]
        entry = dataclasses.replace(entry, place="")
        who = ", ".join(a for a in entry.authors if a != "others") + (" et al." if "others" in entry.authors else "")
        where = ", ".join(filter(None, [entry.venue, entry.year, f"arXiv:{entry.arxiv}" if entry.arxiv else ""]))
        rows.append((prose.escape(f"{who}, “{entry.title}”, {where}"), ", ".join(f"[{n}](operators/{n}.md)" for n in sorted(users))))
        blocks.append(bibliography.bibtex(entry))
    own = bibliography.software(refimpl.__version__)
    return (
        "# Bibliography\n\nThe references of all chapters; each operator's page says which section or equation is meant.\n\n"
        + _table(("reference", "operators"), rows)
        + "\n\n## All of it as BibTeX\n\n```bibtex\n"
        + "\n\n".join([own, *blocks])
        + "\n```\n"
    )


# -- source code -----------------------------------------------------------------------------------------------------


def _code(function: Callable) -> str:
    """A function's source without decorators and docstring."""
    function = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))
    tree = ast.parse(source).body[0]
    lines = source.rstrip("\n").split("\n")
    if isinstance(tree, ast.FunctionDef):
        first = tree.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            del lines[first.lineno - 1 : first.end_lineno]
        lines = lines[tree.lineno - 1 :]
    return "\n".join(lines)


def _helpers(function: Callable) -> dict[str, str]:
    """The private functions of the chapter's part that a function uses, directly or not, by name."""
    found: dict[str, str] = {}

    def visit(f: Callable) -> None:
        f = inspect.unwrap(f)
        for name in _names(f.__code__):
            value = f.__globals__.get(name)
            if inspect.isfunction(value) and name not in found and name.startswith("_") and value.__module__.startswith("refimpl.ops"):
                found[name] = _code(value)
                visit(value)

    visit(function)
    return found


def _names(code) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from _names(constant)


def _body(function: Callable) -> str:
    """The prose of a docstring: what comes before its parameters, and its notes."""
    doc = numpydoc(function)
    return "\n\n".join(filter(None, [doc.get("", "").strip("\n"), doc.get("Notes", "").strip("\n")]))


# -- Markdown --------------------------------------------------------------------------------------------------------


def _table(heads: tuple[str, ...], rows: list, name: str = "") -> str:
    def cell(text: str) -> str:
        return re.sub(r"(?<!\\)\|", r"\\|", " ".join(str(text).split()))

    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    kind = f" {name}" if name else ""
    return f":::{{div}} wide{kind}\n\n" + "\n".join(lines) + "\n\n:::"


def _definitions(rows) -> str:
    return "\n".join(f"- **{prose.escape(name.replace('_', ' '))}**: {prose.inline(_sentence(says))}" for name, says in rows)


def _dropdown(title: str, parts: list[str]) -> str:
    return f"::::{{dropdown}} {title}\n\n" + "\n\n".join(parts) + "\n\n::::"


def _wrapped(signature: str) -> str:
    """A signature over several lines where it is long."""
    if len(signature) < 90:
        return signature
    head, _, rest = signature.partition("(")
    return textwrap.fill(rest, 86, initial_indent=f"{head}(", subsequent_indent="    ")


def _shortened(text: str) -> str:
    return text.strip()


def _capital(text: str) -> str:
    """With a capital letter, where it begins with a word."""
    return text[0].upper() + text[1:] if re.match(r"[a-z]{2,}\b(?!\()|a\s", text) else text


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _kind(kind: str, optional: bool) -> str:
    words = {"number": "", "free": ""}.get(kind, kind)
    return ", ".join(filter(None, [words, "optional" if optional else ""]))


def _shapes(text: str) -> str:
    return " or ".join(f"`{shape}`" for shape in text.split(" or "))


def _count(value: float) -> str:
    if value < 1e4:
        return f"{value:.0f}"
    power = int(math.log10(value))
    return f"{value / 10**power:.1f}·10<sup>{power}</sup>"


def _formula(text: str) -> str:
    return prose.typeset(text).replace("|", "\\|")


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', "'") + '"'


__all__ = ["bibliography_page", "chapter_of", "operator_page", "typical_sizes", "write"]
