"""Results on disk as they arrive, so that a run that was cut short, by Ctrl-C or by a power cut, goes on where it was.

A file of JSON lines. The first says what the results are about: operator, candidate and a digest of its file, options, seed,
version; results of anything else are refused. Every further line is one finished piece of work. A line that was cut short
while it was written is work that was not finished.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

FORMAT = 1
_KEEP_DAYS = 30


class Journal:
    """What has been done of a check, on disk.

    Parameters
    ----------
    path : path
    about : dict
        What the results are about; plain data.
    resume : bool
        Go on with what the file holds, if there is one; else begin anew.

    Raises
    ------
    ValueError
        If the file to go on with is about something else.
    OSError
        If it cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike, about: dict[str, Any], resume: bool):
        self.path, self.about = Path(path), json.loads(json.dumps({"format": FORMAT} | about))
        self._done: dict[int, dict] = {}
        size = self._read() if resume and self.path.exists() else 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "r+b" if size else "wb")
        self._file.truncate(size)
        self._file.seek(size)
        if not size:
            self._write(self.about)

    def __len__(self) -> int:
        return len(self._done)

    def done(self, number: int, label: str) -> dict | None:
        """What was written about a piece of work, if it was finished."""
        found = self._done.get(number)
        return found if found is not None and found["label"] == label else None

    def add(self, number: int, label: str, **content: Any) -> None:
        """A piece of work is finished."""
        self._write({"number": number, "label": label} | content)

    def close(self, remove: bool = False) -> None:
        self._file.close()
        if remove:
            self.path.unlink(missing_ok=True)

    def _write(self, record: dict) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def _read(self) -> int:
        """Take in what is whole; the size of that."""
        size = 0
        with open(self.path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    record = json.loads(line)
                    if not size:
                        self._compare(record)
                    else:
                        self._done[int(record["number"])] = record
                except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
                    if not size:
                        raise ValueError(f"check: {self.path} does not hold results of a check") from None
                    break
                size += len(line)
        return size

    def _compare(self, found: Any) -> None:
        if not isinstance(found, dict) or "format" not in found:
            raise ValueError(f"check: {self.path} does not hold results of a check")
        differs = [k for k in {**self.about, **found} if self.about.get(k) != found.get(k)]
        if differs:
            name = differs[0]
            what = "the candidate's file has changed" if name == "source" else f"{name} is {found.get(name)!r} there and {self.about.get(name)!r} here"
            raise ValueError(f"check: the results in {self.path} are about another check: {what}")


def usual_place(about: dict[str, Any]) -> Path:
    """Where the results of such a check are kept if nobody says where: by a digest of what they are about."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refimpl" / "results"
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:20]
    return root / f"{about['operator']}-{digest}.jsonl"


def forget_old() -> None:
    """Remove what nobody went on with for a month."""
    for path in usual_place({"operator": ""}).parent.glob("*.jsonl"):
        try:
            if time.time() - path.stat().st_mtime > 86400 * _KEEP_DAYS:
                path.unlink()
        except OSError:
            continue
