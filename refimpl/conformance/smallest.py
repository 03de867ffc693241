"""The smallest case that still fails."""

import numpy as np

from refimpl.conformance import truth
from refimpl.conformance.cases import Case
from refimpl.conformance.gates import Finding
from refimpl.conformance.precision import Precision
from refimpl.conformance.report import Result
from refimpl.conformance.snippet import INLINE
from refimpl.conformance.trial import Trial, trouble

_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 12, 17, 33, 65)


def smallest(trial: Trial) -> Result | None:
    """The smallest numerical failure, drawn again at smaller sizes while it still fails."""
    failed = {c.id for c in trial.report.failures}
    found = [f for f in trial.failed_cases if f[2].status in ("NUMERIC", "NONFINITE", "SHAPE") and f[0].recipe and f[0].id in failed]
    if not found:
        return None
    case, to, finding = min(found, key=lambda f: (_elements(f[0].call), -f[2].ratio))
    plain = {**case.sizes, "batch": ()}
    tries = [plain, {**plain, **{x: 1 for x in plain if x not in (*trial.op.lengths, "batch")}}]
    tries += [{**plain, **{x: min(T, case.sizes[x]) for x in trial.op.lengths}} for T in _LENGTHS]
    for sizes in sorted(tries, key=lambda s: np.prod([v for k, v in s.items() if k != "batch"])):
        smaller = _again(trial, case, to, sizes)
        if smaller is not None and _elements(smaller[0].call) <= INLINE:  # a snippet can only write it out
            case, finding, numbers = smaller
            return trial.drawn(trial.failure(case, to, finding, case.call), finding, *numbers)
    return next((c for c in trial.report.failures if c.id == case.id and c.dtype == to.name), None)


def _again(trial: Trial, case: Case, to: Precision, sizes: dict) -> tuple[Case, Finding, tuple] | None:
    for attempt in range(3):
        try:
            drawn = trial.draw(np.random.default_rng([trial.seed, attempt, 3]), sizes, case.recipe["combo"], to, case.recipe["hard"])
        except (TypeError, IndexError, ZeroDivisionError, KeyError):  # a hard input may need more than these sizes
            return None
        if drawn is None:
            return None
        answer = trial.subject.call(drawn.call, view=case.view)
        if trouble(answer) is not None:
            return None
        got = trial.named(answer, drawn.call)
        limits = truth.tolerance(trial.op, drawn.call, to, drawn.right)
        finding = trial.gate(case.klass, drawn.call, to, got, drawn.right, limits)
        if finding is not None:
            smaller = Case(case.operator, case.klass, f"{case.name}, made smaller", drawn.call, drawn.sizes, case.view, case.recipe)
            return smaller, finding, (got, drawn.right, limits)
    return None


def _elements(call: dict) -> int:
    return sum(np.size(v) for v in call.values() if isinstance(v, np.ndarray))
