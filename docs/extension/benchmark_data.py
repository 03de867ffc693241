"""Measurements that the repository keeps, as pictures and tables: `docs/benchmarks.md` is made of these functions when it is built.

Times are drawn per element of the first result, so that calls of different batches, heads and widths share an axis: a mixer of
linear time is level there, attention rises with the length.
"""

import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import refimpl
from refimpl.catalogue import chapter_of
from refimpl.complexity import crossover, predict, predict_time
from refimpl.complexity.claims.measurements import _shape as words
from refimpl.complexity.runs import letters
from refimpl.complexity.scale import MIXERS
from refimpl.complexity.table import WIDTHS
from refimpl.op import Op

RESULTS = Path(__file__).parents[2] / "asv_benchmarks" / "results"
PARTS = {
    "attention": "Attention",
    "linear_attention": "Linear attention",
    "recurrence": "Recurrences and long convolutions",
    "state_space": "State space models",
    "gated_rnn": "Gated recurrent networks",
    "experts": "Mixtures of experts",
    "basics": "Norms and activations",
    "quantization": "Quantisation",
}
MIXING = ("linear_attention", "recurrence", "state_space", "gated_rnn")  # parts that hold what may stand where attention does
FAR = 2**20


def part_of(op: Op) -> str:
    """The folder of an operator's chapter."""
    return chapter_of(op.name).split(".")[2]


# -- what is kept ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A time at a length.

    Attributes
    ----------
    operator, who : str
        Whose time: a form's name on the CPU, a contender's on a GPU.
    kind : {"cpu", "gpu", "peer", "floor"}
    T : int
    seconds : float
    elements : int
        Of the first result.
    """

    operator: str
    who: str
    kind: str
    T: int
    seconds: float
    elements: int
    work: str = ""
    shape: str = ""

    @property
    def each(self) -> float:
        """Seconds per element of the result."""
        return self.seconds / self.elements


def cpu_file(folder: Path = RESULTS) -> dict:
    """The kept run on a CPU; empty without."""
    path = folder / "cpu.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def public_file(folder: Path = RESULTS) -> dict:
    """The kept ratios to public implementations; empty without."""
    path = folder / "public.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def gpu_files(folder: Path = RESULTS) -> list[dict]:
    """The kept runs on GPUs, as `asv_benchmarks/device/measure.py` writes them; of other data beside times, nothing."""
    found = (json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "device").glob("*.json")))
    runs = [data for data in found if isinstance(data, dict) and "measured_on" in data]
    return [data | {"rows": [row for row in data.get("rows", ()) if row.get("operator") and row.get("ms")]} for data in runs]


def points(folder: Path = RESULTS) -> list[Point]:
    """Everything that can be drawn: forward passes whose shape names a length and all other letters of the result."""
    found = []
    for row in cpu_file(folder).get("rows", ()):
        if row["operator"] in refimpl.OPS and row["elements"]:
            found += [Point(row["operator"], form, "cpu", row["T"], s, row["elements"]) for form, s in row["seconds"].items()]
    for row in (row for data in gpu_files(folder) for row in data["rows"]):
        placed = place(row)
        if placed is None or not forward(row.get("work", "")):
            continue
        T, elements = placed
        at = {"T": T, "elements": elements, "work": row.get("work", ""), "shape": row.get("shape", "")}
        for who, ms in row["ms"].items():
            if (kind := kind_of(who)) and ms and ms == ms:
                found.append(Point(row["operator"], who, kind, seconds=ms / 1e3, **at))
        if row.get("floor_ms"):
            found.append(Point(row["operator"], "floor", "floor", seconds=row["floor_ms"] / 1e3, **at))
    return found


def forward(work: str) -> bool:
    """Whether a row speaks of results: not of gradients, nor of one step of decoding."""
    return not re.search(r"gradient|bwd|backward|decode", work.lower())


def kind_of(who: str) -> str:
    """What a contender is; "" for what is no time of the same work: copies, trials of block sizes, other machines."""
    if re.match(r"CPU\b", who) or re.search(r"\bcop(y|ies)\b|\bagain\b", who) or re.search(r"\(\d|^\d", who):
        return ""
    return "gpu" if re.match(r"(refimpl|ours|rows|lines)\b", who) else "peer"


def place(row: dict) -> tuple[int, int] | None:
    """Length and elements of a row's first result; None where its shape does not say.

    Examples
    --------
    >>> place({"operator": "selective_scan", "shape": "B8 T2048 C2048 N16 float32"})
    (2048, 33554432)
    >>> place({"operator": "attention", "shape": "B4 H16/8 T4096 d128"})
    (4096, 33554432)
    """
    op = refimpl.OPS.get(row["operator"])
    text = row.get("shape", "")
    _, said = words(text)
    if match := re.search(r"(\d+) tokens", text):
        said["T"] = int(match[1])
    if op is None or "T" not in said:
        return None
    known = letters(op)
    batch = next((int(said[b]) for b in ("B", "batch", "N") if b in said and not (b == "N" and "B" not in said and "n" in known and "C" not in said)), 1)
    product = batch
    for axis in op.contract.results[0].shapes[0].axes:
        letter = axis.rstrip("?")
        candidates = (letter, letter.swapcase(), *(("H",) if letter[0] == "H" else ()), *(("T",) if letter in op.lengths else ()), *(("d",) if letter == "e" else ()))
        size = int(letter) if letter.isdigit() else next((int(said[c]) for c in candidates if c in said), None)
        if size is None:
            return None
        product *= size
    return int(said["T"]), product


# -- pictures ----------------------------------------------------------------------------------------------------------


def operators(part: str, folder: Path = RESULTS) -> list[str]:
    """Operators of a part of which something is kept."""
    kept = {p.operator for p in points(folder)}
    return [op.name for op in refimpl.OPS.values() if part_of(op) == part and op.name in kept]


def pictures(part: str, folder: Path = RESULTS):
    """A panel for each operator of a part; None where nothing is kept."""
    from drawing import axes

    names = operators(part, folder)
    if not names:
        return None
    everything = points(folder)
    columns = 3
    rows = math.ceil(len(names) / columns)
    figure, panels = axes(rows, columns, width=9.2, height=2.75 * rows + 0.4, squeeze=False)
    for panel, name in zip(panels.flat, names):
        draw(panel, name, [p for p in everything if p.operator == name])
    for panel in panels.flat[len(names) :]:
        panel.axis("off")
    for column in range(columns):  # the lowest panel of a column that is there
        below = [panels[r, column] for r in range(rows) if r * columns + column < len(names)]
        if below:
            below[-1].set_xlabel("length T")
    for row in panels[:, 0]:
        row.set_ylabel("ns per element")
    return figure


def draw(panel, name: str, kept: Sequence[Point]) -> None:
    """Time per element against length: forms on the CPU as lines, the fastest in blue; GPU, peers and floor as marks."""
    from drawing import BLUE, GOLD, GREY, INK, RED

    forms: dict[str, list[Point]] = {}
    for p in kept:
        if p.kind == "cpu":
            forms.setdefault(p.who, []).append(p)
    best = fastest(kept, "cpu")
    for line in forms.values():
        panel.plot([p.T for p in line], [1e9 * p.each for p in line], color=GREY, lw=1.0, zorder=1)
    if best:
        winners = list(dict.fromkeys(p.who for p in best))
        label = "CPU, " + (" then ".join(winners) if len(winners) <= 2 else f"fastest of {len(forms)} forms" if len(forms) > 1 else winners[0])
        panel.plot([p.T for p in best], [1e9 * p.each for p in best], color=BLUE, marker="o", ms=2.5, label=label, zorder=2)
    for kind, colour, marker, label in (("gpu", RED, "D", "GPU"), ("peer", GOLD, "s", "GPU, peers"), ("floor", INK, "_", "GPU, floor")):
        found = [p for p in kept if p.kind == kind]
        if found:
            panel.plot([p.T for p in found], [1e9 * p.each for p in found], ls="", color=colour, marker=marker, ms=7 if marker == "_" else 4, label=label, zorder=3)
    panel.set(xscale="log", yscale="log", title=name)
    panel.set_xscale("log", base=2)
    low, high = panel.get_ylim()
    wide = max(math.sqrt(20 / (high / low)), 1.0)  # noise within a factor is no slope
    low, high = low / wide, high * wide
    panel.set_ylim(low / 1.5, high * (high / low) ** 0.35)  # room for the legend
    panel.legend(loc="upper left", fontsize=6.8, handlelength=1.2, borderaxespad=0.1, labelspacing=0.25)
    panel.grid(True, which="major", color="#eef1f4", lw=0.8)
    panel.set_axisbelow(True)


def fastest(kept: Iterable[Point], kind: str) -> list[Point]:
    """At each length the least time per element."""
    at: dict[int, Point] = {}
    for p in kept:
        if p.kind == kind and (p.T not in at or p.each < at[p.T].each):
            at[p.T] = p
    return [at[T] for T in sorted(at)]


def overtaking(machine: str = "h100", folder: Path = RESULTS):
    """Floors of attention and of scans on a machine against length, and what was measured there."""
    from drawing import BLUE, GOLD, GREEN, RED, axes

    figure, (left, right) = axes(1, 2, width=9.2, height=3.5)
    lengths = [2**i for i in range(8, 21)]
    for mixer, colour in zip(MIXERS, (RED, BLUE, GREEN, GOLD)):
        left.plot(lengths, [1e3 * predict_time(mixer, T, machine).seconds for T in lengths], color=colour, label=mixer.replace("_", " "))
    for second in MIXERS[1:]:
        T = crossover("attention", second, machine)
        left.plot(T, 1e3 * predict_time(second, T, machine).seconds, marker="o", ms=5, color="black", zorder=4)
    left.set(title=f"predicted floors, {machine.upper()}, one layer", xlabel="length T", ylabel="ms", yscale="log")
    left.set_xscale("log", base=2)
    left.legend(loc="upper left")
    kept = points(folder)
    names = ["attention", *(n for n in ("linear_recurrence", "selective_scan", "ssd", "mlstm", "linear_attention", "long_conv") if n in refimpl.OPS)]
    for name, colour in zip(names, (RED, BLUE, GREEN, GOLD, "#6b46c1", "#0d9488", "#718096")):
        line = fastest([p for p in kept if p.operator == name], "cpu")
        if line:
            right.plot([p.T for p in line], [1e9 * p.each for p in line], color=colour, marker="o", ms=2.5, label=name.replace("_", " "))
    right.set(title="measured on the CPU, fastest form", xlabel="length T", ylabel="ns per element of the result")
    if right.lines:
        right.set_xscale("log", base=2)
        right.set_yscale("log")
        right.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        right.text(0.5, 0.5, "nothing kept", ha="center", transform=right.transAxes)
    return figure


# -- where attention is overtaken --------------------------------------------------------------------------------------


def mixers(folder: Path = RESULTS) -> list[Op]:
    """Operators along one length that can stand where attention does: one result element per token and feature."""
    return [op for op in refimpl.OPS.values() if part_of(op) in MIXING and op.lengths[:1] == ("T",) and "T" in op.contract.results[0].shapes[0].letters]


def work_each(op: Op, T: int) -> float:
    """Operations per element of the result, of the form that needs fewest, by the chapter's formula."""
    at = {k: v for k, v in WIDTHS.items() if k in letters(op) and k not in op.lengths} | dict.fromkeys(op.lengths, T)
    known = {k: v for k, v in letters(op).items() if isinstance(v, int)} | at
    size = math.prod(known.get(a.rstrip("?"), 1) if not a.isdigit() else int(a) for a in op.contract.results[0].shapes[0].axes)
    return min(predict(op, form, **at).work for form in op.forms if op.forms[form].stops == "") / size


def work_crossover(op: Op, limit: int = FAR) -> float:
    """The length from which on attention needs more operations per element than an operator; inf if not up to `limit`."""
    attention = refimpl.OPS["attention"]
    more = lambda T: work_each(attention, T) > work_each(op, T)
    if not more(limit):
        return math.inf
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if more(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class Crossing:
    """Where one line rises over another: at T, or (`below`, `beyond`) outside of what was measured."""

    T: float
    where: str = ""

    def __str__(self) -> str:
        if self.where == "nothing":
            return ""
        return {"below": f"below {self.T:.0f}", "beyond": f"beyond {self.T:.0f}"}.get(self.where, f"about {rounded(self.T)}")


def rounded(T: float) -> int:
    """A length to two digits."""
    digits = max(int(math.log10(max(T, 1))) - 1, 0)
    return int(round(T, -digits))


def crossing(first: Sequence[Point], second: Sequence[Point]) -> Crossing:
    """The length from which on the first line stays over the second, between measured lengths by straight lines in log-log.

    Examples
    --------
    >>> line = lambda *each: [Point("", "", "cpu", T, s, 1) for T, s in zip((64, 256, 1024), each)]
    >>> str(crossing(line(1, 4, 16), line(2, 2, 2))), str(crossing(line(1, 4, 16), line(32, 32, 32)))
    ('about 130', 'beyond 1024')
    """
    low = max((line[0].T for line in (first, second) if line), default=0)
    high = min((line[-1].T for line in (first, second) if line), default=0)
    if not first or not second:
        return Crossing(0, "nothing")
    if low > high:  # the two were measured at different lengths: what is level may be compared with the nearest
        near = first[0] if first[0].T > second[-1].T else first[-1]
        if near.T > second[-1].T:
            return Crossing(near.T, "below" if near.each > second[-1].each else "beyond")
        return Crossing(near.T, "nothing")
    at = sorted({p.T for p in (*first, *second) if low <= p.T <= high})
    over = [math.log(value(first, T) / value(second, T)) for T in at]
    if over[-1] <= 0:
        return Crossing(at[-1], "beyond")
    last = max((i for i, o in enumerate(over) if o <= 0), default=None)
    if last is None:
        return Crossing(at[0], "below")
    share = -over[last] / (over[last + 1] - over[last])
    return Crossing(math.exp(math.log(at[last]) + share * math.log(at[last + 1] / at[last])))


def value(line: Sequence[Point], T: int) -> float:
    """Seconds per element of a line at a length, straight between its points in log-log."""
    for a, b in zip(line, line[1:]):
        if a.T <= T <= b.T:
            share = math.log(T / a.T) / math.log(b.T / a.T)
            return a.each ** (1 - share) * b.each**share
    return next(p.each for p in line if p.T == T)


# -- tables ------------------------------------------------------------------------------------------------------------


class Table:
    """Rows that a notebook shows as a table."""

    def __init__(self, head: Sequence[str], rows: Sequence[Sequence[object]]):
        self.head, self.rows = head, rows

    def __repr__(self) -> str:
        return "\n".join(" | ".join(map(str, row)) for row in (self.head, *self.rows))

    def _repr_html_(self) -> str:
        cells = lambda row, tag: "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in row) + "</tr>"
        body = "".join(cells(row, "td") for row in self.rows)
        return f'<div class="pst-scrollable-table-container"><table class="table"><thead>{cells(self.head, "th")}</thead><tbody>{body}</tbody></table></div>'


def crossovers(folder: Path = RESULTS) -> Table:
    """For each mixer the length from which on attention is dearer: counted, predicted, measured."""
    kept = points(folder)
    predicted = {"linear_recurrence": "recurrence", "selective_scan": "selective_scan", "ssd": "ssd"}
    lines = lambda name, kind: fastest([p for p in kept if p.operator == name], kind)
    rows = []
    for op in mixers(folder):
        T = work_crossover(op)
        counted = f"{rounded(T)}" if T <= FAR else f"beyond {FAR}"
        floors = [f"{crossover('attention', predicted[op.name], m)}" if op.name in predicted else "" for m in ("h100", "h200")]
        rows.append((op.name, counted, *floors, *(crossing(lines("attention", kind), lines(op.name, kind)) for kind in ("cpu", "gpu"))))
    return Table(("operator", "counted work", "H100, predicted", "H200, predicted", "CPU, measured", "GPU, measured"), rows)


def kept_on_device(folder: Path = RESULTS) -> Table:
    """All rows of the kept runs on GPUs; times in milliseconds."""
    rows = []
    for data in gpu_files(folder):
        for row in data["rows"]:
            ours = min((ms for who, ms in row["ms"].items() if ms and kind_of(who) == "gpu"), default=None)
            peers = ", ".join(f"{who} {ms:.3g}" for who, ms in row["ms"].items() if ms and ms == ms and kind_of(who) == "peer")
            if ours is None:
                continue
            ratio = f"{ours / row['floor_ms']:.1f}" if row.get("floor_ms") else ""
            rows.append((row["operator"], row.get("work", ""), row.get("shape", ""), f"{row.get('floor_ms', 0):.3g}", f"{ours:.3g}", ratio, peers or row.get("peer", "")))
    return Table(("operator", "work", "shape", "floor", "refimpl.gpu", "times the floor", "peers"), rows)


def measured_on(folder: Path = RESULTS) -> Table:
    """On what, with which versions, and when."""
    rows = [(about.get("device", ""), about_text(about)) for about in (data["measured_on"] for data in gpu_files(folder) if data["rows"])]
    rows = list(dict.fromkeys(rows))
    for data in (cpu_file(folder), public_file(folder)):
        if about := data.get("machine"):
            rows.append((about["processor"], about_text(about)))
    return Table(("machine", "with"), rows)


def about_text(about: dict) -> str:
    """Versions and dates that every file names; remarks of single files stay with these."""
    names = ("driver", "cuda", "cupy", "torch", "cores", "threads", "system", "python", "numpy", "scipy", "date")
    return ", ".join(f"{name} {about[name]}" for name in names if about.get(name))


def public_ratios(folder: Path = RESULTS) -> Table:
    """Our fastest form over each public implementation."""
    ratios = public_file(folder).get("ratios", {})
    return Table(("implementation", "ours / theirs"), [(name, f"{ratio:.2f}") for name, ratio in ratios.items()])
