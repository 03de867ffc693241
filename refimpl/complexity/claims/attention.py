"""Attention: how many pairs there are, what they cost, what the map is."""

import numpy as np

from refimpl.complexity.calculators import attention_map_bytes, attention_pairs, layer_flops, parameters, sequence_flops
from refimpl.complexity.claims.record import NOT_MEASURED, Case, Claim, claim
from refimpl.complexity.claims.tools import GIB, MIB, counted, form, lengths, per_state, qkv, slope
from refimpl.complexity.presets import PRESETS
from refimpl.core.numerics import silu, softmax
from refimpl.ops.attention.attention import attention

CLAIMS: list[Claim] = []
GPT3_WIDTH = 12288


def map_flops(n: int, d: int) -> int:
    """Scores and weighted values of all pairs."""
    return 4 * n * n * d


@claim(
    "handshake",
    "Everybody shaking hands: 10 people make 45 pairs, 20 make 190, more than four times as many.",
    sources=("D2",),
    check="n (n - 1) / 2, counted",
    ten=45,
    twenty=190,
    ratio=4,
)
def handshake(case: Case) -> None:
    pairs = {n: int(np.triu(np.ones((n, n), bool), 1).sum()) for n in (10, 20)}
    case.number("ten", pairs[10], "pairs of 10")
    case.number("twenty", pairs[20], "pairs of 20")
    case.number("ratio", pairs[20] / pairs[10], "their ratio")
    case.compare("ten", within=0)
    case.compare("twenty", within=0)
    case.compare("ratio", ">")
    case.states(f"n (n - 1) / 2 pairs: {pairs[10]} and {pairs[20]}, {pairs[20] / pairs[10]:.2f} times as many.")


@claim(
    "pairs",
    "1,000 tokens make a million scores, 100,000 make ten billion.",
    sources=("D2", "vaswani2017, table 1"),
    check="pairs of query and key",
    short=1e6,
    long=1e10,
)
def pairs(case: Case) -> None:
    case.number("short", attention_pairs(1000, causal=False), "scores of 1,000 tokens without a mask")
    case.number("long", attention_pairs(100_000, causal=False), "scores of 100,000 tokens without a mask")
    causal = case.number("causal", attention_pairs(1000), "scores of 1,000 tokens that a causal mask leaves")
    case.compare("short", within=0)
    case.compare("long", within=0)
    n = lengths(256, 2**20)
    case.curves("tokens", "scores", all=(n, [m * m for m in n]), causal=(n, [attention_pairs(m) for m in n]))
    case.states(f"n² without a mask; a causal model needs about half, {causal:,} for 1,000 tokens.")


@claim(
    "double",
    "Twice the length makes four times the work.",
    sources=("D1", "D2", "D3", "D4", "vaswani2017, table 1"),
    check="operations of one layer, counted",
    factor=4,
)
def double(case: Case) -> None:
    d = GPT3_WIDTH
    case.number("map", map_flops(2048, d) / map_flops(1024, d), "the map's work, 1,024 to 2,048 tokens", "×")
    whole = case.number(
        "factor", layer_flops(2048, d) / layer_flops(1024, d), f"the whole layer's work at width {d:,}, 1,024 to 2,048 tokens", "×"
    )
    case.compare("factor")
    case.compare("map", claimed="factor", given="only scores and weighted values are counted")
    n = lengths(256, 2**20)
    case.curves(
        "tokens",
        "operations of one layer, d = 12,288",
        whole_layer=(n, [layer_flops(m, d) for m in n]),
        map=(n, [map_flops(m, d) for m in n]),
    )
    case.states(f"The map's work grows fourfold; the whole layer's {whole:.2f}-fold at GPT-3's width, since its matrices cost 24 n d².")


@claim(
    "ctx125",
    "From 1,024 to 128,000 tokens attention costs about 15,000 times more.",
    sources=("D2",),
    check="pairs of query and key",
    factor=15_000,
)
def ctx125(case: Case) -> None:
    d = GPT3_WIDTH
    case.number("factor", attention_pairs(128_000, causal=False) / attention_pairs(1024, causal=False), "ratio of scores", "×")
    whole = case.number("layer", layer_flops(128_000, d) / layer_flops(1024, d), f"ratio of the whole layer's work, width {d:,}", "×")
    case.compare("factor", within=0.05)
    case.states(f"125² = 15,625 for the map; a whole layer of GPT-3's width costs {whole:.0f} times more.")


@claim(
    "train32k",
    "A training example of 32K tokens costs 1,024 times one of 1K.",
    sources=("D2",),
    check="operations of one layer",
    factor=1024,
)
def train32k(case: Case) -> None:
    d, n, m = 4096, 1024, 32 * 1024
    whole = case.number("factor", layer_flops(m, d) / layer_flops(n, d), "ratio of the whole layer's work, width 4,096", "×")
    causal = case.number("causal", layer_flops(m, d, causal=True) / layer_flops(n, d, causal=True), "the same, causal", "×")
    case.number("map", map_flops(m, d) / map_flops(n, d), "ratio of the map's work, for an example", "×")
    token = case.number("token", map_flops(m, d) / m / (map_flops(n, d) / n), "ratio of the map's work, for a token", "×")
    case.compare("factor")
    case.compare("map", claimed="factor", given="only the map's work is counted, for an example and not for a token")
    case.states(
        f"1,024 for the map of one example, {token:.0f} for a token of it; a layer of width 4,096 costs {whole:.1f} times more (causal "
        f"{causal:.1f})."
    )


@claim(
    "pages",
    "Fifty pages cost quadratically more than twenty-five.",
    sources=("D2",),
    check="operations of one layer, 500 tokens a page",
    factor=4,
)
def pages(case: Case) -> None:
    d, n = 8192, 25 * 500
    full = case.number("factor", layer_flops(2 * n, d) / layer_flops(n, d), "ratio of a whole layer's work, width 8,192", "×")
    causal = case.number("causal", layer_flops(2 * n, d, causal=True) / layer_flops(n, d, causal=True), "the same, causal", "×")
    case.compare("factor", within=0.1)
    case.states(f"At 12,500 tokens the matrices still cost more than the map: {full:.2f} times (causal {causal:.2f}), not 4.")


@claim(
    "Ln2d",
    "Inference is O(L n² d), with n the number of parameters and d the depth.",
    sources=("D1",),
    check="operations of a model, and their growth",
    share=0.5,
    exponent=2,
    per_parameter=1,
)
def ln2d(case: Case) -> None:
    config, d, n = PRESETS["gpt3-175b"], GPT3_WIDTH, 2048
    share = case.number("share", map_flops(n, d) / layer_flops(n, d), "the n² d term's share of a GPT-3 layer at its own 2,048 tokens")
    case.compare("share", ">=", part="n² d is the leading term")
    cross = case.number(
        "lead",
        next(m for m in range(d, 8 * d, d) if map_flops(m, d) >= layer_flops(m, d) - map_flops(m, d)) / d,
        "tokens from which the n² d term leads, in widths",
    )
    case.number("exponent", slope(lambda m: 4 * m * d, lengths(2**16, 2**20)), "growth of a cached token's scores with n")
    case.compare("exponent", within=0.01, part="a token costs n²")
    count = parameters(config)
    case.number(
        "per_parameter",
        config.layers * float(count) ** 2 * config.layers / sequence_flops(config, n),
        "L n² d with n = parameters and d = depth, over the operations of 2,048 tokens",
    )
    case.compare("per_parameter", within=1.0, part="n is the number of parameters")
    case.states(
        f"n is the number of tokens and d the width; O(L n d²) is missing and leads until n = {cross:.0f} d ({share:.1%} for the map "
        f"at 2,048); a cached token costs O(L n d)."
    )
    case.disagree("D1 calls n the number of parameters and, elsewhere, the number of tokens.")


@claim(
    "half",
    "Attention and the feed-forward network do about half of the work each.",
    sources=("D3",),
    check="operations of one layer",
    share=0.5,
)
def half(case: Case) -> None:
    d, n = GPT3_WIDTH, 2048
    attention_share = lambda n, d: (8 * n * d * d + map_flops(n, d)) / layer_flops(n, d)
    share = case.number("share", attention_share(n, d), "attention with its projections, GPT-3 at 2,048 tokens")
    map_share = case.number("map", map_flops(n, d) / layer_flops(n, d), "the map alone")
    case.number("balanced", attention_share(2 * d, d), "the same at n = 2d")
    case.compare("share", within=0.1)
    case.compare("balanced", claimed="share", given="n is about 2d and the projections are counted as attention")
    n_axis = lengths(256, 2**18)
    case.curves(
        "tokens",
        "share of a layer of width 12,288",
        attention=(n_axis, [attention_share(m, d) for m in n_axis]),
        map_alone=(n_axis, [map_flops(m, d) / layer_flops(m, d) for m in n_axis]),
    )
    case.states(f"Equal at n = 2d; GPT-3 at 2,048 tokens spends {share:.0%} on attention, {map_share:.1%} on the map.")


@claim(
    "map",
    "One head's map takes 2 MB at 1,024 tokens, 128 MB at 8,192, 2 GB at 32,768, 32 GB at 131,072 and 2 TB at a million.",
    sources=("D2",),
    check="2 n² bytes",
    a=2,
    b=128,
    c=2,
    d=32,
    e=2,
)
def map_bytes(case: Case) -> None:
    for key, n, unit, name in (
        ("a", 1024, MIB, "MiB"),
        ("b", 8192, MIB, "MiB"),
        ("c", 32768, GIB, "GiB"),
        ("d", 131072, GIB, "GiB"),
        ("e", 10**6, 1e12, "TB"),
    ):
        case.number(key, attention_map_bytes("gpt3-175b", n, heads=1) / unit, f"map of {n:,} tokens", name)
        case.compare(key)
    n_axis = lengths(1024, 2**20)
    case.curves("tokens", "bytes of one head's map, 16 bits", map=(n_axis, [attention_map_bytes("gpt3-175b", m, heads=1) for m in n_axis]))
    case.states(f"In units of 1,024 up to 32 GiB; a million tokens are {case.numbers['e'].value:.2f} TB ({2e12 / 2**40:.2f} TiB).")


@claim(
    "gpt3map",
    "The maps of GPT-3's 96 heads in 96 layers take a little over 10 GB at 8K tokens.",
    sources=("D2",),
    check="2 H L n² bytes",
    low=10,
    high=20,
)
def gpt3map(case: Case) -> None:
    one = case.number("one_layer", attention_map_bytes("gpt3-175b", 8192) / 1e9, "maps of one layer", "GB")
    every = case.number("all_layers", attention_map_bytes("gpt3-175b", 8192, layers=96) / 1e9, "maps of all layers", "GB")
    own = case.number("own_one", attention_map_bytes("gpt3-175b", 2048) / 1e9, "one layer at its own 2,048 tokens", "GB")
    own_all = case.number("own_all", attention_map_bytes("gpt3-175b", 2048, layers=96) / 1e9, "all layers at 2,048 tokens", "GB")
    for key, given in (("all_layers", ""), ("one_layer", "one layer's maps are alive at a time")):
        case.compare(key, ">=", "low", given=given)
        case.compare(key, "<=", "high", given=given)
    case.states(f"{one:.1f} GB for one layer, {every:,.0f} GB for all 96; GPT-3's own context is 2,048 ({own:.2f} and {own_all:.1f} GB).")


@claim("nxn", "The n × n map must be stored.", sources=("D1", "D2", "D3"), check="the largest array of a run", exponent=2)
def nxn(case: Case) -> None:
    runs = {name: counted("attention", name) for name in ("dense", "tiled")}
    case.number("dense", runs["dense"].peak.power, "growth of what the dense form keeps alive, counted")
    tiled = case.number("exponent", runs["tiled"].peak.power, "growth of what the tiled form keeps alive, counted")
    call = qkv(96, 16)
    case.number(
        "same",
        float(abs(form("attention", "tiled")(**call, block_q=32, block_k=32) - attention(**call)).max()),
        "largest difference of their results",
    )
    case.compare("exponent", within=0)
    case.curves(
        "tokens",
        "bytes alive, one head of 4, counted",
        **{name: (list(run.counts), [c.peak for c in run.counts.values()]) for name, run in runs.items()},
    )
    case.states(f"Tiling keeps O(n d) alive (counted exponent {tiled:.0f}) and gives the same result.")
    case.disagree("D2 and D3 say so beside their own description of FlashAttention, which does not store it.")


@claim(
    "rowcol",
    "The map is a product of weight matrices, and its rows and columns are correlations between words.",
    sources=("D3",),
    check="two maps of seeded inputs",
    moves=0,
    column_low=1,
    column_high=1,
    asymmetry=0,
)
def rowcol(case: Case) -> None:
    rng = np.random.default_rng(0)
    n, d = 64, 32
    wq, wk = rng.standard_normal((2, d, d)) * 2 / np.sqrt(d)
    first, second = (attention(x @ wq, x @ wk, np.eye(n)) for x in rng.standard_normal((2, n, d)))
    case.number("moves", abs(first - second).max(), "largest change of an entry when the words change and the weights do not")
    case.number("rows", abs(first.sum(axis=1) - 1).max(), "largest distance of a row's sum from 1")
    low = case.number("column_low", first.sum(axis=0).min(), "smallest sum of a column")
    high = case.number("column_high", first.sum(axis=0).max(), "largest sum of a column")
    case.number("asymmetry", abs(first - first.T).max(), "largest difference of an entry from its mirror image")
    case.compare("moves", "<=")
    case.compare("column_low", within=0.1)
    case.compare("column_high", within=0.1)
    case.compare("asymmetry", "<=")
    case.states(
        f"The map is made of activations; its rows sum to 1, its columns to anything ({low:.3f} to {high:.2f} here), and it is not "
        f"symmetric: weights of a mean, not correlations."
    )


@claim(
    "peaky",
    "Softmax leaves few entries that are not practically zero.",
    sources=("D3",),
    check="1 / Σ p² of 100,000 normal logits, its share of the row",
    share=0.05,
)
def peaky(case: Case) -> None:
    n = 100_000
    logits = np.random.default_rng(0).standard_normal((16, n))
    shares = []
    for sigma in (1, 2, 3):
        p = softmax(sigma * logits)
        shares.append(
            case.number(
                "share" if sigma == 1 else f"share_{sigma}",
                float(np.mean(1 / (p**2).sum(axis=-1))) / n,
                f"effective share of the row, logits of standard deviation {sigma}",
            )
        )
    case.compare("share", "<=")
    case.compare("share_2", "<=", "share", given="the logits are wide (a standard deviation of 2 or more)")
    case.compare("share_3", "<=", "share", given="the logits are wide (a standard deviation of 2 or more)")
    case.states(
        f"{shares[0]:.0%}, {shares[1]:.1%} and {shares[2]:.2%} of the entries count at standard deviations 1, 2 and 3 (e^-σ² for long "
        f"rows); at initialisation it is 1."
    )


@claim(
    "lossless",
    "Attention looks up anything at any distance exactly.",
    sources=("D3",),
    check="weight of one key among 100,000",
    weight=0.99,
)
def lossless(case: Case) -> None:
    n = 100_000
    weights = {}
    for gap in (5.0, np.log(n) + 5):
        keys = np.zeros((n, 1))
        keys[0] = gap
        weights[gap] = float(attention(np.ones((1, 1)), keys, keys / gap, scale=1.0)[0, 0])
    narrow, wide = weights.values()
    case.number("weight", narrow, "weight of the farthest key at a logit gap of 5")
    case.number("wide", wide, f"the same at a gap of ln n + 5 = {np.log(n) + 5:.1f}")
    case.compare("weight", ">=")
    case.compare("wide", ">=", "weight", given="the logit gap exceeds ln n by a few units")
    case.states(
        f"1 / (1 + (n - 1) e^-gap): {narrow:.4f} at a gap of 5 among 100,000 keys, {wide:.4f} at ln n + 5; distance does not matter, "
        f"the gap does."
    )


# Published models with local or banded attention, and where they say so.
LOCAL = {
    "GPT-3": "brown2020, section 2.1",
    "GPT-Neo": "published configuration: alternating global and local layers",
    "Mistral 7B": "jiang2023, section 2",
    "Griffin": "de2024, section 2.3",
}


@claim(
    "onlySWA",
    "Mistral's sliding window is the only public use of sparse attention in a large model.",
    sources=("D3",),
    check="models that state local attention; pairs within a window",
    others=0,
)
def only_swa(case: Case) -> None:
    config = PRESETS["mistral-7b"]
    window = next(a.window for _, a in config.attention() if a.window is not None)
    case.number("others", len(LOCAL) - 1, "other models that state local layers: " + ", ".join(n for n in LOCAL if n != "Mistral 7B"))
    case.compare("others", "<=")
    n = 131_072
    saved = case.number(
        "saved",
        attention_pairs(n, causal=False) / attention_pairs(n, window=window, causal=False),
        f"pairs saved by a window of 4,096 at {n:,} tokens",
        "×",
    )
    reach = case.number("reach", config.layers * window, "tokens that the stacked windows reach", "tokens")
    case.states(
        f"GPT-3 has locally banded layers too. A window of 4,096 saves {saved:.0f} times at {n:,} tokens, and 32 layers of it reach "
        f"{reach:,}."
    )
    case.disagree("D3 itself cites GPT-3's local layers.")


@claim(
    "mixing",
    "Attention mixes positions; the MLP mixes only channels.",
    sources=("D4", "vaswani2017, section 3.3"),
    check="one position perturbed",
    attention=0,
    mlp=0,
)
def mixing(case: Case) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 8))
    moved = x.copy()
    moved[3] += 1
    w1, w2 = rng.standard_normal((8, 32)), rng.standard_normal((32, 8))
    others = np.arange(12) != 3
    change = lambda f: float(abs(f(moved) - f(x))[others].max())
    case.number("attention", change(lambda x: attention(x, x, x)), "change elsewhere through attention")
    case.number("mlp", change(lambda x: silu(x @ w1) @ w2), "change elsewhere through an MLP")
    shifted = case.number(
        "channel_mix",
        change(lambda x: silu((0.5 * x + 0.5 * np.roll(x, 1, axis=0)) @ w1) @ w2),
        "change elsewhere through RWKV's token-shifted MLP",
    )
    case.compare("attention", ">")
    case.compare("mlp", "<=")
    case.states(
        f"A step elsewhere changes an MLP's output by exactly 0; RWKV's MLP sees the step before and is an exception ({shifted:.1f})."
    )
    case.disagree("D4 describes RWKV's recurrent MLP elsewhere.")


@claim(
    "short",
    "On short inputs attention and scans cost the same, since a scan has overheads.",
    sources=("D2",),
    check="operations for one token: 4 n d of the map, those counted for each of 16 states of 2 d channels",
    ratio=2,
)
def short(case: Case) -> None:
    each = case.number("each", per_state(), "operations of the scan for a state and a step, counted")
    scan = each * 16 * 2  # 16 states, and two channels for each feature of the residual stream
    tie = case.number(
        "tie", next(n for n in range(1, 1000) if 4 * n >= scan), "tokens from which the full map does more than the scan", "tokens"
    )
    causal = case.number("tie_causal", next(n for n in range(1, 1000) if 2 * n >= scan), "the same, causal", "tokens")
    case.number("ratio", 4 * 512 / scan, "map over scan at 512 tokens", "×")
    case.number("tiny", 4 * 64 / scan, "map over scan at 64 tokens", "×")
    case.compare("ratio", "<=")
    case.compare("tiny", "<=", "ratio", given="the input is of some dozens of tokens")
    case.open(
        "that a scan has overheads which short inputs show",
        "times of attention and selective_scan at 16 to 512 tokens on a GPU",
        NOT_MEASURED,
    )
    n = lengths(8, 4096)
    case.curves(
        "tokens",
        "operations for a token and a feature",
        map=(n, [4 * m for m in n]),
        causal_map=(n, [2 * m for m in n]),
        selective_scan=(n, [scan] * len(n)),
    )
    case.states(f"The map passes a scan of 16 states at {tie} tokens (causal {causal}): counted work is tied only there.")
