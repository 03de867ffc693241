"""State space models and their discretisation."""

import numpy as np

from refimpl.complexity.claims.record import Case, Claim, claim
from refimpl.complexity.claims.tools import call_of
from refimpl.complexity.runs import measure
from refimpl.ops.recurrence.lru import lru
from refimpl.ops.state_space.discretize import discretize
from refimpl.ops.state_space.discretize_diagonal import discretize_diagonal
from refimpl.ops.state_space.selective_scan import selective_scan
from refimpl.ops.state_space.ssm import ssm

CLAIMS: list[Claim] = []


def decay(step: float, method: str) -> float:
    """ā of x' = -x."""
    return float(discretize_diagonal(np.array([-1.0]), np.array([1.0]), np.array([step]), method=method)[0][0])


@claim(
    "euler",
    "Euler's rule and the bilinear one are good approximations for small steps.",
    sources=("D4", "gu2021, section 2.3"),
    check="error at time 1 for shrinking steps; size of the decay for long ones",
    euler=1,
    bilinear=2,
    bilinear_worst=1,
)
def euler(case: Case) -> None:
    steps = [2.0**-i for i in range(4, 12)]
    errors = {m: [abs(decay(h, m) ** round(1 / h) - np.exp(-1)) for h in steps] for m in ("euler", "bilinear")}
    for method in errors:
        case.number(method, float(np.log2(errors[method][-2] / errors[method][-1])), f"order of {method}'s error")
        case.compare(method, within=0.02)
    case.number(
        "euler_limit",
        min(h for h in np.arange(0.1, 4, 0.1) if abs(decay(h, "euler")) > 1 + 1e-9),
        "T |a| from which Euler's decay exceeds 1",
    )
    worst = case.number(
        "bilinear_worst", max(abs(decay(h, "bilinear")) for h in np.logspace(-3, 6, 200)), "largest bilinear decay of any step"
    )
    case.compare("bilinear_worst", "<=")
    case.curves("step", "error at time 1", **{m: (steps, e) for m, e in errors.items()})
    case.states(
        f"Orders {case.numbers['euler'].value:.2f} and {case.numbers['bilinear'].value:.2f}. Euler is unstable beyond T |a| = 2, "
        f"bilinear never (decay at most {worst:.4f})."
    )


@claim(
    "zoh",
    "The discrete decay is exp(A T).",
    sources=("D4", "gu2021, section 2.3"),
    check="zero-order hold against a fine integration of a held input",
    error=1e-13,
)
def zoh(case: Case) -> None:
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((6, 6)) - 2 * np.eye(6), rng.standard_normal(6)
    whole, part = (discretize(A, B, np.asarray(dt), method="zoh") for dt in (0.5, 0.5 / 64))
    x = fine = rng.standard_normal(6)
    for _ in range(64):
        fine = part[0] @ fine + part[1] * 1.7
    error = case.number(
        "error", abs(whole[0] @ x + whole[1] * 1.7 - fine).max() / abs(fine).max(), "one step against 64 steps of 1/64, relative"
    )
    euler = case.number("euler", abs((np.eye(6) + 0.5 * A) @ x + 0.5 * B * 1.7 - fine).max() / abs(fine).max(), "one Euler step, relative")
    case.compare("error", "<=")
    case.states(f"Exact for an input that is held over the step (difference {error:.0e}; one Euler step {euler:.2f}).")


@claim(
    "resample",
    "A continuous model works at new sampling rates without retraining.",
    sources=("D4", "gu2021, section 1"),
    check="every input twice at half the step",
    learned=1e-10,
    fixed=1e-10,
)
def resample(case: Case) -> None:
    rng = np.random.default_rng(0)
    a, b, u = -rng.random(4) - 0.1, rng.standard_normal(4), rng.standard_normal(32)

    def run(step, inputs):
        A, B = discretize_diagonal(a, b, np.full(4, step), method="zoh")
        return ssm(np.repeat(inputs[:, None], 1, axis=1), A[None], B[None], np.ones((1, 4)))[:, 0]

    fixed = case.number("fixed", abs(run(0.1, u) - run(0.05, np.repeat(u, 2))[1::2]).max(), "fixed step, halved, inputs held")
    call = call_of("selective_scan", T=16)
    for name in ("D", "z", "delta_bias"):
        call.pop(name, None)
    twice = {n: np.repeat(x, 2, axis=-2) if n in ("u", "delta", "B", "C") else x for n, x in call.items()}
    learned = case.number(
        "learned", abs(selective_scan(**call) - selective_scan(**twice)[..., 1::2, :]).max(), "steps that the model computes from its input"
    )
    case.compare("learned", "<=")
    case.compare("fixed", "<=", given="the step is fixed and the input is held")
    case.states(
        f"With a fixed step and held input (difference {fixed:.0e}); a model that computes its step from the input does not know of "
        f"the new rate ({learned:.2f})."
    )


def leak(f, x: np.ndarray) -> float:
    """Largest change of the other channels when channel 0 of the input moves, over the largest change."""
    moved = x.copy()
    moved[..., 0] += 1
    change = abs(f(moved) - f(x))
    return float(change[..., 1:].max() / change.max())


@claim(
    "siso",
    "An SSM layer never mixes channels.",
    sources=("D4", "gu2021, section 3.4"),
    check="one input channel perturbed",
    s4=0,
    lru=0,
    mamba=0,
)
def siso(case: Case) -> None:
    call = call_of("ssm", T=24, c=4)
    case.number("s4", leak(lambda u: ssm(**call | {"u": u}), call["u"]), "leak through S4's layer: a system for each channel")
    multi = call_of("lru", T=24, c=4)
    dense = case.number("lru", leak(lambda u: lru(**multi | {"u": u}), multi["u"]), "leak through LRU, whose B and C are dense")
    diagonal = dict(
        multi, B=np.eye(4) * (1 + 0j), C=np.eye(4) * (1 + 0j), D=np.zeros(4), nu_log=np.full(4, -1.0), theta_log=np.full(4, -1.0)
    )
    diagonal.pop("gamma", None)
    case.number("recurrence", leak(lambda u: lru(**diagonal | {"u": u}), multi["u"]), "leak through LRU's diagonal recurrence alone")
    rng = np.random.default_rng(0)
    w_dt, w_b, w_c = rng.standard_normal((4, 4)), rng.standard_normal((4, 3)), rng.standard_normal((4, 3))
    A = -np.ones((4, 3))
    mamba = lambda u: selective_scan(u, u @ w_dt, A, u @ w_b, u @ w_c, delta_softplus=True)
    mixed = case.number(
        "mamba", leak(mamba, rng.standard_normal((24, 4))), "leak through Mamba's layer, whose B, C and step read all channels"
    )
    for key in ("s4", "lru", "mamba"):
        case.compare(key, "<=")
    case.compare("s4", "<=", given="it is S4's, one system for each channel")
    case.states(
        f"S4's never does; Mamba's B, C and step read all channels ({mixed:.2f} of the change leaks), and LRU's dense B and C mix "
        f"outright ({dense:.2f}), though its recurrence alone does not."
    )


@claim(
    "1000th",
    "The thousandth token costs as much as the first; the state stays as it is.",
    sources=("D2",),
    check="elements of the state and work of a step, at two positions",
    growth=1,
    work=1,
)
def thousandth(case: Case) -> None:
    call = call_of("selective_scan", T=1001)
    cut = lambda a, b: {n: x[..., a:b, :] if n in ("u", "delta", "B", "C", "z") else x for n, x in call.items()}
    _, one = selective_scan(**cut(0, 1), return_state=True)
    _, state = selective_scan(**cut(0, 1000), return_state=True)
    last, _ = selective_scan(**cut(1000, 1001), state=state, return_state=True)
    case.number("growth", state.size / one.size, "elements of the state after 1,000 tokens over after one")
    case.number("same", abs(last - selective_scan(**call)[..., 1000:, :]).max(), "the 1,001st token from the state against a whole run")
    case.number("work", _step_work(256) / _step_work(16), "operations of a step in a run of 256, counted, over one in a run of 16")
    case.compare("growth", within=0)
    case.compare("work", within=0.02)
    case.states(
        f"The state has {state.size} elements after 1,000 tokens as after one, and a step's operations do not depend on the position."
    )


def _step_work(T: int) -> float:
    """Counted operations of a step."""
    return measure("selective_scan", "recurrent", T=T).work / T
