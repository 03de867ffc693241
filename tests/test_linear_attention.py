"""Linear attention beyond what every operator is held to: special cases, capacity, stability, callables, aliases, cost."""

import ml_dtypes
import numpy as np
import pytest

import refimpl
from refimpl.ops.linear_attention.feature_maps import FeatureMap
from refimpl.ops.linear_attention.linear_attention import OPS, error_bound, linear_attention, linear_attention_vjp
from refimpl.ops.linear_attention.linear_attention_cases import arrange, sample
from refimpl.ops.linear_attention.state import State

(OP,) = OPS
FORMS = pytest.mark.parametrize("f", [f.function for f in OP.forms.values()], ids=list(OP.forms))
UNIT = 2.0**-53


def within(got, want, *bounds):
    assert got.shape == want.shape
    limit = sum(bounds)
    assert np.all(abs(got - want) <= limit), f"{np.max(abs(got - want) / np.maximum(limit, 1e-300)):.3g} times the bound"


def the(rng, *names, **sizes):
    call = sample(rng, **sizes)
    return {n: call[n] for n in ("q", "k", "v", *names)}


# -- special cases ---------------------------------------------------------------------------------------------------


@FORMS
def test_without_decay_retention_and_gla_are_linear_attention(f, rng):
    call = the(rng, "state", T=20)
    plain, bound = f(**call), error_bound(**call, unit=UNIT)
    within(f(**call, decay=np.zeros((2, 20))), plain, 2 * bound)
    within(f(**call, decay=np.zeros((2, 20, 4))), plain, 2 * bound)
    q, k, v, state = call.values()
    within(refimpl.retention(q, k, v, np.zeros(2), state=state), plain, 2 * bound)
    within(refimpl.gla(q, k, v, np.zeros((2, 20, 4)), state=state), plain, 2 * bound)


@FORMS
def test_brackets_can_be_set_the_other_way(f, rng):
    """Linear attention is (mask ∘ q kᵀ) v."""
    call = the(rng, T=30, Hq=2)
    want = np.tril(call["q"] @ np.swapaxes(call["k"], -1, -2)) @ call["v"] / 2
    within(f(**call), want, 2 * error_bound(**call, unit=UNIT))


@FORMS
def test_retention_weighs_by_powers_of_gamma(f, rng):
    call = the(rng, T=30, Hq=2)
    gamma = np.array([0.9, 0.5])[:, None, None]
    age = np.arange(30)[:, None] - np.arange(30)
    want = (np.tril(call["q"] @ np.swapaxes(call["k"], -1, -2)) * np.where(age < 0, 0, gamma ** np.maximum(age, 0))) @ call["v"] / 2
    decay = np.broadcast_to(np.log(gamma[..., 0]), (2, 30))
    within(f(**call, decay=decay), want, 4 * error_bound(**call, decay=decay, unit=UNIT))


@FORMS
def test_a_step_of_the_delta_rule_is_a_step_of_gradient_descent(f, rng):
    """S - β d/dS |Sᵀk - v|²/2, the derivative by central differences of a quadratic, which are exact but for rounding."""
    call = the(rng, "beta", "state", T=1, Hq=1, Hkv=1)
    k, v, beta, S = call["k"][0, 0], call["v"][0, 0], call["beta"][0, 0], call["state"][0]
    slope = np.empty_like(S)
    for index in np.ndindex(S.shape):
        step = np.zeros_like(S)
        step[index] = 0.5
        slope[index] = (np.sum(((S + step).T @ k - v) ** 2) - np.sum(((S - step).T @ k - v) ** 2)) / 2
    got, limit = f(**call, return_state=True)[1], error_bound(**call, return_state=True, unit=UNIT)[1]
    within(got[0], S - beta * slope, 8 * limit[0])


# -- capacity --------------------------------------------------------------------------------------------------------


def written_and_read(keys, values):
    """Write all pairs, then read all keys: the recalled values."""
    n, d = keys.shape
    nothing = np.zeros_like(keys)
    call = {
        "q": np.concatenate([nothing, keys]),
        "k": np.concatenate([keys, nothing]),
        "v": np.concatenate([values, 0 * values]),
        "beta": np.ones(2 * n, dtype=keys.dtype),
        "scale": 1.0,
    }
    return call, n


@FORMS
@pytest.mark.parametrize("d", [1, 4, 16])
def test_d_orthonormal_pairs_are_recalled_exactly(f, d, rng):
    """Bit by bit for axis-parallel keys, and then overwritten just as exactly."""
    keys = np.eye(d)[rng.permutation(d)] * rng.choice([-1.0, 1.0], (d, 1))
    for size in (1, 2):
        values = rng.integers(-100, 100, (size, d, 3)).astype(np.float64)
        call, n = written_and_read(np.concatenate([keys] * size), values.reshape(-1, 3))
        np.testing.assert_array_equal(f(**call)[n:], np.concatenate([values[-1]] * size))


@FORMS
@pytest.mark.parametrize("d", [1, 4, 16])
def test_d_plus_1_pairs_are_not(f, d, rng):
    """Another key is a combination of the d, and overwrites a part of them."""
    keys = np.concatenate([np.eye(d), np.full((1, d), 1 / np.sqrt(d))])
    values = rng.standard_normal((d + 1, 3))
    call, n = written_and_read(keys, values)
    recalled, limit = f(**call)[n:], error_bound(**call, unit=UNIT)[n:]
    within(recalled[-1], values[-1], 2 * limit[-1])
    assert np.all(abs(recalled[:-1] - values[:-1]) > 1e6 * limit[:-1])
    assert np.linalg.matrix_rank(keys) == d


@FORMS
def test_a_sum_does_not_overwrite(f):
    key = np.array([[1.0], [1.0]])
    np.testing.assert_array_equal(f(key, key, np.array([[3.0], [5.0]]))[:, 0], [3, 8])
    np.testing.assert_array_equal(f(key, key, np.array([[3.0], [5.0]]), beta=np.ones(2))[:, 0], [3, 5])


# -- stability -------------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_running_sums_may_leave_the_range(f, per_channel, dtype, rng):
    """200 steps of e^-5: e^(-F_j) would overflow even float64; and steps of e^-1000, where only differences of sums are left."""
    sizes = {"T": 200, "per_channel": per_channel}
    for decay in (-5.0, -1e3):
        call = {n: x.astype(dtype) for n, x in the(rng, "decay", "beta", "state", **sizes).items()}
        call["decay"] = (0 * call["decay"] + decay).astype(dtype)
        wide = {n: x.astype(np.longdouble) for n, x in call.items()}
        got = f(**call)
        assert np.all(np.isfinite(got))
        within(got.astype(np.longdouble), linear_attention(**wide), 2 * error_bound(**wide, unit=np.finfo(dtype).eps / 2) + np.finfo(dtype).tiny)


@FORMS
def test_growth_of_nothing_is_nothing(f, rng):
    """e^150 overflows float32, but times an empty memory it is 0."""
    call = {n: x.astype(np.float32) for n, x in the(rng, T=60).items()}
    call["k"][:, :50] = 0
    decay = np.full((2, 60), 3, dtype=np.float32)
    late = {n: x[:, 50:] for n, x in call.items()}
    bound = error_bound(**{n: x.astype(np.float64) for n, x in late.items()}, decay=np.full((2, 10), 3.0), unit=2.0**-24)
    got = f(**call, decay=decay)
    np.testing.assert_array_equal(got[:, :50], 0)
    within(got[:, 50:], linear_attention(**late, decay=decay[:, 50:]), 64 * bound)


@FORMS
def test_a_decay_of_minus_infinity_forgets_all(f, rng):
    call = the(rng, "decay", "state", T=12)
    call["decay"][:, 7] = -np.inf
    late = {n: x[:, 7:] for n, x in call.items() if n != "state"}
    within(f(**call)[:, 7:], f(**late), 2 * error_bound(**late, unit=UNIT))


@FORMS
@pytest.mark.parametrize("name", ["q", "k", "v", "decay", "beta"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_the_future(f, name, bad, rng):
    call = the(rng, "decay", "beta", "state", T=30)
    right = f(**call)
    call[name] = call[name].copy()
    call[name][0, 17] = bad
    with np.errstate(all="ignore"):
        got = f(**call)
    within(got[:, :17], right[:, :17], 2 * error_bound(**the_past(call, 17), unit=UNIT))
    np.testing.assert_array_equal(got[2:], right[2:])
    assert not np.all(np.isfinite(got[:2, 17]))


def the_past(call, T):
    return {n: x if n == "state" else x[:, :T] for n, x in call.items()}


# -- feature maps ----------------------------------------------------------------------------------------------------


def test_taylor_is_the_second_order_polynomial_of_exp(rng):
    """φ(q)·φ(k) = 1 + s + s²/2 with s = q·k/√d."""
    q, k = rng.standard_normal((2, 5, 9))
    s = (q * k).sum(axis=-1) / 3
    for t in range(5):
        got = linear_attention(q[t : t + 1], k[t : t + 1], np.ones((1, 1)), feature_map="taylor")
        limit = error_bound(q[t : t + 1], k[t : t + 1], np.ones((1, 1)), feature_map="taylor", unit=UNIT)
        within(got[0], np.array([1 + s[t] + s[t] ** 2 / 2]), limit[0])


def test_elu_plus_1_keeps_its_digits_far_below_0():
    """elu(x) + 1 as a sum has none left at x = -50."""
    x = np.full((1, 1), -50.0, dtype=np.float32)
    got = linear_attention(x, np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32), feature_map="elu+1")
    assert abs(got[0, 0] / np.exp(-50.0) - 1) < 4 * np.finfo(np.float32).eps


@pytest.mark.parametrize("name", ["elu+1", "relu", "taylor"])
@FORMS
def test_a_callable_equals_the_name(f, name, rng):
    from refimpl.ops.linear_attention.feature_maps import MAPS

    call = arrange(the(rng, "decay", "state", T=9) | {"feature_map": name, "normalize": True})
    np.testing.assert_array_equal(f(**call), f(**call | {"feature_map": lambda x: MAPS[name](x)}))


def test_the_gradient_of_a_callable_uses_its_vjp(rng):
    square = FeatureMap(lambda x: x * x, lambda dphi, x: 2 * x * dphi)
    call = the(rng, T=5)
    dy = rng.standard_normal((4, 5, 3))
    got = linear_attention_vjp(dy, **call, feature_map=square)
    plain = linear_attention_vjp(dy, call["q"] ** 2, call["k"] ** 2, call["v"], scale=1.0)
    np.testing.assert_array_equal(got["q"], 2 * call["q"] * plain["q"])
    np.testing.assert_array_equal(got["k"], 2 * call["k"] * plain["k"])
    with pytest.raises(TypeError, match="feature_map must have a method vjp"):
        linear_attention_vjp(dy, **call, feature_map=np.square)


def test_bounds_of_callables(rng):
    """Stated by the map, or a few roundoffs by default."""
    call = the(rng, T=5)
    small, large = (
        error_bound(**call, unit=UNIT, feature_map=FeatureMap(np.square, None, error))
        for error in (None, lambda x, unit: 1000 * unit * np.square(x))
    )
    assert np.all(large > 20 * small)


def test_a_single_row_may_be_undefined():
    """Nothing is added to q·z: 0/0 is NaN, as the equation says."""
    zeros, ones = np.zeros((1, 2)), np.ones((1, 1))
    with np.errstate(invalid="ignore"):
        assert np.isnan(linear_attention(zeros, zeros, ones, normalize=True)[0, 0])


# -- arguments -------------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalize": True}, "normalize must be False with beta"),
        ({"feature_map": "softmax"}, "feature_map must be one of .*'elu.1'.*got 'softmax'"),
        ({"feature_map": 3}, "feature_map must be one of"),
        ({"normalize": 2}, "normalize must be one of"),
        ({"scale": np.inf}, "scale must be a finite number"),
        ({"scale": True}, "scale must be a finite number"),
        ({"state": np.zeros((2, 5, 3))}, "4 features .*got 5"),
        ({"decay": np.zeros((2, 7, 5)), "state": None}, "4 features .*got 5"),
        ({"feature_map": "taylor"}, "21 features .*got 4"),
        ({"k": np.zeros((3, 7, 4))}, "Hkv"),
        ({"decay": np.zeros((1, 2, 7, 4))}, "decay must have as many axes as q"),
    ],
)
def test_bad_arguments(f, change, message, rng):
    call = sample(rng) | change
    with pytest.raises(ValueError, match=f"(?s)linear_attention.*{message}"):
        f(**call)


@FORMS
def test_the_state_follows_normalize(f, rng):
    call = the(rng, "state")
    with pytest.raises(TypeError, match=r"state must be a tuple \(S, z\) with normalize"):
        f(**call, normalize=True)
    with pytest.raises(TypeError, match="state must be one array"):
        f(**call | {"state": State(call["state"], call["state"][..., 0])})
    with pytest.raises(TypeError, match=r"dstate must be a tuple \(dS, dz\)"):
        linear_attention_vjp(np.zeros((4, 7, 3)), call["q"], call["k"], call["v"], normalize=True, dstate=np.zeros((2, 4, 3)))
    with pytest.raises(TypeError, match="must be real"):
        f(call["q"] + 0j, call["k"], call["v"])
    given = State(abs(call["state"]), abs(call["state"][..., 0]) + 1)
    o, last = f(abs(call["q"]), abs(call["k"]), call["v"], normalize=True, state=tuple(given), return_state=True)
    assert last.S.shape == (2, 4, 3)
    assert last.z.shape == (2, 4)


def test_scale_is_1_with_a_feature_map(rng):
    call = the(rng)
    for option in ("relu", "elu+1", "taylor", np.abs):
        np.testing.assert_array_equal(linear_attention(**call, feature_map=option), linear_attention(**call, feature_map=option, scale=1.0))
    np.testing.assert_array_equal(linear_attention(**call), linear_attention(**call, scale=0.5))


# -- by the papers' names ----------------------------------------------------------------------------------------------


def test_aliases(rng):
    call = sample(rng, per_channel=True)
    q, k, v, decay, beta, state = (call[n] for n in ("q", "k", "v", "decay", "beta", "state"))
    keep = {"state": state, "scale": 0.3, "return_state": True}
    same(refimpl.gla(q, k, v, decay, **keep), linear_attention(q, k, v, decay=decay, **keep))
    same(refimpl.delta_rule(q, k, v, beta, **keep), linear_attention(q, k, v, beta=beta, **keep))
    same(refimpl.gated_delta_rule(q, k, v, decay[..., 0], beta, **keep), linear_attention(q, k, v, decay=decay[..., 0], beta=beta, **keep))
    same(refimpl.gated_delta_rule(q, k, v, decay, beta, **keep), linear_attention(q, k, v, decay=decay, beta=beta, **keep))
    gamma = np.log(1 - 2.0 ** -(5 + np.arange(2)))
    constant = np.broadcast_to(gamma[:, None], (2, 7))
    same(refimpl.retention(q, k, v, gamma, **keep), linear_attention(q, k, v, decay=constant, **keep))
    same(refimpl.retention(q, k, v, -0.25, **keep), linear_attention(q, k, v, decay=np.full((2, 7), -0.25), **keep))


def same(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_python_number_does_not_promote(rng):
    q, k, v = (x.astype(np.float32) for x in the(rng).values())
    assert refimpl.retention(q, k, v, -0.1).dtype == np.float32
    assert refimpl.retention(q, k, v, np.full(2, -0.1)).dtype == np.float64
    q, k, v = (x.astype(ml_dtypes.bfloat16) for x in (q, k, v))
    assert refimpl.retention(q, k, v, -0.25).dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("shape", [(3,), (1, 2), (4,)])
def test_gamma_is_one_for_each_head(shape, rng):
    with pytest.raises(ValueError, match=r"retention: log_gamma must be a number or have shape \(Hkv,\)"):
        refimpl.retention(*the(rng).values(), np.zeros(shape))


# -- cost ------------------------------------------------------------------------------------------------------------


def test_chunks_are_linear_in_time():
    cost = {name: form.cost for name, form in OP.forms.items()}
    sizes = {"d": 64, "e": 64, "Hq": 4, "Hkv": 4}
    assert cost["chunkwise"](T=2**14, **sizes).work / cost["chunkwise"](T=2**12, **sizes).work == pytest.approx(4, rel=0.01)
    assert cost["parallel"](T=2**14, **sizes).work / cost["parallel"](T=2**12, **sizes).work > 15
    assert cost["chunkwise"](T=2**14, **sizes).depth < cost["recurrent"](T=2**14, **sizes).depth / 10
