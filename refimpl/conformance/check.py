"""`check`: is this implementation right, where is it wrong, and what is the mistake?

A candidate's output flows one way: cases -> truth and bounds -> the candidate's results -> gates -> diagnosis -> report.
"""

import copy
import functools
import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from refimpl.catalogue import operator
from refimpl.conformance import gates, truth
from refimpl.conformance.candidate import Candidate
from refimpl.conformance.cases import LEVELS, Case, cases, choose, default_sizes, factors, pairwise, parameters
from refimpl.conformance.diagnosis import Evidence, explain
from refimpl.conformance.domain import Domain
from refimpl.conformance.ensemble import ensemble
from refimpl.conformance.frameworks import FRAMEWORKS
from refimpl.conformance.gates import Finding
from refimpl.conformance.invoke import Answer
from refimpl.conformance.mutants import mutants
from refimpl.conformance.pattern import describe
from refimpl.conformance.precision import Precision, precision, rounded
from refimpl.conformance.report import Report, Result
from refimpl.conformance.snippet import snippet
from refimpl.conformance.traits import COMPLEX, excuse, real_parts, traits
from refimpl.op import Op

_EVIDENCE = 20
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
    domain = copy.copy(domain) if domain is not None else Domain()
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
    session = _Session(op, subject, report, level, seed, domain, gradients, fail_fast)
    start = time.perf_counter()
    try:
        session.settle_batch(precisions[0])
        jobs: Iterable = (job for p in precisions for job in session.jobs(p))
        total = 0
        if progress:
            jobs = list(jobs)
            total = len(jobs)
        for done, (label, run) in enumerate(jobs):
            if progress:
                progress(done, total, label)
            run()
            if fail_fast and report.failures:
                break
        if progress:
            progress(total, total, "diagnosis" if report.failures else "done")
        session.conclude()
    except KeyboardInterrupt:
        report.interrupted = True
    finally:
        subject.close()
        report.seconds = time.perf_counter() - start
    return report


class _Session:
    """One check under way."""

    def __init__(self, op: Op, subject: Candidate, report: Report, level: str, seed: int, domain: Domain, gradients: bool, fail_fast: bool):
        self.op, self.subject, self.report = op, subject, report
        self.level, self.seed, self.domain, self.gradients, self.fail_fast = level, seed, domain, gradients, fail_fast
        self.evidence: list[Evidence] = []
        self.failed_cases: list[tuple[Case, Precision, Finding]] = []
        self.broken_laws: list[tuple] = []
        self.teeth: dict[str, set[str]] = {}
        self.required = parameters(op)[0]

    # -- what is to be done ------------------------------------------------------------------------------------------

    def jobs(self, to: Precision) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Everything to be done in one precision, each a label and a thunk."""
        for case in cases(self.op, level=self.level, seed=self.seed, support=self.subject.support, domain=self.domain):
            yield f"{to.name} {case.klass}", functools.partial(self._results, case, to)
        yield from self._hygiene_jobs(to)
        yield from self._law_jobs(to)
        if self.gradients and self.op.gradient is not None:
            yield from self._gradient_jobs(to)

    def conclude(self) -> None:
        """After all cases: the smallest failure, the diagnosis, the gates' own test."""
        report = self.report
        excuse(report)
        if report.failures:
            if not self.fail_fast:
                self._shrink()
            report.diagnosis, report.variant = explain(self.op, self._spread_evidence())
            if any(f.status in ("MUTATED_INPUT", "NONDETERMINISTIC", "DTYPE", "ERROR", "CRASH", "TIMEOUT") for f in report.failures):
                report.variant = ""
            if report.variant and not self._breaks_the_same_laws(report.variant):
                report.variant = ""
        for name, seen in self.teeth.items():
            missing = {"zeros", "sign"} - seen
            if missing:
                report.reason = f"no tolerance used for {name} would reject {', '.join(sorted(missing))}"

    # -- results -----------------------------------------------------------------------------------------------------

    def _results(self, case: Case, to: Precision) -> Result | None:
        call = _repeated(case.call) if case.view == "repeated" else case.call
        call = rounded(self.op.contract, call, to)
        if call is None:
            return None
        try:
            right = truth.truth(self.op, call, to)
        except ValueError:
            return None  # the operator itself refuses this combination
        start = time.perf_counter()
        answer = self.subject.call(call, view=case.view, poison=[v.nbytes for v in right.values()])
        seconds = time.perf_counter() - start
        result = self._judge(case, call, to, right, answer)
        result.seconds, result.traits = seconds, traits(self.op, call)
        if result.status not in ("PASS", "NOT_APPLICABLE"):
            result.excusable = self._excusable(result, call, to, right, answer)
        self.report.cases.append(result)
        return result

    def _excusable(self, result: Result, call: dict, to: Precision, right: dict, answer: Answer) -> bool:
        """The candidate raised; or has no notion of complex numbers: drops imaginary parts, or returns them."""
        if result.status == "ERROR":
            return True
        if COMPLEX not in result.traits or answer.status != "OK":
            return False
        got = answer.result[0] if isinstance(answer.result, tuple) and answer.result else answer.result
        first = next(iter(right.values()))
        if not isinstance(got, np.ndarray):
            return False
        if got.dtype.kind == "c" and first.dtype.kind != "c":
            return True
        try:
            real = next(iter(truth.truth(self.op, real_parts(call), to).values()))
        except (ValueError, TypeError):
            return False
        return got.dtype.kind != "c" and got.shape == real.shape and bool(np.allclose(got.astype(np.float64), real.real.astype(np.float64), rtol=64 * to.unit, atol=1e-6))

    def settle_batch(self, to: Precision) -> None:
        """Find how many batch axes the candidate takes, where it does not take none: a layout or a trial says."""
        if self.subject.layout is not None and "b" in self.subject.layout.order:
            self.domain.batch_rank = 1
        if self.domain.batch is not None or self.domain.batch_rank is not None or "batch" not in default_sizes(self.op):
            return
        for rank in (0, 1, 2):
            sizes = self.domain.fit({**default_sizes(self.op), "batch": (2,) * rank})
            if sizes is None:
                return
            chosen = factors(self.op, self.subject.support, self.domain)
            combo = {name: values[0] for name, values in chosen.items()}
            try:
                call = rounded(self.op.contract, choose(self.op, self.op.sample(np.random.default_rng(0), **sizes), sizes, combo), to)
                if call is None:
                    return
                truth.truth(self.op, call, to)
            except ValueError:
                return
            if self.subject.call(call).status != "ERROR":
                if rank:
                    self.domain.batch_rank = rank
                    self.report.not_checked.append(f"other than {rank} batch {'axis' if rank == 1 else 'axes'} (it raises)")
                return

    def _judge(self, case: Case, call: dict, to: Precision, right: dict, answer: Answer) -> Result:
        trouble = _trouble(answer)
        if trouble is not None:
            return Result(case.id, case.klass, to.name, *trouble)
        try:
            got = self.op.contract.named(answer.result, call.get("return_state", False))
        except (ValueError, TypeError, AttributeError, IndexError):
            got = {}
        limits = truth.tolerance(self.op, call, to, right)
        finding = self._gate(case, call, to, got, right, limits)
        if len(self.evidence) < 4 * _EVIDENCE and (finding is not None or len([e for e in self.evidence if not e.failed]) < 8) and set(got) == set(right):
            self.evidence.append(Evidence(call, to, got, right, limits, failed=finding is not None))
        if finding is None:
            for name in right:
                if right[name].size > 8 and right[name].dtype.kind in "fc":  # integers are compared exactly
                    self.teeth.setdefault(name, set()).update(gates.teeth(right[name], limits[name]))
            return Result(case.id, case.klass, to.name, "PASS")
        self.failed_cases.append((case, to, finding))
        return self._failure(case, to, finding, call)

    def _gate(self, case: Case, call: dict, to: Precision, got: dict, right: dict, limits: dict) -> Finding | None:
        """The first gate that does not let a result through."""
        if set(got) != set(right):
            return Finding("SHAPE", f"returned {_count(got)}, expected {', '.join(right)}")
        first = next(iter(right))
        compute, out = self.op.contract.precision(**call)
        for name in right:
            state = name.startswith("state")
            wanted = gates.result_dtype(right[name], compute, out, state)
            finding = gates.exact(name, got[name], right[name], to, wanted, state, secondary=name != first)
            if finding is not None:
                return finding
        findings = [f for name in right if (f := gates.bounded(name, got[name], right[name], limits[name])) is not None]
        if findings:
            return max(findings, key=lambda f: f.ratio)
        if to.half and case.klass in ("options", "long", "sizes") and right[first].size >= 256:
            peers = ensemble(self.op, call, to)
            if peers:
                y, t = got[first], right[first]
                floor = 0.5 * to.unit * np.abs(t).astype(np.float64) + truth.smallest(to)
                return gates.like_peers(first, y, t, peers, floor) or gates.unbiased(first, y, t, peers, to.unit)
        return None

    def _failure(self, case: Case, to: Precision, finding: Finding, call: dict) -> Result:
        pattern = ""
        if finding.bad is not None:
            axes = tuple(a.rstrip("?") for r in (*self.op.contract.results, *self.op.contract.states) if r.name == finding.output for a in r.shapes[0].axes)
            pattern = describe(finding.bad, axes)
        recall = f"{self.op.name!r}, {case.id!r}, dtype={to.name!r}, level={self.level!r}, seed={self.seed}"
        if self.subject.support.keywords is not None:
            recall += f", keywords={sorted(self.subject.support.keywords & _all_keywords(self.op))!r}"
        name = self.report.candidate.rpartition(":")[2].rpartition(".")[2] or "candidate"
        text = snippet(self.op, name, call, self.required, to.name, recall, finding.output or "the result")
        return Result(
            case.id, case.klass, to.name, finding.status, finding.message, finding.output, finding.index, finding.got, finding.expected, finding.bound,
            finding.ratio, pattern, text,
        )  # fmt: skip

    # -- hygiene: the same call again, other values in the same memory -------------------------------------------------

    def _hygiene_jobs(self, to: Precision):
        chosen = factors(self.op, self.subject.support, self.domain)
        combos = pairwise(chosen, np.random.default_rng(self.seed)) if chosen else [{}]
        sizes = {letter: n for letter, n in zip(self.op.lengths, (21, 35, 27), strict=False)}
        for combo in dict.fromkeys([0, len(combos) - 1]):
            yield f"{to.name} hygiene", lambda combo=combos[combo], i=combo: self._hygiene(to, sizes, combo, i)

    def _hygiene(self, to: Precision, sizes: dict, combo: dict, number: int) -> None:
        sizes = self.domain.fit({**default_sizes(self.op), **sizes})
        if sizes is None:
            return
        rng = np.random.default_rng([self.seed, number, 99])
        try:
            a = rounded(self.op.contract, choose(self.op, self.op.sample(rng, **sizes), sizes, combo), to)
            b = rounded(self.op.contract, choose(self.op, self.op.sample(rng, **sizes), sizes, combo), to)
            if a is None or b is None:
                return
            right = [truth.truth(self.op, call, to) for call in (a, b)]
        except (ValueError, TypeError):
            return
        case = Case(self.op.name, "hygiene", f"A, A, B, A in the same memory, {number}", a, sizes)
        answer = self.subject.call(a, repeat=2, second=b, poison=[v.nbytes for v in right[0].values()])
        trouble = _trouble(answer)
        if trouble is not None:
            self.report.cases.append(Result(case.id, case.klass, to.name, *trouble))
            return
        results = [answer.result, *answer.again]
        self.report.cases.append(self._compare_runs(case, to, results, (a, b), right))

    def _compare_runs(self, case: Case, to: Precision, results: list, calls: tuple, right: list) -> Result:
        bits = [_bytes(r) for r in results]
        immutable = len(results) == 4 and bits[2] == bits[0] and getattr(self.subject._invoke, "arrays", None) is not None and not self.subject._invoke.arrays.mutable
        if bits[0] != bits[1] or (len(bits) == 4 and bits[0] != bits[3]):
            return Result(case.id, case.klass, to.name, "NONDETERMINISTIC", "the same inputs give other results when called again")
        if len(results) == 4 and not immutable:
            try:
                got = self.op.contract.named(results[2], calls[1].get("return_state", False))
            except (ValueError, TypeError):
                got = {}
            limits = truth.tolerance(self.op, calls[1], to, right[1])
            finding = self._gate(case, calls[1], to, got, right[1], limits)
            if finding is not None and bits[2] == bits[0]:
                return Result(case.id, case.klass, to.name, "NONDETERMINISTIC", "other values in the same memory give the first call's result: an answer is cached")
            if finding is not None:
                return self._failure(case, to, finding, calls[1])
        return Result(case.id, case.klass, to.name, "PASS")

    # -- laws --------------------------------------------------------------------------------------------------------

    def _law_jobs(self, to: Precision):
        chosen = factors(self.op, self.subject.support, self.domain)
        combos = pairwise(chosen, np.random.default_rng(self.seed + 1)) if chosen else [{}]
        rich = max(combos, key=lambda c: sum(bool(v) for v in c.values() if not callable(v)))
        for law in self.op.laws:
            if to.half and law.name == "linear":  # a sum of inputs is itself rounded
                continue
            if not all(self.subject.support.takes(n) for n in law.arguments if n == "state") or (law.name == "hand_off" and not self.subject.support.takes("return_state")):
                continue
            for T, combo, label in ((13, combos[0], "plain"), (13, rich, "rich"), *(((70, rich, "longer"),) if self.level != "quick" else ())):
                yield f"{to.name} laws", lambda law=law, T=T, combo=combo, label=label: self._law(law, to, T, combo, label)

    def _law(self, law, to: Precision, T: int, combo: dict, label: str) -> None:
        def f(**call):
            outside = self._outside(call)
            if outside:  # a law may choose options of its own
                raise _NoAnswer("NOT_APPLICABLE", f"the law speaks of {outside}, which the candidate does not take")
            answer = self.subject.call(call)
            trouble = _trouble(answer)
            if trouble is not None:
                raise _NoAnswer(*trouble)
            return answer.result

        result = self._hold(f, law, to, T, combo, label)
        if result is not None:
            self.report.cases.append(result)
            if result.status == "PROPERTY":
                self.broken_laws.append((law, to, T, combo, label))

    def _breaks_the_same_laws(self, variant: str) -> bool:
        """Whether the laws that the candidate breaks are those that a variant breaks, so that it explains them too."""
        function = next(m.function for m in mutants(self.op.name) if m.name == variant)
        results = [self._hold(function, *broken) for broken in self.broken_laws]
        return all(r is not None and r.status == "PROPERTY" for r in results)

    def _hold(self, f: Callable, law, to: Precision, T: int, combo: dict, label: str) -> Result | None:
        """Whether a law holds for a function; None where it says nothing."""
        sizes = self.domain.fit({**default_sizes(self.op), **dict.fromkeys(self.op.lengths, T)})
        if sizes is None or set(self.op.lengths) & set(self.domain.sizes):  # laws cut and extend sequences: only where every length is supported
            return None
        rng = np.random.default_rng([self.seed, T, *law.name.encode()])
        case = Case(self.op.name, "laws", f"{law.name}, {label}", {}, sizes)
        try:
            call = rounded(self.op.contract, choose(self.op, self.op.sample(rng, **sizes), sizes, combo), to)
            if call is None:
                return None
            truth.truth(self.op, call, to)
        except ValueError:
            return None

        def bound(**call):
            right = truth.truth(self.op, call, to)
            limits = truth.tolerance(self.op, call, to, right)
            parts: list[Any] = [v for n, v in limits.items() if not n.startswith("state")]
            states = [v for n, v in limits.items() if n.startswith("state")]
            if call.get("return_state"):
                parts.append(tuple(states) if len(states) > 1 or "." in self.op.contract.states[0].name else states[0])
            return tuple(parts) if len(parts) > 1 else parts[0]

        result = Result(case.id, case.klass, to.name, "PASS")
        try:
            with np.errstate(all="ignore"):
                for what, got, want, limit in law.holds(f, call, bound, rng):
                    got, want = np.asarray(got), np.asarray(want).astype(np.asarray(got).dtype)
                    wide = np.result_type(got.dtype, np.float64) if got.dtype.kind in "fc" else np.float64
                    if np.shape(got) != np.shape(want):
                        result = Result(case.id, case.klass, to.name, "PROPERTY", f"{law.name}: {what} has shape {got.shape}, expected {want.shape}")
                        break
                    ratio = gates.error_ratio(got.astype(wide), want.astype(wide), np.broadcast_to(limit, got.shape))
                    odd = np.isfinite(got.astype(wide)) != np.isfinite(want.astype(wide))
                    if np.any(ratio > 1) or np.any(odd):
                        worst = float(np.max(np.where(odd, np.inf, ratio)))
                        result = Result(case.id, case.klass, to.name, "PROPERTY", f"the law '{law.name}' fails: {what} differs by {worst:.3g} times the bound", ratio=worst)
                        break
        except _NoAnswer as trouble:
            result = Result(case.id, case.klass, to.name, *trouble.args)
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            result = Result(case.id, case.klass, to.name, "PROPERTY", f"the law '{law.name}' cannot be tried: {type(error).__name__}: {error}")
        return result

    def _outside(self, call: dict) -> str:
        """The first option or optional array of a call, as text, that the candidate does not support; empty if it supports all."""
        for name in parameters(self.op)[1]:
            if call.get(name) is not None and not self.subject.support.takes(name):
                return name
        for name, default in parameters(self.op)[2].items():
            value = call.get(name, default)
            allowed = self.domain.options.get(name)
            if allowed is not None and not any(callable(a) or a is value or (type(a) is type(value) and a == value) for a in allowed):
                return f"{name}={value!r}"
            if allowed is None and name in call and value is not default and value != default and not self.subject.support.takes(name):
                return f"{name}={value!r}"
        return ""

    # -- gradients ---------------------------------------------------------------------------------------------------

    def _gradient_jobs(self, to: Precision):
        rng = np.random.default_rng([self.seed, 5])
        chosen = factors(self.op, self.subject.support, self.domain)
        combos = pairwise(chosen, rng) if chosen else [{}]
        full = combos[0] | ({"return_state": True} if "return_state" in chosen else {})
        lengths = (1, 2, 5, 17, 37, 66) if self.level == "quick" else (0, 1, 2, 3, 4, 5, 9, 17, 33, 37, 64, 65, 70, 130)
        plans: list[tuple[dict, dict, str, str]] = []
        for i, T in enumerate(lengths if self.op.lengths else (0,)):
            sizes = dict.fromkeys(self.op.lengths, T)
            plans += [(sizes, full, "", "random"), (sizes, combos[i % len(combos)], "", "random")]
        middle = {letter: n for letter, n in zip(self.op.lengths, (13, 19, 17), strict=False)}
        plans += [(middle, combo, "", "random") for combo in combos]
        plans += [({**middle, **sizes}, combos[i % len(combos)] | full, "", "random") for i, sizes in enumerate(self.op.sizes)]
        plans += [(middle, full, "", kind) for kind in ("needle", "zero but state", "strided")]
        if self.level != "quick":
            plans += [(middle, full, hard, "random") for hard in self.op.hard]
        for number, (sizes, combo, hard, kind) in enumerate(plans):
            yield f"{to.name} gradients", lambda number=number, sizes=sizes, combo=combo, hard=hard, kind=kind: self._gradient(to, number, sizes, combo, hard, kind)

    def _gradient(self, to: Precision, number: int, sizes: dict, combo: dict, hard: str, kind: str) -> None:
        sizes = self.domain.fit({**default_sizes(self.op), **sizes})
        if sizes is None:
            return
        rng = np.random.default_rng([self.seed, number, 17])
        from refimpl.conformance.cases import _described, _hard

        try:
            if hard:
                call = _hard(self.op, hard, rng, sizes, combo, self.subject.support, self.domain)
            else:
                call = choose(self.op, self.op.sample(rng, **sizes), sizes, combo)
            call = None if call is None else rounded(self.op.contract, call, to)
            if call is None:
                return
            shape = truth.truth(self.op, call, to)
        except ValueError:
            return
        case = Case(self.op.name, "gradients", ", ".join(filter(None, [hard, kind if kind != "random" else "", _described(self.op, sizes, call), f"#{number}"])), call, sizes)
        marks = traits(self.op, call)
        dy, dstate = _cotangents(self.op, shape, rng, kind, call)
        right = truth.gradient_truth(self.op, call, dy, dstate, to)
        flat_right = _flat_gradient(right)
        if not flat_right or not all(np.all(np.isfinite(v)) for v in flat_right.values()):
            return
        start = time.perf_counter()
        answer = self.subject.gradient(call, dy, dstate, view="strided" if kind == "strided" else "contiguous")
        seconds = time.perf_counter() - start
        trouble = _trouble(answer)
        if trouble is not None:
            status, excusable = ("GRADIENT", True) if trouble[0] == "ERROR" else (trouble[0], False)
            self.report.cases.append(Result(case.id, case.klass, to.name, status, trouble[1], seconds=seconds, traits=marks, excusable=excusable))
            return
        got = _flat_gradient(answer.result) if isinstance(answer.result, dict) else {}
        limits = _flat_gradient(truth.gradient_tolerance(self.op, call, dy, dstate, to, right, shape))
        finding = self._gate_gradient(got, flat_right, limits, call, to)
        if len([e for e in self.evidence if e.cotangents is not None]) < 2 * _EVIDENCE and set(flat_right) <= set(got):
            self.evidence.append(Evidence(call, to, {n: got[n] for n in flat_right}, flat_right, limits, (dy, dstate), failed=finding is not None))
        if finding is None:
            result = Result(case.id, case.klass, to.name, "PASS", seconds=seconds)
        else:
            result = self._failure(case, to, finding, call)
            result.snippet, result.pattern = "", describe(finding.bad, ()) if finding.bad is not None else ""
            result.excusable = COMPLEX in marks
        result.traits = marks
        self.report.cases.append(result)

    def _gate_gradient(self, got: dict, right: dict, limits: dict, call: dict, to: Precision) -> Finding | None:
        missing = [n for n in right if not isinstance(got.get(n), np.ndarray)]
        if missing:
            return Finding("GRADIENT", f"no gradient of {', '.join(missing)}")
        arguments = _flat_gradient(call)
        findings = []
        for name, exact in right.items():
            g = got[name]
            if g.shape != exact.shape:
                return Finding("GRADIENT", f"the gradient of {name} has shape {g.shape}, expected {exact.shape}", name)
            if g.dtype != arguments[name].dtype and g.dtype.kind != "O":
                return Finding("GRADIENT", f"the gradient of {name} has dtype {g.dtype}, expected {arguments[name].dtype}", name)
            with np.errstate(all="ignore"):
                wild = ~np.isfinite(g.astype(exact.dtype)) & (abs(exact) < 0.9 * to.largest)
            if np.any(wild):
                index = tuple(int(i) for i in np.argwhere(wild)[0])
                return Finding("GRADIENT", f"the gradient of {name} is not finite", name, index, g[index], exact[index], 0.0, np.inf, wild)
            finding = gates.bounded(f"the gradient of {name}", g, exact, np.broadcast_to(limits[name], exact.shape))
            if finding is not None:
                findings.append(Finding("GRADIENT", *[getattr(finding, k) for k in ("message", "output", "index", "got", "expected", "bound", "ratio", "bad")]))
        return max(findings, key=lambda f: f.ratio, default=None)

    # -- afterwards --------------------------------------------------------------------------------------------------

    def _spread_evidence(self) -> list[Evidence]:
        """Failures of every class, not only of the first; and some passes, which an explanation must not contradict."""
        bad = [e for e in self.evidence if e.failed]
        step = max(1, len(bad) // _EVIDENCE)
        small = [e for e in bad[::step] if sum(np.size(v) for v in e.call.values() if isinstance(v, np.ndarray)) < 300_000]
        return (small or bad[:3])[: _EVIDENCE + 4] + [e for e in self.evidence if not e.failed][:8]

    def _shrink(self) -> None:
        """Draw the first numerical failure again at smaller sizes, and keep the smallest that still fails."""
        failed = {c.id for c in self.report.failures}
        numerical = [f for f in self.failed_cases if f[2].status in ("NUMERIC", "NONFINITE", "SHAPE") and f[0].recipe and f[0].id in failed]
        if not numerical:
            return
        case, to, finding = min(numerical, key=lambda f: (sum(np.size(v) for v in f[0].call.values() if isinstance(v, np.ndarray)), -f[2].ratio))
        best = (case, finding)
        tries = [{**case.sizes, "batch": ()}, {**case.sizes, **{x: 1 for x in case.sizes if x not in (*self.op.lengths, "batch")}, "batch": ()}]
        for T in (1, 2, 3, 4, 5, 6, 8, 12, 17, 33, 65):
            tries.append({**tries[0], **{x: min(T, case.sizes[x]) for x in self.op.lengths}})
        for sizes in sorted(tries, key=lambda s: np.prod([v for k, v in s.items() if k != "batch"])):
            smaller = self._again(case, to, sizes)
            if smaller is not None:
                best = smaller
                break
        case, finding = best
        call = rounded(self.op.contract, case.call, to) or case.call
        self.report.smallest = self._failure(case, to, finding, call)

    def _again(self, case: Case, to: Precision, sizes: dict) -> tuple[Case, Finding] | None:
        sizes = self.domain.fit(sizes)
        if sizes is None:
            return None
        from refimpl.conformance.cases import _hard

        recipe = case.recipe
        try:
            for attempt in range(3):
                rng = np.random.default_rng([self.seed, attempt, 3])
                if recipe["hard"]:
                    call = _hard(self.op, recipe["hard"], rng, sizes, recipe["combo"], self.subject.support, self.domain)
                else:
                    call = choose(self.op, self.op.sample(rng, **sizes), sizes, recipe["combo"])
                smaller = Case(case.operator, case.klass, f"{case.name}, made smaller", call or {}, sizes, case.view, recipe)
                rounded_call = None if call is None else rounded(self.op.contract, call, to)
                if rounded_call is None:
                    return None
                right = truth.truth(self.op, rounded_call, to)
                answer = self.subject.call(rounded_call, view=case.view)
                if _trouble(answer) is not None:
                    return None
                got = self.op.contract.named(answer.result, rounded_call.get("return_state", False))
                finding = self._gate(smaller, rounded_call, to, got, right, truth.tolerance(self.op, rounded_call, to, right))
                if finding is not None:
                    return smaller, finding
        except (ValueError, TypeError, IndexError, ZeroDivisionError, KeyError):
            return None
        return None


class _NoAnswer(Exception):
    """A candidate's call inside a law had no result: (status, message)."""


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


def _all_keywords(op: Op) -> set[str]:
    _, optional, options = parameters(op)
    return {*optional, *options, "state", "return_state"}


def _trouble(answer: Answer) -> tuple[str, str] | None:
    """Status and message where there is nothing to judge, or nothing more."""
    if answer.status == "ERROR" and "unexpected keyword argument" in answer.message:
        return "NOT_APPLICABLE", answer.message
    if answer.status != "OK":
        return answer.status, answer.message
    if answer.mutated:
        return "MUTATED_INPUT", f"wrote to its input {', '.join(answer.mutated)}"
    if answer.stale:
        return "NONDETERMINISTIC", "an earlier result changed when the function was called again: results share memory"
    return None


def _count(got: dict) -> str:
    return ", ".join(got) if got else "another number of results"


def _bytes(result) -> bytes:
    if isinstance(result, tuple):
        return b"".join(map(_bytes, result))
    return np.ascontiguousarray(result).tobytes() if isinstance(result, np.ndarray) else b""


def _repeated(call: dict) -> dict:
    """All batch entries alike, so that a stride of 0 can stand for them."""
    return {n: np.repeat(v[:1], v.shape[0], axis=0) if isinstance(v, np.ndarray) and v.ndim > 1 and v.shape[0] == 2 else v for n, v in call.items()}


def _flat_gradient(gradients: dict) -> dict[str, np.ndarray]:
    flat: dict[str, np.ndarray] = {}
    for name, g in gradients.items():
        if isinstance(g, tuple):
            flat |= {f"{name}[{i}]": v for i, v in enumerate(g)}
        else:
            flat[name] = g
    return flat


def _cotangents(op: Op, right: dict, rng, kind: str, call: dict):
    """Random cotangents of the results, and of the final state where it is returned."""
    compute, out = op.contract.precision(**call)

    def draw(name: str, like: np.ndarray) -> np.ndarray:
        v = rng.standard_normal(like.shape)
        if like.dtype.kind == "c":
            v = v + 1j * rng.standard_normal(like.shape)
        if kind == "needle" and not name.startswith("state"):
            v = v * (np.arange(v.size).reshape(v.shape) == v.size // 2)
        if kind == "zero but state" and not name.startswith("state"):
            v = v * 0
        return v.astype(gates.result_dtype(like, compute, out, name.startswith("state")))

    parts = [draw(n, v) for n, v in right.items() if not n.startswith("state") and v.dtype.kind in "fc"]
    states = [draw(n, v) for n, v in right.items() if n.startswith("state")]
    dy = tuple(parts) if len(parts) > 1 else parts[0]
    if not states:
        return dy, None
    if len(states) > 1 or "." in op.contract.states[0].name:
        return dy, _state_type(op, states)
    return dy, states[0]


def _state_type(op: Op, parts: list):
    from collections import namedtuple

    return namedtuple("State", [s.name.partition(".")[2] or s.name for s in op.contract.states])(*parts)
