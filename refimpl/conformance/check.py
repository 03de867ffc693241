"""`check`: is this implementation right, where is it wrong, and what is the mistake?

A candidate's output flows one way: cases -> truth and bounds -> the candidate's results -> gates -> diagnosis -> report.
"""

import functools
import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from refimpl import __version__
from refimpl.catalogue import operator
from refimpl.conformance.candidate import Candidate, printable
from refimpl.conformance.cases import LEVELS, default_sizes, parameters
from refimpl.conformance.diagnosis import explain
from refimpl.conformance.domain import Domain
from refimpl.conformance.frameworks import FRAMEWORKS
from refimpl.conformance.journal import Journal, forget_old, usual_place
from refimpl.conformance.precision import Precision, precision
from refimpl.conformance.refusals import weigh
from refimpl.conformance.report import Report, Result
from refimpl.conformance.smallest import smallest
from refimpl.conformance.traits import excuse
from refimpl.conformance.trial import KEPT, Trial
from refimpl.conformance.trial_gradients import gradient_jobs
from refimpl.conformance.trial_laws import breaks_the_same_laws, law_jobs
from refimpl.conformance.trial_results import result_jobs, settle
from refimpl.op import Op

_NO_VARIANT = ("MUTATED_INPUT", "NONDETERMINISTIC", "DTYPE", "ERROR", "CRASH", "TIMEOUT")  # never a matter of convention
_AGAIN = ("SHAPE", "NONFINITE", "NUMERIC", "BIAS", "PROPERTY", "GRADIENT")  # failures whose numbers the diagnosis wants to see
_PASSES_AGAIN = 8  # and some passes, which it must not contradict
Progress = Callable[[int, int, str], None]


def check(
    op: str | Op,
    candidate: Callable | str,
    *,
    framework: str = "numpy",
    device: str | None = None,
    dtypes: Iterable[str] = ("float64", "float32"),
    gradients: bool = False,
    candidate_vjp: Callable | str | None = None,
    layout: str | None = None,
    domain: Domain | None = None,
    level: str = "standard",
    fail_fast: bool = False,
    isolate: bool = False,
    timeout: float = 60.0,
    memory: float | None = None,
    seed: int = 0,
    save: str | Path | bool = False,
    resume: str | Path | bool = False,
    progress: Progress | None = None,
) -> Report:
    """Hold an implementation of an operator against the truth.

    Parameters
    ----------
    op : str or Op
        The operator's name, as in ``refimpl.OPS``.
    candidate : callable or str
        Takes the contract's arguments and returns what the contract returns, in arrays of `framework`: the arrays that
        define the operator by position, optional arrays and options by keyword and only where they depart from the
        default. Options whose keyword its signature lacks are not applicable. A string is ``file.py:name`` or
        ``package.module:name``. A candidate refuses a call by raising NotImplementedError.
    framework : {"numpy", "torch", "jax", "cupy"}
    device : str, optional
        The framework's name of a device.
    dtypes : iterable of str
        Precisions: float64, float32, tf32, float16, bfloat16, float8_e4m3fn, float8_e5m2. Complex arguments come in the
        complex type of that precision. Of ``"tf32"`` arrays are float32 whose values have TF32's 11 bits, and products may see
        no more of what is computed on the way; under ``"float32"`` such products are wrong. Results of eight-bit arrays may
        be given back in bfloat16, float16 or float32.
    gradients : bool
        Also judge gradients: the framework's (torch, JAX) or `candidate_vjp`'s, called as ``<op>_vjp`` is.
    layout : str, optional
        The candidate's order of axes, as letters b, h, t, d: "bthd".
    domain : Domain, optional
        Sizes and options that the candidate supports.
    level : {"quick", "standard", "exhaustive"}
    fail_fast : bool
        Stop at the first failure.
    isolate : bool
        Run the candidate in a process of its own, so that a crash or a hang costs one case, and nothing expected is in its
        reach. It is imported there and not here; a function that no other process can import is sent by value.
    timeout : float
        Seconds that one call may take.
    memory : float, optional
        With `isolate`: GiB of host memory that the candidate's process may take beyond what it takes when it is loaded;
        half of the machine's by default.
    seed : int
        Reproduces every input.
    save : path or bool
        A file for the results, written as they arrive (JSON lines). True is one in the user's cache folder, found by what
        is checked, and removed when the check is complete.
    resume : path or bool
        Go on with the results in this file, if there is one, and save further ones there.
    progress : callable, optional
        ``progress(done, total, label)``.

    Returns
    -------
    Report

    Raises
    ------
    ValueError, TypeError
        If an argument is not one of these, or the file to resume from is about another check.
    ImportError
        If the framework is not installed.

    Examples
    --------
    >>> import refimpl
    >>> report = refimpl.check("linear_recurrence", refimpl.linear_recurrence, level="quick")
    >>> report.verdict
    'conforms'
    """
    op = operator(op) if isinstance(op, str) else op
    domain = Domain() if domain is None else domain
    if isinstance(domain, Domain):
        domain = domain.spelled_for(default_sizes(op))
    _validate(op, candidate, dtypes, level, domain, gradients, candidate_vjp, framework, timeout, memory)
    precisions = [precision(name) for name in dtypes]
    fixed = {name: values[0] for name, values in domain.options.items() if len(values) == 1}
    subject = Candidate(op, candidate, framework=framework, device=device, vjp=candidate_vjp, layout=layout, timeout=timeout, fixed=fixed, isolate=isolate, memory=memory)
    name = candidate if isinstance(candidate, str) else getattr(candidate, "__qualname__", type(candidate).__name__)
    settings = {
        "framework": framework, "device": device, "dtypes": [p.name for p in precisions], "gradients": gradients, "layout": layout, "domain": repr(domain),
        "level": level, "isolate": isolate, "seed": seed,
    }  # fmt: skip
    report = Report(op.name, printable(str(name)), settings=settings, not_checked=_not_checked(op, subject, domain))
    trial = Trial(op, subject, report, level, seed, domain)
    journal = None
    start = time.perf_counter()
    try:
        journal = _journal(report, subject, save, resume)
        any(settle(trial, p) for p in precisions)  # the first precision in which it answers tells
        _work(trial, [functools.partial(_jobs, trial, p, gradients) for p in precisions], journal, fail_fast, progress)
        _conclude(trial, fail_fast)
    except KeyboardInterrupt:
        report.interrupted = True
        excuse(report)
    finally:
        subject.close()
        if journal is not None:
            journal.close(remove=not report.interrupted and isinstance(save, bool) and isinstance(resume, bool))
        report.seconds = time.perf_counter() - start
    return report


def _journal(report: Report, subject: Candidate, save: str | Path | bool, resume: str | Path | bool) -> Journal | None:
    if save is False and resume is False:
        return None
    named = {str(path) for path in (save, resume) if not isinstance(path, bool)}
    if len(named) > 1:
        raise ValueError(f"check: save={str(save)!r} and resume={str(resume)!r} name two files")
    if not subject.source:
        if not named and not resume:
            return None
        raise ValueError(f"check: results about {report.candidate} cannot be saved: no file of it can be found, so they could not be told from others'")
    about = {"operator": report.operator, "candidate": report.candidate, "source": subject.source, "version": __version__, **report.settings}
    try:
        if not named:
            forget_old()
        return Journal(named.pop() if named else usual_place(about), about, resume is not False)
    except OSError:
        if resume or not isinstance(save, bool):
            raise
        return None  # no cache folder to write to, and nobody asked for one


def _work(trial: Trial, parts: list[Callable[[], Iterator]], journal: Journal | None, fail_fast: bool, progress: Progress | None) -> None:
    """All jobs, of one precision after the other; what the journal says is done is not done again."""
    report, number, total = trial.report, 0, 0
    whole: list[Iterable] = [list(part()) for part in parts] if progress else [part() for part in parts]
    if progress:
        total = sum(len(part) for part in whole if isinstance(part, list))
    for part in whole:
        trial.subject.hope()
        for label, run in part:
            if progress:
                progress(number, total, label)
            name = _name(label, run)
            known = None if journal is None else journal.done(number, name)
            if known is None or not _recalled(trial, known):
                before = len(report.cases)
                run()
                if journal is not None and known is None:
                    teeth = {n: sorted(t) for n, t in trial.teeth.items()}
                    journal.add(number, name, results=[c.record() for c in report.cases[before:]], teeth=teeth)
            number += 1
            if fail_fast and any(not c.excusable for c in report.failures):
                return
            if trial.subject.hopeless:
                last = report.cases[-1]
                report.notes.append(f"{last.dtype}: given up after {last.id}: one process after the other was lost ({last.message})")
                break
    if progress:
        progress(total, total, "diagnosis" if report.failures else "done")


def _name(label: str, run: Any) -> str:
    """What a job is about, so that it is known again in another run."""
    arguments = [str(getattr(a, "id", getattr(a, "name", a))) for a in run.args[1:] if isinstance(a, str | int) or hasattr(a, "name")]
    return " ".join([label, *arguments])[:300]


def _recalled(trial: Trial, record: dict) -> bool:
    """Take over what was found in an earlier run; False where it is better found again."""
    results = [Result.of_record(r) for r in record["results"]]
    failing = sum(e.failed for e in trial.evidence)
    again = any(r.status in _AGAIN for r in results) and failing < KEPT // 2
    passing = sum(not e.failed for e in trial.evidence)
    if again or (passing < _PASSES_AGAIN and any(r.status == "PASS" and r.klass not in ("laws", "hygiene") for r in results)):
        return False
    trial.report.cases += results
    for name, seen in record["teeth"].items():
        trial.teeth.setdefault(name, set()).update(seen)
    return True


def _jobs(trial: Trial, to: Precision, gradients: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Everything to be done in one precision, each a label and a thunk."""
    yield from result_jobs(trial, to)
    yield from law_jobs(trial, to)
    if gradients:  # last: under fail_fast, a mistaken forward is not to be taken for a mistaken gradient
        yield from gradient_jobs(trial, to)


def _conclude(trial: Trial, fail_fast: bool) -> None:
    """After all cases: what does not apply, the smallest failure, the diagnosis, the gates' own test."""
    report = trial.report
    excuse(report)
    weigh(report)
    if report.failures:
        if not fail_fast:
            report.smallest = smallest(trial)
        report.diagnosis, report.variant = explain(trial.op, trial.evidence)
        if fail_fast:  # one failure cannot tell a mistake from another that shows there alike
            report.diagnosis = [f"as far as the first failure tells: {sentence}" for sentence in report.diagnosis]
        biased = [f for f in report.failures if f.status == "BIAS"]
        if biased and not report.diagnosis:
            report.diagnosis.append(f"{max(biased, key=lambda f: f.ratio).message} ({len(biased)} cases)")
        unexplained = any(f.status in _NO_VARIANT for f in report.failures)
        if report.variant and (unexplained or not breaks_the_same_laws(trial, report.variant.split(" and "))):
            report.variant = ""
    report.thin()
    for name, seen in trial.teeth.items():
        missing = {"zeros", "sign"} - seen
        if missing:
            report.reason = f"no tolerance used for {name} would reject {', '.join(sorted(missing))}"


def _validate(op, candidate, dtypes, level, domain, gradients, candidate_vjp, framework, timeout, memory) -> None:
    if not callable(candidate) and not isinstance(candidate, str):
        raise TypeError(f"check: candidate must be a function or 'file.py:name', got {type(candidate).__name__}")
    if isinstance(dtypes, str):
        raise TypeError(f"check: dtypes must be a list of names, got the string {dtypes!r}")
    if level not in LEVELS:
        raise ValueError(f"check: level must be one of {', '.join(LEVELS)}, got {level!r}")
    if not isinstance(domain, Domain):
        raise TypeError(f"check: domain must be a refimpl.Domain, got {type(domain).__name__}")
    if framework not in FRAMEWORKS:
        raise ValueError(f"check: framework must be one of {', '.join(FRAMEWORKS)}, got {framework!r}")
    if importlib.util.find_spec(framework) is None:
        raise ImportError(f"check: framework {framework!r} is not installed")
    if gradients and op.gradient is None:
        raise ValueError(f"check: {op.name} has no gradient")
    if gradients and candidate_vjp is None and framework in ("numpy", "cupy"):
        raise ValueError(f"check: gradients=True needs candidate_vjp for framework {framework!r}, which cannot differentiate by itself")
    for name, value in (("timeout", timeout), ("memory", memory)):
        if value is not None and not value > 0:
            raise ValueError(f"check: {name} must be positive, got {value!r}")
    domain.check_names(op.name, (k for k in default_sizes(op) if k != "batch"), (*parameters(op)[1], *parameters(op)[2]))
    for name in parameters(op)[1]:
        if not all(isinstance(v, bool) for v in domain.options.get(name, ())):
            raise TypeError(f"Domain: options[{name!r}] is of an optional array: [True] if it is always given, [False] if never, got {domain.options[name]!r}")


def _not_checked(op: Op, subject: Candidate, domain: Domain) -> list[str]:
    _, optional, options = parameters(op)
    names = [*optional, *(["state", "return_state"] if op.stateful else []), *options]
    return [n for n in names if not subject.support.takes(n) and n not in domain.options]


