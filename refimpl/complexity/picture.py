"""Costs against lengths on logarithmic axes: lines are formulas, dots are counts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refimpl.complexity.table import FormCosts

PANELS = (("work", "operations"), ("depth", "longest chain of operations"), ("traffic", "bytes moved"), ("peak", "bytes alive"))
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#3ca951", "#a463f2", "#6cc5b0", "#97bbf5", "#9c6b4e")


def draw(costs: Sequence[FormCosts], title: str, letter: str = "T") -> Any:
    """A matplotlib figure with a panel for each measure.

    Raises
    ------
    ImportError
        Without matplotlib: install ``refimpl[plots]``.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: install refimpl[plots]") from error
    figure = Figure(figsize=(10, 7.4), layout="constrained")
    figure.suptitle(f"{title}\nlines: what the formula says; dots: what was counted")
    for axes, (name, unit) in zip(figure.subplots(2, 2, sharex=True).flat, PANELS, strict=True):
        for form, colour in zip(costs, COLOURS * (1 + len(costs) // len(COLOURS)), strict=False):
            n = [row.length for row in form.rows]
            if name != "traffic":
                scale = 8 if name == "peak" else 1  # formulas count elements, of eight bytes here
                axes.plot(n, [scale * getattr(row.predicted, name) for row in form.rows], color=colour, linewidth=1.5)
            dots = [(row.length, getattr(row.counted, name)) for row in form.rows if row.counted is not None]
            grows = "" if form.growth is None else f"   {getattr(form.growth, name)}"
            axes.plot(*zip(*dots, strict=True) if dots else ([], []), "o", color=colour, markersize=4.5, label=form.form + grows)
        axes.set_xscale("log", base=2)
        axes.set(yscale="log", ylabel=unit, title=name, xlabel=letter if name in ("traffic", "peak") else "")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    return figure


def save(costs: Sequence[FormCosts], path: Path, title: str, letter: str = "T") -> None:
    """Write the picture; the ending of the path says in which format."""
    draw(costs, title, letter).savefig(path, dpi=150)
