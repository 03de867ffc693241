"""Long convolution on the device: checked against the definition, then timed beside torch.fft. python long_conv.py results.json"""

import contextlib
import importlib
import sys

import cupy as cp
import numpy as np
import refimpl.gpu
from measure import Results, floor_ms, median_ms


def error(y, u, kernel, skip, channels=(0, 1)) -> float:
    """|y - exact| over ‖u‖ ‖kernel‖, of a few channels, by transforms in float64."""
    worst = 0.0
    T = u.shape[-2]
    for c in (*channels, u.shape[-1] - 1):
        a, k = u[..., c].astype(cp.float64), kernel[:, c].astype(cp.float64)
        exact = cp.fft.irfft(cp.fft.rfft(a, 2 * T) * cp.fft.rfft(k, 2 * T), 2 * T)[..., :T] + float(skip[c]) * a
        norm = cp.linalg.norm(a, axis=-1).max() * cp.linalg.norm(k)
        worst = max(worst, float(abs(y[..., c] - exact).max() / norm))
    return worst


@contextlib.contextmanager
def shorter_transforms(log: int):
    """The same with transforms of 2^log points at most."""
    module = importlib.import_module("refimpl.gpu.recurrence.long_conv")
    longest, module.LONGEST = module.LONGEST, log
    yield
    module.LONGEST = longest


def torch_form(u, kernel, skip):
    """What people write with torch: padded real transforms along a contiguous time axis."""
    import torch

    T = u.shape[-1]
    y = torch.fft.irfft(torch.fft.rfft(u, 2 * T) * torch.fft.rfft(kernel, 2 * T), 2 * T)[..., :T]
    return y + skip[:, None] * u


def run(results: Results, B: int, C: int, T: int, target: float) -> None:
    rng = cp.random.default_rng(1)
    sets = []
    for _ in range(3):
        u = rng.standard_normal((B, C, T), dtype=cp.float32)
        kernel = rng.standard_normal((C, T), dtype=cp.float32) * cp.exp(-cp.arange(T, dtype=cp.float32) / (T / 8))
        sets.append((u, kernel, rng.standard_normal(C, dtype=cp.float32)))
    time_last = [(u.swapaxes(1, 2), k.T, s) for u, k, s in sets]  # (B, T, C), time contiguous
    channel_last = [(cp.ascontiguousarray(u), cp.ascontiguousarray(k), s) for u, k, s in time_last]
    shape, floor = f"B{B} C{C} T{T}", floor_ms(bytes=8 * B * C * T)
    gpu = refimpl.gpu.long_conv
    for name, calls in (("time contiguous", time_last), ("channels contiguous", channel_last)):
        u, k, s = calls[0]
        off = error(gpu(u, k, s), u, k, s)
        times = {"refimpl": median_ms(gpu, calls, 20), "refimpl again": median_ms(gpu, calls, 20)}
        if T > 4096:
            half = (T - 1).bit_length() - 1
            with shorter_transforms(min(13, half)):
                times[f"in segments of {2 ** min(13, half)}"] = median_ms(gpu, calls, 20)
                off = max(off, error(gpu(u, k, s), u, k, s))
        results.add("long_conv", f"forward, fp32, {name}", shape, floor, times, error=off, target=target)
        times = {"refimpl": median_ms(refimpl.gpu.long_conv_vjp, [(u, u, k, s) for u, k, s in calls], 10, 3)}
        results.add("long_conv", f"gradient, fp32, {name}", shape, 1.5 * floor, times)  # u and dy read, du written
        cp.get_default_memory_pool().free_all_blocks()
    try:
        import torch

        tensors = [tuple(torch.from_dlpack(x) for x in call) for call in sets]
        with torch.no_grad():
            results.add("long_conv", "forward, fp32, peer", shape, floor, {"torch.fft": median_ms(torch_form, tensors, 10)})
        del tensors
        torch.cuda.empty_cache()
    except Exception as trouble:
        print("torch.fft:", trouble, flush=True)
    halves = [tuple(x.astype(cp.float16) for x in call) for call in channel_last]
    results.add("long_conv", "forward, fp16, channels contiguous", shape, floor / 2, {"refimpl": median_ms(gpu, halves, 20)})


def main(path: str) -> None:
    results = Results()
    for B, C, T, target in ((8, 768, 8192, 0.7), (8, 768, 32768, 3.0), (8, 768, 1024, np.nan)):
        try:
            run(results, B, C, T, target)
        except Exception as trouble:
            print(f"B{B} C{C} T{T}: {type(trouble).__name__}: {trouble}"[:2000], flush=True)
        cp.get_default_memory_pool().free_all_blocks()
        results.write(path)


if __name__ == "__main__":
    main(sys.argv[1])
