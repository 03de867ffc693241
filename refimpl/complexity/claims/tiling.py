"""Tiling and rings: what FlashAttention and ring attention change, and what they leave."""

import numpy as np

from refimpl.complexity.claims.record import Case, Claim, claim
from refimpl.complexity.claims.tools import A100, KIB, MIB, counted, form, lengths, qkv, slope
from refimpl.complexity.scale import MACHINES, ring_times
from refimpl.ops.attention.attention import attention, attention_tiled_vjp, attention_vjp
from refimpl.ops.attention.ring_attention import ring_schedule

CLAIMS: list[Claim] = []


@claim(
    "fa-exact",
    "FlashAttention is exact, and recomputes the map in the backward pass.",
    sources=("D3", "dao2022, theorem 1"),
    check="tiled against dense, results and gradients",
    forward=1,
    backward=1,
)
def fa_exact(case: Case) -> None:
    call = qkv(160, 16, heads=2)
    error = case.equal(
        "forward", "attention", form("attention", "tiled")(**call, block_q=32, block_k=48), attention(**call), call, "tiled against dense"
    )
    dy = np.random.default_rng(1).standard_normal(call["q"].shape)
    dense, tiled = attention_vjp(dy, **call), attention_tiled_vjp(dy, **call, block_q=32, block_k=48)
    worst = max(float(abs(dense[name] - tiled[name]).max() / abs(dense[name]).max()) for name in "qkv")
    case.number("gradients", worst, "largest relative difference of a gradient that is recomputed from lse")
    case.number("backward", worst / (160 * 2.0**-53 * 8), "the same, in units of 8 n roundoffs")
    case.compare("backward", "<=")
    case.states(f"Equal to rounding: {error:.0e} forward, {worst:.0e} backward, from lse alone.")


@claim(
    "fa-concat",
    "The outputs of the blocks of K and V are concatenated.",
    sources=("D3",),
    check="four blocks put together without and with rescaling",
    plain=1,
)
def fa_concat(case: Case) -> None:
    call = qkv(64, 16)
    parts = [attention(call["q"], call["k"][:, i : i + 16], call["v"][:, i : i + 16]) for i in range(0, 64, 16)]
    right = attention(**call)
    case.equal("plain", "attention", np.mean(parts, axis=0), right, call, "blocks of K and V, outputs averaged as they are")
    wrong = case.numbers["plain_error"].value
    good = case.number(
        "rescaled", abs(form("attention", "split_kv")(**call, splits=4) - right).max(), "blocks of K and V, outputs weighted by their sums"
    )
    rows = [attention(call["q"][:, i : i + 16], call["k"], call["v"]) for i in range(0, 64, 16)]
    queries = case.number("queries", abs(np.concatenate(rows, axis=-2) - right).max(), "blocks of Q, outputs concatenated")
    case.states(
        f"Outputs of key blocks are rescaled by running maximum and sum and added ({good:.0e}); without, the error is {wrong:.2f}. "
        f"Only blocks of Q are concatenated ({queries:.0e})."
    )


@claim(
    "fa-n2",
    "FlashAttention's work stays quadratic.",
    sources=("D2", "dao2022, theorem 1"),
    check="growth of the tiled form's work",
    exponent=2,
)
def fa_n2(case: Case) -> None:
    run = counted("attention", "tiled")
    work = case.number("exponent", run.work.power, "growth of the work, counted")
    case.number("dense", counted("attention", "dense").work.power, "growth of the dense form's")
    peak = case.number("memory", run.peak.power, "growth of the memory, counted")
    case.compare("exponent", within=0)
    case.curves(
        "tokens",
        "tiled attention, one head of 4, counted",
        operations=(list(run.counts), [c.work for c in run.counts.values()]),
        bytes_alive=(list(run.counts), [c.peak for c in run.counts.values()]),
    )
    case.states(
        f"The two products alone take 4 n² d operations (exponent {work:.0f}); what becomes linear is the memory (exponent {peak:.0f})."
    )


def traffic(n: int, d: int, memory: float) -> tuple[float, float]:
    """Elements to and from the large memory: dense (every map written and read twice), tiled with `memory` elements near."""
    dense = 4 * n * d + 4 * n * n
    passes = np.ceil(n / np.ceil(memory / (4 * d)))
    return dense, 2 * n * d + passes * 3 * n * d


@claim(
    "fa-io",
    "FlashAttention makes fewer trips to the large memory.",
    sources=("D2", "D3", "dao2022, theorem 2"),
    check="elements moved, n = 8,192, 100 KB near",
    narrow=1,
    middle=1,
    wide=1,
)
def fa_io(case: Case) -> None:
    near = 100 * KIB / 2
    gains = {d: float(np.divide(*traffic(8192, d, near))) for d in (64, 128, 256)}
    for key, d in (("narrow", 64), ("middle", 128), ("wide", 256)):
        case.number(key, gains[d], f"dense over tiled traffic at d = {d}", "×")
    case.compare("narrow", ">")
    case.compare("wide", ">")
    for key in ("narrow", "middle"):
        case.compare(key, ">", given="d² is small beside the near memory (d up to 128 at 100 KB)")
    widths = (16, 32, 64, 128, 256, 512)
    case.curves(
        "head size",
        "elements moved at 8,192 tokens",
        dense=(widths, [traffic(8192, d, near)[0] for d in widths]),
        tiled=(widths, [traffic(8192, d, near)[1] for d in widths]),
    )
    case.states(
        f"O(n² d² / M) against O(n² + n d): {gains[64]:.2f} times fewer at d = 64, {gains[128]:.2f} at 128, {1 / gains[256]:.1f} times "
        f"more at 256 (n = 8,192, M = 100 KB)."
    )


@claim(
    "fa-speed",
    "FlashAttention trains BERT 15 % faster at 512, GPT-2 three times at 1K, long-range arena 2.4 times; 2 to 4 times.",
    sources=("D2", "D3", "dao2022, abstract"),
    check="times",
    bert=1.15,
    gpt2=3,
    lra=2.4,
)
def fa_speed(case: Case) -> None:
    for key, model, n, says in (("bert", "BERT", 512, "BERT at 512 tokens"), ("gpt2", "GPT-2", 1024, "GPT-2 at 1,024 tokens")):
        dense, tiled = ({"op": "training", "implementation": f"{model} with {kind} attention", "T": n} for kind in ("dense", "tiled"))
        case.timing(key, dense, tiled, f"dense over tiled attention in {says}")
    case.open("long-range arena", "training on that suite of benchmarks")
    case.disagree("D2 caps the gain at 3, as the abstract that it cites does; D3 says 4.")
    case.states("Of whole trainings; what can be counted is the traffic (fa-io).")


@claim(
    "fa2",
    "FlashAttention-2 is about twice as fast, and parallel over the length instead of batch and heads.",
    sources=("D2", "D3", "dao2023, section 3.2"),
    check="independent pieces of a run put together; times",
    pieces=4,
    queries=1,
    speed=2,
)
def fa2(case: Case) -> None:
    batch, heads, blocks = 2, 3, 4
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, batch, heads, 64, 16))
    out, count = np.zeros_like(q), 0
    for b, h in np.ndindex(batch, heads):
        for i in range(0, 64, 64 // blocks):
            out[b, h, i : i + 16] = attention(q[b, h, i : i + 16], k[b, h], v[b, h])
            count += 1
    case.equal(
        "queries",
        "attention",
        out,
        attention(q, k, v),
        {"q": q, "k": k, "v": v},
        "blocks of queries of every head and sequence, each by itself",
        part="queries are split",
    )
    case.number("pieces", count, f"pieces that run side by side, {batch} sequences, {heads} heads, {blocks} blocks of queries")
    case.compare("pieces", part="instead of batch and heads")
    case.timing(
        "speed",
        {"op": "attention", "implementation": "FlashAttention"},
        {"op": "attention", "implementation": "FlashAttention-2"},
        "FlashAttention over FlashAttention-2",
        "=",
    )
    case.states(
        f"Over the length in addition to batch and heads: {batch} · {heads} · {blocks} = {count} pieces, not {blocks}. Queries "
        f"are split, not keys."
    )


@claim(
    "nonmatmul",
    "Masking, softmax and dropout make up the whole runtime of attention.",
    sources=("D3", "dao2022, figure 1"),
    check="bytes moved for an entry of the map, unfused in 16 bits",
    share=1,
)
def nonmatmul(case: Case) -> None:
    moved = {"scores": 2, "mask": 4, "softmax": 4, "dropout": 4, "values": 2}
    elementwise = sum(moved[name] for name in ("mask", "softmax", "dropout"))
    total = case.number("bytes", sum(moved.values()), "bytes for an entry: written by q kᵀ, read and written by three steps, read by p v")
    share = case.number("share", elementwise / total, "share of mask, softmax and dropout")
    case.compare("share", within=0.05)
    case.states(f"{elementwise} of {total} bytes, {share:.0%} of the traffic of an unfused run.")


@claim(
    "cbound",
    "Attention is bound by computation.",
    sources=("D2",),
    check="operations for a byte against the A100's ridge",
    dense=153,
    fused=153,
    decode=153,
)
def cbound(case: Case) -> None:
    n, d = 8192, 128
    ridge = case.number("ridge", A100["tensor"] / A100["bytes"], "operations for a byte at which an A100 is balanced")
    dense = case.number("dense", 4 * d / 8, "maps written and read twice, d = 128")
    case.number("fused", 4 * n * n * d / (4 * n * d * 2), "fused, 8,192 tokens at once")
    decode = case.number("decode", 4 * d / (2 * d * 2), "one query, a cache of its own")
    grouped = case.number("grouped", 8 * decode, "one query, eight heads for one cache")
    case.compare("dense", ">=")
    case.compare("decode", ">=")
    case.compare("fused", ">=", given="the kernel is fused and many queries are computed at once")
    n_axis = lengths(16, 2**16)
    case.curves(
        "queries",
        "operations for a byte",
        fused=(n_axis, [m / 2 for m in n_axis]),
        materialised=(n_axis, [dense] * len(n_axis)),
        ridge=(n_axis, [ridge] * len(n_axis)),
    )
    case.states(
        f"Fused prefill is; a materialised map has {dense:.0f} operations for a byte (the A100 needs {ridge:.0f}), decoding "
        f"{decode:.0f}, with eight heads on one cache {grouped:.0f}."
    )
    case.disagree("D2 calls attention memory bound where it explains FlashAttention.")


@claim(
    "sram",
    "An A100 has about 50 MB of fast memory at 19 TB/s, and large memory at 2 TB/s.",
    sources=("D2", "dao2022, section 2.1", "nvidia2020"),
    check="multiprocessors times shared memory, banks times clock",
    size=50,
    near=19,
    far=2,
)
def sram(case: Case) -> None:
    size = case.number("size", A100["sms"] * A100["sram"] / MIB, "108 multiprocessors of 192 KiB", "MiB")
    near = case.number("near", A100["sms"] * 128 * A100["clock"] / 1e12, "108 · 128 bytes a clock at 1.41 GHz", "TB/s")
    far = case.number("far", A100["bytes"] / 1e12, "of the 80 GB part", "TB/s")
    case.compare("size", within=0.2, part="size")
    case.compare("near", within=0.05, part="speed")
    case.compare("far", within=0.05, part="speed")
    case.states(
        f"{size:.2f} MiB in 108 pieces that do not add up for one block (L2 has 40 MB; 50 MB is the H100's L2). Speeds "
        f"{near:.1f} and {far:.2f} TB/s."
    )


@claim(
    "ring",
    "Ring attention is exact, its context grows with the devices, and it costs nothing extra.",
    sources=("D3", "liu2023"),
    check="shards against dense in any order; who is busy when",
    exact=1,
    context=8,
    use=1,
)
def ring(case: Case) -> None:
    call = qkv(96, 16)
    error = case.equal(
        "exact", "attention", form("attention", "ring")(**call, devices=8), attention(**call), call, "8 shards round a ring", part="exact"
    )
    p = 8
    held = {count: ring_times(4096 * count, MACHINES["a100"], count)[3] for count in (2, p)}
    case.number("context", p * held[2] / held[p], "context of 8 devices, in units of one's, at the bytes that each of two would hold")
    case.compare("context", part="context")
    holds = ring_schedule(p)
    busy = holds <= np.arange(p)  # a causal device needs only shards up to its own
    use = case.number("use", busy.mean(), "device steps with work, causal and contiguous, 8 devices")
    case.number("full", np.ones_like(busy).mean(), "device steps with work, not causal")
    case.compare("use", part="no overhead")
    case.compare("full", claimed="use", part="no overhead", given="the mask is not causal")
    case.number("time", slope(lambda n: n * n / p, lengths(2**12, 2**16)), "growth of the time with n on p devices")
    devices = lengths(1, 64)
    case.curves(
        "devices", "share of device steps with work, causal", contiguous=(devices, [(m + 1) / (2 * m) for m in devices])
    )
    case.states(
        f"Exact in any order ({error:.0e}); causal and contiguous only (p + 1) / 2p = {use:.0%} of the steps have work at p = 8; time "
        f"is still n² / p."
    )
