"""What a report says reproduces a failure, does: run as it stands, with the candidate's name bound and nothing else."""

import functools
import importlib.util

import numpy as np
import pytest

import refimpl
from refimpl.conformance.mutants import mutants

HOW = {"level": "quick", "dtypes": ["float32"]}


def wrong_beyond_20(a, b, *, state=None, reverse=False, return_state=False):
    found = refimpl.linear_recurrence(a, b, state=state, reverse=reverse, return_state=True)
    y = found[0].copy()
    y[..., 20:, :] *= y.dtype.type(1.5)
    return (y, found[1]) if return_state else y


def wrong_if_strided(a, b, **options):
    return refimpl.linear_recurrence(a, b if b.flags.c_contiguous else 2 * b, **options)


def always_backwards(a, b):
    return refimpl.linear_recurrence(a, 2 * b, reverse=True)


def wants_two_axes(a, b):
    if b.ndim != 3 or b.shape[-2] % 8 or b.shape[-1] != 16:
        raise ValueError("(batch, 8 T, 16) only")
    return refimpl.linear_recurrence(a, 1.5 * b)


def time_first(q, k, v):
    """(batch, time, heads, features)"""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return (np.float32(1.5) * refimpl.attention(q, k, v)).swapaxes(1, 2)


CASES = [
    ("linear_recurrence", wrong_beyond_20, {}),
    ("linear_recurrence", wrong_beyond_20, {"dtypes": ["bfloat16"]}),
    ("linear_recurrence", wrong_beyond_20, {"dtypes": ["float64"], "domain": refimpl.Domain(T=[64, 128], c=range(16, 40, 8), batch=[(2,), (3,)])}),
    ("linear_recurrence", wrong_if_strided, {}),
    ("linear_recurrence", always_backwards, {"domain": refimpl.Domain(options={"reverse": [True]})}),
    ("linear_recurrence", wants_two_axes, {"domain": refimpl.Domain(T=refimpl.multiple_of(8), c=16)}),
    ("attention", time_first, {"layout": "bthd"}),
]


@pytest.mark.parametrize(("op", "candidate", "more"), CASES, ids=lambda x: getattr(x, "__name__", None))
def test_a_snippet_reproduces_its_failure(op, candidate, more):
    report = refimpl.check(op, candidate, **{**HOW, **more})
    tried = {}
    for result in filter(None, [report.smallest, *report.failures]):
        if result.snippet and result.status == "NUMERIC":
            kind = (result.klass, "recall(" in result.snippet, "given(" in result.snippet)
            tried.setdefault(kind, result)
    assert tried
    for result in tried.values():
        names = {candidate.__name__: candidate}
        exec(result.snippet, names)
        got, expected = (x[0] if isinstance(x, tuple) else x for x in (names["got"], names["expected"]))
        if more.get("layout"):
            got = got.swapaxes(1, 2) if got.ndim == 4 else got
        off = np.abs(np.asarray(got).astype(np.float64) - np.asarray(expected).astype(np.float64))
        assert off.max() > 1e-3 * np.abs(np.asarray(expected).astype(np.float64)).max(), f"{result.id}\n{result.snippet}"


def wrong_gradient(dy, a, b, **options):
    found = refimpl.linear_recurrence_vjp(dy, a, b, **options)
    return found | {"a": 1.5 * found["a"]}


def backwards(a, b):
    return refimpl.linear_recurrence(a, b, reverse=True)


def wrong_gradient_backwards(dy, a, b):
    return wrong_gradient(dy, a, b, reverse=True)


@pytest.mark.parametrize(
    ("candidate", "vjp", "more"),
    [
        (refimpl.linear_recurrence, wrong_gradient, {}),
        (backwards, wrong_gradient_backwards, {"domain": refimpl.Domain(options={"reverse": [True]}, batch=[(2,)])}),
    ],
)
def test_a_snippet_reproduces_a_wrong_gradient(candidate, vjp, more):
    report = refimpl.check("linear_recurrence", candidate, level="quick", dtypes=["float32"], gradients=True, candidate_vjp=vjp, **more)
    assert {"recall_gradient(" in f.snippet for f in report.failures} == {True, False}
    for failure in report.failures:
        names = {candidate.__name__: candidate, vjp.__name__: vjp}
        exec(failure.snippet, names)
        assert not np.array_equal(names["got"]["a"], names["expected"]["a"]), failure.snippet
        np.testing.assert_array_equal(names["got"]["a"], 1.5 * names["expected"]["a"])


@pytest.mark.parametrize("id", ["gradients[T=5, #99999]", "gradients[T=5]"])
def test_no_such_trial_of_gradients(id):
    from refimpl.conformance.trial_gradients import recall_gradient

    with pytest.raises(ValueError, match="recall_gradient: linear_recurrence has no trial 'gradients"):
        recall_gradient("linear_recurrence", id, dtype="float32", level="quick")


@pytest.mark.peers
def test_a_snippet_for_the_gradient_of_torch():
    torch = pytest.importorskip("torch")

    def forgets_a(a, b):
        h, out = torch.zeros_like(b[..., 0, :]), []
        for t in range(b.shape[-2]):
            h = a[..., t, :].detach() * h + b[..., t, :]
            out.append(h)
        return torch.stack(out, -2) if out else b + 0 * a

    report = refimpl.check("linear_recurrence", forgets_a, framework="torch", dtypes=["float64"], gradients=True, level="quick")
    shown = next(f for f in report.failures if f.klass == "gradients" and f.snippet)
    names = {"forgets_a": forgets_a}
    exec(shown.snippet, names)
    assert not np.array_equal(names["got"]["a"], names["expected"]["a"])


@pytest.mark.peers
def test_a_snippet_for_torch():
    torch = pytest.importorskip("torch")

    def half_again(a, b):
        return torch.ones(())

    report = refimpl.check("linear_recurrence", half_again, framework="torch", dtypes=["bfloat16"], level="quick", fail_fast=True)
    names = {"half_again": half_again}
    exec(report.failures[0].snippet, names)
    assert isinstance(names["there"]["b"], torch.Tensor)


def test_torch_is_said_where_it_is_meant():
    if importlib.util.find_spec("torch"):
        pytest.skip("torch is installed: the test above")
    from refimpl.conformance.snippet import snippet

    op = refimpl.OPS["linear_recurrence"]
    text = snippet(op, "f", {"a": np.ones(1), "b": np.ones((1, 1))}, ["a", "b"], [], "", "h", "framework='torch', device='cuda'")
    assert "there = given('linear_recurrence', call, framework='torch', device='cuda')" in text
    assert 'got = f(there["a"], there["b"])' in text


def first_mistake(op):
    return next(m for m in mutants(op) if not m.of_gradient and not m.variant and "float64" not in m.hidden)


def results(x):
    return [r for part in x for r in results(part)] if isinstance(x, tuple) else [np.asarray(x)]


@pytest.mark.parametrize("dtype", ["float64", pytest.param("bfloat16", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("op", [pytest.param(op, marks=() if i % 5 == 0 else pytest.mark.thorough) for i, op in enumerate(refimpl.OPS)])
def test_what_a_report_prints_runs_as_it_stands(op, dtype):
    """For one mistake of every operator: the snippet needs NumPy and the package, and shows a wrong result beside the right one."""
    mistake = first_mistake(op)

    @functools.wraps(mistake.function)
    def candidate(*args, **kwargs):
        try:
            return mistake.function(*args, **kwargs)
        except ValueError as error:
            raise NotImplementedError(str(error)) from error

    candidate.__name__ = candidate.__qualname__ = "candidate"
    report = refimpl.check(op, candidate, level="quick", dtypes=[dtype])
    assert "longdouble" not in str(report)
    shown = [r for r in (report.smallest, *report.failures) if r is not None and r.snippet][:3]
    assert shown, str(report)
    for result in shown:
        names = {"candidate": candidate}
        with np.errstate(all="ignore"):
            exec(result.snippet, names)
        got, expected = results(names["got"]), results(names["expected"])
        same = [np.array_equal(g, e, equal_nan=g.dtype.kind in "fc") for g, e in zip(got, expected, strict=False)]
        assert len(got) != len(expected) or not all(same), result.snippet


def test_options_are_written_as_python():
    from refimpl.conformance.snippet import snippet

    op = refimpl.OPS["linear_recurrence"]
    call = {
        "a": np.array([1 + 2j, complex(np.inf, 0)]),
        "limits": (0.0, np.inf),
        "eps": np.float64(0.1),
        "one": (np.longdouble(3),),
        "flag": np.bool_(True),
        "none": None,
    }
    names = {"f": lambda *args: None}
    exec("\n".join(snippet(op, "f", call, ["a"], [], "", "h", "").splitlines()[:-1]), names)
    assert names["call"]["limits"] == (0.0, np.inf) and names["call"]["one"] == (3.0,) and names["call"]["eps"] == 0.1
    assert names["call"]["flag"] is True and np.array_equal(names["call"]["a"], call["a"])
