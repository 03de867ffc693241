"""Fill CuPy's cache of compiled kernels on all cores at once: python precompile.py PART_OF_A_NAME ...

A kernel compiles for seconds, and one process compiles one at a time.
"""

import multiprocessing
import os
import sys
import time


def compile_some(number: int, count: int, wanted: list[str]) -> None:
    from refimpl.gpu.launch import _function, kernels

    chosen = {k for instances in kernels().values() for k in instances if not wanted or any(w in k.name for w in wanted)}
    for kernel in sorted(chosen, key=lambda k: k.name)[number::count]:
        try:
            _function(kernel, 0)
        except Exception as error:
            print(f"{kernel.name}: {error}"[:3000], flush=True)


if __name__ == "__main__":
    start, count = time.time(), min(os.cpu_count() or 1, 16)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=compile_some, args=(i, count, sys.argv[1:])) for i in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(f"compiled in {time.time() - start:.0f} s", flush=True)
