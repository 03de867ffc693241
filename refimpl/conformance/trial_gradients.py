"""Trials of gradients: the candidate's against the hand-derived one, for cotangents of results and of final states."""

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from refimpl.conformance import gates, truth
from refimpl.conformance.cases import (
    VIEWS,
    Case,
    Support,
    affordable,
    at_random,
    default_sizes,
    described,
    few,
    parameters,
    wide,
    without_heads,
)
from refimpl.conformance.domain import Domain
from refimpl.conformance.gates import Finding
from refimpl.conformance.invoke import ALONE, BETWEEN, TWICE
from refimpl.conformance.likeness import Evidence
from refimpl.conformance.precision import Precision, precision, rounded
from refimpl.conformance.report import Report, Result
from refimpl.conformance.shapes import reshaped, shared
from refimpl.conformance.traits import COMPLEX, OF_ONE_ALONE, OF_ONE_SIDE, traits
from refimpl.conformance.trial import GRADIENT_OF, Drawn, Trial, trouble
from refimpl.op import Op

_LENGTHS = {
    "quick": (1, 2, 5, 17, 37, 66),
    "standard": (0, 1, 2, 3, 4, 5, 7, 9, 16, 17, 31, 33, 37, 63, 64, 65, 70, 127, 128, 130, 192, 257, 300),
}
_CALLS = 20  # of the definition, that the truth about a gradient costs


def gradient_jobs(trial: Trial, to: Precision) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What results are tried on, a little of everything, for several kinds of cotangent."""
    for number, plan in enumerate(plans := _plans(trial)):
        yield f"{to.name} gradients", functools.partial(_gradient, trial, to, number, *plan)
    middle, combos = _middle(trial), trial.combos(5)
    for number, (drawn, label) in enumerate(_reshaped(trial, to, middle, combos), len(plans)):
        yield f"{to.name} gradients", functools.partial(_judge, trial, to, number, drawn, label, "")


def _middle(trial: Trial) -> dict[str, Any]:
    return dict(zip(trial.op.lengths, (13, 19, 17), strict=False))


def _plans(trial: Trial) -> list[tuple[dict, dict, str, str]]:
    """Sizes, combination, hard input and kind of cotangent of every trial.

    A backward kernel has tiles, blocks and loops of its own, and sums over axes that the forward never sums over: so
    lengths, batches, widths and strides, each with every optional array and option.
    """
    op, combos, middle = trial.op, trial.combos(5), _middle(trial)
    returned = {"return_state": True} if "return_state" in trial.factors() else {}
    plain, telling = combos[0] | returned, [combo | returned for combo in few(op, trial.factors(), combos)]
    rich, turn = telling[0], itertools.cycle(combo | returned for combo in combos)
    plans: list[tuple[dict, dict, str, str]] = []
    for T in _LENGTHS.get(trial.level, _LENGTHS["standard"]) if op.lengths else (0,):
        plans += [(dict.fromkeys(op.lengths, T), combo, "", "") for combo in (telling if T == 0 else (rich, next(turn)))]
    if len(op.lengths) > 1:  # decoding, and a few queries
        plans += [({**middle, op.lengths[0]: n, op.lengths[1]: m}, combo, "", "") for n, m in ((1, 19), (1, 70), (5, 70)) for combo in telling]
    batch = {"batch": (2,)} if "batch" in default_sizes(op) else {}
    plans += [(middle | batch, combo, "", "") for combo in combos]
    plans += [({**middle, **sizes}, combo, "", "") for sizes in op.sizes for combo in (*telling, next(turn))]
    if not op.lengths and batch:  # sums over many rows, which kernels do in blocks
        plans += [({"batch": (rows,)}, combo, "", "") for rows in (17, 65, 300) for combo in telling]
    plans += [(middle, rich, "", kind) for kind in ("needle", "zero but state")]
    plans += [(middle | batch, combo, "", kind) for kind in ("strided", "transposed", "repeated") for combo in telling]
    plans += [(middle | {"batch": (1,)}, combo, "", "") for combo in telling if batch]
    plans += [(middle, combo, "", kind) for kind in (BETWEEN, TWICE, ALONE) for combo in telling]
    if trial.level != "quick":
        cheap = affordable(op, {**default_sizes(op), **middle}, trial.level, 50 * _CALLS, rich)
        plans += [(middle, combo, hard, "") for combo in (plain, rich, *(combos[1:4] if cheap else ())) for hard in op.hard]
        plans += [({**dict.fromkeys(op.lengths, 300), **batch}, combo, "", "") for combo in telling if op.lengths]
        plans += [(dict.fromkeys(op.lengths, 600), combo, "", "") for combo in (plain, rich) if op.lengths]
        plans += [(dict.fromkeys(op.lengths, 200), plain, hard, "") for hard in op.hard if len(op.lengths) == 1]
        plans += [({**dict.fromkeys(op.lengths, 5), "batch": (33,)}, combo, "", "") for combo in telling if batch]
        turn = itertools.cycle(telling)
        for sizes in wide(op, (16, 33, 34, 64, 66, 130, 300, 1100)):
            plans.append(({**dict.fromkeys(op.lengths, 5), **sizes}, next(turn), "", ""))
        rng = np.random.default_rng([trial.seed, 19])
        chosen = trial.factors()
        for _ in range(20):
            sizes, combo, _ = at_random(op, rng, chosen)
            plans.append((sizes, combo, "", ""))
    return [plan for plan in plans if affordable(op, {**default_sizes(op), **plan[0]}, trial.level, _CALLS, plan[1])]


def _reshaped(trial: Trial, to: Precision, middle: dict, combos: list[dict]) -> Iterator[tuple[Drawn, str]]:
    """Calls with one array in another of its shapes, one for the whole batch, or without the axis of heads: the gradient is a sum.

    Where there are several blocks of everything, once more, since a sum over rows may be that of one block; and of a single step.
    """
    op, level = trial.op, trial.level
    free = trial.domain.batch is None and trial.domain.batch_rank is None
    rounds = [(middle, combos)]
    if op.lengths and level != "quick":
        rounds += [(dict.fromkeys(op.lengths, 130), combos[::-1]), (dict.fromkeys(op.lengths, 1), combos)]
    for sizes, turns in rounds if "batch" in default_sizes(op) else ():
        seen: set[tuple[str, int]] = set()
        for number, combo in enumerate(turns):
            batch = (2, 3) if free and number % 2 and sizes is middle else (2,)
            wanted = {**default_sizes(op), **sizes, "batch": batch}
            drawn = trial.draw(np.random.default_rng([trial.seed, number, 23]), wanted, combo, to) if affordable(op, wanted, level, _CALLS, combo) else None
            if drawn is None:
                continue
            for name, label, call in reshaped(op, drawn.call):
                value = call[name][0] if isinstance(call[name], tuple) else call[name]
                key = label, len(batch)
                if key in seen or value.dtype.kind in "iub" or not (free or "batch" not in label):
                    continue
                seen.add(key)
                yield Drawn(call, truth.truth(op, call, to), drawn.sizes), label
    for case in without_heads(op, trial.seed, combos, trial.domain):
        one = rounded(op.contract, case.call, to)
        if one is not None:
            yield Drawn(one, truth.truth(op, one, to), case.sizes), "one head without its axis"


def recall_gradient(
    operator: str, id: str, *, dtype: str, level: str = "standard", seed: int = 0, keywords: list[str] | None = None, domain: Domain | None = None
) -> tuple[dict[str, Any], Any, Any]:
    """Call and cotangents of a trial of gradients by its id, in a precision: what a report's snippet draws again.

    Raises
    ------
    ValueError
        If there is no such trial.
    """
    from refimpl.catalogue import operator as find

    op, to, number = find(operator), precision(dtype), id.rpartition("#")[2].rstrip("]")
    subject: Any = SimpleNamespace(support=Support(None if keywords is None else frozenset(keywords)))
    trial = Trial(op, subject, Report(operator, ""), level, seed, domain or Domain())
    plans, drawn, kind = _plans(trial), None, ""
    place = int(number) if number.isdecimal() else -1
    if 0 <= place < len(plans):
        sizes, combo, hard, kind = plans[place]
        drawn = _drawn(trial, to, place, sizes, combo, hard)
    elif place >= 0:
        drawn, _ = next(itertools.islice(_reshaped(trial, to, _middle(trial), trial.combos(5)), place - len(plans), None), (None, ""))
    if drawn is None:
        raise ValueError(f"recall_gradient: {operator} has no trial {id!r} at level {level!r}, seed {seed}")
    return drawn.call, *_cotangents(trial, drawn, place, kind)


def _gradient(trial: Trial, to: Precision, number: int, sizes: dict, combo: dict, hard: str, kind: str) -> None:
    if kind in (BETWEEN, TWICE, ALONE) and trial.subject.vjp:  # a function of cotangents and arguments, asked for all of them
        return
    drawn = _drawn(trial, to, number, sizes, combo, hard)
    if drawn is not None:
        _judge(trial, to, number, drawn, hard, kind)


def _drawn(trial: Trial, to: Precision, number: int, sizes: dict, combo: dict, hard: str) -> Drawn | None:
    return trial.draw(np.random.default_rng([trial.seed, number, 17]), sizes, combo, to, hard)


def _one_sided(op: Op, call: dict, gradient: dict) -> list[str]:
    """Which optional arrays are differentiated where others are not given: a framework may have no gradient of a bias without a weight, and raises."""
    optional = parameters(op)[1]
    given, absent = ([n for n in optional if (call.get(n) is None) is missing] for missing in (False, True))
    return [f"{OF_ONE_SIDE}{g} with no {a}" for g in given if g in gradient for a in absent]


def _judge(trial: Trial, to: Precision, number: int, drawn: Drawn, label: str, kind: str) -> None:
    """The gradient of one call for random cotangents, which `kind` may make special."""
    call = drawn.call
    name = ", ".join(filter(None, [label, kind, described(trial.op, drawn.sizes, call), f"#{number}"]))
    view = kind if kind in VIEWS else "contiguous"
    dy, dstate = _cotangents(trial, drawn, number, kind)
    gradient = truth.gradient_truth(trial.op, call, dy, dstate, to)
    most = max(to.largest, float(np.finfo(np.float32).max))  # halves are summed in float32
    if not gradient or not all(np.all(abs(v) < 0.9 * most) for v in truth.flat(gradient).values()):
        return  # where one number overflows on the way, 0 times it is NaN
    limits = functools.cache(lambda: truth.flat(truth.gradient_tolerance(trial.op, call, dy, dstate, to, gradient, drawn.right)))
    if kind != ALONE:
        case = Case(trial.op.name, "gradients", name, call, drawn.sizes, view=view)
        _ask(trial, to, case, (dy, dstate), gradient, limits, kind if kind in (BETWEEN, TWICE) else "")
        return
    for argument, g in gradient.items():
        case = Case(trial.op.name, "gradients", name.replace(ALONE, ALONE + argument), call, drawn.sizes)
        _ask(trial, to, case, (dy, dstate), {argument: g}, limits, ALONE + argument)


def _ask(trial: Trial, to: Precision, case: Case, cotangents: tuple, gradient: dict, tolerance: Callable[[], dict], manner: str) -> None:
    """The candidate's gradient, asked for in a manner, against the right one."""
    call, view, right = case.call, case.view, truth.flat(gradient)
    start = time.perf_counter()
    answer = trial.subject.gradient(call, *cotangents, view=view, manner=manner)
    seconds = time.perf_counter() - start
    marks = [*traits(trial.op, call, view), *_one_sided(trial.op, call, gradient)]
    marks += [OF_ONE_ALONE] if manner.startswith(ALONE) else [TWICE] if manner == TWICE else []
    failed = trouble(answer)
    if failed is not None:
        raised = failed[0] == "ERROR"
        result = Result(case.id, case.klass, to.name, "GRADIENT" if raised else failed[0], failed[1], excusable=raised)
    else:
        got = truth.flat(answer.result) if isinstance(answer.result, dict) else {}
        right = _differentiated(trial, got, right)
        if not right:
            return
        limits = {n: x for n, x in tolerance().items() if n in right}
        finding = _gate(got, right, limits, call, to)
        if set(right) <= set(got):
            trial.keep(Evidence(call, to, {n: got[n] for n in right}, right, limits, cotangents, failed=finding is not None, case=case.id))
        result = Result(case.id, case.klass, to.name, "PASS")
        if finding is not None:
            result = trial.drawn(trial.failure(case, to, finding, call, cotangents, manner), finding, got, right, limits, call)
            result.excusable = COMPLEX in marks or ("shape" in finding.message and bool(shared(trial.op, call)))
    result.seconds, result.traits = seconds, tuple(marks)
    trial.report.cases.append(result)


def _differentiated(trial: Trial, got: dict, right: dict) -> dict:
    """What is right of the arguments that the candidate differentiates: angles are often made once, as constants.

    Where autograd finds no way from a result to positions or frequencies, it says 0 everywhere.
    """
    constant = {a.name for a in trial.op.contract.arrays if a.kind == "free" and isinstance(got.get(a.name), np.ndarray) and not np.any(got[a.name])}
    for name in sorted(constant & set(right)):
        rule = f"gradient of {name} (zero: a constant to it)"
        if np.any(right[name]) and rule not in trial.report.not_checked:
            trial.report.not_checked.append(rule)
    return {name: exact for name, exact in right.items() if name not in constant or not np.any(exact)}


def _gate(got: dict, right: dict, limits: dict, call: dict, to: Precision) -> Finding | None:
    """Shape, dtype and finiteness of every gradient, then the worst of those out of bounds."""
    missing = [n for n in right if not isinstance(got.get(n), np.ndarray)]
    if missing:
        return Finding("GRADIENT", f"no gradient of {', '.join(missing)}")
    arguments = truth.flat(call)
    findings = []
    for name, exact in right.items():
        g = got[name]
        if g.shape != exact.shape:
            return Finding("GRADIENT", f"{GRADIENT_OF}{name} has shape {g.shape}, expected {exact.shape}", GRADIENT_OF + name)
        if g.dtype != arguments[name].dtype:
            return Finding("GRADIENT", f"{GRADIENT_OF}{name} has dtype {g.dtype}, expected {arguments[name].dtype}", GRADIENT_OF + name)
        with np.errstate(all="ignore"):
            wild = ~np.isfinite(g.astype(exact.dtype)) & (abs(exact) < 0.9 * to.largest)
        if np.any(wild):
            index = tuple(int(i) for i in np.argwhere(wild)[0])
            return Finding("GRADIENT", f"{GRADIENT_OF}{name} is not finite", GRADIENT_OF + name, index, g[index], exact[index], 0.0, np.inf, wild)
        f = gates.bounded(f"{GRADIENT_OF}{name}", g, exact, np.broadcast_to(limits[name], exact.shape))
        if f is not None:
            findings.append(Finding("GRADIENT", f.message, f.output, f.index, f.got, f.expected, f.bound, f.ratio, f.bad))
    return max(findings, key=lambda f: f.ratio, default=None)


def _cotangents(trial: Trial, drawn: Drawn, number: int, kind: str) -> tuple[Any, Any]:
    """Random cotangents of the results, and of the final state where it is returned."""
    rng = np.random.default_rng([trial.seed, number, 18])
    compute, out = trial.op.contract.precision(**drawn.call)

    def draw(name: str, like: np.ndarray) -> np.ndarray:
        state = name.startswith("state")
        v = rng.standard_normal(like.shape)
        if like.dtype.kind == "c":
            v = v + 1j * rng.standard_normal(like.shape)
        if kind == "needle" and not state:
            v = v * (np.arange(v.size).reshape(v.shape) == v.size // 2)
        if kind == "zero but state" and not state:
            v = v * 0
        if kind == "repeated":  # as the gradient of a mean is
            v = np.broadcast_to(v[:1], v.shape) if v.ndim else v
        return v.astype(gates.result_dtype(like, compute, out, state))

    parts = [draw(n, v) for n, v in drawn.right.items() if not n.startswith("state") and v.dtype.kind in "fc"]
    states = [draw(n, v) for n, v in drawn.right.items() if n.startswith("state")]
    return tuple(parts) if len(parts) > 1 else parts[0], trial.state_of(states) if states else None
