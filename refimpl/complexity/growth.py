"""`fit`: how counts grow with a size, logarithms told apart.

At lengths that are powers of two, what algorithms of halves, chunks and pairs count is a sum of terms T^p log2^q T with
nothing left over, since every ceiling of log2 T is log2 T itself. So no slope is read off a picture: the few terms are looked for that
reproduce all counts, and the largest of them is the answer. Only where no such terms exist (data that decide, factors that are
nearly square) are they fitted, and `exact` is False.
"""

import functools
import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.complexity.counter import Counts
from refimpl.complexity.runs import find, function_of, letters, measure
from refimpl.op import Op

LENGTHS = (16, 32, 64, 128, 256)
LONGER = (512, 1024)  # tried in turn while no sum of few terms fits
MANY = 30000  # array operations: what takes more is not run at greater lengths
BLOCKS = {"chunk": 4, "block": 4, "block_q": 8, "block_k": 8}  # small, for lengths must be long beside them
MEASURES = ("work", "depth", "traffic", "peak")

_WHOLE = [(p, q) for p in (0, 1, 2, 3) for q in (0, 1, 2)]
_HALF = [(0.5, 0), (1.5, 0)]
_TIGHT = 1e-9
PART = 0.2  # of a count: what less makes up does not lead


@dataclass(frozen=True)
class Growth:
    """A leading term: ``coefficient · T^power · log2(T)^logs``.

    Attributes
    ----------
    power, logs : float, int
    coefficient : float
    residual : float
        The largest relative distance of a count from the terms found, where these speak of it.
    """

    power: float
    logs: int
    coefficient: float
    residual: float = 0.0
    letter: str = "T"

    @property
    def order(self) -> tuple[float, int]:
        """(power, logs): what two growths are compared by."""
        return self.power, self.logs

    @property
    def exact(self) -> bool:
        """Whether the counts are sums of such terms, to the last digit."""
        return self.residual < _TIGHT

    def __str__(self) -> str:
        powers = {
            0: "",
            0.5: f"√{self.letter}",
            1: self.letter,
            1.5: f"{self.letter}√{self.letter}",
            2: f"{self.letter}²",
            3: f"{self.letter}³",
        }
        logs = {0: "", 1: f"log {self.letter}", 2: f"log² {self.letter}"}
        return " ".join(part for part in (powers[self.power], logs[self.logs]) if part) or "1"


@dataclass(frozen=True)
class Fit:
    """How each count of a form grows, and the counts.

    Attributes
    ----------
    work, depth, traffic, peak : Growth
    counts : mapping of int to Counts
        By length.
    """

    work: Growth
    depth: Growth
    traffic: Growth
    peak: Growth
    counts: Mapping[int, Counts]

    def __str__(self) -> str:
        return ", ".join(f"{name} {getattr(self, name)}" for name in MEASURES)


def fit(op: str | Op, form: str | None = None, axis: str = "T", *, lengths: Sequence[int] = (), **sizes) -> Fit:
    """Exponents of the counts of a form.

    Parameters
    ----------
    op, form
        As for `measure`.
    axis : str
        The size that grows: ``"T"`` for the operator's lengths, all of them at once; else a letter, or several: ``"Hq Hkv"``.
    lengths : sequence of int
        Its values, five or more powers of two; 16 to 256 and, where these decide nothing, up to 1024, by default.
    **sizes
        The others, options and block sizes, as for `measure`. Chunks (4) and tiles (8) are small unless they are given.

    Returns
    -------
    Fit

    Raises
    ------
    ValueError
        If there is no such operator, form, size or option, or nothing that `axis` names.

    Examples
    --------
    >>> from refimpl.complexity import fit
    >>> print(fit("linear_recurrence", "hillis_steele"))
    work T log T, depth log T, traffic T log T, peak T
    """
    op, form = find(op, form)
    grown = axes(op, axis)
    if lengths and len(set(lengths)) < 5:
        raise ValueError(f"{op.name}: fit needs at least five different lengths, got {tuple(lengths)}")
    own = {**blocks(op, form), **sizes}
    letter = axis.split()[0]
    counts: dict[int, Counts] = {}
    more = list(() if lengths else LONGER)
    pending = sorted(set(lengths)) or list(LENGTHS)
    while True:
        counts |= {n: measure(op, form, **(own | dict.fromkeys(grown, n))) for n in pending}
        found = [leading_term({n: getattr(c, name) for n, c in counts.items()}, letter) for name in MEASURES]
        if all(g.exact for g in found) or not more or counts[max(counts)].operations > MANY:
            work, depth, traffic, peak = found
            return Fit(work, depth, traffic, peak, counts)
        pending = [more.pop(0)]


def axes(op: Op, axis: str) -> tuple[str, ...]:
    """The letters that an axis stands for."""
    if axis == "T" and op.lengths:
        return op.lengths
    named = tuple(axis.split())
    for letter in named:
        if letter not in letters(op) and letter not in BLOCKS:
            raise ValueError(
                f"{op.name}: there is no size {letter!r}, only {', '.join(letters(op))}" + ("" if op.lengths else "; it has no length")
            )
    return named


def blocks(op: Op, form: str) -> dict[str, int]:
    """Small sizes for a form's chunks and tiles."""
    taken = inspect.signature(function_of(op, form)).parameters
    return {name: size for name, size in BLOCKS.items() if name in taken and taken[name].default not in (None, taken[name].empty)}


def leading_term(values: Mapping[int, float], letter: str = "T") -> Growth:
    """The leading term of a function given at some lengths.

    Examples
    --------
    >>> str(leading_term({n: 3 * n * n + 7 * n for n in (8, 16, 32, 64, 128)}))
    'T²'
    """
    n = np.array(sorted(values), float)
    y = np.array([values[k] for k in sorted(values)], float)
    if not np.all(np.isfinite(y)) or np.any(y < 0):
        raise ValueError(f"complexity: counts must be finite and at least 0, got {y.tolist()}")
    if not y.any():
        return Growth(0, 0, 0.0, letter=letter)
    found = _search(n, y, _WHOLE, range(1, 5), _TIGHT) or _search(n, y, _WHOLE + _HALF, range(1, 4), _TIGHT)
    for start in range(1, len(n) - 2):  # the shortest may be cases of their own: less than a tile, another phase the largest
        found = found or _search(n[start:], y[start:], _WHOLE, range(1, min(4, len(n) - start)), _TIGHT)
    if len(n) > 6:  # factors of a length are equal at every other power of two only
        found = found or _search(n[::2], y[::2], _WHOLE + _HALF, range(1, 3), _TIGHT)
    order, coefficient, residual = found or _nearest(n, y)
    return Growth(order[0], order[1], coefficient, residual, letter)


def _search(n: np.ndarray, y: np.ndarray, basis: list, counts: range, tolerance: float):
    """The model of fewest terms within a tolerance: (order, coefficient, residual) of its leading term, or None."""
    for count in counts:
        best = None
        for terms in itertools.combinations(sorted(basis), count):
            matrix = np.stack([_term(t, tuple(n)) for t in terms], axis=1) / y.clip(min=1)[:, None]
            weights, _, rank, _ = np.linalg.lstsq(matrix, y / y.clip(min=1), rcond=None)
            residual = float(np.abs(matrix @ weights - y / y.clip(min=1)).max())
            if rank < count or weights[-1] <= 0 or residual > tolerance:
                continue
            if best is None or residual < best[2] / 2:
                best = (terms[-1], float(weights[-1]), residual)
        if best is not None:
            return best
    return None


def _nearest(n: np.ndarray, y: np.ndarray):
    """Where no sum fits: of the best one with no negative parts, the largest term that makes up a good part at the end."""
    import scipy.optimize

    basis = sorted((p, q) for p, q in _WHOLE + _HALF if q < 2)
    scale = 1 / y.clip(min=1)
    matrix = np.stack([_term(t, tuple(n)) / _term(t, tuple(n))[-1] * y[-1] for t in basis], axis=1)
    weights = scipy.optimize.lsq_linear(matrix * scale[:, None], y * scale, bounds=(0, np.inf)).x
    residual = float(np.abs((matrix @ weights - y) * scale).max())
    leading = max(i for i in range(len(basis)) if weights[i] >= PART * weights.sum())
    return basis[leading], float(weights[leading] * y[-1] / _term(basis[leading], tuple(n))[-1]), max(residual, 2 * _TIGHT)


@functools.cache
def _term(order: tuple[float, int], n: tuple[float, ...]) -> np.ndarray:
    return np.array(n) ** order[0] * np.log2(n) ** order[1]
