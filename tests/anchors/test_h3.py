"""h3 against numbers worked by hand, SciPy's filters, linear attention as running sums, and Hyena as the paper relates them."""

import numpy as np
import pytest
import scipy.signal

from refimpl.ops.recurrence import hyena
from refimpl.ops.recurrence.h3 import OPS, error_bound, h3, h3_vjp
from refimpl.ops.state_space.ssm_kernel import ssm_kernel

(OP,) = OPS
FORMS = pytest.mark.parametrize("form", list(OP.forms))
UNIT = 2.0**-53


def within(got, want, bound):
    assert got.shape == want.shape
    assert np.all(abs(got - want) <= bound), f"{np.max(abs(got - want) / np.maximum(bound, 1e-300)):.3g} times the bound"


def column(*numbers):
    return np.array(numbers, dtype=float)[:, None]


def by_hand():
    """shift(k) = (0 - 1, 1 - 2, 2 - 0); times v (-4, -5, 12); with Ā = 1/2 and B̄ C = 3 states answer (-12, -21, 51/2)."""
    one = np.ones((1, 1))
    return {"q": column(1, 2, 4), "k": column(1, 2, 0), "v": column(4, 5, 6), "shift_kernel": column(0, 1), "skip": np.array([-1.0])} | {
        "A_bar": one / 2, "B_bar": 3 * one, "C": one, "D": np.array([10.0]),
    }  # fmt: skip


@FORMS
def test_worked_by_hand(form):
    """And D adds ten times what is written: -12 - 40, -21 - 50, 51/2 + 120, each times q."""
    call = by_hand()
    within(OP.forms[form].function(**call), column(-52, -142, 582), error_bound(**call, unit=UNIT))


def test_gradient_of_queries_and_values_worked_by_hand():
    g = h3_vjp(np.ones((3, 1)), **by_hand())
    np.testing.assert_array_equal(g["q"], column(-52, -71, 145.5))
    # what reaches u: 13 q_t + 3/2 q_{t+1} + 3/4 q_{t+2}; times shift(k) for v
    np.testing.assert_array_equal(g["v"], column(-(13 + 3 + 3), -(26 + 6), 2 * 52))
    np.testing.assert_array_equal(g["D"], [1 * -4 + 2 * -5 + 4 * 12])


@FORMS
def test_is_scipy_lfilter_twice(form, rng):
    """The shift is a filter with zeros only, each real state one with one pole."""
    call = OP.sample(rng, T=60, c=2, n=3, K=5)
    call |= {n: call[n].real.copy() for n in ("A_bar", "B_bar", "C")}
    want = np.zeros((60, 2))
    for i in range(2):
        taps = call["shift_kernel"][:, i] + call["skip"][i] * (np.arange(5) == 0)
        written = scipy.signal.lfilter(taps, [1.0], call["k"][:, i]) * call["v"][:, i]
        answers = [scipy.signal.lfilter([call["C"][i, j] * call["B_bar"][i, j]], [1.0, -call["A_bar"][i, j]], written) for j in range(3)]
        want[:, i] = call["q"][:, i] * (sum(answers) + call["D"][i] * written)
    within(OP.forms[form].function(**call), want, 2 * error_bound(**call, unit=UNIT))


@FORMS
def test_with_nothing_to_shift_and_nothing_forgotten_it_is_linear_attention(form, rng):
    """One feature for each head: y_t = q_t Σ_{s <= t} k_s v_s."""
    q, k, v = rng.standard_normal((3, 40, 2))
    one = np.ones((1, 1))
    got = OP.forms[form].function(q, k, v, np.ones((1, 2)), one, one, one)
    within(got, q * np.cumsum(k * v, axis=0), 2 * error_bound(q, k, v, np.ones((1, 2)), one, one, one, unit=UNIT))


@FORMS
def test_is_hyena_of_two_gates(form, rng):
    """Keys are the input of the chain, values and queries its gates, the shift and the system's kernel its filters."""
    call = OP.sample(rng, T=23, K=4)
    kernel = ssm_kernel(call["A_bar"], call["B_bar"], call["C"], 23)
    shift = np.concatenate([call["shift_kernel"], np.zeros((19, 3))])
    chain = call["k"], (call["v"], call["q"]), np.stack([shift, kernel]), np.stack([call["skip"], call["D"]])
    within(OP.forms[form].function(**call), hyena.hyena(*chain), error_bound(**call, unit=UNIT) + 4 * hyena.error_bound(*chain, unit=UNIT))


@FORMS
def test_recalls_what_followed(form):
    """a 1 b 2 c 3 b -> 2: keys mark the token b, the shift writes the token after it, the query at the end reads."""
    tokens = np.array([0.0, 1, 5, 2, 6, 3, 5])  # a = 0, b = 5, c = 6
    is_b = (tokens == 5).astype(float)[:, None]
    one = np.ones((1, 1))
    got = OP.forms[form].function(is_b, is_b, tokens[:, None], column(0, 1), one, one, one)
    np.testing.assert_allclose(got[:, 0], [0, 0, 0, 0, 0, 0, 2], atol=1e-14)


@pytest.mark.peers
@pytest.mark.parametrize("pairs", [False, True])
def test_gradient_is_torch_autograd(pairs, rng):
    torch = pytest.importorskip("torch")
    call = OP.sample(rng, T=13, batch=(2,))
    dy = rng.standard_normal((2, 13, 3))
    leaves = {n: torch.from_numpy(v.copy()).requires_grad_() for n, v in call.items()}
    t = dict(leaves)
    padded = torch.nn.functional.pad(t["k"], (0, 0, 3, 0))
    shifted = sum(t["shift_kernel"][s] * padded[:, 3 - s : 16 - s] for s in range(4)) + t["skip"] * t["k"]
    written = shifted * t["v"]
    x, ys = torch.zeros(2, 3, 4, dtype=torch.complex128), []
    for step in range(13):
        x = t["A_bar"] * x + t["B_bar"] * written[:, step, :, None]
        ys.append((2 if pairs else 1) * (t["C"] * x).sum(-1).real)
    y = t["q"] * (torch.stack(ys, 1) + t["D"] * written)
    within(h3(**call, pairs=pairs), y.detach().numpy(), 2 * error_bound(**call, pairs=pairs, unit=UNIT))
    y.backward(torch.from_numpy(dy))
    g = h3_vjp(dy, **call, pairs=pairs)
    assert g.keys() == leaves.keys()
    for name, leaf in leaves.items():
        want = leaf.grad.numpy()
        assert np.max(abs(g[name] - want)) <= 2.0**-42 * np.max(abs(want)), name
