"""Numbers that took long to find, kept in the user's cache folder by a digest of all that they follow from.

A file is a digest of its name and content, then arrays as NumPy's npz keeps them, read without pickle: what is cut short,
damaged or under another's name is no answer, and is found anew. Files appear whole or not at all; the oldest make room for
new ones. ``REFIMPL_CACHE`` names another folder, or is ``off``. Nothing that says what a result should be belongs here:
a candidate runs as the same user, and can read the folder (and write to it, so a check in isolation asks nothing of it).
"""

import contextlib
import functools
import hashlib
import io
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

ROOM = 256 * 2**20  # bytes that the folder may take
_EVERY = 256  # files written between two looks at the room that they take
_SUFFIX = ".npz1"
_written = 0


def folder(part: str = "ensembles") -> Path | None:
    """Where the numbers are, or another part of the cache; None where nobody wants anything kept."""
    chosen = os.environ.get("REFIMPL_CACHE", "")
    if chosen.lower() in ("off", "0", "no", "false", "none"):
        return None
    root = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refimpl"
    return root / part


def digest(*about: Any) -> str:
    """A name for numbers that follow from these values (arrays, plain values, tuples and dicts of them) and this version's code.

    Empty where they follow from something that has no bytes of its own, a function for instance, or nothing is kept.
    """
    if folder() is None:
        return ""
    total = hashlib.sha256(_code())
    return total.hexdigest()[:40] if _fed(total, about) else ""


def load(key: str) -> dict[str, np.ndarray] | None:
    """The arrays kept under this name; None where there are none, or not whole."""
    place = folder()
    if place is None:
        return None
    path = place / (key + _SUFFIX)
    try:
        content = path.read_bytes()
        if content[:32] != _seal(key, content[32:]):
            return None
        with np.load(io.BytesIO(content[32:]), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        os.utime(path)
        return found
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def store(key: str, arrays: dict[str, np.ndarray]) -> None:
    """Keep arrays under this name, if there is a folder to write to."""
    global _written
    place = folder()
    if place is None:
        return
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    content = buffer.getvalue()
    try:
        place.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=place, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_seal(key, content) + content)
            os.replace(temporary, place / (key + _SUFFIX))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        if _written % _EVERY == 0:
            make_room(place)
        _written += 1
    except OSError:
        return


def make_room(place: Path, room: int = ROOM, suffixes: tuple[str, ...] = (_SUFFIX, ".part")) -> None:
    """Remove the files that were asked for longest ago until the rest takes no more than half of the room, if all take more."""
    files = []
    for entry in os.scandir(place):
        if entry.name.endswith(suffixes):
            with contextlib.suppress(OSError):  # another process made room
                about = entry.stat()
                files.append((about.st_mtime, max(about.st_size, 4096), entry.path))
    taken = sum(size for _, size, _ in files)
    if taken <= room:
        return
    for _, size, path in sorted(files):
        with contextlib.suppress(OSError):
            os.unlink(path)
        taken -= size
        if taken <= room // 2:
            return


def _seal(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + content).digest()


@functools.cache
def _code() -> bytes:
    """A digest of the package's files: numbers of other code are other numbers. And of NumPy's version, whose sums they are."""
    root = Path(__file__).resolve().parents[1]
    total = hashlib.sha256(np.__version__.encode())
    for path in sorted(p for part in ("core", "ops", "conformance") for p in (root / part).rglob("*.py")):
        total.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return total.digest()


def _fed(total, value: Any) -> bool:
    """Feed a value's kind and bytes to a digest; False where it has none."""
    if isinstance(value, np.ndarray):
        total.update(f"array {value.dtype.name} {value.shape} ".encode())
        total.update(np.ascontiguousarray(value).tobytes())
        return value.dtype.kind != "O"
    if isinstance(value, dict):
        total.update(f"dict {len(value)} ".encode())
        return all(_fed(total, name) and _fed(total, v) for name, v in sorted(value.items()))
    if isinstance(value, tuple | list):
        total.update(f"{type(value).__name__} {len(value)} ".encode())
        return all(_fed(total, v) for v in value)
    if value is None or isinstance(value, bool | int | float | complex | str | np.generic):
        total.update(f"{type(value).__name__} {value!r} ".encode())
        return True
    return False
