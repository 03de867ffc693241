"""A pytest plugin: checks as tests, one for each class of case.

Installed with the package, it adds a fixture, a marker and two options, and loads nothing until a test asks for them::

    @pytest.mark.refimpl("attention", dtypes=["float32", "bfloat16"])
    def test_my_attention(refimpl_check):
        refimpl_check(my_attention)

is one check and as many tests as there are classes of case in each precision, ``test_my_attention[float32-hard]`` for one,
and ``test_my_attention[verdict]``. Without the marker, ``refimpl_check("attention", my_attention)`` is the whole check in
one test. What both do, `refimpl.check` and `refimpl.Report.part` do for other test runners.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from refimpl.conformance.report import Report

_VERDICT = "verdict"
_done = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("refimpl", "checks against refimpl's references")
    group.addoption("--refimpl-level", choices=("quick", "standard", "exhaustive"), help="the level of checks whose tests name none")
    group.addoption("--refimpl-reports", metavar="DIR", help="write a page and a JSON file of every check that does not conform")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "refimpl(operator, candidate=None, **settings): a check, as a test for each class of case; settings as refimpl.check takes them")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("refimpl")
    if marker is None or "refimpl_check" not in metafunc.fixturenames:
        return
    from refimpl.conformance.cases import CLASSES

    dtypes = marker.kwargs.get("dtypes", ("float64", "float32"))
    classes = [c for c in CLASSES if c != "gradients" or marker.kwargs.get("gradients")]
    parts = [*((dtype, klass) for dtype in dtypes for klass in classes), None]
    ids = ["-".join(part) if part else _VERDICT for part in parts]
    metafunc.parametrize("refimpl_check", parts, ids=ids, indirect=True)


@pytest.fixture
def refimpl_check(request: pytest.FixtureRequest) -> Any:
    """A function that checks a candidate, and fails the test with the report unless it conforms.

    ``refimpl_check(operator, candidate, **settings)``; or, in a test marked ``refimpl(operator, ...)``,
    ``refimpl_check(candidate)``. It returns the report.
    """
    marker = request.node.get_closest_marker("refimpl")
    part = getattr(request, "param", None)

    def check(*arguments: Any, **settings: Any) -> "Report":
        __tracebackhide__ = True
        given = marker.args if marker is not None else ()
        if len(given) + len(arguments) != 2:
            raise TypeError("refimpl_check takes an operator and a candidate, of which the marker refimpl may give the first or both")
        report = _checked(request.config, *given, *arguments, **{**(marker.kwargs if marker is not None else {}), **settings})
        shown = report if part is None else report.part(*part)
        if part is not None and not any(c.status != "NOT_APPLICABLE" for c in shown.cases):
            pytest.skip("no such case" if not shown.cases else "not applicable")
        if shown.failures or (part is None and not shown.ok):
            pytest.fail(str(shown), pytrace=False)
        return shown

    return check


def _checked(config: pytest.Config, operator: str, candidate: Any, **settings: Any) -> "Report":
    """The report of a check, which is made once in a session."""
    import refimpl

    if config.getoption("--refimpl-level"):
        settings.setdefault("level", config.getoption("--refimpl-level"))
    done = config.stash.setdefault(_done, {})
    key = repr((operator, candidate, sorted(settings.items())))
    if key not in done:
        done[key] = candidate, refimpl.check(operator, candidate, **settings)  # the candidate is kept, lest another be given its address
        _write(config, done[key][1], len(done))
    return done[key][1]


def _write(config: pytest.Config, report: "Report", number: int) -> None:
    folder = config.getoption("--refimpl-reports")
    if folder and not report.ok:
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        worker = getattr(config, "workerinput", {}).get("workerid", "")
        name = "-".join(filter(None, [report.operator, "".join(ch if ch.isalnum() else "_" for ch in report.candidate)[-40:], worker, str(number)]))
        (place / f"{name}.html").write_text(report.to_html(), encoding="utf-8")
        (place / f"{name}.json").write_text(report.to_json(), encoding="utf-8")
