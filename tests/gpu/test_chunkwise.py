"""The matrix memory in chunks, proved without a device.

The equations of `refimpl.gpu.chunkwise` run on NumPy arrays under the kit, in two arithmetics: `chunk_steps`, which says in NumPy what
each step is; and `chunk_kernels`, the device's own, whose kernels g++ compiles for the host (``host/cuda_on_host.h``) and whose calls
of cuBLAS arrive at a few lines of NumPy with cuBLAS's meaning.
"""

import ctypes
import importlib.util
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import refimpl

MISSING = importlib.util.find_spec("cupy") is None
pytestmark = pytest.mark.skipif(MISSING, reason="not run: cupy not installed; pip install 'refimpl[compile]'")
if not MISSING:
    from refimpl.gpu import channel_tensor, chunk_kernels, chunk_policy, chunk_steps, chunk_tensor, chunkwise, launch, matrix_memory, mirror
    from refimpl.gpu.gated_rnn import mlstm
    from refimpl.gpu.linear_attention import linear_attention
    from refimpl.gpu.state_space import ssd

OPS = ("ssd", "mlstm", "linear_attention")
DTYPES = ("float64", "float32", "bfloat16", "float16")
FENCE = 0 if "REFIMPL_SANITIZE_ADDRESSES" in os.environ else 4096  # bytes before and after an array; AddressSanitizer has its own


# -- an operator in chunks, on arrays of NumPy ------------------------------------------------------------------------


def operator(name: str, steps, chunk: int | None):
    """(function, gradient) as the mirror has them, on the host and in the arithmetic of `steps`."""
    if name == "ssd":

        def function(
            x, dt, A, B, C, D=None, z=None, dt_bias=None, *, dt_softplus=False, dt_limit=(0.0, np.inf), state=None, return_state=False
        ):
            return ssd.Chunkwise(steps, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, state, chunk).result(return_state)

        def vjp(dy, x, dt, A, B, C, D=None, z=None, dt_bias=None, *, dt_softplus=False, dt_limit=(0.0, np.inf), state=None, dstate=None):
            return ssd.Chunkwise(steps, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, state, chunk).vjp(dy, dstate)

    elif name == "mlstm":

        def function(q, k, v, i, f, *, forget="sigmoid", eps=0.0, state=None, return_state=False):
            return mlstm.Chunkwise(steps, gates, gates_vjp, q, k, v, i, f, forget, eps, state, chunk).result(return_state)

        def vjp(dy, q, k, v, i, f, *, forget="sigmoid", eps=0.0, state=None, dstate=None):
            return mlstm.Chunkwise(steps, gates, gates_vjp, q, k, v, i, f, forget, eps, state, chunk, gradient=True).vjp(dy, dstate)

    else:

        def function(q, k, v, *, decay=None, beta=None, feature_map=None, normalize=False, scale=None, state=None, return_state=False):
            call = linear_attention.Chunkwise(steps, q, k, v, decay, beta, feature_map, normalize, scale, state, chunk)
            return call.result(return_state)

        def vjp(dy, q, k, v, *, decay=None, beta=None, feature_map=None, normalize=False, scale=None, state=None, dstate=None):
            return linear_attention.Chunkwise(steps, q, k, v, decay, beta, feature_map, normalize, scale, state, chunk).vjp(dy, dstate)

    contract = refimpl.OPS[name].contract
    return contract.form(function, half=True), contract.gradient(vjp, half=True)


def gates(F, i, m):
    """What the kernel ``mlstm_gates`` computes."""
    log_f, i_prime, ms = (np.empty_like(F) for _ in range(3))
    for t in range(F.shape[1]):
        before, m = m, np.maximum(F[:, t] + m, i[:, t])
        top = np.where(np.isneginf(m), 0, m)
        log_f[:, t], i_prime[:, t], ms[:, t] = F[:, t] + before - top, np.exp(i[:, t] - top), m
    return log_f, i_prime, ms


def gates_vjp(F, i, first, m, d_old, d_new, d_read, d_last):
    """What the kernel ``mlstm_gates_vjp`` computes."""
    dF, di = np.empty_like(F), np.empty_like(F)
    dm = np.zeros_like(first) if d_last is None else d_last
    for t in reversed(range(F.shape[1])):
        left = F[:, t] + (m[:, t - 1] if t else first) >= i[:, t]
        dm = dm + d_read[:, t] - d_old[:, t] - d_new[:, t]
        dF[:, t], di[:, t] = d_old[:, t] + np.where(left, dm, 0), d_new[:, t] + np.where(left, 0, dm)
        dm = dF[:, t]
    return dF, di, dm


# -- the device on the host -------------------------------------------------------------------------------------------


class Library:
    """Kernels of one file, compiled for the host by `build`, the fixture ``host_library``; called as `launch.Kernel` is."""

    def __init__(self, build, folder: Path, kernels, mistake: tuple[str, str] | None = None) -> None:
        self.number = {kernel.name: i for i, kernel in enumerate(kernels)}
        source, code = folder / "kernels.cpp", kernels[0].source.replace("extern __shared__", "extern")
        if mistake is not None:
            assert mistake[0] in code
            code = code.replace(*mistake)
        calls = "".join(
            f'extern "C" void instance_{i}(unsigned x, unsigned y, unsigned block, unsigned shared, void** arguments)'
            f" {{ host::launch(&{name}, x, y, block, shared, arguments); }}\n"
            f'extern "C" const char* types_{i}() {{ return host::types(&{name}); }}\n'
            for name, i in self.number.items()
        )
        calls += 'extern "C" void lag(unsigned long long seed) { host::uneven = seed; }\n'
        source.write_text(f'#include "cuda_on_host.h"\n{code}\n{calls}')
        self.library = build(source)

    def __call__(self, kernel, grid, block, args, shared=0):
        if 0 in grid:
            return
        assert shared <= 160 * 1024, "more shared memory than the smallest of the devices has"
        assert max(grid[1:], default=1) <= 65535, "more blocks than a device has"
        number = self.number[kernel.name]
        said = getattr(self.library, f"types_{number}")
        said.restype = ctypes.c_char_p
        for a, wanted in zip(args, said().decode().split(), strict=True):
            pointed, pointer = wanted.lstrip("PK"), wanted.startswith("P")
            fits = a.dtype == np.uint64 if pointer and not isinstance(a, np.ndarray) else pointed in C_TYPES[a.dtype.name]
            assert fits and pointer == (isinstance(a, np.ndarray) or a.dtype == np.uint64), f"{kernel.name} takes {wanted}, gets {a.dtype}"
        arrays = [a for a in args if isinstance(a, np.ndarray)]
        assert all(a.flags.c_contiguous for a in arrays), "kernels read arrays as contiguous ones"
        # each array between two strips of NaN, which nobody may write to or make anything of
        fenced = [np.full(2 * FENCE + a.nbytes, 0xFF, np.uint8) for a in arrays]
        for a, room in zip(arrays, fenced, strict=True):
            room[FENCE : FENCE + a.nbytes] = a.reshape(-1).view(np.uint8)
        rooms = iter(fenced)
        values = [np.uint64(next(rooms).ctypes.data + FENCE) if isinstance(a, np.ndarray) else a for a in args]
        cells = [np.array([v]) for v in values]
        pointers = (ctypes.c_void_p * len(cells))(*(c.ctypes.data for c in cells))
        getattr(self.library, f"instance_{number}")(*grid, *(1,) * (2 - len(grid)), block[0], shared, pointers)
        for a, room in zip(arrays, fenced, strict=True):
            before, after = a.reshape(-1).view(np.uint8), room[FENCE : FENCE + a.nbytes]
            if a.flags.writeable:
                before[:] = after
            else:
                assert np.array_equal(before, after), f"{kernel.name} writes to an input"
            assert np.all(room[:FENCE] == 0xFF) and np.all(room[FENCE + a.nbytes :] == 0xFF), f"{kernel.name} writes outside of an array"


C_TYPES = {
    "uint8": ("4Told", "5Found"),
    "float32": ("f", "4Tf32"),
    "float64": ("d",),
    "bfloat16": ("13__nv_bfloat16",),
    "int32": ("i",),
    "int64": ("x",),
}
TYPES = {0: np.dtype(np.float32), 1: np.dtype(np.float64), 14: np.dtype(ml_dtypes.bfloat16)}


def matrices(first, dtype, rows, columns, ld, transposed):
    """Stacks of op(A) of a column-major A at these addresses, in float64."""
    rows, columns = (columns, rows) if transposed else (rows, columns)
    found = []
    for address in first:
        size = (ld * (columns - 1) + rows) * dtype.itemsize
        flat = np.frombuffer((ctypes.c_char * size).from_address(int(address)), dtype)
        matrix = np.lib.stride_tricks.as_strided(flat, (rows, columns), (dtype.itemsize, ld * dtype.itemsize), writeable=False)
        found.append(matrix.astype(np.float64))
    stack = np.stack(found)
    return stack.swapaxes(1, 2) if transposed else stack


def cublas(name: str):
    """A function of cuBLAS's signature and meaning."""

    def strided(handle, ta, tb, m, n, k, alpha, A, at, lda, sa, B, bt, ldb, sb, beta, C, ct, ldc, sc, count, compute, algorithm):
        steps = np.arange(count)
        places = (p + steps * s * TYPES[t].itemsize for p, t, s in ((A, at, sa), (B, bt, sb), (C, ct, sc)))
        return multiply(ta, tb, m, n, k, *places, (at, bt, ct), (lda, ldb, ldc), compute)

    def batched(handle, ta, tb, m, n, k, alpha, A, at, lda, B, bt, ldb, beta, C, ct, ldc, count, compute, algorithm):
        places = (np.ctypeslib.as_array((ctypes.c_uint64 * count).from_address(p)).copy() for p in (A, B, C))
        return multiply(ta, tb, m, n, k, *places, (at, bt, ct), (lda, ldb, ldc), compute)

    return {"cublasGemmStridedBatchedEx": strided, "cublasGemmBatchedEx": batched}[name]


def multiply(ta, tb, m, n, k, A, B, C, types, lds, compute):
    a_type, b_type, c_type = (TYPES[t] for t in types)
    assert lds[0] >= (k if ta else m) and lds[1] >= (n if tb else k) and lds[2] >= m
    if a_type.itemsize == 2:
        assert all(int(p) % 16 == 0 for p in (*A, *B)) and not (lds[0] % 8 or lds[1] % 8), "halves lie in whole runs of 16 bytes"
    a, b = matrices(A, a_type, m, k, lds[0], ta), matrices(B, b_type, k, n, lds[1], tb)
    if compute == 77:  # tensor cores read no more
        for x in (a, b):
            bits = x.astype(np.float32).view(np.uint32)
            assert not np.any((bits & 0x1FFF).astype(bool) & np.isfinite(x)), "TF32 would be cut off, not rounded"
    with np.errstate(all="ignore"):
        arithmetic = np.dtype(np.float32) if c_type.itemsize == 2 else c_type
        c = (a.astype(arithmetic) @ b.astype(arithmetic)).astype(c_type, copy=False).swapaxes(1, 2)  # (count, n, m): columns are contiguous
    for address, matrix in zip(C, c, strict=True):
        for j, column in enumerate(np.ascontiguousarray(matrix)):
            ctypes.memmove(int(address) + j * lds[2] * c_type.itemsize, column.ctypes.data, column.nbytes)
    return 0


@pytest.fixture(scope="session")
def library(tmp_path_factory, host_library):
    return Library(host_library, tmp_path_factory.mktemp("kernels"), chunk_kernels.KERNELS)


@pytest.fixture
def device(library, monkeypatch):
    """The device's steps on arrays of NumPy; its kernels and products run here."""
    monkeypatch.setattr(launch.Kernel, "__call__", lambda kernel, grid, block, args, shared=0: library(kernel, grid, block, args, shared))
    monkeypatch.setattr(chunk_kernels, "cp", np)
    monkeypatch.setattr(chunk_kernels, "cublas_function", cublas)
    monkeypatch.setattr(chunk_kernels, "cublas_handle", lambda: None)
    monkeypatch.setattr(chunk_kernels, "_address", lambda x: x.ctypes.data)
    return type("OnHost", (chunk_kernels.Steps,), {"xp": np})


# -- under the kit ----------------------------------------------------------------------------------------------------


def conforms(name, steps, chunk, dtype, level="quick"):
    function, vjp = operator(name, steps, chunk)
    report = refimpl.check(name, function, dtypes=[dtype], gradients=True, candidate_vjp=vjp, level=level)
    assert report.verdict == "conforms", str(report)


@pytest.mark.parametrize("name", OPS)
def test_the_equations_conform(name):
    conforms(name, chunk_steps.Steps, 8, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_the_equations_conform_at_level_standard(name, dtype):
    conforms(name, chunk_steps.Steps, 8, dtype, "standard")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPS)
def test_the_equations_conform_in_chunks_of_the_length_that_a_device_would_take(name, dtype):
    conforms(name, chunk_steps.Steps, None, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_the_kernels_conform(name, dtype, device):
    conforms(name, device, 8, dtype)


# -- the kernel on tensor cores ----------------------------------------------------------------------------------------


def in_one_kernel(name: str):
    """(function, gradient) as the mirror has them with ``method="tensor"``, on the host; what the kernel does not take goes in chunks."""
    other, other_vjp = (getattr(f, "__wrapped__", f) for f in operator(name, chunk_steps.Steps, 64))
    if name == "ssd":

        def function(
            x, dt, A, B, C, D=None, z=None, dt_bias=None, *, dt_softplus=False, dt_limit=(0.0, np.inf), state=None, return_state=False
        ):
            if B.shape[-1] > chunk_policy.WIDEST or dt_limit[0] < 0:
                more = {"dt_softplus": dt_softplus, "dt_limit": dt_limit, "state": state, "return_state": return_state}
                return other(x, dt, A, B, C, D, z, dt_bias, **more)
            return ssd._in_one_kernel(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, state, return_state)

        def vjp(dy, x, dt, A, B, C, D=None, z=None, dt_bias=None, *, dt_softplus=False, dt_limit=(0.0, np.inf), state=None, dstate=None):
            if B.shape[-1] > chunk_policy.WIDEST or dt_limit[0] < 0:
                more = {"dt_softplus": dt_softplus, "dt_limit": dt_limit, "state": state, "dstate": dstate}
                return other_vjp(dy, x, dt, A, B, C, D, z, dt_bias, **more)
            return ssd._in_one_kernel_vjp(dy, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, state, dstate)

    elif name == "mlstm":

        def function(q, k, v, i, f, *, forget="sigmoid", eps=0.0, state=None, return_state=False):
            if q.shape[-1] > chunk_policy.WIDEST:
                return other(q, k, v, i, f, forget=forget, eps=eps, state=state, return_state=return_state)
            return mlstm._in_one_kernel(q, k, v, i, f, forget, eps, state, return_state)

        def vjp(dy, q, k, v, i, f, *, forget="sigmoid", eps=0.0, state=None, dstate=None):
            if q.shape[-1] > chunk_policy.WIDEST:
                return other_vjp(dy, q, k, v, i, f, forget=forget, eps=eps, state=state, dstate=dstate)
            return mlstm._in_one_kernel_vjp(dy, q, k, v, i, f, forget, eps, state, dstate)

    else:

        def outside(q, decay, beta, feature_map, normalize):
            channels = decay is not None and decay.ndim == q.ndim
            return beta is not None or (channels and normalize) or linear_attention.width(feature_map, q) > chunk_policy.WIDEST

        def function(q, k, v, *, decay=None, beta=None, feature_map=None, normalize=False, scale=None, state=None, return_state=False):
            if outside(q, decay, beta, feature_map, normalize):
                call = linear_attention.Chunkwise(chunk_steps.Steps, q, k, v, decay, beta, feature_map, normalize, scale, state, 64)
                return call.result(return_state)
            return linear_attention._in_one_kernel(q, k, v, decay, feature_map, normalize, scale, state, return_state)

        def vjp(dy, q, k, v, *, decay=None, beta=None, feature_map=None, normalize=False, scale=None, state=None, dstate=None):
            if outside(q, decay, beta, feature_map, normalize) or normalize:
                call = linear_attention.Chunkwise(chunk_steps.Steps, q, k, v, decay, beta, feature_map, normalize, scale, state, 64)
                return call.vjp(dy, dstate)
            return linear_attention._in_one_kernel_vjp(dy, q, k, v, decay, feature_map, scale, state, dstate)

    contract = refimpl.OPS[name].contract
    return contract.form(function, half=True), contract.gradient(vjp, half=True)


def tensor_kernels(build, folder: Path, mistake=None, wrong_file=None):
    """All files' kernels on the host; `mistake` is planted in one of them."""
    kernels = (*chunk_tensor.KERNELS, *chunk_tensor.KERNELS_VJP, *chunk_tensor.KERNELS_NORMALISED_VJP, *mlstm.KERNELS_GATES, *ssd.KERNELS_STEPS)
    kernels, libraries = (*kernels, *channel_tensor.KERNELS, *channel_tensor.KERNELS_VJP), {}
    for file in {k.file: 0 for k in kernels}:
        (folder / file).mkdir()
        libraries[file] = Library(build, folder / file, [k for k in kernels if k.file == file], mistake if file == wrong_file else None)
    return lambda kernel, *arguments: libraries[kernel.file](kernel, *arguments)


@pytest.fixture(scope="session")
def memory_library(tmp_path_factory, host_library):
    return tensor_kernels(host_library, tmp_path_factory.mktemp("memory"))


@pytest.fixture
def tensor_cores(memory_library, monkeypatch):
    """`chunk_tensor` on arrays of NumPy."""
    run_on_host(monkeypatch, memory_library)


def run_on_host(monkeypatch, library):
    monkeypatch.setattr(launch.Kernel, "__call__", lambda kernel, grid, block, args, shared=0: library(kernel, grid, block, args, shared))
    for module in (channel_tensor, chunk_tensor, mlstm, linear_attention, ssd):
        monkeypatch.setattr(module, "cp", np)
    monkeypatch.setattr(chunk_tensor, "_address", lambda x: 0)  # the host copies every array anyway
    monkeypatch.setattr(chunk_kernels, "Steps", chunk_steps.Steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPS)
def test_the_kernel_on_tensor_cores_conforms(name, tensor_cores):
    function, vjp = in_one_kernel(name)
    report = refimpl.check(name, function, dtypes=["bfloat16"], gradients=True, candidate_vjp=vjp, level="quick")
    assert report.verdict == "conforms", str(report)


SEVERAL_CHUNKS = {
    "ssd": ({"T": 150, "p": 70, "n": 100, "H": 4, "G": 2}, {"T": 64, "p": 8, "n": 16}, {"T": 128, "p": 64, "n": 128, "H": 5, "G": 1}),
    "mlstm": ({"T": 150, "d": 100, "e": 70}, {"T": 64, "d": 9, "e": 5}, {"T": 128, "d": 64, "e": 128}),
    "linear_attention": (
        {"T": 150, "d": 100, "e": 70, "Hq": 4, "Hkv": 2},
        {"T": 70, "d": 33, "e": 128},
        {"T": 150, "d": 100, "e": 70, "Hq": 4, "Hkv": 2, "per_channel": True},
        {"T": 70, "d": 33, "e": 128, "per_channel": True},
    ),
}


def off_tensor_cores(name, rng, farthest) -> list[float]:
    """Errors through several chunks, of results, states and gradients, in units of what is allowed; NaN of what is none."""
    (function, vjp), op, found, dtype = in_one_kernel(name), refimpl.OPS[name], [], np.dtype(ml_dtypes.bfloat16)
    for sizes in SEVERAL_CHUNKS[name]:
        call = {n: x for n, x in drawn(name, rng, dtype, **sizes).items() if n != "beta"}
        if sizes.get("per_channel"):
            call["decay"][..., 5::9, ::3] = -1e3  # decays of 0
        exact = {n: type(x)(*(y.astype(float) for y in x)) if isinstance(x, tuple) else x.astype(float) for n, x in call.items()}
        want, state = op.definition(**exact, return_state=True)
        got, last = function(**call, return_state=True)
        bound, off_state = op.error_bound(**exact, unit=2.0**-24, store=2.0**-8, return_state=True)
        for a, b, limit in zip((got, *parts(last)), (want, *parts(state)), (bound, *parts(off_state)), strict=True):
            found.append(float((abs(a.astype(float) - b) / (limit + 2.0**-8 * abs(b) + 1e-30)).max()))
        dy = rng.standard_normal(want.shape).astype(dtype)
        dstate = tuple(rng.standard_normal(x.shape).astype(np.float32) for x in parts(state))
        dstate = type(state)(*dstate) if isinstance(state, tuple) else dstate[0]
        gradients = vjp(dy, **call, dstate=dstate)
        found.append(farthest(name, call, dy, dstate, gradients, "bfloat16"))
        found += [0.0 * float(x.astype(float).sum()) for g in gradients.values() for x in parts(g)]
    return found


@pytest.mark.parametrize("name", OPS)
def test_tensor_cores_through_several_chunks(name, tensor_cores, rng, farthest):
    assert all(error <= 1 for error in off_tensor_cores(name, rng, farthest))


DECAYS_OF_CHANNELS = {
    "some are 0": lambda g, rng: np.where(rng.random(g.shape) < 0.3, -1e3, g),
    "all are 0": lambda g, rng: 0 * g - 1e3,
    "none": lambda g, rng: 0 * g,
    "e^-40 and e^40": lambda g, rng: (
        g + 40.0 * (np.arange(g.shape[-2]) % 5 == 3)[:, None] - 40.0 * (np.arange(g.shape[-2]) % 5 == 1)[:, None]
    ),
    "of all sizes": lambda g, rng: -abs(rng.normal(0, 20, g.shape)),
    "growth": lambda g, rng: 0 * g + 20.0 / g.shape[-2],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DECAYS_OF_CHANNELS)
def test_hard_decays_of_channels_on_tensor_cores(kind, tensor_cores, rng, farthest):
    """Results, states and gradients within the bounds; the kit has few such calls without beta."""
    (function, vjp), op, half = in_one_kernel("linear_attention"), refimpl.OPS["linear_attention"], np.dtype(ml_dtypes.bfloat16)
    for sizes in ({"T": 7}, {"T": 17, "Hq": 6, "Hkv": 2, "d": 9, "e": 5}, {"T": 130, "d": 70, "e": 33}):
        call = op.sample(rng, per_channel=True, **sizes)
        call["decay"] = DECAYS_OF_CHANNELS[kind](call["decay"], rng)
        call = {n: x.astype(np.float32 if n == "state" else half) for n, x in call.items() if n != "beta"}
        exact = {n: x.astype(float) for n, x in call.items()}
        want, state = op.definition(**exact, return_state=True)
        got, last = function(**call, return_state=True)
        bound, off_state = op.error_bound(**exact, unit=2.0**-24, store=2.0**-8, return_state=True)
        assert np.all(abs(got.astype(float) - want) <= bound + 2.0**-8 * abs(want)) and np.all(abs(last - state) <= off_state)
        dy, dstate = rng.standard_normal(want.shape).astype(half), rng.standard_normal(state.shape).astype(np.float32)
        gradients = vjp(dy, **call, dstate=dstate)
        assert farthest("linear_attention", call, dy, dstate, gradients, "bfloat16") <= 1
        assert not np.any(gradients["decay"][exact["decay"] == -1e3]), "what a decay of 0 fades has no gradient of it"


# -- by themselves ----------------------------------------------------------------------------------------------------


def drawn(name: str, rng, dtype, **sizes) -> dict:
    """A call of the operator's generic inputs; states in the precision of sums."""
    op = refimpl.OPS[name]
    call = op.sample(rng, **sizes)
    call = op.arrange(call) if op.arrange else call
    wide = np.float32 if np.dtype(dtype).itemsize == 2 else dtype

    def of(argument, value):
        if isinstance(value, tuple):
            return type(value)(*(of(argument, v) for v in value))
        return value.astype(wide if argument == "state" else dtype)

    return {argument: of(argument, value) for argument, value in call.items()}


LONG = {
    "ssd": ({"T": 37, "p": 5, "n": 9}, {"T": 16, "H": 6, "G": 2, "batch": (2,)}),
    "mlstm": ({"T": 37, "d": 9, "e": 5}, {"T": 16, "batch": (2,)}),
    "linear_attention": (
        {"T": 37, "Hq": 6, "Hkv": 2, "d": 9, "e": 5},
        {"T": 37, "per_channel": True},
        {"T": 16, "Hq": 1, "Hkv": 1, "d": 33, "e": 40, "per_channel": True},
    ),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("arithmetic", ["numpy", "kernels"])
def test_lengths_that_are_no_multiple_of_a_chunk(name, arithmetic, rng, request, farthest):
    """Results and gradients against the chapter's, through several chunks; float64, so that only a mistake can be as large."""
    steps = chunk_steps.Steps if arithmetic == "numpy" else request.getfixturevalue("device")
    op = refimpl.OPS[name]
    for sizes in LONG[name]:
        for chunk in (8, 16, 64):
            call = drawn(name, rng, np.float64, **sizes)
            function, vjp = operator(name, steps, chunk)
            want, state = op.definition(**call, return_state=True)
            got, last = function(**call, return_state=True)
            bound, off_state = op.error_bound(**call, unit=2.0**-53, return_state=True)
            for a, b, limit in zip((got, *parts(last)), (want, *parts(state)), (bound, *parts(off_state)), strict=True):
                assert np.all(abs(a - b) <= 2 * limit)
            dy = rng.standard_normal(want.shape)
            dstate = (
                type(state)(*(rng.standard_normal(x.shape) for x in state))
                if isinstance(state, tuple)
                else rng.standard_normal(state.shape)
            )
            assert farthest(name, call, dy, dstate, vjp(dy, **call, dstate=dstate)) <= 1


def parts(x):
    return x if isinstance(x, tuple) else (x,)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("name", OPS)
def test_no_steps(name, dtype, rng, device):
    call = drawn(name, rng, TYPES[14] if dtype == "bfloat16" else dtype, T=0)
    for steps in (chunk_steps.Steps, device):
        function, vjp = operator(name, steps, 8)
        y, last = function(**call, return_state=True)
        assert y.size == 0
        for a, b in zip(parts(last), parts(call["state"]), strict=True):
            np.testing.assert_array_equal(a, b)
        gradients = vjp(y, **call, dstate=last)
        for a, b in zip(parts(gradients["state"]), parts(last), strict=True):
            np.testing.assert_array_equal(a, b)


def test_nothing_arrives_at_a_decay_of_0_or_from_behind_it(rng):
    """A decay's cotangent is a sum over what it fades, never a difference of sums over everything else."""
    call = drawn("linear_attention", rng, np.float32, T=24)
    del call["beta"]
    call["decay"] = np.where(np.arange(24) % 6 == 5, np.float32(-1e3), call["decay"])
    function, vjp = operator("linear_attention", chunk_steps.Steps, 8)
    gradients = vjp(np.ones_like(function(**call)), **call)
    assert np.all(gradients["decay"][..., 5::6] == 0)
    assert np.all(gradients["state"] != 0) and np.all(gradients["decay"][..., 0] != 0)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_products_of_all_layouts(dtype, rng, device):
    """Views, transposed, of shared heads, of parts: what cuBLAS is told is what they are."""
    steps, plain = device(TYPES[14] if dtype == "bfloat16" else dtype), chunk_steps.Steps(TYPES[14] if dtype == "bfloat16" else dtype)
    x = plain.store(rng.integers(-8, 9, (3, 4, 5, 16, 24)).astype(plain.wide))  # whose sums are exact in any order
    lefts = [x, x[:, :1], x[:, :, 2], x.swapaxes(-1, -2), x[:, :1].swapaxes(-1, -2), x[..., :8], x[:1], x[..., ::2, :], x[..., 1:9, 3:11]]
    for a in lefts:
        for of in (x, x[:, :1], x[:, :, 3], x[:, :1, :, 3:, 1:]):
            inner = a.shape[-1]
            for b in (of[..., : min(inner, of.shape[-2]), :], of.swapaxes(-1, -2)[..., : min(inner, of.shape[-1]), :]):
                left = a[..., : b.shape[-2]]
                odd = any(size % 8 for size in (*left.shape[-2:], *b.shape[-2:]))
                if left.ndim != b.ndim or (dtype == "bfloat16" and odd):  # `cut` fills halves up
                    continue
                np.testing.assert_array_equal(steps.product(left, b), plain.product(left, b))
    for shape in ((0, 2, 3, 4, 5), (2, 2, 3, 4, 0), (2, 2, 3, 0, 5)):
        empty = plain.store(np.zeros(shape, plain.wide))
        np.testing.assert_array_equal(steps.product(empty, empty.swapaxes(-1, -2)), plain.product(empty, empty.swapaxes(-1, -2)))


def test_one_call_of_cublas_where_a_batch_lies_evenly():
    """Pointers are for what strides cannot say."""
    batch, whole = (3, 4, 5), (16 * 24 * 20, 16 * 24 * 5, 16 * 24)
    full = chunk_kernels.operand((3, 4, 5, 16, 24), (*whole, 24, 1), batch)
    shared = chunk_kernels.operand((3, 1, 5, 16, 24), (*whole, 24, 1), batch)
    turned = chunk_kernels.operand((3, 4, 5, 24, 16), (*whole, 1, 24), batch)
    assert full == (24, False, whole) and turned == (24, True, whole)
    assert chunk_kernels.plan(batch, 16, 24, 16, full, turned).distances == (16 * 24, 16 * 24)
    assert chunk_kernels.plan(batch, 16, 24, 16, shared, turned).distances is None
    assert chunk_kernels.even((1, 4, 1), (7, 0, 3)) == 0
    assert chunk_kernels.operand((2, 8, 8), (64, 16, 2), (2,)) is None, "neither rows nor columns are contiguous"


@pytest.mark.parametrize("name", OPS)
def test_a_method_that_does_not_exist_is_refused(name):
    def chosen(method, chunk):
        return chunk_policy.chosen(name, method, chunk, kind="head", gradient=False, heads=(1,), T=1, d=1, e=1, dtype=np.dtype(np.float32))

    with pytest.raises(ValueError, match=f"{name}: method must be one of 'fused', 'chunkwise', 'tensor', got 'chunked'"):
        chosen("chunked", None)
    for method in ("fused", None):
        with pytest.raises(ValueError, match=f"{name}: chunk_length is for method='chunkwise', got 32"):
            chosen(method, 32)
    with pytest.raises(ValueError, match=f"{name}: chunk_length must be at most 128, got 129"):
        chosen("chunkwise", 129)
    assert chosen("fused", None) == ("fused", None) and chosen("chunkwise", 64) == ("chunkwise", 64)
    assert [chunkwise.length(T, False) for T in (0, 1, 9, 1000)] == [8, 8, 16, 128]
    assert chunkwise.length(1000, True) == 64 and chunkwise.length(1000, True, 30) == 32


def test_what_was_measured_chooses_the_method():
    """The rows of the first run, and what is too small for launches to pay."""

    def chosen(kind, gradient, heads=64, dtype="float32", method=None, d=64, operator="ssd"):
        sizes = {"heads": (heads,), "T": 4096, "d": d, "e": 64}
        return chunk_policy.chosen(operator, method, None, kind=kind, gradient=gradient, **sizes, dtype=np.dtype(dtype)).method

    assert [chosen(kind, gradient) for kind in ("head", "channel", "delta") for gradient in (False, True)] == [
        "chunkwise", "chunkwise", "fused", "chunkwise", "fused", "fused",
    ]  # fmt: skip
    assert chosen("head", False, heads=1) == chosen("head", False, dtype="float64") == chosen("head", True, method="fused") == "fused"
    assert chosen("head", False, dtype="bfloat16") == chosen("head", False, dtype="bfloat16", d=128) == "tensor"
    assert chosen("head", True, dtype="bfloat16") == chosen("head", True, dtype="bfloat16", operator="mlstm") == "tensor"
    assert chosen("head", False, dtype="bfloat16", d=129) == chosen("delta", False, dtype="bfloat16", method="tensor") == "chunkwise"
    assert chosen("channel", False, dtype="bfloat16") == chosen("channel", True, dtype="bfloat16") == "tensor"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_stabilised_gates_of_the_host_are_the_kernels(dtype, rng, tmp_path, monkeypatch, host_library):
    library = Library(host_library, tmp_path, [k for k in mlstm.KERNELS if "gates" in k.name])
    monkeypatch.setattr(launch.Kernel, "__call__", lambda kernel, grid, block, args, shared=0: library(kernel, grid, block, args, shared))
    monkeypatch.setattr(mlstm, "cp", np)
    for T in (0, 1, 255, 256, 300, 1023, 1024, 2100):
        F, i = (rng.normal(-1, 2, (3, T)).astype(dtype) for _ in range(2))
        first = np.array([-np.inf, 0.5, 20], dtype)
        want, got = gates(F, i, first), mlstm.gates(F, i, first)
        close = 8 * np.finfo(dtype).eps * abs(want[2]).max(initial=1)  # of sums in any order
        for a, b, relative in zip(got, want, (0, close, 0), strict=True):
            np.testing.assert_allclose(a, b, rtol=relative, atol=0 if relative else close)
        d_old, d_new, d_read = (rng.standard_normal((3, T)).astype(dtype) for _ in range(3))
        for d_last in (None, rng.standard_normal(3).astype(dtype)):
            arguments = (F, i, first, want[2], d_old, d_new, d_read, d_last)
            for a, b in zip(mlstm.gates_vjp(*arguments), gates_vjp(*arguments), strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=64 * np.finfo(dtype).eps * np.sqrt(T + 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPS)
def test_the_mirrors_functions_take_both_methods(name, rng, tmp_path, library, device, monkeypatch, farthest, host_library):
    """`refimpl.gpu`'s own functions on the host, through the contract: the default of so small a call is the fused recurrence, and both are right."""
    chapter = {"ssd": ssd, "mlstm": mlstm, "linear_attention": linear_attention}[name]
    small = ("matrix_memory<double, 8, 4, 2", "matrix_memory_vjp<double, 1, 8")
    wanted = {"kernel_chunks.cu": library}
    for file in ("kernel_matrix_memory.cu", "kernel_mlstm_gates.cu"):
        instances = [k for k in chapter.KERNELS if k.file == file and (k.name.startswith(small) or "mlstm_gates" in k.name)]
        if instances:
            (tmp_path / file).mkdir()
            wanted[file] = Library(host_library, tmp_path / file, instances)
    used = []

    def call(kernel, grid, block, args, shared=0):
        used.append(kernel.file)
        wanted[kernel.file](kernel, grid, block, args, shared)

    monkeypatch.setattr(launch.Kernel, "__call__", call)
    for module in (chapter, matrix_memory):
        monkeypatch.setattr(module, "cp", np)
    monkeypatch.setattr(chunk_kernels, "Steps", device)
    monkeypatch.setattr(mirror, "on_device", lambda value, operator: value)
    monkeypatch.setattr(matrix_memory, "multiprocessors", lambda: 4)
    monkeypatch.setattr(matrix_memory, "shared_memory", lambda: 160 * 1024)
    op, f, vjp = refimpl.OPS[name], getattr(chapter, name), getattr(chapter, f"{name}_vjp")
    arguments = drawn(name, rng, np.float64, T=21)
    bound = op.error_bound(**arguments, unit=2.0**-53)
    want = op.definition(**arguments)
    dy = rng.standard_normal(want.shape)
    for more in ({}, {"method": "chunkwise"}, {"method": "chunkwise", "chunk_length": 8}):
        used.clear()
        assert np.all(abs(f(**arguments, **more) - want) <= 2 * bound)
        assert farthest(name, arguments, dy, None, vjp(dy, **arguments, **more)) <= 1
        assert set(used) - {"kernel_mlstm_gates.cu"} == {"kernel_chunks.cu" if more else "kernel_matrix_memory.cu"}
    with pytest.raises(ValueError, match=f"{name}: chunk_length is for method='chunkwise'"):
        f(**arguments, chunk_length=8)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", [None, ("            meet(OWN + group, GROUP);\n            float m[4]", "            float m[4]")])
def test_warps_that_lag_behind_change_nothing(mistake, tmp_path, rng, monkeypatch, host_library):
    """Warps of different tasks, which meet at barriers by number: whichever of them are late, the result is the same to the bit."""
    kernels = [k for k in (*channel_tensor.KERNELS, *channel_tensor.KERNELS_VJP) if "_channels<64" in k.name]
    library = Library(host_library, tmp_path, kernels, mistake)
    run_on_host(monkeypatch, library)
    q, k, v, w = (rng.standard_normal((1, 1, 200, 40)).astype(ml_dtypes.bfloat16) for _ in range(4))
    w = (-abs(w.astype(np.float32))).astype(ml_dtypes.bfloat16)
    found = []
    for seed in range(6):
        library.library.lag(ctypes.c_ulonglong(0x9E3779B97F4A7C15 * seed % 2**64))
        backwards = {"scale": 1.0, "back": True}
        results = (*channel_tensor.read(q, k, v, w), *channel_tensor._start(True, k, q, v, w, **backwards))
        found.append(b"".join(x.tobytes() for x in results))
    assert (len(set(found)) == 1) == (mistake is None)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", [None, ("number % 3", "number % 2")])  # a head is told where the one before is still read
def test_warps_that_lag_behind_do_not_change_a_gradient(mistake, tmp_path, rng, monkeypatch, host_library):
    """Heads that share queries and keys, so that what one head leaves is read while the next is at work."""
    kernels, libraries = [k for k in chunk_tensor.KERNELS_VJP if "<128" not in k.name], {}
    for file in {k.file: 0 for k in kernels}:
        (tmp_path / file).mkdir()
        planted = mistake if file == "kernel_memory_gradient.cu" else None
        libraries[file] = Library(host_library, tmp_path / file, [k for k in kernels if k.file == file], planted)
    run_on_host(monkeypatch, lambda kernel, *arguments: libraries[kernel.file](kernel, *arguments))
    shapes = ((1, 4, 130, 72), (1, 1, 130, 40), (1, 1, 130, 40), (1, 4, 130, 72))
    dy, q, k, v = (rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in shapes)
    w, gain = (-abs(rng.standard_normal((1, 4, 130))).astype(np.float32) / 8 for _ in range(2))
    found = []
    for seed in range(5):
        for library in libraries.values():
            library.library.lag(ctypes.c_ulonglong(0x9E3779B97F4A7C15 * seed % 2**64))
        gradients = chunk_tensor.read_vjp(dy, q, k, v, w, gain, skip=np.ones((1, 4), np.float32))
        found.append(b"".join(x.tobytes() for x in gradients if x is not None))
    assert (len(set(found)) == 1) == (mistake is None)


TENSOR_MISTAKES = {
    "channels: keys faded by their own piece": ("kernel_memory_channels.cu", ("whole[r / size + 1]", "whole[r / size]")),
    "channels: values nobody waited for": ("kernel_memory_channels.cu", ("copies_wait<0>();\n            __syncwarp();", "__syncwarp();")),
    "channels: backwards, this step's decay": ("kernel_memory_channels.cu", ("min(step + back, end) * d", "min(step, end) * d")),
    "channels: the wrong side of a cut": ("kernel_memory_channels_gradient.cu", ("before ? reflected[3] : above[3]", "above[3]")),
    "channels: the decay after the chunk": (
        "kernel_memory_channels_gradient.cu",
        ("bounded(until[j][x + 1] * next[i % 2])", "until[j][x + 1]"),
    ),
    "channels: a decay's own step": ("kernel_memory_channels_gradient.cu", ("{ return k < n; };", "{ return k <= n; };")),
    "channels: what passes a whole chunk": ("kernel_memory_channels_gradient.cu", ("to_w[j][x] += both[x / 2]", "to_w[j][x] += 0.0f")),
    "a step that looks ahead": ("kernel_memory.cu", ("> g + x % 4 / 2 * 8 ? 0.0f", "> g + x % 4 / 2 * 8 + 1 ? 0.0f")),
    "a state read before it is written": (
        "kernel_memory.cu",
        ("if (c > 0) meet(1, THREADS);\n        leave_copy(c);", "if (c > 0) meet(1, THREADS), leave_copy(c);"),
    ),
    "keys of the next row": (
        "kernel_memory.cu",
        ("load_tiles(b, at<L>(K, 16 * block + lane / 16 * 8", "load_tiles(b, at<L>(K, 16 * block + 8 - lane / 16 * 8"),
    ),
    "the state fades too late": ("kernel_memory.cu", ("power(all + all_rest, halved), power(all + all_rest, halved)", "1.0f, 1.0f")),
    "a query without its own decay": (
        "kernel_memory_decays.cu",
        ("to.since[s] = power(min(sum + row, 127.0f), false)", "to.since[s] = 1.0f"),
    ),
    "what a gradient asks, of the next chunk": (
        "kernel_memory.cu",
        ("const i64 kept = (of_head * chunks + c) * d;", "const i64 kept = (of_head * chunks + min(c + 1, chunks - 1)) * d;"),
    ),
    "a head told too late": (
        "kernel_memory_gradient.cu",
        ("if (tile == 0) tell(number + 1);", "if (tile == 0) tell(number);"),
    ),
    "a normaliser without its sign": ("kernel_mlstm_gates.cu", ("(s[at] > 0.0f ? -against : against)", "-against")),
    "blocks of keys of the other half": (
        "kernel_memory_gradient.cu",
        ("(columns ^ 32 * i) + 2 * own * BLOCK", "(columns ^ 32 * i) + 2 * (1 - own) * BLOCK"),
    ),
    "copies nobody waited for": ("kernel_memory.cu", ("copies_wait<0>();", "")),
    "the rectangle's corner": ("kernel_memory_gradient.cu", ("(s < r ? 0x3f80u", "(s <= r ? 0x3f80u")),
    "what leaves the chunk": ("kernel_memory_decays.cu", ("(from.x + before.x)", "from.x")),
    "sums that miss a row": ("kernel_memory_gradient.cu", ("(g + 8 >= r ? corner", "(g + 8 > r ? corner")),
    "a group of queries too few": ("kernel_memory_decays.cu", ("if (r < 16 * i) rectangle.x", "if (r < 16 * i - 16) rectangle.x")),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", TENSOR_MISTAKES)
def test_a_mistake_on_tensor_cores_is_seen(mistake, tmp_path, rng, monkeypatch, farthest, host_library):
    """A file's text is changed, or in a copy of the folder that of a header."""
    file, edit = TENSOR_MISTAKES[mistake]
    if file.endswith(".cuh"):
        folder = tmp_path / "cuda"
        shutil.copytree(launch.FOLDER, folder)
        text = (folder / file).read_text(encoding="utf-8")
        assert edit[0] in text
        (folder / file).write_text(text.replace(*edit), encoding="utf-8")
        monkeypatch.setattr(launch, "FOLDER", folder)
        edit, file = None, None
    run_on_host(monkeypatch, tensor_kernels(host_library, tmp_path, edit, file))
    with np.errstate(all="ignore"):
        assert any(not error <= 1 for name in OPS for error in off_tensor_cores(name, rng, farthest))


MISTAKES = {
    "a decay too many": ("exponent += t > s ? w[t] : X(0);", "exponent += t >= s ? w[t] : X(0);"),
    "a row that looks ahead": ("t >= s + strict ? narrow<S>(times_exp(product", "t + 1 >= s + strict ? narrow<S>(times_exp(product"),
    "the carry's order": ("if (!BACK) x = times_exp(x, grows);\n        passed", "passed"),
    "another head's decays": ("w += (entry(gh, heads, w_heads) * chunks + c) * L;", "w += (entry(0, heads, w_heads) * chunks + c) * L;"),
    "one lane too few": ("for (int away = 16; away > 0; away /= 2) sum", "for (int away = 8; away > 0; away /= 2) sum"),
    "a barrier too few": ("__syncthreads();\n        if (threadIdx.x < rows) {", "if (threadIdx.x < rows) {"),
    "the adjoint's diagonal": ("upto[i * (L + 1) + s] = t > s ? faded", "upto[i * (L + 1) + s] = t > s + 1 ? faded"),
    "an element past the end": ("if (at >= size) return;", "if (at > size) return;"),
    "the substitution's sign": (": -beta[t] * sum", ": beta[t] * sum"),
    "a channel's first step": ("if (t > s) left[i] *= decay_s", "left[i] *= decay_s"),
    "a channel's decay twice": ("faded *= decay[32 * r];", "faded *= decay[32 * r] * decay[32 * r];"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_kernel_is_seen(mistake, tmp_path, rng, monkeypatch, device, farthest, host_library):
    """The proof can fail: for each mistake planted in the kernels' text one operator at least goes wrong."""
    wrong = Library(host_library, tmp_path, [k for k in chunk_kernels.KERNELS if "double" in k.name], MISTAKES[mistake])
    monkeypatch.setattr(launch.Kernel, "__call__", lambda kernel, grid, block, args, shared=0: wrong(kernel, grid, block, args, shared))
    with np.errstate(all="ignore"):
        seen = [name for name in OPS if not _as_the_chapter(name, device, rng, farthest)]
    assert seen, mistake


def _as_the_chapter(name, steps, rng, farthest) -> bool:
    op = refimpl.OPS[name]
    function, vjp = operator(name, steps, 8)
    for sizes in LONG[name]:
        for beta in (True, False):
            call = {n: x for n, x in drawn(name, rng, np.float64, **sizes).items() if n != "beta" or beta}
            y = op.definition(**call)
            dy = rng.standard_normal(y.shape)
            try:
                got, gradients = function(**call), vjp(dy, **call)
            except AssertionError:
                return False
            if not np.all(abs(got - y) <= 2 * op.error_bound(**call, unit=2.0**-53)) or not farthest(name, call, dy, None, gradients) <= 1:
                return False
    return True
