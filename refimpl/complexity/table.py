"""What an operator's forms cost at given lengths: the chapter's formula, and the count where counting is cheap.

Data here; `refimpl cost` prints it, `picture` draws it.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.complexity.counter import Counts
from refimpl.complexity.growth import MEASURES, Fit, axes, fit
from refimpl.complexity.runs import find, letters, measure
from refimpl.op import Cost, Op

WIDTHS = {"c": 256, "d": 64, "e": 64, "p": 64, "n": 16, "f": 256}  # features and states of usual widths
LIMIT = Cost(work=2e9, depth=1.5e4, peak=2e7)  # what is counted: a second or so


@dataclass(frozen=True)
class Row:
    """One length: what the formula says, and what was counted."""

    length: int
    predicted: Cost
    counted: Counts | None


@dataclass(frozen=True)
class FormCosts:
    """One form at all lengths, and how it grows."""

    form: str
    exact: tuple[str, ...]
    rows: tuple[Row, ...]
    growth: Fit | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "exact": list(self.exact),
            "growth": None if self.growth is None else {name: _growth(getattr(self.growth, name)) for name in MEASURES},
            "lengths": {str(row.length): {"predicted": _numbers(row.predicted), "counted": _counted(row.counted)} for row in self.rows},
        }


def _growth(found: Any) -> dict[str, Any]:
    return {"says": str(found), "power": found.power, "logs": found.logs, "exact": found.exact}


def _numbers(cost: Cost) -> dict[str, float]:
    return {"work": float(cost.work), "depth": float(cost.depth), "peak": float(cost.peak)}


def _counted(counts: Counts | None) -> dict[str, Any] | None:
    if counts is None:
        return None
    return {name: getattr(counts, name) for name in (*MEASURES, "setup", "transcendental", "operations")} | {
        "by_class": dict(counts.by_class)
    }


def predict(op: str | Op, form: str | None = None, **sizes) -> Cost:
    """What the chapter's formula says of the call that `measure` counts with the same arguments.

    Examples
    --------
    >>> from refimpl.complexity import predict
    >>> predict("linear_recurrence", "sequential", T=100, c=3).work
    600

    Raises
    ------
    ValueError
        If there is no such operator or form, or no formula.
    """
    op, form = find(op, form)
    if form not in op.forms:
        raise ValueError(f"{op.name}: the chapter has no formula for {form}")
    known = letters(op) | sizes
    batch = math.prod(known.pop("batch", ()))
    taken = inspect.signature(op.forms[form].cost).parameters
    everything = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    known = {k: v for k, v in known.items() if isinstance(v, int | float | np.integer) and (everything or k in taken)}
    return op.forms[form].cost(**known, batch=batch)


def costs(
    op: str | Op, forms: Sequence[str] = (), axis: str = "T", lengths: Sequence[int] = (), *, growing: bool = True, **sizes
) -> list[FormCosts]:
    """Formula and count of some forms (all by default) at each length.

    Parameters
    ----------
    op : str or Op
    forms : sequence of str
    axis : str
        The size that takes the values `lengths`, as for `fit`.
    lengths : sequence of int
    growing : bool
        Also fit how the counts grow.
    **sizes
        Other sizes, options and block sizes. Features and states have the usual widths where nothing is said.
    """
    op = find(op, None)[0]
    grown = axes(op, axis)
    usual = {k: v for k, v in WIDTHS.items() if k in letters(op) and k not in grown} | sizes
    found = []
    for form in forms or op.forms:
        rows = []
        taken = inspect.signature(op.forms[form].function).parameters
        own = {k: v for k, v in usual.items() if k in letters(op) or k in taken}
        for length in sorted(lengths):
            at = own | dict.fromkeys(grown, length)
            predicted = predict(op, form, **at)
            cheap = predicted.work <= LIMIT.work and predicted.depth <= LIMIT.depth and predicted.peak <= LIMIT.peak
            rows.append(Row(length, predicted, measure(op, form, **at) if cheap else None))
        small = {k: v for k, v in sizes.items() if k in letters(op) or k in taken}
        found.append(FormCosts(form, op.forms[form].exact, tuple(rows), fit(op, form, axis, **small) if growing else None))
    return found


def usual_sizes(op: Op, axis: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that do not grow, with the values that `costs` gives them."""
    grown = axes(op, axis)
    defaults = {k: WIDTHS.get(k, v) for k, v in letters(op).items() if k not in grown}
    return {k: v for k, v in (defaults | dict(sizes)).items() if not isinstance(v, bool) and v != ()}
