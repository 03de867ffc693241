"""Heads, channels and blocks spread over threads.

NumPy lets go of the interpreter inside its loops and products, so threads of Python do run at once, as long as each
step is big enough. BLAS has threads of its own, which only get in the way here: a small product split over them takes
several times as long as on one. So: one BLAS thread, and the independent items of an operator over a pool.
"""

import contextvars
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

_SMALL = 2**14  # elements; below, starting a thread costs more than it saves
_lock = threading.Lock()
_limited = 0
_limit: Any = None
_inside = threading.local()


def thread_count() -> int:
    """Threads to use: the environment variable REFIMPL_NUM_THREADS, or the processors that this process may use."""
    asked = os.environ.get("REFIMPL_NUM_THREADS", "")
    if asked:
        if not asked.isdigit() or int(asked) < 1:
            raise ValueError(f"REFIMPL_NUM_THREADS must be an integer of at least 1, got {asked!r}")
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def over_threads(function: Callable, items: Iterable, *arrays: np.ndarray, threads: int | None = None) -> list:
    """``[function(item) for item in items]``, the items spread over threads, BLAS held to one thread meanwhile.

    Parameters
    ----------
    function : callable
        Must write to nothing that another item's call reads or writes.
    items : iterable
    *arrays : ndarray
        What the work is done on. Object arrays (whose arithmetic is Python's) and small ones run in the calling
        thread; so does a call from within a call.
    threads : int, optional
        `thread_count()` by default.

    Returns
    -------
    list
        In the order of the items: the same whatever the number of threads.

    Examples
    --------
    >>> over_threads(lambda i: i * i, range(4))
    [0, 1, 4, 9]
    """
    items = list(items)
    threads = min(thread_count() if threads is None else threads, len(items))
    alone = any(a.dtype.kind == "O" for a in arrays) or (arrays and sum(a.size for a in arrays) < _SMALL)
    if threads < 2 or alone or getattr(_inside, "a_call", False) or _controller() is None:
        return [function(item) for item in items]
    with _one_blas_thread(), ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(contextvars.copy_context().run, _run, function, item) for item in items]  # errstate goes along
        return [job.result() for job in jobs]


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, `over_threads` stays in the calling thread: one order of events, the same each time."""
    before = getattr(_inside, "a_call", False)
    _inside.a_call = True
    try:
        yield
    finally:
        _inside.a_call = before


def _run(function: Callable, item):
    _inside.a_call = True
    return function(item)


@functools.cache
def _controller():
    """What tells BLAS to keep to one thread; without it, a plain loop: threads of both kinds would fight."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    return ThreadpoolController()


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """The limit is the process's, so the first to come sets it and the last to go lifts it."""
    global _limited, _limit
    with _lock:
        _limited += 1
        if _limited == 1:
            _limit = _controller().limit(limits=1, user_api="blas")
    try:
        yield
    finally:
        with _lock:
            _limited -= 1
            if _limited == 0:
                _limit.restore_original_limits()
