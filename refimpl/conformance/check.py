"""`check`: is this implementation right, where is it wrong, and what is the mistake?

A candidate's output flows one way: cases -> truth and bounds -> the candidate's results -> gates -> diagnosis -> report.
"""

import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from refimpl.catalogue import operator
from refimpl.conformance.candidate import Candidate
from refimpl.conformance.cases import LEVELS, default_sizes, parameters
from refimpl.conformance.diagnosis import Evidence, explain
from refimpl.conformance.domain import Domain
from refimpl.conformance.frameworks import FRAMEWORKS
from refimpl.conformance.precision import Precision, precision
from refimpl.conformance.report import Report
from refimpl.conformance.smallest import smallest
from refimpl.conformance.traits import excuse
from refimpl.conformance.trial import Trial
from refimpl.conformance.trial_gradients import gradient_jobs
from refimpl.conformance.trial_laws import breaks_the_same_laws, law_jobs
from refimpl.conformance.trial_results import result_jobs, settle
from refimpl.op import Op

_EVIDENCE = 20  # failing cases that the diagnosis explains
_NO_VARIANT = ("MUTATED_INPUT", "NONDETERMINISTIC", "DTYPE", "ERROR", "CRASH", "TIMEOUT")  # never a matter of convention
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
    seed: int = 0,
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
        Precisions: float64, float32, float16, bfloat16, float8_e4m3fn, float8_e5m2. Complex arguments come in the complex
        type of that precision.
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
        Run the candidate in a process of its own, so that a crash or a hang costs one case.
    timeout : float
        Seconds that one call may take.
    seed : int
        Reproduces every input.
    progress : callable, optional
        ``progress(done, total, label)``.

    Returns
    -------
    Report

    Raises
    ------
    ValueError, TypeError
        If an argument is not one of these.
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
    _validate(op, candidate, dtypes, level, domain, gradients, candidate_vjp, framework, timeout)
    precisions = [precision(name) for name in dtypes]
    fixed = {name: values[0] for name, values in domain.options.items() if len(values) == 1}
    subject = Candidate(op, candidate, framework=framework, device=device, vjp=candidate_vjp, layout=layout, timeout=timeout, fixed=fixed, isolate=isolate)
    name = candidate if isinstance(candidate, str) else getattr(candidate, "__qualname__", type(candidate).__name__)
    settings = {
        "framework": framework, "device": device, "dtypes": [p.name for p in precisions], "gradients": gradients, "layout": layout, "domain": repr(domain),
        "level": level, "isolate": isolate, "seed": seed,
    }  # fmt: skip
    report = Report(op.name, str(name), settings=settings, not_checked=_not_checked(op, subject, domain))
    trial = Trial(op, subject, report, level, seed, domain)
    start = time.perf_counter()
    try:
        settle(trial, precisions[0])
        jobs: Iterable = (job for p in precisions for job in _jobs(trial, p, gradients))
        total = 0
        if progress:
            jobs = list(jobs)
            total = len(jobs)
        for done, (label, run) in enumerate(jobs):
            if progress:
                progress(done, total, label)
            run()
            if fail_fast and any(not c.excusable for c in report.failures):
                break
        if progress:
            progress(total, total, "diagnosis" if report.failures else "done")
        _conclude(trial, fail_fast)
    except KeyboardInterrupt:
        report.interrupted = True
    finally:
        subject.close()
        report.seconds = time.perf_counter() - start
    return report


def _jobs(trial: Trial, to: Precision, gradients: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Everything to be done in one precision, each a label and a thunk."""
    if gradients:
        yield from gradient_jobs(trial, to)
    yield from result_jobs(trial, to)
    yield from law_jobs(trial, to)


def _conclude(trial: Trial, fail_fast: bool) -> None:
    """After all cases: what does not apply, the smallest failure, the diagnosis, the gates' own test."""
    report = trial.report
    excuse(report)
    if report.failures:
        if not fail_fast:
            report.smallest = smallest(trial)
        report.diagnosis, report.variant = explain(trial.op, _spread(trial.evidence))
        unexplained = any(f.status in _NO_VARIANT for f in report.failures)
        if report.variant and (unexplained or not breaks_the_same_laws(trial, report.variant.split(" and "))):
            report.variant = ""
    for name, seen in trial.teeth.items():
        missing = {"zeros", "sign"} - seen
        if missing:
            report.reason = f"no tolerance used for {name} would reject {', '.join(sorted(missing))}"


def _spread(evidence: list[Evidence]) -> list[Evidence]:
    """Failures of every class, not only of the first; and some passes, which an explanation must not contradict."""
    bad = [e for e in evidence if e.failed]
    step = max(1, len(bad) // _EVIDENCE)
    small = [e for e in bad[::step] if sum(np.size(v) for v in e.call.values() if isinstance(v, np.ndarray)) < 300_000]
    return (small or bad[:3])[: _EVIDENCE + 4] + [e for e in evidence if not e.failed][:8]


def _validate(op, candidate, dtypes, level, domain, gradients, candidate_vjp, framework, timeout) -> None:
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
    if not timeout > 0:
        raise ValueError(f"check: timeout must be positive, got {timeout!r}")
    domain.check_names(op.name, (k for k in default_sizes(op) if k != "batch"), (*parameters(op)[1], *parameters(op)[2]))
    for name in parameters(op)[1]:
        if not all(isinstance(v, bool) for v in domain.options.get(name, ())):
            raise TypeError(f"Domain: options[{name!r}] is of an optional array: [True] if it is always given, [False] if never, got {domain.options[name]!r}")


def _not_checked(op: Op, subject: Candidate, domain: Domain) -> list[str]:
    _, optional, options = parameters(op)
    names = [*optional, *(["state", "return_state"] if op.stateful else []), *options]
    return [n for n in names if not subject.support.takes(n) and n not in domain.options]


