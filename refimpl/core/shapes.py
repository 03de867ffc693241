"""The letters in which a contract is written: shapes with named axes, and arrays that have one of several."""

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One alternative of an argument's shape: ``(..., H?, T, d)``."""

    axes: tuple[str, ...]
    batched: bool

    @classmethod
    def parse(cls, text: str) -> "Shape":
        axes = tuple(a.strip() for a in text.strip().removeprefix("(").removesuffix(")").split(",") if a.strip())
        batched = bool(axes) and axes[0] == "..."
        return cls(axes[1:] if batched else axes, batched)

    @property
    def heads(self) -> int | None:
        """Position from the end of the optional head axis, or None."""
        marked = [i - len(self.axes) for i, a in enumerate(self.axes) if a.endswith("?")]
        return marked[0] if marked else None

    @property
    def letters(self) -> set[str]:
        """The sizes that it speaks of."""
        return {a.rstrip("?").partition("-")[0] for a in self.axes} - {a for a in self.axes if a.isdigit()}

    def __str__(self) -> str:
        names = [a.rstrip("?") for a in self.axes]
        return "(" + ", ".join((["..."] if self.batched else []) + names) + ("," if len(names) == 1 and not self.batched else "") + ")"


@dataclass(frozen=True)
class Array:
    """An argument or a result: name, kind, and the alternatives of its shape; of a tuple of arrays, the letter of their number."""

    name: str
    kind: str
    shapes: tuple[Shape, ...]
    count: str = ""

    @classmethod
    def parse(cls, text: str) -> "Array":
        match = re.fullmatch(r"\s*([\w.]+)(?:\[(\w+)\])?(?::(\w+))?\s*(\(.*\))\s*", text)
        if match is None:
            raise ValueError(f"contract: cannot read {text!r}")
        name, count, kind, shapes = match.groups()
        return cls(name, kind or "number", tuple(Shape.parse(s) for s in shapes.split("|")), count or "")

    @property
    def argument(self) -> str:
        """The argument that it is, or is a part of: ``gates`` of ``gates[0]``, ``state`` of ``state.C``."""
        return re.split(r"[.\[]", self.name)[0]

    def part(self, i: int) -> "Array":
        """One array of a tuple."""
        return Array(f"{self.name}[{i}]", self.kind, self.shapes)

    def __str__(self) -> str:
        many = f"{self.count} arrays " if self.count else ""
        return f"{self.name} {many}{' or '.join(map(str, self.shapes))}"


def misfit(shape: Shape, actual: tuple[int, ...], sizes: dict, name: str) -> str | None:
    """None if sizes agree (and are then recorded), else the reason."""
    found: dict[str, tuple[int, str]] = {}
    for axis, size in zip(shape.axes, actual, strict=True):
        axis = axis.rstrip("?")
        letter, _, less = axis.partition("-")
        if axis.isdigit():
            if size != int(axis):
                return f"an axis of {axis} is {size}"
            continue
        value = size + int(less or 0)
        known, origin = found.get(letter) or sizes.get(letter) or (value, name)
        if known != value:
            return f"{axis} = {known - int(less or 0)} from {origin}, got {size}"
        found[letter] = (value, origin)
    sizes.update({k: v for k, v in found.items() if k not in sizes})
    return None


def lengths_of(shape: Shape, sizes: Mapping[str, int], batch: tuple[int, ...], drop_heads=False) -> tuple[int, ...]:
    """A shape's axes as numbers, for sizes by letter and a batch; without the axis of heads where a call has none."""
    axes = []
    for axis in shape.axes:
        if axis.endswith("?") and drop_heads:
            continue
        letter, _, less = axis.rstrip("?").partition("-")
        axes.append(int(letter) if letter.isdigit() else sizes[letter] - int(less or 0))
    return (*(batch if shape.batched else ()), *axes)
