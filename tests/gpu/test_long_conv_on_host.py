"""Long convolution of single rows, compiled by g++ for the host (``host/cuda_on_host.h``): each length of transform, warps that lag behind."""

import ctypes

import numpy as np
import pytest

import refimpl
from refimpl.ops.recurrence.long_conv import error_bound

pytest.importorskip("cupy", reason="not run: refimpl.gpu needs cupy, even without a device")
launch = pytest.importorskip("refimpl.gpu.launch")

FILE, SIZES = "kernel_long_conv_rows.cu", (2, 3, 4)  # transforms of 2^(10+r) complex points
PREPARED = "extern __shared__ float4 memory[];"
MISSING = """
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline void sincospif(float x, float* sine, float* cosine) { *sine = std::sin(M_PI * x), *cosine = std::cos(M_PI * x); }
"""


class OnHost:
    """Both kernels for these sizes."""

    def __init__(self, build, folder, mistake=("", ""), sizes=SIZES):
        code = {part: (launch.FOLDER / part).read_text(encoding="utf-8") for part in (FILE, "block_fft_wide.cuh")}
        assert code[FILE].count(PREPARED) == 2 and any(mistake[0] in text for text in code.values())
        for part, text in code.items():
            text = text.replace(*mistake).replace(PREPARED, "float4* const memory = reinterpret_cast<float4*>(::memory);")
            (folder / part).write_text(text, encoding="utf-8")
        calls = "".join(
            f'extern "C" void {name}_{r}(unsigned blocks, unsigned shared, unsigned lag, void** a)'
            f" {{ host::uneven = lag; host::launch(&long_conv_{name}<{r}>, blocks, 1, {32 << r}, shared, a); }}\n"
            for r in sizes
            for name in ("kernels", "rows")
        )
        (folder / "rows.cpp").write_text(f'#include "cuda_on_host.h"\n{MISSING}#include "{FILE}"\n{calls}', encoding="utf-8")
        self.library = build(folder / "rows.cpp")

    def __call__(self, u, kernel, skip, r, blocks, lag=0):
        """Rows (batch, channels, T) by kernels (channels, K)."""
        (B, C, T), K, threads = u.shape, kernel.shape[-1], 32 << r
        kept, y = np.full((C, 16 * threads, 4), np.nan, np.float32), np.full(u.shape, np.nan, np.float32)
        rows = u, *(np.int64(u.strides[i] // 4) for i in (0, 1)), y, kept, skip, np.int64(B), np.int64(C), np.int32(T)
        self._call(f"kernels_{r}", C, 256 * threads, lag, (kernel, np.int64(K), kept, np.int32(K)))
        self._call(f"rows_{r}", blocks, (256 + 128 + 8 * (3 + (16 >> r))) * threads, lag, rows)
        return y

    def _call(self, name, blocks, shared, lag, arguments):
        pointed = [np.array([0 if a is None else a.ctypes.data], np.uint64) if a is None or a.ndim else a.reshape(1) for a in arguments]
        getattr(self.library, name)(blocks, shared, lag, (ctypes.c_void_p * len(pointed))(*(a.ctypes.data for a in pointed)))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory, host_library):
    return OnHost(host_library, tmp_path_factory.mktemp("long_conv"))


def draw(B, C, T, K):
    rng = np.random.default_rng(T)
    return (x.astype(np.float32) for x in (rng.standard_normal((B, C, T)), rng.standard_normal((C, K)), rng.standard_normal(C)))


def exact(u, kernel, skip):
    """Result and bound, time last."""
    call = {"u": u.swapaxes(1, 2), "kernel": kernel.T} | ({} if skip is None else {"skip": skip})
    call = {name: x.astype(np.float64) for name, x in call.items()}
    y = refimpl.OPS["long_conv"].forms["fft"].function(**call)
    return y.swapaxes(1, 2), error_bound(**call, unit=2.0**-24).swapaxes(1, 2)


@pytest.mark.parametrize("r", SIZES)
@pytest.mark.parametrize("shorter", [0, 1, 2, 500])  # rows that begin at addresses of 16, 4 and 8 bytes
def test_rows(kernels, r, shorter):
    T = (1024 << r) - shorter
    u, kernel, skip = draw(2, 3, T, T if shorter < 2 else T // 3)
    skip = None if shorter == 500 else skip
    y = kernels(u, kernel, skip, r, blocks=3)
    want, bound = exact(u, kernel, skip)
    assert np.all(abs(y - want) <= bound)
    for lag in (1, 2):
        np.testing.assert_array_equal(kernels(u, kernel, skip, r, blocks=2, lag=lag), y)


def test_nothing_of_one_row_reaches_another(kernels):
    u, kernel, skip = draw(3, 1, 3000, 3000)
    u[1] = 0
    assert not kernels(u, kernel, skip, 2, blocks=1)[1].any()


@pytest.mark.parametrize(
    "mistake",
    [
        ("__syncwarp();  // all lanes have read", ""),
        ("        __syncwarp();\n        F::inverse", "        F::inverse"),
        ("wait_for_copies<1>();\n            __syncwarp();", "wait_for_copies<1>();"),
        ("if (b >= batch) b -= batch, ++c;", ""),
        ("self ? of_512.x : mirrored.x", "mirrored.x"),
    ],
)
def test_mistakes_are_found(tmp_path, host_library, mistake):
    u, kernel, skip = draw(2, 3, 4000, 4000)
    wrong = OnHost(host_library, tmp_path, mistake, sizes=(2,))
    want, bound = exact(u, kernel, skip)
    seen = (wrong(u, kernel, skip, 2, blocks=blocks, lag=lag) for lag in (0, 1, 2, 3, 4) for blocks in (3, 4))
    assert any(not np.all(abs(y - want) <= bound) for y in seen)
