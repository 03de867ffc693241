"""xLSTM: gates, matrix memory, and what they cost."""

import numpy as np

from refimpl.catalogue import catalogue
from refimpl.complexity.claims.record import Case, Claim, claim
from refimpl.complexity.claims.tools import call_of, counted, form, lengths
from refimpl.complexity.growth import leading_term
from refimpl.complexity.presets import MLSTM
from refimpl.complexity.runs import run
from refimpl.core.numerics import log_sigmoid
from refimpl.ops.gated_rnn.mlstm import mlstm
from refimpl.ops.gated_rnn.slstm import slstm
from refimpl.ops.recurrence.linear_recurrence import linear_recurrence_vjp

CLAIMS: list[Claim] = []


@claim(
    "cec",
    "Gating stops gradients from vanishing.",
    sources=("D1", "hochreiter1997"),
    check="gradient of the last state with respect to the first input, 100 steps",
    open=0.5,
    half=0.5,
)
def cec(case: Case) -> None:
    def gradient(f: float) -> float:
        T = 101
        dy = np.zeros((T, 1))
        dy[-1] = 1
        return float(linear_recurrence_vjp(dy, np.full((T, 1), f), np.ones((T, 1)))["b"][0, 0])

    case.number("open", gradient(1.0), "gates of 1")
    half = case.number("half", gradient(0.9), "gates of 0.9")
    near = case.number("near", gradient(0.999), "gates of 0.999")
    case.compare("half", ">=")
    case.compare("open", ">=", given="the forget gate is near 1")
    case.states(f"Π f is what is left: {half:.1e} at f = 0.9, {near:.2f} at 0.999, all of it at 1.")


def by_scan(q, k, v, i, f):
    """mLSTM as one masked product, its sums of log gates by a parallel scan: no step waits for the one before."""
    T, d = q.shape[-2:]
    sums = form("linear_recurrence", "blelloch")(np.ones_like(f)[..., None], log_sigmoid(f)[..., None])  # (..., T, 1)
    exponents = np.where(np.tri(T, dtype=bool), sums - sums.mT + i[..., None, :], -np.inf)
    m = np.max(exponents, axis=-1, keepdims=True)
    weights = (q @ k.mT) / np.sqrt(d) * np.exp(exponents - m)
    return weights @ v / np.maximum(abs(np.sum(weights, axis=-1, keepdims=True)), np.exp(-m))


@claim(
    "mlstm",
    "mLSTM is fully parallel.",
    sources=("D1", "beck2024, section 2.3"),
    check="parallel form against the recurrence; depth of sLSTM's forms",
    error=1,
    power=0,
)
def mlstm_claim(case: Case) -> None:
    call = call_of("mlstm", T=96)
    error = case.equal("error", "mlstm", form("mlstm", "parallel")(**call), mlstm(**call), call, "parallel against recurrent")
    depth = case.number(
        "slstm",
        min(counted("slstm", name).depth.power for name in catalogue()["slstm"].forms),
        "growth of the depth of sLSTM's best form, counted: power",
    )
    plain = {name: call[name] for name in ("q", "k", "v", "i", "f")}
    case.number("by_scan", abs(by_scan(**plain) - mlstm(**plain)).max(), "the same with its gates summed by a scan")
    spans = {
        n: run(by_scan, {name: x[..., :n, :] if name in "qkv" else x[..., :n] for name, x in plain.items()}).depth
        for n in (4, 8, 16, 32, 64)
    }
    span = leading_term(spans)
    case.number("power", span.power, "growth of its depth, counted: power")
    case.number("logs", span.logs, "the same: logarithms")
    case.compare("power", "<=")
    case.curves(
        "tokens",
        "depth, counted",
        mLSTM_by_scan=(list(spans), list(spans.values())),
        sLSTM=(list(counted("slstm", "naive").counts), [c.depth for c in counted("slstm", "naive").counts.values()]),
    )
    case.states(
        f"Equal to {error:.0e}, in depth {span} if the gates are summed by a scan; sLSTM, which mixes its last output into its gates, is "
        f"not (its depth grows as n^{depth:.0f})."
    )


@claim(
    "expgate",
    "The stabiliser lets exponential gates run.",
    sources=("D1", "beck2024, section 2.2"),
    check="gates of e^1000; where the plain exponential overflows",
    stabilised=True,
)
def expgate(case: Case) -> None:
    call = call_of("mlstm", T=8)
    big = dict(call, i=call["i"] + 1000)
    case.number("stabilised", bool(np.all(np.isfinite(mlstm(**big)))), "mLSTM is finite at input gates of e^1000")
    gates = call_of("slstm", T=8)
    gates = dict(gates, i=gates["i"] + 1000)
    case.number("naive", bool(np.all(np.isfinite(form("slstm", "naive")(**gates)))), "sLSTM without a stabiliser is")
    case.number("with_stabiliser", bool(np.all(np.isfinite(slstm(**gates)))), "sLSTM with it is")
    single, half = (
        case.number(t, float(np.log(np.finfo(t).max.astype(float))), f"exponent at which e^x overflows in {t}")
        for t in ("float32", "float16")
    )
    case.compare("stabilised")
    case.states(f"Finite at e^1000 with the stabiliser; the plain exponential overflows at {single:.1f} in fp32 and {half:.1f} in fp16.")


def matrix_memory(d: int) -> int:
    """Elements of mLSTM's state for a head of d by d."""
    return MLSTM(1, d, d).state(d)[0]


@claim(
    "xmem",
    "xLSTM needs less memory than a Transformer.",
    sources=("D1", "beck2024, section 1"),
    check="elements of a head's state and of its cache",
    short=1,
    long=1,
)
def xmem(case: Case) -> None:
    first = {d: next(n for n in range(1, 4 * d) if 2 * n * d > matrix_memory(d)) for d in (128, 1024)}
    for d, n in first.items():
        case.number(f"tokens_{d}", n, f"tokens from which a cache of head size {d} is larger than the matrix", "tokens")
    case.number("short", matrix_memory(1024) / (2 * 256 * 1024), "matrix over cache, head size 1,024, 256 tokens")
    case.number("long", matrix_memory(1024) / (2 * 2048 * 1024), "the same at 2,048 tokens")
    case.compare("short", "<")
    case.compare("long", "<", given="there are more tokens than about half the head size")
    n_axis = lengths(8, 8192)
    case.curves(
        "tokens",
        "elements of a head of 1,024",
        cache=(n_axis, [2 * n * 1024 for n in n_axis]),
        matrix=(n_axis, [matrix_memory(1024)] * len(n_axis)),
    )
    case.states(f"From about half a head size of tokens on: {first[128]} at head size 128, {first[1024]} at 1,024.")


@claim(
    "xshort",
    "xLSTM is cheaper when sequences are not long.",
    sources=("D1",),
    check="operations for a token: 5 d² of the memory, 4 n d of attention",
    ratio=1,
)
def xshort(case: Case) -> None:
    d = 1024
    memory = 5 * d * d
    case.number("ratio", memory / (4 * 512 * d), "memory over attention at 512 tokens, head size 1,024", "×")
    case.number("long", memory / (4 * 8192 * d), "the same at 8,192 tokens", "×")
    wins = case.number(
        "wins", next(n for n in range(1, 8 * d) if 4 * n * d >= memory) / d, "tokens from which the memory is cheaper, in head sizes"
    )
    case.compare("ratio", "<")
    n_axis = lengths(16, 16384)
    case.curves(
        "tokens",
        "operations for a token, a head of 1,024",
        attention=(n_axis, [4 * n * d for n in n_axis]),
        matrix_memory=(n_axis, [memory] * len(n_axis)),
    )
    case.states(
        f"The reverse: it is cheaper on long ones, from n = {wins:.2f} d on; at 512 tokens and head size 1,024 it costs "
        f"{case.numbers['ratio'].value:.1f} times attention."
    )
