"""A report as one self-contained HTML page."""

import html

from refimpl.conformance.report import Report


def page(report: Report) -> str:
    """The report's text and a table of its cases; no script, nothing loaded from elsewhere."""
    rows = "".join(
        f"<tr class='{'pass' if c.status == 'PASS' else 'skip' if c.status == 'NOT_APPLICABLE' else 'fail'}'>"
        f"<td>{html.escape(c.status)}</td><td>{html.escape(c.dtype)}</td><td>{html.escape(c.id)}</td><td>{html.escape(c.message)}</td></tr>"
        for c in sorted(report.cases, key=lambda c: c.status == "PASS")
    )
    title = html.escape(f"{report.operator}: {report.candidate} - {report.verdict}")
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body{{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#1b1b1b}}
pre{{background:#f6f6f4;padding:1rem;overflow-x:auto}}table{{border-collapse:collapse;width:100%}}
td{{padding:.2rem .6rem;border-bottom:1px solid #ddd;vertical-align:top}}.fail td:first-child{{color:#b00020;font-weight:600}}
.pass td:first-child{{color:#1a7f37}}.skip{{color:#777}}</style></head>
<body><h1>{title}</h1><pre>{html.escape(str(report))}</pre><h2>Cases</h2><table>{rows}</table></body></html>"""
