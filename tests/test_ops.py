"""Every operator of the catalogue: forms, gradients, laws, states, precisions, shapes, bad input, documentation.

Nothing here names an operator: calls are drawn from the Op records, and tolerances are the chapters' error bounds. What is
the right value is decided elsewhere (tests/anchors); here the forms must equal the definition, the gradient the
difference quotients, and the operator its laws.
"""

import copy
import functools
import importlib
import inspect
import itertools
import re
import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import refimpl
from refimpl.catalogue import chapter_of, chapters, public_names
from refimpl.conformance.cases import Support, choose, draw, factors, pairwise, parameters
from refimpl.conformance.domain import Domain
from refimpl.conformance.precision import precision, rounded, widened
from refimpl.core.dtypes import HALF

OPS = refimpl.OPS
FORMS = [(name, form) for name, op in OPS.items() for form in op.forms]
DIFFERENTIABLE = [name for name, op in OPS.items() if op.gradient is not None]
PRECISIONS = ("float64", "float32")
LENGTHS = (0, 1, 2, 3, 5, 17, 64, 65, 130)

each_op = pytest.mark.parametrize("name", OPS)
each_form = pytest.mark.parametrize(("name", "form"), FORMS)
each_gradient = pytest.mark.parametrize("name", DIFFERENTIABLE)


# -- calls -----------------------------------------------------------------------------------------------------------


def generator(*seed) -> np.random.Generator:
    return np.random.default_rng([ord(letter) for letter in repr(seed)])


def combos(op, rng) -> list[dict]:
    """All pairs of options, optional arrays and states, the plain call first."""
    chosen = factors(op, Support(), Domain())
    return pairwise(chosen, rng) if chosen else [{}]


def richest(op) -> dict:
    """The combination with every optional array and state, options at their defaults."""
    options = parameters(op)[2]
    return {n: values[0] if n in options else True for n, values in factors(op, Support(), Domain()).items()}


def arrays_only(op) -> dict:
    """The same, without a word about options: for hard inputs, which choose their own."""
    options = parameters(op)[2]
    return {n: True for n in richest(op) if n not in options}


def options_are_default(op, call) -> bool:
    return not {n for n, default in parameters(op)[2].items() if default is not inspect.Parameter.empty} & set(call)


def small(op, T=None, **others) -> dict:
    """Sizes by letter: all lengths T, and others where the sample knows them."""
    known = inspect.signature(op.sample).parameters
    return ({} if T is None else dict.fromkeys(op.lengths, T)) | {k: v for k, v in others.items() if k in known}


@functools.cache
def plan(name: str) -> list[tuple[str, dict]]:
    """Labelled calls in float64: lengths, unequal lengths, pairs of options, sizes, hard inputs."""
    op, rng = OPS[name], generator("plan", name)
    every = combos(op, rng)
    turn = itertools.cycle([richest(op), *every])
    sizes = [dict.fromkeys(op.lengths, T) for T in LENGTHS] if op.lengths else [{}]
    if len(op.lengths) > 1:
        sizes += [dict(zip(op.lengths, pair, strict=False)) for pair in [(0, 3), (3, 0), (1, 9), (9, 1), (5, 70), (70, 5)]]
    sizes += [dict(s) for s in op.sizes]
    found = [(str(s), draw(op, rng, s, next(turn))) for s in sizes]
    middle = dict(zip(op.lengths, (19, 13, 16), strict=False))
    found += [(f"options {_shown(combo)}", draw(op, rng, middle, combo)) for combo in every]
    full = arrays_only(op)
    for hard, make in op.hard.items():
        for T in (6, 33) if op.lengths else (None,):
            call = make(rng, **small(op, T))
            options = {n: v for n, v in call.items() if n in parameters(op)[2]}
            found.append((f"hard: {hard}", choose(op, call, {}, full) | options))
    return found


def _shown(combo):
    return ", ".join(f"{k}={v}" for k, v in combo.items() if v is not False and v is not None) or "(none)"


@functools.cache
def judged(name: str, to: str) -> list[tuple[str, dict, dict, dict]]:
    """Labelled calls in a precision, with the truth about them and the bound; the truth is one precision wider."""
    op, where = OPS[name], precision(to)
    found = []
    for label, call in plan(name):
        call = rounded(op.contract, call, where)
        if call is None:
            continue
        with quiet():
            right = named(op, op.definition(**widened(call, where.truth)), call)
            wide = widened(call, np.dtype(np.float64) if to != "float64" else np.dtype(np.longdouble))
            limit = named(op, op.error_bound(**wide, unit=where.unit), call)
        found.append((label, call, right, limit))
    return found


class quiet:
    """Overflow on the way to an infinite result is not a finding of its own."""

    def __enter__(self):
        self.state, self.caught = np.errstate(all="ignore"), warnings.catch_warnings()
        self.state.__enter__(), self.caught.__enter__()
        warnings.simplefilter("ignore", RuntimeWarning)

    def __exit__(self, *error):
        self.caught.__exit__(*error), self.state.__exit__(*error)


def named(op, result, call) -> dict[str, np.ndarray]:
    return op.contract.named(result, call.get("return_state", False))


def run(op, function, call, form=""):
    """The results by name; None where the form refuses the call with a message that says so."""
    try:
        with quiet():
            return named(op, function(**call), call)
    except ValueError as refusal:
        if form == next(iter(op.forms)) or not (op.name in str(refusal) and form in str(refusal)):
            raise
        return None


def excess(got, right, limit) -> float:
    """The worst |got - right| / limit; infinite where the places of NaN and infinities differ."""
    got, right = np.asarray(got), np.asarray(right)
    assert got.shape == right.shape
    if got.dtype.kind in "iub":
        return 0.0 if np.array_equal(got, right) else np.inf
    with quiet():
        got = got.astype(right.dtype)
        fine = np.isfinite(right)
        same = np.where(np.isnan(right), np.isnan(got), got == right)
        if not np.all(same | fine) or not np.all(np.isfinite(got[fine])):
            return np.inf
        error, limit = abs(got - right)[fine], np.broadcast_to(limit, right.shape)[fine]
        assert np.all(limit >= 0), "an error bound is negative or NaN"
        return float(np.max(np.where(error == 0, 0, error / limit), initial=0.0))


def blocks(op, form) -> list[dict]:
    """Block sizes that a form takes beside the operator's options: its default, and small ones that leave a rest."""
    ours, theirs = (inspect.signature(f).parameters for f in (op.definition, op.forms[form].function))
    extra = [n for n, p in theirs.items() if n not in ours and isinstance(p.default, int) and not isinstance(p.default, bool)]
    return [{}, *(dict.fromkeys(extra, size) for size in (1, 3, 16) if extra)]


def each_array(f, call):
    """A call with f applied to every array, the parts of a tuple each."""
    return {n: type(v)(*map(f, v)) if hasattr(v, "_fields") else f(v) if isinstance(v, np.ndarray) else v for n, v in call.items()}


def tiny_of(to: str) -> float:
    return float(np.finfo(precision(to).compute).tiny)


# -- forms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", PRECISIONS)
@each_form
def test_forms_equal_the_definition(name, form, to):
    """Within the error bound, element by element, for every size, option, state and hard input; never more is lost."""
    op = OPS[name]
    f, wrong, ran = op.forms[form], [], 0
    for i, (label, call, right, limit) in enumerate(judged(name, to)):
        tried = blocks(op, form)
        for block in {i % len(tried): 0, 0: 0}:
            got = run(op, f.function, call | tried[block], form)
            if got is None:
                continue
            ran += 1
            assert got.keys() == right.keys()
            for output in right:
                if not f.stabilised and (output.startswith("state") or not np.all(np.isfinite(got[output]))):
                    continue  # its state is in other units, and it overflows where it must
                if f.stops and not np.all(np.isfinite(got[output])) and label.startswith("hard"):
                    continue  # the form says that it stops at such inputs; that it runs at all is for its author to say
                worst = excess(got[output], right[output], limit[output] + tiny_of(to))
                if worst > 1:
                    wrong.append(f"{output} is {worst:.3g} times the bound off at {label} {tried[block] or ''}")
                assert got[output].dtype.kind in "iub" or np.finfo(got[output].dtype).dtype == precision(to).dtype, (
                    f"{output}: {got[output].dtype}"
                )
    assert not wrong, f"{name}, {form}, {to}:\n" + "\n".join(wrong)
    assert ran, f"{name}: {form} refuses every call"


@each_op
def test_the_definition_refuses_nothing(name):
    for label, _, right, _ in judged(name, "float64"):
        assert right, label


@each_form
def test_blocks_of_any_size(name, form):
    """A form with block sizes equals the definition for any length and any block (found by hypothesis)."""
    op = OPS[name]
    extra = [n for b in blocks(op, form) for n in b]
    if not extra or not op.lengths:
        return
    sizes = st.lists(st.integers(0, 40), min_size=len(op.lengths), max_size=len(op.lengths))

    @settings(max_examples=25, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(lengths=sizes, block=st.fixed_dictionaries({n: st.integers(1, 45) for n in extra}), seed=st.integers(0, 9))
    def check(lengths, block, seed):
        rng = generator(seed)
        every = combos(op, rng)
        call = draw(op, rng, dict(zip(op.lengths, lengths, strict=True)), every[seed % len(every)])
        with quiet():
            right = named(op, op.definition(**widened(call, np.dtype(np.longdouble))), call)
            limit = named(op, op.error_bound(**call, unit=2.0**-53), call)
        got = run(op, op.forms[form].function, call | block, form)
        for output in right if got else ():
            assert excess(got[output], right[output], limit[output] + tiny_of("float64")) <= 1, f"{output}, {lengths}, {block}"

    check()


@each_form
@pytest.mark.parametrize("size", [0, -1, 1.5, True, "8"])
def test_a_block_size_is_a_positive_integer(name, form, size):
    op = OPS[name]
    call = draw(op, generator(name), {}, {})
    for block in {n for b in blocks(op, form) for n in b}:
        with pytest.raises((ValueError, TypeError), match=rf"(?s){name}.*{block}"):
            op.forms[form].function(**call, **{block: size})


# -- laws ------------------------------------------------------------------------------------------------------------


@each_form
def test_laws_hold(name, form):
    """For every law and every pair of options; a law that an option breaks by its meaning must hold without it."""
    op, rng = OPS[name], generator("laws", name, form)
    definition = next(iter(op.forms))
    assert not op.stateful or "hand_off" in {law.name for law in op.laws}, f"{name} has a state: it needs the law hand_off"
    for law in op.laws:
        spoken, tried = 0, [richest(op), *combos(op, rng)]
        for combo, T in [(c, T) for c in tried for T in (9,)] + [(tried[0], T) for T in (1, 2, 5)]:
            call = draw(op, rng, small(op, T), combo)
            call.pop("return_state", None)
            default = options_are_default(op, call)
            if not default and broken(op, definition, law, call, name):
                continue
            failures = broken(op, form, law, call, name)
            spoken += failures is not None
            assert not failures, f"{name}, {form}: the law {law.name} fails at {_shown(combo)}, T = {T}: {failures[0]}"
        assert spoken, f"{name}, {form}: the law {law.name} was never in force"


def broken(op, form, law, call, seed) -> list[str] | None:
    """What a law says against a form; None where the form refuses."""
    function = op.forms[form].function
    bound = functools.partial(op.error_bound, unit=2.0**-53)
    said = []
    try:
        with quiet():
            for what, got, want, tolerance in law.holds(function, call, bound, generator(seed)):
                worst = excess(got, want, np.asarray(tolerance) + tiny_of("float64"))
                if worst > 1:
                    said.append(f"{what}: {worst:.3g} times the tolerance")
    except ValueError as refusal:
        if form not in str(refusal) or form == next(iter(op.forms)):
            raise
        return None
    return said


@pytest.mark.parametrize("name", [n for n, op in OPS.items() if op.stateful])
@pytest.mark.parametrize("to", ["float32", "float64"])
def test_states_are_handed_on_at_random_places(name, to):
    """Three parts of random lengths, empty ones too, through random forms."""
    op, rng = OPS[name], generator("parts", name, to)
    letter = op.lengths[0]
    for combo in [richest(op), *combos(op, rng)]:
        call = rounded(op.contract, draw(op, rng, small(op, 23), combo | {"return_state": True}), precision(to))
        arrays = {a.name.partition(".")[0] for a in op.contract.arrays}
        axes = {
            n: a
            for n, a in op.contract.axis(letter, **{n: v for n, v in call.items() if n in arrays}).items()
            if n != "state" and "." not in n
        }
        axes = {n: a for n, a in axes.items() if call[n].shape[a] == 23}
        if call.keys() & {"reverse"}:
            continue
        with quiet():
            whole = named(op, op.definition(**widened(call, precision(to).truth)), call)
            limit = named(op, op.error_bound(**widened(call, precision(to).truth), unit=precision(to).unit), call)
        cuts = [0, *sorted(int(c) for c in rng.integers(0, 24, 2)), 23]
        parts, state = [], call.get("state")
        for start, stop in itertools.pairwise(cuts):
            piece = {n: v[(..., slice(start, stop), *[slice(None)] * (-axes[n] - 1))] if n in axes else v for n, v in call.items()}
            piece |= {} if state is None else {"state": state}
            form = str(rng.choice([n for n, f in op.forms.items() if f.stabilised]))
            got = run(op, op.forms[form].function, piece, form)
            if got is None:
                form = next(iter(op.forms))
                got = run(op, op.definition, piece, form)
            with quiet():
                state = op.forms[form].function(**piece)[-1]
            parts.append(got)
        for output, axis in op.contract.result_axis(letter).items():
            if output in whole:
                joined = np.concatenate([p[output] for p in parts], axis=axis)
                assert excess(joined, whole[output], 3 * limit[output] + tiny_of(to)) <= 1, f"{output}, cut at {cuts}, {_shown(combo)}"
        for output in set(whole) - set(op.contract.result_axis(letter)):
            assert excess(parts[-1][output], whole[output], 3 * limit[output] + tiny_of(to)) <= 1, (
                f"{output}, cut at {cuts}, {_shown(combo)}"
            )


@pytest.mark.parametrize("name", [n for n, op in OPS.items() if op.stateful])
def test_nothing_leaves_the_state_as_it_is(name):
    op = OPS[name]
    call = draw(op, generator(name), small(op, 0), richest(op))
    for form in [n for n, f in op.forms.items() if f.stabilised]:
        got = run(op, op.forms[form].function, call, form)
        given = op.contract.named((None,) * len(op.contract.results) + (call["state"],), True)
        for part in given:
            if part.startswith("state") and got is not None:
                assert np.array_equal(got[part], given[part]), f"{form}: {part}"


# -- gradients -------------------------------------------------------------------------------------------------------


def cotangents(op, call, rng, dtype=np.longdouble):
    """Random cotangents of the results of a call: (dy, dstate), and the pairs (result, cotangent) as a function."""
    with quiet():
        result = op.definition(**call)
    outputs = list(result) if isinstance(result, tuple) and not hasattr(result, "_fields") else [result]
    dstate = outputs.pop() if call.get("return_state") else None

    def seed(v):
        v = np.asarray(v)
        if v.dtype.kind in "iub":
            return None
        random = rng.standard_normal(v.shape) + (1j * rng.standard_normal(v.shape) if v.dtype.kind == "c" else 0)
        return np.where(np.isfinite(v), random, 0).astype(np.result_type(dtype, np.complex64) if v.dtype.kind == "c" else dtype)

    dy = tuple(map(seed, outputs))
    dstate = None if dstate is None else type(dstate)(*map(seed, dstate)) if isinstance(dstate, tuple) else seed(dstate)
    return (dy if len(dy) > 1 else dy[0]), dstate


def vjp(op, call, dy, dstate):
    takes = inspect.signature(op.gradient).parameters
    extra = {"dstate": dstate} if dstate is not None else {}
    with quiet():
        return op.gradient(dy, **{n: v for n, v in call.items() if n in takes}, **extra)


def leaves(x) -> list:
    if isinstance(x, tuple | list):
        return [leaf for v in x for leaf in leaves(v)]
    return [x]


def paired(op, call, dy, dstate, function=None) -> np.longdouble:
    """Re <dy, f(call)>, results that have no cotangent left out."""
    with quiet():
        result = (function or op.definition)(**call)
        total = np.longdouble(0)
        seeds = leaves(dy) + ([] if dstate is None else leaves(dstate))
        for value, seed in zip(leaves(result), seeds, strict=True):
            if seed is not None:
                total += np.sum(np.where(seed == 0, 0, np.conj(seed) * np.asarray(value))).real
    return total


def rounding(op, call, dy, dstate) -> np.longdouble:
    """What longdouble rounding does to `paired`."""
    with quiet():
        bound = leaves(op.error_bound(**call, unit=2.0**-64))
        seeds = leaves(dy) + ([] if dstate is None else leaves(dstate))
        return sum(
            (np.sum(np.where(seed == 0, 0, abs(seed) * limit)) for limit, seed in zip(bound, seeds, strict=True) if seed is not None),
            np.longdouble(0),
        )


def directional(op, call, dy, dstate, argument, direction, smooth=True):
    """Derivative of `paired` along a direction by central differences, what that may be off, and the jump at a kink.

    The difference of the quotients for h and 2h bounds the truncation error; rounding is divided by h; the jump is that
    between the one-sided quotients. Where a hard input bends within h, smaller steps are tried.
    """
    noise = 4 * rounding(op, call, dy, dstate)
    function = op.tangent(call) if op.tangent else op.definition
    best = None
    for exponent in (20,) if smooth else (20, 34, 60, 90):
        h = np.longdouble(2) ** -exponent

        def at(t):
            return paired(op, call | {argument: shifted(call[argument], direction, t)}, dy, dstate, function)

        up, down, center = at(h), at(-h), at(0)
        derivative, coarse = (up - down) / (2 * h), (at(2 * h) - at(-2 * h)) / (4 * h)
        jump = abs((up - center) - (center - down)) / h
        off = abs(coarse - derivative) + h * jump + noise / h
        if best is None or off * abs(best[0]) < best[1] * abs(derivative):
            best = derivative, off, jump
        if best[1] <= 2.0**-10 * abs(best[0]):
            break
    return best


def shifted(value, direction, t):
    if isinstance(value, tuple):
        return type(value)(*(shifted(v, d, t) for v, d in zip(value, direction, strict=True)))
    with quiet():
        return np.where(np.isfinite(value), value + t * direction, value)


def shift_rounding(gradient, value, direction) -> np.longdouble:
    """What rounding value + h direction, divided by h = 2^-20, does to a quotient; and rounding the sums of both sides."""
    with quiet():
        size = _mapped(np.abs, gradient)
        shifts = inner(size, _mapped(lambda v: np.where(np.isfinite(v), abs(v), 0), value)) * np.longdouble(2) ** -43
        return shifts + inner(size, _mapped(np.abs, direction)) * np.longdouble(2) ** -60


def inner(gradient, direction) -> np.longdouble:
    with quiet():
        return sum(
            (np.sum(np.where(d == 0, 0, np.conj(g) * d)).real for g, d in zip(leaves(gradient), leaves(direction), strict=True)),
            np.longdouble(0),
        )


def directions(value, rng):
    """A dense direction and a sparse one; in the structure of the argument."""
    for density in (1.0, 0.2):

        def one(v, density=density):
            random = rng.standard_normal(v.shape) + (1j * rng.standard_normal(v.shape) if v.dtype.kind == "c" else 0)
            return (random * (rng.random(v.shape) < density)).astype(v.dtype)

        yield type(value)(*map(one, value)) if isinstance(value, tuple) else one(value)


def differentiable(op, call) -> list[str]:
    """Arguments of a call that must have a gradient: floating arrays that define the operator, and the state."""
    kinds = {a.name.partition(".")[0]: a.kind for a in op.contract.arrays}
    return [
        n
        for n, v in call.items()
        if kinds.get(n) in ("number", "real") and (isinstance(v, tuple) or (isinstance(v, np.ndarray) and v.dtype.kind in "fc"))
    ]


def compare_gradient(op, call, rng, where, smooth=True):
    """The gradient of every argument against difference quotients along random directions."""
    dy, dstate = cotangents(op, call, rng)
    gradients = vjp(op, call, dy, dstate)
    expected = differentiable(op, call)
    assert set(expected) <= set(gradients), f"{where}: no gradient for {set(expected) - set(gradients)}"
    assert set(gradients) <= set(call), f"{where}: gradients for {set(gradients) - set(call)}, which were not given"
    for argument, gradient in gradients.items():
        for g, v in zip(leaves(gradient), leaves(call[argument]), strict=True):
            assert g.shape == v.shape, f"{where}: gradient of {argument} has shape {g.shape}"
            assert g.dtype == v.dtype, f"{where}: gradient of {argument} has dtype {g.dtype}"
        for direction in directions(call[argument], rng):
            quotient, off, jump = directional(op, call, dy, dstate, argument, direction, smooth)
            if not np.isfinite(quotient):
                assert not smooth, f"{where}: the operator is not finite around {argument}"
                continue
            if not smooth and max(off, 64 * jump) > abs(quotient) / 4 and any(np.any(g) for g in leaves(gradient)):
                assert all(np.all(np.isfinite(g)) for g in leaves(gradient)), f"{where}: the gradient of {argument} is not finite"
                continue  # differences do not resolve it, or several kinks meet and each may take its own branch
            product = inner(gradient, direction)
            allowed = 4 * off + shift_rounding(gradient, call[argument], direction)
            assert abs(product - quotient) <= allowed, (
                f"{where}: <gradient, d{argument}> = {product}, the difference quotient is {quotient} ± {allowed:.2g}"
            )


@each_gradient
def test_gradients_equal_difference_quotients(name):
    """For every argument, state and pair of options, in longdouble: ten digits or more of every derivative."""
    op, rng = OPS[name], generator("gradient", name)
    for combo in [richest(op), *combos(op, rng)]:
        call = widened(draw(op, rng, small(op, 4), combo), np.dtype(np.longdouble))
        compare_gradient(op, call, rng, f"{name} at {_shown(combo)}")


@each_gradient
def test_gradients_of_every_size(name):
    op, rng = OPS[name], generator("gradient of sizes", name)
    sizes = [dict(s) for s in op.sizes] + [small(op, T) for T in (0, 1, 2) if op.lengths]
    if len(op.lengths) > 1:
        sizes += [dict(zip(op.lengths, pair, strict=False)) for pair in [(2, 5), (5, 2), (0, 2), (2, 0)]]
    for size in sizes:
        call = widened(draw(op, rng, size, richest(op)), np.dtype(np.longdouble))
        compare_gradient(op, call, rng, f"{name} at {size}")


@each_gradient
def test_gradients_at_hard_inputs(name):
    """Finite where the operator is, and equal to a slope there."""
    op, rng = OPS[name], generator("hard gradient", name)
    full = arrays_only(op)
    for hard, make in op.hard.items():
        call = make(rng, **small(op, 5))
        options = {n: v for n, v in call.items() if n in parameters(op)[2]}
        call = widened(choose(op, call, {}, full) | options, np.dtype(np.longdouble))
        compare_gradient(op, call, rng, f"{name} at {hard}", smooth=False)


@each_gradient
def test_gradients_are_linear_in_the_cotangents(name):
    """<dy, .> and <dstate, .> add up; None is zero; twice the cotangents give exactly twice the gradients."""
    op, rng = OPS[name], generator("linear gradient", name)
    call = draw(op, rng, small(op, 4), richest(op))
    dy, dstate = cotangents(op, call, rng, np.float64)
    twice = [None if v is None else 2 * v for v in leaves(dy)]
    whole = vjp(op, call, dy, dstate)
    double = vjp(
        op, call, tuple(twice) if isinstance(dy, tuple) else twice[0], dstate if dstate is None else _mapped(lambda v: 2 * v, dstate)
    )
    for argument in whole:
        for a, b in zip(leaves(whole[argument]), leaves(double[argument]), strict=True):
            assert np.array_equal(2 * a, b), f"gradient of {argument} of twice the cotangents"
    zero = [None if v is None else np.zeros_like(v) for v in leaves(dy)]
    zeros = tuple(zero) if isinstance(dy, tuple) else zero[0]
    nothing = vjp(op, call, zeros, None)
    for argument, gradient in nothing.items():
        assert not any(np.any(g) for g in leaves(gradient)), f"gradient of {argument} of zero cotangents"
    if isinstance(dy, tuple):
        for i, part in enumerate(dy):
            if part is not None:
                with_none = vjp(op, call, tuple(v if j == i else None for j, v in enumerate(dy)), None)
                with_zero = vjp(op, call, tuple(v if j == i else z for j, (v, z) in enumerate(zip(dy, zero, strict=True))), None)
                assert all(np.array_equal(a, b) for n in with_zero for a, b in zip(leaves(with_none[n]), leaves(with_zero[n]), strict=True))


def _mapped(f, x):
    return type(x)(*map(f, x)) if isinstance(x, tuple) else f(x)


@each_gradient
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
def test_gradients_have_the_dtypes_of_their_arguments(name, dtype):
    """And their values: a half precision's gradient is that of float32, rounded once."""
    op, rng = OPS[name], generator("gradient dtype", name)
    call = draw(op, rng, small(op, 4), richest(op))
    call = rounded(op.contract, call, precision(np.dtype(dtype).name))
    if call is None:
        return
    dy, dstate = cotangents(op, call, rng, np.float32)
    half = vjp(op, call, dy, dstate)
    single = vjp(op, widened(call, np.dtype(np.float32)), dy, dstate)
    for argument in half:
        for h, s, v in zip(leaves(half[argument]), leaves(single[argument]), leaves(call[argument]), strict=True):
            assert h.dtype == v.dtype, f"gradient of {argument} is {h.dtype}"
            with quiet():
                assert np.array_equal(h, s.astype(h.dtype), equal_nan=True), f"gradient of {argument} is not float32's, rounded once"


@each_gradient
def test_gradients_in_single_and_double_precision_agree(name):
    """Float32 is as near to longdouble as float64 is, times the ratio of their roundoffs (and a factor for luck)."""
    op, rng = OPS[name], generator("gradient precision", name)
    for combo in [richest(op), *combos(op, rng)[:4]]:
        call = rounded(op.contract, draw(op, rng, small(op, 9), combo), precision("float32"))
        dy, dstate = cotangents(op, call, rng, np.float32)
        wide = [None if v is None else v.astype(np.result_type(v.dtype, np.float64)) for v in leaves(dy)]
        wide_dstate = None if dstate is None else _mapped(lambda v: v.astype(np.result_type(v.dtype, np.float64)), dstate)
        single = vjp(op, call, dy, dstate)
        double = vjp(op, widened(call, np.dtype(np.float64)), tuple(wide) if isinstance(dy, tuple) else wide[0], wide_dstate)
        for argument in single:
            for s, d in zip(leaves(single[argument]), leaves(double[argument]), strict=True):
                if d.size:
                    scale = np.max(abs(d)) + 1
                    assert np.max(abs(s - d)) <= np.sqrt(np.finfo(np.float32).eps) * scale, (
                        f"gradient of {argument} in float32 at {_shown(combo)}"
                    )


# -- shapes ----------------------------------------------------------------------------------------------------------


def _batched(op):
    return "batch" in inspect.signature(op.sample).parameters


@each_op
def test_arguments_without_batch_axes_are_broadcast(name):
    """One argument shared by the whole batch gives what copies of it give; its gradient is the sum over the batch."""
    op, rng = OPS[name], generator("broadcast", name)
    if not _batched(op):
        return
    call = draw(op, rng, small(op, 5, batch=(2, 3)), richest(op))
    for array, value, put in op.contract.entries(call):
        if not any(s.batched for s in array.shapes) or value.shape[:2] != (2, 3):
            continue
        others = [v for v in leaves(list(call.values())) if isinstance(v, np.ndarray) and v is not value]
        if not any(v.shape[:2] == (2, 3) for v in others):
            continue  # nothing else has the batch
        one = value[:1, :1]
        copies = put(np.broadcast_to(one, value.shape))
        shared = [one, *([one[0, 0], one[0]] if len(array.shapes) == 1 and array is not op.contract.inputs[0] else [])]
        right, limit = run(op, op.definition, copies), named(op, op.error_bound(**copies, unit=2.0**-53), copies)
        for form, less in itertools.product(op.forms, shared):
            got = run(op, op.forms[form].function, put(less), form)
            for output in right if got else ():
                if output.startswith("state") and not op.forms[form].stabilised:
                    continue
                worst = excess(got[output], right[output], 2 * limit[output] + tiny_of("float64"))
                assert worst <= 1, f"{form}: {output} with {array.name} of shape {less.shape}"
        name, _, index = array.name.rstrip("]").partition("[")
        if op.gradient is not None and name in differentiable(op, call):
            dy, dstate = cotangents(op, copies, rng)
            wide = widened(copies, np.dtype(np.longdouble))
            own = lambda gradient, name=name, index=index: gradient[name][int(index)] if index else gradient[name]
            total = own(vjp(op, wide, dy, dstate)).sum(axis=(0, 1))
            for less in shared:
                got = own(vjp(op, widened(put(less), np.dtype(np.longdouble)), dy, dstate))
                assert got.shape == less.shape
                assert np.max(abs(got.reshape(total.shape) - total), initial=0) <= 2.0**-52 * (1 + np.max(abs(total), initial=0)), (
                    array.name
                )


@each_op
def test_a_batch_is_so_many_calls(name):
    op, rng = OPS[name], generator("batch", name)
    if not _batched(op):
        return
    call = draw(op, rng, small(op, 5, batch=(3,)), richest(op))
    call = each_array(np.copy, call)
    kinds = {a.name: a for a in op.contract.arrays}
    for form in op.forms:
        whole = run(op, op.forms[form].function, call, form)
        if whole is None:
            continue
        limit = named(op, op.error_bound(**call, unit=2.0**-53), call)
        for i in range(3):

            def pick(n, v, i=i):
                if isinstance(v, tuple) and hasattr(v, "_fields"):
                    names = [a.name for a in op.contract.states] if n == "state" else [n] * len(v)
                    return type(v)(*(pick(m, p) for m, p in zip(names, v, strict=True)))
                batched = (
                    n in kinds and any(s.batched and v.ndim >= len(s.axes) + 1 for s in kinds[n].shapes)
                    if isinstance(v, np.ndarray)
                    else False
                )
                return v[i] if batched and v.shape[0] == 3 else v

            one = run(op, op.forms[form].function, {n: pick(n, v) for n, v in call.items()}, form)
            for output in whole:
                if whole[output].shape[:1] == (3,) and one[output].shape == whole[output].shape[1:]:
                    lim = limit[output][i] if np.ndim(limit[output]) == whole[output].ndim else limit[output]
                    assert excess(one[output], whole[output][i], 2 * lim + tiny_of("float64")) <= 1, f"{form}: {output} of batch {i}"


@each_op
def test_two_dimensional_inputs_are_one_head(name):
    op, rng = OPS[name], generator("one head", name)
    letters = {axis.rstrip("?") for a in op.contract.arrays for s in a.shapes for axis in s.axes if axis.endswith("?")}
    if not letters:
        return
    known = inspect.signature(op.sample).parameters
    assert letters <= set(known), f"{name}: the sample must take the letters of the heads, {letters}"
    for combo in [richest(op), *combos(op, rng)]:
        call = draw(op, rng, small(op, 5) | dict.fromkeys(letters, 1), combo)
        arrays = {n: v for n, v in call.items() if n in {a.name.partition(".")[0] for a in op.contract.arrays}}
        heads = {n: axis for letter in letters for n, axis in op.contract.axis(letter, **arrays).items() if _optional(op, n, letter)}

        def squeeze(n, v, heads=heads):
            if isinstance(v, tuple) and hasattr(v, "_fields"):
                return type(v)(*(squeeze(a.name, p) for a, p in zip(op.contract.states, v, strict=True)))
            return np.squeeze(v, heads[n]) if n in heads else v

        flat = {n: squeeze(n, v) for n, v in call.items()}
        limit = named(op, op.error_bound(**call, unit=2.0**-53), call)
        assert np.ndim(flat[op.contract.arrays[0].name]) == np.ndim(call[op.contract.arrays[0].name]) - 1
        for form in op.forms:
            with_heads, without = run(op, op.forms[form].function, call, form), run(op, op.forms[form].function, flat, form)
            for output in with_heads or ():
                axis = next((a for letter in letters for n, a in _axes_of(op, letter).items() if n == output), None)
                expected = with_heads[output] if axis is None else np.squeeze(with_heads[output], axis)
                lim = limit[output] if axis is None or np.ndim(limit[output]) < 1 else np.squeeze(limit[output], axis)
                assert excess(without[output], expected, 2 * lim + tiny_of("float64")) <= 1, f"{form}: {output}"
        if op.gradient is not None:
            dy, dstate = cotangents(op, flat, rng, np.float64)
            gradients = vjp(op, flat, dy, dstate)
            for argument in gradients:
                for g, v in zip(leaves(gradients[argument]), leaves(flat[argument]), strict=True):
                    assert g.shape == v.shape, f"gradient of {argument}"


def _optional(op, name, letter):
    array = next(a for a in op.contract.arrays if a.name == name)
    return any(axis == letter + "?" for s in array.shapes for axis in s.axes)


def _axes_of(op, letter):
    """Where a head letter stands in results and states, counted from the end."""
    found = {}
    for array in (*op.contract.results, *op.contract.states):
        axes = [a.rstrip("?") for a in array.shapes[0].axes]
        if letter in axes:
            found[array.name] = axes.index(letter) - len(axes)
    return found


@each_op
def test_results_have_the_shapes_of_the_contract(name):
    op = OPS[name]
    arrays = {a.name.partition(".")[0] for a in op.contract.arrays}
    for label, call in plan(name):
        sizes, batch = op.contract.sizes(**{n: v for n, v in call.items() if n in arrays})
        with quiet():
            got = named(op, op.definition(**call), call)
        shapes = op.contract.result_shapes(_Defaults(sizes), batch)
        for result, shape in zip(op.contract.results, shapes, strict=True):
            if result.name in got and None not in shape:
                assert got[result.name].shape == shape, f"{result.name} at {label}"


class _Defaults(dict):
    """A letter that no argument has (a result's own) may be anything."""

    def __missing__(self, letter):
        return _Anything()


class _Anything(int):
    def __sub__(self, other):
        return self

    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


# -- precisions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.longdouble], ids=lambda d: np.dtype(d).name)
@each_form
def test_results_have_the_precision_of_the_arguments(name, form, dtype):
    op = OPS[name]
    for combo in [richest(op), *combos(op, generator(name))[:3]]:
        call = widened(draw(op, generator(name, form), small(op, 5), combo), np.dtype(dtype))
        got = run(op, op.forms[form].function, call, form)
        for output, value in (got or {}).items():
            if value.dtype.kind not in "iub":
                assert value.dtype in (np.dtype(dtype), np.result_type(dtype, np.complex64)), f"{output} is {value.dtype}"


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn], ids=lambda d: np.dtype(d).name)
@each_form
def test_half_precisions_are_float32_rounded_once(name, form, dtype):
    """The results are rounded at the end, and only then; states are not."""
    op = OPS[name]
    call = draw(op, generator(name), small(op, 5), richest(op))
    call = rounded(op.contract, call, precision(np.dtype(dtype).name))
    if call is None or any(isinstance(v, np.ndarray) and v.dtype.kind == "c" for v in leaves(list(call.values()))):
        return
    half, single = (run(op, op.forms[form].function, c, form) for c in (call, widened(call, np.dtype(np.float32))))
    for output in half or ():
        if half[output].dtype.kind in "iub":
            continue
        if output.startswith("state"):
            assert half[output].dtype == np.float32, f"{output} is {half[output].dtype}"
            assert np.array_equal(half[output], single[output], equal_nan=True)
        else:
            assert half[output].dtype == np.dtype(dtype), f"{output} is {half[output].dtype}"
            with quiet():
                assert np.array_equal(half[output], single[output].astype(dtype), equal_nan=True), (
                    f"{output} is not float32's, rounded once"
                )


@each_op
def test_two_different_half_precisions_give_float32(name):
    op = OPS[name]
    call = rounded(op.contract, draw(op, generator(name), small(op, 4), {}), precision("float16"))
    arrays = differentiable(op, widened(call, np.dtype(np.float32)))
    if len(arrays) < 2 or any(v.dtype.kind == "c" for v in call.values() if isinstance(v, np.ndarray)):
        return
    call[arrays[1]] = _mapped(lambda v: v.astype(ml_dtypes.bfloat16), call[arrays[1]])
    got = run(op, op.definition, call)
    assert all(v.dtype == np.float32 for v in got.values() if v.dtype.name in HALF or v.dtype.kind == "f")


@each_op
def test_integers_and_wide_states_do_not_promote(name):
    """Float32 stays float32 beside integer arrays of the same values, and a state in float64."""
    op = OPS[name]
    call = rounded(op.contract, draw(op, generator(name), small(op, 5), richest(op)), precision("float32"))
    floats = differentiable(op, call)
    real = [(a.name, v, put) for a, v, put in op.contract.entries(call) if a.argument in floats and v.dtype.kind == "f"]
    for argument, value, put in real if len(real) > 1 else ():
        whole = np.rint(value)
        try:
            single = run(op, op.definition, put(whole))
        except ValueError:
            continue  # integers are outside this argument's domain
        got = run(op, op.definition, put(whole.astype(np.int64)))
        for output in got:
            assert got[output].dtype == single[output].dtype, f"{output} is {got[output].dtype} with an integer {argument}"
            assert np.array_equal(got[output], single[output], equal_nan=True), f"{output} with an integer {argument}"
    if op.stateful:
        wide = widened({"state": call["state"]}, np.dtype(np.float64))
        for output, value in run(op, op.definition, call | wide).items():
            assert value.dtype.kind in "iub" or np.finfo(value.dtype).dtype == np.float32, f"{output} is {value.dtype} with a float64 state"


@each_op
def test_python_scalars_do_not_promote(name):
    op = OPS[name]
    call = rounded(op.contract, draw(op, generator(name), small(op, 5), richest(op)), precision("float32"))
    for array in op.contract.inputs:
        if call.get(array.name) is not None and any(s.axes == () and not s.batched for s in array.shapes) and array.kind != "bool":
            for value in (1.0, 1, np.float64(1.0)):
                got = run(op, op.definition, call | {array.name: value})
                assert all(v.dtype == np.float32 for v in got.values() if v.dtype.kind == "f"), f"{array.name}={value!r}"


# -- inputs are left alone -------------------------------------------------------------------------------------------


def _frozen(call):
    def freeze(v):
        if isinstance(v, tuple) and hasattr(v, "_fields"):
            return type(v)(*map(freeze, v))
        if isinstance(v, np.ndarray):
            v = v.copy()
            v.flags.writeable = False
        return v

    return {n: freeze(v) for n, v in call.items()}


@each_form
def test_inputs_are_never_written(name, form):
    op, rng = OPS[name], generator("frozen", name)
    for combo in [richest(op), *combos(op, rng)]:
        call = draw(op, rng, small(op, 6), combo)
        before, function = copy.deepcopy(call), op.forms[form].function
        got, frozen = run(op, function, call, form), run(op, function, _frozen(call), form)
        for n in call:
            assert all(
                np.array_equal(a, b) for a, b in zip(leaves(call[n]), leaves(before[n]), strict=True) if isinstance(a, np.ndarray)
            ), n
        for output in got or ():
            assert np.array_equal(got[output], frozen[output], equal_nan=True)


@each_form
def test_results_are_not_views_of_inputs(name, form):
    """Whoever writes into a result must not change what went in."""
    op = OPS[name]
    for T in (0, 1, 5):
        call = draw(op, generator(name), small(op, T), richest(op))
        got = run(op, op.forms[form].function, call, form)
        given = [v for value in call.values() for v in leaves(value) if isinstance(v, np.ndarray) and v.size]
        for output, value in (got or {}).items():
            assert not any(np.shares_memory(value, v) for v in given), f"{output} shares memory with an argument at T = {T}"


@each_gradient
def test_gradients_leave_inputs_alone(name):
    op, rng = OPS[name], generator("frozen gradient", name)
    call = draw(op, rng, small(op, 5), richest(op))
    dy, dstate = cotangents(op, call, rng, np.float64)
    seeds = (
        _frozen({"dy": leaves(dy)[0]})
        if not isinstance(dy, tuple)
        else {"dy": tuple(None if v is None else _frozen({"v": v})["v"] for v in dy)}
    )
    got, again = vjp(op, _frozen(call), seeds["dy"], None if dstate is None else _frozen({"s": dstate})["s"]), vjp(op, call, dy, dstate)
    for n in got:
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(leaves(got[n]), leaves(again[n]), strict=True))


VIEWS = {
    "fortran order": lambda v: np.asfortranarray(v) if v.ndim else v,
    "every other element": lambda v: np.repeat(v, 2, axis=-1)[..., ::2] if v.ndim else v,
    "reversed": lambda v: np.flip(np.flip(v).copy()),
    "stride 0": lambda v: np.broadcast_to(v[..., :1], v.shape) if v.ndim and v.shape[-1] else v,
}


@pytest.mark.parametrize("view", VIEWS)
@each_form
def test_strides_do_not_matter(name, form, view):
    op = OPS[name]
    call = draw(op, generator(name), small(op, 7, batch=(2,)), richest(op))
    strided = each_array(VIEWS[view], call)
    packed = each_array(np.copy, strided)
    got, right = (run(op, op.forms[form].function, c, form) for c in (strided, packed))
    limit = named(op, op.error_bound(**packed, unit=2.0**-53), packed)
    for output in got or ():
        assert excess(got[output], right[output], 2 * limit[output] + tiny_of("float64")) <= 1, output


# -- bad input -------------------------------------------------------------------------------------------------------


def refused(op, function, call, *words, errors=(ValueError, TypeError)):
    """The call must raise an error that names the operator and (one of) the arguments."""
    try:
        function(**call)
    except errors as error:
        said = str(error)
        assert op.name in said, f"the message does not name {op.name}: {said}"
        assert any(re.search(rf"\b{re.escape(w)}(?!\w)", said) for w in words), f"the message names none of {words}: {said}"
    else:
        pytest.fail(f"{op.name} took {words[0]} without an error")


def _functions(op):
    return [f.function for f in op.forms.values()]


@each_op
def test_wrong_ranks_are_refused(name):
    op = OPS[name]
    call = draw(op, generator(name), {}, richest(op))
    for array, value, put in op.contract.entries(call):
        ranks = {len(s.axes) for s in array.shapes}
        fewest = min(ranks) - any(a.endswith("?") for s in array.shapes for a in s.axes)
        if fewest >= 1:
            bad = value.reshape(-1)[:1].reshape([1] * (fewest - 1))
            for function in _functions(op):
                refused(op, function, put(bad), array.name, errors=ValueError)
        if not any(s.batched for s in array.shapes) and max(ranks) + 1 not in ranks:
            for function in _functions(op):
                refused(
                    op,
                    function,
                    put(value.reshape([1] * (max(ranks) + 1 - value.ndim) + list(value.shape))),
                    array.name,
                    errors=ValueError,
                )


@each_op
def test_sizes_that_differ_are_refused(name):
    """Every letter that two arrays share: one more in one of them."""
    op = OPS[name]
    call = draw(op, generator(name), {}, richest(op))
    arrays = {n: v for n, v in call.items() if n in {a.name.partition(".")[0] for a in op.contract.arrays}}
    sizes, _ = op.contract.sizes(**arrays)
    for letter in sizes:
        axes = {n: a for n, a in op.contract.axis(letter, **arrays).items() if "." not in n}
        if len(axes) < 2 or any(letter in rule.split() for rule in op.contract.rules):
            continue
        state = [(a, call[a.name], lambda new: call | {"state": new}) for a in op.contract.states if a.name in axes]
        for array, value, put in [*op.contract.entries(call), *state]:
            axis = axes.get(array.argument)
            if axis is not None:
                longer = np.concatenate([value, value.take([0], axis=axis)], axis=axis)
                refused(op, op.definition, put(longer), *axes)


@each_op
def test_batch_axes_that_do_not_broadcast_are_refused(name):
    op = OPS[name]
    if not _batched(op):
        return
    call = draw(op, generator(name), small(op, 3, batch=(2,)), richest(op))
    batched = [
        (a.name, value, put) for a, value, put in op.contract.entries(call) if any(s.batched and value.ndim > len(s.axes) for s in a.shapes)
    ]
    for _, value, put in batched if len(batched) > 1 else ():
        if value.shape[:1] == (2,):
            refused(op, op.definition, put(np.concatenate([value, value[:1]])), *(name for name, _, _ in batched), errors=ValueError)


@each_op
def test_counts_that_do_not_divide_are_refused(name):
    op = OPS[name]
    known = inspect.signature(op.sample).parameters
    for rule in op.contract.rules:
        a, verb, b = re.fullmatch(r"(\w+) (divides|at most|at least) (\w+)", rule).groups()
        if verb != "divides" or not {a, b} <= set(known):
            continue
        good = draw(op, generator(name), {a: 2, b: 4}, {})
        axes = op.contract.axis(b, **{n: v for n, v in good.items() if n in {x.name for x in op.contract.arrays}})
        bad = good | {n: good[n].take(range(3), axis=axis) for n, axis in axes.items()}
        refused(op, op.definition, bad, a, *axes, errors=ValueError)


NOT_NUMBERS = {
    "strings": lambda v: v.astype("U4"),
    "objects": lambda v: np.full(v.shape, "x", dtype=object),
    "dates": lambda v: np.zeros(v.shape, "M8[D]"),
    "a string": lambda v: "no array",
    "a dict": lambda v: {"no": "array"},
    "ragged lists": lambda v: [[1.0], [1.0, 2.0]],
}


@pytest.mark.parametrize("kind", NOT_NUMBERS)
@each_op
def test_what_is_no_number_is_refused(name, kind):
    op = OPS[name]
    call = draw(op, generator(name), {}, richest(op))
    for array, value, put in op.contract.entries(call):
        refused(op, op.definition, put(NOT_NUMBERS[kind](np.asarray(value))), array.name)


@each_op
def test_missing_and_unknown_arguments_are_refused(name):
    op = OPS[name]
    required, _, _ = parameters(op)
    call = draw(op, generator(name), {}, richest(op))
    arrays = {a.name.partition(".")[0] for a in op.contract.arrays}
    for function in _functions(op):
        refused(op, function, call | {"no_such_option": 1}, "no_such_option", errors=TypeError)
        for n in required:
            refused(op, function, {k: v for k, v in call.items() if k != n}, n, errors=TypeError)
            if n in arrays:
                refused(op, function, call | {n: None}, n)


@each_op
def test_masks_are_boolean_and_indices_integer(name):
    op = OPS[name]
    call = draw(op, generator(name), {}, richest(op))
    for array in op.contract.inputs:
        if call.get(array.name) is not None and array.kind in ("bool", "int"):
            refused(op, op.definition, call | {array.name: call[array.name].astype(np.float64)}, array.name, errors=TypeError)


@each_op
def test_options_have_their_values(name):
    """An option that takes words or numbers refuses a word that is none of them, by name."""
    op = OPS[name]
    call = draw(op, generator(name), {}, richest(op))
    for option, values in op.options.items():
        if option in {a.name for a in op.contract.arrays} or all(isinstance(v, bool) for v in values):
            continue
        for bad in ("no such value", object()):
            refused(op, op.definition, call | {option: bad}, option)


@each_gradient
def test_cotangents_of_the_wrong_shape_are_refused(name):
    op, rng = OPS[name], generator(name)
    call = draw(op, rng, {}, richest(op))
    dy, dstate = cotangents(op, call, rng, np.float64)
    takes = inspect.signature(op.gradient).parameters
    given = {n: v for n, v in call.items() if n in takes}
    first = next(v for v in leaves(dy) if v is not None)
    refused(op, op.gradient, given | {"dy": np.zeros((*first.shape, 2))}, "dy", errors=ValueError)
    refused(op, op.gradient, given | {"dy": np.full(first.shape, "x")}, "dy")
    if dstate is not None:
        bad = np.zeros((*leaves(dstate)[0].shape, 2))
        wrong = type(dstate)(bad, *dstate[1:]) if isinstance(dstate, tuple) else bad
        refused(op, op.gradient, given | {"dy": dy, "dstate": wrong}, "dstate", errors=ValueError)


# -- error bounds ----------------------------------------------------------------------------------------------------


@each_op
def test_the_bound_has_the_structure_of_the_results(name):
    op = OPS[name]
    for label, call in plan(name):
        with quiet():
            got, limit = named(op, op.definition(**call), call), named(op, op.error_bound(**call, unit=2.0**-53), call)
        assert got.keys() == limit.keys()
        for output in got:
            lim = np.asarray(limit[output])
            assert np.broadcast_shapes(lim.shape, got[output].shape) == got[output].shape, f"{output} at {label}"
            fine = np.broadcast_to(np.isfinite(got[output]), got[output].shape)
            assert np.all(np.isfinite(np.broadcast_to(lim, got[output].shape)[fine])), f"{output} at {label}: the bound is not finite"
            assert np.all(lim[~np.isnan(lim)] >= 0), f"{output} at {label}: the bound is negative"


@pytest.mark.parametrize("unit", [2.0**-24, 2.0**-53], ids=["float32", "float64"])
@each_op
def test_the_bound_sees_through_disguises(name, unit):
    """Zeros, a flipped sign, swapped and copied rows, and half a thousandth off must not pass as rounding."""
    op = OPS[name]
    call = draw(op, generator(name), {}, richest(op))
    with quiet():
        right = named(op, op.definition(**call), call)
        limit = named(op, op.error_bound(**call, unit=unit), call)
    for output, value in right.items():
        if value.dtype.kind in "iub":
            continue
        disguises = {"zeros": 0 * value, "sign": -value, "a factor of 1.0005": value * (1 + 5e-4)}
        if value.ndim > 1 and value.shape[-2] > 1:
            disguises["swapped rows"] = value[..., ::-1, :]
            disguises["one row for all"] = np.broadcast_to(value[..., :1, :], value.shape)
        for disguise, wrong in disguises.items():
            assert excess(wrong, value, limit[output]) > 1, f"{output}: the bound takes {disguise} for rounding"


@each_op
def test_the_bound_grows_with_the_unit(name):
    """Proportionally, or it would hide a constant."""
    op = OPS[name]
    call = draw(op, generator(name), {}, richest(op))
    with quiet():
        one, two = (named(op, op.error_bound(**call, unit=u), call) for u in (2.0**-24, 2.0**-23))
    for output in one:
        assert np.all(two[output] <= 2.001 * np.asarray(one[output])), output
        assert np.all(two[output] >= 1.999 * np.asarray(one[output])), output


# -- documentation ---------------------------------------------------------------------------------------------------

SECTIONS = ("Parameters", "Returns", "Raises", "Notes", "Examples")


def _has(doc: str, section: str) -> bool:
    return re.search(rf"^ *{section}\n *-+$", doc, re.MULTILINE) is not None


@each_op
def test_the_definition_is_documented(name):
    op = OPS[name]
    doc = inspect.getdoc(op.definition) or ""
    missing = [s for s in SECTIONS if not _has(doc, s)]
    assert not missing, f"{name} lacks {', '.join(missing)}"
    section = doc.split("Returns\n")[0]
    for parameter in inspect.signature(op.definition).parameters:
        assert re.search(rf"^(\w+, )*\*?\*?{parameter}(, \w+)* : ", section, re.MULTILINE), f"{name}: {parameter} is not documented"
    assert ">>>" in doc


@each_gradient
def test_the_gradient_is_documented(name):
    doc = inspect.getdoc(OPS[name].gradient) or ""
    missing = [s for s in ("Parameters", "Returns") if not _has(doc, s)]
    assert not missing, f"{name}_vjp lacks {', '.join(missing)}"
    assert re.search(r"^dy : ", doc, re.MULTILINE)


@each_form
def test_each_form_says_why_it_is_equal(name, form):
    assert len((OPS[name].forms[form].function.__doc__ or "").split()) >= 15


@each_op
def test_each_bound_says_why_it_holds(name):
    assert len((OPS[name].error_bound.__doc__ or "").split()) >= 15


@pytest.mark.parametrize("chapter", [c for c in chapters() if hasattr(importlib.import_module(c), "OPS")])
def test_each_chapter_has_its_parts(chapter):
    doc = importlib.import_module(chapter).__doc__ or ""
    for part in ("\nGlossary\n", "\nReferences\n"):
        assert part in doc, f"{chapter} has no {part.strip()}"
    assert re.search(r"^    \S.*=", doc, re.MULTILINE), f"{chapter} has no displayed equation"
    assert re.search(r"^    \[1\] ", doc, re.MULTILINE), f"{chapter} cites nothing"
    cited = {int(n) for n in re.findall(r"\[(\d+)(?:\]|, [a-z])", doc.split("\nReferences\n")[0])}
    listed = {int(n) for n in re.findall(r"^    \[(\d+)\] ", doc, re.MULTILINE)}
    assert cited <= listed, f"{chapter} cites {cited - listed}, which it does not list"


@pytest.mark.parametrize("public", [n for n, f in public_names().items() if callable(f) and not isinstance(f, type)])
def test_public_functions_are_documented(public):
    doc = inspect.getdoc(public_names()[public]) or ""
    assert len(doc.split()) >= 8, f"refimpl.{public} has no docstring worth the name"
    if not public.endswith("_vjp"):
        assert ">>>" in doc, f"refimpl.{public} has no example"


@each_op
def test_records_are_complete(name):
    op = OPS[name]
    assert op.references
    assert op.summary
    assert op.laws, f"{name} has no law"
    assert chapter_of(name)
    required, optional, options = parameters(op)
    arrays = {a.name.partition(".")[0] for a in op.contract.arrays}
    sample = op.sample(generator(name))
    for n in [*required, *optional]:
        assert n not in arrays or sample.get(n) is not None, f"{name}: the sample lacks {n}"
    assert not op.stateful or sample.get("state") is not None, f"{name}: the sample lacks a state"
    for option in options:
        if option not in ("rng",):
            assert option in op.options or option in op.contract.__class__.__name__, f"{name}: no values of the option {option} are covered"
    for form in op.forms.values():
        cost = form.cost(**_sizes(op), batch=2)
        assert cost.work >= 0
        assert cost.depth >= 0
        assert cost.peak >= 0


def _sizes(op):
    arrays = {a.name.partition(".")[0] for a in op.contract.arrays}
    call = draw(op, generator(op.name), {}, richest(op))
    return op.contract.sizes(**{n: v for n, v in call.items() if n in arrays})[0]
