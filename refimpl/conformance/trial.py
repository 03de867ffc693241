"""One check under way: what all trials of a candidate share - drawing a call, judging results, keeping evidence."""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.conformance import gates, truth
from refimpl.conformance.candidate import Candidate, plain_name
from refimpl.conformance.cases import Case, choose, default_sizes, factors, hard_call, pairwise, parameters
from refimpl.conformance.domain import Domain
from refimpl.conformance.ensemble import readings, slopes
from refimpl.conformance.gates import Finding
from refimpl.conformance.invoke import Answer
from refimpl.conformance.likeness import Evidence
from refimpl.conformance.pattern import axes_of, describe
from refimpl.conformance.pictures import picture
from refimpl.conformance.precision import Precision, rounded
from refimpl.conformance.report import Report, Result
from refimpl.conformance.snippet import gradient_snippet, snippet
from refimpl.op import Op

GRADIENT_OF = "the gradient of "  # as findings name them
KEPT = 80  # failing cases kept as evidence, and passing ones
SMALL, PASSES_OF_A_KIND = 30_000, 3  # of those that pass: elements, and how many that differ in sizes alone
_FEW = 64  # elements of a result from which statistics mean something
_PEERED = ("options", "long", "sizes")  # classes whose inputs are ordinary, so that statistics mean something


@dataclass
class Drawn:
    """A call in a precision, with the right results."""

    call: dict[str, Any]
    right: dict[str, np.ndarray]
    sizes: dict[str, Any]


class Trial:
    """The operator, the candidate, and what has been found so far."""

    def __init__(self, op: Op, subject: Candidate, report: Report, level: str, seed: int, domain: Domain):
        self.op, self.subject, self.report = op, subject, report
        self.level, self.seed, self.domain = level, seed, domain
        self.evidence: list[Evidence] = []
        self.failed_cases: list[tuple[Case, Precision, Finding]] = []
        self.broken_laws: list[tuple] = []
        self.teeth: dict[str, set[str]] = {}
        self.slopes: dict[tuple[str, str], list[tuple[complex, float]]] = {}  # by precision and result: common factors, less 1, and their spread
        self.required = parameters(op)[0]

    def combos(self, salt: int) -> list[dict[str, Any]]:
        """Combinations of options, optional arrays and states, with every pair among them; the plainest first."""
        chosen = self.factors()
        return pairwise(chosen, np.random.default_rng([self.seed, salt])) if chosen else [{}]

    def factors(self) -> dict[str, tuple]:
        return factors(self.op, self.subject.support, self.domain)

    def draw(self, rng: np.random.Generator, sizes: dict, combo: dict, to: Precision, hard: str = "") -> Drawn | None:
        """A call and its truth; None where the domain, the precision or the operator itself has no such call."""
        fitted = self.domain.fit({**default_sizes(self.op), **sizes})
        if fitted is None:
            return None
        try:
            if hard:
                call = hard_call(self.op, hard, rng, fitted, combo, self.subject.support, self.domain)
            else:
                call = choose(self.op, self.op.sample(rng, **fitted), fitted, combo)
            call = None if call is None else rounded(self.op.contract, call, to)
            return None if call is None else Drawn(call, truth.truth(self.op, call, to), fitted)
        except ValueError:
            return None

    def named(self, answer: Answer, call: dict) -> dict:
        """Results by name; empty where they are of another number."""
        try:
            return self.op.contract.named(answer.result, call.get("return_state", False))
        except (ValueError, TypeError, AttributeError, IndexError):
            return {}

    def gate(self, klass: str, call: dict, to: Precision, got: dict, right: dict, limits: dict) -> Finding | None:
        """The first gate that does not let a result through."""
        if set(got) != set(right):
            return Finding("SHAPE", f"returned {', '.join(got) or 'another number of results'}, expected {', '.join(right)}")
        first = next(iter(right))
        compute, out = self.op.contract.precision(**call)
        if any(v.dtype.kind == "c" for v in call.values() if isinstance(v, np.ndarray)):
            got = {n: _of_one_kind(y, right[n]) for n, y in got.items()}
        mixed = out == compute  # complex arrays beside half-precision ones
        for name, exact in right.items():
            state = name.startswith("state")
            wanted = gates.result_dtype(exact, compute, out, state)
            finding = gates.exact(name, got[name], exact, limits[name], to, wanted, state, secondary=name != first, mixed=mixed)
            if finding is not None:
                return finding
        outputs = [y.astype(np.float32) for n, y in got.items() if not n.startswith("state") and y.dtype.kind not in "c"]
        for name in (n for n in right if n.startswith("state") and right[n].dtype.kind == "f"):
            if (finding := gates.narrow(name, got[name], right[name], to, outputs)) is not None:
                return finding
        findings = [f for name in right if (f := gates.bounded(name, got[name], right[name], limits[name])) is not None]
        if findings:
            return max(findings, key=lambda f: f.ratio)
        if to.coarse and klass in _PEERED and any(v.size >= _FEW for v in right.values()):
            return self._statistics(got, right, limits, call, to)
        return None

    def _statistics(self, got: dict, right: dict, limits: dict, call: dict, to: Precision) -> Finding | None:
        """G2 and G3, in a half precision, where rounding is so coarse that mistakes hide below the bound; of every result, and every state."""
        known = readings(self.op, call, to, right, keep=not self.subject.isolated)
        directions = None
        for name, others in known.items():
            g, r = got[name], right[name]
            floor = 0.5 * to.unit * np.abs(r).astype(np.float64) + truth.smallest(to)
            finding = gates.like_peers(name, g, r, others, floor) or gates.no_row_apart(name, g, r, others, limits[name]) or gates.unbiased(name, g, r, others, to.common)
            if finding is None and others.gains:
                directions = slopes(self.op, call, to, right) if directions is None else directions
                finding = gates.ungained(name, g, r, others, directions[name], to.common)
            if finding is not None:
                return finding
            if r.size >= _FEW and others.spread:  # none of a result that is zero throughout
                self.slopes.setdefault((to.name, name), []).append((gates.slope(g, r), others.spread))
        return None

    def failure(self, case: Case, to: Precision, finding: Finding, call: dict, cotangents: tuple | None = None, manner: str = "") -> Result:
        """A finding as the report shows it: the place, the pattern in words, Python that reproduces it."""
        pattern = describe(finding.bad, self._axes(finding.output, call)) if finding.bad is not None else ""
        recall = f"{self.op.name!r}, {case.id!r}, dtype={to.name!r}, level={self.level!r}, seed={self.seed}"
        if self.subject.support.keywords is not None:
            recall += f", keywords={sorted(self.subject.support.keywords & keywords(self.op))!r}"
        if repr(self.domain) != "Domain()":
            recall += f", domain={self.domain!r}"
        name = plain_name(self.report.candidate) or "candidate"
        how = {n: self.report.settings.get(n) for n in ("framework", "device", "layout")} | {"view": case.view, "manner": manner if cotangents else ""}
        plain = {"framework": "numpy", "device": None, "layout": None, "view": "contiguous", "manner": ""}
        way = ", ".join(f"{n}={v!r}" for n, v in how.items() if v != plain[n])
        output, listed = finding.output or "the result", bool(case.recipe)
        if cotangents is None:
            function = f"torch.no_grad()({name})" if manner and how["framework"] == "torch" else name
            text = snippet(self.op, function, call, self.required, self.subject.passed(call), recall, output, way)
        else:
            text, listed = gradient_snippet(self.op, name, self.subject.vjp, call, cotangents, recall, output, way), True
        if "import recall" in text and (not listed or "<l" in recall):  # in no list of cases, or in one that only a lambda draws
            text = ""
        return Result(
            case.id, case.klass, to.name, finding.status, finding.message, finding.output, finding.index, finding.got, finding.expected, finding.bound,
            finding.ratio, pattern, text,
        )  # fmt: skip

    def _axes(self, output: str, call: dict | None = None) -> tuple[str, ...]:
        """The last axes of a result, or, in the shape that it has in this call, of an argument whose gradient it is."""
        contract = self.op.contract
        if output.startswith(GRADIENT_OF):
            name, _, part = output.removeprefix(GRADIENT_OF).partition("[")
            name = contract.states[int(part[:-1])].name if part and name == "state" else name
            names = {a.name.partition(".")[0] for a in (*contract.arrays, *contract.states)}
            arrays = {n: v for n, v in (call or {}).items() if n in names and v is not None}
            return contract.layout(**arrays).get(name, ())
        named = [r for r in (*contract.results, *contract.states) if r.name == output]
        return tuple(a.rstrip("?") for r in named[:1] for a in r.shapes[0].axes)

    def drawn(self, result: Result, finding: Finding, got: dict, right: dict, limits: dict, call: dict | None = None) -> Result:
        """The result with a picture of the errors that were found."""
        name = finding.output.removeprefix(GRADIENT_OF)
        if isinstance(got.get(name), np.ndarray) and name in right:
            axes = axes_of(right[name].ndim, self._axes(finding.output, call))
            result.picture = picture(axes, got[name], np.asarray(right[name]), np.asarray(limits[name]))
        return result

    def keep(self, evidence: Evidence) -> None:
        """Remember a case for the diagnosis: failures, and passes of every kind, which no explanation may contradict."""
        alike = [e for e in self.evidence if (e.cotangents is None) == (evidence.cotangents is None) and e.failed == evidence.failed]
        if evidence.failed:
            wanted = len(alike) < KEPT
        else:
            small = evidence.elements < SMALL
            wanted = small and len(alike) < KEPT and sum(e.kind == evidence.kind for e in alike) < PASSES_OF_A_KIND
        if wanted:
            self.evidence.append(evidence)

    def state_of(self, parts: list) -> Any:
        """A state, or anything in its form, of its parts."""
        if len(parts) == 1 and "." not in self.op.contract.states[0].name:
            return parts[0]
        return namedtuple("State", [s.name.partition(".")[2] or s.name for s in self.op.contract.states])(*parts)


def _of_one_kind(got: np.ndarray, right: np.ndarray) -> np.ndarray:
    """A result of complex arguments that is real may come as complex numbers, and the other way round: of the same values."""
    if got.dtype.kind == "c" and right.dtype.kind == "f" and not np.any(got.imag):
        return got.real
    if got.dtype.kind == "f" and right.dtype.kind == "c" and not np.any(right.imag):
        return got.astype(np.result_type(got.dtype, np.complex64))
    return got


def keywords(op: Op) -> set[str]:
    """Everything that a candidate may be passed by keyword."""
    _, optional, options = parameters(op)
    return {*optional, *options, "state", "return_state"}


def trouble(answer: Answer) -> tuple[str, str] | None:
    """Status and message where there is nothing to judge, or nothing more."""
    if answer.status != "OK":
        return answer.status, answer.message
    if answer.mutated:
        return "MUTATED_INPUT", f"wrote to its input {', '.join(answer.mutated)}"
    if answer.stale:
        return "NONDETERMINISTIC", "an earlier result changed when the function was called again: results share memory"
    return None
