"""AFT against numbers worked by hand, the paper's equations in plain Python, and attention with a head per channel."""

import math

import numpy as np
import pytest

import refimpl
from refimpl import aft, aft_conv, aft_local, aft_simple, aft_vjp

OPS = {name: refimpl.OPS[name] for name in ("aft", "aft_local", "aft_simple", "aft_conv")}
FORMS = pytest.mark.parametrize(("name", "form"), [(name, form) for name, op in OPS.items() for form in op.forms])
UNIT = 2.0**-53


def within(got, want, bound):
    assert got.shape == want.shape
    assert np.all(abs(got - want) <= bound), f"{np.max(abs(got - want) / np.maximum(bound, 1e-300)):.3g} times the bound"


def draw(name, rng, T, **sizes):
    return OPS[name].sample(rng, T=T, **sizes) | ({"s": 3} if name == "aft_local" else {})


def biases(name, call):
    """w_tj of each head, in plain Python: a dict by head, t, j."""
    T, w = call["q"].shape[-2], call.get("w")
    table = {}
    for h in range(call["q"].shape[0] if name == "aft_conv" else 1):
        for t in range(T):
            for j in range(T):
                if name == "aft":
                    b = w[t, j]
                elif name == "aft_local":
                    b = w[t, j] if abs(t - j) < call["s"] else 0.0
                elif name == "aft_conv":
                    centre = (w.shape[-1] - 1) // 2
                    b = w[h, t - j + centre] if abs(t - j) <= centre else 0.0
                else:
                    b = 0.0
                table[h, t, j] = float(b)
    return table


@FORMS
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("T", [1, 2, 8])
def test_equations_of_the_paper(name, form, causal, T, rng):
    """Equation 2 term by term, with the w of sections 3.1 and 3.2; exponentials and sums by the math module."""
    call = draw(name, rng, T)
    w, heads = biases(name, call), name == "aft_conv"
    q, k, v = (call[x] if heads else call[x][None] for x in "qkv")
    want = np.zeros(q.shape)
    for h, t, c in np.ndindex(q.shape):
        terms = [(math.exp(k[h, j, c] + w[h, t, j]), v[h, j, c]) for j in range(t + 1 if causal else T)]
        want[h, t, c] = math.fsum(e * x for e, x in terms) / math.fsum(e for e, _ in terms) / (1 + math.exp(-q[h, t, c]))
    limit = 2 * OPS[name].error_bound(**call, causal=causal, unit=UNIT)
    within(OPS[name].forms[form].function(**call, causal=causal), want if heads else want[0], limit)


def test_worked_by_hand():
    """Weights that are small integers, gates 1/2 and 3/4."""
    q, k, v = np.log([[1.0], [3.0]]), np.log([[1.0], [2.0]]), np.array([[6.0], [12.0]])
    w = np.log([[1.0, 1.0], [4.0, 1.0]])
    args = (q, k, v, w)
    want = np.array([[(6 + 24) / 3 / 2], [(4 * 6 + 2 * 12) / 6 * 3 / 4]])
    within(aft(*args), want, 4 * OPS["aft"].error_bound(*args, unit=UNIT))
    causal = np.array([[6 / 2], [8 * 3 / 4]])
    within(aft(*args, causal=True), causal, 4 * OPS["aft"].error_bound(*args, causal=True, unit=UNIT))
    within(aft_simple(q, k, v), np.array([[10 / 2], [10 * 3 / 4]]), 4 * OPS["aft_simple"].error_bound(q, k, v, unit=UNIT))


def test_gradient_by_hand():
    """Two keys of equal weight, the gate at 1/2 with slope 1/4."""
    q, k, v, w = np.zeros((2, 1)), np.zeros((2, 1)), np.array([[2.0], [6.0]]), np.zeros((2, 2))
    g = aft_vjp(np.array([[8.0], [0.0]]), q, k, v, w)
    np.testing.assert_allclose(g["q"], [[8 * 4 / 4], [0]])
    np.testing.assert_allclose(g["v"], [[2], [2]])
    np.testing.assert_allclose(g["k"], [[8 / 2 / 2 * (2 - 4)], [8 / 2 / 2 * (6 - 4)]])
    np.testing.assert_allclose(g["w"], [[-4, 4], [0, 0]])


def test_excluded_pairs_and_rows():
    k, v = np.zeros((3, 1)), np.array([[1.0], [2.0], [np.nan]])
    w = np.zeros((3, 3))
    w[:, 2] = w[1] = -np.inf
    got = aft(np.full((3, 1), 100.0), k, v, w)
    np.testing.assert_allclose(got, [[1.5], [0], [1.5]])
    g = aft_vjp(np.ones((3, 1)), np.zeros((3, 1)), k, np.where(np.isnan(v), 3, v), w)
    assert not g["w"][1].any()
    assert g["k"][2, 0] == 0


def test_nothing_is_lost_where_the_paper_s_correction_is():
    """A key of e^60 silenced by a bias of -100: its own row sees the other keys as if it were not there."""
    k, v, q = np.array([[0.0], [60.0], [0.0]]), np.array([[1.0], [50.0], [3.0]]), np.full((3, 1), 100.0)
    w = np.array([0.0, -100.0, 0.0])  # distances -1, 0, 1
    want = (1 + 50 * math.exp(-40) + 3) / (2 + math.exp(-40))
    for form in OPS["aft_conv"].forms.values():
        assert abs(form.function(q, k, v, w)[1, 0] - want) <= 16 * UNIT * 50


@pytest.mark.parametrize("causal", [False, True])
def test_a_channel_is_a_head_of_attention(causal, rng):
    """Queries (1, 0 ...), keys k_j: scores of a head per channel, the biases added."""
    call = draw("aft", rng, 6, d=3)
    k, v = (call[x].T[..., None] for x in "kv")  # (d, T, 1)
    o = refimpl.attention(np.ones_like(k), k, v, bias=call["w"], causal=causal, scale=1.0)[..., 0].T
    within(aft(**call, causal=causal), o / (1 + np.exp(-call["q"])), 4 * OPS["aft"].error_bound(**call, causal=causal, unit=UNIT))


@pytest.mark.parametrize(
    ("f", "says"),
    [
        (lambda x: aft(x, x, x, np.zeros((3, 4))), "aft: w must have shape"),
        (lambda x: aft(x + 0j, x, x, np.zeros((3, 3))), "aft: q must be real"),
        (lambda x: aft(x, x, x, np.zeros((3, 3)), causal=1), "aft: causal must be True or False"),
        (lambda x: aft_local(x, x, x, np.zeros((3, 3)), s=0), "aft_local: s must be an integer of at least 1, got 0"),
        (lambda x: aft_local(x, x, x, np.zeros((3, 3)), s=2.0), "aft_local: s must be an integer of at least 1"),
        (lambda x: aft_local(x, x, x, np.zeros((3, 3))), "aft_local: missing a required .*'s'"),
        (lambda x: aft_conv(x, x, x, np.zeros(4)), "aft_conv: w must have an odd number of biases, .*got 4"),
    ],
)
def test_bad_input_is_refused_by_name(f, says):
    with pytest.raises((ValueError, TypeError), match=says):
        f(np.zeros((3, 2)))
