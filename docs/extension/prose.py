"""A chapter's prose as Markdown: paragraphs, set-off equations, links to operators and references.

Chapters are written to be read in an editor: single backticks are code, numbers in brackets are references, and
equations stand apart, indented. Here they become what they look like, and nothing else does: every other character that
Markdown would take for a command is escaped.
"""

import html
import re
from collections.abc import Callable, Iterator

_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|$~^!&])")
_SHIFTED = re.compile(r"(?<![\w`\\^])(d?[^\W\d_][\u0303\u0304]?|\d+)([_^])(\{(?:[^{}]|\{[^{}]*\})*\}|[-−]?[A-Za-z0-9]{1,6}(?![A-Za-z0-9_{]))(?:(\^)(\{[^{}]*\}|[A-Za-z0-9]))?")
_ARROWS = {"->": "→", "<-": "←"}
_RELATIONS = {"<=": "≤", ">=": "≥"}
_CITED = re.compile(r"\[(\d+)(?=[\],])([^\]\[]*)\]")


def escape(text: str) -> str:
    """Plain text, safe in a paragraph of Markdown."""
    text = _MARKDOWN.sub(r"\\\1", text)
    return re.sub(r"^(\s*)([-+]|\d+[.)])(\s)", lambda m: f"{m[1]}{m[2][:-1]}\\{m[2][-1]}{m[3]}", text, flags=re.MULTILINE)


def inline(text: str, link: Callable[[str], str | None] = lambda name: None, cite: Callable[[str], str | None] = lambda number: None) -> str:
    """One paragraph: code in backticks (an operator's name becomes a link), references, subscripts.

    Parameters
    ----------
    text : str
    link : callable
        Where a name in backticks leads, or None.
    cite : callable
        Where reference number n leads, or None.
    """
    done = []
    for i, piece in enumerate(re.split(r"(``.+?``|`[^`\n]+`)", text)):
        if i % 2:
            code = piece.strip("`")
            target = link(code)
            done.append(f"[`{code}`]({target})" if target else f"`` {code} ``" if "`" in code else f"`{code}`")
            continue
        start = 0
        piece = arrows(piece)
        for match in re.finditer(f"{_CITED.pattern}|{_SHIFTED.pattern}", piece):
            done.append(escape(piece[start : match.start()]))
            if match[1]:
                target = cite(match[1])
                body = escape(f"{match[1]}{match[2]}")
                done.append(f"[\\[{body}\\]]({target})" if target else f"\\[{body}\\]")
            else:
                base = _letter(match[3])
                done.append(base + _shifted(match[4], _exponent(match[5])) + (_shifted(match[6], _exponent(match[7])) if match[6] else ""))
            start = match.end()
        done.append(escape(piece[start:]))
    return "".join(done)


def shifted_html(text: str) -> str | None:
    """Text with its subscripts and exponents as HTML; None where there are none."""
    done, start = [], 0
    for match in _SHIFTED.finditer(text):
        base = _letter(match[1])
        done.append(html.escape(text[start : match.start()]) + base + _shifted(match[2], typeset(_inner(match[3]))))
        if match[4]:
            done.append(_shifted(match[4], typeset(_inner(match[5]))))
        start = match.end()
    return "".join(done) + html.escape(text[start:]) if done else None


def _letter(text: str) -> str:
    """In italics, but for numbers and the signs of sum and product."""
    return text if text.isdigit() or text in "ΣΠ" else f"<i>{text}</i>"


def _inner(text: str) -> str:
    return text.removeprefix("{").removesuffix("}")


def arrows(text: str) -> str:
    """Arrows and relations as they are printed."""
    text = re.sub(r"(?<![<>=])[<>]=(?!=)", lambda m: _RELATIONS[m[0]], text)
    return re.sub(r"(?<=[\s\])])(->|<-)(?=[\s\[])", lambda m: _ARROWS[m[1]], text)


def _exponent(text: str) -> str:
    return typeset(_inner(text)).replace("*", "\\*")


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """("text" | "equations", lines): the runs of lines at the margin, and those that are set off."""
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        run: list[str] = []
        kind = ""
        for line in paragraph.split("\n"):
            now = "equations" if line.startswith("    ") else "text"
            if now != kind and run:
                yield kind, "\n".join(run)
                run = []
            kind = now
            run.append(line)
        if run:
            yield kind, "\n".join(run)


def markdown(text: str, link: Callable[[str], str | None] = lambda name: None, cite: Callable[[str], str | None] = lambda number: None) -> str:
    """Prose with its equations."""
    done = []
    for kind, body in blocks(text):
        done.append(f"```{{equations}}\n{body}\n```" if kind == "equations" else inline(body, link, cite))
    return "\n\n".join(done)


# -- equations -------------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"\s{2,}\((\d+[a-z]?)\)\s*$")
_TOKEN = re.compile(r"([_^])\{((?:[^{}]|\{[^{}]*\})*)\}|([_^])([A-Za-z0-9α-ω∞*'])(?![A-Za-z0-9])|_([a-z]{2,3})(?![A-Za-z0-9_])|([A-Za-z][A-Za-z0-9]*)|([α-ωΑ-Ω])")


def equations_html(text: str) -> str:
    """Set-off lines as a table: what is apart by three spaces or more in columns, the equation's number at the right.

    >>> equations_html("    h_t = a_t h_{t-1} + b_t,        t = 0 ... T-1      (1)").count("<td")
    3
    """
    rows = []
    lines = [line for line in text.split("\n") if line.strip()]
    margin = min(len(line) - len(line.lstrip()) for line in lines)
    for line in lines:
        line = arrows(line[margin:].rstrip())
        number = _NUMBER.search(line)
        body = line[: number.start()] if number else line
        indent = len(body) - len(body.lstrip())
        cells = [typeset(c) for c in re.split(r"\s{3,}", body.strip())]
        if indent:
            cells[0] = f'<span style="padding-left:{indent * 0.55:.1f}em"></span>{cells[0]}'
        rows.append((cells, number[1] if number else ""))
    width = max(len(cells) for cells, _ in rows)
    out = ['<div class="equations"><table>']
    for cells, number in rows:
        out.append("<tr>")
        for i, cell in enumerate(cells):
            last = i == len(cells) - 1
            span = f' colspan="{width - i}"' if last and i < width - 1 else ""
            out.append(f"<td{span}>{cell}</td>")
        out.append(f'<td class="number">{f"({number})" if number else ""}</td></tr>')
    return "".join(out) + "</table></div>"


def typeset(text: str) -> str:
    """An equation in one line: letters in italics, words upright, subscripts and exponents in their place."""
    done, start = [], 0
    for m in _TOKEN.finditer(text):
        done.append(html.escape(text[start : m.start()]))
        if m[1]:
            done.append(_shifted(m[1], typeset(m[2])))
        elif m[3]:
            done.append(_shifted(m[3], typeset(m[4])))
        elif m[5]:
            done.append(_shifted("_", html.escape(m[5]) if len(m[5]) > 2 else f"<i>{m[5]}</i>"))
        elif m[6]:
            done.append(f"<i>{m[6]}</i>" if len(m[6]) == 1 else html.escape(m[6]))
        else:
            done.append(_letter(m[7]))
        start = m.end()
    done.append(html.escape(text[start:]))
    return "".join(done)


def _shifted(kind: str, body: str) -> str:
    tag = "sub" if kind == "_" else "sup"
    return f"<{tag}>{body}</{tag}>"
