"""Compile every kernel for every architecture, without a GPU: registers, shared memory, stack and spills as a table.

python -m refimpl.gpu.compile [-o docs/gpu_resources.json] [PART_OF_A_NAME ...]
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
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
    return together((kernel,), architecture)[0]


def together(instances: Sequence[Kernel], architecture: str) -> list[dict]:
    """The same for several instances of one file, whose headers are then read once."""
    from cuda.core import Program, ProgramOptions

    first, names = instances[0], tuple(kernel.name for kernel in instances)
    include = [str(p) for p in _headers()]
    flags = [o for o in first.options if not o.startswith(("-std", "-I"))]
    own = [o[2:] for o in first.options if o.startswith("-I")]
    options = ProgramOptions(
        arch=architecture, std="c++17", include_path=[*own, *include], ftz=True, ptxas_options=["-v"],
        extra_device_vectorization="--extra-device-vectorization" in flags or None,
        define_macro=[o[2:] for o in flags if o.startswith("-D")] or None,
    )  # fmt: skip
    logs = _Log()
    try:
        code = Program(first.source, "c++", options).compile("cubin", name_expressions=names, logs=logs)
    except Exception as error:
        raise RuntimeError(f"{', '.join(names)} ({first.file}) does not compile for {architecture}: {error}\n{logs.text}") from None
    said = dict(re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry function|\Z)", logs.text, re.DOTALL))
    symbols = {_text(name): _text(symbol) for name, symbol in code.symbol_mapping.items()}
    return [
        {
            "kernel": kernel.name,
            "file": kernel.file,
            "architecture": architecture,
            "registers": _number(r"Used (\d+) registers", text),
            "static shared bytes": _number(r"(\d+) bytes smem", text),
            "stack bytes": _number(r"(\d+) bytes stack frame", text),
            "spilled bytes": _number(r"(\d+) bytes spill stores", text) + _number(r"(\d+) bytes spill loads", text),
        }
        for kernel in instances
        for text in [said[symbols[kernel.name]]]
    ]


def compiler() -> str:
    """Which compiler the numbers come from."""
    from importlib.metadata import version

    return f"nvidia-cuda-nvrtc {version('nvidia-cuda-nvrtc')}"


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


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


TABLED = ("sm_90", "sm_90a")  # of which docs/gpu_resources.json tells


def table(wanted: Iterable[Kernel] | None = None, architectures: Iterable[str] = TABLED, each: int = 8) -> list[dict]:
    """`resources` of the instances wanted, by default all of the mirror's, `each` at a time, on all cores."""
    everything = (kernel for instances in kernels().values() for kernel in instances)
    groups: dict[tuple, list[Kernel]] = {}
    for kernel in dict.fromkeys(everything if wanted is None else wanted):
        for architecture in set(kernel.architectures) & set(architectures):
            groups.setdefault((kernel.file, kernel.options, architecture), []).append(kernel)
    jobs = [(members[i : i + each], key[-1]) for key, members in groups.items() for i in range(0, len(members), each)]
    from cuda.core import Program  # noqa: F401  before the threads: its import is not safe in several at once

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [row for rows in pool.map(lambda job: together(*job), jobs) for row in rows]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m refimpl.gpu.compile", description=__doc__.splitlines()[0])
    parser.add_argument("-o", type=Path, help="write the table as JSON")
    parser.add_argument("only", nargs="*", help="parts of names of kernels or files")
    chosen = parser.parse_args(arguments)
    named = [
        k for found in kernels().values() for k in found if not chosen.only or any(part in k.name or part in k.file for part in chosen.only)
    ]
    rows = table(named)
    for row in rows:
        print(
            f"{row['architecture']:8} {row['registers']:4} registers {row['static shared bytes']:6} B shared {row['stack bytes']:5} B stack "
            f"{row['spilled bytes']:5} B spilled  {row['kernel']}"
        )
    if chosen.o:
        listed = ",\n".join(json.dumps(row) for row in rows)  # a line for each, so that changes show
        chosen.o.write_text(f'{{"compiler": "{compiler()}",\n"kernels": [\n{listed}\n]}}\n', encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
