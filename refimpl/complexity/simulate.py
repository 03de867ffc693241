"""The ring and the scan of two levels, played event by event: what the closed formulas of `scale` are held against.

A simulation knows only local rules (a device computes on the shard that it holds, when it has finished the one before; a
shard is handed on as soon as it has arrived; a carry waits for the other device's), and no formula for
the whole. Values travel with the events of the scan, so that the result can be compared with the recurrence.
"""

import heapq
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from refimpl.ops.recurrence.linear_recurrence import linear_recurrence


def simulate_ring(devices: int, compute: Callable[[int, int], float], hop: float) -> tuple[float, np.ndarray]:
    """A ring: every device starts with its own shard, and hands each on to the next one.

    Parameters
    ----------
    devices : int
        P.
    compute : callable
        ``compute(r, s)``: seconds that device r takes for shard s; 0 where there is nothing to do.
    hop : float
        Seconds of handing on a shard, while the devices compute. Shards come a hop apart, so that no link has two at once.

    Returns
    -------
    seconds : float
        When the last tile is done.
    busy : ndarray, shape (P,)
        Seconds that each device computed.

    Examples
    --------
    Four devices, tiles of 3 seconds, hops of 1: the hops are hidden.

    >>> simulate_ring(4, lambda r, s: 3.0, 1.0)[0]
    12.0
    """
    order = itertools.count()
    events: list[tuple[float, int, str, int, int]] = [(0.0, next(order), "arrives", r, 0) for r in range(devices)]
    heapq.heapify(events)
    arrived = [set[int]() for _ in range(devices)]
    step = [0] * devices  # the tile that a device does next, or is doing
    working = [False] * devices
    busy = np.zeros(devices)
    end = 0.0
    while events:
        now, _, what, r, t = heapq.heappop(events)
        if what == "arrives":
            arrived[r].add(t)
            if t + 1 < devices:
                heapq.heappush(events, (now + hop, next(order), "arrives", (r + 1) % devices, t + 1))
        else:
            working[r] = False
            step[r] += 1
            end = max(end, now)
        if not working[r] and step[r] in arrived[r]:
            seconds = compute(r, (r - step[r]) % devices)
            busy[r] += seconds
            working[r] = True
            heapq.heappush(events, (now + seconds, next(order), "done", r, step[r]))
    return end, busy


def tiles(tile: float, half: float, *, causal: bool, schedule: str = "striped") -> Callable[[int, int], float]:
    """Seconds of the tile of device r and shard s, for `simulate_ring`: whole, half masked, or none at all."""
    if not causal:
        return lambda r, s: tile
    if schedule == "striped":
        return lambda r, s: half
    return lambda r, s: tile if s < r else half if s == r else 0.0


def simulate_scan(
    a: np.ndarray, b: np.ndarray, devices: int, *, reduce: Sequence[float], scan: Sequence[float], hop: float
) -> tuple[np.ndarray, float]:
    """A linear recurrence over shards: totals, an exclusive scan of them by recursive doubling, then every shard from its state.

    Parameters
    ----------
    a, b : ndarray, shape (T, c)
        Decays and inputs of `refimpl.linear_recurrence`; T a multiple of `devices`.
    devices : int
        P.
    reduce, scan : sequence of float
        Seconds that each device takes for the total of its shard, and for its scan.
    hop : float
        Seconds of a message.

    Returns
    -------
    h : ndarray, shape (T, c)
    seconds : float
        When the last device is done.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.full((8, 1), 0.5), np.ones((8, 1))
    >>> h, seconds = simulate_scan(a, b, 4, reduce=[2.0] * 4, scan=[3.0] * 4, hop=1.0)
    >>> h[-1, 0], seconds
    (np.float64(1.9921875), 7.0)
    """
    if len(b) % devices:
        raise ValueError(f"simulate_scan: b must have a multiple of {devices} steps, got {len(b)}")
    shards = [slice(i, i + len(b) // devices) for i in range(0, len(b), len(b) // devices)]
    total = [(np.prod(a[s], axis=0), linear_recurrence(a[s], b[s])[-1]) for s in shards]  # of everything received and one's own
    before: list[tuple[np.ndarray, np.ndarray] | None] = [None] * devices
    clock = list(reduce)
    reach = 1
    while reach < devices:
        sent, when = list(total), list(clock)
        for r in range(reach, devices):
            earlier = sent[r - reach]
            clock[r] = max(when[r], when[r - reach] + hop)
            before[r] = earlier if before[r] is None else _compose(before[r], earlier)
            total[r] = _compose(total[r], earlier)
        reach *= 2
    parts = [linear_recurrence(a[s], b[s], state=None if carry is None else carry[1]) for s, carry in zip(shards, before)]
    return np.concatenate(parts), max(c + s for c, s in zip(clock, scan))


def _compose(later, earlier):
    """First `earlier`, then `later`: it does not commute."""
    return later[0] * earlier[0], later[0] * earlier[1] + later[1]
