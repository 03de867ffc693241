"""gru against numbers worked by hand, exact fractions, ONNX's reference operator and torch."""

from fractions import Fraction
from math import atanh, exp, log, tanh

import numpy as np
import pytest

from refimpl.ops.gated_rnn.gru import OPS, error_bound, gru, gru_vjp

(OP,) = OPS
FORMS = pytest.mark.parametrize("form", list(OP.forms))
RESETS = pytest.mark.parametrize("linear_before_reset", [True, False])
UNIT = 2.0**-53


def within(got, want, bound):
    if isinstance(got, tuple):
        for g, w, b in zip(got, want, bound, strict=True):
            within(g, w, b)
        return
    want = np.asarray(want)
    assert got.shape == want.shape
    assert np.all(abs(got - want) <= bound), f"{np.max(abs(got - want) / bound):.3g} times the bound"


def logit(p):
    return log(p / (1 - p))


def still(r, z, n):
    """Weights of one unit whose gates come from the bias alone."""
    return {"W": np.zeros((3, 1, 1)), "R": np.zeros((3, 1, 1)), "b": np.array([[r], [z], [n]])}


# -- by hand -----------------------------------------------------------------------------------------------------------------


@FORMS
def test_two_steps_by_hand(form):
    """z = 1/4 and n = 3/5 always: h = 3/4·3/5 = 9/20, then 9/20 + 1/4·9/20 = 9/16; z keeps the old state."""
    call = {"x": np.zeros((2, 1)), **still(0.0, logit(1 / 4), atanh(3 / 5)), "return_state": True}
    want = np.array([[9 / 20], [9 / 16]]), np.array([9 / 16])
    within(OP.forms[form].function(**call), want, error_bound(**call, unit=2 * UNIT))


@FORMS
def test_relaxation_in_fractions(form):
    """h_t = n + (h_{-1} - n) z^(t+1), for z = 3/4, n = 3/5, h_{-1} = -2."""
    call = {"x": np.zeros((30, 1)), **still(0.0, log(3), atanh(3 / 5)), "state": np.array([-2.0])}
    want = [float(Fraction(3, 5) + (-2 - Fraction(3, 5)) * Fraction(3, 4) ** (t + 1)) for t in range(30)]
    within(OP.forms[form].function(**call)[:, 0], np.array(want), error_bound(**call, unit=2 * UNIT)[:, 0])


@FORMS
def test_what_the_reset_acts_on(form):
    """z = 0, r = 1/2, h = 2, R_n = 3, b'_n = 1/4 and b_n = -3: n = tanh(-3 + (2·3 + 1/4)/2) or tanh(-3 + (2/2)·3 + 1/4)."""
    call = {"x": np.zeros((1, 1)), **still(0.0, -800.0, -3.0), "state": np.array([2.0])}
    call["R"][2], call["b_recurrent"] = 3, np.array([[0], [0], [0.25]])
    for after, n in ((True, tanh(0.125)), (False, tanh(0.25))):
        got = OP.forms[form].function(**call, linear_before_reset=after)
        within(got, np.array([[n]]), error_bound(**call, linear_before_reset=after, unit=2 * UNIT))


@FORMS
def test_the_reset_before_a_matrix_acts_on_units_it_reads(form):
    """r = (0, 1), h = (5, 7), R_n sends unit 0 to 1 and unit 1 to 0, times 1/10: r h = (0, 7), (r h) R = (0.7, 0), r (h R) = (0, 0.5)."""
    R = np.zeros((3, 2, 2))
    R[2] = [[0, 0.1], [0.1, 0]]
    b = np.array([[-800.0, 800], [-800, -800], [0, 0]])
    call = {"x": np.zeros((1, 1)), "W": np.zeros((3, 1, 2)), "R": R, "b": b, "state": np.array([5.0, 7.0])}
    for after, want in ((True, [0, tanh(0.5)]), (False, [tanh(0.7), 0])):
        got = OP.forms[form].function(**call, linear_before_reset=after)
        within(got, np.array([want]), error_bound(**call, linear_before_reset=after, unit=2 * UNIT))


@FORMS
@RESETS
@pytest.mark.parametrize("gate", range(3))
def test_each_gate_reads_its_own_weights(form, gate, linear_before_reset):
    """x = 1, h = 2; a pre-activation of 3 + 2·(-1) + 1/2 + 1/4 for one gate, and 0 for the others."""
    W, R, b, bb = np.zeros((3, 1, 1)), np.zeros((3, 1, 1)), np.zeros((3, 1)), np.zeros((3, 1))
    W[gate], R[gate], b[gate], bb[gate] = 3, -1, 0.5, 0.25
    z = 1 / (1 + exp(-1.75)) if gate == 1 else 0.5
    inside = 3.5 + (0.5 * -1.75 if linear_before_reset else 0.5 * -2 + 0.25)
    n = tanh(inside) if gate == 2 else 0
    call = {"x": np.ones((1, 1)), "W": W, "R": R, "b": b, "b_recurrent": bb, "state": np.array([2.0])}
    call["linear_before_reset"] = linear_before_reset
    within(OP.forms[form].function(**call), np.array([[(1 - z) * n + 2 * z]]), error_bound(**call, unit=2 * UNIT))


@FORMS
def test_rows_are_multiplied_from_the_right(form):
    """W_n and R_n send unit 0 to unit 1 alone; z = 0, r = 1."""
    W, R = np.zeros((3, 2, 2)), np.zeros((3, 2, 2))
    W[2, 0, 1], R[2, 0, 1] = 0.25, 0.5
    b = np.array([[800.0, 800], [-800, -800], [0, 0]])
    call = {"x": np.array([[1.0, 9.0]]), "W": W, "R": R, "b": b, "state": np.array([2.0, 8.0])}
    within(OP.forms[form].function(**call), np.array([[0, tanh(1.25)]]), error_bound(**call, unit=2 * UNIT))


@RESETS
def test_gradient_of_one_step_by_hand(linear_before_reset):
    """All pre-activations 0 but R_n = 3, h = 2, b'_n = -6 or -3: ñ = 0, so n = 0, z = r = 1/2; cotangents 1 of h and 4 of the state.

    dh = 5: dz̃ = 5·2/4, dñ = 5/2. (2): dp = 5/4 and dr̃ = 0 since p = 0. (2'): dr = 3·5/2·2 = 15, dr̃ = 15/4.
    dh_{-1} = 5/2 + 3·5/4 in both.
    """
    call = {"x": np.array([[7.0]]), **still(0.0, 0.0, 0.0), "state": np.array([2.0])}
    call["R"][2], call["b_recurrent"] = 3, np.array([[0], [0], [-6.0 if linear_before_reset else -3.0]])
    g = gru_vjp(np.array([[1.0]]), **call, linear_before_reset=linear_before_reset, dstate=np.array([4.0]))
    d_r, d_n = (0, 1.25) if linear_before_reset else (3.75, 2.5)
    assert g["b"].ravel().tolist() == [d_r, 2.5, 2.5]
    assert g["W"].ravel().tolist() == [7 * d_r, 17.5, 17.5]
    assert g["b_recurrent"].ravel().tolist() == [d_r, 2.5, d_n]
    assert g["R"].ravel().tolist() == [2 * d_r, 5, 2 * d_n if linear_before_reset else d_n]
    assert g["state"].item() == 6.25
    assert g["x"].item() == 0


# -- ONNX --------------------------------------------------------------------------------------------------------------------


@FORMS
@RESETS
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_is_onnx_reference(form, dtype, linear_before_reset, rng):
    """Time first, gates in the order z, r, n, transposed weights, both biases in one array."""
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    call = {n: x.astype(dtype) for n, x in OP.sample(rng, T=9, c=3, d=4, batch=(2,)).items()}
    order = [1, 0, 2]
    feeds = {
        "X": np.moveaxis(call["x"], 1, 0),
        "W": np.concatenate([call["W"][g].T for g in order])[None],
        "R": np.concatenate([call["R"][g].T for g in order])[None],
        "B": np.concatenate([*call["b"][order], *call["b_recurrent"][order]])[None],
        "h0": call["state"][None],
    }
    helper, kind = onnx.helper, getattr(onnx.TensorProto, {"float64": "DOUBLE", "float32": "FLOAT"}[dtype])
    node = helper.make_node(
        "GRU", ["X", "W", "R", "B", "", "h0"], ["Y", "Y_h"], hidden_size=4, linear_before_reset=int(linear_before_reset)
    )
    outputs = [helper.make_tensor_value_info(n, kind, None) for n in ("Y", "Y_h")]
    graph = helper.make_graph([node], "gru", [helper.make_tensor_value_info(n, kind, v.shape) for n, v in feeds.items()], outputs)
    Y, Y_h = ReferenceEvaluator(helper.make_model(graph)).run(None, feeds)
    options = {"linear_before_reset": linear_before_reset, "return_state": True}
    bound = error_bound(**{n: x.astype(float) for n, x in call.items()}, **options, unit=float(np.finfo(dtype).eps))
    within(OP.forms[form].function(**call, **options), (np.moveaxis(Y[:, 0], 0, 1), Y_h[0]), bound)


# -- torch -------------------------------------------------------------------------------------------------------------------


@pytest.mark.peers
@FORMS
def test_is_torch_with_its_gradients(form, rng):
    torch = pytest.importorskip("torch")
    call = OP.sample(rng, T=17, c=3, d=5, batch=(2,))
    net = torch.nn.GRU(3, 5, batch_first=True, dtype=torch.float64)
    t = torch.from_numpy
    with torch.no_grad():
        net.weight_ih_l0.copy_(t(np.concatenate([w.T for w in call["W"]])))
        net.weight_hh_l0.copy_(t(np.concatenate([w.T for w in call["R"]])))
        net.bias_ih_l0.copy_(t(call["b"].ravel()))
        net.bias_hh_l0.copy_(t(call["b_recurrent"].ravel()))
    x, h = (t(v).requires_grad_() for v in (call["x"], call["state"]))
    y, last = net(x, h[None])
    bound = error_bound(**call, return_state=True, unit=2 * UNIT)
    within(OP.forms[form].function(**call, return_state=True), (y.detach().numpy(), last[0].detach().numpy()), bound)
    cotangents = [rng.standard_normal(s.shape) for s in (y, last[0])]
    leaves = [x, net.weight_ih_l0, net.weight_hh_l0, net.bias_ih_l0, net.bias_hh_l0, h]
    want = [w.numpy() for w in torch.autograd.grad([y, last[0]], leaves, [t(v) for v in cotangents])]
    g = gru_vjp(cotangents[0], **call, dstate=cotangents[1])
    weights = [np.concatenate([w.T for w in g[name]]) for name in "WR"]
    for ours, theirs in zip([g["x"], *weights, g["b"].ravel(), g["b_recurrent"].ravel(), g["state"]], want, strict=True):
        assert np.all(abs(ours - theirs) <= np.sqrt(UNIT) * abs(theirs).max())


@pytest.mark.parametrize("flag", ["yes", 2, None, 0.0])
def test_the_option_is_a_boolean(flag, rng):
    with pytest.raises(ValueError, match="gru: linear_before_reset must be True or False, got"):
        gru(**OP.sample(rng), linear_before_reset=flag)
