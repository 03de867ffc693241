"""Every known public implementation (`public.py`) that is installed, held against the reference."""

import datetime
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from refimpl.conformance.check import check
from refimpl.conformance.domain import Domain
from refimpl.conformance.public import IMPLEMENTATIONS, Implementation

Progress = Callable[[int, int, str], None]


@dataclass
class Row:
    """What the survey found about one implementation.

    Attributes
    ----------
    verdict : str
        That of the report, or "not installed", or "not run" with a message.
    cases, not_applicable : int
    worst : str
        The first failure, in one line.
    as_expected : bool
        True where there is nothing to report: the expected verdict, or nothing installed.
    """

    operator: str
    package: str
    version: str
    function: str
    framework: str
    dtypes: tuple[str, ...]
    gradients: bool
    verdict: str
    expected: str
    reason: str
    cases: int = 0
    not_applicable: int = 0
    seconds: float = 0.0
    worst: str = ""
    diagnosis: tuple[str, ...] = ()
    not_checked: tuple[str, ...] = ()

    @property
    def as_expected(self) -> bool:
        return self.verdict in (self.expected, "not installed")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"as_expected": self.as_expected, "date": datetime.date.today().isoformat()}


def survey(
    operators: Iterable[str] | None = None,
    packages: Iterable[str] | None = None,
    *,
    level: str = "quick",
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Row]:
    """Check every known implementation that is installed.

    Parameters
    ----------
    operators, packages : iterable of str, optional
        Only these.
    level, seed
        As in `refimpl.check`.
    progress : callable, optional
        ``progress(done, total, label)``, called before each.

    Returns
    -------
    list of Row
        In the order of `IMPLEMENTATIONS`; implementations of operators that the catalogue does not have are left out.
    """
    return list(rows(operators, packages, level=level, seed=seed, progress=progress))


def rows(operators=None, packages=None, *, level="quick", seed=0, progress: Progress | None = None) -> Iterator[Row]:
    """The same, one by one as they are found."""
    chosen = selected(operators, packages)
    for done, implementation in enumerate(chosen):
        if progress is not None:
            progress(done, len(chosen), f"{implementation.package} {implementation.function}")
        yield examine(implementation, level=level, seed=seed)
    if progress is not None:
        progress(len(chosen), len(chosen), "")


def selected(operators: Iterable[str] | None = None, packages: Iterable[str] | None = None) -> list[Implementation]:
    """The implementations of operators that the catalogue has."""
    from refimpl.catalogue import catalogue

    wanted = set(catalogue()) if operators is None else set(operators) & set(catalogue())
    sources = None if packages is None else set(packages)
    return [i for i in IMPLEMENTATIONS if i.operator in wanted and (sources is None or i.package in sources)]


def examine(implementation: Implementation, *, level: str = "quick", seed: int = 0) -> Row:
    """Check one implementation."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would tell, once each, which fast kernels it does without
    i = implementation
    row = Row(i.operator, i.package, i.version, i.function, i.framework, i.dtypes, i.gradients, "not installed", i.expected, i.reason)
    if i.missing:
        return row
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            candidate = i.build()
            domain = Domain(**i.domain) if i.domain else None
            report = check(
                i.operator, candidate, framework=i.framework, dtypes=i.dtypes, gradients=i.gradients, domain=domain, level=level, seed=seed
            )
        except Exception as error:  # a package that does not import, or has changed: a row, not the survey's end
            row.verdict, row.worst = "not run", f"{type(error).__name__}: {error}".splitlines()[0]
            row.seconds = time.perf_counter() - start
            return row
    row.verdict = report.verdict
    row.not_applicable = sum(c.status == "NOT_APPLICABLE" for c in report.cases)
    row.cases = len(report.cases) - row.not_applicable
    row.seconds = time.perf_counter() - start
    row.diagnosis, row.not_checked = tuple(report.diagnosis), tuple(report.not_checked)
    worst = report.worst if report.failures else None
    if worst is not None:
        row.worst = f"{worst.status} {worst.id} {worst.dtype}: {worst.message}"
    elif report.verdict == "inconclusive":
        row.worst = report.reason
    return row
