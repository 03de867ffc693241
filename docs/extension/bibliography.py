"""BibTeX from a chapter's own list of references: there is no second bibliography.

An entry reads ``[1] A. Author, B. Author, "Title", venue 2020, section 3.``; what is quoted is the title, what stands
before it are the authors, and what follows holds the venue, the year and the place in the paper.
"""

import re
import unicodedata
from dataclasses import dataclass

_PLACE = re.compile(r"\b(section|sections|equation|equations|algorithm|algorithms|appendix|theorem|figure|listing|the reference function)\b.*", re.DOTALL)
_YEAR = re.compile(r"\b(1[89]\d\d|20\d\d)\b")
_ARXIV = re.compile(r"arXiv:(\d{2})(\d{2})\.(\d{4,5})")


@dataclass(frozen=True)
class Entry:
    """A reference, taken apart.

    Attributes
    ----------
    number : str
        As it is cited in the chapter.
    authors : tuple of str
    title, venue, year, arxiv, place : str
        `place` is the section or equation; `arxiv` a number or empty.
    text : str
        The entry as it stands, without its number.
    """

    number: str
    authors: tuple[str, ...]
    title: str
    venue: str
    year: str
    arxiv: str
    place: str
    text: str

    @property
    def key(self) -> str:
        """First author, year and the title's first word: vaswani2017attention."""
        words = [re.sub(r"[^a-z0-9]", "", w) for w in re.split(r"[\s:-]+", self.title.lower())]
        return self.who + next(w for w in words if w and w not in ("a", "an", "on", "the"))

    @property
    def who(self) -> str:
        """First author and year."""
        return surname(self.authors[0]) + self.year


def parse(text: str) -> Entry:
    """An entry of a chapter's list of references.

    Raises
    ------
    ValueError
        If it has no number, no quoted title, no author or no year.

    Examples
    --------
    >>> entry = parse('[1] A. Vaswani et al., "Attention is all you need", NeurIPS 2017, section 3.2.1.')
    >>> entry.key, entry.venue, entry.place
    ('vaswani2017attention', 'NeurIPS', 'section 3.2.1')
    """
    text = " ".join(text.split())
    match = re.fullmatch(r'\[(\d+)\] (.+?), "(.+?)"[,.:]?\s*(.*?)\.?', text)
    if match is None:
        raise ValueError(f"reference {text!r} is not of the form [1] Authors, \"Title\", venue year, section")
    number, who, title, rest = match.groups()
    place = _PLACE.search(rest)
    where = (rest[: place.start()] if place else rest).strip(" ,;(")
    arxiv = _ARXIV.search(rest)
    year = _YEAR.search(_ARXIV.sub("", rest))
    if year is None and arxiv is None:
        raise ValueError(f"reference {text!r} has no year")
    venue = _ARXIV.sub("", where)
    venue = _YEAR.sub("", venue.partition(": ")[0], count=1)
    venue = re.sub(r"\(\s*\)", "", venue)
    venue = re.sub(r"\s*,(\s*,)+", ",", venue).strip(" ,;:")
    return Entry(
        number=number,
        authors=tuple(_people(who)),
        title=title,
        venue=" ".join(venue.split()),
        year=year[1] if year else f"20{arxiv[1]}",
        arxiv=f"{arxiv[1]}{arxiv[2]}.{arxiv[3]}" if arxiv else "",
        place=_balanced(place.group().rstrip(". ")) if place else "",
        text=text.partition("] ")[2],
    )


def bibtex(entry: Entry) -> str:
    """An entry for a .bib file.

    Examples
    --------
    >>> print(bibtex(parse('[2] W. D. Hillis and G. L. Steele, "Data parallel algorithms", CACM 29(12), 1986.')))
    @misc{hillis1986data,
      author = {W. D. Hillis and G. L. Steele},
      title = {{Data parallel algorithms}},
      year = {1986},
      howpublished = {CACM 29(12)},
    }
    """
    fields = {"author": " and ".join(entry.authors), "title": f"{{{entry.title}}}", "year": entry.year}
    if entry.venue:
        fields["howpublished"] = entry.venue
    if entry.arxiv:
        fields |= {"eprint": entry.arxiv, "archiveprefix": "arXiv"}
    if entry.place:
        fields["note"] = entry.place[0].upper() + entry.place[1:]
    lines = "\n".join(f"  {name} = {{{value}}}," for name, value in fields.items())
    return f"@misc{{{entry.key},\n{lines}\n}}"


def software(version: str) -> str:
    """The entry for refimpl itself, of the same content as CITATION.cff."""
    return (
        "@software{refimpl,\n  author = {{The refimpl authors}},\n  title = {{refimpl: ground truth for sequence-model operators}},\n"
        f"  version = {{{version}}},\n  license = {{Apache-2.0}},\n}}"
    )


def cited(key: str, entries: tuple[Entry, ...]) -> Entry | None:
    """The entry that a key of an Op's record means: ``dao2022monarch, section 3.1`` is the Dao of 2022."""
    name = key.partition(",")[0].strip()
    return next((e for e in entries if name.startswith(e.who)), None)


def surname(author: str) -> str:
    """Lower case, without accents: the last name of a person, the first word of a team."""
    words = re.sub(r"\bet al\b\.?", "", author).split()
    person = re.fullmatch(r"[^\W\d_]\.(-?[^\W\d_]\.)*", words[0]) is not None
    name = next((w for w in words if not re.fullmatch(r"([^\W\d_]\.-?)+", w)), words[-1]) if person else words[0]
    if person and name in ("van", "de", "Van", "De"):
        name = "".join(words[words.index(name) :])
    plain = unicodedata.normalize("NFKD", name.replace("ł", "l").replace("Ł", "L").replace("ø", "o"))
    return re.sub(r"[^a-z]", "", plain.lower()) if person else re.sub(r"[^a-z].*", "", plain.lower())


def _balanced(text: str) -> str:
    """Without a closing bracket that belongs to what stood before."""
    return text.removesuffix(")") if text.count(")") > text.count("(") else text


def _people(text: str) -> list[str]:
    more = bool(re.search(r",?\s+et al\b\.?$", text))
    text = re.sub(r",?\s+et al\b\.?$", "", text)
    found = [p.strip() for p in re.split(r",\s+and\s+|,\s+|\s+and\s+", text) if p.strip()]
    if not found:
        raise ValueError(f"reference without an author: {text!r}")
    return found + (["others"] if more else [])
