"""Kernels that the host runs, once more under AddressSanitizer: what they read and write lies within their arrays, to the byte."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNS = {
    "attention": ("test_attention_on_host.py", "not beyond"),
    "selective scan": ("test_selective_scan_on_host.py", "(test_results or test_gradient) and 120-80 or test_groups"),
    "experts": ("test_moe.py", "test_steps_and_kernels_on_the_host"),
    "memories": ("test_chunkwise.py", "several_chunks or no_multiple_of_a_chunk"),
}

pytest.importorskip("cupy", reason="not run: refimpl.gpu needs cupy, even without a device")


def run(compiler: str, file: str, chosen: str) -> subprocess.CompletedProcess:
    """pytest in a process of its own, whose every allocation has fences around it."""
    library = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(library):
        pytest.skip("not run: no libasan")
    options = {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0", "REFIMPL_SANITIZE_ADDRESSES": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "--run", "slow", "-k", chosen]
    return subprocess.run([*command, f"tests/gpu/{file}"], cwd=ROOT, env=os.environ | options, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_nothing_beyond_an_array(name, host_compiler):
    done = run(host_compiler, *RUNS[name])
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
def test_a_read_beyond_an_array_is_seen(host_compiler):
    done = run(host_compiler, "test_attention_on_host.py", "beyond")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr and "READ of size 8" in done.stderr
