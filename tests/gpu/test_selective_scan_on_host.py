"""The selective scan's kernels for bfloat16, compiled by g++ for the host (``host/cuda_on_host.h``): every result, with warps that lag behind.

Matrix instructions, copies in the background and barriers by number are those of ``host/``; all else is the device's own code.
"""

import ctypes

import ml_dtypes
import numpy as np
import pytest

import refimpl
from refimpl.ops.state_space.selective_scan import error_bound

pytest.importorskip("cupy", reason="not run: refimpl.gpu needs cupy, even without a device")
launch = pytest.importorskip("refimpl.gpu.launch")

HALF = ml_dtypes.bfloat16
STRIP = 16
# instance: what a block keeps in shared memory, how many of it; strips and threads of a block
INSTANCES = {
    "ring": ("kernel_selective_scan_ring.cu", "selective_scan_ring<__nv_bfloat16, 6>", "Ring<__nv_bfloat16, 6>", 1, 1, 384),
    "warps": ("kernel_selective_scan_strips.cu", "selective_scan_strips<RESULTS, __nv_bfloat16, 1, 4, 2>", "Strip<__nv_bfloat16, 1>", 4, 4, 128),
    "pairs": ("kernel_selective_scan_strips.cu", "selective_scan_strips<RESULTS, __nv_bfloat16, 2, 4, 2>", "Strip<__nv_bfloat16, 2>", 4, 4, 256),
    "checkpoints": ("kernel_selective_scan_strips.cu", "selective_scan_strips<CHECKPOINTS, __nv_bfloat16, 1, 4, 2>", "Strip<__nv_bfloat16, 1>", 4, 4, 128),
    "gradient": (
        *("kernel_selective_scan_tensor_gradient.cu", "selective_scan_tensor_gradient<__nv_bfloat16, 256, 2>"),
        *("TensorGradientShared<__nv_bfloat16, 256>", 1, 4, 256),
    ),
}  # fmt: skip


class OnHost:
    """One instance: called with its arguments, arrays as pointers."""

    def __init__(self, build, folder, name, mistake=None):
        file, instance, shared, times, self.strips, self.threads = INSTANCES[name]
        code = {
            part: (launch.FOLDER / part).read_text(encoding="utf-8") for part in (file, "block_selective.cuh", "block_selective_strip.cuh")
        }
        if mistake is not None:
            assert any(mistake[0] in text for text in code.values())
            code = {part: text.replace(*mistake) for part, text in code.items()}
        for part, text in code.items():  # here, so that what they include is looked for in host/ before gpu/cuda/
            (folder / part).write_text(text.replace("extern __shared__", "extern"), encoding="utf-8")
        calls = (
            f'extern "C" void call(unsigned blocks, unsigned lag, void** a) {{ host::uneven = lag;'
            f" host::launch(&{instance}, blocks, 1, {self.threads}, {times} * sizeof({shared}), a); }}\n"
        )
        source = folder / f"{name}.cpp"
        source.write_text(f'#include "cuda_on_host.h"\n#include "{file}"\n{calls}', encoding="utf-8")
        self.library = build(source)

    def __call__(self, N, c, G, arguments, lag):
        pointers = (np.array([0 if a is None else a.ctypes.data], np.uint64) if a is None or a.ndim else a.reshape(1) for a in arguments)
        kept = [np.ascontiguousarray(a) for a in pointers]
        self.library.call(N * G * -(-c // G // (STRIP * self.strips)), lag, (ctypes.c_void_p * len(kept))(*(a.ctypes.data for a in kept)))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory, host_library):
    return {name: OnHost(host_library, tmp_path_factory.mktemp(name), name) for name in INSTANCES}


def draw(seed, N, T, c, *, without=(), groups=()):
    rng = np.random.default_rng(seed)
    make = lambda *shape: rng.standard_normal(shape)
    call = {
        "u": make(N, T, c), "delta": make(N, T, c) - 1, "A": -np.exp(make(c, STRIP)), "B": make(N, T, *groups, STRIP), "C": make(N, T, *groups, STRIP),
        "D": make(c), "z": make(N, T, c), "delta_bias": make(c), "state": make(N, c, STRIP),
    }  # fmt: skip
    return {name: x.astype(np.float32 if name == "state" else HALF) for name, x in call.items() if name not in without}


def rows(x, stride):
    """An array and its strides of batch and time, the latter as `stride` makes it."""
    return (x, np.int64(0), stride(0)) if x is None else (x, np.int64(x[0].size), stride(x.shape[-1]))


def maps(call, stride):
    """The same for B and C, with the stride of groups."""
    for name in "BC":
        yield from (call[name], np.int64(call[name][0].size), stride(call[name][0, 0].size), np.int64(STRIP))


def groups_of(call):
    return call["B"].shape[2] if call["B"].ndim == 4 else 1


def in_bytes(x):
    return np.uint32(2 * x)


def forward(kernel, call, softplus, lag, checkpoints=False):
    (N, T, c), get = call["u"].shape, call.get
    y = np.full((N, T, c), np.nan, np.float32).astype(HALF)
    last = np.full((N, -(-T // STRIP), c, STRIP) if checkpoints else (N, c, STRIP), np.nan, np.float32)
    given = (get("D"), get("delta_bias"), get("state"), last, None if checkpoints else y)
    sizes = map(np.int32, (T, c, groups_of(call), softplus))
    kernel(
        N,
        c,
        groups_of(call),
        (*(a for name in ("u", "delta", "z") for a in rows(get(name), in_bytes)), *maps(call, in_bytes), call["A"], *given, *sizes),
        lag,
    )
    return last if checkpoints else (y, last)


CASES = [((2, 70, 48), ()), ((1, 120, 80), ("state",)), ((1, 16, 16), ("z", "delta_bias")), ((1, 5, 16), ("D",)), ((1, 97, 16), ())]


@pytest.mark.parametrize(("size", "without"), CASES)
@pytest.mark.parametrize("name", ["ring", "warps", "pairs"])
def test_results(kernels, name, size, without):
    call, softplus = draw(size, *size, without=without), "D" not in without
    call = call if softplus else call | {name: abs(call[name]) for name in ("delta", "delta_bias")}
    exact = {name: x.astype(np.float64) for name, x in call.items()} | {"delta_softplus": softplus, "return_state": True}
    want, bound = refimpl.selective_scan(**exact), error_bound(**exact, unit=2.0**-24, store=2.0**-8)
    got = forward(kernels[name], call, softplus, 0)
    for g, w, e, rounding in zip(got, want, bound, (2.0**-8, 0), strict=True):
        assert np.all(abs(g.astype(np.float64) - w) <= e + rounding * abs(w))
    for lag in (1, 2, 3):
        for g, again in zip(got, forward(kernels[name], call, softplus, lag), strict=True):
            np.testing.assert_array_equal(g.view("u1"), again.view("u1"))


def gradient(kernels, call, dy, dstate, softplus, lag):
    (N, T, c), get = call["u"].shape, call.get
    kept = forward(kernels["checkpoints"], call, softplus, lag, checkpoints=True)
    G = groups_of(call)
    nan, parts = (lambda *shape: np.full(shape, np.nan, np.float32)), -(-c // G // 64)
    found = {name: nan(N, T, c).astype(HALF) for name in ("u", "delta", "z")}
    found |= {"A": nan(N, c, STRIP), "D": nan(N, c), "delta_bias": nan(N, c)}
    found |= {"B": nan(parts, *call["B"].shape), "C": nan(parts, *call["C"].shape), "state": nan(N, c, STRIP)}
    arrays = (*rows(dy, np.int64), *(a for name in ("u", "delta", "z") for a in rows(get(name), np.int64)), *maps(call, np.int64))
    given = (call["A"], get("D"), get("delta_bias"), kept, dstate, *found.values())
    kernels["gradient"](N, c, G, (*arrays, *given, np.int32(T), np.int32(c), np.int32(G), np.int64(N), np.int32(softplus)), lag)
    summed = {name: x.sum(axis=0) if name in ("A", "D", "delta_bias", "B", "C") else x for name, x in found.items()}
    return {name: x.astype(call[name].dtype) for name, x in summed.items() if name in call}


@pytest.mark.parametrize(("size", "without"), [((2, 37, 48), ()), ((1, 20, 80), ("state",)), *CASES[2:4]])
def test_gradient(kernels, size, without, farthest):
    call, softplus, rng = draw(size, *size, without=without), "D" not in without, np.random.default_rng(1)
    call = call if softplus else call | {name: abs(call[name]) for name in ("delta", "delta_bias")}
    dy, dstate = rng.standard_normal(size).astype(HALF), rng.standard_normal((size[0], size[2], STRIP)).astype(np.float32)
    got = gradient(kernels, call, dy, dstate, softplus, 0)
    assert farthest("selective_scan", call | {"delta_softplus": softplus}, dy, dstate, got, "bfloat16") <= 1
    for name, again in gradient(kernels, call, dy, dstate, softplus, 5).items():
        np.testing.assert_array_equal(got[name].view("u1"), again.view("u1"))


@pytest.mark.parametrize("name", ["ring", "warps", "pairs"])
def test_groups(kernels, name, farthest):
    """Two groups of 80 channels, of which the last block of each takes one strip."""
    call = draw(0, 2, 20, 160, groups=(2,))
    exact = {name: x.astype(np.float64) for name, x in call.items()} | {"delta_softplus": True, "return_state": True}
    want, bound = refimpl.selective_scan(**exact), error_bound(**exact, unit=2.0**-24, store=2.0**-8)
    for g, w, e, rounding in zip(forward(kernels[name], call, True, 0), want, bound, (2.0**-8, 0), strict=True):
        assert np.all(abs(g.astype(np.float64) - w) <= e + rounding * abs(w))
    if name == "pairs":
        dy, dstate = np.ones((2, 20, 160), HALF), np.ones((2, 160, STRIP), np.float32)
        got = gradient(kernels, call, dy, dstate, True, 0)
        assert farthest("selective_scan", call | {"delta_softplus": True}, dy, dstate, got, "bfloat16") <= 1


MISTAKES = [
    ("ring", "            meet(TEAMS + team, 128);\n", ""),  # the state is taken before it is handed on
    ("ring", "        meet(team, 64);\n        fetch", "        fetch"),  # steps are read before the other warp has entered them
    ("ring", "            for (int i = 0; i < 4; ++i) h[i] *= a[t][i];", "            for (int i = 0; i < 4; ++i) h[i] *= a[0][i];"),
    ("pairs", "            if (t == 4 || (TEAM == 1 && t + 4 < PIECE)) meet_team();", ""),
    ("warps", "        wait_for_copies<0>();\n        meet_team();", "        meet_team();"),
    ("pairs", "mine.g == t % 8 + j", "mine.g == j"),
    ("ring", "first + i < rows ? chosen : 0.f", "chosen"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m[0]}: {m[1].strip()[:40]}")
def test_a_mistake_is_seen(mistake, tmp_path, host_library):
    name, right, wrong = mistake
    call = draw(0, 1, 150, 16)
    exact = {name: x.astype(np.float64) for name, x in call.items()} | {"delta_softplus": True, "return_state": True}
    want = refimpl.selective_scan(**exact)
    kernel = OnHost(host_library, tmp_path, name, (right, wrong))
    errors = []
    for lag in (0, 1, 2, 3):
        got = forward(kernel, call, True, lag)
        errors += [np.max(abs(g.astype(np.float64) - w)) / np.max(abs(w)) for g, w in zip(got, want, strict=True)]
    assert not np.max(errors) <= 0.02  # or no number
