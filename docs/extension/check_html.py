"""Checks the built pages: ``python docs/extension/check_html.py docs/_build/html``. Exits with 1 and a list of what is wrong.

Every internal link leads to a page, and to a place on it; every picture has a text for those who can't see it; no page loads
anything from elsewhere; and from the first page one click leads to "check my function".
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FIRST, CHECK = "index.html", "how_to/check_function.html"


class Page(HTMLParser):
    """What a page links to, the names on it, and its pictures."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.names: set[str] = set()
        self.pictures: list[tuple[str, str | None]] = []
        self.drawings: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.names |= {v for k in ("id", "name") if (v := found.get(k))}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"] or "")
        if tag in ("script", "img", "iframe", "source") and found.get("src"):
            self.loads.append(found["src"] or "")
        if tag == "link" and found.get("href") and "canonical" not in (found.get("rel") or ""):
            self.loads.append(found["href"] or "")
        if tag == "img":
            self.pictures.append((found.get("src") or "", found.get("alt")))
        if tag == "svg" and "aria-hidden" not in found and "role" not in found and "sd-octicon" not in (found.get("class") or ""):
            self.drawings.append(str(found))


def wrong(root: Path) -> list[str]:
    """What is wrong with the pages below a folder, a line each."""
    pages = {p.relative_to(root).as_posix(): Page(p.read_text(encoding="utf-8")) for p in sorted(root.rglob("*.html")) if "_static" not in p.parts and "lite" not in p.parts}
    if FIRST not in pages:
        return [f"{root} holds no {FIRST}"]
    found = []
    for name, page in pages.items():
        for link in page.links:
            if reason := broken(root, pages, name, link):
                found.append(f"{name}: {link}: {reason}")
        found += [f"{name}: loads {x} from elsewhere" for x in page.loads if urlsplit(x).scheme in ("http", "https") or x.startswith("//")]
        for source, alt in page.pictures:
            words = (alt or "").strip()
            if not words or re.fullmatch(r"[\w/.-]+\.(png|svg|jpg)", words):
                found.append(f"{name}: the picture {source} has no alternative text")
        found += [f"{name}: a drawing without a role or a text: {d}" for d in page.drawings]
    if not any(target(FIRST, link)[0] == CHECK for link in pages[FIRST].links):
        found.append(f"{FIRST}: no link to {CHECK}")
    return found


def target(name: str, link: str) -> tuple[str, str]:
    """The page and the place on it that a link leads to, from the page of a name."""
    parts = urlsplit(link)
    if not parts.path:
        return name, unquote(parts.fragment)
    steps = name.split("/")[:-1]
    for step in unquote(parts.path).split("/"):
        steps = steps[:-1] if step == ".." else steps if step in (".", "") else [*steps, step]
    return "/".join(steps), unquote(parts.fragment)


def broken(root: Path, pages: dict[str, Page], name: str, link: str) -> str | None:
    """Why a link doesn't work, if it doesn't."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    page, place = target(name, link)
    if page not in pages:
        return None if (root / page).exists() else "no such page"
    if place and place not in pages[page].names:
        return f"no place {place!r} on that page"
    return None


def main() -> int:
    found = wrong(Path(sys.argv[1]))
    print("\n".join(found) if found else "links, places and alternative texts are in order")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
