"""What there is to say about an operator, as data: gathered from the chapter's docstring and the Op record.

``refimpl show attention`` prints a `Page`, and the operator's page in the documentation is made of one. Nothing here is
written by hand for one operator; what is missing from a page is missing from its chapter.
"""

import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import refimpl.laws
from refimpl.catalogue import catalogue, chapter_of, operator
from refimpl.op import Cost, Form, Law, Op

TYPICAL = {"c": 256, "d": 64, "e": 64, "p": 64, "n": 16, "W": 4}
LENGTH = 1024


@dataclass(frozen=True)
class ShapeRow:
    """An array that is taken or given: ``q``, ``(..., H, n, d)``, what it is."""

    name: str
    shape: str
    kind: str
    optional: bool
    says: str


@dataclass(frozen=True)
class OptionRow:
    """An option: its default, the values that are covered, what it does."""

    name: str
    default: Any
    values: tuple
    says: str


@dataclass(frozen=True)
class FormRow:
    """An algorithm: in a sentence, and what it costs at the page's sizes, with the factor for twice the length."""

    name: str
    says: str
    cost: Cost | None
    growth: Cost | None
    stops: str


@dataclass(frozen=True)
class LawRow:
    name: str
    arguments: tuple[str, ...]
    says: str


@dataclass(frozen=True)
class Page:
    """Everything known about one operator.

    Attributes
    ----------
    name, part, module : str
        ``linear_recurrence``, ``recurrence``, ``refimpl.ops.recurrence.linear_recurrence``.
    title, summary : str
    introduction : str
        The chapter's text between title and glossary, the equations among it.
    equations : tuple of str
        The numbered equations and other set-off lines.
    signature : str
    arguments, results : tuple of ShapeRow
    options : tuple of OptionRow
    glossary : tuple of (str, str)
        The code's name and the paper's symbol.
    forms : tuple of FormRow
    sizes : mapping of str to int
        The sizes at which `forms` states costs.
    laws : tuple of LawRow
    error_bound, gradient : str
    variants : str
        Where implementations differ.
    deviations : tuple of (str, str)
        Legitimate variants that the kit knows by name, and what it says on meeting one.
    references : tuple of str
    example : str
    """

    name: str
    part: str
    module: str
    title: str
    summary: str
    introduction: str
    equations: tuple[str, ...]
    signature: str
    arguments: tuple[ShapeRow, ...]
    results: tuple[ShapeRow, ...]
    options: tuple[OptionRow, ...]
    glossary: tuple[tuple[str, str], ...]
    forms: tuple[FormRow, ...]
    sizes: Mapping[str, int]
    laws: tuple[LawRow, ...]
    error_bound: str
    gradient: str
    variants: str
    deviations: tuple[tuple[str, str], ...]
    references: tuple[str, ...]
    example: str

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def parts() -> dict[str, list[Op]]:
    """The catalogue by part of the book."""
    found: dict[str, list[Op]] = {}
    for op in catalogue().values():
        found.setdefault(chapter_of(op.name).split(".")[2], []).append(op)
    return found


def page(name: str) -> Page:
    """Gather what there is to say about an operator.

    Raises
    ------
    ValueError
        If there is no such operator.

    Examples
    --------
    >>> page("linear_recurrence").equations[0]
    'h_t = a_t h_{t-1} + b_t,        t = 0 ... T-1,        h_{-1} = state, 0 if none is given              (1)'
    """
    op = operator(name)
    module = chapter_of(name)
    chapter = sections(inspect.getdoc(importlib.import_module(module)) or "")
    definition = numpydoc(op.definition)
    described = dict(parameters(definition))
    title, _, introduction = chapter.get("", "").partition("\n")
    sizes = typical_sizes(op)
    return Page(
        name=op.name,
        part=module.split(".")[2],
        module=module,
        title=title.strip().rstrip("."),
        summary=op.summary,
        introduction=introduction.strip("\n"),
        equations=tuple(equations(introduction)),
        signature=signature(op),
        arguments=tuple(_arguments(op, described)),
        results=tuple(_results(op, definition)),
        options=tuple(_options(op, described)),
        glossary=tuple(glossary(chapter.get("Glossary", ""))),
        forms=tuple(_form(n, f, op, sizes) for n, f in op.forms.items()),
        sizes=sizes,
        laws=tuple(LawRow(law.name, tuple(law.arguments), _what_law_says(law)) for law in op.laws),
        error_bound=_prose(inspect.getdoc(op.error_bound)),
        gradient=_prose(inspect.getdoc(op.gradient)) if op.gradient else "",
        variants=chapter.get("Where implementations differ", ""),
        deviations=tuple(_deviations(name)),
        references=tuple(references(chapter.get("References", ""))),
        example=definition.get("Examples", ""),
    )


# -- reading docstrings ----------------------------------------------------------------------------------------------


def sections(text: str) -> dict[str, str]:
    """A chapter's docstring by heading; the part before the first is under "".

    A heading is a line of its own at the margin, followed by an indented line, after an empty one.
    """
    lines = text.splitlines()
    found: dict[str, list[str]] = {"": []}
    heading = ""
    for i, line in enumerate(lines):
        starts = re.fullmatch(r"[A-Z][\w ,'-]{2,60}", line) and (i == 0 or not lines[i - 1].strip())
        if starts and i and i + 1 < len(lines) and lines[i + 1].startswith("    "):
            heading = line
            found[heading] = []
        else:
            found[heading].append(line)
    return {name: textwrap.dedent("\n".join(body)).strip("\n") for name, body in found.items()}


def numpydoc(function: Callable) -> dict[str, str]:
    """A function's docstring by section; the text before the first is under ""."""
    found: dict[str, list[str]] = {"": []}
    heading = ""
    lines = (inspect.getdoc(function) or "").splitlines()
    for i, line in enumerate(lines):
        if i + 1 < len(lines) and line.strip() and re.fullmatch(r"-{3,}", lines[i + 1]):
            heading = line.strip()
            found[heading] = []
        elif not (i and re.fullmatch(r"-{3,}", line) and lines[i - 1].strip() == heading):
            found[heading].append(line)
    return {name: "\n".join(body).strip("\n") for name, body in found.items()}


def parameters(doc: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Names and descriptions of a numpydoc section "Parameters"; names that share one entry share its text."""
    for entry in re.split(r"\n(?=\S)", doc.get("Parameters", "")):
        head, _, body = entry.partition("\n")
        names, _, kind = head.partition(" : ")
        text = " ".join(body.split())
        for name in names.split(","):
            if name.strip():
                yield name.strip().lstrip("*"), text or kind.strip()


def glossary(text: str) -> Iterator[tuple[str, str]]:
    """Rows of a glossary: a name, two spaces or more, its meaning; deeper lines go on with the meaning."""
    row: tuple[str, str] | None = None
    for line in text.splitlines():
        match = re.fullmatch(r"(\S.*?)\s{2,}(\S.*)", line)
        if match:
            if row:
                yield row
            row = match.group(1), match.group(2)
        elif row and line.startswith(" "):
            row = row[0], f"{row[1]} {line.strip()}"
        elif line.strip():
            if row:
                yield row
            row = "", line.strip()
    if row:
        yield row


def equations(text: str) -> Iterator[str]:
    """The indented lines of a text, block by block."""
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.splitlines() if line.strip()]
        indented = [line for line in lines if line.startswith("    ")]
        if indented:
            yield textwrap.dedent("\n".join(indented))


def references(text: str) -> Iterator[str]:
    """Entries that begin with a key in brackets, each as one line."""
    for entry in re.split(r"\n(?=\[)", text.strip()):
        if entry.strip():
            yield " ".join(entry.split())


def signature(op: Op) -> str:
    """``attention(q, k, v, *, causal=False, ...)``."""
    return f"{op.name}{inspect.signature(op.definition)}"


# -- reading the record ----------------------------------------------------------------------------------------------


def typical_sizes(op: Op) -> dict[str, int]:
    """Sizes at which costs are stated: 1024 steps, features and states of the usual widths."""
    small = {p.name: p.default for p in inspect.signature(op.sample).parameters.values() if p.kind is p.KEYWORD_ONLY}
    sizes = {k: v for k, v in small.items() if isinstance(v, int) and not isinstance(v, bool)}
    return {k: LENGTH if k in op.lengths else TYPICAL.get(k, v) for k, v in sizes.items()}


def _form(name: str, form: Form, op: Op, sizes: Mapping[str, int]) -> FormRow:
    says = _first_sentence(inspect.getdoc(form.function))
    longer = {k: 2 * v if k in op.lengths else v for k, v in sizes.items()}
    cost, cost2 = _cost(form, sizes), _cost(form, longer)
    growth = None
    if cost is not None and cost2 is not None:
        growth = Cost(*(b / a if a else 1.0 for a, b in zip(dataclasses.astuple(cost), dataclasses.astuple(cost2), strict=True)))
    return FormRow(name, says, cost, growth, form.stops)


def _cost(form: Form, sizes: Mapping[str, int]) -> Cost | None:
    taken = inspect.signature(form.cost).parameters
    everything = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    try:
        cost = form.cost(**{k: v for k, v in sizes.items() if everything or k in taken})
    except TypeError:
        return None
    return Cost(float(cost.work), float(cost.depth), float(cost.peak))


def _arguments(op: Op, described: Mapping[str, str]) -> Iterator[ShapeRow]:
    defaults = {p.name: p.default for p in inspect.signature(op.definition).parameters.values()}
    for array in op.contract.arrays:
        name = array.name.partition(".")[0]
        optional = defaults.get(name, inspect.Parameter.empty) is not inspect.Parameter.empty
        many = f"{array.count} arrays " if array.count else ""
        yield ShapeRow(array.name, many + " or ".join(map(str, array.shapes)), array.kind, optional, described.get(array.name, described.get(name, "")))


def _results(op: Op, definition: Mapping[str, str]) -> Iterator[ShapeRow]:
    described = dict(parameters({"Parameters": definition.get("Returns", "")}))
    for array in op.contract.results:
        says = described.get(array.name, "")
        yield ShapeRow(array.name, " or ".join(map(str, array.shapes)), array.kind, False, "" if says.startswith("ndarray") else says)


def _options(op: Op, described: Mapping[str, str]) -> Iterator[OptionRow]:
    arrays = {a.name.partition(".")[0] for a in op.contract.arrays} | {"state", "return_state"}
    for p in inspect.signature(op.definition).parameters.values():
        if p.name not in arrays and p.default is not p.empty:
            values = tuple(v for v in op.options.get(p.name, ()) if not callable(v))
            yield OptionRow(p.name, p.default, values, described.get(p.name, ""))


def _what_law_says(law: Law) -> str:
    """The docstring of the law, or of the function that made it, or else its name in words."""
    if law.holds.__doc__:
        return _first_sentence(law.holds.__doc__)
    maker = getattr(refimpl.laws, law.name, None)
    return _first_sentence(inspect.getdoc(maker)).replace("`names`", " and ".join(law.arguments)) or law.name.replace("_", " ")


def _deviations(name: str) -> Iterator[tuple[str, str]]:
    from refimpl.conformance.mutants import mutants

    for mutant in mutants(name):
        if mutant.variant:
            yield mutant.name, mutant.says


def _prose(doc: str | None) -> str:
    """A docstring up to its first numpydoc section."""
    return re.split(r"\n[A-Z]\w+\n-{3,}\n", doc or "")[0].strip()


def _first_sentence(doc: str | None) -> str:
    text = " ".join((doc or "").split("\n\n")[0].split())
    match = re.match(r".*?[.](?=\s+[A-Z]|$)", text)
    return (match.group() if match else text).rstrip(".:")
