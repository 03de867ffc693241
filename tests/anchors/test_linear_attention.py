"""Linear attention against exact fractions, numbers worked by hand, ONNX's reference and public implementations."""

from fractions import Fraction

import numpy as np
import pytest

import refimpl
from refimpl.ops.linear_attention.linear_attention import OPS, error_bound, linear_attention_vjp
from refimpl.ops.linear_attention.linear_attention_cases import sample

(OP,) = OPS
FORMS = pytest.mark.parametrize("f", [f.function for f in OP.forms.values()], ids=list(OP.forms))


def within(got, want, bound):
    assert got.shape == want.shape
    assert np.all(abs(got - want) <= bound), f"{np.max(abs(got - want) / np.maximum(bound, 1e-300)):.3g} times the bound"


# -- by hand ---------------------------------------------------------------------------------------------------------


@FORMS
def test_two_steps_of_the_gated_delta_rule(f):
    """S = (8, 0); halved: (4, 0). The key (1, 1) recalls 4, half of the way to 10 is +3 in both rows: (7, 3)."""
    k = np.array([[1.0, 0.0], [1.0, 1.0]])
    q = np.array([[1.0, 1.0], [1.0, 2.0]])
    call = {"beta": np.array([1.0, 0.5]), "decay": np.log([1.0, 0.5]), "scale": 1.0}
    o, S = f(q, k, np.array([[8.0], [10.0]]), **call, return_state=True)
    np.testing.assert_allclose(o[:, 0], [8, 7 + 2 * 3], rtol=2.0**-50)
    np.testing.assert_allclose(S[:, 0], [7, 3], rtol=2.0**-50)


@FORMS
def test_two_steps_with_a_decay_per_channel(f):
    """S = (3, 6) + 2 (1, 1) = (5, 8); then (5/2, 8·1/4) + 4 (1, 0) = (6.5, 2)."""
    k, q = np.array([[1.0, 1.0], [1.0, 0.0]]), np.array([[1.0, 0.0], [2.0, 1.0]])
    decay = np.array([[0.0, 0.0], np.log([0.5, 0.25])])
    o, S = f(q, k, np.array([[2.0], [4.0]]), decay=decay, scale=1.0, state=np.array([[3.0], [6.0]]), return_state=True)
    np.testing.assert_allclose(S[:, 0], [6.5, 2], rtol=2.0**-50)
    np.testing.assert_allclose(o[:, 0], [5, 2 * 6.5 + 2], rtol=2.0**-50)


@FORMS
def test_two_steps_normalised(f):
    """Weights 1·1 and 1·3: a mean of 10 and 20; the decay of 1/2 makes the first weight 1/2."""
    q, k, v = np.ones((2, 1)), np.array([[1.0], [3.0]]), np.array([[10.0], [20.0]])
    np.testing.assert_allclose(f(q, k, v, normalize=True)[:, 0], [10, 70 / 4], rtol=2.0**-50)
    np.testing.assert_allclose(f(q, k, v, normalize=True, decay=np.log([1.0, 0.5]))[:, 0], [10, 65 / 3.5], rtol=2.0**-50)


@FORMS
def test_feature_maps_by_hand(f):
    """relu: 2·3; elu+1: (2+1)(3+1) and, at -log 2, 1/2; taylor with d = 1: 1 + s + s²/2."""
    one, two, three = (np.full((1, 1), x) for x in (1.0, 2.0, 3.0))
    for option, want in (("relu", 6), ("elu+1", 12), ("taylor", 1 + 6 + 18)):
        np.testing.assert_allclose(f(two, three, one, feature_map=option)[0, 0], want, rtol=2.0**-50)
    np.testing.assert_allclose(f(-np.log(two), three, one, feature_map="elu+1")[0, 0], 0.5 * 4, rtol=2.0**-50)
    assert f(-two, three, one, feature_map="relu")[0, 0] == 0


@FORMS
def test_heads_of_queries_share_consecutively(f):
    """Heads 0 and 1 read the first head of v, 2 and 3 the second."""
    q, k, v = np.ones((4, 1, 1)), np.ones((2, 1, 1)), np.array([3.0, 5.0]).reshape(2, 1, 1)
    np.testing.assert_array_equal(f(q, k, v)[:, 0, 0], [3, 3, 5, 5])


def test_gradient_by_hand():
    """One step with d = e = 1: o = q (a S + k β (v - a S k)), with a = 1/2, S = 4, k = 3, β = 1/5, v = 11, q = 7."""
    q, k, v, S = (np.full((1, 1), x) for x in (7.0, 3.0, 11.0, 4.0))
    g = linear_attention_vjp(
        np.ones((1, 1)), q, k, v, decay=np.log([0.5]), beta=np.array([0.2]), state=S, dstate=np.full((1, 1), 100.0)
    )
    write = 107.0  # o and the final state together: q + dstate
    want = {
        "q": 2 + 3 * (11 - 6) / 5,
        "k": write * (11 - 6 - 3 * 2) / 5,
        "v": write * 3 / 5,
        "beta": write * 3 * (11 - 6),
        "decay": write * 2 * (1 - 9 / 5),
        "state": write * 0.5 * (1 - 9 / 5),
    }
    assert g.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(g[name].ravel(), [value], rtol=2.0**-48, err_msg=name)


# -- exact fractions ---------------------------------------------------------------------------------------------------


def exact(q, k, v, a, beta, S):
    """The gated delta rule in rational numbers: decays a as factors, beta None for a sum."""
    T, d, e = len(k), len(k[0]), len(v[0])
    q, k, v = ([[Fraction(float(x)) for x in row] for row in m] for m in (q, k, v))
    S, out = [[Fraction(float(x)) for x in row] for row in S], []
    for t in range(T):
        S = [[a[t][i] * S[i][j] for j in range(e)] for i in range(d)]
        u = [v[t][j] if beta is None else Fraction(float(beta[t])) * (v[t][j] - sum(S[i][j] * k[t][i] for i in range(d))) for j in range(e)]
        S = [[S[i][j] + k[t][i] * u[j] for j in range(e)] for i in range(d)]
        out.append([sum(S[i][j] * q[t][i] for i in range(d)) for j in range(e)])
    return out, S


@FORMS
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("delta", [False, True])
def test_against_exact_fractions(f, per_channel, delta, rng):
    """Decays are powers of two; that their logarithms are rounded is within the bound."""
    call = sample(rng, Hq=1, Hkv=1, T=9, d=3, e=2)
    q, k, v, beta, S = (call[n][0] for n in ("q", "k", "v", "beta", "state"))
    powers = rng.integers(-2, 2, (9, 3)) if per_channel else rng.integers(-2, 2, (9, 1)) + np.zeros((9, 3), int)
    decay = powers * np.log(2.0)
    options = {"decay": decay if per_channel else decay[:, 0], "state": S, "scale": 1.0, "return_state": True} | ({"beta": beta} if delta else {})
    out, last = exact(q, k, v, [[Fraction(2) ** int(p) for p in row] for row in powers], beta if delta else None, S)
    for got, want, bound in zip(f(q, k, v, **options), (out, last), error_bound(q, k, v, **options, unit=2.0**-53), strict=True):
        for index, value in np.ndenumerate(got):
            assert abs(Fraction(float(value)) - want[index[0]][index[1]]) <= Fraction(float(2 * bound[index]))


@FORMS
def test_small_integers_are_exact(f, rng):
    """Sums of products of small integers have no rounding at all, in any order."""
    q, k, v = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((20, 4), (20, 4), (20, 3)))
    out, _ = exact(q, k, v, [[Fraction(1)] * 4] * 20, None, np.zeros((4, 3)))
    np.testing.assert_array_equal(f(q, k, v, scale=1.0), np.array(out, dtype=np.float32))


# -- published code ----------------------------------------------------------------------------------------------------

RULES = {"linear": (), "gated": ("decay",), "delta": ("beta",), "gated_delta": ("decay", "beta")}


@FORMS
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_is_onnx_linear_attention(f, rule, per_channel, rng):
    """The operator LinearAttention of ai.onnx, in float32: packed heads, (batch, time, heads × features)."""
    onnx_op = pytest.importorskip("onnx.reference.ops.op_linear_attention")
    call = {n: x.astype(np.float32) for n, x in sample(rng, Hq=6, Hkv=2, T=23, d=5, batch=(2,), per_channel=per_channel).items()}
    options = {n: call[n] for n in RULES[rule]} | {"state": call["state"]}

    def packed(x):
        x = x if x.ndim == 4 else x[..., None]
        return np.moveaxis(x, 1, 2).reshape(x.shape[0], x.shape[2], -1)

    # called as a function: of the operator's node it needs none
    operator = onnx_op.LinearAttention.__new__(onnx_op.LinearAttention)
    want, state = operator._run(
        packed(call["q"]),
        packed(call["k"]),
        packed(call["v"]),
        call["state"],
        *(packed(options[n]) if n in options else None for n in ("decay", "beta")),
        q_num_heads=6,
        kv_num_heads=2,
        update_rule=rule,
    )
    arrays = [call[n] for n in ("q", "k", "v")]
    o, S = f(*arrays, **options, return_state=True)
    wide = {n: x.astype(np.float64) for n, x in options.items()}
    bound, bound_S = error_bound(*(x.astype(np.float64) for x in arrays), **wide, return_state=True, unit=2.0**-24)
    within(packed(o), want, 2 * packed(bound))
    within(S, state, 2 * bound_S)


def torch_call(rng, **sizes):
    torch = pytest.importorskip("torch")
    call = sample(rng, Hq=3, Hkv=3, T=70, d=8, e=5, batch=(2,), **sizes)
    return torch, call, {n: torch.tensor(np.moveaxis(x, 1, 2).copy()) if n != "state" else torch.tensor(x) for n, x in call.items()}


def numpy_of(x):
    return np.moveaxis(x.numpy(), 1, 2)


@FORMS
@pytest.mark.peers
@pytest.mark.parametrize("name", ["torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"])
def test_is_the_gated_delta_rule_of_qwen3_next(f, name, rng):
    """In float32, to which it casts."""
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    _, call, tensors = torch_call(rng)
    theirs = getattr(modeling, name)
    q, k, v, decay, beta = (tensors[n].float() for n in ("q", "k", "v", "decay", "beta"))
    want, state = theirs(q, k, v, g=decay, beta=beta, initial_state=tensors["state"].float(), output_final_state=True)
    options = {"return_state": True, **{n: call[n] for n in ("decay", "beta", "state")}}
    bound, bound_S = error_bound(call["q"], call["k"], call["v"], **options, unit=2.0**-24)
    o, S = f(call["q"], call["k"], call["v"], **options)
    within(numpy_of(want), o, 2 * bound)
    within(state.numpy(), S, 2 * bound_S)


@FORMS
@pytest.mark.peers
@pytest.mark.parametrize("name", ["reference.gated_delta", "chunkwise.gated_delta_chunkwise"])
def test_is_opengdn(f, name, rng):
    """Decays as factors, the state transposed, no scale; gradients by torch's differentiation of its recurrence."""
    torch, call, tensors = torch_call(rng)
    pytest.importorskip("opengdn")
    module, function = name.split(".")
    theirs = getattr(pytest.importorskip(f"opengdn.{module}"), function)
    leaves = {n: x.requires_grad_() for n, x in tensors.items()}
    alpha, transposed = leaves["decay"].exp(), leaves["state"].transpose(-1, -2)
    want, state = theirs(leaves["q"], leaves["k"], leaves["v"], alpha, leaves["beta"], transposed)
    options = {n: call[n] for n in ("decay", "beta", "state")} | {"scale": 1.0}
    arrays = [call[n] for n in ("q", "k", "v")]
    bound, bound_S = error_bound(*arrays, **options, return_state=True, unit=2.0**-53)
    o, S = f(*arrays, **options, return_state=True)
    within(numpy_of(want.detach()), o, 2 * bound)
    within(np.swapaxes(state.detach().numpy(), -1, -2), S, 2 * bound_S)

    dy, dS = rng.standard_normal(o.shape), rng.standard_normal(S.shape)
    torch.autograd.backward([want, state], [torch.tensor(np.moveaxis(dy, 1, 2).copy()), torch.tensor(np.swapaxes(dS, -1, -2).copy())])
    for n, gradient in refimpl.linear_attention_vjp(dy, *arrays, **options, dstate=dS).items():
        theirs_n = leaves[n].grad.numpy() if n == "state" else numpy_of(leaves[n].grad)
        within(gradient, theirs_n, 2.0**-53 * 1000 * np.max(abs(theirs_n)))


@FORMS
@pytest.mark.peers
@pytest.mark.parametrize("option", ["relu", "elu+1"])
def test_gradients_of_normalised_attention_are_torch_s(f, option, rng):
    """torch differentiates (4) with its own elu and relu; the value of the forms as well."""
    torch, call, _ = torch_call(rng)
    for n in ("q", "k"):
        call[n][..., 0] = abs(call[n][..., 0]) + 1  # a query whose features all are 0 has no mean
    leaves = {n: torch.tensor(np.moveaxis(call[n], 1, 2).copy(), requires_grad=True) for n in ("q", "k", "v", "decay")}
    phi = torch.relu if option == "relu" else (lambda x: torch.nn.functional.elu(x) + 1)
    q, k, v, g = (leaves[n].transpose(1, 2) for n in ("q", "k", "v", "decay"))
    F = g.cumsum(-1)
    weights = torch.tril(phi(q) @ phi(k).transpose(-1, -2) * torch.exp(F[..., :, None] - F[..., None, :]))
    want = weights @ v / weights.sum(-1, keepdim=True)
    arrays, options = [call[n] for n in ("q", "k", "v")], {"decay": call["decay"], "feature_map": option, "normalize": True}
    within(f(*arrays, **options), want.detach().numpy(), 2 * error_bound(*arrays, **options, unit=2.0**-53))
    dy = rng.standard_normal(want.shape)
    want.backward(torch.tensor(dy))
    for n, gradient in refimpl.linear_attention_vjp(dy, *arrays, **options).items():
        theirs = numpy_of(leaves[n].grad)
        within(gradient, theirs, 2.0**-53 * 1000 * np.max(abs(theirs)))
