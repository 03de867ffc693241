"""Mixtures of experts: the mirror's steps and kernels on the host, the order of Hopper's tiles, and large shapes on the device.

On the host g++ compiles the kernels that are not products (``host/cuda_on_host.h``); products, of cuBLAS or of Hopper's kernel, arrive at a few
lines of NumPy that mean the same.
"""

import ctypes
import importlib.util
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import refimpl

MISSING = importlib.util.find_spec("cupy") is None
pytestmark = pytest.mark.skipif(MISSING, reason="not run: cupy not installed; pip install 'refimpl[compile]'")
if not MISSING:
    from refimpl.gpu import grouped, launch, mirror, tensor_map
    from refimpl.gpu.experts import moe, route

HERE = Path(__file__).parent
DTYPES = (pytest.param("float64", marks=pytest.mark.slow), pytest.param("float32", marks=pytest.mark.slow), "bfloat16")
SIZES = ("groups", "size", "rows", "columns", "inner", "terms", "band")


def _other(name: str):
    """What another file of tests has already."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- the device on the host ----------------------------------------------------------------------------------------------


def of_tensor_cores(kernel, sizes, x, x2, w, w2, counts, out):
    """`grouped_product` on arrays of NumPy, in float64."""
    _, form, activation, shared = kernel.name.partition("<")[2].rstrip(">").split(", ")
    n = dict(zip(SIZES, np.frombuffer(sizes.tobytes(), np.int32).tolist(), strict=True))
    assert n["size"] % {"WEIGHTS": 256, "ROWS": 128}[shared] == 0 and n["columns"] % 8 == 0 and n["groups"] == len(counts)
    act = {"NONE": lambda v: v, "RELU": lambda v: np.maximum(v, 0), "SILU": lambda v: v / (1 + np.exp(-v))}[activation]
    with np.errstate(invalid="ignore"):  # what nobody wrote may be anything
        x, x2, w, w2 = (v.astype(np.float64) for v in (x, x2, w, w2))
    first = 0
    for g, count in enumerate(counts):
        rows = slice(first, first + -(-count // n["size"]) * n["size"])
        first = rows.stop
        if form == "OUTER":
            assert not x[first - (-count % n["size"]) : first].any() and n["rows"] == out.shape[1]
            out[g] = x[rows].T @ w[rows]
        elif form == "TRANSPOSED":
            out[rows] = x[rows] @ w[g].T + (x2[rows] @ w2[g].T if n["terms"] == 2 else 0)
        else:
            assert n["inner"] == x.shape[1] == w.shape[1]
            out[rows] = act(x[rows] @ w2[g]) * (x[rows] @ w[g]) if form == "GATED" else act(x[rows] @ w[g])


def adding(function, batched: bool):
    """A function of cuBLAS that adds to what is there, if beta is not 0."""

    def call(*arguments):
        m, n = arguments[3:5]
        if not batched or arguments[13]._obj.value == 0:
            return function(*arguments)
        addresses = np.ctypeslib.as_array((ctypes.c_uint64 * arguments[17]).from_address(arguments[14]))
        dtype = np.dtype({0: np.float32, 1: np.float64, 14: ml_dtypes.bfloat16}[arguments[15]])
        assert arguments[16] == m
        there = [np.frombuffer((ctypes.c_char * (m * n * dtype.itemsize)).from_address(int(a)), dtype) for a in addresses]
        before = [x.copy() for x in there]
        status = function(*arguments)
        for x, earlier in zip(there, before, strict=True):
            x += earlier
        return status

    return call


@pytest.fixture(scope="session")
def kernels(tmp_path_factory, host_library):
    chunks, found = _other("test_chunkwise"), {}
    for file in ("kernel_experts.cu", "kernel_places.cu", "kernel_grouped_outer.cu"):
        instances = [k for k in moe.KERNELS if k.file == file and "__half" not in k.name]
        found[file] = chunks.Library(host_library, tmp_path_factory.mktemp("kernels"), instances)
    return chunks, found


@pytest.fixture
def on_host(kernels, monkeypatch):
    """The mirror on NumPy's arrays; `on_host(True)` has tensor cores."""
    chunks, libraries = kernels

    def call(kernel, grid, block, args, shared=0):
        if kernel.file in libraries:
            args = [np.ascontiguousarray(a).reshape(-1) if isinstance(a, np.ndarray) and not a.flags.writeable else a for a in args]
            libraries[kernel.file](kernel, grid, block, args, shared)
        else:
            of_tensor_cores(kernel, *args)

    monkeypatch.setattr(launch.Kernel, "__call__", call)
    for module in (grouped, moe, route):
        monkeypatch.setattr(module, "cp", np)
    monkeypatch.setattr(grouped, "cublas_function", lambda name: adding(chunks.cublas(name), name == "cublasGemmBatchedEx"))
    monkeypatch.setattr(grouped, "cublas_handle", lambda: None)
    monkeypatch.setattr(grouped, "_address", lambda x: x.ctypes.data)
    monkeypatch.setattr(grouped, "multiprocessors", lambda: 4)

    def choose(logits, k, order, renormalize):
        return tuple(map(np.ascontiguousarray, refimpl.route(logits, k, order=order, renormalize=renormalize)))

    monkeypatch.setattr(moe, "choose", choose)
    monkeypatch.setattr(
        tensor_map, "panels", lambda x, rows: x.reshape(x.shape[1:] if x.shape[0] == 1 and x.shape[1] > 1 else x.shape[-2:])
    )
    monkeypatch.setattr(mirror, "on_device", lambda value, operator: value)
    return lambda hopper: monkeypatch.setattr(grouped, "capability", lambda: "90" if hopper else "80")


CASES = {
    "as it comes": ({}, {"k": 2}),
    "tensor cores": ({"T": 5, "d": 16, "f": 8}, {"k": 2, "return_stats": True}),
    "a capacity, entries": ({"T": 6, "d": 8, "f": 16, "batch": (2, 2)}, {"k": 2, "capacity": 2, "return_stats": True}),
    "gelu, an expert each": ({"T": 4, "d": 8, "f": 8, "E": 5}, {"k": 1, "activation": "gelu", "order": "sigmoid"}),
    "no gate": ({"T": 9, "d": 24, "f": 8, "E": 3}, {"k": 3, "activation": "relu", "order": "softmax_topk", "w_gate": None}),
    "several tiles": ({"T": 40, "d": 133, "f": 70, "E": 2}, {"k": 1, "order": "sigmoid"}),
    "many experts": ({"T": 3, "d": 8, "f": 8, "E": 11}, {"k": 4, "renormalize": True}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_and_kernels_on_the_host(dtype, case, on_host, rng, farthest):
    """What products leave over: slots, rows there and back, activations, gradients, on either way of multiplying."""
    assert _worst(dtype, case, on_host, rng, farthest) <= 1


def _worst(dtype, case, on_host, rng, farthest):
    """The largest error of results and gradients in units of what is allowed, on either way of multiplying; infinite for wrong counts."""
    sizes, options = CASES[case]
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    call = {name: x.astype(kind) for name, x in refimpl.OPS["moe"].sample(rng, **sizes).items()} | options
    exact = {name: x.astype(np.float64) if isinstance(x, np.ndarray) else x for name, x in call.items()}
    unit, store = {"float64": (2.0**-53, 0.0), "float32": (2.0**-24, 0.0), "bfloat16": (2.0**-24, 2.0**-8)}[dtype]
    want, *counts = _several(refimpl.moe(**exact))
    bound = _several(refimpl.OPS["moe"].error_bound(**exact, unit=unit, store=store))[0]
    worst = []
    for hopper in (False, True):
        on_host(hopper)
        y, *stats = _several(moe.moe(**call))
        worst.append(np.max(abs(y.astype(np.float64) - want) / np.maximum(bound + store * abs(want), 1e-300)))
        if len(stats) != len(counts) or not all(np.array_equal(a, b) for a, b in zip(stats, counts, strict=True)):
            return np.inf
        dy = rng.standard_normal(y.shape).astype(kind)
        given = {n: v for n, v in call.items() if n != "return_stats"}
        gradients = {n: v for n, v in moe.moe_vjp(dy, **given).items() if v is not None}
        worst.append(farthest("moe", given, dy, None, gradients, dtype))
    return np.max(worst)  # NaN stays NaN


MISTAKES = {
    "a place too many": ("kernel_experts.cu", "place[p] < capacity", "place[p] <= capacity"),
    "another entry's queue": ("kernel_experts.cu", "starts[e] + before[p / per_entry * E + e]", "starts[e] + before[e]"),
    "experts that overlap": ("kernel_experts.cu", "sums[threadIdx.x] - filled", "(sums[threadIdx.x] - filled) / 2"),
    "a choice left out": ("kernel_experts.cu", "for (int j = 0; j < k; ++j)", "for (int j = 1; j < k; ++j)"),
    "the pair for the token": ("kernel_experts.cu", "token = pair / k", "token = pair % k"),
    "the weight twice": ("kernel_experts.cu", "sum += h * d;", "sum += h * wd;"),
    "the slope of the other": (
        "kernel_experts.cu",
        "narrow<S>(wd * a_i * slope(activation, g_i))",
        "narrow<S>(wd * g_i * slope(activation, a_i))",
    ),
    "a lane too few": ("kernel_experts.cu", "for (int away = 16; away > 0; away /= 2) sum", "for (int away = 8; away > 0; away /= 2) sum"),
    "a queue that starts anew": ("kernel_places.cu", "earlier_warps + upto - own", "earlier_warps + upto"),
    "a column beyond the end": ("kernel_grouped_outer.cu", "row < p && column < q", "row < p && column <= q"),
    "a step short": ("kernel_grouped_outer.cu", "+ DEEP - 1) / DEEP", "- 1) / DEEP"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_kernel_is_seen(mistake, kernels, on_host, rng, farthest, monkeypatch, tmp_path, host_library):
    """The proof can fail: what is planted in the kernels' text makes a result wrong, or writes where nothing is."""
    file, *change = MISTAKES[mistake]
    instances = [k for k in moe.KERNELS if k.file == file and ("<" not in k.name or "<float" in k.name)]
    monkeypatch.setitem(kernels[1], file, kernels[0].Library(host_library, tmp_path, instances, tuple(change)))
    with np.errstate(all="ignore"):
        for case in ("a capacity, entries", "several tiles"):
            try:
                worst = _worst("float32", case, on_host, rng, farthest)
            except (AssertionError, IndexError):
                return
            if not worst <= 1:
                return
    pytest.fail(mistake)


@pytest.mark.parametrize("capacity", [None, 3])
def test_slots_of_many_groups(capacity, on_host, rng, monkeypatch):
    """More groups than a block has threads, many of them empty."""

    def places(group, groups):
        own = group[..., None] == np.arange(groups)
        return np.sum(np.cumsum(own, axis=1) * own, axis=-1) - 1, own.sum(axis=1)

    monkeypatch.setattr(grouped, "places", places)
    groups, choice = 700, rng.integers(0, 700, (3, 40, 2)) // 2 * 2
    found, tokens = grouped.Groups.of(choice, groups, capacity, False)
    queues = {}
    for entry, pairs in enumerate(choice.reshape(3, 80)):
        for place, e in enumerate(pairs):
            earlier = [p for p in queues.get(e, []) if p // 80 == entry]
            if capacity is None or len(earlier) < capacity:
                queues.setdefault(e, []).append(entry * 80 + place)
    assert found.size == 16 and len(found.pair_of) == len(found.of_block) * 16
    first = 0
    for e in range(groups):
        members = queues.get(e, [])
        assert found.counts[e] == len(members) and (not members or found.starts[e] == first)
        assert list(found.pair_of[first : first + len(members)]) == members and list(found.slot[members]) == [
            *range(first, first + len(members))
        ]
        blocks = -(-len(members) // 16)
        assert np.all(found.of_block[first // 16 : first // 16 + blocks] == e) and np.all(
            found.pair_of[first + len(members) : first + 16 * blocks] == -1
        )
        first += 16 * blocks
    assert np.count_nonzero(found.slot >= 0) == np.count_nonzero(found.pair_of >= 0) == tokens.sum() == sum(map(len, queues.values()))


WALK = """
#include <algorithm>
#include <cstdio>
using std::max, std::min;
#define __device__
static int rank_of_block;
static int rank_in_pair() { return rank_of_block; }
CODE
template <int FORM, int SHARED> void tiles(Sizes n, const i64* counts, int pairs) {
    for (int block = 0; block < 2 * pairs; block++) {
        rank_of_block = block % 2;
        Walk<FORM, SHARED> walk(n, counts);
        for (int item = block / 2; walk.find(item); item += pairs)
            printf("%d %d %d %d %d %d\\n", FORM, SHARED, walk.group, walk.slot, walk.row, walk.column);
    }
}
int main() {
    const i64 counts[] = {COUNTS};
    Sizes n = {SIZES};
    tiles<PLAIN, WEIGHTS>(n, counts, 5), tiles<GATED, WEIGHTS>(n, counts, 5), tiles<OUTER, WEIGHTS>(n, counts, 5);
    tiles<PLAIN, ROWS>(n, counts, 5), tiles<GATED, ROWS>(n, counts, 5), tiles<OUTER, ROWS>(n, counts, 5);
}
"""


@pytest.mark.parametrize("band", [1, 3])
@pytest.mark.parametrize("counts", [[300, 0, 1, 1025, 0], [0, 0], [257]])
def test_every_tile_is_taken_once(counts, band, tmp_path, host_compiler):
    """All tiles that hold rows and columns of the result, by whichever block; pairs of blocks stand side by side as they share."""
    text, shared = ((launch.FOLDER / f).read_text(encoding="utf-8") for f in ("kernel_grouped_hopper.cu", "block_attention.cuh"))
    shared = shared[shared.index("__device__ inline void which") :]
    code = text[text.index("using i64") : text.index("template <int ACTIVATION>")] + shared[: shared.index("\n}\n") + 3]
    code += text[text.index("// The tiles of one block") : text.index("// 64 rows x 2 N columns")]
    columns, height = 700, 390
    sizes = {"groups": len(counts), "size": 256, "rows": height, "columns": columns, "inner": 64, "terms": 1, "band": band}
    program = (
        WALK.replace("CODE", code).replace("COUNTS", ", ".join(map(str, counts))).replace("SIZES", ", ".join(str(sizes[x]) for x in SIZES))
    )
    (tmp_path / "walk.cpp").write_text(program)
    subprocess.run([host_compiler, "-std=c++17", "-w", str(tmp_path / "walk.cpp"), "-o", str(tmp_path / "walk")], check=True)
    lines = subprocess.run([str(tmp_path / "walk")], capture_output=True, text=True, check=True).stdout.splitlines()
    taken = [tuple(map(int, line.split())) for line in lines]
    assert len(set(taken)) == len(taken)
    starts = np.cumsum([0, *(-(-n // 256) * 256 for n in counts)])
    for form, wide in ((0, 256), (1, 128), (3, 256)):
        for sharing in (1, 2):
            unit, across = (256, wide) if sharing == 1 else (128, 2 * wide)
            want = {
                (form, sharing, g, int(starts[g]), row, column)
                for g, n in enumerate(counts)
                for row in range(0, -(-(height if form == 3 else n) // unit) * unit, 128)
                for column in range(0, -(-columns // across) * across, wide)
            }
            assert {t for t in taken if t[:2] == (form, sharing)} == want


# -- on the device -----------------------------------------------------------------------------------------------------------


def _call(rng, kind, *, T, d, f, E, lean=0.0, gate=True, **options):
    """A call on the host; `lean` sends more tokens to the first experts, and none to the last, and decides between them by far."""
    router = rng.standard_normal((d, E)) * d**-0.5
    router[0] = -lean * np.arange(E) + rng.permutation(E) / 8
    router[0, -1] = -60
    x = rng.standard_normal((T, d))
    x[:, 0] = 1
    call = {"x": x, "router": router, "w_in": rng.standard_normal((E, d, f)) * d**-0.5, "w_out": rng.standard_normal((E, f, d)) * f**-0.5}
    call |= {"w_gate": rng.standard_normal((E, d, f)) * d**-0.5} if gate else {}
    call = {name: v.astype(kind) for name, v in call.items()}
    for _ in range(100):  # logits that nearly tie are decided by rounding
        logits = np.sort(call["x"].astype(np.float64) @ call["router"].astype(np.float64), axis=-1)
        close = np.any(np.diff(logits, axis=-1) < 1e-4, axis=-1)
        call["x"][close, 1:] = rng.standard_normal((int(close.sum()), d - 1)).astype(kind)
        if not close.any():
            break
    return call | {"k": 2} | options


def _on_device(call):
    import cupy as cp

    return {name: cp.asarray(v) if isinstance(v, np.ndarray) else v for name, v in call.items()}


DEVICE = {
    "pairs that share matrices": {"T": 9000, "d": 264, "f": 392, "E": 4, "lean": 1.0},
    "pairs that share rows": {"T": 1000, "d": 136, "f": 520, "E": 7, "lean": 0.6},
    "a capacity": {"T": 2100, "d": 1032, "f": 72, "E": 5, "lean": 0.3, "capacity": 500},
    "no gate": {"T": 333, "d": 72, "f": 1000, "E": 16, "gate": False, "activation": "relu"},
    "gelu": {"T": 333, "d": 72, "f": 1000, "E": 3, "activation": "gelu", "order": "softmax_topk"},
    "one tile": {"T": 1, "d": 8, "f": 8, "E": 3},
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", DEVICE)
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_tensor_cores(kind, case, rng, farthest):
    """Uneven groups, one of them empty, sizes that are no multiple of a tile; the same bits in every run."""
    import cupy as cp

    kind = np.dtype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
    call = _call(rng, kind, **DEVICE[case])
    store = 2.0**-8 if kind.name == "bfloat16" else 2.0**-11
    exact = {name: v.astype(np.float64) if isinstance(v, np.ndarray) else v for name, v in call.items()}
    bound = refimpl.OPS["moe"].error_bound(**exact, unit=2.0**-24, store=store)
    want = refimpl.OPS["moe"].forms["gathered"].function(**exact)
    on_device = _on_device(call)
    runs = []
    for _ in range(2):
        cp.get_default_memory_pool().free_all_blocks()
        room = cp.full(1 << 26, 0xFF, np.uint8)  # what is not written is NaN
        del room
        runs.append(moe.moe(**on_device).get())
    np.testing.assert_array_equal(*(y.view(np.uint16) for y in runs))
    assert np.all(abs(runs[0].astype(np.float64) - want) <= bound + store * abs(want))
    if call["x"].size * call["w_in"].size <= 1 << 37:
        dy = rng.standard_normal(want.shape).astype(kind)
        gradients = {n: v.get() for n, v in moe.moe_vjp(cp.asarray(dy), **on_device).items() if v is not None}
        assert farthest("moe", call, dy, None, gradients, kind.name) <= 1


@pytest.mark.gpu
def test_tensor_cores_wait_for_nothing(rng):
    import cupy as cp

    call = _on_device(_call(rng, np.dtype(ml_dtypes.bfloat16), T=4096, d=512, f=1024, E=8))
    spin = 'extern "C" __global__ void spin(long long n) { long long start = clock64(); while (clock64() - start < n) {} }'
    want = moe.moe(**call)
    moe.moe_vjp(want, **call)
    stream, event = cp.cuda.Stream(non_blocking=True), cp.cuda.Event()
    with stream:
        moe.moe_vjp(moe.moe(**call), **call)  # memory for this stream
        stream.synchronize()
        cp.RawKernel(spin, "spin")((1,), (1,), (np.int64(400_000_000),))
        got = moe.moe(**call)
        moe.moe_vjp(got, **call)
        event.record()
        assert not event.done, "the call came back only when the device was done"
        stream.synchronize()
    np.testing.assert_array_equal(got.get().view(np.uint16), want.get().view(np.uint16))


def _several(value):
    return value if isinstance(value, tuple) else (value,)
