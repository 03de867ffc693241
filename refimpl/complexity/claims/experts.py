"""Mixtures of experts: parameters, operations, block-diagonal layers."""

import numpy as np

from refimpl.complexity.calculators import active_parameters, parameters
from refimpl.complexity.claims.record import Case, Claim, claim
from refimpl.complexity.claims.tools import slope
from refimpl.complexity.presets import PRESETS, Experts
from refimpl.core.numerics import silu
from refimpl.ops.experts.moe import moe

CLAIMS: list[Claim] = []


@claim(
    "moe",
    "Experts add capacity without adding computation.",
    sources=("D1", "D3", "shazeer2017", "fedus2021"),
    check="parameters and operations of a layer over one of its experts",
    jamba=1,
    top_one=1,
)
def moe_claim(case: Case) -> None:
    layer = next(b.channel for b in PRESETS["jamba-v0.1"].blocks if isinstance(b.channel, Experts))
    single = layer.expert.parameters(4096)
    capacity = case.number("capacity", layer.parameters(4096) / single, "parameters of Jamba's layer of experts over one MLP", "×")
    work = case.number("jamba", layer.active(4096) / single, "its operations over one MLP's", "×")
    case.number("top_one", Experts(layer.count, 1, layer.expert).active(4096) / single, "operations if one expert is picked", "×")
    total, active = (
        case.number(key, f("mixtral-8x7b") / 1e9, f"Mixtral's parameters, {key}", "10⁹")
        for key, f in (("all", parameters), ("active", active_parameters))
    )
    case.compare("jamba")
    case.compare("top_one", given="each token goes to one expert")
    case.states(
        f"With one expert a token. Jamba picks two: {capacity:.0f} times the parameters, {work:.0f} times the operations; Mixtral "
        f"{total:.1f} and {active:.1f} billion, all of which must be resident."
    )


@claim(
    "ffn",
    "The feed-forward network is linear in n and quadratic in d.",
    sources=("D3", "vaswani2017, section 3.3"),
    check="operations of a layer, and of a run",
    n=1,
    d=2,
    constant=16,
)
def ffn(case: Case) -> None:
    work = lambda n, d: 2 * n * sum(matrix.size for matrix in (np.empty((d, 4 * d)), np.empty((4 * d, d))))
    case.number("n", slope(lambda n: work(n, 64), (256, 512)), "growth with n")
    case.number("d", slope(lambda d: work(64, d), (256, 512)), "growth with d")
    case.number("constant", work(64, 64) / 64**3, "operations over n d²")
    for key in ("n", "d", "constant"):
        case.compare(key, within=1e-9)
    case.states("16 n d² for a hidden width of 4 d.")


@claim(
    "m2moe",
    "A block-diagonal MLP is a mixture of experts without a router.",
    sources=("D3", "fu2023, section 4"),
    check="blocks against experts that read and write their own features",
    error=1e-13,
    parameters=0.25,
)
def m2moe(case: Case) -> None:
    rng = np.random.default_rng(0)
    T, b, d, f = 10, 4, 3, 8
    x = rng.standard_normal((T, b * d))
    w_in, w_out = rng.standard_normal((b, d, f)), rng.standard_normal((b, f, d))
    blocks = np.concatenate([silu(x[:, i * d : (i + 1) * d] @ w_in[i]) @ w_out[i] for i in range(b)], axis=1)
    wide_in, wide_out = np.zeros((b, b * d, f)), np.zeros((b, f, b * d))
    for i in range(b):
        wide_in[i, i * d : (i + 1) * d], wide_out[i, :, i * d : (i + 1) * d] = w_in[i], w_out[i]
    experts = b * moe(x, np.zeros((b * d, b)), wide_in, wide_out, k=b)
    case.number("error", abs(experts - blocks).max() / abs(blocks).max(), "all experts with equal weights against the blocks, relative")
    case.number("parameters", (w_in.size + w_out.size) / (2 * (b * d) * (b * f)), "parameters over those of a dense MLP of that width")
    case.compare("error", "<=")
    case.compare("parameters", within=0)
    case.states(f"Equal to rounding ({case.numbers['error'].value:.0e}), with 1/{b} of the dense parameters in {b} blocks.")
