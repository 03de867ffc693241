"""Sequence mixers at any length, on paper: what a machine's rates allow for attention, scans and SSD, up to 10⁹ tokens.

A mixer is described by its `Work`: operations of dense products, of plain arithmetic, exponentials, and bytes to and from the
large memory. A `Machine` does each at a stated rate, all of them side by side, so that the slowest decides:

    time = launch + max(products / tensor, arithmetic / scalar, exponentials / special, bytes / bandwidth)            (1)

with the rates of arithmetic cut to the multiprocessors that have a block to work on.

Over P devices, with c the time of one tile of T/P queries and keys and x that of handing on a shard,

    ring, all pairs               c + (P - 1) max(c, x)                                                               (2)
    ring, causal, contiguous      the last device meets every shard: max(c/2 + (P-1) c, x + (P-1) c, (P-1) x + c)     (3)
    ring, causal, striped         c/2 + (P - 1) max(c/2, x)                                                           (4)
    scan                          reduce(T/P) + ⌊log₂ P⌋ · hop + scan(T/P)                                            (5)

The scan reads its input twice, first for the total of every shard, then with the state that comes in. Its ⌈log₂ P⌉ rounds hold
at most ⌊log₂ P⌋ messages in a chain: where P is no power of two, what the last round sends was ready early. `simulate` plays
(2)-(5) event by event; tests hold the two against each other. These are floors: kernels that reach 70-90 % of a rate are
good ones, and `compare` says what was measured where measurements are kept.

References
    [1] T. Dao (2023), FlashAttention-2, arXiv:2307.08691. [2] H. Liu et al. (2023), Ring attention, arXiv:2310.01889.
    [3] W. Brandon et al. (2023), Striped attention, arXiv:2311.09431. [4] G. Blelloch (1990), Prefix sums, section 1.4.
    [5] D. Merrill, M. Garland (2016), Single-pass parallel prefix scan with decoupled look-back, NVR-2016-002.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import Any

from refimpl.complexity.calculators import attention_pairs
from refimpl.complexity.claims.measurements import Measurement, measurements


@dataclass(frozen=True)
class Machine:
    """A device's rates, and those of its link to the next.

    Attributes
    ----------
    multiprocessors : int
    bandwidth, link_bandwidth : float
        Bytes a second: of the large memory; to the next device, in one direction.
    tensor, scalar, special : float
        Operations a second: of dense products in 16 bits, of fp32 arithmetic, exponentials.
    link_latency, launch : float
        Seconds: until a message of no bytes has arrived; until a kernel runs.
    memory : float
        Bytes.
    source : str
    """

    name: str
    multiprocessors: int
    bandwidth: float
    tensor: float
    scalar: float
    special: float
    memory: float
    link_bandwidth: float
    link_latency: float
    source: str
    launch: float = 5e-6

    def hop(self, size: float) -> float:
        """Seconds until a message of `size` bytes has arrived at the next device."""
        return self.link_latency + size / self.link_bandwidth


_ASSUMED = "latencies of links and launches are assumptions"
MACHINES: dict[str, Machine] = {
    m.name: m
    for m in (
        Machine("a100", 108, 2.04e12, 312e12, 19.5e12, 2.4e12, 80e9, 300e9, 5e-6, f"NVIDIA A100 80GB data sheet; {_ASSUMED}"),
        Machine("h100", 132, 3.35e12, 989e12, 67e12, 3.9e12, 80e9, 450e9, 5e-6, f"NVIDIA H100 SXM data sheet; {_ASSUMED}"),
        Machine("h200", 132, 4.8e12, 989e12, 67e12, 3.9e12, 141e9, 450e9, 5e-6, f"NVIDIA H200 data sheet; {_ASSUMED}"),
        Machine("h100-infiniband", 132, 3.35e12, 989e12, 67e12, 3.9e12, 80e9, 50e9, 10e-6, f"the same behind 400 Gbit/s; {_ASSUMED}"),
    )
}


@dataclass(frozen=True)
class Work:
    """What a mixer does: dense products, plain arithmetic, exponentials, bytes moved; bytes that stay resident; blocks of threads."""

    products: float = 0.0
    arithmetic: float = 0.0
    exponentials: float = 0.0
    moved: float = 0.0
    resident: float = 0.0
    blocks: float = inf

    def limits(self, machine: Machine) -> dict[str, float]:
        """Seconds that each resource takes by itself; fewer blocks than multiprocessors leave the others idle."""
        busy = min(1.0, self.blocks / machine.multiprocessors)
        return {
            "products": self.products / (busy * machine.tensor),
            "arithmetic": self.arithmetic / (busy * machine.scalar),
            "exponentials": self.exponentials / (busy * machine.special),
            "bandwidth": self.moved / machine.bandwidth,
        }

    def seconds(self, machine: Machine) -> float:
        """Equation (1)."""
        return machine.launch + max(self.limits(machine).values())


# -- what mixers do ----------------------------------------------------------------------------------------------------


def attention_work(
    T: int,
    *,
    queries: int | None = None,
    d: int = 128,
    heads: int = 32,
    kv_heads: int = 8,
    causal: bool = True,
    element: int = 2,
    batch: int = 1,
) -> Work:
    """Tiled attention [1]: two products and an exponential for every pair; q, k, v read and o written once."""
    n = T if queries is None else queries
    pairs = batch * heads * (attention_pairs(T, causal=True) if causal and n == T else n * T)
    moved = batch * element * d * (2 * heads * n + 2 * kv_heads * T)
    return Work(4 * pairs * d, 4 * pairs, pairs, moved, moved, batch * heads * ceil(n / 128))


def recurrence_work(T: int, *, c: int = 4096, element: int = 2, batch: int = 1, reduce: bool = False) -> Work:
    """h_t = a_t h_{t-1} + b_t in one pass [5]; with `reduce` only the total, nothing written but one state."""
    moved = batch * element * c * T * (2 if reduce else 3)
    return Work(0, 2 * batch * c * T, 0, moved, 3 * batch * element * c * T, _scan_blocks(T, c, batch))


def selective_scan_work(T: int, *, c: int = 8192, n: int = 16, element: int = 2, batch: int = 1, reduce: bool = False) -> Work:
    """Mamba's fused scan: 7 operations, one an exponential, for each of c n states; u, dt, B, C read, y written."""
    states = batch * c * n * T
    moved = batch * element * T * ((2 if reduce else 3) * c + 2 * n)
    return Work(0, 6 * states, states, moved, batch * element * T * (3 * c + 2 * n), _scan_blocks(T, c, batch))


def ssd_work(
    T: int,
    *,
    heads: int = 128,
    p: int = 64,
    n: int = 128,
    groups: int = 1,
    chunk: int = 128,
    element: int = 2,
    batch: int = 1,
    reduce: bool = False,
) -> Work:
    """Mamba-2 in chunks: scores within a chunk, their products with x, states in and out."""
    within = 2 * chunk * n * groups + 2 * chunk * p * heads
    states = 2 * n * p * heads
    products = batch * T * (states if reduce else within + 2 * states)
    moved = batch * element * T * ((1 if reduce else 2) * heads * p + 2 * groups * n)
    decays = batch * T * chunk * heads
    resident = batch * element * T * (2 * heads * p + 2 * groups * n)
    return Work(products, decays, decays / 2, moved, resident, batch * heads * ceil(T / chunk))


def _scan_blocks(T: int, c: int, batch: int) -> int:
    """Blocks of a single-pass scan: 64 channels by 1,024 steps."""
    return batch * ceil(c / 64) * ceil(T / 1024)


SCANS: dict[str, tuple[Callable[..., Work], Callable[..., float]]] = {
    "recurrence": (recurrence_work, lambda c=4096, batch=1, **_: 2 * 4.0 * c * batch),
    "selective_scan": (selective_scan_work, lambda c=8192, n=16, batch=1, **_: 2 * 4.0 * c * n * batch),
    "ssd": (ssd_work, lambda heads=128, p=64, n=128, batch=1, **_: 4.0 * heads * (p * n + 1) * batch),
}
MIXERS = ("attention", *SCANS)


# -- how long they take ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """Seconds, what decides them, the parts they are made of, and the bytes that each device holds."""

    mixer: str
    T: int
    devices: int
    seconds: float
    limit: str
    parts: Mapping[str, float]
    resident: float


def predict_time(
    mixer: str, T: int, machine: Machine | str = "h100", *, devices: int = 1, schedule: str = "striped", **sizes
) -> Prediction:
    """Time of one mixer over T tokens.

    Parameters
    ----------
    mixer : {"attention", "recurrence", "selective_scan", "ssd"}
        Attention runs in a ring over more than one device, the others as scans of two levels.
    T : int
        Tokens, at least `devices`.
    machine : Machine or str
        Its rates, or the name of one of `MACHINES`.
    devices : int
    schedule : {"striped", "contiguous"}
        How a causal ring deals out the sequence.
    **sizes
        Of the mixer: `attention_work`, `recurrence_work`, `selective_scan_work`, `ssd_work` say which.

    Returns
    -------
    Prediction

    Raises
    ------
    ValueError
        If the mixer, machine or schedule is none of these, or T or devices is out of range.

    Notes
    -----
    A floor by equations (1)-(5) of the module's docstring, exact for the schedule that they describe.

    Examples
    --------
    A million tokens on one H100, one layer of width 4,096:

    >>> for mixer in ("attention", "selective_scan", "ssd"):
    ...     result = predict_time(mixer, 2**20)
    ...     print(f"{mixer}: {result.seconds:.3g} s, decided by {result.limit}")
    attention: 9.11 s, decided by products
    selective_scan: 0.0352 s, decided by exponentials
    ssd: 0.0104 s, decided by bandwidth
    """
    machine = _machine(machine)
    _check(mixer, T, devices, schedule)
    if mixer == "attention":
        return _attention(T, machine, devices, schedule, **sizes)
    work, carry = SCANS[mixer]
    shard = ceil(T / devices)
    scan = work(shard, **sizes)
    parts = {"scan": scan.seconds(machine)}
    if devices > 1:
        parts["reduce"] = work(shard, reduce=True, **sizes).seconds(machine)
        parts["carries"] = scan_hops(devices) * machine.hop(carry(**sizes))
    limits = scan.limits(machine) | {"latency": machine.launch + parts.get("carries", 0.0)}
    return Prediction(mixer, T, devices, sum(parts.values()), max(limits, key=limits.__getitem__), parts, scan.resident)


def _attention(T: int, machine: Machine, devices: int, schedule: str, causal: bool = True, **sizes) -> Prediction:
    if devices == 1:
        work = attention_work(T, causal=causal, **sizes)
        limits = work.limits(machine) | {"latency": machine.launch}
        return Prediction(
            "attention",
            T,
            1,
            work.seconds(machine),
            max(limits, key=limits.__getitem__),
            {"attention": work.seconds(machine)},
            work.resident,
        )
    tile, half, x, resident = ring_times(T, machine, devices, **sizes)
    if not causal:
        seconds = ring_all(tile, x, devices)
    elif schedule == "contiguous":
        seconds = ring_contiguous(tile, half, x, devices)
    else:
        seconds = ring_all(half, x, devices)
    step = half if causal and schedule == "striped" else tile
    return Prediction("attention", T, devices, seconds, "link" if x > step else "products", {"tile": step, "hop": x}, resident)


def ring_times(
    T: int, machine: Machine, devices: int, *, d: int = 128, kv_heads: int = 8, element: int = 2, batch: int = 1, **sizes
) -> tuple[float, float, float, float]:
    """Seconds of a whole tile, of a tile of which half the pairs are masked, of a hop, and the bytes that a device holds."""
    shard = ceil(T / devices)
    whole = attention_work(shard, d=d, kv_heads=kv_heads, element=element, batch=batch, causal=False, **sizes)
    half = dataclasses.replace(whole, products=whole.products / 2, arithmetic=whole.arithmetic / 2, exponentials=whole.exponentials / 2)
    message = 2 * batch * kv_heads * d * element * shard
    return whole.seconds(machine), half.seconds(machine), machine.hop(message), whole.resident + message


def ring_all(step: float, x: float, devices: int) -> float:
    """(2), and with half a tile as the step (4)."""
    return step + (devices - 1) * max(step, x)


def ring_contiguous(tile: float, half: float, x: float, devices: int) -> float:
    """(3): the last device meets its own shard, half masked, then all others."""
    rest = devices - 1
    return max(half + rest * tile, x + rest * tile, rest * x + tile) if rest else half


def scan_hops(devices: int) -> int:
    """The longest chain of messages in an exclusive scan by recursive doubling: ⌊log₂ P⌋."""
    return devices.bit_length() - 1


def crossover(
    first: str,
    second: str,
    machine: Machine | str = "h100",
    *,
    devices: int = 1,
    limit: int = 10**9,
    sizes: Mapping[str, Mapping] | None = None,
) -> float:
    """The length from which on the first mixer takes longer than the second, to one token; inf if not up to `limit`.

    Parameters
    ----------
    first, second : str
        Mixers, the first growing faster.
    machine, devices
        As for `predict_time`.
    limit : int
    sizes : mapping of str to mapping, optional
        Sizes of each mixer, by its name.

    Examples
    --------
    >>> crossover("attention", "selective_scan"), crossover("attention", "ssd")
    (4057, 1199)
    """
    longer = lambda T: (
        predict_time(first, T, machine, devices=devices, **(sizes or {}).get(first, {})).seconds
        > predict_time(second, T, machine, devices=devices, **(sizes or {}).get(second, {})).seconds
    )
    if not longer(limit):
        return inf
    high = limit
    while high > devices and longer(max(high // 2, devices)):
        high = max(high // 2, devices)
    low = max(high // 2, devices - 1) if high > devices else devices - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if longer(middle) else (middle, high)
    return high


# -- against measurements ----------------------------------------------------------------------------------------------

_MEASURED_AS = {"attention": "attention", "linear_recurrence": "recurrence", "selective_scan": "selective_scan", "ssd": "ssd"}
_LETTERS = {
    "H": "heads",
    "Hq": "heads",
    "Hkv": "kv_heads",
    "B": "batch",
    "batch": "batch",
    "d": "d",
    "c": "c",
    "n": "n",
    "p": "p",
    "G": "groups",
    "C": "c",
    "N": "n",
}
_TAKES = {
    "attention": {"heads", "kv_heads", "batch", "d"},
    "recurrence": {"c", "batch"},
    "selective_scan": {"c", "n", "batch"},
    "ssd": {"heads", "p", "n", "groups", "batch"},
}


@dataclass(frozen=True)
class Compared:
    """A time that was measured, its floor, and how many times the floor it is."""

    measurement: Measurement
    predicted: float

    @property
    def ratio(self) -> float:
        return self.measurement.seconds / self.predicted


def compare(kept: Sequence[Measurement] | None = None, machines: Mapping[str, Machine] = MACHINES) -> list[Compared]:
    """Predictions beside what was measured on GPUs.

    Parameters
    ----------
    kept : sequence of Measurement, optional
        By default all that the repository keeps; of them, forward passes of the four mixers.
    machines : mapping of str to Machine
        A measurement counts if its device's name holds the name of one of them.

    Returns
    -------
    list of Compared
        Empty where nothing is kept that can be predicted.

    Examples
    --------
    >>> from refimpl.complexity.claims.measurements import Measurement
    >>> sizes = {"T": 4096, "H": 16, "Hkv": 16, "B": 4, "d": 128}
    >>> row = Measurement("attention", "some kernel", 0.47e-3, "NVIDIA H100 80GB HBM3", "580", "2026-11-21", "bfloat16", sizes)
    >>> f"{compare([row])[0].ratio:.1f} times the floor"
    '1.7 times the floor'
    """
    found = []
    for m in measurements() if kept is None else kept:
        machine = next((v for k, v in machines.items() if k in m.device.lower()), None)
        mixer = _MEASURED_AS.get(m.op)
        if machine is None or mixer is None or "T" not in m.sizes or m.direction != "forward":
            continue
        sizes: dict[str, Any] = {_LETTERS[k]: int(v) for k, v in m.sizes.items() if _LETTERS.get(k) in _TAKES[mixer]}
        if mixer == "attention":
            sizes |= {"causal": "full" not in m.work}
            if "heads" in sizes:
                sizes.setdefault("kv_heads", sizes["heads"])
        element = {"float32": 4, "float64": 8}.get(m.dtype, 2)
        if element > 2:
            machine = dataclasses.replace(machine, tensor=machine.scalar)  # tensor cores would round to TF32
        found.append(Compared(m, predict_time(mixer, int(m.sizes["T"]), machine, element=element, **sizes).seconds))
    return found


def _machine(machine: Machine | str) -> Machine:
    if isinstance(machine, Machine):
        return machine
    if machine not in MACHINES:
        raise ValueError(f"predict_time: machine must be a Machine or one of {', '.join(MACHINES)}, got {machine!r}")
    return MACHINES[machine]


def _check(mixer: str, T: int, devices: int, schedule: str) -> None:
    if mixer not in MIXERS:
        raise ValueError(f"predict_time: mixer must be one of {', '.join(MIXERS)}, got {mixer!r}")
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise ValueError(f"predict_time: devices must be a whole number of at least 1, got {devices!r}")
    if isinstance(T, bool) or not isinstance(T, int) or devices > T:
        raise ValueError(f"predict_time: T must be a whole number of at least {devices}, one token a device, got {T!r}")
    if schedule not in ("striped", "contiguous"):
        raise ValueError(f"predict_time: schedule must be striped or contiguous, got {schedule!r}")
