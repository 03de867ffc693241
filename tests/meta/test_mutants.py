"""The kit's two numbers: how many wrong implementations it catches, how many right ones it accuses."""

import functools

import pytest

import refimpl
from refimpl.conformance.mutants import mutants

DTYPES = ("float32", "bfloat16")
SEEDS = (0, *(pytest.param(seed, marks=pytest.mark.thorough) for seed in (1, 2)))
MUTANTS = mutants()


def spread(items, every):
    """Test parameters: one in so many by default, all of them by `pytest tests/meta --run thorough`."""
    return [pytest.param(item, marks=() if i % every == 0 else pytest.mark.thorough) for i, item in enumerate(items)]


FORMS = [(op, form) for op in refimpl.OPS for form, f in refimpl.OPS[op].forms.items() if f.stabilised]


def refusing(function):
    """A ValueError of a form that cannot express an option, as a candidate says it."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            raise NotImplementedError(str(error)) from error

    return call


def examine(mutant, dtype, **settings):
    op = refimpl.OPS[mutant.operator]
    if mutant.of_gradient:
        return refimpl.check(op, op.definition, dtypes=[dtype], gradients=True, candidate_vjp=refusing(mutant.function), **settings)
    return refimpl.check(op, refusing(mutant.function), dtypes=[dtype], **settings)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mutant", spread(MUTANTS, 4), ids=lambda m: f"{m.operator}-{m.name}")
def test_every_mutant_is_caught(mutant, dtype, seed, tally):
    which = f"{dtype}, seed {seed}"
    if dtype in mutant.hidden:
        tally("mutants", which, hidden=True)
        return
    report = examine(mutant, dtype, fail_fast=True, seed=seed)
    tally("mutants", which, caught=bool(report.failures))
    assert report.failures, str(report)


@pytest.mark.parametrize("mutant", spread(MUTANTS, 40), ids=lambda m: f"{m.operator}-{m.name}")
def test_verdict_and_diagnosis(mutant, tally):
    """The verdict of a whole check; how often the diagnosis names the mistake is counted."""
    if "float32" in mutant.hidden:
        return
    report = examine(mutant, "float32")
    tally("diagnoses", "float32", named=any(f"`{mutant.name}`" in line for line in report.diagnosis))
    assert report.verdict in (("deviates", "wrong") if mutant.variant else ("wrong",)), str(report)


@pytest.mark.parametrize("operator, form", FORMS, ids=str)
def test_no_form_is_accused_at_a_glance(operator, form, tally):
    report = refimpl.check(operator, refusing(refimpl.OPS[operator].forms[form].function), dtypes=["float32"], level="quick")
    tally("forms", "quick", accused=not report.ok)
    assert report.ok, str(report)


@pytest.mark.thorough
@pytest.mark.parametrize("operator, form", FORMS, ids=str)
def test_no_form_is_accused(operator, form, tally):
    op = refimpl.OPS[operator]
    gradients = form == next(iter(op.forms)) and op.gradient is not None
    vjp = op.gradient if gradients else None
    report = refimpl.check(op, refusing(op.forms[form].function), dtypes=["float64", "float32", "bfloat16"], gradients=gradients, candidate_vjp=vjp)
    tally("forms", "all", accused=not report.ok)
    assert report.ok, str(report)
