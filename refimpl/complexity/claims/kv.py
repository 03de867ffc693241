"""KV cache and decoding: bytes of keys and values, and what a token costs with them."""

import dataclasses

import numpy as np

from refimpl.complexity.calculators import kv_cache_bytes, layer_flops, state_bytes, weight_bytes
from refimpl.complexity.claims.record import Case, Claim, claim
from refimpl.complexity.claims.tools import GIB, lengths, qkv, slope
from refimpl.complexity.presets import PRESETS, Attention
from refimpl.ops.attention.attention import attention
from refimpl.ops.attention.kv_cache import KVCache

CLAIMS: list[Claim] = []
GB = 1e9


def grouped(name: str, kv_heads: int):
    """A preset with so many heads of keys and values."""
    config = PRESETS[name]
    blocks = tuple(
        dataclasses.replace(b, mixer=dataclasses.replace(b.mixer, kv_heads=kv_heads)) if isinstance(b.mixer, Attention) else b
        for b in config.blocks
    )
    return dataclasses.replace(config, name=f"{name} with {kv_heads} kv heads", blocks=blocks)


@claim(
    "kv-lin",
    "The cache grows linearly, and every token reads all of it.",
    sources=("D2", "D4"),
    check="bytes by formula and of a cache that was filled",
    exponent=1,
    read=1,
)
def kv_lin(case: Case) -> None:
    sizes = lengths(2**10, 2**20)
    case.number("exponent", slope(lambda n: kv_cache_bytes("llama2-13b", n), sizes), "growth of the cache's bytes")
    cache, held = KVCache(), []
    for n in (8, 16):
        while cache.length < n:
            cache.append(np.ones((1, 1, 4)), np.ones((1, 1, 4)))
        held.append(cache.bytes())
    case.number("filled", held[1] / held[0], "bytes of a cache of 16 tokens over one of 8")
    x = qkv(16, 4)
    touched = [
        abs(attention(x["q"][:, -1:], x["k"] + (np.arange(16) == j)[:, None], x["v"]) - attention(x["q"][:, -1:], x["k"], x["v"])).max() > 0
        for j in range(16)
    ]
    case.number("read", float(np.mean(touched)), "share of the keys on which the newest token's output depends")
    case.compare("exponent", within=1e-6)
    case.compare("read", within=0)
    case.curves(
        "tokens",
        "bytes of the cache",
        **{
            name.replace("-", "_"): (sizes, [max(1, kv_cache_bytes(name, n, rolling=False)) for n in sizes])
            for name in ("llama2-13b", "llama3-70b", "mixtral-8x7b", "jamba-v0.1")
        },
    )
    case.states(
        f"Exponent {case.numbers['exponent'].value:.2f}, and {np.mean(touched):.0%} of the cached keys move the newest token's output."
    )


@claim(
    "kv-13b",
    "At 100,000 tokens the cache of a 13B model exceeds 50 GB.",
    sources=("D2", "touvron2023, table 1"),
    check="byte formula",
    size=50,
)
def kv_13b(case: Case) -> None:
    size = case.number("size", kv_cache_bytes("llama2-13b", 100_000) / GB, "Llama-2 13B, 100,000 tokens", "GB")
    tokens = case.number("tokens", int(-(-50 * GB // kv_cache_bytes("llama2-13b", 1))), "tokens from which it exceeds 50 GB")
    shared = case.number(
        "grouped", kv_cache_bytes(grouped("llama2-13b", 8), 100_000) / GB, "the same with 8 heads of keys and values", "GB"
    )
    case.compare("size", ">")
    case.states(f"{size:.2f} GB; 50 GB at {tokens:,} tokens; with 8 shared heads {shared:.1f} GB. Consumer cards hold 24 to 32 GB.")


@claim(
    "kv-70b",
    "Llama-3 70B's cache at 128K tokens takes about 26 GB = 128K · 80 · 8 · 128 · 2.",
    sources=("D2", "grattafiori2024, table 3"),
    check="byte formula",
    size=26,
    product=26,
)
def kv_70b(case: Case) -> None:
    product = case.number("product", 128_000 * 80 * 8 * 128 * 2 / GB, "the product as it is written, 128,000 tokens", "GB")
    binary = case.number("product_binary", 131_072 * 80 * 8 * 128 * 2 / GB, "the same for 131,072", "GB")
    size = case.number("size", kv_cache_bytes("llama3-70b", 131_072) / GB, "keys and values of 131,072 tokens", "GB")
    decimal = case.number("size_decimal", kv_cache_bytes("llama3-70b", 128_000) / GB, "keys and values of 128,000 tokens", "GB")
    case.number("GiB", kv_cache_bytes("llama3-70b", 131_072) / GIB, "the same", "GiB")
    case.compare("product", within=0.1, part="the product")
    case.compare("size", within=0.1, part="the cache")
    case.states(
        f"The product is {product:.2f} to {binary:.2f} GB; keys and values are twice that, {decimal:.2f} to {size:.2f} GB = 40 GiB "
        f"(and Llama-3's own context is 8,192; 128K came with 3.1)."
    )


@claim("w-70b", "The weights of a 70B model take 140 GB: several GPUs.", sources=("D2",), check="byte formula", size=140, devices=1)
def w_70b(case: Case) -> None:
    size = case.number("size", weight_bytes("llama3-70b") / GB, "Llama-3 70B in 16 bits", "GB")
    both = case.number(
        "with_cache", (weight_bytes("llama3-70b") + kv_cache_bytes("llama3-70b", 131_072)) / GB, "with a cache of 131,072 tokens", "GB"
    )
    count = case.number("devices", int(np.ceil(both / 80)), "devices of 80 GB that hold it")
    case.compare("size")
    case.compare("devices", ">")
    case.states(f"{size:.1f} GB; with the cache of 131,072 tokens {both:.1f} GB: {count} devices of 80 GB.")


@claim(
    "gqa",
    "Grouped-query attention keeps a single head of keys and values.",
    sources=("D4", "ainslie2023", "shazeer2019"),
    check="published models; shared heads against repeated ones",
    heads=1,
)
def gqa(case: Case) -> None:
    layer = PRESETS["llama3-70b"].blocks[0].mixer
    heads = case.number("heads", layer.kv_heads, "heads of keys and values in Llama-3 70B")  # type: ignore[union-attr]
    x = qkv(12, 8, heads=8, kv_heads=2)
    repeated = attention(x["q"], np.repeat(x["k"], 4, axis=0), np.repeat(x["v"], 4, axis=0))
    error = case.number("error", abs(attention(**x) - repeated).max(), "two shared heads against the same heads repeated")
    ratio = case.number(
        "cache", kv_cache_bytes("llama3-70b", 1000) / kv_cache_bytes(grouped("llama3-70b", 64), 1000), "cache of 8 of 64 heads over all"
    )
    case.compare("heads", within=0)
    case.states(
        f"One head is multi-query attention; grouped queries share G heads (difference {error:.0e} from repeating them), {heads} of 64 "
        f"in Llama-3 70B, and the cache is {ratio:.3f} of the whole."
    )


def _conversation(messages: int) -> int:
    """Tokens of so many messages."""
    return 50 * messages


@claim(
    "chat",
    "A chat of 1,000, 5,000 and 10,000 messages answers in 1, 25 and 100 s; an SSM takes the same time always.",
    sources=("D2",),
    check="operations for an answer, 50 tokens a message, width 8,192",
    middle=25,
    long=100,
    flat=1,
)
def chat(case: Case) -> None:
    d = 8192
    n = [_conversation(m) for m in (1000, 5000, 10_000)]
    again = [layer_flops(m, d, causal=True) / layer_flops(n[0], d, causal=True) for m in n]
    token = [(24 * d + 4 * m) / (24 * d + 4 * n[0]) for m in n]
    maps = [(m / n[0]) ** 2 for m in n]
    for key, values, says in (
        ("", maps, "the map's work, everything computed again"),
        ("_layer", again, "the whole layer's work (causal), everything computed again"),
        ("_token", token, "one token with a cache"),
    ):
        case.number(f"middle{key}", values[1], f"{says}: 5,000 messages over 1,000")
        case.number(f"long{key}", values[2], f"{says}: 10,000 messages over 1,000")
    case.number("flat", 1.0, "one token of an SSM whose state is kept, 10,000 messages over 1,000")
    case.number("flat_again", n[2] / n[0], "an SSM that reads everything again, 10,000 messages over 1,000")
    for key in ("middle", "long"):
        case.compare(f"{key}_token", claimed=key, part="attention")
        case.compare(key, claimed=key, part="attention", given="nothing is cached and only the map counts")
    case.compare("flat_again", claimed="flat", part="state space model")
    case.compare("flat", part="state space model", given="the state is kept between turns")
    case.states(
        f"1 : 25 : 100 for the map alone without a cache; the layer is 1 : {again[1]:.1f} : {again[2]:.1f}, a cached token 1 : "
        f"{token[1]:.1f} : {token[2]:.1f}."
        f" An SSM is flat if its state is kept, else 1 : 5 : {n[2] / n[0]:.0f}."
    )


@claim(
    "slower",
    "With every turn the answer slows down more than linearly.",
    sources=("D2",),
    check="growth of a cached token's work, and of the whole conversation's",
    exponent=1.05,
)
def slower(case: Case) -> None:
    sizes = lengths(2**20, 2**26)
    token = case.number("exponent", slope(lambda n: 24 * 8192 + 4 * n, sizes), "growth of one cached token's work")
    total = case.number("total", slope(lambda n: layer_flops(n, 8192, causal=True), sizes), "growth of the whole conversation's work")
    case.compare("exponent", ">")
    case.states(f"A cached token slows down linearly (exponent {token:.2f}); the conversation as a whole costs n² (exponent {total:.2f}).")


@claim(
    "batch",
    "A small state allows larger batches, and so five times the throughput.",
    sources=("D3", "gu2023, section 4.5"),
    check="bytes for a sequence at 2,048 tokens; times",
    smaller=1,
    throughput=5,
)
def batch(case: Case) -> None:
    cache = case.number("cache", kv_cache_bytes("transformer-1.3b", 2048) / 1e6, "cache of a Transformer of 24 layers, width 2,048", "MB")
    state = case.number("state", state_bytes("mamba-1.4b") / 1e6, "state of the Mamba of that size", "MB")
    ratio = case.number("smaller", cache / state, "cache over state", "×")
    case.compare("smaller", ">")
    case.timing(
        "throughput",
        {"op": "generation", "implementation": "transformer-1.3b"},
        {"op": "generation", "implementation": "mamba-1.4b"},
        "five times the throughput",
    )
    case.states(f"The mechanism is there: {cache:.0f} against {state:.1f} MB a sequence, {ratio:.0f} times smaller at 2,048 tokens.")
