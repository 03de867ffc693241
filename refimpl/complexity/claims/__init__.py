"""The ledger: what articles and papers of the field claim, each claim with the computation that decides it.

A section is a module with a list `CLAIMS`; a claim is a `Claim` with the numbers claimed and a function that computes the
same numbers. No verdict is written down: `Result.verdict` follows from comparing the two.

    >>> from refimpl.complexity.claims import ledger
    >>> result = ledger()["kv-70b"].run()
    >>> result.verdict
    'false'
    >>> result.value("GiB")
    40.0
"""

import difflib
import functools
import importlib
from collections.abc import Iterable, Iterator, Mapping

from refimpl.complexity.claims.record import VERDICTS, Claim, Result

SECTIONS = ("attention", "tiling", "kv", "linear", "ssm", "mamba", "xlstm", "hybrids", "experts", "quantization", "recall", "headline")
__all__ = ("SECTIONS", "VERDICTS", "Claim", "Result", "ledger", "results", "unknown")


@functools.cache
def ledger() -> Mapping[str, Claim]:
    """Every claim by its id, section by section."""
    found: dict[str, Claim] = {}
    for section in SECTIONS:
        for claim in importlib.import_module(f"refimpl.complexity.claims.{section}").CLAIMS:
            if claim.id in found:
                raise ValueError(f"ledger: {claim.id} stands there twice, the second time in {section}")
            found[claim.id] = claim
    return found


def results(ids: Iterable[str] | None = None) -> Iterator[Result]:
    """Compute claims, all of them by default, one after the other.

    Raises
    ------
    ValueError
        If there is no claim of an id; the message lists those that come near.
    """
    chosen = list(ledger() if ids is None else ids)
    for name in chosen:
        if name not in ledger():
            raise ValueError(unknown(name))
    for name in chosen:
        yield ledger()[name].run()


def unknown(name: str) -> str:
    """What to say of an id that is none."""
    lower = {known.lower(): known for known in ledger()}
    near = [lower[found] for found in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.4)]
    near = near or [known for known in ledger() if name.lower() in known.lower()][:3]
    return f"no claim is called {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else "; `refimpl claims` lists them")
