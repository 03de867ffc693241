"""The command line: check, list, show, cost, claims, scale, survey.

Exit codes of ``refimpl check``: 0 the candidate conforms, 1 it does not, 2 the command was wrong, 3 the candidate could
not be run. Whatever a user can get wrong ends in one line on standard error, never in a traceback.
"""

import ast
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

CONFORMS, DOES_NOT, USAGE, NOT_RUN = 0, 1, 2, 3
INTERRUPTED = 130

app = typer.Typer(
    name="refimpl",
    help="Ground truth for sequence-model operators: hold an implementation against a readable reference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line (the entry point ``refimpl``)."""
    app()


def fail(message: str, code: int = USAGE) -> NoReturn:
    """One line on standard error, then the exit code."""
    print(f"refimpl: {' '.join(str(message).split())}", file=sys.stderr)
    raise typer.Exit(code)


# -- check -----------------------------------------------------------------------------------------------------------


@app.command()
def check(
    operator: Annotated[str, typer.Argument(metavar="OPERATOR", help="A name from `refimpl list`.")],
    candidate: Annotated[str, typer.Argument(metavar="FILE_OR_MODULE:NAME", help="my_file.py:my_attention, or my_package.kernels:attention.")],
    framework: Annotated[str, typer.Option(help="Whose arrays the candidate takes: numpy, torch, jax, cupy.")] = "numpy",
    device: Annotated[str | None, typer.Option(help="Where they are put, for instance cuda.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="A precision to check; may be repeated. [default: float64 and float32]")] = None,
    grad: Annotated[bool, typer.Option("--grad", help="Check gradients too, by the framework's differentiation.")] = False,
    layout: Annotated[str | None, typer.Option(help="The candidate's order of axes, for instance bthd.")] = None,
    level: Annotated[str, typer.Option(help="quick, standard or exhaustive.")] = "standard",
    option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Fix an option: causal=true. May be repeated.")] = None,
    size: Annotated[list[str] | None, typer.Option(metavar="LETTER=SIZES", help="Sizes that are supported: d=64,128, or T=%64 for multiples.")] = None,
    seed: Annotated[int, typer.Option(help="Of the inputs; the same seed gives the same cases.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds that one case may take.")] = 60.0,
    memory: Annotated[float | None, typer.Option(metavar="GIB", help="Host memory that the candidate may take. [default: half of the machine's]")] = None,
    no_isolate: Annotated[bool, typer.Option("--no-isolate", help="Run the candidate in this process (quicker; a crash ends the run).")] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first failure.")] = False,
    save: Annotated[Path | None, typer.Option(metavar="PATH", help="Where results are kept as they arrive. [default: a cache folder]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run of the same check.")] = False,
    json: Annotated[Path | None, typer.Option(metavar="PATH", help="Also write the report as JSON.")] = None,
    junit: Annotated[Path | None, typer.Option(metavar="PATH", help="Also write the report as JUnit XML.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="PATH", help="Also write the report as a page with pictures.")] = None,
) -> None:
    """Hold an implementation against the reference.

    Exit code 0: it conforms. 1: it does not. 2: the command was wrong. 3: the candidate could not be run.
    """
    from refimpl.catalogue import catalogue, unknown

    if operator not in catalogue():
        fail(unknown(operator))
    for path in (json, junit, html, save):
        if path is not None and not path.absolute().parent.is_dir():
            fail(f"cannot write {path}: there is no folder {path.absolute().parent}")
    if no_isolate and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m does: MODULE:NAME is looked for where the user stands

    import refimpl
    from refimpl.conformance.worker import NotFound

    with progress_bar(f"checking {candidate}") as step:
        try:
            report = refimpl.check(
                operator,
                candidate,
                framework=framework,
                device=device,
                dtypes=tuple(dtype) if dtype else ("float64", "float32"),
                gradients=grad,
                layout=layout,
                domain=domain(option or [], size or []),
                level=level,
                fail_fast=fail_fast,
                isolate=not no_isolate,
                timeout=timeout,
                memory=memory,
                seed=seed,
                save=save or True,
                resume=resume,
                progress=step,
            )
        except NotFound as error:
            fail(f"{error}", NOT_RUN if "fails: " in str(error) else USAGE)
        except (ValueError, TypeError, ImportError, OSError) as error:
            fail(f"{error}")
        except KeyboardInterrupt:
            fail(f"interrupted after {step.done} of {step.total} cases", INTERRUPTED)

    if sys.stdout.isatty():
        from refimpl.conformance.terminal import show

        show(report)
    else:
        print(report)
    for path, write in ((json, report.to_json), (junit, report.to_junit), (html, report.to_html)):
        if path is not None:
            path.write_text(write(), encoding="utf-8")
    if report.interrupted:
        print(f"\nto go on with it, the same command and {f'--save {save} ' if save else ''}--resume")
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(CONFORMS if report.ok else NOT_RUN if report.verdict == "inconclusive" else DOES_NOT)


def near(name: str, names: set[str]) -> str:
    import difflib

    found = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(found)}?" if found else f"; there are {', '.join(sorted(names))}"


def domain(options: list[str], sizes: list[str]) -> Any:
    """What ``--option`` and ``--size`` say, as a Domain; None if they say nothing."""
    import refimpl

    chosen: dict[str, list] = {}
    for text in options:
        name, value = halves(text, "--option", "NAME=VALUE")
        chosen.setdefault(name.replace("-", "_"), []).append(literal(value))
    rules: dict[str, Any] = {}
    for text in sizes:
        letter, value = halves(text, "--size", "LETTER=SIZES")
        try:
            rules[letter] = refimpl.multiple_of(int(value[1:])) if value.startswith("%") else [int(v) for v in value.split(",")]
        except ValueError:
            fail(f"--size {text}: sizes are written d=64,128 or T=%64")
    return refimpl.Domain(options=chosen, **rules) if chosen or rules else None


def halves(text: str, flag: str, form: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        fail(f"{flag} takes {form}, got {text!r}")
    return name.strip(), value.strip()


def literal(text: str) -> Any:
    """A value as Python writes it, also true, false and none; anything else is a word."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


class Step:
    """How far a run is; called by the kit after each case."""

    def __init__(self, show: Callable[[int, int, str], None] | None = None):
        self.done = self.total = 0
        self._show = show

    def __call__(self, done: int, total: int, label: str = "") -> None:
        self.done, self.total = done, total
        if self._show is not None:
            self._show(done, total, label)


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Step]:
    """A bar on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty():
        yield Step()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("[dim]{task.fields[label]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, label="")
        yield Step(lambda done, total, label: bar.update(task, completed=done, total=total, label=label[:40]))


# -- list, show ------------------------------------------------------------------------------------------------------


@app.command(name="list")
def list_operators() -> None:
    """Print the operators, part by part, with their forms."""
    from refimpl.catalogue import catalogue
    from refimpl.show import parts

    width = max((len(name) for name in catalogue()), default=0)
    for part, ops in parts().items():
        heading(part.replace("_", " "))
        for op in ops:
            print(f"  {op.name:{width}}  {op.summary}")
            print(f"  {'':{width}}  forms: {', '.join(op.forms)}")


@app.command()
def show(operator: Annotated[str, typer.Argument(metavar="OPERATOR", help="A name from `refimpl list`.")]) -> None:
    """Print what is known about an operator: equation, shapes, forms and their cost, laws, references."""
    from refimpl.catalogue import catalogue, unknown
    from refimpl.show import page

    if operator not in catalogue():
        fail(unknown(operator))
    print_page(page(operator))


def print_page(page: Any) -> None:
    """Print a `refimpl.show.Page`."""
    heading(page.title)
    print(f"{page.introduction}\n\n{wrapped(page.signature, 4)}")
    heading("\nShapes")
    table([(("[" + row.name + "]") if row.optional else row.name, row.shape, row.says) for row in page.arguments], "  ")
    table([("-> " + row.name, row.shape, row.says) for row in page.results], "  ")
    if page.options:
        heading("\nOptions")
        table([(f"{row.name}={row.default!r}", row.says or ", ".join(map(repr, row.values))) for row in page.options], "  ")
    if page.glossary:
        heading("\nGlossary")
        table(list(page.glossary), "  ")
    sizes = ", ".join(f"{letter} = {size}" for letter, size in page.sizes.items())
    heading(f"\nForms, the first being the definition; cost at {sizes}, and its growth when the length doubles")
    rows = [("form", "operations", "depth", "elements alive")]
    for form in page.forms:
        if form.cost is None:
            rows.append((form.name, "?", "?", "?"))
        else:
            pairs = zip((form.cost.work, form.cost.depth, form.cost.peak), (form.growth.work, form.growth.depth, form.growth.peak), strict=True)
            rows.append((form.name, *(f"{short(value)} ×{growth:.1f}" for value, growth in pairs)))
    table(rows, "  ")
    print()
    table([(form.name, form.says + (f". Stops: {form.stops}" if form.stops else "") + ".") for form in page.forms], "  ")
    if page.laws:
        heading("\nLaws")
        table([(f"{law.name}({', '.join(law.arguments)})", law.says + ".") for law in page.laws], "  ")
    for title, text in (("Error bound", page.error_bound), ("Gradient", page.gradient), ("Where implementations differ", page.variants)):
        if text:
            heading(f"\n{title}")
            print("\n".join(f"  {line}".rstrip() for line in text.splitlines()))
    if page.deviations:
        heading("\nLegitimate variants that the kit names")
        table(list(page.deviations), "  ")
    if page.references:
        heading("\nReferences")
        for entry in page.references:
            print(wrapped(entry, 2))


def heading(text: str) -> None:
    """A line in bold, on a terminal."""
    lead = len(text) - len(text.lstrip("\n"))
    if sys.stdout.isatty():
        print("\n" * lead + f"\033[1m{text[lead:]}\033[0m")
    else:
        print(text)


def table(rows: Sequence[tuple[str, ...]], indent: str = "") -> None:
    """Columns as wide as they need to be; the last one wraps at the terminal's width, below a cell that is too long."""
    if not rows:
        return
    import textwrap

    widest = 44
    columns = [max((len(row[i]) for row in rows if len(row[i]) <= widest), default=0) for i in range(len(rows[0]) - 1)]
    left = len(indent) + sum(columns) + 2 * len(columns)
    for row in rows:
        cells = "".join(f"{cell:{columns[i]}}  " for i, cell in enumerate(row[:-1]))
        lines = textwrap.wrap(row[-1], max(30, terminal_width() - left))
        if len(indent + cells) > left:
            print(textwrap.fill(indent + cells, terminal_width(), subsequent_indent=" " * (len(indent) + 2 + columns[0])))
        else:
            print((indent + cells + "".join(lines[:1])).rstrip())
            lines = lines[1:]
        for line in lines:
            print(" " * left + line)


def terminal_width() -> int:
    import shutil

    return max(60, min(shutil.get_terminal_size((120, 24)).columns, 140))


def wrapped(text: str, indent: int) -> str:
    import textwrap

    return textwrap.fill(text, terminal_width(), initial_indent=" " * indent, subsequent_indent=" " * (indent + 4), break_long_words=False)


def short(number: float) -> str:
    """524288 as 524 k."""
    for power, letter in ((12, " T"), (9, " G"), (6, " M"), (3, " k")):
        if abs(number) >= 10**power:
            return f"{number / 10**power:.3g}{letter}"
    return f"{number:.3g}"


# -- cost ------------------------------------------------------------------------------------------------------------


@app.command(context_settings={"ignore_unknown_options": True})
def cost(
    operator: Annotated[str, typer.Argument(metavar="OPERATOR", help="A name from `refimpl list`.")],
    sizes: Annotated[
        list[str] | None,
        typer.Argument(metavar="--T 1024 ... 65536 [--LETTER SIZE]...", help="Lengths (doubling where dots stand), other sizes and block sizes."),
    ] = None,
    form: Annotated[list[str] | None, typer.Option(help="Only this form; may be repeated.")] = None,
    json: Annotated[Path | None, typer.Option(metavar="PATH", help="Also write all counts as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PATH", help="Also draw them on logarithmic axes (PNG, SVG or PDF).")] = None,
) -> None:
    """What the forms of an operator cost: the chapter's formula, and counts of real runs where counting is cheap.

    Operations, the longest chain of dependent ones, bytes moved and bytes alive at once. T stands for the operator's
    length, or for all of them.
    """
    from refimpl.complexity.command import print_costs, read_sizes

    for path in (json, plot):
        if path is not None and not path.absolute().parent.is_dir():
            fail(f"cannot write {path}: there is no folder {path.absolute().parent}")
    try:
        print_costs(operator, form or (), read_sizes(sizes or []), json=json, plot=plot)
    except (ValueError, ImportError, OSError) as error:
        fail(f"{error}")


# -- claims ----------------------------------------------------------------------------------------------------------


@app.command()
def claims(
    claim: Annotated[str | None, typer.Argument(metavar="[ID]", help="One claim, with its derivation. [default: the table]")] = None,
    verdict: Annotated[str | None, typer.Option(help="Only these: holds, holds if, false, not measured, out of scope.")] = None,
    json: Annotated[str | None, typer.Option(metavar="PATH", help="Write everything as JSON; - prints that and nothing else.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PATH", help="With an ID: also write a picture.")] = None,
) -> None:
    """Print what the field claims, and what comes out when it is computed."""
    import json as encoder

    from refimpl.complexity import claims as kit
    from refimpl.complexity.claims import page

    if claim is not None and claim not in kit.ledger():
        fail(kit.unknown(claim))
    if verdict is not None and verdict not in kit.VERDICTS:
        fail(f"--verdict takes one of {', '.join(kit.VERDICTS)}, got {verdict!r}")
    if plot is not None and claim is None:
        fail("--plot takes the ID of a claim beside it")
    for path in (plot, Path(json) if json not in (None, "-") else None):
        if path is not None and not path.absolute().parent.is_dir():
            fail(f"cannot write {path}: there is no folder {path.absolute().parent}")

    chosen = list(kit.ledger()) if claim is None else [claim]
    found = []
    try:
        with progress_bar("computing claims") as step:
            for number, result in enumerate(kit.results(chosen), 1):
                step(number, len(chosen), result.claim.id)
                if verdict in (None, result.verdict):
                    found.append(result)
    except KeyboardInterrupt:
        fail(f"interrupted after {len(found)} claims", INTERRUPTED)
    except ValueError as error:  # a kept measurement that cannot be read
        fail(f"{error}")
    if json is not None:
        text = encoder.dumps([result.to_dict() for result in found], indent=1, ensure_ascii=False)
        if json == "-":
            print(text)
        else:
            Path(json).write_text(text, encoding="utf-8")
    if json != "-":
        page.write(page.table(found) if claim is None else page.derivation(found[0]) if found else f"{claim} is not {verdict!r}", terminal_width())
    if plot is not None and found:
        from refimpl.complexity.claims.picture import draw

        try:
            draw(found[0], plot)
        except (ImportError, ValueError, OSError) as error:
            fail(f"{error}")


@app.command()
def scale(
    machine: Annotated[str, typer.Option(help="Whose rates: a100, h100, h200, h100-infiniband.")] = "h100",
    devices: Annotated[list[int] | None, typer.Option(help="How many of them; may be repeated. [default: 1, 8 and 64]")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PATH", help="Also draw times against lengths.")] = None,
) -> None:
    """Predict times of attention, scans and SSD up to 10⁹ tokens, and where they cross."""
    from refimpl.complexity import scale_page
    from refimpl.complexity.claims.page import write
    from refimpl.complexity.scale import MACHINES

    if machine not in MACHINES:
        fail(f"--machine takes one of {', '.join(MACHINES)}, got {machine!r}")
    counts = devices or [1, 8, 64]
    for count in counts:
        if not 1 <= count <= scale_page.LENGTHS[0]:
            fail(f"--devices takes a number from 1 to {scale_page.LENGTHS[0]}, got {count}")
    if plot is not None and not plot.absolute().parent.is_dir():
        fail(f"cannot write {plot}: there is no folder {plot.absolute().parent}")
    write(scale_page.page(MACHINES[machine], counts), terminal_width())
    if plot is not None:
        try:
            scale_page.draw(MACHINES[machine], counts, plot)
        except (ImportError, ValueError, OSError) as error:
            fail(f"{error}")


# -- survey ----------------------------------------------------------------------------------------------------------


@app.command()
def survey(
    operator: Annotated[list[str] | None, typer.Option(help="Only this operator; may be repeated.")] = None,
    package: Annotated[list[str] | None, typer.Option(help="Only this package; may be repeated.")] = None,
    level: Annotated[str, typer.Option(help="quick, standard or exhaustive.")] = "quick",
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
    json: Annotated[Path | None, typer.Option(metavar="PATH", help="Also write the rows as JSON.")] = None,
    no_example: Annotated[bool, typer.Option("--no-example", help="Leave out the wrong implementation at the end.")] = False,
) -> None:
    """Check every public implementation found installed, then show what a failure looks like.

    Exit code 0: every verdict was the expected one. 1: one was not.
    """
    from refimpl.catalogue import catalogue, unknown
    from refimpl.conformance import survey as kit

    for name in operator or ():
        if name not in catalogue():
            fail(unknown(name))
    known = {i.package for i in kit.IMPLEMENTATIONS}
    for name in package or ():
        if name not in known:
            fail(f"no implementation of a package {name!r} is known{near(name, known)}")

    rows: list[Any] = []
    with progress_bar("checking public implementations") as step:
        try:
            for row in kit.rows(operator or None, package or None, level=level, seed=seed, progress=step):
                rows.append(row)
        except KeyboardInterrupt:
            print_survey(rows)
            fail(f"interrupted after {len(rows)} implementations", INTERRUPTED)
    print_survey(rows)
    if json is not None:
        import json as encoder

        json.write_text(encoder.dumps([row.to_dict() for row in rows], indent=1), encoding="utf-8")
    if not no_example and not operator and not package:
        print_example()
    raise typer.Exit(CONFORMS if all(row.as_expected for row in rows) else DOES_NOT)


MARKS = {"conforms": "✓", "not installed": "·", "deviates": "~", "wrong": "✗", "inconclusive": "?", "not run": "?"}
COLOURS = {"conforms": "32", "not installed": "2", "deviates": "33"}


def print_survey(rows: list[Any]) -> None:
    """The table: an operator, whose function, in which precisions, and what it was found to be."""
    done = [row for row in rows if row.verdict != "not installed"]
    names = [(row, f"{row.package} {row.version}".strip(), row.function, " ".join(map(abbreviated, row.dtypes)) + (" grad" if row.gradients else "")) for row in done]
    widths = [max((len(texts[i]) for texts in names), default=0) for i in (1, 2, 3)]
    operator = ""
    for row, package, function, dtypes in names:
        if row.operator != operator:
            operator = row.operator
            heading(f"\n{operator}")
        verdict = f"{MARKS[row.verdict]} {row.verdict}"
        cells = f"  {package:{widths[0]}}  {function:{widths[1]}}  {dtypes:{widths[2]}}  "
        print(f"{cells}{coloured(verdict, row.verdict)}{' ' * (14 - len(verdict))}{row.cases:4} cases  {row.seconds:5.1f} s")
        if row.verdict != row.expected:
            for text in filter(None, (row.worst, *row.diagnosis[:1])):
                print(wrapped(text, 6))
            print(f"      NOT AS EXPECTED: {row.expected} was expected")
        elif row.reason:
            print(wrapped(f"as expected: {row.reason}; the contract says otherwise", 6))
    absent: dict[str, list[str]] = {}
    for row in rows:
        if row.verdict == "not installed":
            absent.setdefault(row.package, []).append(row.function)
    if absent:
        heading("\nnot installed")
        table([(package, ", ".join(functions)) for package, functions in absent.items()], "  ")
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in MARKS}
    news = sum(not row.as_expected for row in rows)
    print("\n" + ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count) + (f"; {news} NOT AS EXPECTED" if news else ""))


def print_example() -> None:
    """Hold a wrong attention against the reference, and print the report."""
    import inspect

    import refimpl
    from refimpl.conformance.examples import wrong_attention

    heading("\nAnd a wrong one. This attention deals its grouped heads out in the wrong order:")
    print("\n".join(f"    {line}" for line in inspect.getsource(wrong_attention).splitlines()))
    heading("\nrefimpl check attention refimpl.conformance.examples:wrong_attention --level quick")
    with progress_bar("checking wrong_attention") as step:
        report = refimpl.check("attention", wrong_attention, level="quick", progress=step)
    print("\n".join(f"    {line}".rstrip() for line in str(report).splitlines()))


def abbreviated(dtype: str) -> str:
    """float32 as f32, bfloat16 as bf16."""
    return dtype.replace("bfloat", "bf").replace("float", "f")


def coloured(text: str, verdict: str) -> str:
    return f"\033[{COLOURS.get(verdict, '31')}m{text}\033[0m" if sys.stdout.isatty() else text
