"""`refimpl cost`: reads lengths and sizes, prints a table for each form."""

import json as encoder
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from refimpl.complexity.growth import BLOCKS, MEASURES
from refimpl.complexity.picture import save
from refimpl.complexity.runs import find, letters
from refimpl.complexity.table import FormCosts, costs, usual_sizes
from refimpl.op import Op

DEFAULT = (256, 1024, 4096, 16384, 65536)
_DOTS = ("...", "…", "..")


def read_sizes(words: Sequence[str]) -> dict[str, list[Any]]:
    """``--T 1024 ... 65536 --d 64`` as ``{"T": [1024, 2048, ..., 65536], "d": [64]}``.

    Raises
    ------
    ValueError
        If a word is neither a size nor the name of one.

    Examples
    --------
    >>> read_sizes(["--T", "64", "...", "512", "--d=16"])
    {'T': [64, 128, 256, 512], 'd': [16]}
    """
    found: dict[str, list[Any]] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name] = []
            if not equals:
                continue
            word = value
        if name is None:
            raise ValueError(f"cost: {word!r} belongs to no size; say --T {word}")
        for part in word.replace("...", " ... ").replace("…", " ... ").replace(",", " ").split():
            found[name].append(part if part in _DOTS else _number(name, part))
    for name, values in found.items():
        if not values:
            raise ValueError(f"cost: --{name} needs a size")
        found[name] = _doubled(name, values)
    return found


def _number(name: str, text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise ValueError(f"cost: --{name} must be an integer of at least 1, got {text!r}")
    return number


def _doubled(name: str, values: list[Any]) -> list[Any]:
    out: list[Any] = []
    for i, value in enumerate(values):
        if value not in _DOTS:
            out.append(value)
            continue
        if not 0 < i < len(values) - 1 or values[i + 1] in _DOTS or values[i + 1] <= out[-1]:
            raise ValueError(f"cost: --{name}: dots stand between a smaller and a larger size")
        while 2 * out[-1] < values[i + 1]:
            out.append(2 * out[-1])
    return out


def print_costs(
    operator: str, forms: Sequence[str], given: dict[str, list[Any]], *, json: Path | None = None, plot: Path | None = None
) -> None:
    """Print the tables, and write what else is asked for."""
    op = find(operator, None)[0]
    for form in forms:
        find(op, form)
    axis, lengths, sizes = _axis(op, given)
    found = costs(op, forms, axis, lengths, growing=axis not in BLOCKS, **sizes)
    letter = axis.split()[0]
    usual = ", ".join(f"{k} = {v}" for k, v in usual_sizes(op, axis, sizes).items())
    title = f"{op.name}: {op.summary}"
    console = Console(width=None)
    console.print(f"[bold]{title}[/bold]", highlight=False)
    console.print(f"one call in float64{', ' + usual if usual else ''}; what the formula says, and what was counted", highlight=False)
    for one in found:
        console.print(_table(one, letter))
    console.print(
        "=  the formula's number   ·  would take too long\nwork: operations   depth: the longest chain of dependent ones", highlight=False
    )
    console.print("peak: bytes alive at once, arguments excepted   traffic: bytes read and written, as counted", highlight=False)
    if json is not None:
        text = {
            "operator": op.name,
            "axis": axis,
            "sizes": usual_sizes(op, axis, sizes),
            "forms": {one.form: one.to_dict() for one in found},
        }
        json.write_text(encoder.dumps(text, indent=1), encoding="utf-8")
    if plot is not None:
        save(found, plot, f"{title}\n{usual}" if usual else title, letter)


def _axis(op: Op, given: dict[str, list[Any]]) -> tuple[str, list[int], dict[str, Any]]:
    """Which size takes several values, which values, and the other sizes."""
    several = [name for name, values in given.items() if len(values) > 1]
    if len(several) > 1:
        raise ValueError(f"cost: only one size can take several values, got {', '.join(several)}")
    axis = several[0] if several else "T" if "T" in given or op.lengths else next(iter(given), next(iter(letters(op))))
    lengths = given.get(axis, list(DEFAULT))
    return axis, lengths, {name: values[0] for name, values in given.items() if name != axis}


def _table(costs: FormCosts, letter: str) -> Table:
    table = Table(title=costs.form, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in (letter, "work", "counted", "depth", "counted", "peak", "counted", "traffic"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in costs.rows:
        cells = [f"{row.length}"]
        for name in ("work", "depth", "peak"):
            predicted = getattr(row.predicted, name) * (8 if name == "peak" else 1)
            counted = None if row.counted is None else getattr(row.counted, name)
            cells += [short(predicted), "·" if counted is None else "=" if counted == round(predicted) else short(counted)]
        table.add_row(*cells, "·" if row.counted is None else short(row.counted.traffic))
    if costs.growth is not None:
        table.add_section()
        grown = {name: str(getattr(costs.growth, name)) for name in MEASURES}
        table.add_row("grows", "", grown["work"], "", grown["depth"], "", grown["peak"], grown["traffic"])
    return table


def short(number: float) -> str:
    """12345678 as 12.3 M; small integers as they are."""
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power * (10 if power == 3 else 1):
            return f"{number / 10**power:.3g} {letter}"
    return f"{number:.0f}" if number == round(number) else f"{number:.1f}"
