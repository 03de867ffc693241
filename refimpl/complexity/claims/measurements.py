"""Times that were measured on a device and kept as data: where they are, and how a claim finds two that belong together.

Files of one run on one device are read, where a checkout has them, from ``asv_benchmarks/results/`` and ``docs/measurements/``::

    {"measured_on": {"device": "NVIDIA H100", "driver": "580", "date": "2026-11-21"},
     "rows": [{"operator": "attention", "work": "forward, causal, bf16", "shape": "B4 H16 T4096 d128", "ms": {"refimpl": 0.47}}]}

which is what the scripts in ``asv_benchmarks/device`` write; and asv's own, if the machine's record names a ``device`` and a
``driver`` and the benchmark's parameters are called ``op`` or ``form`` (operator.form), ``implementation`` or ``backend``,
``dtype``, and letters of sizes.
"""

import datetime
import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
FOLDERS = (ROOT / "docs" / "measurements", ROOT / "asv_benchmarks" / "results")
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}
_NOT_CONTENDERS = re.compile(r"\bCPU\b|\bcop(y|ies)\b")  # floors and other machines beside the times


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
    work: str = ""

    @property
    def run(self) -> tuple[str, str, str]:
        return self.device, self.driver, self.date

    @property
    def direction(self) -> str:
        """Forward, gradient, or decoding."""
        words = self.work.lower()
        return "gradient" if re.search(r"gradient|bwd|backward", words) else "decode" if "decode" in words else "forward"

    def matches(self, wanted: Mapping[str, Any]) -> bool:
        """Whether it is what is asked for: fields by name, sizes by letter."""
        return all(getattr(self, name, self.sizes.get(name)) == value for name, value in wanted.items())

    def goes_with(self, other: "Measurement") -> bool:
        """From the same run, of the same precision and direction, at the same sizes where both have the letter."""
        same = self.run == other.run and self.dtype == other.dtype and self.direction == other.direction
        return same and all(self.sizes[s] == other.sizes[s] for s in self.sizes.keys() & other.sizes.keys())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measurements() -> tuple[Measurement, ...]:
    """All that are kept; none where there is no checkout.

    Raises
    ------
    ValueError
        If a file does not name device, driver and date, or a time is not positive.
    """
    return _read(FOLDERS)


@functools.cache
def _read(folders: tuple[Path, ...]) -> tuple[Measurement, ...]:
    files = [path for folder in folders if folder.is_dir() for path in sorted(folder.rglob("*.json"))]
    return tuple(m for path in files for m in _rows(path))


def _rows(path: Path) -> Iterator[Measurement]:
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        return
    if "measured_on" in data:
        about = data["measured_on"]
        for name in ("device", "driver", "date"):
            if not about.get(name):
                raise ValueError(f"{path}: a kept measurement must name its {name}")
        for row in data["rows"]:
            work = row.get("work", "")
            dtype, sizes = _shape(f"{row.get('shape', '')} {work}")
            for contender, ms in row.get("ms", {}).items():
                if ms is None or ms != ms:
                    continue  # a contender that failed
                if not ms > 0:
                    raise ValueError(f"{path}: a time must be positive, got {ms!r} for {row['operator']}, {contender}")
                if not _NOT_CONTENDERS.search(contender):
                    yield Measurement(
                        row["operator"], contender, ms / 1e3, about["device"], about["driver"], about["date"], dtype, sizes, work
                    )
    elif {"device", "driver"} <= data.get("params", {}).keys():
        yield from _asv(path, data)


def _shape(text: str) -> tuple[str, dict[str, float]]:
    """``B4 H16/8 T4096 d128 float32`` as a dtype and sizes by letter; of two numbers the second is of keys: Hkv."""
    sizes: dict[str, float] = {}
    dtype = ""
    for word in re.split(r"[\s,]+", text):
        if word in _DTYPES or re.fullmatch(r"b?float\d+", word):
            dtype = _DTYPES.get(word, word)
        elif match := re.fullmatch(r"([A-Za-z])(\d+)(?:/(\d+))?", word):
            sizes.setdefault(match[1], int(match[2]))
            if match[3]:
                sizes[f"{match[1]}kv"] = int(match[3])
    return dtype, sizes


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
    """Two measurements that belong together, of the latest run that has them; None without."""
    kept = measurements()
    pairs = [(a, b) for a in kept if a.matches(slow) for b in kept if b.matches(fast) and a.goes_with(b)]
    return max(pairs, key=lambda pair: pair[0].date, default=None)
