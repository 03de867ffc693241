"""Relative attention against numbers worked by hand, four written-out terms, and the XLNet of transformers."""

import math

import numpy as np
import pytest

import refimpl
from refimpl import relative_attention, relative_attention_vjp

OP = refimpl.OPS["relative_attention"]
FORMS = pytest.mark.parametrize("form", list(OP.forms))
NAMES = ("q", "k", "v", "r", "u_bias", "v_bias")


def within(got, want, bound):
    assert got.shape == want.shape
    assert np.all(abs(got - want) <= bound), f"{np.max(abs(got - want) / np.maximum(bound, 1e-300)):.3g} times the bound"


def bound(*args, unit=2.0**-53, **options):
    return OP.error_bound(*args, unit=unit, **options)


def draw(rng, n, m, H=2, d=3, R=None):
    call = OP.sample(rng, n=n, m=m, H=H, d=d, e=2)
    return call if R is None else call | {"r": rng.standard_normal((H, R, d))}


@FORMS
def test_worked_by_hand(form):
    """d = 1; scores (q + u) k + (q + w) r: weights come out as small integers."""
    log = np.log
    q, k, v = np.array([[1.0], [2.0]]), np.array([[0.0], [log(2)], [log(3)]]), np.array([[1.0], [10.0], [100.0]])
    r, u, w = np.array([[0.0], [log(5)], [log(7)]]), np.array([-1.0]), np.array([0.0])
    # query 0 at 1: content (1 - 1) k = 0; position r_1, r_0: weights 5, 1
    # query 1 at 2: content 1 k: 1, 2, 3; position 2 r_2, 2 r_1, 0: 49, 25, 1
    want = np.array([[(5 * 1 + 1 * 10) / 6], [(49 * 1 + 50 * 10 + 3 * 100) / 102]])
    args = (q, k, v, r, u, w)
    within(OP.forms[form].function(*args), want, 4 * bound(*args))


@FORMS
def test_looks_both_ways_by_hand(form):
    """Position alone, d = 1, one query between two keys: r symmetric, or with rows for both signs."""
    log, nothing = np.log, np.zeros((3, 1))
    v, one, zero = np.array([[1.0], [10.0], [100.0]]), np.ones(1), np.zeros(1)
    symmetric = (nothing, nothing, v, log([[1.0], [2], [3]]), zero, one)
    got = OP.forms[form].function(*symmetric, causal=False)
    want = np.array([[1 + 20 + 300.0], [2 + 10 + 200.0], [3 + 20 + 100.0]]) / np.array([[6], [5], [6]])
    within(got, want, 4 * bound(*symmetric, causal=False))
    signed = (nothing, nothing, v, log([[1.0], [2], [3], [5], [7]]), zero, one)  # distances 0, 1, 2, -2, -1
    got = OP.forms[form].function(*signed, causal=False)
    want = np.array([[1 + 70 + 500.0], [2 + 10 + 700.0], [3 + 20 + 100.0]]) / np.array([[13], [10], [6]])
    within(got, want, 4 * bound(*signed, causal=False))


@FORMS
@pytest.mark.parametrize(("n", "m"), [(4, 4), (3, 7), (1, 5), (5, 2)])
@pytest.mark.parametrize("causal", [True, False])
def test_four_terms_written_out(form, n, m, causal, rng):
    """Terms (a) to (d) of section 3.3, in plain Python."""
    call = draw(rng, n, m)
    q, k, v, r, u, w = (call[name] for name in NAMES)
    want = np.zeros((2, n, 2))
    for h, i in np.ndindex(2, n):
        P, weight = i + m - n, {}
        for j in range(m):
            if j <= P or not causal:
                x = min(abs(P - j), m - 1)
                terms = [math.fsum(a * b) for a, b in ((q[h, i], k[h, j]), (q[h, i], r[h, x]), (u[h], k[h, j]), (w[h], r[h, x]))]
                weight[j] = math.exp(math.fsum(terms) / math.sqrt(3))
        if weight:
            want[h, i] = sum(p * v[h, j] for j, p in weight.items()) / math.fsum(weight.values())
    within(OP.forms[form].function(**call, causal=causal), want, 2 * bound(**call, causal=causal))


def test_queries_before_the_first_key_see_nothing(rng):
    call = draw(rng, 5, 2)
    assert not relative_attention(**call)[:, :3].any()
    gradients = relative_attention_vjp(rng.standard_normal((2, 5, 2)), **call)
    assert not gradients["q"][:, :3].any()


def test_without_positions_it_is_attention(rng):
    call = draw(rng, 3, 6)
    call |= {"r": 0 * call["r"], "u_bias": 0 * call["u_bias"]}
    within(relative_attention(**call), refimpl.attention(call["q"], call["k"], call["v"], causal=True), 2 * bound(**call))


def test_gradient_by_hand():
    """One query, two keys of equal weight: ds = ± (v_0 - v_1) / 4."""
    q = np.array([[2.0]])
    v, r = np.array([[3.0], [5.0]]), np.array([[0.0], [0.0]])
    k = np.array([[1.0], [1.0]])
    g = relative_attention_vjp(np.array([[8.0]]), q, k, v, r, np.array([1.0]), np.array([-1.0]))
    ds = 8 * np.array([(3 - 4) / 2, (5 - 4) / 2])  # of keys 0 (distance 1) and 1 (distance 0)
    np.testing.assert_allclose(g["v"], [[4], [4]])
    np.testing.assert_allclose(g["k"][:, 0], ds * (2 + 1))
    np.testing.assert_allclose(g["r"][:, 0], ds[::-1] * (2 - 1))
    np.testing.assert_allclose([g["q"][0, 0], g["u_bias"][0], g["v_bias"][0]], 0, atol=1e-15)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"r": np.zeros((2, 5, 3))}, r"r must have a row per distance, m = 6; got 5 rows"),
        ({"r": np.zeros((2, 5, 3)), "causal": False}, r"m = 6, or n \+ m - 1 = 8 .*; got 5 rows"),
        ({"r": np.zeros((2, 8, 3))}, "m = 6; got 8 rows"),
        ({"r": np.zeros((2, 6, 2))}, "r must have shape"),
        ({"u_bias": np.zeros((3, 3))}, "u_bias must have shape"),
        ({"causal": 1}, "causal must be True or False"),
        ({"q": np.zeros((2, 3, 3), complex)}, "q must be real"),
    ],
)
def test_bad_input_is_refused_by_name(change, says, rng):
    with pytest.raises((ValueError, TypeError), match=f"relative_attention: .*{says}"):
        relative_attention(**draw(rng, 3, 6) | change)


@pytest.mark.peers
@pytest.mark.parametrize(("n", "m"), [(5, 5), (3, 8)])
@pytest.mark.parametrize("causal", [True, False])
def test_is_xlnet_of_transformers(n, m, causal, rng):
    """Its core, with rows for the distances m, m - 1 ... 1 - n, masked where we are causal."""
    torch = pytest.importorskip("torch")
    xlnet = pytest.importorskip("transformers.models.xlnet.modeling_xlnet")
    heads, d = 2, 4
    layer = xlnet.XLNetRelativeAttention(xlnet.XLNetConfig(d_model=heads * d, n_head=heads, dropout=0.0)).eval().double()
    call = {name: value for name, value in draw(rng, n, m, heads, d).items() if name != "r"}
    call["v"] = rng.standard_normal((heads, m, d))
    r = rng.standard_normal((heads, m + n, d))  # row x is the distance x, and row -x the distance -x; row m is not looked at
    with torch.no_grad():
        layer.r_w_bias.copy_(torch.tensor(call["u_bias"]))
        layer.r_r_bias.copy_(torch.tensor(call["v_bias"]))
        to_theirs = lambda x: torch.tensor(x).permute(1, 0, 2)[:, None]  # (time, batch, heads, d)
        rows = to_theirs(r[:, [x % (m + n) for x in range(m, -n, -1)]])
        mask = torch.tensor(~refimpl.sliding_window_mask(n, m, window=(None, 0)))[:, :, None, None].double() if causal else None
        got = layer.rel_attn_core(to_theirs(call["q"]), to_theirs(call["k"]), to_theirs(call["v"]), rows, attn_mask=mask)
    got = got[:, 0].permute(1, 0, 2).numpy()
    call["r"] = r[:, :m] if causal else np.delete(r, m, axis=1)
    within(got, relative_attention(**call, causal=causal), 2 * bound(**call, causal=causal))
