"""Times that were measured on a device and kept as data: where they are, and how a claim finds two that belong together.

Two kinds of file are read, where a checkout has them:

``docs/measurements/*.json``, one run on one device::

    {"device": "...", "driver": "...", "date": "2026-11-21",
     "rows": [{"op": "attention", "implementation": "refimpl.gpu", "dtype": "bfloat16", "seconds": 0.00047,
               "sizes": {"T": 4096, "d": 128}}]}

``asv_benchmarks/results/<machine>/*.json``, as asv writes them, if the machine's record names a ``device`` and a ``driver``
and the benchmark's parameters are called ``op`` or ``form`` (operator.form), ``implementation`` or ``backend``, ``dtype``,
and letters of sizes.
"""

import datetime
import functools
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
FOLDERS = (ROOT / "docs" / "measurements", ROOT / "asv_benchmarks" / "results")


@dataclass(frozen=True)
class Measurement:
    """One time, and everything that has to be the same for another to be compared with it."""

    op: str
    implementation: str
    seconds: float
    device: str
    driver: str
    date: str
    dtype: str = ""
    sizes: Mapping[str, float] = field(default_factory=dict)

    @property
    def run(self) -> tuple[str, str, str]:
        return self.device, self.driver, self.date

    def matches(self, wanted: Mapping[str, Any]) -> bool:
        """Whether it is what is asked for: fields by name, sizes by letter."""
        return all(getattr(self, name, self.sizes.get(name)) == value for name, value in wanted.items())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measurements() -> tuple[Measurement, ...]:
    """All that are kept; none where there is no checkout.

    Raises
    ------
    ValueError
        If a file does not name device, driver and date, or a row has no time.
    """
    return _read(FOLDERS)


@functools.cache
def _read(folders: tuple[Path, ...]) -> tuple[Measurement, ...]:
    files = [path for folder in folders if folder.is_dir() for path in sorted(folder.rglob("*.json"))]
    return tuple(m for path in files for m in _rows(path))


def _rows(path: Path) -> Iterator[Measurement]:
    data = json.loads(path.read_text(encoding="utf-8"))
    if "rows" in data:
        for name in ("device", "driver", "date"):
            if not data.get(name):
                raise ValueError(f"{path}: a kept measurement must name its {name}")
        for row in data["rows"]:
            if not row.get("seconds", 0) > 0:
                raise ValueError(f"{path}: seconds must be positive, got {row.get('seconds')!r}")
            yield Measurement(
                row["op"],
                row["implementation"],
                row["seconds"],
                data["device"],
                data["driver"],
                data["date"],
                row.get("dtype", ""),
                row.get("sizes", {}),
            )
    elif {"device", "driver"} <= data.get("params", {}).keys():
        yield from _asv(path, data)


def _asv(path: Path, data: dict[str, Any]) -> Iterator[Measurement]:
    """A result file of asv: an array of values over the product of the parameters, whose names stand in benchmarks.json."""
    listed = path.parents[1] / "benchmarks.json"
    known = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else {}
    date = datetime.datetime.fromtimestamp(data["date"] / 1000, datetime.UTC).date().isoformat()
    for benchmark, result in data["results"].items():
        about = known.get(benchmark, {})
        if about.get("unit") != "seconds" or not result or result[0] is None:
            continue
        row = dict(zip(data["result_columns"], result))
        for value, chosen in zip(row["result"], itertools.product(*row["params"])):
            named = {name: text.strip("'") for name, text in zip(about["param_names"], chosen)}
            op = named.pop("op", None) or named.pop("form", benchmark).partition(".")[0]
            implementation = named.pop("implementation", None) or named.pop("backend", "refimpl")
            dtype = named.pop("dtype", "")
            if value is not None and value == value:
                sizes = {name: float(text) for name, text in named.items() if text.replace(".", "").isdigit()}
                yield Measurement(op, implementation, value, data["params"]["device"], data["params"]["driver"], date, dtype, sizes)


def look_up(slow: Mapping[str, Any], fast: Mapping[str, Any]) -> tuple[Measurement, Measurement] | None:
    """Two measurements of one run, the same sizes (where both have the letter) and dtype; the latest; None without."""
    kept = measurements()
    pairs = [
        (a, b)
        for a in kept
        if a.matches(slow)
        for b in kept
        if b.matches(fast)
        and a.run == b.run
        and a.dtype == b.dtype
        and all(a.sizes[s] == b.sizes[s] for s in a.sizes.keys() & b.sizes.keys())
    ]
    return max(pairs, key=lambda pair: pair[0].date, default=None)
