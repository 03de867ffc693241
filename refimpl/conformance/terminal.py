"""A report on a terminal: the text of `str(report)`, in colours, with a map of the errors."""

import os
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from refimpl.conformance.page import colours
from refimpl.conformance.report import Report, Result

_COLOURS = {"conforms": "bold green", "deviates": "bold yellow", "wrong": "bold red", "inconclusive": "bold"}
_ROWS = 24  # of a map; a line holds two


def show(report: Report, console: Console | None = None) -> None:
    """Print a report."""
    console = Console(highlight=False) if console is None else console
    for part in _parts(report, console.width):
        console.print(part, soft_wrap=isinstance(part, Text))  # the terminal wraps what will be copied


def _parts(report: Report, width: int) -> list[Any]:
    verdict, _, reason = report.verdict_words().partition(": ")
    parts: list[Any] = [
        Text.assemble((f"{report.operator}  ", "dim"), (report.candidate, "bold"), " ", (verdict, _COLOURS[report.verdict]), f": {reason}" if reason else ""),
        Text(report.counts(), style="dim"),
    ]
    if report.not_checked:
        parts.append(Text(f"not checked: {', '.join(report.not_checked)}", style="yellow"))
    parts += [Text(f"note: {note}", style="yellow") for note in report.notes]
    worst = report.worst
    if worst is None or not report.failures:
        return parts
    if report.diagnosis:
        first, *others = report.diagnosis[:4]
        lines = Group(Text(first, style="bold"), *(Text(f"also: {other}", style="dim") for other in others))
        parts.append(Panel(lines, title="diagnosis", title_align="left", border_style="yellow"))
    parts += ["", _facts(worst)]
    drawn = next((r for r in (report.widest(), worst) if r is not None and r.picture), None)
    if drawn is not None:
        parts += ["", *_map(drawn, width)]
    parts += ["", _classes(report)]
    if worst.snippet:
        parts += ["", Text("reproduce", style="bold"), Text(worst.snippet)]
    return parts


def _facts(r: Result) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_row(Text(r.status, style="bold red"), Text(f"{r.id}  {r.dtype}"))
    grid.add_row("", Text(r.message))
    for label, text in zip(("at", "where"), r.place(), strict=True):
        if text:
            grid.add_row(Text(label, style="dim"), Text(text))
    return grid


def _map(r: Result, width: int) -> list[Text]:
    """Error over bound, two rows a line, in the colours of the page."""
    picture: Any = r.picture
    grid, (rows, columns) = np.array(picture["map"]), picture["axes"]
    if grid.shape[0] > 1.5 * grid.shape[1]:
        grid, rows, columns = grid.T, columns, rows
    if grid.size < 4 or os.environ.get("NO_COLOR"):
        return []
    for axis, most in ((0, _ROWS), (1, max(8, width - 4))):
        step = -(-grid.shape[axis] // most)
        grid = np.maximum.reduceat(grid, np.arange(0, grid.shape[axis], step), axis=axis)
    wide = max(1, min(3, (width - 4) // grid.shape[1]))
    pixels = np.repeat(colours(grid), wide, axis=1)
    head = f"error over bound of {r.output} in {r.id}" + (f"; down {rows['name']}: 0 … {rows['size'] - 1}" if rows["size"] > 1 else "")
    lines = [Text(f"{head}; across {columns['name']}: 0 … {columns['size'] - 1}", style="dim")]
    for i in range(0, len(pixels), 2):
        line = Text("  ")
        for j in range(pixels.shape[1]):
            upper = _hex(pixels[i, j])
            if i + 1 < len(pixels):
                line.append("▀", style=f"{upper} on {_hex(pixels[i + 1, j])}")
            else:
                line.append("▀", style=upper)
        lines.append(line)
    samples = ((-4.0, "within the bound"), (1.0, "10 ×"), (4.0, "10⁴ ×"), (9.0, "10⁶ × and more"), (99.0, "NaN, infinite or another integer"))
    legend = Text("  ")
    for value, words in samples:
        legend.append("■ ", style=_hex(colours(np.array([[value]]))[0, 0]))
        legend.append(f"{words}  ", style="dim")
    return [*lines, legend]


def _hex(colour: np.ndarray) -> str:
    return f"#{colour[0]:02x}{colour[1]:02x}{colour[2]:02x}"


def _classes(report: Report) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("class", "precision", "fail", "of", "as"):
        table.add_column(name, justify="right" if name in ("fail", "of") else "left")
    for klass, dtype, bad, count, kinds in report.by_class():
        if bad:
            table.add_row(klass, dtype, Text(str(bad), style="red"), str(count), Text(kinds, style="dim"))
    return table
