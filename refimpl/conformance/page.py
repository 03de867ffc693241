"""A report as one self-contained HTML page: the diagnosis first, then where the errors are, how large, and how to see them oneself.

Pictures are drawn here, maps as PNG and histograms as SVG, so that a page needs neither a plotting library nor a network.
"""

import base64
import re
import struct
import zlib
from html import escape

import numpy as np

from refimpl.conformance.pictures import NONE, WILD, off
from refimpl.conformance.report import Report, Result, cells, shown

_MAPS = 3  # beside that of the smallest failing case
_ROWS = 400  # of the table of all cases
_VERDICTS = {"conforms": "conforms", "deviates": "deviates", "wrong": "is wrong", "inconclusive": "could not be judged"}


def page(report: Report) -> str:
    """The page; no script, nothing loaded from elsewhere."""
    parts = [
        _head(report),
        _diagnosis(report),
        _where(report),
        _smallest(report),
        _more_maps(report),
        _classes(report),
        _accuracy(report),
        _all(report),
        _settings(report),
    ]
    title = escape(f"{report.operator}: {report.candidate} {_VERDICTS[report.verdict]}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style></head>\n<body><main>\n'
        + "\n".join(filter(None, parts))
        + "\n</main></body></html>\n"
    )


# -- parts, in the order of the page -----------------------------------------------------------------------------------


def _head(report: Report) -> str:
    words = f"deviates: {report.variant}" if report.verdict == "deviates" else _VERDICTS[report.verdict]
    lines = [f"<p>{escape(report.counts())}</p>"]
    if report.verdict == "inconclusive" and report.why_not():
        lines.append(f"<p><strong>{escape(report.why_not())}</strong></p>")
    if report.not_checked:
        lines.append(f"<p class='soft'>Not checked: {escape(', '.join(report.not_checked))}.</p>")
    lines += [f"<p class='soft'>Note: {escape(note)}</p>" for note in report.notes]
    return (
        f"<header class='{report.verdict}'><p class='op'>{escape(report.operator)}</p>"
        f"<h1><code>{escape(report.candidate)}</code> <span class='verdict'>{escape(words)}</span></h1>{''.join(lines)}</header>"
    )


def _diagnosis(report: Report) -> str:
    if not any(r.picture for r in report.failures) and not report.diagnosis:
        return ""
    if not report.diagnosis:
        return "<section><h2>Diagnosis</h2><p>No known mistake gives these numbers.</p></section>"
    first, *others = report.diagnosis
    more = f"<ul>{''.join(f'<li>{_coded(d)}</li>' for d in others[:4])}</ul>" if others else ""
    return f"<section><h2>Diagnosis</h2><p class='first'>{_coded(first)}</p>{more}</section>"


def _where(report: Report) -> str:
    worst = report.widest()
    if worst is None:
        shown = report.worst if report.failures else None
        return "" if shown is None else f"<section><h2>What happens</h2>{_facts(shown)}</section>"
    title = "Where it differs" if report.verdict == "deviates" else "Where it is wrong"
    return f"<section><h2>{title}</h2>{_facts(worst)}{_map(worst)}{_close(worst)}</section>"


def _smallest(report: Report) -> str:
    small = report.smallest or (report.worst if report.failures else None)
    if small is None:
        return ""
    picture = _close(small) if small.picture and small is not report.widest() else ""
    facts = _facts(small) if small is not report.widest() else ""
    code = f"<h3>Reproduce it</h3><pre><code>{escape(small.snippet)}</code></pre>" if small.snippet else ""
    return f"<section><h2>The smallest case that fails</h2>{facts}{picture}{code}</section>" if code or picture else ""


def _more_maps(report: Report) -> str:
    shown = _others(report)
    if not shown:
        return ""
    figures = "".join(f"<div><h3>{escape(r.id)} <small>{escape(r.dtype)}</small></h3><p>{escape(_pattern(r))}</p>{_map(r, legend='')}</div>" for r in shown)
    return f"<section><h2>Other patterns</h2>{figures}</section>"


def _classes(report: Report) -> str:
    judged = [c for c in report.cases if c.status != "NOT_APPLICABLE"]
    dtypes, klasses = (list(dict.fromkeys(getattr(c, name) for c in report.cases)) for name in ("dtype", "klass"))
    rows = []
    for klass in klasses:
        cells = []
        for dtype in dtypes:
            here = [c for c in judged if (c.klass, c.dtype) == (klass, dtype)]
            bad = [c.status for c in here if c.status != "PASS"]
            if not here:
                cells.append("<td class='none'>–</td>")
                continue
            share = 100 * len(bad) / len(here)
            kinds = ", ".join(f"{bad.count(s)} {s}" for s in dict.fromkeys(bad))
            closest = max((c.ratio for c in here if c.status == "PASS"), default=0.0)
            says = kinds or (f"largest error {closest:.2g} of its bound" if closest else "")
            text = f"{len(bad)} of {len(here)} fail" if bad else f"{len(here)} pass"
            cells.append(f"<td class='{'bad' if bad else 'good'}'><span class='bar'><i style='width:{share:.0f}%'></i></span>{text}<small>{escape(says)}</small></td>")
        rows.append(f"<tr><th>{escape(klass)}</th>{''.join(cells)}</tr>")
    head = "".join(f"<th>{escape(d)}</th>" for d in dtypes)
    return f"<section><h2>By class of case</h2><div class='wide'><table class='classes'><tr><th></th>{head}</tr>{''.join(rows)}</table></div></section>"


def _accuracy(report: Report) -> str:
    found = report.accuracy()
    if not found:
        return ""
    figures = []
    for dtype, outputs in found.items():
        for name, a in outputs.items():
            numbers = f"half of the elements within {a['p50']:.3g}, 99 % within {a['p99']:.3g}, the largest {a['max']:.3g} ULP"
            figures.append(f"<figure><figcaption><b>{escape(name)}</b> in {escape(dtype)}, {a['elements']} elements</figcaption>{_histogram(a['histogram'])}<p>{numbers}</p></figure>")
    note = "Signed error in units in the last place of the right result. Large ones are no fault where terms cancel: the bound, not the ULP, decides."
    return f"<section><h2>Accuracy</h2><p class='soft'>{note}</p><div class='grid'>{''.join(figures)}</div></section>"


def _all(report: Report) -> str:
    order = {"PASS": 2, "NOT_APPLICABLE": 1}
    cases = sorted(report.cases, key=lambda c: order.get(c.status, 0))
    kinds = {"PASS": "good", "NOT_APPLICABLE": "none"}
    rows = "".join(
        f"<tr><td class='{kinds.get(c.status, 'bad')}'>{escape(c.status)}</td><td>{escape(c.dtype)}</td><td>{escape(c.id)}</td>"
        f"<td>{escape(c.message[:300])}{f' <small>{escape(c.pattern)}</small>' if c.pattern else ''}</td></tr>"
        for c in cases[:_ROWS]
    )
    rest = f"<p class='soft'>and {len(cases) - _ROWS} more, of which all pass or do not apply; the JSON report has them.</p>" if len(cases) > _ROWS else ""
    return f"<section><details><summary>All {len(cases)} cases</summary><div class='wide'><table>{rows}</table></div>{rest}</details></section>"


def _settings(report: Report) -> str:
    rows = "".join(f"<tr><th>{escape(str(k))}</th><td>{escape(', '.join(v) if isinstance(v, list) else str(v))}</td></tr>" for k, v in report.settings.items() if v is not None)
    return f"<section><details><summary>Settings</summary><table>{rows}</table></details></section>"


# -- a failure ---------------------------------------------------------------------------------------------------------


def _others(report: Report) -> list[Result]:
    """Failures with a map whose pattern is another one."""
    first = report.widest()
    seen = {_kind(first) if first else "", ""}
    found: list[Result] = []
    for r in sorted((r for r in report.failures if r.picture), key=cells, reverse=True):
        if _kind(r) not in seen and len(found) < _MAPS and cells(r) >= 32:
            seen.add(_kind(r))
            found.append(r)
    return found


def _kind(r: Result) -> str:
    """The pattern without what depends on the sizes of one case."""
    text = re.sub(r" \(.*?\)", "", r.pattern)
    return "every element" if re.match(r"(9\d|100)\.", text) else text


def _facts(r: Result) -> str:
    rows = [("case", f"<code>{escape(r.id)}</code> in {escape(r.dtype)}"), ("finding", f"<b>{escape(r.status)}</b>: {escape(r.message)}")]
    if r.index or r.got is not None:
        place = r.element()
        bound = f"; a right implementation is within {r.bound:.3g}" if r.bound else ""
        rows.append(("worst", f"<code>{escape(place)}</code> is <b>{escape(shown(r.got))}</b>, expected <b>{escape(shown(r.expected))}</b>{bound}"))
    if r.pattern:
        rows.append(("where", f"<b>{escape(_pattern(r))}</b>"))
    return f"<dl>{''.join(f'<dt>{k}</dt><dd>{v}</dd>' for k, v in rows)}</dl>"


def _pattern(r: Result) -> str:
    return f"wrong: {r.pattern}".replace("<=", "≤").replace(">=", "≥") if r.pattern else ""


def _map(r: Result, legend: str | None = None) -> str:
    if not r.picture:
        return ""
    rows, columns = r.picture["axes"]
    grid = np.array(r.picture["map"])
    if grid.size < 2:
        return ""
    if grid.shape[0] > 1.5 * grid.shape[1]:  # the longer axis lies
        grid, rows, columns = grid.T, columns, rows
    height, width = grid.shape
    cell = max(3, min(22, 880 // width, 460 // height))
    step = " and ".join(f"{a['step']} of {a['name']}" for a in (rows, columns) if a["step"] > 1)
    caption = f"Error over bound of {r.output}, the largest over the axes that are not shown" + (f"; a cell stands for {step}" if step else "")
    image = f"<img src='data:image/png;base64,{_png(colours(grid))}' width='{width * cell}' height='{height * cell}' alt='{escape(_pattern(r) or 'map of errors')}'>"
    down = f"<p class='axis'>{_axis(rows, '↓')}</p>" if height > 1 else ""
    return (
        f"<figure>{down}<div class='image'>{image}</div><p class='axis'>{_axis(columns, '→')}</p>{_LEGEND if legend is None else legend}"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _axis(axis: dict, arrow: str) -> str:
    return f"{escape(axis['name'] or 'index')} {arrow} <small>0 … {axis['size'] - 1}</small>"


def _close(r: Result) -> str:
    """The numbers around the worst element: what came over what was expected."""
    if not r.picture:
        return ""
    close, (rows, columns) = r.picture["close"], r.picture["axes"]
    if not close["rows"] or not close["columns"]:
        return ""
    across, down = escape(columns["name"]), escape(rows["name"])
    head = "".join(f"<th>{f'{across} = {j}' if across else ''}</th>" if n == 0 else f"<th>{j}</th>" for n, j in enumerate(close["columns"]))
    body = []
    for i, got, expected, ratio in zip(close["rows"], close["got"], close["expected"], close["ratio"], strict=True):
        cells = "".join(f"<td class='{'off' if _bad(q) else ''}'>{escape(g)}{f'<small>{escape(e)}</small>' if g != e or _bad(q) else ''}</td>" for g, e, q in zip(got, expected, ratio, strict=True))
        body.append(f"<tr><th>{f'{down} = ' if down and i == close['rows'][0] else ''}{i if down else ''}</th>{cells}</tr>")
    note = "Around the worst element: what came, and in small what was expected where it differs. Red is out of bounds."
    return f"<figure><div class='wide'><table class='close'><tr><th></th>{head}</tr>{''.join(body)}</table></div><figcaption>{note}</figcaption></figure>"


def _bad(ratio: str) -> bool:
    return not float(ratio) <= 1


def _coded(text: str) -> str:
    """Words between backquotes as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else p for i, p in enumerate(parts))


# -- drawing -----------------------------------------------------------------------------------------------------------

_FINE = np.array([[237, 242, 247], [178, 203, 222]])  # no error; just within the bound
_OFF = np.array([[255, 214, 102], [240, 120, 40], [190, 20, 40], [75, 5, 40]])  # just out of it, and further
_ODD = (170, 0, 200)
_LEGEND = (
    "<p class='legend'><i style='background:#edf2f7'></i>no error<i style='background:#b2cbde'></i>within the bound"
    "<i style='background:#ffd666'></i>just beyond<i style='background:#f07828'></i>100 ×<i style='background:#be1428'></i>10⁴ ×"
    "<i style='background:#4b0528'></i>10⁶ × and more<i style='background:#aa00c8'></i>NaN, infinite, or another integer</p>"
)


def colours(log: np.ndarray) -> np.ndarray:
    """Map log10(error / bound) to colours."""
    low = np.clip((log - NONE) / -NONE, 0, 1)[..., None]
    fine = _FINE[0] * (1 - low) + _FINE[1] * low
    at = np.clip(log / 2, 0, len(_OFF) - 1 - 1e-9)
    i, part = at.astype(int), (at % 1)[..., None]
    beyond = _OFF[i] * (1 - part) + _OFF[i + 1] * part
    found = np.where((log > 0)[..., None], beyond, fine)
    return np.where((log >= WILD)[..., None], _ODD, found).astype(np.uint8)


def _png(pixels: np.ndarray) -> str:
    """An image of (height, width, 3) bytes as base64."""
    height, width, _ = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")).decode()


def _histogram(counts: dict[str, int]) -> str:
    """Bars on a symmetric logarithmic axis, zero in the middle; heights by the square root, lest the few be invisible."""
    bins = {int(k): v for k, v in counts.items()}
    reach = max(12, min(80, max((abs(b) for b in bins), default=0)))
    width, height, base = 360.0, 110.0, 92.0
    folded: dict[int, int] = {}
    for b, count in bins.items():
        folded[max(-reach, min(reach, b))] = folded.get(max(-reach, min(reach, b)), 0) + count
    top = max(folded.values(), default=1) ** 0.5
    bar = width / (2 * reach + 1)
    bars = "".join(f"<rect x='{(b + reach) * bar:.1f}' y='{base - 84 * c**0.5 / top:.1f}' width='{max(bar - 0.4, 0.6):.1f}' height='{84 * c**0.5 / top:.1f}'/>" for b, c in sorted(folded.items()))
    ticks = ""
    for ulp in (0, 1, 8, 64, 4096, 2**18):
        b = round(4 * np.log2(1 + 4 * ulp))
        for sign in (1, -1) if ulp else (1,):
            if b <= reach:
                x = (sign * b + reach + 0.5) * bar
                label = {0: "0", 1: "1", 8: "8", 64: "64", 4096: "4 k", 2**18: "262 k"}[ulp]
                ticks += f"<text x='{x:.1f}' y='105'>{'−' if sign < 0 else ''}{label}</text><line x1='{x:.1f}' x2='{x:.1f}' y1='{base}' y2='{base + 3}'/>"
    edge = f", at the ends {off(reach):.2g} and more" if any(abs(b) > reach for b in bins) else ""
    return f"<svg viewBox='0 0 {width:.0f} {height:.0f}' role='img' aria-label='histogram of signed ULP errors{edge}'><line x1='0' x2='{width:.0f}' y1='{base}' y2='{base}'/>{bars}{ticks}</svg>"


_STYLE = """
:root{--ink:#1d2329;--soft:#5d6872;--line:#d9dee3;--paper:#fff;--panel:#f5f7f9;--good:#1a7f4b;--bad:#b4232f;--warn:#9a6200;--blue:#3b6ea5}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ec;--soft:#9aa5b0;--line:#3a424b;--paper:#15191d;--panel:#1f252b;--good:#55c48a;--bad:#ff7b83;--warn:#e5b04c;--blue:#7fb0e6}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:62rem;margin:0 auto;padding:1.5rem 1.25rem 4rem}
header{border-left:.45rem solid var(--soft);padding:.2rem 0 .2rem 1rem;margin-bottom:1.5rem}
header.conforms{border-color:var(--good)}header.wrong{border-color:var(--bad)}header.deviates{border-color:var(--warn)}
header p{margin:.3rem 0}.op{color:var(--soft);letter-spacing:.02em}h1{font-size:1.55rem;line-height:1.3;margin:0;font-weight:600;overflow-wrap:anywhere}h1 code{font-size:.92em;background:none;padding:0}
.conforms .verdict{color:var(--good)}.wrong .verdict{color:var(--bad)}.deviates .verdict{color:var(--warn)}
section{margin:2rem 0}h2{font-size:1.15rem;margin:0 0 .6rem;padding-bottom:.25rem;border-bottom:1px solid var(--line)}h3{font-size:1rem;margin:1.2rem 0 .3rem;overflow-wrap:anywhere}
.soft,small,figcaption{color:var(--soft)}.first{font-size:1.1rem;background:var(--panel);border-left:.25rem solid var(--warn);padding:.7rem 1rem;margin:.5rem 0}
code{font:.92em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;background:var(--panel);padding:.05em .3em;border-radius:.2em;overflow-wrap:anywhere}
pre{background:var(--panel);padding:.9rem 1rem;overflow-x:auto;border-radius:.3rem;font-size:.82rem;line-height:1.45}pre code{background:none;padding:0;overflow-wrap:normal}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1rem;margin:.5rem 0 1rem}dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere;min-width:0}
figure{margin:1rem 0}figcaption{font-size:.88rem;margin-top:.35rem}
.image img{display:block;image-rendering:pixelated;border:1px solid var(--line);max-width:100%}.axis{font-size:.85rem;margin:.1rem 0}
.legend{font-size:.82rem;color:var(--soft);display:flex;flex-wrap:wrap;gap:.15rem .35rem;align-items:center;margin:.5rem 0 0}.legend i{width:1.1em;height:.8em;border:1px solid var(--line);display:inline-block;margin-left:.5em}.legend i:first-child{margin-left:0}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.92rem}th,td{text-align:left;padding:.28rem .7rem .28rem 0;vertical-align:top;border-bottom:1px solid var(--line)}th{font-weight:500;color:var(--soft);white-space:nowrap}
td small{display:block;font-size:.85em}td.good{color:var(--good)}td.bad{color:var(--bad);font-weight:500}td.none{color:var(--soft)}td.good small,td.bad small{color:var(--soft);font-weight:400}
.classes td{min-width:11rem}.bar{float:left;width:3rem;height:.55rem;margin:.5rem .6rem 0 0;background:var(--good)}.bar i{display:block;height:100%;background:var(--bad)}
.close td{font:.86rem ui-monospace,Menlo,Consolas,monospace;text-align:right;white-space:nowrap;padding:.3rem .6rem}.close th{padding:.3rem .6rem .3rem 0}.close th+th{text-align:right;padding-right:.6rem}.close td.off{background:color-mix(in srgb,var(--bad) 14%,transparent)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:1rem 2rem}.grid figure{margin:0}.grid p{font-size:.85rem;margin:.1rem 0;color:var(--soft)}
svg{width:100%;height:auto;display:block}svg rect{fill:var(--blue)}svg line{stroke:var(--soft);stroke-width:.7}svg text{font:9px system-ui,sans-serif;fill:var(--soft);text-anchor:middle}
summary{cursor:pointer;font-weight:500}
@media(max-width:40rem){main{padding:1rem .9rem 3rem}dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.4rem}h1{font-size:1.25rem}.classes td{min-width:9rem}}
"""
