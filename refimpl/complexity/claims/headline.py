"""Headlines: throughputs, qualities, machines."""

from refimpl.complexity.calculators import kv_cache_bytes
from refimpl.complexity.claims.record import Case, Claim, claim

CLAIMS: list[Claim] = []


@claim("s4-60", "S4 generates 60 times faster than a Transformer.", sources=("D2", "gu2021, abstract"), check="times", speed=60)
def s4_60(case: Case) -> None:
    case.timing(
        "speed",
        {"op": "generation", "implementation": "transformer"},
        {"op": "generation", "implementation": "s4"},
        "S4's generation, 60 times",
    )
    case.disagree('"SSM 5 to 60 times against FlashAttention 2 to 3 times" compares with two different baselines.')
    case.states("Against a Transformer that keeps no cache and computes everything again for every token.")


@claim("j3x", "Jamba has three times Mixtral's throughput.", sources=("D1", "D2", "D3", "lieber2024, section 3"), check="times", speed=3)
def j3x(case: Case) -> None:
    case.timing(
        "speed",
        {"op": "generation", "implementation": "mixtral-8x7b"},
        {"op": "generation", "implementation": "jamba-v0.1"},
        "Mixtral over Jamba at 128K tokens",
    )
    mixtral, jamba = (kv_cache_bytes(name, 2**18) / 2**30 for name in ("mixtral-8x7b", "jamba-v0.1"))
    case.states(
        f"Of generation at long contexts, where Mixtral's cache allows smaller batches: {mixtral:.0f} against {jamba:.0f} GiB "
        f"a sequence at 262,144 tokens."
    )


@claim(
    "sh-t",
    "StripedHyena trains 30, 50 and 100 % faster at 32K, 64K and 128K tokens.",
    sources=("D3", "poli2023b"),
    check="times",
    short=1.3,
    middle=1.5,
    long=2,
)
def sh_t(case: Case) -> None:
    slow, fast = {"op": "training", "implementation": "transformer"}, {"op": "training", "implementation": "stripedhyena"}
    for key, n in (("short", 32768), ("middle", 65536), ("long", 131072)):
        case.timing(key, slow | {"T": n}, fast | {"T": n}, f"Transformer over StripedHyena at {n:,} tokens", "=")
    case.states("Of whole trainings, by those who trained them.")


@claim(
    "qual",
    "Quality: Mamba 3B matches twice its size and fails on IMDB; xLSTM is good on little data; BitNet reaches parity; M2 at 360M; "
    "hybrids are best; models extrapolate.",
    sources=("D1", "D3", "D4"),
    check="training",
)
def qual(case: Case) -> None:
    case.open("all of it", "training and evaluating the models that are named")
    case.states("About trained models; nothing here can decide it.")


@claim(
    "hw",
    "H200 has about twice the memory; six times on 8 GPUs; 5M tokens are 500K lines or 5K files; Groq went from 480 to 800 tokens a "
    "second.",
    sources=("D3", "nvidia2023", "li2024"),
    check="ratios of the stated figures",
    memory=2,
    rounded=2,
    efficient=1,
    line=10,
    file=1000,
    groq=1.67,
)
def hw(case: Case) -> None:
    ratio = case.number("memory", 141 / 80, "H200 over H100, GB", "×")
    case.number("rounded", round(141 / 80), "the same, rounded to a whole number", "×")
    efficient = case.number("efficient", 6 / 8, "speed-up for each of 8 GPUs")
    line, file = case.number("line", 5e6 / 500e3, "tokens in a line"), case.number("file", 5e6 / 5e3, "tokens in a file")
    groq = case.number("groq", 800 / 480, "800 over 480", "×")
    case.compare("memory", within=0.05, part="memory")
    case.compare("rounded", within=0, part="memory", given="about twice means rounded to a whole number")
    case.compare("efficient", "<=", part="GPUs")
    for key in ("line", "file", "groq"):
        case.compare(key, part=key)
    case.states(
        f"141 / 80 = {ratio:.2f}; 6 of 8 is {efficient:.0%}; {line:.0f} tokens a line and {file:,.0f} a file; 800 / 480 = {groq:.2f}."
    )
