"""lstm against numbers worked by hand, ONNX's reference operator and torch."""

from math import atanh, exp, log, tanh

import numpy as np
import pytest

from refimpl.ops.gated_rnn.lstm import OPS, State, error_bound, lstm, lstm_vjp

(OP,) = OPS
FORMS = pytest.mark.parametrize("form", list(OP.forms))
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


# -- by hand -----------------------------------------------------------------------------------------------------------------


@FORMS
def test_two_steps_by_hand(form):
    """Gates i, f, g, o = 1/4, 1/2, 3/5, 3/4 from the bias alone: c = 3/20, then 3/40 + 3/20 = 9/40; h = 3/4 tanh(c)."""
    b = np.array([[logit(1 / 4)], [logit(1 / 2)], [atanh(3 / 5)], [logit(3 / 4)]])
    call = {"x": np.zeros((2, 1)), "W": np.zeros((4, 1, 1)), "R": np.zeros((4, 1, 1)), "b": b, "return_state": True}
    want = np.array([[0.75 * tanh(3 / 20)], [0.75 * tanh(9 / 40)]]), State(np.array([0.75 * tanh(9 / 40)]), np.array([9 / 40]))
    within(OP.forms[form].function(**call), want, error_bound(**call, unit=2 * UNIT))


@FORMS
@pytest.mark.parametrize("gate", range(4))
def test_each_gate_reads_its_own_weights(form, gate):
    """x = 1, h = 2, c = 1, a pre-activation of 3 + 2·5 + 7 = 20 for one gate and 0 (1/2, 1/2, 0, 1/2) for the others."""
    W, R, b = np.zeros((4, 1, 1)), np.zeros((4, 1, 1)), np.zeros((4, 1))
    W[gate], R[gate], b[gate] = 3, 5, 7
    s = 1 / (1 + exp(-20.0))
    c = [0.5, s, 0.5 + tanh(20.0) / 2, 0.5][gate]
    h = (s if gate == 3 else 0.5) * tanh(c)
    call = {"x": np.ones((1, 1)), "W": W, "R": R, "b": b, "state": State(np.array([2.0]), np.array([1.0])), "return_state": True}
    want = np.array([[h]]), State(np.array([h]), np.array([c]))
    within(OP.forms[form].function(**call), want, error_bound(**call, unit=2 * UNIT))


@FORMS
def test_rows_are_multiplied_from_the_right(form):
    """W_g sends x_0 to unit 1 alone, R_g sends h_0 to unit 1 alone; all gates but g are wide open, so c_1 adds the tanhs."""
    W, R = np.zeros((4, 2, 2)), np.zeros((4, 2, 2))
    W[2, 0, 1], R[2, 0, 1] = 0.25, 0.5
    b = np.array([[40.0, 40], [40, 40], [0, 0], [40, 40]])
    call = {"x": np.array([[1.0, 9.0]]), "W": W, "R": R, "b": b, "state": State(np.array([2.0, 8.0]), np.zeros(2))}
    within(OP.forms[form].function(**call), np.array([[0, tanh(tanh(1.25))]]), error_bound(**call, unit=2 * UNIT))


def test_gradient_of_one_step_by_hand():
    """All pre-activations 0, c_{-1} = 2: c = 1, h = tanh(1)/2; with t = 1 - tanh² 1, dc = t/2 + 10 for cotangents 1 and 10 of h, c.

    do = tanh(1), so dõ = tanh(1)/4; df̃ = 2 dc/4; dĩ = 0 since g = 0; dg̃ = dc/2; dc_{-1} = dc/2. x = 3, h_{-1} = 5.
    """
    call = {"x": np.array([[3.0]]), "W": np.zeros((4, 1, 1)), "R": np.zeros((4, 1, 1)), "b": np.zeros((4, 1))}
    call["state"] = State(np.array([5.0]), np.array([2.0]))
    g = lstm_vjp(np.array([[1.0]]), **call, dstate=State(np.zeros(1), np.array([10.0])))
    dc = (1 - tanh(1) ** 2) / 2 + 10
    da = np.array([0, dc / 2, dc / 2, tanh(1) / 4])
    for name, factor in {"b": 1, "W": 3, "R": 5}.items():
        assert np.all(abs(g[name].ravel() - factor * da) <= 16 * UNIT * factor * abs(da)), name
    assert g["x"].item() == g["state"].h.item() == 0
    assert abs(g["state"].c.item() - dc / 2) <= 16 * UNIT * dc


# -- ONNX --------------------------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("with_state", [True, False])
def test_is_onnx_reference(form, dtype, with_state, rng):
    """Time first, gates in the order i, o, f, g, transposed weights, and a bias of two halves."""
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    call = OP.sample(rng, T=9, c=3, d=4, batch=(2,))
    call = {n: State(*(s.astype(dtype) for s in x)) if n == "state" else x.astype(dtype) for n, x in call.items()}
    if not with_state:
        call["state"] = State(*(0 * s for s in call["state"]))
    order = [0, 3, 1, 2]
    half = rng.standard_normal((4, 4)).astype(dtype)
    feeds = {
        "X": np.moveaxis(call["x"], 1, 0),
        "W": np.concatenate([call["W"][g].T for g in order])[None],
        "R": np.concatenate([call["R"][g].T for g in order])[None],
        "B": np.concatenate([*(call["b"] - half)[order], *half[order]])[None],
    }
    node_inputs = ["X", "W", "R", "B"]
    if with_state:
        feeds |= {"h0": call["state"].h[None], "c0": call["state"].c[None]}
        node_inputs += ["", "h0", "c0"]
    helper, kind = onnx.helper, getattr(onnx.TensorProto, {"float64": "DOUBLE", "float32": "FLOAT"}[dtype])
    node = helper.make_node("LSTM", node_inputs, ["Y", "Y_h", "Y_c"], hidden_size=4)
    outputs = [helper.make_tensor_value_info(n, kind, None) for n in ("Y", "Y_h", "Y_c")]
    graph = helper.make_graph([node], "lstm", [helper.make_tensor_value_info(n, kind, v.shape) for n, v in feeds.items()], outputs)
    Y, Y_h, Y_c = ReferenceEvaluator(helper.make_model(graph)).run(None, feeds)
    wide = {n: State(*(s.astype(float) for s in x)) if n == "state" else x.astype(float) for n, x in call.items()}
    bound = error_bound(**wide, return_state=True, unit=float(np.finfo(dtype).eps))
    got = OP.forms[form].function(**call, return_state=True)
    within(got, (np.moveaxis(Y[:, 0], 0, 1), (Y_h[0], Y_c[0])), bound)


# -- torch -------------------------------------------------------------------------------------------------------------------


@pytest.mark.peers
@FORMS
def test_is_torch_with_its_gradients(form, rng):
    torch = pytest.importorskip("torch")
    call = OP.sample(rng, T=17, c=3, d=5, batch=(2,))
    net = torch.nn.LSTM(3, 5, batch_first=True, dtype=torch.float64)
    t = torch.from_numpy
    with torch.no_grad():
        net.weight_ih_l0.copy_(t(np.concatenate([w.T for w in call["W"]])))
        net.weight_hh_l0.copy_(t(np.concatenate([w.T for w in call["R"]])))
        net.bias_ih_l0.copy_(t(call["b"].ravel()))
        net.bias_hh_l0.zero_()
    x, h, c = (t(v).requires_grad_() for v in (call["x"], *call["state"]))
    y, (h_last, c_last) = net(x, (h[None], c[None]))
    final = (h_last[0], c_last[0])
    got = OP.forms[form].function(**call, return_state=True)
    within(got, (y.detach().numpy(), tuple(s.detach().numpy() for s in final)), error_bound(**call, return_state=True, unit=2 * UNIT))
    cotangents = [rng.standard_normal(s.shape) for s in (y, *final)]
    leaves = [x, net.weight_ih_l0, net.weight_hh_l0, net.bias_ih_l0, h, c]
    want = [w.numpy() for w in torch.autograd.grad([y, *final], leaves, [t(v) for v in cotangents])]
    g = lstm_vjp(cotangents[0], **call, dstate=State(*cotangents[1:]))
    stacked = [g["x"], np.concatenate([w.T for w in g["W"]]), np.concatenate([w.T for w in g["R"]]), g["b"].ravel(), *g["state"]]
    for ours, theirs in zip(stacked, want, strict=True):
        assert np.all(abs(ours - theirs) <= np.sqrt(UNIT) * abs(theirs).max())


def test_a_step_is_a_call_of_length_1(rng):
    call = OP.sample(rng, T=6)
    whole, x, state = lstm(**call), call.pop("x"), call.pop("state")
    for t in range(6):
        h, state = lstm(x[t : t + 1], **call, state=state, return_state=True)
        assert np.array_equal(h[0], whole[t])
