"""The ledger as a page: every claim with its verdict, what was computed, and what is so. Computed when the page is made."""

from collections.abc import Iterator
from pathlib import Path

import prose

MARKS = {"holds": "✓", "holds if": "~", "false": "✗", "not measured": "?", "out of scope": "·"}


def write(folder: Path) -> None:
    """Write claims.md, where the room of the ledger exists."""
    try:
        from refimpl.complexity.claims import results
    except ImportError:
        return
    text = claims_page(list(results()))
    path = folder / "claims.md"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def claims_page(found: list) -> str:
    counts = {verdict: sum(r.verdict == verdict for r in found) for verdict in MARKS}
    said = ", ".join(f"{MARKS[verdict]} {verdict}: {count}" for verdict, count in counts.items() if count)
    parts = [
        "---\norphan: true\n---\n\n# All claims\n",
        f"{len(found)} claims of articles and papers, computed when this page was made. {said}. [How to read it](essays/ledger.md).\n",
    ]
    for section in dict.fromkeys(r.claim.section for r in found):
        parts.append(f"## {prose.escape(section)}\n")
        parts += [_claim(r) for r in found if r.claim.section == section]
    return "\n".join(parts)


def _claim(result) -> str:
    claim = result.claim
    lines = [
        f"(claim-{claim.id})=\n**{MARKS[result.verdict]} {result.verdict}** · {prose.inline(claim.says)}",
        *(f"If {prose.inline(condition)}." for condition in result.conditions),
        f"→ {prose.inline(result.statement)}",
        *(f"Documents disagree: {prose.inline(text)}" for text in result.disagreements),
        f"::::{{dropdown}} {claim.id}: what was computed\n\n" + "\n\n".join(_details(result)) + "\n\n::::",
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


def _details(result) -> Iterator[str]:
    from refimpl.complexity.claims.page import shown
    from refimpl.complexity.claims.sources import SOURCES

    claim = result.claim
    cited = []
    for source in claim.sources:
        key, _, place = source.partition(",")
        cited.append(SOURCES[key] + (f",{place}" if place else ""))
    yield f"Sources: {prose.inline('; '.join(cited))}. Checked by {prose.inline(claim.check)}."
    if result.comparisons:
        rows = ["| | computed | | claimed | |", "|---|---|---|---|---|"]
        for c in result.comparisons:
            says = prose.inline(result.numbers[c.key].says + (f" (if {c.given})" if c.given else ""))
            relation = {"<=": "≤", ">=": "≥", "<": "\\<", ">": "\\>"}.get(c.relation, c.relation)
            rows.append(f"| {'✓' if c.holds else '✗'} | {shown(c.computed)} | {relation} | {shown(c.claimed)} | {says} |".replace("\n", " "))
        yield ":::{div} wide\n\n" + "\n".join(rows) + "\n\n:::"
    numbers = list(result.numbers.values())
    if numbers:
        rows = ["| number | |", "|---|---|"]
        rows += [f"| {shown(n.value)} {prose.escape(n.unit)} | {prose.inline(n.says)} |".replace("\n", " ") for n in numbers]
        yield ":::{div} wide\n\n" + "\n".join(rows) + "\n\n:::"
    for m in result.measured:
        yield prose.escape(f"Measured: {m.implementation}, {m.seconds:.3g} s, {m.device}, driver {m.driver}, {m.date}.")
    for o in result.opened:
        yield prose.escape(f"Open, {o.verdict}: {o.part}. It would take {o.needs}.")
