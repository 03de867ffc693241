"""Linformer against numbers worked by hand, rationals, SciPy's softmax, and torch's attention of projected keys."""

from fractions import Fraction

import numpy as np
import pytest
import scipy.special

import refimpl
from refimpl import linformer_attention, linformer_attention_vjp

OP = refimpl.OPS["linformer_attention"]
FORMS = pytest.mark.parametrize("form", list(OP.forms))


def within(got, want, bound):
    assert got.shape == want.shape
    assert np.all(abs(got - want) <= bound), f"{np.max(abs(got - want) / np.maximum(bound, 1e-300)):.3g} times the bound"


def bound(*args, unit=2.0**-53, **options):
    return OP.error_bound(*args, unit=unit, **options)


@FORMS
def test_worked_by_hand(form):
    """Three positions, two mixtures: keys log 2 + log 3 and 0, so weights 6 : 1; values 10 + 30 and 20 - 10."""
    q, k, v = np.array([[1.0]]), np.log([[2.0], [3.0], [1.0]]), np.array([[10.0], [20.0], [30.0]])
    E, F = np.array([[1.0, 1, 5], [0, 0, 7]]), np.array([[1.0, 0, 1], [-1, 1, 0]])
    args = (q, k, v, E, F)
    within(OP.forms[form].function(*args), np.array([[(6 * 40 + 1 * 10) / 7]]), 2 * bound(*args))


@FORMS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_is_scipy_softmax_of_projected_keys(form, dtype, scale, rng):
    call = {name: x.astype(dtype) for name, x in OP.sample(rng, n=6, m=40, r=5, d=4, e=3).items()}
    wide = {name: x.astype(np.float64) for name, x in call.items()}
    keys, values = (np.einsum("rm,hmd->hrd", wide[p], wide[x]) for p, x in (("E", "k"), ("F", "v")))
    s = np.einsum("hnd,hrd->hnr", wide["q"], keys) * (0.5 if scale is None else scale)
    want = np.einsum("hnr,hre->hne", scipy.special.softmax(s, axis=-1), values)
    got = OP.forms[form].function(**call, scale=scale)
    assert got.dtype == dtype
    within(got, want, bound(**wide, scale=scale, unit=2.0**-24 if dtype == np.float32 else 2.0**-52))


def test_equal_scores_give_exact_means():
    """With q = 0, o is the mean of the rows of F v: rationals."""
    rng = np.random.default_rng(3)
    v, F = rng.integers(-9, 9, (6, 2)), rng.integers(-3, 4, (4, 6))
    got = linformer_attention(np.zeros((1, 3)), rng.standard_normal((6, 3)), v.astype(float), rng.standard_normal((4, 6)), F.astype(float))
    assert [Fraction(x) for x in got[0]] == [Fraction(int(sum(F[:, j].sum() * v[j, c] for j in range(6))), 4) for c in range(2)]


def test_gradient_by_hand():
    """One query, one mixture: weight 1, so nothing but F and v matters."""
    q, k, v = np.array([[2.0]]), np.array([[3.0], [5.0]]), np.array([[7.0], [11.0]])
    g = linformer_attention_vjp(np.array([[10.0]]), q, k, v, np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]]))
    assert g["v"].tolist() == [[30], [40]]
    assert g["F"].tolist() == [[70, 110]]
    assert not any(g[name].any() for name in "qkE")
    # two mixtures of equal weight, values 7 and 11: ds = ± 10 (7 - 9) / 2 = ∓ 10
    g = linformer_attention_vjp(np.array([[10.0]]), q, 0 * k, v, np.array([[1.0, 2.0], [0.0, 1.0]]), np.eye(2))
    assert g["k"].tolist() == [[-20], [-40 + 20]]
    assert g["E"].tolist() == [[0, 0], [0, 0]], "the keys are zero"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"E": np.zeros((4, 6))}, "E must have shape .*m = 7"),
        ({"F": np.zeros((3, 7))}, "F must have shape .*r = 4"),
        ({"scale": np.inf}, "scale must be a finite number"),
        ({"scale": "1"}, "scale must be a finite number"),
        ({"q": np.zeros((2, 5, 3), complex)}, "q must be real"),
    ],
)
def test_bad_input_is_refused_by_name(change, says, rng):
    with pytest.raises((ValueError, TypeError), match=f"linformer_attention: .*{says}"):
        linformer_attention(**OP.sample(rng) | change)


def test_work_is_linear_in_the_lengths():
    cost = lambda form, length: OP.forms[form].cost(n=length, m=length, d=8, e=8, r=16, H=2).work
    for form in ("dense", "streamed"):
        assert cost(form, 4096) == 2 * cost(form, 2048)
    assert cost("map", 4096) > 3.9 * cost("map", 2048)


@pytest.mark.peers
def test_is_torch_attention_of_projected_keys(rng):
    torch = pytest.importorskip("torch")
    call = OP.sample(rng, n=6, m=20, r=5, d=4, e=3)
    q, k, v, E, F = (torch.tensor(call[name], requires_grad=True) for name in "qkvEF")
    o = torch.nn.functional.scaled_dot_product_attention(q, E @ k, F @ v)
    within(o.detach().numpy(), linformer_attention(**call), 2 * bound(**call))
    do = rng.standard_normal(o.shape)
    o.backward(torch.tensor(do))
    gradients = linformer_attention_vjp(do, **call)
    for name, x in zip("qkvEF", (q, k, v, E, F), strict=True):
        np.testing.assert_allclose(gradients[name], x.grad.numpy(), rtol=0, atol=2.0**-44 * np.max(abs(x.grad.numpy())))
