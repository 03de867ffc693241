"""Trials of results: every case against the truth; the same call again; how many batch axes a candidate takes."""

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from refimpl.conformance import gates, truth
from refimpl.conformance.cases import Case, cases, default_sizes, repeated
from refimpl.conformance.domain import ALIKE
from refimpl.conformance.invoke import INFERENCE, Answer
from refimpl.conformance.likeness import Evidence
from refimpl.conformance.narrow import friendly, narrow
from refimpl.conformance.pictures import ulps
from refimpl.conformance.precision import Precision, rounded
from refimpl.conformance.refusals import features
from refimpl.conformance.report import Result
from refimpl.conformance.shapes import shared
from refimpl.conformance.traits import COMPLEX, empty, real_parts, traits
from refimpl.conformance.trial import Trial, trouble

Job = tuple[str, Callable[[], Any]]


def settle(trial: Trial, to: Precision) -> bool:
    """Find what every call needs where the candidate raises: a number of batch axes; as many values as keys, as many heads; sizes."""
    domain, layout, sizes = trial.domain, trial.subject.layout, default_sizes(trial.op)
    if layout is not None and "b" in layout.order:
        domain.batch_rank = 1
    ranks = (0, 1, 2) if domain.batch is None and domain.batch_rank is None and "batch" in sizes else (None,)
    pairs = [pair for pair in ALIKE if set(pair) <= set(sizes) and pair[0] not in domain.sizes]
    equalities = [some for count in range(len(pairs) + 1) for some in itertools.combinations(pairs, count)]
    combo = {name: values[0] for name, values in trial.factors().items()}
    for base, equal, rank in itertools.product(friendly(trial), equalities, ranks):
        domain.equal = equal
        drawn = trial.draw(np.random.default_rng(0), base | ({"batch": (2,) * rank} if rank else {}), combo, to)
        if drawn is not None and trial.subject.call(drawn.call).status not in ("ERROR", "NOT_APPLICABLE"):
            if rank:
                domain.batch_rank = rank
                trial.report.not_checked.append(f"other than {rank} batch {'axis' if rank == 1 else 'axes'} (it raises)")
            trial.report.not_checked += [f"{letter} other than {other} (it raises)" for letter, other in equal]
            narrow(trial, to, base, combo)
            return True
    domain.equal = ()
    return False


def result_jobs(trial: Trial, to: Precision) -> Iterator[Job]:
    """All cases of the level, then the hygiene of repeated calls."""
    for case in cases(trial.op, level=trial.level, seed=trial.seed, support=trial.subject.support, domain=trial.domain):
        yield f"{to.name} {case.klass}", functools.partial(_case, trial, case, to)
    if to.coarse:
        yield f"{to.name} long", functools.partial(_together, trial, to)
    combos = trial.combos(0)
    for number in dict.fromkeys([0, len(combos) - 1]):
        yield f"{to.name} hygiene", functools.partial(_hygiene, trial, to, combos[number], number)
    yield f"{to.name} hygiene", functools.partial(_lasting, trial, to)


def _case(trial: Trial, case: Case, to: Precision) -> None:
    call = rounded(trial.op.contract, repeated(case.call) if case.view == "repeated" else case.call, to)
    if call is None:
        return
    try:
        right = truth.truth(trial.op, call, to)
    except ValueError:
        return  # the operator itself refuses this combination
    if case.klass == "integers" and not truth.certain(trial.op, call, to, right):
        return
    start = time.perf_counter()
    answer = trial.subject.call(call, view=case.view, poison=[v.nbytes for v in right.values()], manner=_manner(case))
    seconds = time.perf_counter() - start
    result = _judged(trial, case, call, to, right, answer)
    result.seconds, result.traits = seconds, traits(trial.op, call, case.view)
    result.features = features(trial.op, case, call, result.traits)
    if result.status not in ("PASS", "NOT_APPLICABLE"):
        result.excusable = _excusable(trial, result, call, to, right, answer)
    trial.report.cases.append(result)


def _manner(case: Case) -> str:
    """Random calls are made without gradients: there, every option meets kernels for inference."""
    return INFERENCE if case.klass == "random" else ""


def _together(trial: Trial, to: Precision) -> None:
    """A common factor that no case shows by itself, but all of them together."""
    for (precision, name), slopes in trial.slopes.items():
        if precision == to.name and len(slopes) > 1:
            finding = gates.together(name, slopes, to.common)
            why = ("PASS",) if finding is None else (finding.status, finding.message, finding.output)
            trial.report.cases.append(Result(f"long[{name} of all cases together]", "long", to.name, *why))


def _judged(trial: Trial, case: Case, call: dict, to: Precision, right: dict, answer: Answer) -> Result:
    failed = trouble(answer)
    if failed is not None:
        return Result(case.id, case.klass, to.name, *failed)
    got, limits = trial.named(answer, call), truth.tolerance(trial.op, call, to, right)
    if case.klass == "integers":  # gate G5: nothing rounds, so nothing may be off
        limits = {n: np.zeros_like(v) for n, v in limits.items()}
    klass = "hard" if case.recipe.get("hard") else case.klass  # statistics are of ordinary inputs
    finding = trial.gate(klass, call, to, got, right, limits)
    if set(got) == set(right):
        trial.keep(Evidence(call, to, got, right, limits, failed=finding is not None, case=case.id))
    if finding is not None:
        trial.failed_cases.append((case, to, finding))
        result = trial.drawn(trial.failure(case, to, finding, call, manner=_manner(case)), finding, got, right, limits)
        result.ulps = _spread(got, right, to)
        return result
    for name, exact in right.items():
        if exact.size > 8 and exact.dtype.kind in "fc":  # integers are compared exactly
            trial.teeth.setdefault(name, set()).update(gates.teeth(exact, limits[name]))
    closest = max((float(np.max(gates.error_ratio(got[n], right[n], limits[n]), initial=0.0)) for n in right if right[n].dtype.kind in "fc"), default=0.0)
    return Result(case.id, case.klass, to.name, "PASS", ratio=closest, ulps=_spread(got, right, to))


def _spread(got: dict, right: dict, to: Precision) -> dict[str, dict[str, int]]:
    """Gate G4, which only reports: how far every result is off, in units in the last place."""
    return {n: h for n, exact in right.items() if isinstance(got.get(n), np.ndarray) and (h := ulps(got[n], exact, to, n.startswith("state")))}


def _excusable(trial: Trial, result: Result, call: dict, to: Precision, right: dict, answer: Answer) -> bool:
    """The candidate raised; or sees that its batch axes do not fit; or says NaN of a mean over nothing; or has no notion of
    complex numbers: drops imaginary parts, or returns them."""
    if result.status == "ERROR" or (result.status == "SHAPE" and shared(trial.op, call)):
        return True
    if result.status == "NONFINITE" and empty(trial.op, call) and not any(trial.op.contract.result_axis(letter) for letter in trial.op.lengths):
        return True
    if COMPLEX not in result.traits or answer.status != "OK":
        return False
    got = next(iter(trial.named(answer, call).values()), None)
    if not isinstance(got, np.ndarray):
        return False
    if got.dtype.kind == "c" and next(iter(right.values())).dtype.kind != "c":
        return True
    if got.dtype.kind == "c" and np.any(got.imag):
        return False
    try:
        name, real = next(iter(truth.truth(trial.op, real_parts(call), to).items()))
        limit = truth.tolerance(trial.op, real_parts(call), to, {name: real})[name]
    except (ValueError, TypeError, KeyError):
        return False
    return got.shape == real.shape and not np.any(gates.error_ratio(got.real, real.real, limit) > 1)


# -- hygiene: the same call again, other values in the same memory -----------------------------------------------------


def _hygiene(trial: Trial, to: Precision, combo: dict, number: int) -> None:
    """A, A again, then B in A's memory, then A: equal bits for equal values, and never an answer kept from before."""
    rng = np.random.default_rng([trial.seed, number, 99])
    sizes = dict(zip(trial.op.lengths, (21, 35, 27), strict=False))
    a, b = trial.draw(rng, sizes, combo, to), trial.draw(rng, sizes, combo, to)
    if a is None or b is None:
        return
    case = Case(trial.op.name, "hygiene", f"A, A, B, A in the same memory, {number}", a.call, a.sizes)
    answer = trial.subject.call(a.call, repeat=2, second=b.call, poison=[v.nbytes for v in a.right.values()])
    failed = trouble(answer)
    if failed is not None:
        result = Result(case.id, case.klass, to.name, *failed, traits=traits(trial.op, a.call), excusable=failed[0] == "ERROR")
    else:
        result = _compared(trial, case, to, [answer.result, *answer.again], b.call, b.right)
    trial.report.cases.append(result)


def _lasting(trial: Trial, to: Precision) -> None:
    """Results that were returned long ago still are what they were."""
    answer = trial.subject.finish()
    failed = ("NONDETERMINISTIC", "a result changed long after it was returned") if answer.stale else trouble(answer)
    trial.report.cases.append(Result("hygiene[results last]", "hygiene", to.name, *(failed or ("PASS",))))


def _compared(trial: Trial, case: Case, to: Precision, results: list, other: dict, right: dict) -> Result:
    first, second, of_other, third = map(_bits, results)
    if first != second or first != third:
        return Result(case.id, case.klass, to.name, "NONDETERMINISTIC", "the same inputs give other results when called again")
    if of_other == first and not trial.subject.mutable:
        return Result(case.id, case.klass, to.name, "PASS")
    got = trial.named(Answer(results[2]), other)
    limits = truth.tolerance(trial.op, other, to, right)
    finding = trial.gate(case.klass, other, to, got, right, limits)
    if finding is None:
        return Result(case.id, case.klass, to.name, "PASS")
    if of_other == first:
        return Result(case.id, case.klass, to.name, "NONDETERMINISTIC", "other values in the same memory give the first call's result: an answer is cached")
    return trial.drawn(trial.failure(case, to, finding, other), finding, got, right, limits)


def _bits(result) -> bytes:
    if isinstance(result, tuple):
        return b"".join(map(_bits, result))
    return np.ascontiguousarray(result).tobytes() if isinstance(result, np.ndarray) else b""
