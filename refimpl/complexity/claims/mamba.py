"""Mamba and SSD: selection, its scan, its memory."""

import numpy as np

from refimpl.catalogue import catalogue
from refimpl.complexity.calculators import kv_cache_bytes, parameters, state_bytes, weight_bytes
from refimpl.complexity.claims.record import NOT_MEASURED, Case, Claim, claim
from refimpl.complexity.claims.tools import A100, KIB, call_of, counted, form, lengths, per_state, slope
from refimpl.complexity.presets import PRESETS, Attention, Experts
from refimpl.core.numerics import sigmoid, softplus
from refimpl.ops.recurrence.linear_recurrence import linear_recurrence
from refimpl.ops.state_space.discretize_diagonal import discretize_diagonal
from refimpl.ops.state_space.selective_scan import selective_scan
from refimpl.ops.state_space.ssd import ssd
from refimpl.ops.state_space.ssm import ssm

CLAIMS: list[Claim] = []
GB, MB = 1e9, 1e6


def scan_call(seed: int = 0, **sizes: int) -> dict[str, np.ndarray]:
    """Arrays that a selective scan cannot do without."""
    call = call_of("selective_scan", seed, **sizes)
    return {name: call[name] for name in ("u", "delta", "A", "B", "C")}


def decay(step: float, method: str = "zoh") -> float:
    return float(discretize_diagonal(np.array([-1.0]), np.array([1.0]), np.array([step]), method=method)[0][0])


@claim(
    "T-lim",
    "A step near 0 keeps the state, a long one favours the input.",
    sources=("D4", "gu2023, section 3.5"),
    check="decay of x' = -x at short and long steps",
    short=0.99,
    long=0.01,
    euler_long=0.01,
)
def t_lim(case: Case) -> None:
    case.number("short", decay(1e-3), "decay e^{aT} at T = 0.001")
    case.number("long", decay(20.0), "decay e^{aT} at T = 20")
    flip = case.number("euler_mid", decay(1.5, "euler"), "Euler's decay at T = 1.5")
    far = case.number("euler_long", abs(decay(20.0, "euler")), "size of Euler's decay at T = 20")
    case.number("euler_short", decay(1e-3, "euler"), "Euler's decay at T = 0.001")
    case.compare("euler_long", "<=", "euler_long")
    for key, relation in (("short", ">="), ("long", "<=")):
        case.compare(key, relation, given="the decay is e^{aT}")
    steps = np.linspace(0.01, 3, 60)
    case.curves(
        "step",
        "decay of x' = -x, absolute",
        exponential=(steps, [decay(h) for h in steps]),
        euler=(steps, [abs(decay(h, "euler")) for h in steps]),
    )
    case.states(f"With e^{{aT}}. Euler's 1 + aT changes sign past T |a| = 1 ({flip:.1f} at 1.5) and grows past 2 ({far:.0f} at 20).")


@claim(
    "T-pos", "The step is always positive.", sources=("D4", "gu2023, section 3.6"), check="softplus in single precision", single=0, double=0
)
def t_pos(case: Case) -> None:
    case.number("single", softplus(np.array([-110.0], np.float32))[0], "softplus(-110) in single precision")
    case.number("double", softplus(np.array([-110.0]))[0], "softplus(-110) in double precision")
    grid = np.arange(-120, -90, 0.01, dtype=np.float32)
    limit = case.number("limit", grid[softplus(grid) == 0].max(), "below it, softplus is 0 in single precision")
    case.compare("single", ">", "single")
    case.compare("double", ">", "double", given="nothing is rounded to 0")
    case.states(f"As mathematics; in single precision softplus is 0 below {limit:.0f}, and such a step keeps the state exactly.")


@claim(
    "A-input",
    "In Mamba the matrices A, B, C depend on the input.",
    sources=("D3", "gu2023, section 3.2"),
    check="axes of the operator's arguments, and the decay of two steps",
    A=True,
    B=True,
    C=True,
)
def a_input(case: Case) -> None:
    arrays = {a.name: a for a in catalogue()["selective_scan"].contract.arrays}
    for name in "ABC":
        case.number(name, any("T" in shape.axes for shape in arrays[name].shapes), f"{name} has an axis of time")
        case.compare(name)
    call = scan_call(T=8)
    steps = np.exp(call["delta"][..., None] * call["A"])
    case.number("decay", abs(steps[..., 1:, :, :] - steps[..., :-1, :, :]).max(), "largest change of exp(T A) from a step to the next")
    case.states("A is fixed; B, C and the step vary with the input, and through the step the decay exp(T A) does.")
    case.disagree("D4 says that A is fixed.")


@claim(
    "seqtrain",
    "Selection rules out the convolution; training goes through a scan in O(log N).",
    sources=("D3", "gu2023, section 3.3"),
    check="depth and work of the scan; scan against recurrence",
    error=1,
    work=0,
    depth=0,
)
def seqtrain(case: Case) -> None:
    call = scan_call(T=256, c=2, n=4)
    error = case.equal(
        "error",
        "selective_scan",
        form("selective_scan", "associative")(**call),
        selective_scan(**call),
        call,
        "associative scan against recurrence",
        part="equal",
    )
    n = 256
    scan = counted("selective_scan", "associative")
    levels = case.number("levels", int(np.log2(n)), "levels of the scan at 256 tokens")
    products = case.number("products", _tree_products(n), "compositions in the up and the down sweep, 256 tokens")
    case.number("work", scan.work.power, "growth of the work, the time on one processor: power")
    case.number("depth", scan.depth.power, "growth of the depth, the time on n processors: power")
    case.number("logs", scan.depth.logs, "the same: logarithms")
    case.compare("work", "<=", part="O(log N)")
    case.compare("depth", "<=", part="O(log N)", given="there are as many processors as tokens")
    case.states(
        f"On n processors: {levels} levels at 256 tokens, {products} = 2 (n - 1) compositions, equal to {error:.0e}. Training is not "
        f"forced to be sequential."
    )


def _tree_products(n: int) -> int:
    """Compositions of an up sweep and a down sweep over n leaves, level by level."""
    up = sum(n >> level for level in range(1, n.bit_length()))
    return 2 * up


@claim(
    "implicit",
    "Mamba is an implicit causal attention.",
    sources=("D3", "ali2024, section 3"),
    check="the matrix that the scan applies",
    error=1,
)
def implicit(case: Case) -> None:
    call = scan_call(T=48, c=2, n=4)
    error = case.equal(
        "error", "selective_scan", form("selective_scan", "attention")(**call), selective_scan(**call), call, "matrix against recurrence"
    )
    T = 48
    columns = [
        selective_scan(**call | {"u": np.broadcast_to((np.arange(T) == j)[:, None] * 1.0, call["u"].shape).copy()})[..., 0]
        for j in range(T)
    ]
    matrix = np.stack(columns, axis=-1)  # (..., T, T), channel 0
    matrix = matrix.reshape(-1, T, T)[0]
    case.number("future", abs(np.triu(matrix, 1)).max(), "largest entry above the diagonal")
    low, high = (
        case.number("row_low", matrix.sum(axis=1).min(), "smallest sum of a row"),
        case.number("row_high", matrix.sum(axis=1).max(), "largest sum of a row"),
    )
    case.states(
        f"Equal to rounding ({error:.0e}) and causal; but its entries have signs and its rows sum to anything ({low:.1f} to {high:.1f})."
    )


@claim(
    "gru",
    "Mamba's selection is the update gate of a GRU, for one state with a = -1 and B = 1 under zero-order hold.",
    sources=("D3", "gu2023, theorem 1", "cho2014"),
    check="both recurrences on the same input",
    error=1,
)
def gru_gate(case: Case) -> None:
    rng = np.random.default_rng(0)
    z, x = rng.standard_normal((2, 64, 4)) * 2
    a, b = discretize_diagonal(-np.ones((64, 4)), np.ones((64, 4)), softplus(z), method="zoh")
    got = linear_recurrence(a, b * x)
    g = sigmoid(z)
    gate = {"a": 1 - g, "b": g * x}
    error = case.equal("error", "linear_recurrence", got, linear_recurrence(**gate), gate, "selection against a gate")
    steps = softplus(z)
    theirs = case.number(
        "code",
        abs(linear_recurrence(np.exp(-steps), steps * x) - linear_recurrence(**gate)).max(),
        "the same with B̄ = T B, as Mamba's code has it",
    )
    case.states(
        f"exp(-softplus z) = 1 - σ(z): the two agree to {error:.0e}; "
        f"with T B for the input, as Mamba's code has it, they differ by {theirs:.1f}."
    )


@claim("reset", "The gate can erase the state.", sources=("D3", "gu2023, section 3.5"), check="what is left after one long step", left=1e-3)
def reset(case: Case) -> None:
    one = np.ones((2, 1))
    delta = np.array([[1.0], [10.0]])
    kept = selective_scan(np.array([[1.0], [0.0]]), delta, -np.ones((1, 1)), one, one)
    left = case.number("left", kept[1, 0] / kept[0, 0], "share of the state after a step of T |a| = 10")
    case.compare("left", "<=")
    case.states(f"e^-10 = {left:.1e} is left.")


@claim(
    "membound",
    "An SSM is bound by bandwidth.",
    sources=("D2", "gu2023, section 3.3.2"),
    check="operations for a byte, N = 16, against the A100's ridge in fp32",
    fused=9.56,
    unfused=9.56,
)
def membound(case: Case) -> None:
    each = case.number("each", per_state(), "operations for a state and a step, counted")
    ridge = case.number("ridge", A100["fp32"] / A100["bytes"], "operations for a byte at which an A100 is balanced in fp32")
    unfused = case.number("unfused", each / 12, "decay, input and state written and read, 2 bytes each")
    fused = case.number("fused", each * 16 / 6, "input and step read, output written, 2 bytes each, 16 states in registers")
    case.compare("fused", "<=")
    case.compare("unfused", "<=", given="the states are written to the large memory (an unfused scan)")
    case.states(f"Unfused: {unfused:.2f} operations for a byte; a fused scan of 16 states has {fused:.0f}, past the ridge of {ridge:.1f}.")


@claim(
    "naive",
    "A naive SSM is slower than a Transformer.",
    sources=("D2", "gu2023, section 3.3.2"),
    check="bytes moved for a token and a channel; times",
    fused=1,
    unfused=1,
)
def naive(case: Case) -> None:
    attention = 4 * 2  # a fused attention reads q, k, v and writes o
    fused = case.number("fused", 6 / attention, "bytes of a fused scan over those of a fused attention", "×")
    unfused = case.number("unfused", 12 * 16 / attention, "the same for a scan that writes 16 states", "×")
    ratio = case.number("states", 12 * 16 / 6, "unfused over fused scan", "×")
    case.compare("fused", ">")
    case.compare("unfused", ">", given="its states are written to the large memory")
    case.open("that it is slower", "times of an unfused scan and of attention on one GPU", NOT_MEASURED)
    case.states(
        f"It moves {ratio:.0f} times the bytes of a fused scan, {unfused:.0f} times those of a fused attention; a fused one moves "
        f"fewer ({fused:.2f})."
    )


@claim(
    "sramfit",
    "The state is always held in fast memory.",
    sources=("D2", "gu2023, section 3.3.2"),
    check="bytes of a layer's state against a multiprocessor's 192 KiB",
    whole=192 * KIB,
    split=192 * KIB,
)
def sramfit(case: Case) -> None:
    mixer = PRESETS["mamba-2.8b"].blocks[0].mixer
    whole = case.number("whole", mixer.state(2560)[0] * 4, "state of a layer of Mamba 2.8B in fp32", "bytes")
    split = case.number("split", whole / A100["sms"], "its share on each of 108 multiprocessors", "bytes")
    case.compare("whole", "<=")
    case.compare("split", "<=", given="channels are split over the multiprocessors")
    case.states(
        f"A layer's {whole / 1e3:.0f} KB exceed the 192 KiB of one multiprocessor; split over 108 they are {split / 1e3:.0f} KB each."
    )


@claim("state", "The state of a Mamba model takes a few hundred MB.", sources=("D2",), check="byte formula, batch 1", largest=200)
def state(case: Case) -> None:
    for key, name, bits, window in (
        ("mamba", "mamba-2.8b", 16, False), ("mamba_conv", "mamba-2.8b", 16, True), ("mamba_fp32", "mamba-2.8b", 32, False),
        ("mamba_fp32_conv", "mamba-2.8b", 32, True), ("mamba2", "mamba2-2.7b", 16, False), ("mamba2_fp32", "mamba2-2.7b", 32, False),
    ):  # fmt: skip
        case.number(
            key,
            state_bytes(name, bits=bits, window=window) / MB,
            f"{name}, {bits} bits" + (", with the convolution's window" if window else ""),
            "MB",
        )
    case.number("largest", max(n.value for n in case.numbers.values()), "largest of them", "MB")
    case.compare("largest", ">=")
    value = lambda key: case.numbers[key].value
    case.states(
        f"Batch 1: {value('mamba'):.1f} MB ({value('mamba_conv'):.1f} with the convolution's window; {value('mamba_fp32'):.1f} and "
        f"{value('mamba_fp32_conv'):.1f} in fp32);"
        f" Mamba-2 {value('mamba2'):.1f}, in fp32 {value('mamba2_fp32'):.1f}."
    )


@claim("w-3b", "The weights of a 3B model take about 6 GB.", sources=("D2",), check="byte formula", size=6)
def w_3b(case: Case) -> None:
    size = case.number("size", weight_bytes("mamba-2.8b") / GB, "Mamba 2.8B in 16 bits", "GB")
    case.compare("size", within=0.1)
    case.states(f"{parameters('mamba-2.8b') / 1e9:.3f} billion parameters, {size:.2f} GB.")


@claim(
    "mem-n2",
    "Memory: Mamba's is linear, the Transformer's quadratic, so that it runs out.",
    sources=("D2",),
    check="growth of what a run keeps alive",
    mamba=1,
    tiled=2,
    dense=2,
)
def mem_n2(case: Case) -> None:
    runs = {"mamba": counted("selective_scan", "recurrent"), "dense": counted("attention", "dense"), "tiled": counted("attention", "tiled")}
    for key, run in runs.items():
        case.number(key, run.peak.power, f"growth of what a run keeps alive, counted: {key}")
    case.number("cache", slope(lambda n: kv_cache_bytes("llama2-7b", n), lengths(2**12, 2**20)), "growth of a cache")
    case.compare("mamba", within=0, part="Mamba")
    case.compare("tiled", within=0, part="Transformer")
    case.compare("dense", within=0, part="Transformer", given="attention is not fused")
    case.curves("tokens", "bytes alive, counted", **{k: (list(r.counts), [c.peak for c in r.counts.values()]) for k, r in runs.items()})
    case.states("If the map is written down; with tiles and a cache, a Transformer's memory is linear too.")


@claim(
    "ssd",
    "SSMs and attention are dual; Mamba-2 is 2 to 8 times faster.",
    sources=("D2", "dao2024, theorem 3.5"),
    check="quadratic and chunked form against the recurrence; times",
    quadratic=1,
    chunked=1,
    speed=2,
)
def ssd_claim(case: Case) -> None:
    call = call_of("ssd", T=96)
    right = ssd(**call)
    error = max(
        case.equal(name, "ssd", form("ssd", name)(**call), right, call, f"{name} form against the recurrence")
        for name in ("quadratic", "chunked")
    )
    case.timing(
        "speed",
        {"op": "selective_scan", "implementation": "mamba_ssm"},
        {"op": "ssd", "implementation": "mamba_ssm"},
        "Mamba over Mamba-2, 2 to 8 times",
    )
    case.states(f"For one decay per head and step (scalar A): a masked attention and the recurrence agree to {error:.0e}.")


@claim(
    "mislabel",
    "Mamba has Transformer and mixture-of-experts layers, a context of 256K, and three times Mixtral's throughput.",
    sources=("D1", "lieber2024", "gu2023"),
    check="layers of the published models",
    attention=0,
    experts=0,
)
def mislabel(case: Case) -> None:
    count = lambda name, kind: sum(b.count for b in PRESETS[name].blocks if isinstance(b.mixer, kind) or isinstance(b.channel, kind))
    for key, kind in (("attention", Attention), ("experts", Experts)):
        case.number(key, count("mamba-2.8b", kind), f"layers of {key} in Mamba 2.8B")
        case.number(f"jamba_{key}", count("jamba-v0.1", kind), f"layers of {key} in Jamba v0.1")
        case.compare(key, ">")
    case.states(
        f"That is Jamba: {case.numbers['jamba_attention'].value} layers of attention and {case.numbers['jamba_experts'].value} of "
        f"experts among 32; Mamba has none of either."
    )
    case.disagree("D1 quotes the abstract of Mamba, which says that it has neither attention nor MLP blocks.")


@claim(
    "thruput",
    "Mamba 1.4B generates twice as fast at 2K tokens, five times at 16K, more than five at 131K.",
    sources=("D2", "gu2023, section 4.5"),
    check="times",
    short=2,
    middle=5,
    long=5,
)
def thruput(case: Case) -> None:
    slow, fast = {"op": "generation", "implementation": "transformer-1.3b"}, {"op": "generation", "implementation": "mamba-1.4b"}
    for key, n in (("short", 2048), ("middle", 16384), ("long", 131072)):
        case.timing(key, slow | {"T": n}, fast | {"T": n}, f"Transformer over Mamba at {n:,} tokens")
    case.states("The cited section measures 4 to 5 times, from larger batches; it has no figures by length.")


@claim(
    "select",
    "Gating by the data is essential.",
    sources=("D3", "gu2023, section 3.1"),
    check="a token kept through 50 distractors",
    lti=1e-6,
    gated=0,
)
def select(case: Case) -> None:
    rng = np.random.default_rng(0)
    T = 51
    u = np.concatenate([[1.0], rng.standard_normal(T - 1)])[:, None]
    one = np.ones((1, 1))
    lti = ssm(u, 0.98 * one, one, one) - ssm(u * (np.arange(T) == 0)[:, None], 0.98 * one, one, one)
    leaked = case.number("lti", abs(lti[-1, 0]), "what distractors add to the state of a time-invariant system")
    steps = np.where(np.arange(T) == 0, 1.0, 0.0)[:, None]
    ones = np.ones((T, 1))
    y = selective_scan(u, steps, -one, ones, ones)
    kept = case.number("gated", abs(y[-1, 0] - y[0, 0]), "change of the kept token when the step is 0 at distractors")
    case.compare("lti", ">")
    case.compare("gated", "<=")
    case.open("that models without it are worse", "training")
    case.states(
        f"As a mechanism: a time-invariant system lets distractors in ({leaked:.1f}); a step of 0 keeps the token exactly (change "
        f"{kept:.0f})."
    )
