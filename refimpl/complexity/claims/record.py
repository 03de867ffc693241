"""A claim, and what becomes of it when it is computed.

A `Claim` says what is claimed in numbers and holds the function that computes the same numbers. The function is handed a
`Case` and reports to it: numbers, comparisons of a number with the claimed one, what cannot be computed here. The
verdict follows from the comparisons, by `Result.verdict`, and is written down nowhere.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refimpl.catalogue import catalogue
from refimpl.complexity.claims.measurements import Measurement, look_up

HOLDS, HOLDS_IF, FALSE, NOT_MEASURED, OUT_OF_SCOPE = "holds", "holds if", "false", "not measured", "out of scope"
VERDICTS = (HOLDS, HOLDS_IF, FALSE, NOT_MEASURED, OUT_OF_SCOPE)
RELATIONS: dict[str, Callable[[Any, Any, float], bool]] = {
    "=": lambda got, claimed, within: got == claimed if isinstance(claimed, bool) else abs(got - claimed) <= within * abs(claimed),
    "<=": lambda got, claimed, within: got <= claimed,
    ">=": lambda got, claimed, within: got >= claimed,
    "<": lambda got, claimed, within: got < claimed,
    ">": lambda got, claimed, within: got > claimed,
}


@dataclass(frozen=True)
class Comparison:
    """One number beside the claimed one; `given` is the reading under which it was computed, "" the claim as it stands."""

    key: str
    relation: str
    claimed: Any
    computed: Any
    within: float
    given: str = ""
    part: str = ""
    against: str = ""  # the key of what is claimed

    @property
    def holds(self) -> bool:
        return bool(RELATIONS[self.relation](self.computed, self.claimed, self.within))


@dataclass(frozen=True)
class Open:
    """A part of a claim that nothing here can decide, and what it would take."""

    part: str
    needs: str
    verdict: str


@dataclass(frozen=True)
class Number:
    """A computed number, with what it is."""

    key: str
    value: Any
    says: str
    unit: str = ""


@dataclass(frozen=True)
class Curve:
    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Claim:
    """A row of the ledger.

    Attributes
    ----------
    id, section : str
    says : str
        The claim, in our words.
    sources : tuple of str
        Who makes it: keys of `refimpl.complexity.claims.sources.SOURCES`, with the section where there is one.
    check : str
        How it is decided.
    claimed : mapping of str to number or bool
        What is claimed, by the keys of the computed numbers.
    compute : callable
        ``compute(case)`` reports to a `Case`.
    """

    id: str
    section: str
    says: str
    sources: tuple[str, ...]
    check: str
    claimed: Mapping[str, Any]
    compute: Callable[["Case"], None]

    def run(self) -> "Result":
        """Compute, compare, decide."""
        case = Case(self)
        with np.errstate(all="ignore"):
            self.compute(case)
        return Result(
            self,
            case.numbers,
            tuple(case.comparisons),
            tuple(case.opened),
            case.statement,
            tuple(case.disagreements),
            case.chart,
            tuple(case.measured),
        )


@dataclass
class Case:
    """What a claim's function reports to."""

    claim: Claim
    numbers: dict[str, Number] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    opened: list[Open] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)
    measured: list[Measurement] = field(default_factory=list)
    statement: str = ""
    chart: tuple[str, str, tuple[Curve, ...]] | None = None

    def number(self, key: str, value: Any, says: str, unit: str = "") -> Any:
        """Keep a computed number, and hand it on."""
        value = value.item() if isinstance(value, np.generic) else value
        self.numbers[key] = Number(key, value, says, unit)
        return value

    def compare(
        self, key: str, relation: str = "=", claimed: str | None = None, *, within: float = 0.02, given: str = "", part: str = ""
    ) -> None:
        """Hold the number `key` against what is claimed under that key, or under the key `claimed`.

        `given` names a reading under which the claim is judged besides the one as it stands; `within` is a relative
        difference, how exactly a rounded number in prose is meant.
        """
        against = claimed or key
        self.comparisons.append(
            Comparison(key, relation, self.claim.claimed[against], self.numbers[key].value, within, given, part, against)
        )

    def equal(
        self, key: str, operator: str, got: Any, want: Any, call: Mapping[str, Any], says: str, *, given: str = "", part: str = ""
    ) -> float:
        """Hold two algorithms in float64 against the sum of their error bounds: the number is error over bound."""
        op = catalogue()[operator]
        bound = op.error_bound(**call, unit=2.0**-53)
        bound = bound[0] if isinstance(bound, tuple) and not isinstance(got, tuple) else bound
        error = abs(np.asarray(got) - np.asarray(want))
        ratio = np.max(error / np.maximum(2 * np.asarray(bound), 1e-300), initial=0.0)
        self.number(f"{key}_error", error.max(initial=0.0), f"{says}: largest difference")
        self.number(key, ratio, f"{says}: largest difference over the bound of rounding errors")
        self.compare(key, "<=", given=given, part=part)
        return float(error.max(initial=0.0))

    def open(self, part: str, needs: str, verdict: str = OUT_OF_SCOPE) -> None:
        """Say that a part is not decided here."""
        self.opened.append(Open(part, needs, verdict))

    def timing(
        self,
        key: str,
        slow: Mapping[str, Any],
        fast: Mapping[str, Any],
        says: str,
        relation: str = ">=",
        needs: str = "",
        part: str = "",
        within: float = 0.25,
    ) -> None:
        """Compare a ratio of two times that were measured in one run and kept; without such, the part stays open."""
        found = look_up(slow, fast)
        if found is None:
            self.open(says, needs or f"times of {_named(slow)} and {_named(fast)} from one run on a GPU", NOT_MEASURED)
            return
        slower, faster = found
        self.measured += found
        self.number(key, slower.seconds / faster.seconds, f"{says}, on {slower.device}, driver {slower.driver}, {slower.date}")
        self.compare(key, relation, within=within, part=part or key)

    def disagree(self, text: str) -> None:
        """Documents contradict each other, or themselves."""
        self.disagreements.append(text)

    def states(self, text: str) -> None:
        """The corrected statement, with the numbers computed."""
        self.statement = text

    def curves(self, x: str, y: str, **curves: tuple[Any, Any]) -> None:
        """What the picture shows, on logarithmic axes."""
        self.chart = (x, y, tuple(Curve(label.replace("_", " "), *data) for label, data in curves.items()))


def _named(what: Mapping[str, Any]) -> str:
    """generation by mamba-1.4b at T = 2,048."""
    sizes = ", ".join(f"{name} = {value:,}" for name, value in what.items() if name not in ("op", "implementation"))
    return f"{what['op']} by {what['implementation']}" + (f" at {sizes}" if sizes else "")


@dataclass(frozen=True)
class Result:
    """What was computed for a claim."""

    claim: Claim
    numbers: Mapping[str, Number]
    comparisons: tuple[Comparison, ...]
    opened: tuple[Open, ...]
    statement: str
    disagreements: tuple[str, ...]
    chart: tuple[str, str, tuple[Curve, ...]] | None
    measured: tuple[Measurement, ...]

    @property
    def parts(self) -> dict[str, str]:
        """The verdict on each part of the claim that could be computed.

        A part holds if all that was compared as it stands holds; holds if all that was compared under one reading does;
        else it is false.
        """
        found = {}
        for part in dict.fromkeys(c.part for c in self.comparisons):
            readings: dict[str, list[bool]] = {}
            for c in self.comparisons:
                if c.part == part:
                    readings.setdefault(c.given, []).append(c.holds)
            stated = readings.pop("", None)
            if stated is not None and all(stated):
                found[part] = HOLDS
            else:
                found[part] = HOLDS_IF if any(all(r) for r in readings.values()) else FALSE
        return found

    @property
    def verdict(self) -> str:
        """The worst of the parts that could be computed; of a claim that has none, why."""
        worst = [v for v in (FALSE, HOLDS_IF, HOLDS) if v in self.parts.values()]
        if worst:
            return worst[0]
        kinds = [o.verdict for o in self.opened]
        if not kinds:
            raise ValueError(f"{self.claim.id}: a claim must compare something or say what it would take")
        return NOT_MEASURED if NOT_MEASURED in kinds else OUT_OF_SCOPE

    @property
    def conditions(self) -> tuple[str, ...]:
        """The readings under which a part that does not hold as it stands does."""
        conditional = {part for part, verdict in self.parts.items() if verdict == HOLDS_IF}
        readings: dict[tuple[str, str], list[bool]] = {}
        for c in self.comparisons:
            if c.part in conditional and c.given:
                readings.setdefault((c.part, c.given), []).append(c.holds)
        return tuple(dict.fromkeys(given for (_, given), held in readings.items() if all(held)))

    def value(self, key: str) -> Any:
        """A computed number.

        Raises
        ------
        KeyError
            If there is none of that name; the message names those that come near.
        """
        if key not in self.numbers:
            near = difflib.get_close_matches(key, self.numbers, n=3) or list(self.numbers)
            raise KeyError(f"{self.claim.id} computes no {key!r}; it computes {', '.join(near)}")
        return self.numbers[key].value

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        claim = self.claim
        return {
            "id": claim.id,
            "section": claim.section,
            "claim": claim.says,
            "sources": list(claim.sources),
            "check": claim.check,
            "verdict": self.verdict,
            "conditions": list(self.conditions),
            "statement": self.statement,
            "numbers": {n.key: {"value": _plain(n.value), "unit": n.unit, "says": n.says} for n in self.numbers.values()},
            "comparisons": [
                {
                    "number": c.key,
                    "relation": c.relation,
                    "claimed": _plain(c.claimed),
                    "computed": _plain(c.computed),
                    "given": c.given,
                    "part": c.part,
                    "holds": c.holds,
                }
                for c in self.comparisons
            ],
            "open": [{"part": o.part, "needs": o.needs, "verdict": o.verdict} for o in self.opened],
            "disagreements": list(self.disagreements),
            "measured": [m.to_dict() for m in self.measured],
        }


def _plain(value: Any) -> Any:
    """JSON has neither infinities nor NaN."""
    return value if isinstance(value, bool | int) or value is None else float(value) if np.isfinite(value) else str(value)


def claim(
    id: str, says: str, *, sources: Sequence[str], check: str, **claimed: Any
) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Decorate the function that computes a claim; its module's `CLAIMS` collects it, its module's title is the section."""

    def decorate(compute: Callable[[Case], None]) -> Callable[[Case], None]:
        room = compute.__globals__
        section = room["__doc__"].split("\n")[0].partition(":")[0].rstrip(".")
        room["CLAIMS"].append(Claim(id, section, says, tuple(sources), check, claimed, compute))
        return compute

    return decorate
