"""Laws must be able to fail: each constructor, and each law of each operator, catches a planted mistake.

A law that nothing breaks proves nothing. For the constructors of `refimpl.laws` the mistake is made to measure, one that
violates this law and no other; a chapter's own laws must catch at least one of a set of general damages, each of which an
implementation could have suffered.
"""

import functools
import inspect

import numpy as np
import pytest

import refimpl
from refimpl import laws
from refimpl.conformance.cases import Support, draw, factors, parameters
from refimpl.conformance.domain import Domain
from refimpl.core.contract import Contract
from refimpl.op import Law

OPS = refimpl.OPS
CONTRACT = Contract("leaky_sum", takes="a (c) | (..., T, c); x (..., T, c); state (..., c)", gives="y (..., T, c)")


# -- constructors ----------------------------------------------------------------------------------------------------


def right(a, x, *, state=None, return_state=False):
    """y_t = a_t y_{t-1} + x_t, written without the contract: laws see implementations from outside."""
    y = np.zeros(x.shape[:-2] + x.shape[-1:]) if state is None else state
    ys = []
    for t in range(x.shape[-2]):
        y = (a if a.ndim == 1 else a[..., t, :]) * y + x[..., t, :]
        ys.append(y)
    out = np.stack(ys, axis=-2) if ys else x.copy()
    return (out, y) if return_state else out


def bound(a, x, *, state=None, return_state=False):
    size = right(abs(a), abs(x), state=None if state is None else abs(state), return_state=True)
    y, last = (1e-13 * v for v in size)
    return (y, last) if return_state else y


def changed(change):
    """The right one, with its result (not its state) changed."""

    def f(a, x, *, state=None, return_state=False):
        y, last = right(a, x, state=state, return_state=True)
        y = change(a, x, y)
        return (y, last) if return_state else y

    return f


def forgets_the_state(a, x, *, state=None, return_state=False):
    return right(a, x, state=None, return_state=return_state)


def returns_an_older_state(a, x, *, state=None, return_state=False):
    y, last = right(a, x, state=state, return_state=True)
    last = y[..., -2, :] if x.shape[-2] > 1 else last
    return (y, last) if return_state else y


def adds_the_state_twice(a, x, *, state=None, return_state=False):
    return right(a, x, state=None if state is None else 2 * state, return_state=return_state)


def nudged(y, at, by=1e-9):
    y = y.copy()
    y[..., at : at + 1, :] += by[..., None, :] if np.ndim(by) else by
    return y


# The mistakes that a law must see; each is small or subtle, none changes shape or makes NaN.
PLANTED = {
    "carries_nan": {
        "NaN becomes 0": changed(lambda a, x, y: np.nan_to_num(y)),
        "the largest of it and a bound": changed(lambda a, x, y: np.fmax(y, -1e3)),
        "bad steps are left out": lambda a, x, *, state=None, return_state=False: right(a, np.where(np.isnan(x), 0, x), state=state, return_state=return_state),
    },
    "causal": {
        "a mean over the whole sequence is subtracted": changed(lambda a, x, y: y - 1e-6 * x.mean(axis=-2, keepdims=True)),
        "the last input reaches the first output": changed(lambda a, x, y: nudged(y, 0, 1e-9 * x[..., -1, :] if x.shape[-2] else 0)),
        "one step ahead": changed(lambda a, x, y: np.concatenate([y[..., 1:, :], y[..., -1:, :]], axis=-2)),
        "normalised by the largest decay of all times": changed(lambda a, x, y: y / np.max(a, axis=-2, keepdims=True)),
    },
    "hand_off": {
        "the state is ignored": forgets_the_state,
        "the state of one step before is returned": returns_an_older_state,
        "the state counts twice": adds_the_state_twice,
        "the first step is special": changed(lambda a, x, y: nudged(y, 0)),
        "time is counted from the start of the call": changed(lambda a, x, y: y * (1 + 1e-9 * np.arange(y.shape[-2])[:, None])),
    },
    "linear": {
        "squared": changed(lambda a, x, y: y * y),
        "a constant is added": changed(lambda a, x, y: y + 1e-6),
        "cut at 3": changed(lambda a, x, y: np.clip(y, -3, 3)),
        "absolute value": changed(lambda a, x, y: abs(y)),
        "epsilon under a root": changed(lambda a, x, y: y * np.sqrt(1 + 1e-6 / (1 + y * y))),
    },
    "time_invariant": {
        "weights depend on the position": changed(lambda a, x, y: y * (1 + 1e-9 * np.arange(y.shape[-2])[:, None])),
        "the first step is special": changed(lambda a, x, y: nudged(y, 0)),
        "circular": changed(lambda a, x, y: y + 1e-6 * np.roll(x, 2, axis=-2)),
        "the length counts": changed(lambda a, x, y: y * (1 + 1e-9 * y.shape[-2])),
        "reset every fourth step": changed(lambda a, x, y: np.where(np.arange(y.shape[-2])[:, None] % 4 == 0, x, y)),
    },
}
LAWS = {
    "carries_nan": laws.carries_nan(CONTRACT, "a", "x"),
    "causal": laws.causal(CONTRACT, "a", "x"),
    "hand_off": laws.hand_off(CONTRACT),
    "linear": laws.linear(CONTRACT, "x", "state"),
    "time_invariant": laws.time_invariant(CONTRACT, "x"),
}
CONSTRUCTORS = [
    n
    for n, f in vars(laws).items()
    if inspect.isfunction(f) and not n.startswith("_") and inspect.signature(f).return_annotation in (Law, "Law")
]


def violations(law, f, call, bound, seed=0) -> list[str]:
    said = []
    for what, got, want, tolerance in law.holds(f, call, bound, np.random.default_rng(seed)):
        assert np.shape(got) == np.shape(want), what
        with np.errstate(invalid="ignore", over="ignore"):
            wrong = ~(abs(np.asarray(got) - want) <= tolerance) & ~((got == want) | (np.isnan(got) & np.isnan(want)))
        if np.any(wrong):
            said.append(what)
    return said


def a_call(T=9, batch=(2,)):
    rng = np.random.default_rng(T)
    return {"a": rng.uniform(0.5, 1, (*batch, T, 3)), "x": rng.standard_normal((*batch, T, 3)), "state": rng.standard_normal((*batch, 3))}


def test_every_constructor_has_planted_mistakes():
    assert set(CONSTRUCTORS) == set(PLANTED) == set(LAWS)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("T", [1, 2, 3, 9, 16])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_a_law_accuses_nobody_who_is_right(name, T, batch):
    assert not violations(LAWS[name], right, a_call(T, batch), bound)
    without = {n: v for n, v in a_call(T, batch).items() if n != "state"}
    assert not violations(LAWS[name], right, without, bound)


@pytest.mark.parametrize(("name", "mistake"), [(n, m) for n in PLANTED for m in PLANTED[n]])
def test_a_law_catches_its_planted_mistakes(name, mistake):
    assert violations(LAWS[name], PLANTED[name][mistake], a_call(), bound), f"{name} does not see: {mistake}"


@pytest.mark.parametrize("name", LAWS)
def test_a_law_says_something(name):
    """Comparisons are made, of arrays with elements, and not of an array with itself."""
    made = list(LAWS[name].holds(right, a_call(), bound, np.random.default_rng(0)))
    assert made
    assert any(np.size(got) for _, got, _, _ in made)
    assert not any(got is want for _, got, want, _ in made)


@pytest.mark.parametrize("name", LAWS)
def test_a_law_leaves_the_call_alone(name):
    call = a_call()
    before = {n: v.copy() for n, v in call.items()}
    list(LAWS[name].holds(right, call, bound, np.random.default_rng(0)))
    assert call.keys() == before.keys()
    assert all(np.array_equal(call[n], before[n]) for n in call)


# -- the laws of the catalogue ---------------------------------------------------------------------------------------


def _each(change):
    """A damage done to every floating result (states included), inside tuples too."""

    def apply(value):
        if isinstance(value, tuple):
            return type(value)(*map(apply, value)) if hasattr(value, "_fields") else tuple(map(apply, value))
        return change(value) if isinstance(value, np.ndarray) and value.dtype.kind in "fc" and value.size else value

    def damage(f):
        @functools.wraps(f)
        def broken(**call):
            return apply(f(**call))

        return broken

    return damage


def _each_integer(change):
    """The same to every result of integers: indices, counts."""

    def damage(f):
        @functools.wraps(f)
        def broken(**call):
            got = f(**call)
            several = isinstance(got, tuple) and not hasattr(got, "_fields")
            parts = [change(v) if isinstance(v, np.ndarray) and v.dtype.kind in "iu" else v for v in (got if several else (got,))]
            return tuple(parts) if several else parts[0]

        return broken

    return damage


def _without(argument):
    def damage(f):
        @functools.wraps(f)
        def broken(**call):
            return f(**{n: v for n, v in call.items() if n != argument})

        return broken

    return damage


def _with(argument, change):
    def damage(f):
        @functools.wraps(f)
        def broken(**call):
            value = call.get(argument)
            if isinstance(value, np.ndarray) and value.dtype.kind in "fc":
                call = call | {argument: change(value)}
            return f(**call)

        return broken

    return damage


def _in_field(argument, field, change):
    def damage(f):
        @functools.wraps(f)
        def broken(**call):
            value = call.get(argument)
            if value is not None:
                call = call | {argument: value._replace(**{field: change(getattr(value, field))})}
            return f(**call)

        return broken

    return damage


def _along(axis):
    def ramp(v):
        if v.ndim < -axis:
            return v * 1.001
        shape = [1] * v.ndim
        shape[axis] = -1
        return v * (1 + 1e-3 * np.arange(v.shape[axis])).reshape(shape)

    return ramp


def _shift(v):
    return np.roll(v, -1, axis=-2) if v.ndim > 1 else np.roll(v, -1)


def damages(op, call) -> dict:
    found = {
        "results squared": _each(lambda v: v * v + 1),
        "a constant added": _each(lambda v: v + 0.1),
        "twice the results": _each(lambda v: 2 * v),
        "rows shifted": _each(_shift),
        "rows in another order": _each(lambda v: v[..., ::-1, :] if v.ndim > 1 else v[::-1]),
        "a ramp over rows": _each(_along(-2)),
        "a ramp over columns": _each(_along(-1)),
        "centred": _each(lambda v: v - v.mean(axis=tuple(range(v.ndim))[-2:], keepdims=True)),
        "transposed columns": _each(lambda v: v[..., ::-1]),
        "no NaN": _each(np.nan_to_num),
        "counts of one more": _each_integer(lambda v: v + 1),
    }
    required = {p.name for p in inspect.signature(op.definition).parameters.values() if p.default is p.empty}
    for n, v in call.items():
        if n not in required and n != "return_state":
            found[f"{n} ignored"] = _without(n)
        for field in getattr(v, "_fields", ()):
            found[f"{n}.{field} doubled"] = _in_field(n, field, lambda u: 2 * u)
            found[f"{n}.{field} moved"] = _in_field(n, field, lambda u: u + 1)
            found[f"{n}.{field} ignored"] = _in_field(n, field, lambda u: 0 * u)
        if isinstance(v, np.ndarray):
            found[f"{n} shifted"] = _with(n, _shift if v.ndim else (lambda u: u + 1))
            found[f"{n} doubled"] = _with(n, lambda u: 2 * u)
            found[f"{n} moved"] = _with(n, lambda u: u + (0.1 + 0.2j if u.dtype.kind == "c" else 0.25) if u.dtype.kind in "fc" else u)
            found[f"{n} cut"] = _with(n, lambda u: np.clip(u.real, -0.5, 0.5) if u.dtype.kind == "f" else u / (1 + abs(u)))
            found[f"{n} centred"] = _with(n, lambda u: u - u.mean() if u.size else u)
            found[f"{n}, a ramp over rows"] = _with(n, _along(-2))
            found[f"{n}, a ramp over columns"] = _with(n, _along(-1))
            found[f"{n}, its first axis reversed"] = _with(n, lambda u: u[::-1] if u.ndim else u)
    return found


@pytest.mark.parametrize(
    ("name", "law"),
    [(n, law) for n, op in OPS.items() for law in op.laws],
    ids=lambda v: v if isinstance(v, str) else f"{v.name}({', '.join(v.arguments)})",
)
def test_every_law_of_the_catalogue_can_fail(name, law):
    op = OPS[name]
    rng = np.random.default_rng([ord(c) for c in name + law.name])
    everything = {n: True for n in factors(op, Support(), Domain()) if n not in parameters(op)[2]} | {"return_state": False}
    known = inspect.signature(op.sample).parameters
    call = draw(op, rng, {x: 9 for x in op.lengths if x in known}, everything)
    limit = functools.partial(op.error_bound, unit=2.0**-53)
    caught = []
    with np.errstate(all="ignore"):
        assert not violations(law, op.definition, call, limit), f"{name} breaks its own law {law.name}"
        for damage, build in damages(op, call).items():
            try:
                if violations(law, build(op.definition), call, limit):
                    caught.append(damage)
            except (ValueError, TypeError, IndexError, AssertionError):
                continue  # the damaged one refuses the call: that would be seen, but proves nothing of the law
    assert caught, f"{name}: nothing breaks the law {law.name}"
