"""Linear recurrences and convolutions: what is equal to what, and at what cost."""

import numpy as np
import scipy.linalg

from refimpl.catalogue import catalogue
from refimpl.complexity.calculators import parameters, state_bytes
from refimpl.complexity.claims.record import Case, Claim, claim
from refimpl.complexity.claims.tools import call_of, counted, form, lengths
from refimpl.core.numerics import silu
from refimpl.ops.gated_rnn.gru import gru
from refimpl.ops.gated_rnn.mlstm import mlstm
from refimpl.ops.linear_attention.linear_attention import linear_attention
from refimpl.ops.linear_attention.wkv import wkv
from refimpl.ops.recurrence.linear_recurrence import linear_recurrence
from refimpl.ops.recurrence.long_conv import long_conv
from refimpl.ops.recurrence.lru import lru
from refimpl.ops.recurrence.monarch import monarch_dft, monarch_matmul
from refimpl.ops.recurrence.rg_lru import rg_lru
from refimpl.ops.state_space.hippo import hippo, nplr
from refimpl.ops.state_space.ssm import ssm

CLAIMS: list[Claim] = []


@claim(
    "conv",
    "A linear RNN, or a state space model, is a convolution.",
    sources=("D3", "D4", "gu2021, section 2.4"),
    check="recurrence against convolution, LRU and SSM",
    lru=1,
    ssm=1,
)
def conv(case: Case) -> None:
    call = call_of("lru", T=256)
    first = case.equal("lru", "lru", form("lru", "convolution")(**call), lru(**call), call, "LRU as a convolution")
    call = call_of("ssm", T=256)
    second = case.equal("ssm", "ssm", form("ssm", "convolution")(**call), ssm(**call), call, "SSM as a convolution")
    case.states(f"Equal to rounding ({max(first, second):.0e}), as long as nothing depends on time or input.")


@claim(
    "fft",
    "A transform takes the convolution from O(L²) to O(L log L).",
    sources=("D3", "D4", "gu2021, section 2.4"),
    check="transforms with and without padding; growth of the work",
    circular=1,
    padded=1,
    power=1,
    logs=1,
)
def fft(case: Case) -> None:
    call = call_of("long_conv", T=256, K=256, c=2)
    call.pop("skip", None)
    right = long_conv(**call)
    u, kernel = call["u"], call["kernel"]
    circular = np.fft.irfft(np.fft.rfft(u, axis=-2) * np.fft.rfft(kernel, axis=-2), n=256, axis=-2)
    case.equal("circular", "long_conv", circular, right, call, "a transform of length L")
    case.equal(
        "padded",
        "long_conv",
        form("long_conv", "fft")(**call),
        right,
        call,
        "a transform of at least 2 L - 1",
        given="sequence and kernel are padded to 2 L - 1",
    )
    runs = {name: counted("long_conv", name) for name in ("direct", "fft")}
    case.number("direct", runs["direct"].work.power, "growth of the direct form's work, counted")
    case.number("power", runs["fft"].work.power, "growth of the transform's work, counted: power")
    case.number("logs", runs["fft"].work.logs, "growth of the transform's work, counted: logarithms")
    for key in ("power", "logs"):
        case.compare(key, within=0)
        case.compare(key, within=0, given="sequence and kernel are padded to 2 L - 1")
    work = lambda name: lambda n: catalogue()["long_conv"].forms[name].cost(T=n, K=n, c=1).work
    sizes = lengths(2**10, 2**20)
    case.curves(
        "tokens",
        "operations of a channel",
        direct=(sizes, [work("direct")(n) for n in sizes]),
        fft=(sizes, [work("fft")(n) for n in sizes]),
    )
    case.states(
        f"If padded: the error is {case.numbers['padded_error'].value:.0e}, without padding {case.numbers['circular_error'].value:.1f} "
        f"(the end wraps round). Counted work grows as {runs['direct'].work} and {runs['fft'].work}."
    )


@claim(
    "seqrnn",
    "Recurrence precludes training in parallel.",
    sources=("D1", "D3", "vaswani2017, section 1"),
    check="depth of a linear and of a nonlinear recurrence, counted",
    power=1,
)
def seqrnn(case: Case) -> None:
    scan = counted("linear_recurrence", "blelloch")
    case.number("power", scan.depth.power, "growth of the depth of a linear recurrence by a scan: power")
    case.number("logs", scan.depth.logs, "the same: logarithms")
    case.number(
        "nonlinear",
        min(counted("gru", name).depth.power for name in catalogue()["gru"].forms),
        "growth of the depth of a GRU, its best form: power",
    )
    call = call_of("linear_recurrence", T=200, c=4)
    case.number(
        "same", abs(form("linear_recurrence", "blelloch")(**call) - linear_recurrence(**call)).max(), "scan against the sequential form"
    )
    case.compare("power", ">=")
    case.compare("nonlinear", ">=", "power", given="the recurrence is nonlinear")
    case.curves(
        "tokens",
        "depth, counted",
        gru=(list(counted("gru", "recurrent").counts), [c.depth for c in counted("gru", "recurrent").counts.values()]),
        linear_by_scan=(list(scan.counts), [c.depth for c in scan.counts.values()]),
    )
    case.states(f"A nonlinear one has depth {counted('gru', 'fused').depth}; a linear one is an associative scan of depth {scan.depth}.")


@claim(
    "fftscan",
    "A transform or a scan makes the linear recurrence parallel.",
    sources=("D3", "martin2018"),
    check="both forms on constant and on varying decays",
    fft_varying=True,
    fft_constant=True,
    scan=1,
)
def fftscan(case: Case) -> None:
    call = call_of("linear_recurrence", T=128, c=3)
    case.equal(
        "scan",
        "linear_recurrence",
        form("linear_recurrence", "hillis_steele")(**call),
        linear_recurrence(**call),
        call,
        "scan, decays that vary",
        part="scan",
    )
    transform = form("linear_recurrence", "convolution")

    def works(a):
        try:
            got = transform(a, call["b"])
        except ValueError:
            return False
        return bool(np.allclose(got, linear_recurrence(a, call["b"])))

    case.number("fft_varying", works(call["a"]), "a transform takes decays that vary")
    case.number("fft_constant", works(call["a"][0]), "a transform takes one decay for all times")
    case.compare("fft_varying", part="transform")
    case.compare("fft_constant", part="transform", given="nothing varies with time (linear and time-invariant)")
    case.states("The scan always; the transform only where decays are the same at all times.")


@claim(
    "ssm-cost",
    "A state space model costs O(n); O(N log N); O(log N).",
    sources=("D2", "D3", "D4"),
    check="work of scan and transform, depth of the scan",
    linear=1,
    transform=1,
    transform_logs=1,
    span=0,
)
def ssm_cost(case: Case) -> None:
    recurrence, transform, scan = (
        counted("ssm", "recurrent").work,
        counted("long_conv", "fft").work,
        counted("linear_recurrence", "blelloch"),
    )
    case.number("linear", recurrence.power, "growth of the recurrence's work: power")
    case.number("transform", transform.power, "growth of the convolution's work by transforms: power")
    case.number("transform_logs", transform.logs, "the same: logarithms")
    case.number("span", scan.depth.power, "growth of the scan's depth: power")
    case.number("span_work", scan.work.power, "growth of the scan's work: power")
    case.compare("span_work", "<=", "span", part="O(log N)")
    case.compare("span", "<=", part="O(log N)", given="time on as many processors as tokens is meant")
    case.compare("linear", within=0, part="O(n)")
    case.compare("transform", within=0, part="O(N log N)")
    case.compare("transform_logs", within=0, part="O(N log N)")
    case.disagree("D2 says O(n), D3 and D4 O(N log N), D3 also O(log N).")
    case.states(
        f"Of three different things: work of the scan ({recurrence}), of transforms ({transform}), depth of the scan ({scan.depth}), "
        f"as counted."
    )


@claim(
    "kparams",
    "A convolution's kernel needs no more parameters for longer sequences.",
    sources=("D4", "poli2023, section 3"),
    check="arrays that define a kernel at two lengths",
    growth=1,
)
def kparams(case: Case) -> None:
    stored = {n: sum(x.size for x in call_of("ssm_kernel", L=n, c=4, n=8).values() if isinstance(x, np.ndarray)) for n in (64, 1024)}
    explicit = {n: call_of("long_conv", T=n, K=n, c=4)["kernel"].size for n in (64, 1024)}
    call = call_of("ssm_kernel", c=4, n=8)
    long, short = (form("ssm_kernel", "vandermonde")(**call | {"length": n}) for n in (1024, 64))
    case.number("parameters", stored[1024], "numbers that define an SSM's kernel of 4 channels and length 1,024")
    case.number("growth", stored[1024] / stored[64], "the same over those for length 64")
    case.number("same", abs(long[:64] - short).max(), "one A, B and C: the longer kernel's beginning against the shorter one")
    grown = case.number("explicit", explicit[1024] / explicit[64], "numbers of a kernel that is stored as it is, the same lengths")
    case.compare("growth", "<=")
    case.states(f"An SSM's A, B and C make a kernel of any length; a kernel that is stored entry by entry grows {grown:.0f}-fold.")


@claim(
    "mlp-nonlin",
    "Nonlinearity in the MLP alone suffices.",
    sources=("D4", "orvieto2023, section 4"),
    check="superposition through two layers",
    without=0.01,
    with_mlp=0.01,
)
def mlp_nonlin(case: Case) -> None:
    rng = np.random.default_rng(0)
    call = call_of("ssm", T=24)
    channels = call["u"].shape[-1]
    w = rng.standard_normal((channels, channels))
    layer = lambda u: ssm(**call | {"u": u})
    plain = lambda u: layer(layer(u) @ w)
    mixed = lambda u: layer(silu(layer(u) @ w))
    x, y = rng.standard_normal((2, *call["u"].shape))
    deviation = lambda f: float(abs(f(x + y) - f(x) - f(y)).max() / abs(f(x + y)).max())
    bare = case.number("without", deviation(plain), "deviation from superposition of two bare layers")
    rich = case.number("with_mlp", deviation(mixed), "the same with a nonlinearity between")
    case.compare("without", ">")
    case.compare("with_mlp", ">", given="an MLP stands between the layers")
    case.open("that models of that kind are as good", "training")
    case.states(
        f"With an MLP the stack is nonlinear ({rich:.1f}); bare layers stay one linear time-invariant system ({bare:.0e}), however many."
    )


@claim(
    "linattn",
    "Linear attention is a linear RNN.",
    sources=("D3", "katharopoulos2020, section 3.4"),
    check="its state by linear_recurrence of outer products",
    error=1,
)
def linattn(case: Case) -> None:
    rng = np.random.default_rng(0)
    T, d = 64, 8
    q, k, v = rng.standard_normal((3, 1, T, d))
    g = -rng.random((1, T))
    outer = (k[0][:, :, None] * v[0][:, None, :]).reshape(T, d * d)
    S = linear_recurrence(np.broadcast_to(np.exp(g[0])[:, None], (T, d * d)), outer).reshape(T, d, d)
    error = case.equal(
        "error",
        "linear_attention",
        np.einsum("td,tde->te", q[0], S)[None] / np.sqrt(d),
        linear_attention(q, k, v, decay=g),
        {"q": q, "k": k, "v": v, "decay": g},
        "recurrence of outer products",
    )
    case.states(f"Equal to rounding ({error:.0e}); the state is a matrix of {d} × {d} for each head.")


@claim(
    "vanish",
    "RNNs forget: what is far counts for little.",
    sources=("D3", "bengio1994"),
    check="influence of the first of 101 steps",
    far=0.01,
)
def vanish(case: Case) -> None:
    b = np.zeros((101, 1))
    b[0] = 1
    weight = lambda a: float(linear_recurrence(np.array([a]), b)[-1, 0])
    far = case.number("far", weight(0.9), "what is left after 100 steps of 0.9")
    case.number("kept", weight(1.0), "what is left after 100 steps of 1")
    case.compare("kept", "<", "far")
    case.compare("far", "<", given="decays are below 1 (0.9 here)")
    steps = np.arange(1, 200)
    case.curves("steps", "what is left", decay_09=(steps, 0.9**steps), decay_099=(steps, 0.99**steps), decay_1=(steps, 1.0**steps))
    case.states(f"If |λ| < 1: 0.9^100 = {far:.1e}; a decay of 1 keeps everything.")


@claim(
    "gamma",
    "The normalisation of LRU and Hawk is tidier than Mamba's pair of decay and input.",
    sources=("D4", "orvieto2023, section 3.4", "de2024, section 2.4"),
    check="variance of the state under white input",
    lru=1,
    short=1,
    long=1,
)
def gamma(case: Case) -> None:
    T = 4000
    b = np.zeros((T, 1))
    b[0] = 1
    r, i = np.full((T, 1), 0.1), np.ones((T, 1))
    impulse = rg_lru(b, r, i, np.array([-0.05]))
    ours = case.number("lru", float((impulse**2).sum()), "variance with the factor √(1 - a²): energy of the impulse response")
    found = []
    for key, step in (("short", 0.01), ("middle", 1.0), ("long", 10.0)):
        energy = float((linear_recurrence(np.array([np.exp(-step)]), step * b) ** 2).sum())
        found.append(case.number(key, energy, f"variance with decay e^-T and input T, T = {step}"))
    case.compare("lru", within=0.01)
    case.compare("short", "<")
    case.compare("long", ">")
    case.states(
        f"Variance {ours:.3f} at any decay, against {found[0]:.3f}, {found[1]:.2f} and {found[2]:.0f} for (e^-T, T) at T = 0.01, 1, 10."
    )


@claim(
    "nplr",
    "S4's matrix is diagonal plus low rank; or normal plus low rank.",
    sources=("D3", "D4", "gu2021, theorem 1"),
    check="HiPPO-LegS of 16 states put together again",
    error=1e-9,
    condition=10,
)
def nplr_claim(case: Case) -> None:
    n = 16
    A, _ = hippo("legs", n)
    Lambda, P, _, V = nplr("legs", n)
    normal = V @ np.diag(Lambda) @ V.conj().T
    error = case.number(
        "error", abs(normal - V @ P @ P.conj().T @ V.conj().T - A).max() / abs(A).max(), "normal less rank one against A, relative"
    )
    commutator = normal @ normal.conj().T - normal.conj().T @ normal
    case.number("normal", abs(commutator).max() / abs(normal).max() ** 2, "how far the normal part is from commuting with its adjoint")
    plain = case.number("plain", np.linalg.cond(scipy.linalg.eig(A)[1]), "condition of A's own eigenvectors")
    unitary = case.number("condition", np.linalg.cond(V), "condition of the normal part's")
    case.compare("error", "<=")
    case.compare("condition", "<=")
    case.states(
        f"Both: normal (so diagonal in a unitary basis, condition {unitary:.0f}) less rank one, to {error:.0e}; A itself would take "
        f"eigenvectors of condition {plain:.0e}."
    )


@claim(
    "monarch",
    "Monarch matrices implement the Fourier transform.",
    sources=("D3", "dao2022b, section 3", "fu2023b, section 3.1"),
    check="factors of order 32 against a transform of 1,024",
    error=1,
    products=1,
)
def monarch(case: Case) -> None:
    m = 32
    n = m * m
    L, R, order = monarch_dft(m, m)
    x = np.random.default_rng(0).standard_normal(n) + 0j
    error = case.equal(
        "error",
        "monarch_matmul",
        monarch_matmul(x[order], L, R),
        np.fft.fft(x),
        {"x": x[order], "L": L, "R": R},
        "two block-diagonal products against a transform",
    )
    count = L.shape[0] * L.shape[1] * L.shape[2] + R.shape[0] * R.shape[1] * R.shape[2]
    case.number("products", count / (2 * n**1.5), "products of entries over 2 N^1.5")
    case.compare("products", within=0)
    case.states(f"To {error:.0e}, in {count:,} = 2 N^1.5 products at N = {n:,}: more than N log N, but all of them dense.")


@claim(
    "rwkv",
    "RWKV keeps a memory of constant size from step to step, up to 14B parameters.",
    sources=("D2", "peng2023, section 3"),
    check="recurrent against parallel form; bytes of the state",
    error=1,
    billions=14,
)
def rwkv(case: Case) -> None:
    call = call_of("wkv", T=48, c=6)
    error = case.equal("error", "wkv", form("wkv", "parallel")(**call), wkv(**call), call, "parallel against recurrent")
    state = case.number("state", state_bytes("rwkv4-14b", bits=32) / 1e6, "state of 5 d L elements in 32 bits", "MB")
    case.number("billions", parameters("rwkv4-14b") / 1e9, "parameters", "10⁹")
    case.compare("billions")
    case.states(f"The two forms agree to {error:.0e}, and the state is 5 d L elements, {state:.1f} MB in 32 bits.")


@claim("vecstate", "The state of an RNN is one vector.", sources=("D3",), check="axes of the states of five operators", axes=1)
def vecstate(case: Case) -> None:
    rank = lambda f, call: max(part.ndim for part in _parts(f(**call, return_state=True)[1]))
    call = {name: x[0] for name, x in call_of("mlstm", T=4, d=3, e=3, H=1).items() if isinstance(x, np.ndarray)}
    matrix = rank(lambda **k: mlstm(**k), {name: call[name][None] for name in ("q", "k", "v", "i", "f")}) - 1
    case.number("axes_mlstm", matrix, "axes of mLSTM's state, for one head")
    q = np.ones((1, 4, 3))
    case.number("axes_linear", linear_attention(q, q, q, return_state=True)[1].ndim - 1, "axes of linear attention's state, for one head")
    case.number("axes", rank(gru, call_of("gru", T=4, c=2, d=3)), "axes of a GRU's state")
    case.compare("axes_mlstm", "<=", "axes")
    case.compare("axes", "<=", given="the RNN is a classic one")
    case.states("Of a classic one; mLSTM and linear attention keep a matrix.")


def _parts(state):
    return state if isinstance(state, tuple) else (state,)
