"""Compile every kernel for every architecture, without a GPU: registers, shared memory and spills as a table.

python -m refimpl.gpu.compile [-o docs/gpu_resources.json] [PART_OF_A_NAME ...]
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from refimpl.gpu.launch import Kernel, kernels


def resources(kernel: Kernel, architecture: str) -> dict:
    """Compile one instance to a cubin by NVRTC; what ptxas says of it.

    Raises
    ------
    RuntimeError
        If it does not compile; the message is the compiler's.
    """
    from cuda.core import Program, ProgramOptions

    include = [str(p) for p in _headers()]
    flags = [o for o in kernel.options if not o.startswith(("-std", "-I"))]
    own = [o[2:] for o in kernel.options if o.startswith("-I")]
    options = ProgramOptions(
        arch=architecture, std="c++17", include_path=[*own, *include], ftz=True, ptxas_options=["-v"],
        extra_device_vectorization="--extra-device-vectorization" in flags or None,
    )  # fmt: skip
    logs = _Log()
    try:
        Program(kernel.source, "c++", options).compile("cubin", name_expressions=(kernel.name,), logs=logs)
    except Exception as error:
        raise RuntimeError(f"{kernel.name} ({kernel.file}) does not compile for {architecture}: {error}\n{logs.text}") from None
    return {
        "kernel": kernel.name,
        "file": kernel.file,
        "architecture": architecture,
        "registers": _number(r"Used (\d+) registers", logs.text),
        "static shared bytes": _number(r"(\d+) bytes smem", logs.text),
        "spilled bytes": _number(r"(\d+) bytes spill stores", logs.text) + _number(r"(\d+) bytes spill loads", logs.text),
    }


class _Log:
    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str | bytes) -> None:
        self.text += text.decode() if isinstance(text, bytes) else text


def _number(pattern: str, text: str) -> int:
    return max((int(n) for n in re.findall(pattern, text)), default=0)


def _headers() -> Iterable[Path]:
    """CUDA's own headers (cuda_bf16.h, cuda_fp16.h): a toolkit's, or those of the wheel nvidia-cuda-runtime."""
    from cuda.pathfinder import find_nvidia_header_directory

    found = find_nvidia_header_directory("cudart")
    if found is None:
        raise RuntimeError("no CUDA headers: pip install nvidia-cuda-runtime")
    yield Path(found)
    if (Path(found) / "cccl").is_dir():
        yield Path(found) / "cccl"


def table(only: Iterable[str] = ()) -> list[dict]:
    """`resources` of every instance whose name or file contains one of `only`, on all cores."""
    jobs = [
        (kernel, architecture)
        for instances in kernels().values()
        for kernel in instances
        if not (wanted := tuple(only)) or any(w in kernel.name or w in kernel.file for w in wanted)
        for architecture in kernel.architectures
    ]
    from cuda.core import Program  # noqa: F401  before the threads: its import is not safe in several at once

    from cuda.core import Program  # noqa: F401  (its import is not safe in several threads, so: before threads)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: resources(*job), dict.fromkeys(jobs)))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m refimpl.gpu.compile", description=__doc__.splitlines()[0])
    parser.add_argument("-o", type=Path, help="write the table as JSON")
    parser.add_argument("only", nargs="*", help="parts of names of kernels or files")
    chosen = parser.parse_args(arguments)
    rows = table(chosen.only)
    for row in rows:
        print(
            f"{row['architecture']:8} {row['registers']:4} registers {row['static shared bytes']:6} B shared {row['spilled bytes']:5} B spilled  {row['kernel']}"
        )
    if chosen.o:
        chosen.o.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
