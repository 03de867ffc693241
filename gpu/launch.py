"""CUDA C++ kernels: which there are, how they are compiled, and what is said when a launch fails."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cupy as cp

FOLDER = Path(__file__).parent / "cuda"
STACK = 64  # bytes of local memory that a thread may have as its stack, unless its kernel is allowed more
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")  # for which every kernel must compile; `hopper` kernels for sm_90a alone


class LaunchError(RuntimeError):
    """A kernel could not be started: which one, with what shape, and what the device allows."""


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel.

    Attributes
    ----------
    file : str
        The source in ``gpu/cuda/``.
    name : str
        The C++ expression that names the instance: ``"linear_recurrence<float, 8>"``.
    hopper : bool
        Uses instructions that only sm_90a has (wgmma, setmaxnreg).
    spills : bool
        May keep registers in local memory; any other kernel that does fails the tests.
    stack : int
        Bytes of local memory that its threads may have as a stack; more fails the tests. What spills lies there, and arrays that are
        indexed by what is not known when they are compiled.
    """

    file: str
    name: str
    hopper: bool = False
    spills: bool = False
    stack: int = STACK

    @property
    def source(self) -> str:
        return (FOLDER / self.file).read_text(encoding="utf-8")

    @property
    def options(self) -> tuple[str, ...]:
        """The compiler's, other than the architecture (CuPy adds ``-ftz=true``: subnormals become 0).

        With ``REFIMPL_EVERY_LANE_ARRIVES`` in the environment barriers are such that racecheck follows them (``barriers.cuh``), and
        reports tell lines of source.
        """
        seen = ("-DEVERY_LANE_ARRIVES", "-lineinfo") if os.environ.get("REFIMPL_EVERY_LANE_ARRIVES") else ()
        return ("-std=c++17", f"-I{FOLDER}", "--extra-device-vectorization", *seen)

    @property
    def architectures(self) -> tuple[str, ...]:
        return ("sm_90a",) if self.hopper else ARCHITECTURES

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple, shared: int = 0) -> None:
        """Start it on the current stream. Arguments: CuPy arrays (as pointers), NumPy scalars of the parameter's very type."""
        if 0 in grid:
            return
        function = _function(self, cp.cuda.Device().id)
        try:
            if shared > 48 * 1024:
                function.max_dynamic_shared_size_bytes = shared
            function(grid, block, args, shared_mem=shared)
        except Exception as error:
            raise LaunchError(self._why(grid, block, args, shared, error)) from error

    def _why(self, grid, block, args, shared, error) -> str:
        limits = cp.cuda.Device().attributes
        shapes = ", ".join(str(a.shape) for a in args if isinstance(a, cp.ndarray))
        return (
            f"{self.name} ({self.file}) on arrays of shapes {shapes}: grid {grid}, block {block}, {shared} bytes of shared memory; "
            f"the device allows {limits['MaxThreadsPerBlock']} threads a block, {limits['MaxSharedMemoryPerBlockOptin']} bytes, "
            f"a grid of {limits['MaxGridDimX']} x {limits['MaxGridDimY']} x {limits['MaxGridDimZ']}: {error}"
        )


@functools.cache
def _function(kernel: Kernel, device: int) -> Any:
    """Compiled for the device at hand, once."""
    architecture = ("-arch=sm_90a",) if kernel.hopper else ()
    module = cp.RawModule(code=kernel.source, options=(*kernel.options, *architecture), name_expressions=(kernel.name,))
    return module.get_function(kernel.name)


def multiprocessors() -> int:
    """How many the current device has."""
    return _properties(cp.cuda.Device().id)[0]


def capability() -> str:
    """The current device's: "90" for Hopper."""
    return _properties(cp.cuda.Device().id)[1]


def shared_memory() -> int:
    """Bytes of shared memory that a block may ask for on the current device."""
    return _properties(cp.cuda.Device().id)[2]


@functools.cache
def _properties(device: int) -> tuple[int, str, int]:
    """Asked once: the driver takes its time."""
    found = cp.cuda.Device(device)
    return found.attributes["MultiProcessorCount"], found.compute_capability, found.attributes["MaxSharedMemoryPerBlockOptin"]


def kernels() -> dict[str, tuple[Kernel, ...]]:
    """Every instance by chapter: the `KERNELS` of the modules of the mirror."""
    import importlib
    import pkgutil

    import refimpl.gpu

    found = {}
    for module in pkgutil.walk_packages(refimpl.gpu.__path__, "refimpl.gpu."):
        if module.name.count(".") == 3 and ".teaching." not in module.name:
            found[module.name] = getattr(importlib.import_module(module.name), "KERNELS", ())
    return {name: instances for name, instances in found.items() if instances}
