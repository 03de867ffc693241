"""The kit's two numbers: how many wrong implementations it catches, how many right ones it accuses."""

import functools

import pytest

import refimpl
from refimpl.conformance.mutants import mutants

pytestmark = pytest.mark.meta
DTYPES = ("float32", "bfloat16")
MUTANTS = mutants()
FORMS = [(op, form) for op in refimpl.OPS for form in refimpl.OPS[op].forms]


def refusing(function):
    """A ValueError of a form that cannot express an option, as a candidate says it."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            raise NotImplementedError(str(error)) from error

    return call


def examine(mutant, dtype, seed=0, level="standard"):
    op = refimpl.OPS[mutant.operator]
    if mutant.of_gradient:
        return refimpl.check(op, op.definition, dtypes=[dtype], gradients=True, candidate_vjp=refusing(mutant.function), level=level, seed=seed)
    return refimpl.check(op, refusing(mutant.function), dtypes=[dtype], level=level, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.operator}-{m.name}")
def test_every_mutant_is_caught(mutant, dtype, tally):
    if dtype in mutant.hidden:
        pytest.skip(f"cannot show in {dtype}: {mutant.says}")
    report = examine(mutant, dtype)
    named = any(f"`{mutant.name}`" in line for line in report.diagnosis)
    tally("mutants", dtype, caught=report.verdict in ("wrong", "deviates"), named=named)
    assert report.verdict in ("wrong", "deviates"), str(report)


@pytest.mark.parametrize("operator, form", FORMS, ids=lambda x: str(x))
def test_no_form_is_accused(operator, form, tally):
    op = refimpl.OPS[operator]
    gradients = form == next(iter(op.forms)) and op.gradient is not None
    report = refimpl.check(
        op, refusing(op.forms[form].function), dtypes=["float64", "float32", "bfloat16"], gradients=gradients, candidate_vjp=op.gradient if gradients else None
    )
    tally("forms", "all", accused=not report.ok)
    assert report.ok, str(report)
