"""Norms and activations against SciPy, Python's fractions and torch."""

from fractions import Fraction

import numpy as np
import pytest
import scipy.special
import scipy.stats

import refimpl
from refimpl.core.balls import precision, to_balls

UNIT = 2.0**-53


def within(got, want, bound):
    assert np.shape(got) == np.shape(want)
    assert np.all(abs(got - want) <= bound), f"{np.max(abs(got - want) / np.maximum(bound, 1e-300)):.3g} times the bound"


# -- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", list(refimpl.OPS["layer_norm"].forms))
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_layer_norm_is_scipys_zscore(form, offset, rng):
    x = rng.standard_normal((6, 40)) + offset
    want = scipy.stats.zscore(x, axis=-1)
    within(refimpl.OPS["layer_norm"].forms[form].function(x, eps=0.0), want, 2 * refimpl.OPS["layer_norm"].error_bound(x, eps=0.0, unit=UNIT))


def test_group_norm_is_zscore_in_groups(rng):
    x = rng.standard_normal((6, 12)) + 5
    want = scipy.stats.zscore(x.reshape(6, 3, 4), axis=-1).reshape(6, 12)
    within(refimpl.group_norm(x, 3, eps=0.0), want, 2 * refimpl.OPS["group_norm"].error_bound(x, 3, eps=0.0, unit=UNIT))


@pytest.mark.parametrize("form", list(refimpl.OPS["rms_norm"].forms))
def test_rms_norm_squared_in_fractions(form, rng):
    """y² = x² c / (Σ x² + c ε), exactly; and y has the sign of x."""
    x, eps = rng.standard_normal((4, 9)), 0.125
    y = refimpl.OPS["rms_norm"].forms[form].function(x, eps=eps)
    for row, got in zip(x, y, strict=True):
        total = sum(Fraction(v) ** 2 for v in row) + 9 * Fraction(eps)
        for v, g in zip(row, got, strict=True):
            exact = Fraction(v) ** 2 * 9 / total
            assert abs(Fraction(g) ** 2 - exact) <= exact * 64 * Fraction(1, 2**53)
            assert v * g >= 0


def test_gates_by_scipy(rng):
    x, gate, weight = rng.standard_normal((5, 8)), rng.standard_normal((5, 8)), rng.standard_normal(8)
    silu = gate * scipy.special.expit(gate)

    def norm(v):
        return v / np.sqrt(np.mean(v * v, axis=-1, keepdims=True) + 1e-6) * weight

    for first, want in ((True, norm(x * silu)), (False, norm(x) * silu)):
        limit = refimpl.OPS["rms_norm"].error_bound(x, weight, gate=gate, gate_first=first, unit=UNIT)
        within(refimpl.rms_norm(x, weight, gate=gate, gate_first=first), want, 2 * limit)


def test_the_scaled_form_has_no_limits_of_range():
    x = np.array([[3e30, 4e30], [3e-30, 4e-30]], np.float32)
    with np.errstate(all="ignore"):
        assert not np.all(np.isfinite(refimpl.rms_norm(x, eps=0.0))) or np.any(refimpl.rms_norm(x, eps=0.0) == 0)
        got = refimpl.OPS["rms_norm"].forms["scaled"].function(x, eps=0.0)
    within(got, np.array([[0.6, 0.8]] * 2, np.float32) * np.float32(np.sqrt(2)), 16 * 2.0**-24)


@pytest.mark.parametrize("eps", [-1.0, np.nan, np.inf, "small", None])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm", "group_norm"])
def test_eps_is_checked(norm, eps):
    with pytest.raises(ValueError, match=rf"{norm}.*eps"):
        getattr(refimpl, norm)(np.ones((2, 4)), *([2] if norm == "group_norm" else []), eps=eps)


@pytest.mark.parametrize("groups", [0, 5, 2.0, True, "2"])
def test_groups_divide(groups):
    with pytest.raises(ValueError, match=r"group_norm.*groups"):
        refimpl.group_norm(np.ones((2, 4)), groups)


# -- activations -----------------------------------------------------------------------------------------------------

X = np.concatenate([np.linspace(-40, 40, 401), [1e-30, -1e-30, 0.0, 700.0]])


@pytest.mark.parametrize("form", list(refimpl.OPS["softplus"].forms))
def test_softplus_is_scipys(form):
    want = -scipy.special.log_expit(-X)
    within(refimpl.OPS["softplus"].forms[form].function(X), want, 2 * refimpl.OPS["softplus"].error_bound(X, unit=UNIT))


def test_silu_and_swiglu_are_scipys(rng):
    up = rng.standard_normal(X.shape)
    within(refimpl.silu(X), X * scipy.special.expit(X), 2 * refimpl.OPS["silu"].error_bound(X, unit=UNIT))
    want = scipy.special.expit(X) * X * up
    within(refimpl.swiglu(X, up), want, 2 * refimpl.OPS["swiglu"].error_bound(X, up, unit=UNIT))


def test_gelu_and_geglu_are_scipys(rng):
    up = rng.standard_normal(X.shape)
    want = X * scipy.stats.norm.cdf(X)
    within(refimpl.gelu(X), want, 2 * refimpl.OPS["gelu"].error_bound(X, unit=UNIT))
    within(refimpl.geglu(X, up), want * up, 2 * refimpl.OPS["geglu"].error_bound(X, up, unit=UNIT))
    tanh = X / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (X + 0.044715 * X**3)))
    within(refimpl.gelu(X, approximate="tanh"), tanh, 2 * refimpl.OPS["gelu"].error_bound(X, unit=UNIT, approximate="tanh"))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.longdouble])
def test_gelu_keeps_its_digits_in_the_left_tail(dtype):
    """Against intervals of 200 bits: relative accuracy, where (1 + erf)/2 has none; but for x² roundings of the exponential."""
    x = np.array([-12.0, -9.5, -6.25, -4.0, -1.76, -1.74, -0.5, 0.25, 3.0], dtype)
    with precision(200):
        exact, _ = refimpl.gelu(to_balls(x)).midpoint_radius(np.longdouble)
    unit = np.finfo(dtype).eps / 2
    assert np.all(abs(refimpl.gelu(x) - exact) <= unit * (32 + x * x) * abs(exact))


def test_the_largest_difference_of_the_two_gelus():
    x = np.linspace(-5, 5, 100001)
    assert 4e-4 < np.max(abs(refimpl.gelu(x) - refimpl.gelu(x, approximate="tanh"))) < 5e-4


@pytest.mark.parametrize("approximate", ["erf", "tan", None, True])
def test_approximations_are_checked(approximate):
    for f, arguments in ((refimpl.gelu, (X,)), (refimpl.geglu, (X, X))):
        with pytest.raises(ValueError, match=rf"{f.__name__}.*approximate"):
            f(*arguments, approximate=approximate)


@pytest.mark.peers
def test_are_torchs(rng):
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    x, weight, bias = rng.standard_normal((5, 12)) + 1, rng.standard_normal(12), rng.standard_normal(12)
    dy = rng.standard_normal(x.shape)
    pairs = {
        "layer_norm": ((x, weight, bias), {}, lambda v, w, b: F.layer_norm(v, (12,), w, b)),
        "group_norm": ((x, 3, weight, bias), {}, lambda v, g, w, b: F.group_norm(v, g, w, b)),
        "rms_norm": ((x, weight), {}, lambda v, w: F.rms_norm(v, (12,), w, eps=1e-6)),
        "softplus": ((x,), {}, F.softplus),
        "silu": ((x,), {}, F.silu),
        "gelu": ((x,), {}, F.gelu),
        "gelu with tanh": ((x,), {"approximate": "tanh"}, lambda v: F.gelu(v, approximate="tanh")),
    }
    for name, (arguments, options, theirs) in pairs.items():
        op = refimpl.OPS[name.partition(" ")[0]]
        given = [torch.from_numpy(a).requires_grad_() if isinstance(a, np.ndarray) else a for a in arguments]
        y = theirs(*given)
        within(op.definition(*arguments, **options), y.detach().numpy(), 2 * op.error_bound(*arguments, **options, unit=UNIT))
        y.backward(torch.from_numpy(dy))
        gradients = op.gradient(dy, *arguments, **options)
        for g, tensor in zip(gradients.values(), [t for t in given if not isinstance(t, int)], strict=True):
            assert np.max(abs(g - tensor.grad.numpy())) <= 2.0**-44 * (1 + np.max(abs(g))), name
