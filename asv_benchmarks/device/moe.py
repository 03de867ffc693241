"""Mixtures of experts on a device: correct first, then times, whole and by part, beside torch's grouped_mm: python moe.py RESULTS.json [PART ...]"""

import sys
import time
import traceback

import cupy as cp
import numpy as np
import torch
from measure import Results, floor_ms, hold_back, median_ms
from refimpl.gpu import grouped
from refimpl.gpu.experts.moe import _Call, moe, moe_vjp

START = time.time()
MIXTRAL = {"T": 16384, "d": 4096, "f": 14336, "E": 8}


def draw(T, d, f, E, kind=torch.bfloat16, gate=True, lean=0.0):
    """A call on the device; `lean` sends more tokens to the first experts, and none to the last."""
    torch.manual_seed(T + d)
    router = torch.randn(d, E, device="cuda") * d**-0.5
    x = torch.randn(T, d, device="cuda")
    if lean:
        x[:, 0], router[0] = 1.0, -lean * torch.arange(E, device="cuda")
        router[0, -1] = -50
    shapes = {"w_in": (E, d, f), "w_out": (E, f, d)} | ({"w_gate": (E, d, f)} if gate else {})
    call = {"x": x.to(kind), "router": router.to(kind)}
    for name, shape in shapes.items():
        call[name] = torch.stack([torch.randn(*shape[1:], device="cuda", dtype=kind) * shape[1] ** -0.5 for _ in range(E)])
    return {name: cp.from_dlpack(v) for name, v in call.items()} | {"k": 2}


def wide(x):
    return x.astype(cp.float32)


def apart(got, want):
    """The largest difference in units of the root mean square of what is wanted."""
    got, want = wide(got), wide(want)
    scale = float(cp.sqrt((want**2).mean())) + 1e-30
    return float(abs(got - want).max()) / scale if bool(cp.isfinite(got).all()) else float("nan")


def check_products():
    """Every form of the kernel against float32, with either kind of pair."""
    E, d, f = 5, 200, 392
    x = cp.random.standard_normal((3000, d), dtype=cp.float32)
    choice = cp.asarray(np.random.default_rng(0).choice([0, 0, 0, 1, 3], (1, 3000, 1)))
    w = {n: cp.random.standard_normal(s, dtype=cp.float32) / 14 for n, s in {"in": (E, d, f), "gate": (E, d, f), "out": (E, f, d)}.items()}
    for kind in ("bfloat16", "float16"):
        half = cp.from_dlpack(torch.zeros(1, dtype=getattr(torch, kind), device="cuda")).dtype
        xs, ws = x.astype(half), {n: v.astype(half) for n, v in w.items()}
        for size in (256, 128):
            groups, _ = grouped.Groups.of(choice, E, None, True)
            blocks = -(-3000 // size) + E
            counts, starts = groups.counts.get(), 0
            slots, where = np.full(blocks * size, -1), []
            by_group = np.argsort(choice.get().ravel(), kind="stable")
            for n in counts:
                slots[starts : starts + n] = by_group[sum(len(v) for v in where) :][:n]
                where.append(range(starts, starts + n))
                starts += -(-n // size) * size
            groups = groups._replace(size=size, pair_of=cp.asarray(slots))
            for shared in ("WEIGHTS", "ROWS") if size == 256 else ("ROWS", "NOTHING"):
                rows = groups.take(xs)
                errors = {}
                gated = groups._hopper("GATED", (rows,), (ws["in"], ws["gate"]), f, "silu", shared)
                plain = groups._hopper("PLAIN", (rows,), (ws["in"],), f, "none", shared)
                turned = groups._hopper("TRANSPOSED", (rows, rows), (ws["out"], ws["out"]), f, "none", shared)
                outer = groups._hopper("OUTER", (rows,), (rows[:, :104].copy(),), 104, "none", shared)
                for g, at in enumerate(where):
                    at = cp.asarray(list(at), dtype=np.int64)
                    r = wide(rows[at])
                    a, b = r @ wide(ws["in"][g]), r @ wide(ws["gate"][g])
                    pairs = {"outer": (outer[g], r.T @ r[:, :104])}
                    if len(at):
                        pairs |= {
                            "gated": (gated[at], b / (1 + cp.exp(-b)) * a),
                            "plain": (plain[at], a),
                            "turned": (turned[at], 2 * r @ wide(ws["out"][g]).T),
                        }
                    for name, (got, want) in pairs.items():
                        errors[name] = max(errors.get(name, 0), apart(got, want) if float(abs(want).max()) else float(abs(wide(got)).max()))
                print("products", kind, size, shared, {n: f"{v:.1e}" for n, v in errors.items()}, flush=True)


def plainly(function, *args, **kwargs):
    """The same without Hopper's kernel."""
    was = grouped.capability
    grouped.capability = lambda: "80"
    try:
        return function(*args, **kwargs)
    finally:
        grouped.capability = was


def check_whole():
    """Against cuBLAS, the halves widened: uneven experts, one without tokens, a capacity."""
    for sizes, options in (
        ({"T": 4096, "d": 1024, "f": 2048, "E": 8}, {}),
        ({"T": 3000, "d": 1032, "f": 520, "E": 7, "lean": 0.7}, {"capacity": 700}),
        ({"T": 37, "d": 512, "f": 264, "E": 16, "lean": 0.3}, {"activation": "gelu", "order": "softmax_topk"}),
        ({"T": 9000, "d": 256, "f": 640, "E": 4, "gate": False, "lean": 1.0, "kind": torch.float16}, {"activation": "relu"}),
    ):
        call = draw(**sizes) | options
        want = plainly(moe, **{n: wide(v) if isinstance(v, cp.ndarray) else v for n, v in call.items()})
        got, again = moe(**call), moe(**call)
        dy = cp.from_dlpack(torch.randn(*got.shape, device="cuda").to(torch.bfloat16 if got.dtype.name == "bfloat16" else torch.float16))
        g_want, g = plainly(moe_vjp, dy, **call), moe_vjp(dy, **call)
        same = bool((got.view(cp.uint16) == again.view(cp.uint16)).all())
        print("whole", sizes, options, f"{apart(got, want):.1e}", "the same again" if same else "NOT THE SAME AGAIN",
              {n: f"{apart(g[n], v):.1e}" for n, v in g_want.items() if v is not None}, flush=True)  # fmt: skip


def check_some_tokens(call, count=48):
    """Rows of a large result, in float32 from the experts that were chosen."""
    made = _Call(call["x"], call["router"], call["w_in"], call["k"], "topk_softmax", False, None)
    some = cp.asarray(np.random.default_rng(0).choice(len(call["x"]), count, replace=False))
    x, want = wide(call["x"][some]), cp.zeros((count, call["x"].shape[1]), cp.float32)
    for e in range(len(call["w_in"])):
        a, g = (x @ wide(call[name][e]) for name in ("w_in", "w_gate"))
        weight = cp.where(made.experts[some] == e, made.weights[some], cp.float32(0)).sum(axis=-1)
        want += weight[:, None] * (g / (1 + cp.exp(-g)) * a @ wide(call["w_out"][e]))
    error = apart(moe(**call)[some], want)
    print(f"some tokens of {call['x'].shape}: {error:.1e}", flush=True)
    return error


def peer(call):
    """torch's grouped_mm on rows that are sorted already: three products and the activation."""
    x, w_in, w_gate, w_out = (torch.from_dlpack(call[n]) for n in ("x", "w_in", "w_gate", "w_out"))
    logits = x @ torch.from_dlpack(call["router"])
    experts = logits.topk(2, dim=-1).indices.reshape(-1)
    order = torch.argsort(experts, stable=True)
    ends = torch.cumsum(torch.bincount(experts, minlength=w_in.shape[0]), 0).to(torch.int32)
    rows = x[order // 2]

    def run():
        h = torch.nn.functional.silu(torch._grouped_mm(rows, w_gate, offs=ends)) * torch._grouped_mm(rows, w_in, offs=ends)
        return torch._grouped_mm(h, w_out, offs=ends)

    def products():
        torch._grouped_mm(rows, w_gate, offs=ends)
        h = torch._grouped_mm(rows, w_in, offs=ends)
        return torch._grouped_mm(h, w_out, offs=ends)

    def whole():
        l = (x @ torch.from_dlpack(call["router"])).float()
        values, e = l.topk(2, dim=-1)
        weights = values.softmax(-1)
        e = e.reshape(-1)
        o = torch.argsort(e, stable=True)
        end = torch.cumsum(torch.bincount(e, minlength=w_in.shape[0]), 0).to(torch.int32)
        r = x[o // 2]
        h = torch.nn.functional.silu(torch._grouped_mm(r, w_gate, offs=end)) * torch._grouped_mm(r, w_in, offs=end)
        y = torch._grouped_mm(h, w_out, offs=end)
        back = torch.empty_like(y)
        back[o] = y
        return (back.view(*values.shape, -1) * weights[..., None]).sum(1).to(x.dtype)

    return run, products, whole


def on_torch(function, repeat=10):
    """Median time of torch's work, on torch's current stream."""
    times = []
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    for _ in range(repeat):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return float(np.median(times))


def times(results, variants, gradient):
    T, d, f, E = (MIXTRAL[n] for n in ("T", "d", "f", "E"))
    call = draw(**MIXTRAL)
    flops = 2 * T * 2 * 3 * d * f
    ours, again = (median_ms(lambda: moe(**call), [()], repeat=10, warm_up=3) for _ in range(2))
    found = {"ours": ours, "again": again}
    print(found, flush=True)
    error = check_some_tokens(call)
    try:
        run, products, whole = peer(call)
        found |= {"torch products": on_torch(products), "torch products and activation": on_torch(run), "torch whole": on_torch(whole)}
        print(found, flush=True)
    except Exception:
        traceback.print_exc()
    torch.cuda.empty_cache()
    made = _Call(call["x"], call["router"], call["w_in"], 2, "topk_softmax", False, None)
    groups = made.groups
    rows = groups.take(made.x)
    h = groups.hidden(rows, call["w_in"], call["w_gate"], "silu")
    y = groups.product(h, call["w_out"])
    parts = {
        "logits": lambda: grouped.product_of_halves(made.x, call["router"]),
        "who goes where, with logits": lambda: _Call(call["x"], call["router"], call["w_in"], 2, "topk_softmax", False, None),
        "rows there": lambda: groups.take(made.x),
        "hidden": lambda: groups.hidden(rows, call["w_in"], call["w_gate"], "silu"),
        "second product": lambda: groups.product(h, call["w_out"]),
        "rows back": lambda: groups.back(y, made.weights),
    }
    parts = {name: median_ms(run, [()], repeat=8, warm_up=2) for name, run in parts.items()}
    found |= {"part: " + n: v for n, v in parts.items()}
    results.add("moe", "bf16, Mixtral", "16384 tokens d4096 f14336 E8 k2", floor_ms(bf16=flops), found, error=error)
    if variants:
        for shared in ("WEIGHTS", "ROWS", "NOTHING"):
            for band in (1024, 2048, 4096):
                first = lambda: groups._hopper("GATED", (rows,), (call["w_in"], call["w_gate"]), f, "silu", shared, band)  # noqa: B023
                second = lambda: groups._hopper("PLAIN", (h,), (call["w_out"],), d, "none", shared, band)  # noqa: B023
                try:
                    a, b = (median_ms(v, [()], repeat=6, warm_up=1) for v in (first, second))
                    print(
                        f"variant {shared} band {band}: hidden {a:.2f} ms ({flops / 1.5 / a / 1e9:.0f} TF/s), second {b:.2f} ms ({flops / 3 / b / 1e9:.0f} TF/s)",
                        flush=True,
                    )
                except Exception as error:
                    print(shared, band, error, flush=True)
    if gradient:
        dy = cp.from_dlpack(torch.randn(T, d, device="cuda").to(torch.bfloat16))
        ms = median_ms(lambda: moe_vjp(dy, **call), [()], repeat=4, warm_up=1)
        dys, a, g = groups.take(dy), groups.product(rows, call["w_in"]), groups.product(rows, call["w_gate"])
        dh = groups.product_transposed(dys, call["w_out"])
        parts = {
            "x w_in": lambda: groups.product(rows, call["w_in"]),
            "dy w_out'": lambda: groups.product_transposed(dys, call["w_out"]),
            "dw_in": lambda: groups.outer(rows, a),
            "dw_out": lambda: groups.outer(h, dys),
            "drows": lambda: groups.product_transposed(a, call["w_in"], g, call["w_gate"]),
            "activations": lambda: groups.activate_backwards(a, g, dh, made.weights, "silu"),  # last: it writes to its inputs
        }
        parts = {"part: " + name: median_ms(run, [()], repeat=4, warm_up=1) for name, run in parts.items()}
        results.add("moe", "bf16, Mixtral, gradient", "16384 tokens d4096 f14336 E8 k2", floor_ms(bf16=8 / 3 * flops), {"ours": ms} | parts)


def others(results):
    """Halves of 10 bits at the same size; float32, without tensor cores."""
    work = "16384 tokens d4096 f14336 E8 k2"
    call = draw(**MIXTRAL, kind=torch.float16)
    flops = 2 * MIXTRAL["T"] * 2 * 3 * MIXTRAL["d"] * MIXTRAL["f"]
    found = {"ours": median_ms(lambda: moe(**call), [()], repeat=10, warm_up=3)}
    found["without Hopper's kernel"] = median_ms(lambda: plainly(moe, **call), [()], repeat=5, warm_up=2)
    results.add("moe", "fp16, Mixtral", work, floor_ms(bf16=flops), found)
    del call
    cp.get_default_memory_pool().free_all_blocks()
    torch.cuda.empty_cache()
    sizes = {"T": 4096, "d": 1024, "f": 2048, "E": 8}
    call = draw(**sizes, kind=torch.float32)
    dy = cp.from_dlpack(torch.randn(sizes["T"], sizes["d"], device="cuda"))
    flops = 2 * sizes["T"] * 2 * 3 * sizes["d"] * sizes["f"]
    for name, run, units in (("fp32", lambda: moe(**call), 3), ("fp32, gradient", lambda: moe_vjp(dy, **call), 8)):
        results.add(
            "moe",
            name,
            "4096 tokens d1024 f2048 E8 k2",
            floor_ms(fp32=flops * units / 3),
            {"ours": median_ms(run, [()], repeat=10, warm_up=3)},
        )
    call = draw(T=64, d=4096, f=14336, E=8)
    moved = 3 * call["w_in"].nbytes
    results.add(
        "moe",
        "bf16, Mixtral, few tokens",
        "64 tokens d4096 f14336 E8 k2",
        floor_ms(bytes=moved),
        {"ours": median_ms(lambda: moe(**call), [()], repeat=10, warm_up=3)},
    )


def main(path, *only):
    results = Results()
    hold_back()
    parts = {
        "products": check_products,
        "whole": check_whole,
        "times": lambda: times(results, "variants" in only, "gradient" in only),
        "others": lambda: others(results),
    }
    for name, part in parts.items():
        if only and name not in only:
            continue
        try:
            part()
        except Exception:
            traceback.print_exc()
        print(f"-- {name}: {time.time() - START:.0f} s", flush=True)
    results.write(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
