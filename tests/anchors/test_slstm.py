"""slstm against numbers worked by hand, exact fractions, decimal arithmetic in true units, and xlstm's published cell."""

from decimal import Decimal, localcontext
from fractions import Fraction
from math import atanh, exp, log, tanh

import numpy as np
import pytest

from refimpl.ops.gated_rnn.slstm import OPS, State, error_bound, slstm, slstm_naive, slstm_vjp

(OP,) = OPS
FORMS = pytest.mark.parametrize("form", list(OP.forms))
UNIT = 2.0**-53
OPEN = 800.0  # an output gate of exactly 1


def within(got, want, bound):
    if isinstance(got, tuple):
        for g, w, b in zip(got, want, bound, strict=True):
            within(g, w, b)
        return
    want = np.asarray(want, dtype=float)
    assert got.shape == want.shape
    assert np.all(abs(got - want) <= bound), f"{np.max(abs(got - want) / bound):.3g} times the bound"


def column(*values):
    return np.array(values, dtype=float)[:, None]


def one_unit(z, i, f, o, **others):
    return {"z": column(*z), "i": column(*i), "f": column(*f), "o": column(*o), "R": np.zeros((4, 1, 1)), **others}


# -- by hand -----------------------------------------------------------------------------------------------------------------


@FORMS
def test_two_steps_by_hand(form):
    """z = 3/5, -1/2; i = 1, 4; f = 1/2; o = 1, 1/2: c = 3/5, then 3/10 - 2 = -17/10; n = 1, then 9/2; h = 3/5, -17/90."""
    z, i, o = (atanh(0.6), atanh(-0.5)), (0, log(4)), (OPEN, 0)
    for gate in ({"f": (0, 0)}, {"f": (log(0.5), log(0.5)), "forget": "exp"}):
        call = one_unit(z, i, o=o, **gate)
        within(OP.forms[form].function(**call), column(3 / 5, -17 / 90), error_bound(**call, unit=2 * UNIT))


def test_states_by_hand():
    """The same example: m = log 4 after step 2, so c = -17/40 and n = 9/8; the naive form has them in true units."""
    call = one_unit((atanh(0.6), atanh(-0.5)), (0, log(4)), (0, 0), (OPEN, 0), return_state=True)
    bound = error_bound(**call, unit=2 * UNIT)[1]
    within(tuple(slstm(**call)[1]), ([-17 / 40], [9 / 8], [-17 / 90], [log(4)]), tuple(bound))
    naive = slstm_naive(**call)[1]
    within((naive.c, naive.n, naive.h), ([-17 / 10], [9 / 2], [-17 / 90]), (4 * bound.c, 4 * bound.n, bound.h))
    assert naive.m == 0


@FORMS
def test_the_state_is_in_units_of_e_to_the_m(form):
    """c = 1, n = 2, m = log 3 stand for 3 and 6: with f = 1/2, i = 1, z = 1/2: (3/2 + 1/2)/(3 + 1) = 1/2."""
    state = State(np.ones(1), np.full(1, 2.0), np.zeros(1), np.full(1, log(3)))
    call = one_unit([atanh(0.5)], [0], [0], [OPEN], state=state)
    within(OP.forms[form].function(**call), column(0.5), error_bound(**call, unit=2 * UNIT))


@FORMS
@pytest.mark.parametrize("gate", range(4))
def test_each_gate_has_its_own_matrix_and_bias(form, gate):
    """h = 2, R = 3, bias = 1/2 in one gate: a pre-activation of 6.5 there; inputs z = atanh(1/2), 0, 0, 0; c = 0, n = 1, m = 0."""
    R, bias = np.zeros((4, 1, 1)), np.zeros((4, 1))
    R[gate], bias[gate] = 3, 0.5
    state = State(np.zeros(1), np.ones(1), np.full(1, 2.0), np.zeros(1))
    call = {**one_unit([atanh(0.5)], [0], [0], [0]), "R": R, "bias": bias, "state": state}
    s = 1 / (1 + exp(-6.5))
    z = tanh(atanh(0.5) + 6.5) if gate == 0 else 0.5
    i = exp(6.5) if gate == 1 else 1
    f, o = s if gate == 2 else 0.5, s if gate == 3 else 0.5
    within(OP.forms[form].function(**call), column(o * i * z / (f + i)), error_bound(**call, unit=2 * UNIT))


@FORMS
def test_matrices_act_from_the_left_within_a_head(form):
    """(R h)_0 = R_01 h_1: head 0 has R_01 = 1/4, head 1 has R_10 = 1/8; h = (1, 2) and (3, 4): z̃ = (1/2, 0), (0, 3/8)."""
    R = np.zeros((4, 2, 2, 2))
    R[0, 0, 0, 1], R[0, 1, 1, 0] = 1 / 4, 1 / 8
    zeros = np.zeros((2, 1, 2))
    state = State(np.zeros((2, 2)), np.zeros((2, 2)), np.array([[1.0, 2], [3, 4]]), np.full((2, 2), -50.0))
    call = {"z": zeros, "i": zeros, "f": zeros, "o": zeros + OPEN, "R": R, "state": state}
    want = np.array([[[tanh(1 / 2), 0]], [[0, tanh(3 / 8)]]])
    within(OP.forms[form].function(**call), want, error_bound(**call, unit=2 * UNIT))


# -- exact fractions ---------------------------------------------------------------------------------------------------------


@FORMS
def test_weighted_mean_in_fractions(form, rng):
    """Without recurrence, with gates that are powers of 2 and z of denominators 16: (3) in rational numbers."""
    T = 40
    i_log2, f_log2, z16 = rng.integers(-3, 4, T), rng.integers(-2, 2, T), rng.integers(-15, 16, T)
    c, n, want = Fraction(0), Fraction(0), []
    for t in range(T):
        i, f = Fraction(2) ** int(i_log2[t]), Fraction(2) ** int(f_log2[t])
        c, n = f * c + i * Fraction(int(z16[t]), 16), f * n + i
        want.append(float(c / n))
    call = one_unit(np.arctanh(z16 / 16), i_log2 * log(2), f_log2 * log(2), [OPEN] * T, forget="exp")
    within(OP.forms[form].function(**call)[:, 0], want, error_bound(**call, unit=2 * UNIT)[:, 0])


# -- decimal arithmetic ------------------------------------------------------------------------------------------------------


def in_decimals(z, i, f, o, R, bias, forget, state=None):
    """Equations (1) to (3) of one head as they stand, in true units: 100 digits, exponents of any size."""
    with localcontext() as context:
        context.prec, context.Emax, context.Emin = 100, 10**9, -(10**9)
        D = np.vectorize(lambda x: Decimal(float(x)), otypes=[object])

        def sigmoid(x):
            return 1 / (1 + (-x).exp())

        each = np.vectorize(lambda g, x: [lambda x: 2 * sigmoid(2 * x) - 1, Decimal.exp, sigmoid, sigmoid][g](x), otypes=[object])
        inputs, R, bias = D([z, i, f, o]), D(R), D(bias)
        d = R.shape[-1]
        c, n, h = D(np.zeros(d)), D(np.zeros(d)), D(np.zeros(d))
        if state is not None:
            scale = np.vectorize(Decimal.exp, otypes=[object])(D(state.m))
            c, n, h = D(state.c) * scale, D(state.n) * scale, D(state.h)
        result = np.zeros(z.shape)
        for t in range(z.shape[0]):
            a = [inputs[gate, t] + R[gate] @ h + bias[gate] for gate in range(4)]
            cell, i_gate, f_gate, out = each(0, a[0]), each(1, a[1]), each(2 if forget == "sigmoid" else 1, a[2]), each(3, a[3])
            c, n = f_gate * c + i_gate * cell, f_gate * n + i_gate
            h = out * c / n
            result[t] = [float(x) for x in h]
        return result


@pytest.mark.parametrize("forget", ["sigmoid", "exp"])
@pytest.mark.parametrize("hard", ["", *(name for name in OP.hard if name != "no initial state")])
@pytest.mark.parametrize("with_state", [True, False])
def test_is_decimal_arithmetic(forget, hard, with_state, rng):
    call = OP.hard[hard](rng, H=1, T=11) if hard else OP.sample(rng, H=1, T=11)
    call = {**call, "forget": call.get("forget", forget)}
    state = State(*(x[0] for x in call["state"])) if with_state else None
    call |= {"R": call["R"][:, 0], "bias": call["bias"][:, 0], "state": state} | {n: call[n][0] for n in "zifo"}
    want = in_decimals(**call)
    within(slstm(**call), want, error_bound(**call, unit=UNIT) + np.finfo(float).tiny)


# -- gradient ----------------------------------------------------------------------------------------------------------------


def test_gradient_of_one_step_by_hand():
    """c = 1, n = 1, h = 2, m = 0, f = i = 1 (exp of 0), z = 0, o = 1/2: c' = 1, n' = 2, h' = 1/4.

    For dh = 8: do = 8·1/2, dõ = 4·1/4; dc = 8·(1/2)/2 = 2, dn = -8·(1/4)/2 = -1; df' = dc - 1 = 1, di' = 0·dc + dn = -1;
    dz̃ = dc = 2. m: f' and i' give -(1 - 1) = 0. dR = da h, with h = 2.
    """
    state = State(np.ones(1), np.ones(1), np.full(1, 2.0), np.zeros(1))
    call = one_unit([0], [0], [0], [0], bias=np.zeros((4, 1)), forget="exp", state=state)
    g = slstm_vjp(column(8), **call)
    assert [g[n].item() for n in "zifo"] == [2, -1, 1, 1]
    assert g["bias"].ravel().tolist() == [2, -1, 1, 1]
    assert g["R"].ravel().tolist() == [4, -2, 2, 2]
    assert [s.item() for s in g["state"]] == [2, -1, 0, 1]


def test_gradient_goes_back_through_the_transpose():
    """z̃ = R h with R = [[0, 1/2], [0, 0]], tiny h: unit 0 reads unit 1, so unit 0's cotangent returns to unit 1."""
    R = np.zeros((4, 1, 2, 2))
    R[0, 0, 0, 1] = 0.5
    zeros = np.zeros((1, 1, 2))
    state = State(np.zeros((1, 2)), np.zeros((1, 2)), np.zeros((1, 2)), np.full((1, 2), -800.0))
    call = {"z": zeros, "i": zeros, "f": zeros, "o": zeros + OPEN, "R": R, "state": state}
    g = slstm_vjp(np.array([[[1.0, 10.0]]]), **call)
    assert g["z"].ravel().tolist() == [1, 10]
    assert g["state"].h.ravel().tolist() == [0, 0.5]


def test_ties_go_where_the_docstring_says():
    """log f + m = ĩ: a cotangent of the final m goes to f and the old m."""
    state = State(np.zeros(1), np.ones(1), np.zeros(1), np.zeros(1))
    call = one_unit([0], [0], [0], [0], forget="exp", state=state)
    g = slstm_vjp(column(0), **call, dstate=State(np.zeros(1), np.zeros(1), np.zeros(1), np.ones(1)))
    assert [g["i"].item(), g["f"].item(), g["state"].m.item()] == [0, 1, 1]


# -- the published cell --------------------------------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize("with_state", [True, False])
def test_is_the_published_cell(with_state, rng):
    """xlstm's vanilla cell and its gradients by autograd: gates in the order i, f, z, o; states y, c, n, m; time first."""
    torch = pytest.importorskip("torch")
    vanilla = pytest.importorskip("xlstm.blocks.slstm.src.vanilla")
    H, T, d, B = 2, 9, 3, 2
    call = OP.sample(rng, H=H, T=T, d=d, batch=(B,))
    if not with_state:
        call["state"] = State(*(0 * s for s in call["state"][:3]), np.full((B, H, d), -np.inf))
    order = [1, 2, 0, 3]
    gates = np.stack([call["zifo"[g]] for g in order])  # (4, B, H, T, d)
    leaves = [torch.from_numpy(np.ascontiguousarray(x)).requires_grad_() for x in (gates, call["R"][order], call["bias"][order])]
    x, R, b = leaves
    first = [torch.from_numpy(np.where(np.isfinite(s), s, 0)).requires_grad_() for s in call["state"]]  # its m is unused while n = 0
    states = torch.stack([first[j].reshape(B, H * d) for j in (2, 0, 1, 3)])
    wx = x.permute(3, 1, 0, 2, 4).reshape(T, B, 4 * H * d)
    all_states, _, _ = vanilla.slstm_forward(
        wx, states, R.permute(1, 0, 2, 3).reshape(H, 4 * d, d), b.reshape(-1), vanilla.slstm_pointwise_function_registry["slstm"]
    )
    y = all_states[0, 1:].reshape(T, B, H, d).permute(1, 2, 0, 3)
    final = [all_states[j, -1].reshape(B, H, d) for j in (1, 2, 0, 3)]  # c, n, h, m
    bound, state_bound = error_bound(**call, return_state=True, unit=2 * UNIT)
    got, state = slstm(**call, return_state=True)
    within(got, y.detach().numpy(), bound)
    within(tuple(state), tuple(s.detach().numpy() for s in final), tuple(state_bound))
    cotangents = [rng.standard_normal(s.shape) for s in (y, *final)]
    wanted = [*leaves, *(first if with_state else [])]
    want = torch.autograd.grad([y, *final], wanted, [torch.from_numpy(v) for v in cotangents])
    g = slstm_vjp(cotangents[0], **call, dstate=State(*cotangents[1:]))
    ours = [np.stack([g["zifo"[j]] for j in order]), g["R"][order], g["bias"][order], *(g["state"] if with_state else [])]
    for mine, theirs in zip(ours, want, strict=True):
        assert np.all(abs(mine - theirs.numpy()) <= np.sqrt(UNIT) * abs(theirs.numpy()).max())
