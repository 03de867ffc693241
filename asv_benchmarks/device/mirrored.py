"""The operators that are mirrored without tuned kernels: timed beside CPU forms of this package. python mirrored.py results.json"""

import os
import sys
import time

import cupy as cp
import numpy as np
import refimpl.gpu
from measure import Results, floor_ms, median_ms

import refimpl

RNG = cp.random.default_rng(7)


def normal(*shape, dtype=cp.float32, scale=1.0):
    return (scale * RNG.standard_normal(shape, dtype=cp.float32)).astype(dtype)


def uniform(low, high, *shape, dtype=cp.float32):
    return (low + (high - low) * RNG.random(shape, dtype=cp.float32)).astype(dtype)


def on_cpu(op: str, form: str, call: dict, share: float) -> float:
    """Milliseconds of a form of this package on the host, of a part of the work, scaled up."""
    call = {n: x.astype(cp.float32).get() if isinstance(x, cp.ndarray) else x for n, x in call.items()}
    f = refimpl.OPS[op].forms[form].function
    f(**call)
    start = time.perf_counter()
    f(**call)
    return (time.perf_counter() - start) * 1e3 / share


def row(results, op, work, shape, floor, call, *, peer=None, cpu=None, gradient=True, dy=None):
    """Time one operator and its gradient; `cpu` is (form, small call, its share of the work)."""
    f, options = getattr(refimpl.gpu, op), {n: v for n, v in call.items() if not isinstance(v, cp.ndarray)}
    arrays = {n: v for n, v in call.items() if isinstance(v, cp.ndarray)}
    try:
        y = f(**arrays, **options)
        y = y[0] if isinstance(y, tuple) else y
        assert bool(cp.isfinite(y.astype(cp.float32)).all()), "not finite"
        times = {"refimpl": median_ms(lambda: f(**arrays, **options), [()], 7, 2)}
        if cpu is not None:
            times[f"CPU {cpu[0]}"] = on_cpu(op, cpu[0], cpu[1] | options, cpu[2])
        results.add(op, work, shape, floor, times, **({"peer": peer} if peer else {}))
        if gradient:
            vjp = getattr(refimpl.gpu, f"{op}_vjp")
            results.add(op, f"{work}, gradient", shape, 2.2 * floor, {"refimpl": median_ms(lambda: vjp(y, **arrays, **options), [()], 3, 1)})
    except Exception as trouble:
        print(f"{op} {work}: {type(trouble).__name__}: {trouble}"[:1500], flush=True)
    cp.get_default_memory_pool().free_all_blocks()


def ssd(results, dtype=cp.float16):
    B, H, T, p, n = 8, 32, 8192, 64, 128
    call = {
        "x": normal(B, H, T, p, dtype=dtype), "dt": uniform(0.001, 0.1, B, H, T, dtype=dtype), "A": -uniform(1, 16, H, dtype=dtype),
        "B": normal(B, 1, T, n, dtype=dtype), "C": normal(B, 1, T, n, dtype=dtype), "D": normal(H, dtype=dtype),
    }  # fmt: skip
    small = {"x": call["x"][:1, :8], "dt": call["dt"][:1, :8], "A": call["A"][:8], "B": call["B"][:1], "C": call["C"][:1], "D": call["D"][:8]}
    row(results, "ssd", "fp16", "B8 T8192 H32 p64 N128", 0.18, call, peer="mamba_ssm 1.43, gradient 4.56", cpu=("chunked", small, 1 / 32))


def mlstm(results, dtype=cp.float16):
    B, H, T, d, e = 8, 8, 4096, 128, 256
    call = {
        "q": normal(B, H, T, d, dtype=dtype), "k": normal(B, H, T, d, dtype=dtype), "v": normal(B, H, T, e, dtype=dtype),
        "i": normal(B, H, T, dtype=dtype), "f": 3 + normal(B, H, T, dtype=dtype),
    }  # fmt: skip
    small = {n: x[:1, :4] for n, x in call.items()}
    row(results, "mlstm", "fp16", "B8 H8 T4096 d128 e256", 0.13, call, peer="mlstm_kernels 1.14, gradient 2.65", cpu=("chunkwise", small, 1 / 16))


def linear_attention(results, dtype=cp.float16):
    B, H, T, d = 8, 16, 4096, 128
    q, v = normal(B, H, T, d, dtype=dtype), normal(B, H, T, d, dtype=dtype)
    k = normal(B, H, T, d, dtype=dtype, scale=d**-0.5)
    kinds = {
        "retention": {"decay": -uniform(0.001, 0.05, B, H, T, dtype=dtype)},
        "gated, per channel": {"decay": -uniform(0.001, 0.1, B, H, T, d, dtype=dtype)},
        "gated delta rule": {"decay": -uniform(0.001, 0.05, B, H, T, dtype=dtype), "beta": uniform(0, 1, B, H, T, dtype=dtype)},
    }
    peers = {"retention": "fla 0.704", "gated, per channel": "fla 1.585", "gated delta rule": None}
    for name, more in kinds.items():
        call = {"q": q, "k": k, "v": v, **more}
        small = {n: x[:1, :4] for n, x in call.items()}
        cpu = ("chunkwise", small, 1 / 32) if name != "gated, per channel" else None
        row(results, "linear_attention", f"{name}, fp16", "B8 T4096 H16 d128 e128", 0.18, call, peer=peers[name], cpu=cpu)


def wkv(results):
    B, T, C = 8, 4096, 2048
    call = {"k": normal(B, T, C), "v": normal(B, T, C), "w": uniform(0.01, 1, C), "u": normal(C)}
    small = {"k": call["k"][:1], "v": call["v"][:1], "w": call["w"], "u": call["u"]}
    row(results, "wkv", "fp32", "B8 T4096 C2048", floor_ms(bytes=12 * B * T * C), call, cpu=("recurrent", small, 1 / 8))
    B, H, T, d = 8, 32, 4096, 64
    r, k, v, w = normal(B, H, T, d), normal(B, H, T, d), normal(B, H, T, d), -uniform(0.01, 0.5, B, H, T, d)
    floor = floor_ms(bytes=20 * B * H * T * d)
    small = {"r": r[:1, :4], "k": k[:1, :4], "v": v[:1, :4], "w": w[:1, :4], "u": normal(4, d)}
    row(results, "wkv6", "fp32", "B8 T4096 H32 d64", floor, {"r": r, "k": k, "v": v, "w": w, "u": normal(H, d)}, cpu=("recurrent", small, 1 / 64))
    key = k / cp.linalg.norm(k, axis=-1, keepdims=True)
    call = {"r": r, "w": w, "k": key, "v": v, "a": -key, "b": key * uniform(0, 1, B, H, T, d)}
    small = {n: x[:1, :4] for n, x in call.items()}
    row(results, "wkv7", "fp32", "B8 T4096 H32 d64", floor, call, cpu=("recurrent", small, 1 / 64))


def slstm(results):
    for B, H, T, d in ((8, 4, 2048, 64), (8, 4, 2048, 192)):
        gates = {n: normal(B, H, T, d) for n in "zifo"}
        call = gates | {"R": normal(4, H, d, d, scale=0.3 * d**-0.5), "bias": normal(4, H, d)}
        small = {n: x[:, :, : T // 8] if n in "zifo" else x for n, x in call.items()}
        row(results, "slstm", "fp32", f"B{B} H{H} T{T} d{d}", floor_ms(bytes=20 * B * H * T * d), call, cpu=("stabilized", small, 1 / 8))


def moe(results):
    T, d, E, f = 4096, 1024, 8, 2048
    call = {"x": normal(T, d), "router": normal(d, E, scale=d**-0.5), "w_in": normal(E, d, f, scale=d**-0.5)}
    call |= {"w_gate": normal(E, d, f, scale=d**-0.5), "w_out": normal(E, f, d, scale=f**-0.5), "k": 2}
    floor = floor_ms(fp32=2 * T * 6 * d * f)
    small = {n: x[:512] if n == "x" else x for n, x in call.items()}
    row(results, "moe", "fp32", "4096 tokens d1024 f2048 E8 k2", floor, call, cpu=("gathered", small, 1 / 8))
    T, d, E, f = 16384, 4096, 8, 14336
    call = {"x": normal(T, d, dtype=cp.float16), "router": normal(d, E, scale=d**-0.5, dtype=cp.float16)}
    for name, shape in (("w_in", (E, d, f)), ("w_gate", (E, d, f)), ("w_out", (E, f, d))):
        call[name] = cp.stack([normal(*shape[1:], scale=shape[1] ** -0.5, dtype=cp.float16) for _ in range(E)])
    row(results, "moe", "fp16, Mixtral", "16384 tokens d4096 f14336 E8 k2", 16.5, call | {"k": 2}, peer="torch grouped_mm 20.4 (bf16)", gradient=False)


def main(path: str, only: list[str]) -> None:
    results = Results()
    print("cores", os.cpu_count(), flush=True)
    for part in (slstm, wkv, ssd, mlstm, linear_attention, moe):
        if only and part.__name__ not in only:
            continue
        start = time.time()
        try:
            part(results)
        except Exception as trouble:
            print(f"{part.__name__}: {type(trouble).__name__}: {trouble}"[:1500], flush=True)
        cp.get_default_memory_pool().free_all_blocks()
        results.write(path)
        print(f"{part.__name__}: {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    np.seterr(all="ignore")
    main(sys.argv[1], sys.argv[2:])
