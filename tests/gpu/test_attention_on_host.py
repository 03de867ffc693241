"""Attention's kernels for plain arithmetic, compiled by g++ for the host (``host/cuda_on_host.h``): every option, sizes that fill no tile."""

import ctypes
import functools
import os
import types

import numpy as np
import pytest

import refimpl
from refimpl.ops.attention.attention import error_bound

pytest.importorskip("cupy", reason="not run: refimpl.gpu needs cupy, even without a device")
launch = pytest.importorskip("refimpl.gpu.launch")
from refimpl.gpu import arrays  # noqa: E402
from refimpl.gpu.attention import attention as mirror  # noqa: E402

PREPARED = "extern __shared__ __align__(16) unsigned char memory[];"


class OnDevice(np.ndarray):
    """An array of NumPy that tells where it lies as CuPy's do."""

    data = property(lambda self: types.SimpleNamespace(ptr=self.ctypes.data))


class OnHost:
    """The instances for float64, called as `launch.Kernel` is."""

    def __init__(self, build, folder, mistake=("", "")):
        self.numbers = {k.name: i for i, k in enumerate(k for k in mirror.KERNELS if k.file == mirror.TILED and "<double" in k.name)}
        code = (launch.FOLDER / mirror.TILED).read_text(encoding="utf-8")
        assert code.count(PREPARED) == 2 and mistake[0] in code
        code = code.replace(*mistake).replace(PREPARED, "unsigned char* const memory = (unsigned char*)::memory;")
        calls = "".join(
            f'extern "C" void instance_{i}(unsigned grid, unsigned block, unsigned shared, void** arguments)'
            f" {{ host::launch(&{name}, grid, 1, block, shared, arguments); }}\n"
            for name, i in self.numbers.items()
        )
        source = folder / "kernels.cpp"
        source.write_text(f'#include "cuda_on_host.h"\n{code}\n{calls}', encoding="utf-8")
        self.library = build(source)

    def __call__(self, kernel, grid, block, args, shared=0):
        pointed = (a if isinstance(a, np.ndarray) and a.dtype == mirror.RAW else np.array([self._place(a)], np.uint64) for a in args)
        kept = [np.ascontiguousarray(a) for a in pointed]
        places = (ctypes.c_void_p * len(kept))(*(a.ctypes.data for a in kept))
        getattr(self.library, f"instance_{self.numbers[kernel.name]}")(*grid, *block, shared, places)

    @staticmethod
    def _place(a):
        return a.ctypes.data if isinstance(a, np.ndarray) else int(a)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory, host_library):
    return OnHost(host_library, tmp_path_factory.mktemp("attention"))


@pytest.fixture
def on_host(monkeypatch):
    """`on_host(kernels)`: the mirror's own functions call these."""

    def prepare(kernels):
        monkeypatch.setattr(launch.Kernel, "__call__", lambda kernel, *arguments: kernels(kernel, *arguments))
        device = types.SimpleNamespace(**vars(np) | {"broadcast_to": functools.partial(np.broadcast_to, subok=True)})
        for module in (mirror, arrays):
            monkeypatch.setattr(module, "cp", device)

    return prepare


def both_ways(call, dy):
    """Results and gradients, in arrays that end where their numbers end."""
    options = ("causal", "offset", "window", "mask", "bias", "scale", "softcap", "sink")
    here = {name: np.array(x).view(OnDevice) if isinstance(x, np.ndarray) else x for name, x in call.items()}
    problem = mirror.prepare(*(here[name] for name in "qkv"), *(here.get(name) for name in options))
    o, lse = mirror.tiled(problem)
    dy = mirror.rows_of(np.array(dy).view(OnDevice), problem.batch)
    *found, dbias = mirror.backward(problem, dy, lse, -(dy * o).sum(axis=-1))
    found = dict(zip("qkv", found, strict=True)) | ({} if dbias is None else {"bias": dbias})
    return o.reshape(*problem.batch, *o.shape[1:]), {name: np.asarray(g).reshape(call[name].shape) for name, g in found.items()}


CASES = {  # sizes; which options there are: a tile holds 64 queries, 64 keys, 64 columns
    "rows of 64 and more": ({"n": 70, "m": 64, "d": 5, "e": 3}, ("mask", "bias", "sink")),
    "a full tile of keys": ({"n": 62, "m": 64, "d": 8, "e": 4, "Hq": 2, "Hkv": 1}, ("bias",)),
    "full tiles": ({"n": 64, "m": 128, "d": 16, "e": 66, "Hq": 2, "Hkv": 1}, ("mask", "bias")),
    "a mask alone": ({"n": 3, "m": 130, "d": 17, "e": 2}, ("mask",)),
    "a band": ({"n": 90, "m": 100, "d": 4, "e": 4, "Hq": 1, "Hkv": 1}, ("sink",)),
}


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradient(case, kernels, on_host, rng, farthest):
    sizes, options = CASES[case]
    drawn = refimpl.OPS["attention"].sample(rng, **sizes)
    call = {name: x for name, x in drawn.items() if name in (*"qkv", *options)}
    call |= {"window": (20, 7)} if case == "a band" else {"causal": False}
    dy = rng.standard_normal((*call["q"].shape[:-1], call["v"].shape[-1]))
    on_host(kernels)
    o, found = both_ways(call, dy)
    assert np.all(abs(o - refimpl.attention(**call)) <= 2 * error_bound(**call, unit=2.0**-53))
    found["sink"] = refimpl.attention_vjp(dy, **call).get("sink")  # the kernels' lse makes it, outside of them
    assert farthest("attention", call, dy, None, {name: g for name, g in found.items() if g is not None}) <= 1


@pytest.mark.skipif("REFIMPL_SANITIZE_ADDRESSES" not in os.environ, reason="not run: test_addresses.py runs it, in a process that must end")
def test_reads_beyond_the_bias(on_host, rng, tmp_path, host_library):
    on_host(OnHost(host_library, tmp_path, ("row + ROWS > c.n || !inside", "!inside")))
    sizes, options = CASES["a full tile of keys"]
    call = {name: x for name, x in refimpl.OPS["attention"].sample(rng, **sizes).items() if name in (*"qkv", *options)}
    both_ways(call, rng.standard_normal((*call["q"].shape[:-1], sizes["e"])))
