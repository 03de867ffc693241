"""What the kit found: a row per case, the worst failure in front, machine-readable forms beside the one for people."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from refimpl.conformance.pictures import summed

STATUSES = (
    "PASS", "SHAPE", "DTYPE", "NONFINITE", "NUMERIC", "BIAS", "PROPERTY", "GRADIENT", "MUTATED_INPUT", "NONDETERMINISTIC", "ERROR", "CRASH", "TIMEOUT",
    "NOT_APPLICABLE",
)  # fmt: skip
SCHEMA = 1


@dataclass
class Result:
    """One case's outcome.

    Attributes
    ----------
    id, klass, dtype, status : str
    message : str
        Why, in a sentence; empty for PASS.
    output, index, got, expected, bound, ratio, pattern, snippet
        Of a numerical failure: the worst element, its error over the bound, where the wrong elements are, and Python
        that reproduces it.
    traits : tuple of str
        What is unusual about the call: complex arrays, a second shape of an argument, the number of batch axes.
    excusable : bool
        The candidate raised, or plainly has no notion of complex numbers: not applicable if no call of that trait works.
    seconds : float
        The candidate's time.
    features : tuple of str
        What a rule of refusal may speak of; kept where the candidate was asked for a plain result.
    picture : dict, optional
        Of a failure: where the errors are (`refimpl.conformance.pictures.picture`). Kept for a few telling ones.
    ulps : dict
        By result, how far its elements are off (`refimpl.conformance.pictures.ulps`).
    """

    id: str
    klass: str
    dtype: str
    status: str
    message: str = ""
    output: str = ""
    index: tuple[int, ...] = ()
    got: Any = None
    expected: Any = None
    bound: float | None = None
    ratio: float = 0.0
    pattern: str = ""
    snippet: str = ""
    seconds: float = 0.0
    traits: tuple[str, ...] = ()
    excusable: bool = False
    features: tuple[str, ...] = ()
    picture: dict[str, Any] | None = None
    ulps: dict[str, dict[str, int]] = field(default_factory=dict)

    def to_dict(self) -> dict:
        plain = {k: v for k, v in vars(self).items() if k not in ("excusable", "features", "ulps") and v is not None and not (isinstance(v, str | tuple) and not v)}
        for key in ("got", "expected"):
            if key in plain:
                plain[key] = str(plain[key])
        plain["ratio"] = float(self.ratio) if np.isfinite(self.ratio) else str(float(self.ratio))
        if self.bound is not None and not np.isfinite(self.bound):
            del plain["bound"]
        return plain

    def element(self) -> str:
        """The worst element, as it is written in Python."""
        return f"{self.output}[{', '.join(map(str, self.index))}]" if self.index else self.output

    def place(self) -> tuple[str, str]:
        """The worst element with what it is and should be, and where the wrong ones are; empty where that is not known."""
        if not self.index and self.got is None:
            return "", self.pattern
        bound = f", bound {self.bound:.3g}" if self.bound else ""
        return f"{self.element()}: got {shown(self.got)}, expected {shown(self.expected)}{bound}", self.pattern

    def record(self) -> dict:
        """Plain data from which `of_record` makes the same result again."""
        plain = self.to_dict() | {"excusable": self.excusable, "features": self.features, "ulps": self.ulps}
        return {k: v for k, v in plain.items() if k != "picture"}

    @classmethod
    def of_record(cls, record: dict) -> "Result":
        plain = dict(record) | {"ratio": float(record.get("ratio", 0.0))}
        for key in ("index", "traits", "features"):
            plain[key] = tuple(plain.get(key, ()))
        for key in ("got", "expected"):
            plain[key] = _Number(plain[key]) if key in plain else None
        return cls(**plain)


@dataclass
class Report:
    """The verdict on a candidate.

    Attributes
    ----------
    operator, candidate : str
    verdict : str
        "conforms"; "deviates", a named legitimate variant; "wrong"; "inconclusive", nothing could be judged.
    cases : list of Result
    diagnosis : list of str
        What the mistake is, best match first.
    not_checked : list of str
        Arguments and options that the candidate does not take.
    """

    operator: str
    candidate: str
    cases: list[Result] = field(default_factory=list)
    diagnosis: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    variant: str = ""
    reason: str = ""
    smallest: Result | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def failures(self) -> list[Result]:
        return [c for c in self.cases if c.status not in ("PASS", "NOT_APPLICABLE")]

    @property
    def verdict(self) -> str:
        if self.failures:
            if all(c.status in ("ERROR", "CRASH", "TIMEOUT") for c in self.failures) and not any(c.status == "PASS" for c in self.cases):
                return "inconclusive"
            return "deviates" if self.variant else "wrong"
        return "conforms" if any(c.status == "PASS" for c in self.cases) and not self.reason and not self.interrupted else "inconclusive"

    @property
    def ok(self) -> bool:
        """True only if the candidate conforms."""
        return self.verdict == "conforms"

    def __bool__(self) -> bool:
        return self.ok

    def raise_for_failure(self) -> None:
        """Raise AssertionError, with the report as its text, unless the candidate conforms."""
        if not self.ok:
            raise AssertionError(str(self))

    @property
    def worst(self) -> Result | None:
        """The failure to look at first: the smallest that is numerical, else the first."""
        if self.smallest is not None:
            return self.smallest
        order = {"NUMERIC": 0, "BIAS": 1, "NONFINITE": 0, "GRADIENT": 2, "SHAPE": 0, "DTYPE": 3}
        return min(self.failures, key=lambda c: order.get(c.status, 4), default=None)

    # -- for people --------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        head = f"{self.operator}: {self.candidate} {self.verdict_words()}"
        lines = [head, self.counts()]
        if self.not_checked:
            lines.append("not checked: " + ", ".join(self.not_checked))
        lines += [f"note: {note}" for note in self.notes]
        worst = self.worst
        if worst is not None and self.failures:
            lines += ["", f"{worst.status}  {worst.id}  {worst.dtype}", f"  {worst.message}"]
            at, where = worst.place()
            lines += [f"  at {at}"] * bool(at) + [f"  where: {where}"] * bool(where)
            if self.diagnosis:
                lines += ["", "diagnosis"] + [f"  {d}" for d in self.diagnosis[:4]]
            rows = [f"  {klass:<12} {dtype:<9} {bad:>3} of {count}   {kinds}" for klass, dtype, bad, count, kinds in self.by_class() if bad]
            lines += ["", "failures by class", *rows]
            if worst.snippet:
                lines += ["", "reproduce"] + [f"  {line}" for line in worst.snippet.splitlines()]
        return "\n".join(lines)

    def verdict_words(self) -> str:
        """The verdict as it stands behind the candidate's name."""
        reason = self.why_not()
        words = {"conforms": "conforms", "wrong": "is WRONG", "inconclusive": f"could not be judged{': ' + reason if reason else ''}"}
        return words.get(self.verdict, f"DEVIATES: {self.variant}")

    def why_not(self) -> str:
        """Why there is no verdict, where something other than failures says so."""
        if self.reason or self.interrupted:
            return self.reason or "the run was interrupted"
        if self.verdict == "inconclusive" and self.cases:
            first = next(iter(self.failures), self.cases[0])
            return f"every call {'fails' if self.failures else 'is refused'}, the first ({first.id}) with {first.message}"
        return ""

    def counts(self) -> str:
        """How many cases pass, in which precisions, with which seed, and where the candidate ran."""
        judged = [c for c in self.cases if c.status != "NOT_APPLICABLE"]
        skipped = len(self.cases) - len(judged)
        passed = sum(c.status == "PASS" for c in judged)
        dtypes = ", ".join(dict.fromkeys(c.dtype for c in self.cases))
        text = f"{passed} of {len(judged)} cases pass ({dtypes}; seed {self.settings.get('seed', 0)}; {self.seconds:.1f} s"
        text += f"; {skipped} not applicable" if skipped else ""
        text += "" if self.settings.get("isolate", True) else "; cooperative"  # it could reach what judged it
        return text + (") - interrupted" if self.interrupted else ")")

    def by_class(self) -> list[tuple[str, str, int, int, str]]:
        """Class, precision, how many of how many judged cases fail, and as what."""
        rows = []
        for dtype in dict.fromkeys(c.dtype for c in self.cases):
            for klass in dict.fromkeys(c.klass for c in self.cases):
                here = [c for c in self.cases if (c.klass, c.dtype) == (klass, dtype) and c.status != "NOT_APPLICABLE"]
                bad = [c.status for c in here if c.status != "PASS"]
                if here:
                    rows.append((klass, dtype, len(bad), len(here), ", ".join(f"{s} {bad.count(s)}" for s in dict.fromkeys(bad))))
        return rows

    def widest(self) -> Result | None:
        """The failure whose map says most: the worst of those with more than a few cells."""
        drawn = [r for r in self.failures if r.picture]
        wide = [r for r in drawn if cells(r) >= 64] or drawn
        return max(wide, key=lambda r: (r.status in ("NUMERIC", "NONFINITE", "GRADIENT"), r.ratio), default=None)

    def accuracy(self) -> dict[str, dict[str, dict]]:
        """By precision and result: elements, median, 99th percentile and largest of |error| in ULPs, and the signed histogram."""
        found: dict[str, dict[str, list]] = {}
        for c in self.cases:
            for name, histogram in c.ulps.items():
                found.setdefault(c.dtype, {}).setdefault(name, []).append(histogram)
        return {dtype: {name: summed(h) for name, h in outputs.items()} for dtype, outputs in found.items()}

    def part(self, dtype: str, klass: str) -> "Report":
        """The cases of one class in one precision, as a report; what explains the whole explains them."""
        cases = [c for c in self.cases if (c.dtype, c.klass) == (dtype, klass)]
        small = self.smallest if self.smallest is not None and (self.smallest.dtype, self.smallest.klass) == (dtype, klass) else None
        seconds = sum(c.seconds for c in cases)
        return replace(self, cases=cases, smallest=small, notes=list(self.notes), diagnosis=list(self.diagnosis), seconds=seconds)

    def thin(self) -> None:
        """Keep pictures of few failures: of the smallest, and of the largest map and the largest error of each class."""
        drawn = [c for c in self.failures if c.picture]
        kept = {id(self.smallest)}
        for dtype, klass in dict.fromkeys((c.dtype, c.klass) for c in drawn):
            here = [c for c in drawn if (c.dtype, c.klass) == (dtype, klass)]
            kept |= {id(max(here, key=lambda c: c.ratio)), id(max(here, key=cells))}
        for c in drawn:
            if id(c) not in kept:
                c.picture = None

    # -- for programs ------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict:
        """Plain data; ``schema`` is raised when the meaning of a key changes."""
        return {
            "schema": SCHEMA,
            "operator": self.operator,
            "candidate": self.candidate,
            "verdict": self.verdict,
            "ok": self.ok,
            "variant": self.variant,
            "reason": self.reason,
            "diagnosis": list(self.diagnosis),
            "not_checked": list(self.not_checked),
            "notes": list(self.notes),
            "settings": {k: v if isinstance(v, str | int | float | bool | list | type(None)) else repr(v) for k, v in self.settings.items()},
            "accuracy": self.accuracy(),
            "seconds": round(self.seconds, 3),
            "interrupted": self.interrupted,
            "smallest": self.smallest.to_dict() if self.smallest else None,
            "cases": [c.to_dict() for c in self.cases],
        }

    def to_json(self, indent: int | None = 1) -> str:
        """The same as text; its schema is in the package, ``refimpl/conformance/report.schema.json``."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def to_junit(self) -> str:
        """JUnit XML: a test case per case, skipped where not applicable; and an error where there is no verdict."""
        unjudged = self.verdict == "inconclusive"
        suite = ElementTree.Element(
            "testsuite",
            name=f"refimpl.{self.operator}",
            tests=str(len(self.cases) + unjudged),
            failures=str(len(self.failures)),
            errors=str(int(unjudged)),
            skipped=str(sum(c.status == "NOT_APPLICABLE" for c in self.cases)),
            time=f"{self.seconds:.3f}",
        )
        for c in self.cases:
            row = ElementTree.SubElement(suite, "testcase", classname=f"refimpl.{self.operator}.{c.dtype}", name=c.id, time=f"{c.seconds:.4f}")
            if c.status == "NOT_APPLICABLE":
                ElementTree.SubElement(row, "skipped", message=_xml(c.message))
            elif c.status != "PASS":
                failure = ElementTree.SubElement(row, "failure", type=c.status, message=_xml(c.message))
                failure.text = _xml("\n".join(filter(None, [c.message, c.pattern, c.snippet])))
        if unjudged:
            row = ElementTree.SubElement(suite, "testcase", classname=f"refimpl.{self.operator}", name="verdict", time="0")
            ElementTree.SubElement(row, "error", type="inconclusive", message=_xml(self.verdict_words()))
        return ElementTree.tostring(suite, encoding="unicode")

    def to_html(self) -> str:
        """One self-contained page."""
        from refimpl.conformance.page import page

        return page(self)


class _Number(str):
    """A number that has been on disk: shown as it was."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def shown(value: Any) -> str:
    """A number with the digits that tell it from its neighbours."""
    value = value[()] if isinstance(value, np.ndarray) and not value.ndim else value
    if not isinstance(value, np.generic):
        return repr(value)
    if value.dtype.kind in "iubc":
        return repr(complex(value)) if value.dtype.kind == "c" else repr(value.item())
    return repr(float(value)) if value.dtype.itemsize >= 8 else str(value)


def cells(result: Result) -> int:
    """How many cells a failure's map has."""
    return sum(map(len, result.picture["map"])) if result.picture else 0


def _xml(text: str) -> str:
    """Without the characters that XML does not have."""
    return "".join(ch for ch in text if ch in "\n\t" or (ord(ch) >= 32 and not 0xD800 <= ord(ch) <= 0xDFFF and ord(ch) not in (0xFFFE, 0xFFFF)))
