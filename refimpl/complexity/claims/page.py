"""The ledger as text: the table, and the derivation of one claim."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from refimpl.complexity.claims.record import FALSE, HOLDS, HOLDS_IF, NOT_MEASURED, OUT_OF_SCOPE, VERDICTS, Number, Result
from refimpl.complexity.claims.sources import SOURCES

MARKS = {HOLDS: "✓", HOLDS_IF: "~", FALSE: "✗", NOT_MEASURED: "?", OUT_OF_SCOPE: "·"}
STYLES = {HOLDS: "green", HOLDS_IF: "yellow", FALSE: "red", NOT_MEASURED: "cyan", OUT_OF_SCOPE: "dim"}


def table(results: Sequence[Result]) -> RenderableType:
    """All rows, section by section, and how many there are of each verdict."""
    parts: list[RenderableType] = []
    for section in dict.fromkeys(r.claim.section for r in results):
        grid = Table.grid(padding=(0, 1))
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True, min_width=10)
        grid.add_column(no_wrap=True, min_width=12)
        grid.add_column(ratio=1)
        for result in results:
            if result.claim.section == section:
                style = STYLES[result.verdict]
                grid.add_row(
                    Text(MARKS[result.verdict], style),
                    result.claim.id,
                    Text(result.verdict + (" ◦" if result.opened and result.parts else ""), style),
                    _summary(result),
                )
        parts += [Text(f"\n{section}", "bold"), grid]
    counts = {verdict: sum(r.verdict == verdict for r in results) for verdict in VERDICTS}
    said = ", ".join(f"{count} {MARKS[verdict]} {verdict}" for verdict, count in counts.items() if count)
    notes = []
    if any(r.disagreements for r in results):
        notes.append("⚔ documents contradict each other, or themselves")
    if any(r.opened and r.parts for r in results):
        notes.append("◦ part of the claim is open")
    parts.append(Text(f"\n{len(results)} claims: {said or 'none'}." + (f" {'; '.join(notes)}." if notes else "")))
    return Group(*parts)


def _summary(result: Result) -> Text:
    text = Text(result.claim.says)
    text.append(" ⚔" if result.disagreements else "")
    for condition in result.conditions:
        text.append(f"\nif {condition}", "yellow")
    if not result.parts:
        needed = list(dict.fromkeys(o.needs for o in result.opened))
        text.append(f"\nneeds {needed[0]}" + (f", and {len(needed) - 1} more" if needed[1:] else ""), "cyan")
    text.append(f"\n→ {result.statement}", "dim")
    return text


def derivation(result: Result) -> RenderableType:
    """One claim: who says it, what was computed, what follows."""
    claim = result.claim
    parts: list[RenderableType] = [
        Text.assemble((f"{claim.id}", "bold"), f"  ({claim.section})"),
        Text(claim.says),
        Text("\nSources", "bold"),
        *(Padding(Text(_cited(source)), (0, 0, 0, 2)) for source in claim.sources),
        Text.assemble(("\nChecked by ", "bold"), claim.check),
    ]
    if result.numbers:
        parts += [Text("\nComputed", "bold"), _numbers(result.numbers.values())]
    if result.comparisons:
        parts += [Text("\nCompared with the claim", "bold"), _comparisons(result)]
    for measured in result.measured:
        parts.append(
            Text(
                f"  measured: {measured.implementation}, {measured.seconds:.3g} s, {measured.device}, driver {measured.driver}, "
                f"{measured.date}"
            )
        )
    if result.opened:
        parts += [
            Text("\nOpen", "bold"),
            *(Padding(Text(f"{o.part}: {o.verdict}; it would take {o.needs}"), (0, 0, 0, 2)) for o in result.opened),
        ]
    if result.disagreements:
        parts += [Text("\nDocuments disagree", "bold"), *(Padding(Text(d), (0, 0, 0, 2)) for d in result.disagreements)]
    verdict = Text.assemble(("\nVerdict: ", "bold"), (f"{MARKS[result.verdict]} {result.verdict}", STYLES[result.verdict]))
    if result.conditions:
        verdict.append(" " + "; and if ".join(result.conditions))
    if result.opened and result.parts:
        verdict.append(" (of what could be computed; a part is open)", "dim")
    return Group(*parts, verdict, Text(result.statement))


def _cited(source: str) -> str:
    key, _, place = source.partition(",")
    return SOURCES[key] + (f",{place}" if place else "")


def _numbers(numbers: Iterable[Number]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(ratio=1)
    for n in numbers:
        grid.add_row("", f"{shown(n.value)} {n.unit}".rstrip(), n.says)
    return grid


def _comparisons(result: Result) -> Table:
    grid = Table.grid(padding=(0, 2))
    for justify in ("left", "left", "right", "left", "right"):
        grid.add_column(justify=justify, no_wrap=True)
    grid.add_column(ratio=1)
    for c in result.comparisons:
        reading = Text(result.numbers[c.key].says)
        if c.given:
            reading.append(f"\n(if {c.given})", "yellow")
        mark = Text("✓", "green") if c.holds else Text("✗", "red")
        grid.add_row("", mark, shown(c.computed), {"<=": "≤", ">=": "≥"}.get(c.relation, c.relation), shown(c.claimed), reading)
    return grid


def shown(value: Any) -> str:
    """A number in as many digits as one reads."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return f"{value:,}" if isinstance(value, int) and abs(value) < 1e12 else f"{value:.3g}"
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def write(renderable: RenderableType, width: int) -> None:
    """Print to standard output; in colours, and padded to the width, on a terminal only."""
    console = Console(width=width, highlight=False)
    if console.is_terminal:
        console.print(renderable)
        return
    with console.capture() as text:
        console.print(renderable)
    print("\n".join(line.rstrip() for line in text.get().splitlines()))
