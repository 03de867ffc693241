"""What `refimpl scale` prints and draws: times of mixers against length, crossovers, and what was measured."""

from collections.abc import Sequence
from math import ceil, isinf
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from refimpl.complexity.scale import MACHINES, MIXERS, SCANS, Machine, compare, crossover, predict_time

LENGTHS = (1024, 8192, 65536, 524_288, 4_194_304, 33_554_432, 10**9)
NAMES = {"attention": "attention", "recurrence": "linear recurrence", "selective_scan": "selective scan", "ssd": "SSD"}
LIMITS = {"products": "p", "arithmetic": "a", "exponentials": "e", "bandwidth": "b", "latency": "l", "link": "k"}


def page(machine: Machine, devices: Sequence[int]) -> RenderableType:
    """Times by length for each number of devices, the crossovers, the comparison with measurements."""
    parts: list[RenderableType] = [Text(f"{machine.name}: {machine.source}. One mixer of width 4,096, 16 bits, causal, forward.")]
    for count in devices:
        how = "one device" if count == 1 else f"{count} devices (attention in a striped ring, scans of two levels)"
        parts += [Text(f"\n{how}", "bold"), _times(machine, count), _crossings(machine, count)]
    parts.append(
        Text(
            "\nA letter says what decides: p products, a arithmetic, e exponentials, b bandwidth, l latency, k link. Floors, not promises."
        )
    )
    found = compare(machines={k: m for k, m in MACHINES.items() if k == machine.name})
    if found:
        parts += [Text("\nMeasured, in multiples of the floor", "bold"), _measured(found)]
    else:
        parts.append(Text("No measurement on this machine is kept, so none of it has been compared with one."))
    return Group(*parts)


def _times(machine: Machine, devices: int) -> Table:
    grid = Table.grid(padding=(0, 2))
    for _ in range(len(MIXERS) + 2):
        grid.add_column(justify="right", no_wrap=True)
    grid.add_row("tokens", *(NAMES[m] for m in MIXERS), "devices to hold it", style="dim")
    for T in LENGTHS:
        found = [predict_time(m, T, machine, devices=devices) for m in MIXERS]
        hold = ceil(max(p.resident for p in found) * devices / machine.memory)
        grid.add_row(f"{T:,}", *(f"{duration(p.seconds)} {LIMITS[p.limit]}" for p in found), f"{hold:,}")
    return grid


def _crossings(machine: Machine, devices: int) -> Text:
    said = []
    for name in SCANS:
        at = crossover("attention", name, machine, devices=devices)
        said.append(f"{NAMES[name]} " + ("never" if isinf(at) else "at every length" if at == devices else f"from {at:,.0f} tokens"))
    return Text("Attention takes longer than: " + ", ".join(said) + ".")


def _measured(found) -> Table:
    grid = Table.grid(padding=(0, 2))
    for row in found:
        m = row.measurement
        sizes = " ".join(f"{k}{v:g}" for k, v in m.sizes.items())
        grid.add_row(
            m.op, m.implementation, m.dtype, sizes, duration(m.seconds), f"×{row.ratio:.1f}", f"{m.device}, driver {m.driver}, {m.date}"
        )
    return grid


def duration(seconds: float) -> str:
    """Three digits and a unit that one can picture."""
    for size, unit in ((86400 * 365.25, "a"), (86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def draw(machine: Machine, devices: Sequence[int], path: Path) -> None:
    """Time against length for each number of devices; ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(devices) + 1, 4.8), layout="constrained")
    T = [2**i for i in range(10, 31)]
    for axes, count in zip(figure.subplots(1, len(devices), sharey=True, squeeze=False)[0], devices):
        for mixer, style in zip(MIXERS, ("-", "--", "-.", ":")):
            axes.plot(T, [predict_time(mixer, n, machine, devices=count).seconds for n in T], style, label=NAMES[mixer])
        axes.set(xscale="log", yscale="log", xlabel="tokens", title="one device" if count == 1 else f"{count} devices")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"seconds, {machine.name}, floor")
    figure.axes[0].legend(fontsize=9)
    figure.savefig(path, dpi=150)
