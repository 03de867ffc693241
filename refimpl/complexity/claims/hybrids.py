"""Hybrids: Jamba, Griffin, StripedHyena, Based."""

import dataclasses

import numpy as np

from refimpl.complexity.calculators import active_parameters, kv_cache_bytes, parameters, sequence_flops, weight_bytes
from refimpl.complexity.claims.record import Case, Claim, claim
from refimpl.complexity.claims.tools import GIB, form, lengths, slope
from refimpl.complexity.presets import PRESETS, Attention, Block, Config
from refimpl.ops.linear_attention.linear_attention import linear_attention
from refimpl.ops.recurrence.rg_lru import rg_lru

CLAIMS: list[Claim] = []
GB = 1e9
JAMBA = PRESETS["jamba-v0.1"]
FULL = 256 * 1024


def all_attention(config: Config) -> Config:
    """The model with attention in every layer."""
    mixer = next(b.mixer for b in config.blocks if isinstance(b.mixer, Attention))
    return dataclasses.replace(
        config, name=f"{config.name}, all attention", blocks=tuple(Block(b.count, mixer, b.channel) for b in config.blocks)
    )


@claim(
    "optimal",
    "Jamba trains in O(n) and answers in O(1).",
    sources=("D1",),
    check="growth of a model's operations, and of a token's",
    train=1.05,
    token=0.05,
)
def optimal(case: Case) -> None:
    sizes = lengths(2**20, 2**30)
    scores = lambda n: 4 * 4 * n * 4096  # four layers of 4 n operations for each of 32 · 128 features
    train = case.number("train", slope(lambda n: sequence_flops(JAMBA, n), sizes), "growth of a sequence's operations")
    token = case.number("token", slope(lambda n: scores(n) + 2 * active_parameters(JAMBA), sizes), "growth of a cached token's operations")
    map_flops = case.number("map", scores(FULL) / 1e9, "a token's scores and weighted values at 262,144 tokens", "GFLOP")
    share = case.number("share", scores(FULL) / (2 * active_parameters(JAMBA)), "the same over twice the active parameters")
    equal = case.number("equal", int(2 * active_parameters(JAMBA) / scores(1)), "tokens at which the two are equal")
    case.compare("train", "<=", part="training")
    case.compare("token", "<=", part="inference")
    n = lengths(2**10, 2**22)
    case.curves(
        "tokens",
        "operations for a token",
        scores=(n, [scores(m) for m in n]),
        twice_the_active_parameters=(n, [2 * active_parameters(JAMBA)] * len(n)),
    )
    case.states(
        f"4 of 32 layers are attention: Θ(n²) (exponent {train:.2f}) and Θ(n) for a token ({token:.2f}). At 262,144 tokens its map "
        f"takes {map_flops:.1f} GFLOP,"
        f" {share:.0%} of twice the active parameters; equal at {equal:,}."
    )


@claim(
    "bound",
    "Each token must be read once, so O(n) is attainable; a hybrid raises the complexity.",
    sources=("D1",),
    check="what reads each token once; Jamba against itself with attention everywhere",
    exponent=1.05,
    hybrid=1,
)
def bound(case: Case) -> None:
    sizes = lengths(2**24, 2**30)
    attention = case.number(
        "exponent",
        slope(lambda n: sequence_flops(all_attention(JAMBA), n), sizes),
        "growth of a Transformer's operations, which reads each token once as well",
    )
    ratio = case.number(
        "hybrid",
        sequence_flops(JAMBA, FULL) / sequence_flops(all_attention(JAMBA), FULL),
        "operations of Jamba over those of attention in every layer, 262,144 tokens",
    )
    case.compare("exponent", "<=", part="reading once bounds the cost from above")
    case.compare("hybrid", ">", part="hybrids cost more")
    case.states(
        f"Reading every token is a floor, Ω(n), and no more: attention reads them too (exponent {attention:.2f}). A hybrid lowers the "
        f"cost, to {ratio:.0%} here."
    )


@claim(
    "jparams",
    "Jamba has 52 billion parameters, 12 of them active, and attention in one layer of eight.",
    sources=("D3", "lieber2024, section 3"),
    check="sum over the layers",
    total=52,
    active=12,
    attention=4,
    layers=32,
)
def jparams(case: Case) -> None:
    total = case.number("total", parameters(JAMBA) / 1e9, "parameters", "10⁹")
    active = case.number("active", active_parameters(JAMBA) / 1e9, "active for a token", "10⁹")
    case.number("attention", sum(count for count, _ in JAMBA.attention()), "layers of attention")
    case.number("layers", JAMBA.layers, "layers")
    for key in ("total", "active"):
        case.compare(key)
    for key in ("attention", "layers"):
        case.compare(key, within=0)
    case.states(f"{total:.2f} and {active:.2f} billion, 4 of 32 layers.")


@claim("jkv", "Jamba's cache stays small at 256K tokens.", sources=("D1", "lieber2024, table 1"), check="byte formula", jamba=10)
def jkv(case: Case) -> None:
    names = {"jamba": "jamba-v0.1", "mixtral": "mixtral-8x7b", "llama_70b": "llama2-70b", "llama_7b": "llama2-7b"}
    sizes = {key: case.number(key, kv_cache_bytes(name, FULL) / GIB, f"{name}, 262,144 tokens", "GiB") for key, name in names.items()}
    case.compare("jamba", "<")
    n = lengths(2**10, 2**18)
    case.curves("tokens", "GiB of cache", **{key: (n, [kv_cache_bytes(name, m) / GIB for m in n]) for key, name in names.items()})
    case.states(", ".join(f"{names[key]} {size:.0f} GiB" for key, size in sizes.items()) + ".")


@claim(
    "jfit",
    "One GPU of 80 GB runs Jamba with 256K tokens (D2), with 140K (D3).",
    sources=("D1", "D2", "D3", "lieber2024, section 3"),
    check="weights and cache, before activations",
    bf16=80,
    int8=80,
)
def jfit(case: Case) -> None:
    whole = case.number("weights", weight_bytes(JAMBA) / GB, "weights in 16 bits", "GB")
    case.number("bf16", (weight_bytes(JAMBA) + kv_cache_bytes(JAMBA, FULL)) / GB, "with the cache of 262,144 tokens", "GB")
    full = case.number(
        "int8", (weight_bytes(JAMBA, bits=8) + kv_cache_bytes(JAMBA, FULL)) / GB, "weights in 8 bits with the cache of 262,144 tokens", "GB"
    )
    less = case.number(
        "int8_140k", (weight_bytes(JAMBA, bits=8) + kv_cache_bytes(JAMBA, 140 * 1024)) / GB, "the same with 143,360 tokens", "GB"
    )
    case.compare("bf16", "<=")
    case.compare("int8", "<=", given="weights are quantised to 8 bits, and activations fit in the rest")
    case.disagree("D2 says 256K, D3 140K.")
    case.states(
        f"Not in 16 bits ({whole:.1f} GB of weights); in 8 bits {full:.1f} GB with 256K and {less:.1f} GB with 140K tokens, before "
        f"activations."
    )


@claim(
    "jimposs",
    "A pure Transformer cannot do 256K tokens on one GPU of 80 GB.",
    sources=("D2",),
    check="weights and cache of three Transformers",
    fitting=0,
)
def jimposs(case: Case) -> None:
    sizes = {}
    for key, name, bits in (("mixtral", "mixtral-8x7b", 4), ("mistral", "mistral-7b", 16), ("llama_70b", "llama2-70b", 4)):
        total = weight_bytes(name, bits=bits) + kv_cache_bytes(name, FULL, rolling=False)
        sizes[f"{name} in {bits} bits"] = case.number(
            key, total / GB, f"{name}, weights of {bits} bits, the cache of 262,144 tokens in 16", "GB"
        )
    case.number("fitting", sum(size <= 80 for size in sizes.values()), "of these fit into 80 GB")
    case.compare("fitting", "<=")
    case.states("; ".join(f"{name} {size:.1f} GB{'' if size <= 80 else ' (does not fit)'}" for name, size in sizes.items()) + ".")


@claim(
    "longest",
    "Jamba's 256K tokens are the longest public context.",
    sources=("D1", "D2", "D3"),
    check="the documents' own figures",
    longest=262144,
)
def longest(case: Case) -> None:
    stated = {
        "Jamba (D1)": 256 * 1024,
        "Claude 3 (D2)": 200_000,
        "Claude 3 (D3)": 1_000_000,
        "Gemini 1.5 (D2)": 2_000_000,
        "Gemini 1.5 (D3)": 10_000_000,
    }
    most = case.number("stated", max(stated.values()), "largest context that one of the documents states", "tokens")
    case.open(
        "which context was the longest public one",
        "a date, and what counts as public: the documents state " + ", ".join(f"{k} {v:,}" for k, v in stated.items()),
    )
    case.disagree(f'D1 says 256K, D2 and D3 state up to {most:,}; D1 lists a "Mistral-8x7B", which does not exist.')
    case.states("Unresolved: depends on the day and on what is called public.")


@claim(
    "griffin",
    "Griffin: two recurrent layers to one of local attention; six times fewer tokens; the gate keeps history.",
    sources=("D3", "D4", "de2024"),
    check="ratio of tokens; the operator at r = 0",
    tokens=6,
    decay=1,
    taken=0,
)
def griffin(case: Case) -> None:
    ratio = case.number("tokens", 2e12 / 300e9, "tokens of Llama-2 (2 · 10¹²) over Griffin's (3 · 10¹¹)", "×")
    zeros = np.zeros((20, 3))
    x = np.random.default_rng(0).standard_normal((20, 3))
    y = rg_lru(x, zeros, zeros + 1, np.full(3, -0.5), state=np.ones(3))
    case.number("decay", float(y[-1].min()), "what is left of a state of 1 after 20 steps of r = 0")
    case.number("taken", float(abs(y - 1).max()), "what the inputs change meanwhile")
    case.compare("tokens", ">=")
    case.compare("decay", within=0)
    case.compare("taken", "<=")
    case.states(f"2T / 300B = {ratio:.2f}; at r = 0 the decay is exactly 1 and nothing is taken in.")


@claim(
    "sh-cache",
    "StripedHyena's cache is more than 50 % smaller under grouped queries.",
    sources=("D3", "poli2023b"),
    check="16 of 32 layers of attention with 8 heads, 8 complex modes a channel elsewhere",
    saved=0.5,
)
def sh_cache(case: Case) -> None:
    head, layers, d = 128, 32, 4096
    cache = lambda n, count: count * 2 * 8 * head * n * 2
    modes = 16 * d * 8 * 2 * 2  # 16 layers, 8 modes of real and imaginary part, 2 bytes
    saved = lambda n: 1 - (cache(n, 16) + modes) / cache(n, layers)
    for key, n in (("short", 2048), ("saved", 131_072)):
        case.number(key, saved(n), f"share of the bytes saved at {n:,} tokens")
    case.number("limit", 1 - cache(1, 16) / cache(1, layers), "what it tends to")
    case.compare("saved", ">")
    case.states(
        f"Half of the layers keep a cache and the others a state: {saved(2048):.1%} at 2,048 tokens, {saved(131_072):.2%} at 131,072, "
        f"never more than 50 %."
    )


@claim(
    "based",
    "Based: a Taylor expansion of softmax, no growing cache; 4.5 times the throughput.",
    sources=("D3", "arora2024"),
    check="features of width 16, recurrence against the parallel form; times",
    error=1,
    width=273,
    speed=4.5,
)
def based(case: Case) -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 40, 16))
    options = {"feature_map": "taylor", "normalize": True}
    y, (S, z) = linear_attention(q, k, v, return_state=True, **options)
    case.number("width", S.shape[-2], "rows of the state for keys of 16")
    error = case.equal(
        "error",
        "linear_attention",
        form("linear_attention", "parallel")(q, k, v, **options),
        y,
        {"q": q, "k": k, "v": v, **options},
        "recurrence against the sum over all pairs",
    )
    ratios = [
        case.number(f"ratio_{s}", (1 + s + s * s / 2) / np.exp(s), f"Taylor's polynomial over the exponential at a score of {s}")
        for s in (1, 3, 5)
    ]
    case.compare("width", within=0)
    case.timing(
        "speed",
        {"op": "generation", "implementation": "transformer"},
        {"op": "generation", "implementation": "based"},
        "4.5 times the throughput",
    )
    case.states(
        f"A state of {S.shape[-2]} rows ({error:.0e}); the polynomial follows the exponential at small scores only ({ratios[0]:.2f}, "
        f"{ratios[1]:.2f}, {ratios[2]:.2f} of it at 1, 3, 5)."
    )
