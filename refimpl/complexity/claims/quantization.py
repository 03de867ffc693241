"""Quantisation and speculative decoding."""

import re

import numpy as np

from refimpl.complexity.calculators import kv_cache_bytes, weight_bytes
from refimpl.complexity.claims.record import Case, Claim, claim
from refimpl.complexity.claims.sources import SOURCES
from refimpl.ops.attention.kv_cache import KVCache
from refimpl.ops.attention.speculative_sample import acceptance_rate, expected_tokens, residual_distribution
from refimpl.ops.quantization.packing import pack_ternary
from refimpl.ops.quantization.ternary import absmax_quantize, binary_quantize, ternary_quantize

CLAIMS: list[Claim] = []


@claim(
    "ternary",
    "Weights -1, 0, 1 take 1.58 bits each.",
    sources=("D1", "ma2024"),
    check="log₂ 3, and weights that were packed",
    entropy=1.58,
    packed=1.6,
)
def ternary(case: Case) -> None:
    entropy = case.number("entropy", np.log2(3), "bits of a choice among three", "bits")
    weights = np.random.default_rng(0).integers(-1, 2, (64, 1280)).astype(np.int8)
    packed = case.number(
        "packed", pack_ternary(weights, layout="base3").nbytes * 8 / weights.size, "bits of a weight, five to a byte", "bits"
    )
    before, after = (
        case.number("before", 3e9 * 2 / 1e9, "3 · 10⁹ weights in 16 bits", "GB"),
        case.number("after", 3e9 * packed / 8 / 1e9, "the same packed", "GB"),
    )
    case.compare("entropy", within=0.01)
    case.compare("packed", within=0)
    case.states(
        f"log₂ 3 = {entropy:.3f}; five to a byte are {packed:.1f} bits, so 3 billion weights shrink from {before:.1f} to {after:.2f} GB."
    )


@claim("q2021", "Quantisation of neural networks began in 2021.", sources=("D1",), check="years of the works that it cites", first=2021)
def q2021(case: Case) -> None:
    cited = ("jacob2018", "shen2020")
    years = [int(re.findall(r"\((\d{4})\)", SOURCES[key])[0]) for key in cited]
    first = case.number("first", min(years), "year of the earliest")
    case.compare("first", ">=")
    case.disagree("D1 cites works of 2018 and 2020 beside it.")
    case.states(f"Its own references are from {first} and {max(years)}.")


def gaussian_error(quantize) -> float:
    """Relative RMS error of a quantiser on normal weights."""
    w = np.random.default_rng(0).standard_normal((512, 512))
    values, scale = quantize(w)
    return float(np.sqrt(np.mean((values * scale - w) ** 2)))


@claim(
    "q1ssm",
    "Mamba, xLSTM and Jamba surely go to one bit as well.",
    sources=("D1",),
    check="a pole of 0.999 in 8 bits; error of one-bit weights",
    pole=1,
    weights=1,
)
def q1ssm(case: Case) -> None:
    q, scale = absmax_quantize(np.array([0.999, 1.0]), bits=8)
    pole = case.number("pole", float(np.asarray(q)[0] / np.asarray(q)[1]), "a pole of 0.999 beside one of 1, in 8 bits")
    case.number("memory", float(1 / (1 - 0.999)), "steps that the pole remembered before", "steps")
    one = case.number("weights", gaussian_error(binary_quantize), "relative error of one-bit weights, normally distributed")
    three = case.number("ternary", gaussian_error(ternary_quantize), "the same in ternary")
    case.compare("pole", "<")
    case.compare("weights", "<", given="only the weights of matrices are quantised, not decays or states")
    case.open("that such models are good", "training")
    case.states(
        f"Matrices perhaps (error {one:.2f} in one bit, {three:.2f} in ternary); a pole of 0.999 becomes {pole:.1f} already in 8 bits "
        f"and never forgets."
    )


@claim(
    "kv4",
    "A cache in four bits: 2.38 times the throughput, peak memory divided by 2.29.",
    sources=("D3", "kang2024, abstract"),
    check="bits of an entry with its scales; peak of Llama-2 7B",
    peak=2.29,
    given_share=2.29,
    throughput=2.38,
)
def kv4(case: Case) -> None:
    bits = case.number("bits", 4 + 2 * 16 / 64, "bits of an entry, 16 for a scale and for a zero point of 64 entries", "bits")
    smaller = case.number("smaller", 16 / bits, "cache in 16 bits over that", "×")
    cache = KVCache(bits=4, group=64)
    x = np.random.default_rng(0).standard_normal((1, 256, 64)).astype(np.float32)
    cache.append(x, x)
    case.number("held", cache.bytes() * 8 / (2 * x.size), "bits of an entry of KVCache(bits=4, group=64), whose scales have 32", "bits")
    size, weights = kv_cache_bytes("llama2-7b", 4096), weight_bytes("llama2-7b")
    share = case.number("share", size / (size + weights), "the cache's share of weights and cache, Llama-2 7B, 4,096 tokens")
    peak = lambda s: 1 / (1 - s + s / smaller)
    case.number("peak", peak(share), "division of the peak at that share", "×")
    needed = case.number("needed", (1 - 1 / 2.29) / (1 - 1 / smaller), "share at which it is 2.29")
    case.number("given_share", peak(0.78), "division of the peak if the cache is 78 % of it", "×")
    case.compare("peak", part="peak")
    case.compare("given_share", part="peak", given="the cache is about 78 % of the peak")
    case.timing(
        "throughput",
        {"op": "generation", "implementation": "cache of 16 bits"},
        {"op": "generation", "implementation": "cache of 4 bits"},
        "2.38 times the throughput",
        "=",
    )
    case.states(
        f"With groups of 64 an entry takes {bits:.1f} bits, {smaller:.2f} times less; ÷2.29 needs a cache of {needed:.0%} of the peak "
        f"(at {share:.0%}, ÷{peak(share):.2f}). D3 credits Google; the paper is GEAR."
    )


@claim(
    "spec",
    "Speculative decoding gives the same distribution, with less waiting.",
    sources=("D3", "leviathan2022, theorem 3.5"),
    check="acceptance and residual put together; expected tokens",
    error=1,
    tokens=1,
)
def spec(case: Case) -> None:
    rng = np.random.default_rng(0)
    target, draft = rng.dirichlet(np.ones(50), 2)
    accepted = np.minimum(target, draft)
    law = accepted + (1 - acceptance_rate(target, draft)) * residual_distribution(target, draft)
    worst = case.number("difference", abs(law - target).max(), "largest difference of the law from the target's")
    case.number("error", worst / (50 * 2.0**-53), "the same, in units of 50 roundoffs (the sums over 50 tokens)")
    tokens = case.number("tokens", expected_tokens(0.8, 4), "tokens for a call of the large model, acceptance 0.8, four drafted")
    case.compare("error", "<=")
    case.compare("tokens", ">")
    case.states(
        f"The law is the target's (difference {worst:.0e}); at an acceptance of 0.8 and four drafted tokens a call yields {tokens:.2f}."
    )
