"""mlstm against numbers worked by hand, exact fractions, decimal arithmetic, and the published codes of mlstm_kernels and xlstm."""

from decimal import Decimal, localcontext
from fractions import Fraction
from math import log

import numpy as np
import pytest

from refimpl.ops.gated_rnn.mlstm import OPS, State, error_bound, mlstm, mlstm_chunkwise, mlstm_vjp

(OP,) = OPS
FORMS = pytest.mark.parametrize("form", list(OP.forms))
UNIT = 2.0**-53
EXP = {"forget": "exp"}


def column(*values):
    return np.array(values, dtype=float)[:, None]


def within(got, want, bound):
    """Elementwise, of arrays or of nested tuples of them."""
    if isinstance(got, tuple):
        for g, w, b in zip(got, want, bound, strict=True):
            within(g, w, b)
        return
    want = np.asarray(want, dtype=float)
    assert got.shape == want.shape
    assert np.all(abs(got - want) <= bound), f"{np.max(abs(got - want) / bound):.3g} times the bound"


def agree(form, call, want):
    """`want` is correctly rounded; logarithms in the call are off by half a unit, as much as any of the bound's roundings."""
    function = OP.forms[form].function
    within(function(**call), want, error_bound(**call, unit=2 * UNIT))
    if form == "chunkwise":
        within(function(**call, chunk=2), want, error_bound(**call, unit=2 * UNIT))


# -- by hand -----------------------------------------------------------------------------------------------------------------


@FORMS
def test_two_steps_by_hand(form):
    """Gates of 1, d = 1: C = 1·3 = 3, n = 1; then C = 3 + 2·5 = 13, n = 1 + 2 = 3."""
    call = {"k": column(1, 2), "v": column(3, 5), "i": np.zeros(2), "f": np.zeros(2), **EXP}
    agree(form, {**call, "q": column(1, 1)}, column(3, 13 / 3))
    agree(form, {**call, "q": column(-2, -2)}, column(-3, -13 / 3))  # |n·q|: the sign stays with Cᵀq
    agree(form, {**call, "q": column(0.5, 0.25)}, column(1.5, 3.25))  # |n·q| = 0.5, 0.75: the bound of 1 holds
    agree(form, {**call, "q": column(0, 0)}, column(0, 0))


@FORMS
def test_gates_by_hand(form):
    """i = 1, 4 and f = 1/2: C = 3, then 3/2 + 4·2·5 = 83/2; n = 1, then 1/2 + 8 = 17/2; m = max(log 1/2, log 4)."""
    call = {"q": column(1, 1), "k": column(1, 2), "v": column(3, 5), "i": np.array([0, log(4)])}
    for gate in ({"f": np.zeros(2)}, {"f": np.log([0.5, 0.5]), **EXP}):
        want = column(3, 83 / 17), State(column(83 / 8), np.array([17 / 8]), np.array(log(4)))
        agree(form, {**call, **gate, "return_state": True}, want)


@FORMS
def test_keys_are_scaled_and_queries_are_not(form):
    """d = 4, √d = 2: C = k v / 2."""
    call = {"q": np.full((1, 4), 3.0), "k": np.full((1, 4), 2.0), "v": column(7), "i": np.zeros(1), "f": np.zeros(1), "return_state": True}
    agree(form, call, (column(7), State(np.full((4, 1), 7.0), np.ones(4), np.array(0.0))))


@FORMS
def test_eps_is_in_stabilised_units(form):
    """i = e^2 lifts m to 2: n e^-2 = 1, hence h = 3 / (1 + 0.5); with q = e^-3 the bound e^-2 holds: 3 e^-3 / (e^-2 + 0.5)."""
    call = {"k": column(1), "v": column(3), "i": np.array([2.0]), "f": np.zeros(1), "eps": 0.5}
    agree(form, {**call, "q": column(1)}, column(2))
    agree(form, {**call, "q": column(np.exp(-3.0))}, column(3 * np.exp(-3.0) / (np.exp(-2.0) + 0.5)))


@FORMS
def test_the_state_is_in_units_of_e_to_the_m(form):
    """A state (5, 2, log 3) stands for C = 15, n = 6: with f = 1, i = 1, k = 2, v = 1, C = 17 and n = 8."""
    state = State(column(5), np.array([2.0]), np.array(log(3)))
    call = {"q": column(1), "k": column(2), "v": column(1), "i": np.zeros(1), "f": np.zeros(1), **EXP, "state": state}
    agree(form, call, column(17 / 8))


@FORMS
def test_m_is_the_running_maximum_of_the_exponents(form, rng):
    i, f = rng.standard_normal((2, 40))
    A = [max(float(np.sum(f[j + 1 : t + 1]) + i[j]) for j in range(t + 1)) for t in range(40)]
    for T in (1, 17, 40):
        zeros = np.zeros((T, 1))
        call = {"q": zeros, "k": zeros, "v": zeros, "i": i[:T], "f": f[:T], **EXP, "return_state": True}
        within(OP.forms[form].function(**call)[1].m, A[T - 1], 2 * error_bound(**call, unit=UNIT)[1].m)


@FORMS
def test_it_forgets_completely_and_never(form):
    """A forget gate of e^-1e3 leaves the last value alone; 2000 steps with a gate of 1 give the plain mean."""
    T = 2000
    call = {"q": np.ones((T, 1)), "k": np.ones((T, 1)), "v": np.arange(T, dtype=float)[:, None], "i": np.zeros(T), **EXP}
    for f, want in ((-1e3, np.arange(T)), (0.0, np.arange(T) / 2)):
        call["f"] = np.full(T, f)
        within(OP.forms[form].function(**call)[:, 0], want, error_bound(**call, unit=UNIT)[:, 0])


# -- exact fractions ---------------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("bound_holds", [True, False])
def test_is_exact_in_fractions(form, bound_holds, rng):
    """Gates 1/4 ... 4, d = 4 (√d = 2), small integers: (1) and (2) in rational numbers."""
    T, d, e = 23, 4, 3
    k, v = rng.integers(-3, 4, (T, d)), rng.integers(-3, 4, (T, e))
    q = rng.integers(-3, 4, (T, d)) / (64.0 if bound_holds else 1.0)
    i_log2, f_log2 = rng.integers(-2, 3, T), rng.integers(-2, 1, T)
    C, n = [[Fraction(0)] * e for _ in range(d)], [Fraction(0)] * d
    want, branches = np.zeros((T, e)), set()
    for t in range(T):
        i, f = Fraction(2) ** int(i_log2[t]), Fraction(2) ** int(f_log2[t])
        key = [Fraction(int(x), 2) for x in k[t]]
        C = [[f * C[a][b] + i * key[a] * int(v[t, b]) for b in range(e)] for a in range(d)]
        n = [f * n[a] + i * key[a] for a in range(d)]
        query = [Fraction(float(x)) for x in q[t]]
        overlap = abs(sum(x * y for x, y in zip(n, query, strict=True)))
        branches.add(overlap > 1)
        want[t] = [float(sum(C[a][b] * query[a] for a in range(d)) / max(overlap, 1)) for b in range(e)]
    assert branches == ({False} if bound_holds else {True, False})
    call = {"q": q, "k": k.astype(float), "v": v.astype(float), "i": i_log2 * log(2), "f": f_log2 * log(2), **EXP}
    agree(form, call, want)


# -- decimal arithmetic: the sum over the past, in true units ------------------------------------------------------------------


def in_decimals(q, k, v, i, f, forget, state=None):
    """h by its definition as a sum, 100 digits and exponents of any size: nothing to stabilise."""
    with localcontext() as context:
        context.prec, context.Emax, context.Emin = 100, 10**9, -(10**9)
        D = np.vectorize(lambda x: Decimal(float(x)), otypes=[object])
        q, k, v, i, f = map(D, (q, k, v, i, f))
        T, d = q.shape
        log_f = [-(1 + (-x).exp()).ln() if forget == "sigmoid" else x for x in f]
        h = np.zeros(v.shape)
        C, n = D(np.zeros((d, v.shape[1]))), D(np.zeros(d))
        if state is not None:
            C, n = D(state.C) * Decimal(float(state.m)).exp(), D(state.n) * Decimal(float(state.m)).exp()
        for t in range(T):
            C = log_f[t].exp() * C + i[t].exp() * np.outer(k[t], v[t]) / Decimal(d).sqrt()
            n = log_f[t].exp() * n + i[t].exp() * k[t] / Decimal(d).sqrt()
            h[t] = [float(x) for x in (q[t] @ C) / max(abs(q[t] @ n), Decimal(1))]
        return h


@FORMS
@pytest.mark.parametrize("forget", ["sigmoid", "exp"])
@pytest.mark.parametrize("hard", ["", *(name for name in OP.hard if name != "no initial state")])
def test_is_decimal_arithmetic(form, forget, hard, rng):
    call = OP.hard[hard](rng, H=1, T=19) if hard else OP.sample(rng, H=1, T=19)
    call = {**call, "forget": call.get("forget", forget)}
    call = {n: x[0] if isinstance(x, np.ndarray) else x for n, x in call.items()}
    call["state"] = None if hard == "empty initial state" else State(*(x[0] for x in call["state"]))
    want = in_decimals(**{n: call[n] for n in ("q", "k", "v", "i", "f", "forget", "state")})
    within(OP.forms[form].function(**call), want, error_bound(**call, unit=UNIT) + np.finfo(float).tiny)


# -- gradient ----------------------------------------------------------------------------------------------------------------


def one_step(q):
    return {"q": column(q), "k": column(2), "v": column(3), "i": np.zeros(1), "f": np.zeros(1), **EXP}


def test_gradient_of_one_step_by_hand():
    """|n·q| >= 1: h = sign(k q) v, so only v has a gradient. Else h = i k q v."""
    g = mlstm_vjp(column(1), **one_step(-5.0))
    assert [g[n].item() for n in "qkvif"] == [0, 0, -1, 0, 0]
    g = mlstm_vjp(column(1), **one_step(0.25))
    assert [g[n].item() for n in "qkvif"] == [6, 0.75, 0.5, 1.5, 0]


def test_gradient_through_the_stabiliser_by_hand():
    """A state (C, n, m) with f = e^-1, i = e^0, k = 0, m = 0, q = 1, eps = 1: m' = 0, h = C/e / (max(n/e, 1) + 1).

    With C = 2, n = 1: h = 1/e, dh/dC = 1/(2 e), dh/dn = 0, dh/dm = d(C e^(m-1))/dm / 2 = 1/e = dh/df; m' stays at ĩ = 0, so
    that a change of ĩ moves the units: h = C e^-1-ĩ / (e^-ĩ + 1), dh/dĩ = -1/e + 1/(2 e).
    """
    state = State(column(2), np.array([1.0]), np.array(0.0))
    call = {"q": column(1), "k": column(0), "v": column(0), "i": np.zeros(1), "f": np.array([-1.0]), **EXP, "eps": 1.0, "state": state}
    g = mlstm_vjp(column(1), **call)
    want = {"C": 0.5 / np.e, "n": 0.0, "m": 1 / np.e}
    for name, value in want.items():
        assert abs(getattr(g["state"], name).item() - value) <= 8 * UNIT
    assert abs(g["f"].item() - 1 / np.e) <= 8 * UNIT
    assert abs(g["i"].item() + 0.5 / np.e) <= 8 * UNIT


def test_gradient_of_the_final_state_by_hand():
    """log f + m > ĩ: m' = m - 1, C' = C + e^(ĩ - m') k v, with m = 3, ĩ = 0: i' = e^-2; the cotangents are 1, 10, 100."""
    state = State(column(2), np.array([1.0]), np.array(3.0))
    call = {"q": column(0), "k": column(5), "v": column(7), "i": np.zeros(1), "f": np.array([-1.0]), **EXP, "state": state}
    g = mlstm_vjp(column(0), **call, dstate=State(column(1), np.array([10.0]), np.array(100.0)))
    i = np.exp(-2.0)
    want = {"v": 5 * i, "k": (7 + 10) * i, "i": (35 + 50) * i, "f": 100 - 85 * i, "q": 0}
    for name, value in want.items():
        assert abs(g[name].item() - value) <= 16 * UNIT * abs(value)
    assert (g["state"].C.item(), g["state"].n.item()) == (1, 10)
    assert abs(g["state"].m.item() - (100 - 85 * i)) <= 16 * UNIT * 100


def test_ties_go_where_the_docstring_says():
    """log f + m = ĩ = 0: a cotangent of the final m goes to f and m; |n·q| = e^-m = 1: the branch of |n·q|, where h = v."""
    state = State(column(0), np.zeros(1), np.array(0.0))
    call = {"q": column(1), "k": column(1), "v": column(3), "i": np.zeros(1), "f": np.zeros(1), **EXP, "state": state}
    g = mlstm_vjp(column(1), **call)
    assert [g[n].item() for n in "qkvif"] == [0, 0, 1, 0, 0]
    g = mlstm_vjp(column(0), **call, dstate=State(column(0), np.zeros(1), np.array(1.0)))
    assert [g["i"].item(), g["f"].item(), g["state"].m.item()] == [0, 1, 1]


# -- published codes ---------------------------------------------------------------------------------------------------------


def tensors(call, names="qkvif"):
    torch = pytest.importorskip("torch")
    return [torch.from_numpy(np.ascontiguousarray(call[n])) for n in names]


def doubled(call):
    return {n: x for n, x in call.items() if n != "state"}


@pytest.mark.peers
@FORMS
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("peer", ["parallel", "chunkwise", "simple", "chunkwise_simple"])
def test_is_the_published_code(form, eps, peer, rng):
    """mlstm_kernels' and xlstm's torch code, in float64; where it starts at m = 0, we do too."""
    call = {**doubled(OP.sample(rng, T=128, d=8, e=8, batch=(2,))), "eps": eps}
    q, k, v, i, f = tensors(call)
    if peer == "parallel":
        want = pytest.importorskip("mlstm_kernels.torch.parallel.native.fw").mlstm_parallel_fw(q, k, v, i, f, eps=eps)[0]
    elif peer == "chunkwise":
        want = pytest.importorskip("mlstm_kernels.torch.chunkwise.native.fw").mlstm_chunkwise(q, k, v, i, f, eps=eps, chunk_size=32)
    elif peer == "simple":
        parallel = pytest.importorskip("xlstm.blocks.mlstm.backends").parallel_stabilized_simple
        want = parallel(q, k, v, i[..., None], f[..., None], eps=eps)
    else:
        want = pytest.importorskip("xlstm.blocks.mlstm.backends").chunkwise_simple(q, k, v, i, f, chunk_size=32, eps=eps)
    if "chunkwise" in peer:
        call["state"] = State(np.zeros((2, 2, 8, 8)), np.zeros((2, 2, 8)), np.zeros((2, 2)))
    within(OP.forms[form].function(**call), want.numpy(), error_bound(**call, unit=2 * UNIT))


@pytest.mark.peers
def test_states_and_gradients_are_the_published_code_s(rng):
    """Autograd through mlstm_kernels' chunkwise form, from an initial state to a final one; it scales q where we scale k."""
    torch = pytest.importorskip("torch")
    kernel = pytest.importorskip("mlstm_kernels.torch.chunkwise.native.fw").mlstm_chunkwise
    call = {**OP.sample(rng, T=64, d=4, e=4, batch=(2,)), "eps": 0.25}
    leaves = [x.requires_grad_() for x in tensors(call)]
    C, n, m = (torch.from_numpy(x).requires_grad_() for x in call["state"])
    h, (C_last, n_last, m_last) = kernel(
        *leaves, matC_initial=2 * C, vecN_initial=2 * n, scaM_initial=m[..., None], return_last_states=True, chunk_size=16, eps=0.25
    )
    final = [C_last / 2, n_last / 2, m_last[..., 0]]
    ours, state = mlstm_chunkwise(**call, return_state=True)
    bound, state_bound = error_bound(**call, return_state=True, unit=2 * UNIT)
    within(ours, h.detach().numpy(), bound)
    within(tuple(state), tuple(x.detach().numpy() for x in final), tuple(state_bound))
    cotangents = [rng.standard_normal(x.shape) for x in (h, *final)]
    want = torch.autograd.grad([h, *final], [*leaves, C, n, m], [torch.from_numpy(x) for x in cotangents])
    got = mlstm_vjp(cotangents[0], **call, dstate=State(*cotangents[1:]))
    for name, g, w in zip(["q", "k", "v", "i", "f", "C", "n", "m"], [*(got[x] for x in "qkvif"), *got["state"]], want, strict=True):
        assert np.all(abs(g - w.numpy()) <= np.sqrt(UNIT) * abs(w.numpy()).max()), name


@pytest.mark.peers
def test_decoding_is_the_published_step(rng):
    step = pytest.importorskip("mlstm_kernels.torch.recurrent.native_step").mlstm_recurrent_step__native_fw
    torch = pytest.importorskip("torch")
    call = OP.sample(rng, T=1, d=4, e=4, batch=(2,))
    C, n, m = (torch.from_numpy(x) for x in call["state"])
    q, k, v, i, f = tensors(call)
    h, (C, n, m) = step(2 * C, 2 * n, m[..., None], q[..., 0, :], k[..., 0, :], v[..., 0, :], i, f, eps=0.0, dtype_state=torch.float64)
    got, state = mlstm(**call, return_state=True)
    bound, state_bound = error_bound(**call, return_state=True, unit=2 * UNIT)
    within(got[..., 0, :], h.numpy(), bound[..., 0, :])
    within(tuple(state), (C.numpy() / 2, n.numpy() / 2, m.numpy()[..., 0]), tuple(state_bound))
