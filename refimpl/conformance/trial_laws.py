"""Trials of laws: relations between calls that hold whoever computes them."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from refimpl.conformance import gates, truth
from refimpl.conformance.cases import parameters
from refimpl.conformance.mutants import mutants
from refimpl.conformance.precision import Precision
from refimpl.conformance.report import Result
from refimpl.conformance.traits import empty
from refimpl.conformance.trial import Trial, trouble
from refimpl.op import Law


def law_jobs(trial: Trial, to: Precision) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every law of the operator on a plain call, a rich one, and a longer one."""
    combos = trial.combos(1)
    rich = max(combos, key=lambda c: sum(bool(v) for v in c.values() if not callable(v)))
    plans = [(13, combos[0], "plain"), (13, rich, "rich")] + ([(70, rich, "longer")] if trial.level != "quick" else [])
    takes = trial.subject.support.takes
    for law in trial.op.laws:
        if to.coarse and law.name == "linear":  # a sum of inputs is itself rounded
            continue
        if ("state" in law.arguments and not takes("state")) or (law.name == "hand_off" and not takes("return_state")):
            continue
        for T, combo, label in plans:
            yield f"{to.name} laws", functools.partial(_law, trial, law, to, T, combo, label)


def breaks_the_same_laws(trial: Trial, variants: list[str]) -> bool:
    """Whether the laws that the candidate breaks are those that these variants break, so that they explain them too."""
    functions = [m.function for m in mutants(trial.op.name) if m.name in variants]

    def breaks(function: Callable, broken: tuple) -> bool:
        result = _held(trial, function, *broken)
        return result is not None and result.status == "PROPERTY"

    return all(any(breaks(function, broken) for function in functions) for broken in trial.broken_laws)


class _NoAnswer(Exception):
    """A candidate's call inside a law had no result: (status, message)."""


def _law(trial: Trial, law: Law, to: Precision, T: int, combo: dict, label: str) -> None:
    def f(**call):
        defaults = parameters(trial.op)[2] | {"return_state": False}
        call = {n: v for n, v in call.items() if n not in defaults or v is not defaults[n]}  # a law may spell them out
        outside = _outside(trial, call)
        if outside:  # a law may choose options of its own
            raise _NoAnswer("NOT_APPLICABLE", f"the law speaks of {outside}, which the candidate does not take")
        answer = trial.subject.call(call)
        failed = trouble(answer)
        if failed is not None and failed[0] == "ERROR":
            if none := empty(trial.op, call):  # judged by the cases that have the trait
                raise _NoAnswer("NOT_APPLICABLE", f"it does not take {', '.join(none)}: {failed[1]}")
            if any(isinstance(v, np.ndarray) and v.dtype.kind in "fc" and np.isnan(v).any() for v in call.values()):
                raise _NoAnswer("NOT_APPLICABLE", f"it does not take NaN: {failed[1]}")
        if failed is not None:
            raise _NoAnswer(*failed)
        return answer.result

    result = _held(trial, f, law, to, T, combo, label)
    if result is not None:
        trial.report.cases.append(result)
        if result.status == "PROPERTY":
            trial.broken_laws.append((law, to, T, combo, label))


def _held(trial: Trial, f: Callable, law: Law, to: Precision, T: int, combo: dict, label: str) -> Result | None:
    """Whether a law holds for a function; None where it says nothing."""
    if set(trial.op.lengths) & set(trial.domain.sizes):  # laws cut and extend sequences: only where every length is supported
        return None
    rng = np.random.default_rng([trial.seed, T, *law.name.encode()])
    drawn = trial.draw(rng, dict.fromkeys(trial.op.lengths, T), combo, to)
    if drawn is None:
        return None

    def bound(**call):
        limits = truth.tolerance(trial.op, call, to, truth.truth(trial.op, call, to))
        parts: list[Any] = [v for n, v in limits.items() if not n.startswith("state")]
        if call.get("return_state"):
            parts.append(trial.state_of([v for n, v in limits.items() if n.startswith("state")]))
        return tuple(parts) if len(parts) > 1 else parts[0]

    result = Result(f"laws[{law.name}, {label}]", "laws", to.name, "NOT_APPLICABLE", "the law says nothing of this call")
    try:
        with np.errstate(all="ignore"):
            for what, got, want, limit in law.holds(f, drawn.call, bound, rng):
                if result.status == "NOT_APPLICABLE":
                    result.status, result.message = "PASS", ""
                message, ratio = _difference(np.asarray(got), np.asarray(want), limit)
                if message:
                    result.status, result.message, result.ratio = "PROPERTY", f"the law '{law.name}' fails: {what} {message}", ratio
                    break
    except _NoAnswer as no:
        status, result.message = no.args
        result.status = result.status if status == "NOT_APPLICABLE" else status
    except Exception as error:  # results of a wrong number or shape, of which a law makes what it may
        result.status, result.message = "PROPERTY", f"the law '{law.name}' cannot be tried: {type(error).__name__}: {error}"
    return result


def _difference(got: np.ndarray, want: np.ndarray, limit) -> tuple[str, float]:
    """What is wrong between two arrays that a law says are equal; empty where nothing is."""
    if got.shape != want.shape:
        return f"has shape {got.shape}, expected {want.shape}", np.inf
    wide = np.result_type(got.dtype, np.float64) if got.dtype.kind in "fc" else np.float64
    got, want = got.astype(wide), want.astype(got.dtype).astype(wide)
    odd = np.isfinite(got) != np.isfinite(want)
    if odd.any():
        value, expected = got[odd][0], want[odd][0]
        return f"is {value:.6g}, expected {expected:.6g}", np.inf
    ratio = gates.error_ratio(got, want, np.broadcast_to(limit, got.shape))
    worst = float(np.max(ratio, initial=0.0))
    return (f"differs by {worst:.3g} times the bound", worst) if worst > 1 else ("", worst)


def _outside(trial: Trial, call: dict) -> str:
    """The first option or optional array of a call, as text, that the candidate does not support; empty if it supports all."""
    _, optional, options = parameters(trial.op)
    takes = trial.subject.support.takes
    for name in [*optional, "state", "return_state"]:
        if call.get(name) is not None and call[name] is not False and not takes(name):
            return name
    for name, default in options.items():
        value = call.get(name, default)
        allowed = trial.domain.options.get(name)
        if allowed is not None and not any(callable(a) or a is value or (type(a) is type(value) and a == value) for a in allowed):
            return f"{name}={value!r}"
        if allowed is None and name in call and value is not default and value != default and not takes(name):
            return f"{name}={value!r}"
    return ""
