"""Costs counted on real runs, beside what the formulas say: small sizes, one run at a length and one at twice that."""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass

from refimpl.op import Op

LENGTH = 64


@dataclass(frozen=True)
class Counted:
    """A form's counts at a length of 64, the formula's values there, and the exponents of growth up to 128."""

    form: str
    work: int
    says_work: float
    depth: int
    says_depth: float
    peak: int
    growth: float | None
    deeper: float | None


def counted(op: Op) -> Iterator[Counted]:
    """Counts of every form that the counter can run; nothing where the room that counts is missing."""
    try:
        from refimpl.complexity import Uncounted, measure
    except (ImportError, AttributeError):
        return
    small = {p.name: p.default for p in inspect.signature(op.sample).parameters.values() if p.kind is p.KEYWORD_ONLY}
    once = {k: LENGTH for k in op.lengths if k in small}
    twice = {k: 2 * v for k, v in once.items()}
    for name, form in op.forms.items():
        try:
            first = measure(op, name, **once)
            second = measure(op, name, **twice) if once else None
        except (Uncounted, ValueError, TypeError):
            continue
        taken = inspect.signature(form.cost).parameters
        batch = {"batch": math.prod(b)} if isinstance(b := small.get("batch"), tuple) and "batch" in taken else {}
        sizes = batch | {k: v for k, v in {**small, **once}.items() if isinstance(v, int) and (k in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values()))}
        try:
            says = form.cost(**sizes)
        except TypeError:
            continue
        yield Counted(
            name, first.work, float(says.work), first.depth, float(says.depth), first.peak // 8,
            _exponent(first.work, second and second.work), _exponent(first.depth, second and second.depth),
        )  # fmt: skip


def _exponent(once: int, twice: int | None) -> float | None:
    return math.log2(twice / once) if twice and once else None
