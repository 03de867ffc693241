"""Recall and memory: what a state of fixed size can keep."""

import numpy as np

from refimpl.complexity.calculators import state_bytes
from refimpl.complexity.claims.record import Case, Claim, claim
from refimpl.complexity.presets import PRESETS
from refimpl.ops.linear_attention.linear_attention import linear_attention
from refimpl.ops.state_space.hippo import hippo
from refimpl.ops.state_space.ssm import ssm

CLAIMS: list[Claim] = []


def capacity() -> tuple[float, float]:
    """Bits of Mamba 2.8B's state, and tokens of its vocabulary that they can tell apart."""
    bits = 8 * state_bytes("mamba-2.8b", window=False)
    return bits, bits / np.log2(PRESETS["mamba-2.8b"].vocabulary)


@claim(
    "lossy",
    "A state of fixed size must forget.",
    sources=("D2", "D3", "jelassi2024, theorem 2.7"),
    check="bits of the state against bits of the text",
    needed=1,
)
def lossy(case: Case) -> None:
    bits, tokens = capacity()
    case.number("Mbit", bits / 1e6, "bits of Mamba 2.8B's state", "Mbit")
    case.number("tokens", tokens / 1e6, "tokens of its vocabulary that so many bits tell apart", "10⁶")
    case.number("needed", 10e6 / tokens, "bits of ten million tokens over the state's")
    case.compare("needed", ">")
    case.states(
        f"Beyond a ceiling: {bits / 1e6:.1f} Mbit, {tokens / 1e6:.2f} million tokens of {PRESETS['mamba-2.8b'].vocabulary:,} "
        f"words, if every bit were used."
    )


def bit_errors(pairs: int, width: int, orthonormal: bool = False) -> float:
    """Share of wrong signs among values of ±1 that were written under keys and are read again, by linear attention."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((pairs, width))
    keys = np.linalg.qr(keys)[0] if orthonormal else keys / np.linalg.norm(keys, axis=1, keepdims=True)
    values = rng.choice([-1.0, 1.0], (pairs, width))
    _, S = linear_attention(np.zeros((1, pairs, width)), keys[None], values[None], return_state=True, scale=1.0)
    return float(np.mean(np.sign(keys @ S[0]) != values))


@claim(
    "recall",
    "A recurrent state cannot recall the originals.",
    sources=("D3", "schlag2021, section 4.1", "arora2024"),
    check="pairs written to and read from a matrix of 64 × 64",
    few=0.01,
    many=0.01,
)
def recall(case: Case) -> None:
    few = case.number("few", bit_errors(64, 64, orthonormal=True), "wrong bits of 64 orthonormal keys")
    many = case.number("many", bit_errors(128, 64), "wrong bits of 128 random keys")
    case.compare("few", ">")
    case.compare("many", ">", given="there are more pairs than the keys have dimensions")
    counts = (4, 8, 16, 32, 64, 128, 256)
    case.curves("pairs", "share of wrong bits, random keys of 64", random_keys=(counts, [max(bit_errors(n, 64), 1e-4) for n in counts]))
    case.states(
        f"64 orthonormal pairs come back exactly ({few:.0%} wrong bits) from 64 × 64 numbers; of 128 random ones {many:.0%} of the "
        f"bits flip."
    )


@claim(
    "unbound",
    "Context is unlimited; a million tokens were shown.",
    sources=("D2", "gu2023, section 4.3"),
    check="growth of state and step; tokens that the state can tell apart",
    step=1,
    told=1e7,
)
def unbound(case: Case) -> None:
    A, B, C = np.full((1, 4), 0.9), np.ones((1, 4)), np.ones((1, 4))
    sizes = [ssm(np.ones((n, 1)), A, B, C, return_state=True)[1].size for n in (10, 1000)]
    _, tokens = capacity()
    case.number("step", sizes[1] / sizes[0], "elements of a state after 1,000 tokens over after 10")
    case.number("told", tokens, "tokens that Mamba 2.8B's state can tell apart at best")
    case.compare("told", ">=")
    case.compare("step", "<=", given="it is the computation that is meant, which never grows")
    case.states(f"Computation and state never grow; what the state can hold ends at {tokens / 1e6:.2f} million tokens at best.")


@claim(
    "ar",
    "Associative recall explains 82 % of the gap to attention; a 70M Transformer beats a 1.4B Hyena at it.",
    sources=("D3", "arora2023"),
    check="training",
    share=0.82,
)
def ar(case: Case) -> None:
    case.number("ratio", 1.4e9 / 70e6, "ratio of the two models' parameters", "×")
    case.open("82 % of the gap, 70M beats 1.4B", "training of both models and their evaluation")
    case.states("About trained models; only the ratio of sizes, 20, can be computed.")


def signal(t: np.ndarray) -> np.ndarray:
    """Two sines, smooth, and no polynomial of low degree."""
    return np.sin(4 * np.pi * t) + 0.5 * np.sin(7 * np.pi * t)


def reconstruction_error(n: int) -> float:
    """RMS error of the signal's best n Legendre coefficients: what HiPPO-LegS keeps in exact arithmetic."""
    x, w = np.polynomial.legendre.leggauss(256)
    f = signal((x + 1) / 2)
    basis = np.polynomial.legendre.legvander(x, n - 1) * np.sqrt(2 * np.arange(n) + 1)
    c = (basis * (w * f)[:, None]).sum(axis=0) / 2
    return float(np.sqrt((w * (basis @ c - f) ** 2).sum() / 2))


def online_error(n: int, steps: int = 4000) -> float:
    """The same for coefficients kept up online: c' = (A c + B f) / t, each step exact for held input."""
    A, B = hippo("legs", n)
    c = np.zeros(n)
    t = (np.arange(steps) + 0.5) / steps
    f = signal(t)
    c[0] = f[0]
    for k in range(1, steps):
        step = np.log((k + 1) / k)
        left, right = np.eye(n) - step / 2 * A, np.eye(n) + step / 2 * A
        c = np.linalg.solve(left, right @ c + step * B * f[k])
    basis = np.polynomial.legendre.legvander(2 * t - 1, n - 1) * np.sqrt(2 * np.arange(n) + 1)
    return float(np.sqrt(np.mean((basis @ c - f) ** 2)))


@claim(
    "hippo",
    "Memory is compression: a few coefficients keep the history of a signal.",
    sources=("D4", "gu2020, section 3"),
    check="Legendre coefficients of a signal, best and online",
    few=0.05,
    many=1e-6,
    online=0.05,
)
def hippo_claim(case: Case) -> None:
    errors = {n: case.number(f"error_{n}", reconstruction_error(n), f"RMS error of {n} coefficients") for n in (4, 8, 16, 32)}
    online = case.number("online", online_error(16), "16 coefficients kept up online over 4,000 steps")
    case.number("few", errors[16], "RMS error of 16 coefficients")
    case.number("many", errors[32], "RMS error of 32 coefficients")
    for key in ("few", "many", "online"):
        case.compare(key, "<=")
    sizes = (2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 32)
    case.curves("coefficients", "RMS error", best=(sizes, [reconstruction_error(n) for n in sizes]))
    case.states(
        "Of a smooth signal: "
        + ", ".join(f"{error:.2g} at N = {n}" for n, error in errors.items())
        + f"; kept up online with N = 16, {online:.2g}."
    )
