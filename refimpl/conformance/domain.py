"""What a candidate supports: sizes, batch shapes, options. What lies outside is not applicable, and said to be."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class multiple_of:
    """Sizes that are positive multiples of a number."""

    factor: int

    def __contains__(self, size: int) -> bool:
        return size > 0 and size % self.factor == 0

    def nearest(self, size: int) -> int:
        return max(self.factor, -(-size // self.factor) * self.factor)

    def __repr__(self) -> str:
        return f"multiple_of({self.factor})"


ALIKE = (("e", "d"), ("Hq", "Hkv"))  # sizes that a kernel may want to be the same


class Domain:
    """What a candidate supports.

    Parameters
    ----------
    options : dict of str to list, optional
        Values that each option may take. One value fixes the option: the truth uses it, and a candidate without the
        keyword is not passed it. For an optional array, [True] says that it is always given, [False] that it never is.
    batch : list of tuple, optional
        Batch shapes that are supported; all by default.
    batch_rank : int, optional
        The number of batch axes; found by trying, if there is but one, or given by a layout.
    equal : tuple of pairs, optional
        Sizes that must be others', (("e", "d"),); found by trying.
    **sizes : int, list of int, range, `multiple_of` or callable
        By the contract's letters: ``Domain(T=multiple_of(64), d=[64, 128])``. A callable says whether a size will do.

    Raises
    ------
    TypeError, ValueError
        If a rule is of another kind, or leaves nothing.
    """

    def __init__(
        self, *, options: dict[str, Iterable] | None = None, batch: Iterable[tuple] | None = None, batch_rank: int | None = None,
        equal: tuple[tuple[str, str], ...] = (), **sizes,
    ):  # fmt: skip
        self.options = {name: _listed(f"options[{name!r}]", values) for name, values in (options or {}).items()}
        self.batch = None if batch is None else [tuple(b) for b in batch]
        self.batch_rank = batch_rank
        self.sizes = {letter: _rule(letter, rule) for letter, rule in sizes.items()}
        self._said = {letter: getattr(rule, "__qualname__", rule) for letter, rule in sizes.items()}
        self.equal = equal

    def __repr__(self) -> str:
        parts = [f"{k}={v!r}" for k, v in self._said.items()]
        parts += [f"options={self.options!r}"] if self.options else []
        parts += [f"batch={self.batch!r}"] if self.batch is not None else []
        parts += [f"batch_rank={self.batch_rank!r}"] if self.batch_rank is not None else []
        parts += [f"equal={self.equal!r}"] if self.equal else []
        return f"Domain({', '.join(parts)})"

    def spelled_for(self, letters: Iterable[str]) -> "Domain":
        """The same domain for an operator with those letters: H stands for both kinds of heads where there are two."""
        spelled = copy.copy(self)
        if "H" in self.sizes and "H" not in letters and {"Hq", "Hkv"} <= set(letters):
            rest = {letter: rule for letter, rule in self.sizes.items() if letter != "H"}
            spelled.sizes = {"Hq": self.sizes["H"], "Hkv": self.sizes["H"]} | rest
        return spelled

    def keep_to(self, letter: str, rule) -> None:
        """Let a size follow a rule from here on."""
        self.sizes = {**self.sizes, letter: _rule(letter, rule)}
        self._said = {**self._said, letter: rule}

    def check_names(self, operator: str, letters: Iterable[str], options: Iterable[str]) -> None:
        """Raise ValueError for a letter or an option that the operator does not have."""
        for what, given, known in (("size", self.sizes, set(letters)), ("option", self.options, set(options))):
            for name in given:
                if name not in known:
                    raise ValueError(f"Domain: {operator} has no {what} {name!r}; it has {', '.join(sorted(known))}")

    def fit(self, sizes: dict[str, Any]) -> dict[str, Any] | None:
        """The nearest sizes that are supported, or None."""
        fitted = dict(sizes)
        for letter, size in sizes.items():
            if letter == "batch":
                if self.batch_rank is not None and len(size) != self.batch_rank:
                    fitted[letter] = size = (*size[: self.batch_rank], *(2,) * (self.batch_rank - len(size)))
                if self.batch is not None and size not in self.batch:
                    same = [b for b in self.batch if len(b) == len(size)]
                    fitted[letter] = (same or self.batch)[0]
            elif letter in self.sizes:
                nearest = self.sizes[letter](size)
                if nearest is None:
                    return None
                fitted[letter] = nearest
        for letter, other in self.equal:
            fitted[letter] = fitted[other]
        return fitted


def _listed(name: str, values) -> list:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"Domain: {name} must be a list of values, got {values!r}")
    values = list(values)
    if not values:
        raise ValueError(f"Domain: {name} must have at least one value")
    return values


def _rule(letter: str, rule) -> Callable[[int], int | None]:
    """A function to the nearest supported size, or None if there is none."""
    if isinstance(rule, multiple_of):
        return rule.nearest
    if isinstance(rule, bool):
        raise TypeError(f"Domain: {letter} must be an int, a list, a range, multiple_of or a function, got {rule!r}")
    if isinstance(rule, int):
        return lambda size: rule
    if isinstance(rule, Iterable):
        allowed = sorted(rule)
        if not allowed:
            raise ValueError(f"Domain: {letter} must allow at least one size")
        return lambda size: min(allowed, key=lambda a: (abs(a - size), a))
    if callable(rule):
        return lambda size: next((s for d in range(256) for s in (size + d, size - d) if s >= 0 and rule(s)), None)
    raise TypeError(f"Domain: {letter} must be an int, a list, a range, multiple_of or a function, got {rule!r}")
