"""A picture of a claim: its curves, or what is claimed beside what was computed."""

from pathlib import Path
from typing import Any

from refimpl.complexity.claims.record import Result


def drawable(result: Result) -> bool:
    """Whether there is anything to draw."""
    return result.chart is not None or bool(_bars(result))


def _bars(result: Result) -> list[tuple[str, float, float, bool]]:
    """(what, claimed, computed, whether it holds) of the comparisons of positive numbers."""
    return [
        (_label(result, c.key, c.given), float(c.claimed), float(c.computed), c.holds)
        for c in result.comparisons
        if not isinstance(c.claimed, bool) and c.claimed > 0 and c.computed > 0
    ]


def _label(result: Result, key: str, given: str) -> str:
    number = result.numbers[key]
    return number.says + (f", {number.unit}" if number.unit else "") + (f"\n(if {given})" if given else "")


def draw(result: Result, path: Path) -> None:
    """Write the picture; its kind follows from the path's suffix.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If the claim has nothing to draw, or the suffix is none that matplotlib writes.
    """
    from matplotlib.figure import Figure

    if not drawable(result):
        raise ValueError(f"{result.claim.id} has nothing to draw: it compares no numbers")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    if result.chart is not None:
        _curves(axes, result)
    else:
        _compare(axes, result)
    figure.suptitle(_wrapped(f"{result.claim.id}: {result.claim.says}", 95), fontsize=10, x=0.01, ha="left")
    verdict = " ".join((result.verdict, "; and if ".join(result.conditions))).strip()
    figure.supxlabel(_wrapped(f"{verdict}.\n{result.statement}", 115), fontsize=8.5, x=0.01, ha="left")
    figure.savefig(path, dpi=150)


def _curves(axes: Any, result: Result) -> None:
    assert result.chart is not None
    x, y, curves = result.chart
    for curve, style in zip(curves, ("-", "--", "-.", ":", (0, (1, 3)))):
        axes.plot(curve.x, curve.y, style, marker="." if len(curve.x) < 20 else "", label=curve.label)
    positive = [value for curve in curves for value in curve.y if value > 0]
    axes.set_xscale("log")
    if len(positive) == sum(len(curve.y) for curve in curves) and max(positive) > 20 * min(positive):
        axes.set_yscale("log")
    ticks = sorted({value for curve in curves for value in curve.x})
    if len(ticks) <= 8 and max(ticks) < 100 * min(ticks):
        axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
        axes.minorticks_off()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)


def _compare(axes: Any, result: Result) -> None:
    bars = _bars(result)
    rows = range(len(bars))
    claimed, computed = [b[1] for b in bars], [b[2] for b in bars]
    axes.barh([r - 0.2 for r in rows], claimed, 0.38, label="claimed", color="0.75")
    for holds, colour, name in ((True, "tab:green", "computed, as claimed"), (False, "tab:red", "computed, not as claimed")):
        chosen = [r for r in rows if bars[r][3] is holds]
        if chosen:
            axes.barh([r + 0.2 for r in chosen], [computed[r] for r in chosen], 0.38, label=name, color=colour)
    axes.set_yticks(list(rows), [_wrapped(b[0], 40) for b in bars], fontsize=8.5)
    axes.invert_yaxis()
    if max(claimed + computed) > 50 * min(claimed + computed):
        axes.set_xscale("log")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=9)


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.fill(line, width) for line in text.splitlines())
