"""Runs examples that need more than the documentation's own environment, and keeps what they print.

``python docs/examples/record.py torch_attention`` writes ``torch_attention.txt``; the pages show both files. The test suite
runs the examples again wherever their framework is installed (``make test-peers``), and compares the verdicts.
"""

import datetime
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PACKAGES = ("torch", "triton", "cupy-cuda12x", "cupy-cuda13x")


def run(name: str) -> str:
    """What an example prints, seconds rounded away.

    Raises
    ------
    RuntimeError
        If it fails.
    """
    done = subprocess.run([sys.executable, HERE / f"{name}.py"], capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-3000:]}")
    return re.sub(r"\d+\.\d s\b", "0.3 s", done.stdout).rstrip()


def verdicts(printed: str) -> list[str]:
    """The first line of every report."""
    return [line for line in printed.splitlines() if re.match(r"\w+: [\w.<>]+ (conforms|is WRONG|DEVIATES)", line)]


def where(name: str) -> str:
    """What it ran on: the packages that the example imports, the device, the day."""
    source = (HERE / f"{name}.py").read_text(encoding="utf-8")
    found = []
    for package in PACKAGES:
        if f"import {package.partition('-')[0]}" in source:
            try:
                found.append(f"{package} {importlib.metadata.version(package)}")
            except importlib.metadata.PackageNotFoundError:
                continue
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        device = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().replace(", ", ", driver ")
    except (OSError, subprocess.CalledProcessError):
        device = "CPU"
    return f"# {', '.join(found)}; {device if 'cuda' in source or 'cupy' in source else 'CPU'}; {datetime.date.today()}"


def main(names: list[str]) -> None:
    for name in names:
        printed = run(name)
        (HERE / f"{name}.txt").write_text(f"{where(name)}\n{printed}\n", encoding="utf-8")
        print(f"{name}: {verdicts(printed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
