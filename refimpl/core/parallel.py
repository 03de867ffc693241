"""Independent pieces of work (heads, channels) over threads, each with one BLAS thread.

BLAS threads slow small products down several times: they meet at a barrier after each. NumPy's loops and BLAS release the
interpreter's lock, so that threads of ours, which meet once, do better.
"""

import contextvars
import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor


def over_threads(function: Callable, items: Iterable) -> list:
    """[function(item) for item in items], over as many threads as this process has processors.

    Without threadpoolctl, which can tell BLAS to keep to one thread, a plain loop: threads of both kinds would fight.
    """
    items = list(items)
    workers = min(len(items), _processors())
    blas = _blas()
    if workers < 2 or blas is None:
        return [function(item) for item in items]
    contexts = [contextvars.copy_context() for _ in items]  # NumPy's errstate is part of the caller's context
    with blas.limit(limits=1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda context, item: context.run(function, item), contexts, items))


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _blas():
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    return ThreadpoolController()
