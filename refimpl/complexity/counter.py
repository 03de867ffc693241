"""The ledger that counted arrays write to: what is counted, and how much of it.

Five numbers describe a run [1, 2]:

work        operations on the call's data: arithmetic and comparisons. A multiply-add is two, a product or sum of complex
            numbers six or two, any transcendental function one; moving, selecting and changing a sign are none. What needs
            no data (positions, masks of positions, tables of roots of unity) is not work of the call, and stands apart
            as `setup`.
depth       the longest chain of dependent operations, the time on unboundedly many processors: one for an operation, log2 n
            more for a sum, maximum, running sum or sort of n. Each element of each array carries its own.
traffic     bytes that array operations read and write if each fetches its operands and stores its result. Views are free.
peak        the most bytes alive at once, arguments excepted.
transfers   bytes that cross between a memory of M bytes and the one behind it, where the last recently used line of 64
            bytes makes room for the next [2, 3]. What dies inside never crosses.

References
    [1] G. E. Blelloch, "Programming parallel algorithms", Communications of the ACM 39(3), 1996, section 2.
    [2] J.-W. Hong and H. T. Kung, "I/O complexity: the red-blue pebble game", STOC 1981, section 1.
    [3] T. Dao et al., "FlashAttention", NeurIPS 2022, section 3.2.
"""

import contextvars
from collections import Counter as Tally
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy import arange, empty, full  # by name: a measurement replaces those of `np`

CONSTANT = -1  # the depth of what no argument's value reaches

active: contextvars.ContextVar["Ledger | None"] = contextvars.ContextVar("active", default=None)


class Uncounted(TypeError):
    """An operation that the counter does not know: it raises rather than count nothing."""


@dataclass(frozen=True)
class Counts:
    """What one run of a form costs.

    Attributes
    ----------
    work : int
        Operations on data.
    depth : int
        Length of the longest chain of dependent operations.
    traffic : int
        Bytes read and written, operation by operation.
    peak : int
        The most bytes alive at once, arguments excepted.
    transfers : int or None
        Bytes that cross the boundary of a memory of the size asked for; None where none was.
    setup : int
        Operations that depend on no argument's values.
    by_class : mapping of str to int
        Work by class: "add", "multiply", "divide", "root", "compare", "round", "exp", "log", "power", "trigonometric", "special", "matmul",
        "einsum", "sum", "fft", "solve", "sort", "integer".
    operations : int
        Array operations.
    """

    work: int
    depth: int
    traffic: int
    peak: int
    transfers: int | None = None
    setup: int = 0
    by_class: Mapping[str, int] = field(default_factory=dict)
    operations: int = 0

    @property
    def transcendental(self) -> int:
        """Exponentials, logarithms, powers, trigonometric and special functions."""
        return sum(self.by_class.get(name, 0) for name in ("exp", "log", "power", "trigonometric", "special"))


class Ledger:
    """Counts while a run lasts.

    Parameters
    ----------
    memory : int, optional
        Bytes of the small memory whose transfers are counted.
    """

    def __init__(self, memory: int | None = None):
        self.work: Tally[str] = Tally()
        self.setup = self.depth = self.traffic = self.live = self.peak = self.operations = 0
        self.cache = None if memory is None else Cache(memory)

    def counts(self) -> Counts:
        return Counts(
            work=sum(self.work.values()),
            depth=self.depth,
            traffic=self.traffic,
            peak=self.peak,
            transfers=None if self.cache is None else self.cache.transfers,
            setup=self.setup,
            by_class=dict(sorted(self.work.items())),
            operations=self.operations,
        )

    def add(self, kind: str, amount: int, reach: int) -> None:
        """`amount` operations, of which the deepest is `reach` deep (CONSTANT: none depends on data)."""
        if reach < 0:
            self.setup += int(amount)
        elif amount:
            self.work[kind] += int(amount)
            self.depth = max(self.depth, int(reach))

    def allocate(self, nbytes: int) -> None:
        self.live += nbytes
        self.peak = max(self.peak, self.live)

    def free(self, buffer: "Buffer") -> None:
        self.live -= buffer.nbytes
        if self.cache is not None:
            self.cache.forget(buffer)

    def touch(self, read=(), written=()) -> None:
        """An array operation's operands and results."""
        self.operations += 1
        for array, store in (*((a, False) for a in read), *((a, True) for a in written)):
            if not array.ndim:
                continue  # a number is in a register
            self.traffic += distinct(array) * array.itemsize
            buffer = getattr(array, "_buffer", None)
            if buffer is None and array.dtype.kind in "fc":
                raise Uncounted("complexity: an array takes part that was made where nothing is counted")
            if self.cache is not None and buffer is not None and array.size:
                self.cache.access(buffer, buffer.lines(array), store)


def distinct(array: np.ndarray) -> int:
    """Elements that an array reaches in memory: broadcast axes repeat none."""
    n = 1
    for size, stride in zip(array.shape, array.strides, strict=True):
        if stride or not size:
            n *= size
    return n


class Buffer:
    """Memory of an array and of all views of it, with the depth of each element.

    The depth is one number while all elements share it, else an array in the order of memory, of which a view of the data
    finds its part by its strides. So a write through one view is seen through every other.
    """

    __slots__ = ("depth", "itemsize", "ledger", "nbytes", "size", "start")

    def __init__(self, array: np.ndarray, depth, ledger: Ledger, given: bool = False):
        self.ledger, self.itemsize, self.size = ledger, array.itemsize, array.size
        self.start, self.nbytes = array.__array_interface__["data"][0], 0 if given or not array.ndim else array.nbytes
        self.depth: Any = CONSTANT  # one number, or an array
        if not isinstance(depth, np.ndarray):
            self.depth = int(depth)
        elif array.size and (most := int(depth.max())) == int(depth.min()):
            self.depth = most
        elif array.size:
            self.depth = empty(array.size, np.int32)
            self._window(array)[...] = depth
        ledger.allocate(self.nbytes)

    def __del__(self):
        self.ledger.free(self)

    def _window(self, array: np.ndarray) -> np.ndarray:
        offset = (array.__array_interface__["data"][0] - self.start) // self.itemsize
        strides = tuple(4 * (s // self.itemsize) for s in array.strides)
        return np.ndarray(array.shape, np.int32, self.depth, 4 * offset, strides)

    def depth_of(self, array: np.ndarray):
        """Depths of a view's elements: an array of its shape, or one number."""
        if not array.size:
            return CONSTANT
        return self.depth if isinstance(self.depth, int) else self._window(array)

    def write(self, array: np.ndarray, depth, where=...) -> None:
        """The elements of a view (at the index `where`) now have this depth."""
        if not array.size:
            return
        if isinstance(self.depth, int):
            if not isinstance(depth, np.ndarray) and depth == self.depth:
                return
            if not isinstance(depth, np.ndarray) and where is Ellipsis and array.size == self.size:
                self.depth = int(depth)
                return
            self.depth = full(self.size, self.depth, np.int32)
        self._window(array)[where] = depth

    def lines(self, array: np.ndarray) -> np.ndarray:
        """Numbers of the lines of memory that a view reaches."""
        first = array.__array_interface__["data"][0] - self.start
        at = first + arange(1)
        for size, stride in zip(array.shape, array.strides, strict=True):
            if stride and size > 1:
                at = np.add.outer(at, stride * arange(size)).ravel()
        return np.unique(np.concatenate([at, at + array.itemsize - 1]) // LINE)


LINE = 64


class Cache:
    """A memory of few bytes before one without end: the line not used for longest makes room."""

    def __init__(self, size: int):
        if size < LINE:
            raise ValueError(f"complexity: memory must hold at least one line of {LINE} bytes, got {size}")
        self._room = size // LINE
        self._lines: OrderedDict[tuple[int, int], bool] = OrderedDict()  # (buffer, line) -> whether it must be stored
        self._of: dict[int, set[tuple[int, int]]] = {}
        self.transfers = 0

    def access(self, buffer: Buffer, lines: np.ndarray, store: bool) -> None:
        owner = id(buffer)
        of = self._of.setdefault(owner, set())
        for line in lines.tolist():
            key = (owner, line)
            if key in self._lines:
                self._lines.move_to_end(key)
                self._lines[key] |= store
                continue
            if not store:
                self.transfers += LINE
            self._lines[key] = store
            of.add(key)
            if len(self._lines) > self._room:
                old, dirty = self._lines.popitem(last=False)
                self._of[old[0]].discard(old)
                self.transfers += LINE * dirty

    def forget(self, buffer: Buffer) -> None:
        """A buffer has died: nobody will ask for it."""
        for key in self._of.pop(id(buffer), ()):
            del self._lines[key]

    def flush(self, buffer: Buffer) -> None:
        """A result is stored."""
        for key in self._of.get(id(buffer), ()):
            self.transfers += LINE * self._lines[key]
            self._lines[key] = False
