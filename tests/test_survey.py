"""The survey of public implementations: what is expected of each is what the kit finds."""

import pytest

import refimpl
from refimpl.conformance import survey
from refimpl.conformance.examples import wrong_attention
from refimpl.conformance.public import IMPLEMENTATIONS, Implementation

HERE = survey.selected()


def name(implementation):
    return f"{implementation.operator}-{implementation.package}-{implementation.function}"


@pytest.mark.parametrize("implementation", [i for i in HERE if i.package in ("scipy", "onnx")], ids=name)
def test_small_packages(implementation):
    if implementation.missing:
        pytest.skip(f"{implementation.missing} is not installed")
    row = survey.examine(implementation)
    assert row.as_expected, row
    assert row.cases > 20


@pytest.mark.peers
@pytest.mark.parametrize("implementation", [i for i in HERE if i.package not in ("scipy", "onnx")], ids=name)
def test_peers(implementation):
    if implementation.missing:
        pytest.skip(f"{implementation.missing} is not installed")
    row = survey.examine(implementation)
    assert row.as_expected, row
    assert row.cases > 20


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=name)
def test_records_are_complete(implementation):
    assert implementation.expected in ("conforms", "deviates", "wrong")
    assert bool(implementation.reason) == (implementation.expected != "conforms")
    refimpl.Domain(**implementation.domain)


def test_what_is_missing_is_a_row():
    absent = Implementation(operator="linear_recurrence", package="nowhere", function="f", build=lambda: None, needs=("no_such_module",))
    row = survey.examine(absent)
    assert row.verdict == "not installed"
    assert row.as_expected


def test_what_does_not_import_is_a_row():
    def build():
        raise AttributeError("module 'nowhere' has no attribute 'f'")

    row = survey.examine(Implementation(operator="linear_recurrence", package="nowhere", function="f", build=build, framework="numpy"))
    assert row.verdict == "not run"
    assert not row.as_expected
    assert "no attribute" in row.worst


def test_what_is_wrong_is_not_as_expected():
    twice = Implementation(operator="linear_recurrence", package="nowhere", function="f", build=lambda: lambda a, b: 2 * b, framework="numpy")
    row = survey.examine(twice)
    assert row.verdict == "wrong"
    assert not row.as_expected
    assert row.worst


def test_the_example_is_wrong_and_named():
    report = refimpl.check("attention", wrong_attention, level="quick")
    assert report.verdict == "wrong"
    assert "gqa_modulo" in report.diagnosis[0]
    assert refimpl.check("attention", wrong_attention, level="quick", domain=refimpl.Domain(Hq=3, Hkv=3)).ok
