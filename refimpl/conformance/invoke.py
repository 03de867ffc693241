"""One call of a candidate, with clean hands: fresh inputs, poisoned memory, outputs copied at once, inputs compared after.

This is all that runs beside a candidate; it knows no expected value.
"""

import contextlib
import signal
import threading
import traceback
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refimpl.conformance.frameworks import Numpy

INFERENCE = "inference"  # where a framework has a mode without gradients, with kernels that training does not run
BETWEEN = "another call before the backward pass"
TWICE = "the second backward pass of one graph"
ALONE = "alone: "  # and the name of the one argument that has a gradient


@dataclass
class Request:
    """A call as it is made: arrays of NumPy, in order and by keyword; `manner` is how it is asked for."""

    positional: list
    keywords: dict
    names: list
    view: str = "contiguous"
    poison: tuple[int, ...] = ()
    cotangents: Any = None
    manner: str = ""
    repeat: int = 1
    second: dict | None = None
    finish: bool = False


@dataclass
class Answer:
    """What came back: a tree of NumPy arrays, or why there is none."""

    result: Any = None
    again: list = field(default_factory=list)
    status: str = "OK"
    message: str = ""
    mutated: tuple[str, ...] = ()
    stale: bool = False


_KEPT = 2**24  # bytes of results that are kept to be looked at again


class Invoker:
    """Calls one function again and again; keeps some results, to see whether they change after they were returned.

    A request that says `finish` calls nothing: it asks whether what is kept still holds what it held.
    """

    def __init__(self, function, arrays: Numpy, vjp=None, timeout: float | None = None):
        self.function, self.arrays, self.vjp, self.timeout = function, arrays, vjp, timeout
        self._last: tuple[list, list[np.ndarray]] | None = None
        self._kept: list[tuple[list, list[np.ndarray]]] = []
        self._calls = 0

    def __call__(self, request: Request) -> Answer:
        try:
            if request.finish:
                return Answer(stale=any(map(self._changed, self._kept))) if self._kept else Answer(status="NOT_APPLICABLE", message="no result to keep")
            with _alarm(self.timeout), np.errstate(all="ignore"):
                return self._call(request)
        except _TookTooLong:
            return Answer(status="TIMEOUT", message=f"no answer within {self.timeout:g} s")
        except NotImplementedError as error:
            return Answer(status="NOT_APPLICABLE", message=f"the candidate refuses: {error}")
        except SystemExit as error:
            return Answer(status="CRASH", message=f"the candidate left by SystemExit({error.code!r})")
        except MemoryError as error:
            return Answer(status="CRASH", message=f"out of memory: {error}")
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return self._failed(_where(error))

    def _failed(self, message: str) -> Answer:
        """An exception; one that says that memory has run out, or after which its device answers no more, is a crash."""
        if any(sign in message.lower() for sign in OUT_OF_MEMORY):
            return Answer(status="CRASH", message=f"out of memory: {message}")
        try:
            self.arrays.synchronize()
        except Exception as error:
            return Answer(status="CRASH", message=f"the device answers no more after {message}: {error}")
        return Answer(status="ERROR", message=message)

    def _call(self, request: Request) -> Answer:
        positional = [self._in(x, request.view) for x in request.positional]
        keywords = {n: self._in(x, request.view) for n, x in request.keywords.items()}
        originals = dict(zip(request.names, request.positional, strict=True)) | request.keywords
        inputs = dict(zip(request.names, positional, strict=True)) | keywords
        if request.cotangents is not None:  # somebody else's too: the framework hands the same one to whoever else asks
            cotangents = self._in(request.cotangents, request.view)
            inputs |= dict(zip(("dy", "dstate"), cotangents, strict=True))
            originals |= dict(zip(("dy", "dstate"), request.cotangents, strict=True))
        self._poison(request.poison)
        runs, raw = [], None
        for _ in range(request.repeat):
            raw = self._differentiate(request, positional, keywords, cotangents) if request.cotangents is not None else self._compute(request, positional, keywords)
            runs.append(self._out(raw))  # at once: waiting for the whole device first would hide that the caller's stream does not wait
            self.arrays.synchronize()
        if request.second is not None:
            runs += self._other_values(request, inputs, positional, keywords)
        stale = self._last is not None and self._changed(self._last)
        if request.second is None and request.cotangents is None:
            self._keep(raw, runs[-1])
        mutated = tuple(n for n, x in inputs.items() if not _same_bits(self._back(x), originals[n]))
        return Answer(runs[0], runs[1:], mutated=mutated, stale=stale)

    def _other_values(self, request: Request, inputs: dict, positional: list, keywords: dict) -> list:
        """Results for other values in the very same buffers, and then for the first ones again: a cached answer shows."""
        found = []
        first = dict(zip(request.names, request.positional, strict=True)) | request.keywords
        for values in (request.second or {}, first):
            for name, x in inputs.items():
                self._overwrite(x, values[name])
            found.append(self._out(self.function(*positional, **keywords)))
            self.arrays.synchronize()
        return found

    def _overwrite(self, x, value) -> None:
        if isinstance(value, tuple) and isinstance(x, tuple):
            for part, v in zip(x, value, strict=True):
                self._overwrite(part, v)
        elif isinstance(value, np.ndarray):
            self.arrays.overwrite(x, value)

    def _compute(self, request: Request, positional, keywords):
        with self.arrays.inference() if request.manner == INFERENCE else contextlib.nullcontext():
            return self.function(*positional, **keywords)

    def _differentiate(self, request: Request, positional, keywords, cotangents):
        if self.vjp is None:
            other = None
            if request.manner == BETWEEN:
                other = [self._in(_rolled(x), request.view) for x in request.positional], {n: self._in(_rolled(x), request.view) for n, x in request.keywords.items()}
            alone = request.manner.removeprefix(ALONE) if request.manner.startswith(ALONE) else ""
            twice = request.manner == TWICE
            return self.arrays.gradient(self.function, positional, keywords, request.names, cotangents, alone, other, twice)
        outputs, dstate = cotangents
        options = {n: v for n, v in keywords.items() if n != "return_state"}
        return self.vjp(outputs, *positional, **options, **({} if dstate is None else {"dstate": dstate}))

    def _in(self, x, view: str):
        if isinstance(x, np.ndarray):
            return self.arrays.array(x, view)
        if isinstance(x, tuple) and hasattr(x, "_fields"):
            return type(x)(*(self._in(v, view) for v in x))
        if isinstance(x, tuple) and any(isinstance(v, np.ndarray) or v is None for v in x):
            return tuple(self._in(v, view) for v in x)
        return x

    def _out(self, y):
        if isinstance(y, dict):
            return {str(k): self._out(v) for k, v in y.items()}
        if isinstance(y, tuple | list):
            return tuple(self._out(v) for v in y)
        return None if y is None else self.arrays.numpy(y)

    def _back(self, x):
        if isinstance(x, tuple):
            return tuple(self._back(v) for v in x)
        return self.arrays.numpy(x) if hasattr(x, "dtype") else x

    def _poison(self, sizes: tuple[int, ...]) -> None:
        """Fill the memory that the allocator will hand out next with NaN, so that what is never written shows."""
        blocks = [self.arrays.array(np.full(max(1, size // 4), np.nan, dtype=np.float32), "contiguous") for size in sizes for _ in range(2)]
        del blocks

    def _keep(self, raw, copies) -> None:
        """What was returned, and copies of it: always the last, and those of calls 1, 2, 4, 8 and so on."""
        self._last = (_leaves(raw), _leaves(copies))
        self._calls += 1
        if self._calls & (self._calls - 1) == 0 and sum(c.nbytes for _, kept in [*self._kept, self._last] for c in kept) <= _KEPT:
            self._kept.append(self._last)

    def _changed(self, kept: tuple[list, list[np.ndarray]]) -> bool:
        raw, copies = kept
        try:
            return any(not _same_bits(self._back(r), c) for r, c in zip(raw, copies, strict=True))
        except Exception:  # a freed or deleted buffer: the candidate's own affair
            return False


OUT_OF_MEMORY = ("out of memory", "out_of_memory", "can't allocate memory", "cannot allocate memory", "resource_exhausted", "bad_alloc", "memoryerror")


class _TookTooLong(BaseException):
    """Not an Exception, so that a candidate's own handlers do not swallow it."""


@contextlib.contextmanager
def _alarm(seconds: float | None):
    """Interrupt Python code after a time; only the main thread can be interrupted."""
    if not seconds or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(signum, frame):
        raise _TookTooLong

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _where(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "refimpl/conformance" not in f.filename]
    place = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _leaves(tree) -> list:
    if isinstance(tree, dict):
        return [leaf for branch in tree.values() for leaf in _leaves(branch)]
    if isinstance(tree, tuple | list):
        return [leaf for branch in tree for leaf in _leaves(branch)]
    return [] if tree is None else [tree]


def _rolled(x):
    """Other values of the same size and kind: the same ones, each a place further."""
    if isinstance(x, tuple):
        return type(x)(*map(_rolled, x)) if hasattr(x, "_fields") else tuple(map(_rolled, x))
    return np.roll(x, 1) if isinstance(x, np.ndarray) and x.dtype.kind not in "biu" else x


def _same_bits(a, b) -> bool:
    if isinstance(b, tuple):
        return isinstance(a, tuple) and len(a) == len(b) and all(map(_same_bits, a, b))
    if not isinstance(b, np.ndarray):
        return True
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
