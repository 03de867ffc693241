"""What the mirror's tests share: how far the kit lets gradients be from the truth, and kernels compiled for the host."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import refimpl
from refimpl.conformance import truth
from refimpl.conformance.precision import precision


@pytest.fixture
def farthest():
    """``farthest(operator, call, dy, dstate, gradients, dtype)``: the largest error of gradients, in units of what the kit allows."""

    def measure(name, call, dy, dstate, gradients, dtype="float64"):
        op, to = refimpl.OPS[name], precision(dtype)
        call = call | ({} if dstate is None else {"return_state": True})
        right = truth.gradient_truth(op, call, dy, dstate, to)
        limits = truth.flat(truth.gradient_tolerance(op, call, dy, dstate, to, right, truth.truth(op, call, to)))
        right, got = truth.flat(right), truth.flat(gradients)
        assert right.keys() == got.keys()
        return max(float((abs(got[n].astype(right[n].dtype) - right[n]) / limits[n]).max(initial=0.0)) for n in right)

    return measure


@pytest.fixture(scope="session")
def host_compiler():
    """g++, which compiles kernels for the host; where there is none, what needs it is reported as not run."""
    found = shutil.which("g++")
    if found is None:
        pytest.skip("not run: no g++")
    return found


@pytest.fixture(scope="session")
def host_library(host_compiler):
    """``host_library(source)``: a file that includes ``cuda_on_host.h``, as a library; headers beside it come before those of ``gpu/cuda``."""
    from refimpl.gpu import launch

    def build(source: Path) -> ctypes.CDLL:
        library, folders = source.with_suffix(".so"), (source.parent, Path(__file__).parent / "host", launch.FOLDER)
        flags = ["-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-w", "-shared", "-fPIC", *(f"-I{folder}" for folder in folders)]
        if os.environ.get("REFIMPL_SANITIZE_ADDRESSES"):  # threads have stacks of their own, of which it knows nothing
            flags += ["-fsanitize=address", "--param=asan-stack=0", "-g1"]
        subprocess.run([host_compiler, *flags, str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))

    return build
