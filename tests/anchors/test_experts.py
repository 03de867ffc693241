"""Routing and mixtures of experts against tables worked by hand, loops, exact fractions and Mixtral's own code."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import scipy.special

import refimpl
from refimpl.ops.experts import expert_choice as choice
from refimpl.ops.experts import losses
from refimpl.ops.experts import moe as mixture
from refimpl.ops.experts import route as routing

ROUTE = pytest.mark.parametrize("form", list(routing.OPS[0].forms))
MOE = pytest.mark.parametrize("form", list(mixture.OPS[0].forms))
UNIT = 2.0**-53


def within(got, want, bound):
    assert np.shape(got) == np.shape(want)
    assert np.all(abs(got - want) <= bound), f"{np.max(abs(got - want) / np.maximum(bound, 1e-300)):.3g} times the bound"


# -- route -----------------------------------------------------------------------------------------------------------

# e^l = 1, 2, 4, 3: the two largest are experts 2 and 3
POWERS = np.log([[1.0, 2.0, 4.0, 3.0]])
TABLE = {
    ("topk_softmax", False): [4 / 7, 3 / 7],
    ("topk_softmax", True): [4 / 7, 3 / 7],
    ("softmax_topk", False): [4 / 10, 3 / 10],
    ("softmax_topk", True): [4 / 7, 3 / 7],
    ("sigmoid", False): [4 / 5, 3 / 4],
    ("sigmoid", True): [(4 / 5) / (31 / 20), (3 / 4) / (31 / 20)],
}


@ROUTE
@pytest.mark.parametrize(("order", "renormalize"), TABLE)
def test_a_table_of_weights(form, order, renormalize):
    weights, experts = routing.OPS[0].forms[form].function(POWERS, 2, order=order, renormalize=renormalize)
    assert experts.tolist() == [[2, 3]]
    within(weights[0], np.array(TABLE[order, renormalize]), 16 * UNIT)


@ROUTE
@pytest.mark.parametrize("order", routing.ORDERS)
def test_every_order_of_logits_with_every_tie(form, order):
    """All 3^4 rows of logits 0, 1, 2: the choice is that of sorting by (-logit, index)."""
    rows = np.array(list(itertools.product([0.0, 1.0, 2.0], repeat=4)))
    for k in range(1, 5):
        _, experts = routing.OPS[0].forms[form].function(rows, k, order=order)
        assert experts.tolist() == [sorted(range(4), key=lambda e: (-row[e], e))[:k] for row in rows]


@ROUTE
def test_closed_experts_have_no_weight(form):
    logits = np.array([[-np.inf, 1.0, -np.inf, 1.0], [0.0, -np.inf, -np.inf, -np.inf]])
    weights, experts = routing.OPS[0].forms[form].function(logits, 2)
    assert experts.tolist() == [[1, 3], [0, 1]]
    assert weights.tolist() == [[0.5, 0.5], [1.0, 0.0]]


def test_renormalised_where_all_weights_underflow():
    weights, _ = refimpl.route(np.array([[-800.0, -800.0 + np.log(3), -900.0]]), 2, order="sigmoid", renormalize=True)
    within(weights, np.array([[0.75, 0.25]]), 2e3 * UNIT)


def test_noise_needs_a_generator_and_is_repeatable(rng):
    logits = rng.standard_normal((500, 8))
    with pytest.raises(ValueError, match=r"route.*rng"):
        refimpl.route(logits, 2, noise=1.0)
    for bad in (-1.0, np.nan, "much", True):
        with pytest.raises(ValueError, match=r"route.*noise"):
            refimpl.route(logits, 2, noise=bad, rng=rng)
    one, two = (refimpl.route(logits, 2, noise=0.5, rng=7) for _ in range(2))
    assert np.array_equal(one[1], two[1])
    assert not np.array_equal(one[1], refimpl.route(logits, 2)[1])
    drawn = logits + 0.5 * np.random.default_rng(7).standard_normal(logits.shape)
    assert np.array_equal(one[1], refimpl.route(drawn, 2)[1])
    assert np.array_equal(refimpl.route(logits, 2, noise=0.0, rng=rng)[1], refimpl.route(logits, 2)[1])
    dy = rng.standard_normal((500, 2))
    assert np.array_equal(refimpl.route_vjp(dy, logits, 2, noise=0.5, rng=7)["logits"], refimpl.route_vjp(dy, drawn, 2)["logits"])


@pytest.mark.parametrize("k", [0, -1, 5, 1.0, True, "2", None])
def test_k_is_between_1_and_the_experts(k):
    with pytest.raises((ValueError, TypeError), match=r"route.*k"):
        refimpl.route(POWERS, k)


# -- the mixture -----------------------------------------------------------------------------------------------------


def by_loops(x, router, w_in, w_out, w_gate, k, capacity=None):
    """Token by token, pair by pair, with SciPy's functions and Python's sort."""
    y, taken, dropped = np.zeros_like(x), [0] * router.shape[1], 0
    for t, token in enumerate(x):
        logits = [sum(token[i] * router[i, e] for i in range(len(token))) for e in range(router.shape[1])]
        chosen = sorted(range(len(logits)), key=lambda e: (-logits[e], e))[:k]
        weights = scipy.special.softmax([logits[e] for e in chosen])
        for e, weight in zip(chosen, weights, strict=True):
            if capacity is not None and taken[e] == capacity:
                dropped += 1
                continue
            taken[e] += 1
            g = token @ w_gate[e]
            y[t] += weight * ((g * scipy.special.expit(g) * (token @ w_in[e])) @ w_out[e])
    return y, taken, dropped


@MOE
@pytest.mark.parametrize("capacity", [None, 1, 3, 100])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_is_a_loop_over_tokens(form, capacity, k, rng):
    call = mixture.OPS[0].sample(rng, T=11, d=5, E=4, f=3)
    y, tokens, dropped = mixture.OPS[0].forms[form].function(**call, k=k, capacity=capacity, return_stats=True)
    want, taken, lost = by_loops(**call, k=k, capacity=capacity)
    within(y, want, 2 * mixture.error_bound(**call, k=k, capacity=capacity, unit=UNIT))
    assert tokens.tolist() == taken
    assert int(dropped) == lost


@MOE
def test_worked_by_hand(form):
    """Two experts that double and negate; the second token prefers expert 1, and every weight is 3/4 to 1/4."""
    x = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    router = np.log(3) * np.eye(2)
    w_in, w_out = np.ones((2, 2, 1)), np.array([[[2.0, 2.0]], [[-1.0, -1.0]]])
    f = mixture.OPS[0].forms[form].function
    y, tokens, dropped = f(x, router, w_in, w_out, k=2, activation="relu", return_stats=True)
    first, second = 2 * 3 / 4 - 1 / 4, -3 / 4 + 2 / 4
    within(y, np.array([[first] * 2, [second] * 2, [first] * 2]), 20 * UNIT)
    assert (tokens.tolist(), int(dropped)) == ([3, 3], 0)
    y, tokens, dropped = f(x, router, w_in, w_out, k=2, activation="relu", capacity=2, return_stats=True)
    within(y, np.array([[first] * 2, [second] * 2, [0.0] * 2]), 20 * UNIT)
    assert (tokens.tolist(), int(dropped)) == ([2, 2], 2)


@MOE
def test_groups_have_queues_of_their_own(form, rng):
    call = mixture.OPS[0].sample(rng, T=6, batch=(2, 3))
    y, tokens, dropped = mixture.OPS[0].forms[form].function(**call, k=2, capacity=2, return_stats=True)
    assert tokens.shape == (2, 3, 4)
    assert dropped.shape == (2, 3)
    for i, j in itertools.product(range(2), range(3)):
        one, taken, lost = by_loops(**(call | {"x": call["x"][i, j]}), k=2, capacity=2)
        within(y[i, j], one, 2 * mixture.error_bound(**(call | {"x": call["x"][i, j]}), k=2, capacity=2, unit=UNIT))
        assert tokens[i, j].tolist() == taken
        assert dropped[i, j] == lost


@pytest.mark.parametrize("form", ["dense", "gathered"])
def test_nan_stays_with_its_token_and_its_expert(form, rng):
    call = mixture.OPS[0].sample(rng, T=9)
    f = mixture.OPS[0].forms[form].function
    _, experts = refimpl.route(call["x"] @ call["router"], 1)
    broken = call | {"w_out": np.where(np.arange(4)[:, None, None] == experts[0, 0], np.nan, call["w_out"])}
    assert np.array_equal(np.isnan(f(**broken, k=1)).any(axis=-1), experts[:, 0] == experts[0, 0])
    lost = call | {"x": np.where(np.arange(9)[:, None] == 4, np.inf, call["x"])}
    with np.errstate(all="ignore"):
        assert np.isfinite(np.delete(f(**lost, k=1), 4, axis=0)).all()


def test_experts_without_tokens_learn_nothing(rng):
    call = mixture.OPS[0].hard["an expert without tokens"](rng, T=8)
    gradients = refimpl.moe_vjp(rng.standard_normal((8, 6)), **call)
    empty = np.flatnonzero(refimpl.moe(**call, return_stats=True)[1] == 0)
    assert empty.size
    for name in ("w_in", "w_gate", "w_out"):
        assert not gradients[name][empty].any()
        assert np.isfinite(gradients[name]).all()


@pytest.mark.parametrize(("option", "value"), [("capacity", 0), ("capacity", 1.5), ("k", 0), ("k", 5), ("activation", "tanh"), ("order", "softmax")])
def test_options_are_checked(option, value, rng):
    call = mixture.OPS[0].sample(rng) | {"k": 2, option: value}
    for form in mixture.OPS[0].forms.values():
        with pytest.raises(ValueError, match=rf"moe.*{option}"):
            form.function(**call)


def test_gathering_costs_k_of_e_parts():
    """But for the router, which sees every token."""
    sizes = {"T": 2048, "d": 1024, "E": 8, "f": 3584}
    dense, gathered = (mixture.OPS[0].forms[form].cost(**sizes, k=2).work for form in ("dense", "gathered"))
    assert 2 / 8 < gathered / dense < 2 / 8 + 0.01


# -- losses and expert choice ----------------------------------------------------------------------------------------


def test_load_balance_in_fractions():
    """Three tokens, two experts, probabilities of thirds and halves: E Σ f P by hand."""
    logits = np.log([[1.0, 2.0], [1.0, 1.0], [2.0, 1.0]])
    experts = np.array([[1, 0], [1, 0], [1, 0]])
    P = [(Fraction(1, 3) + Fraction(1, 2) + Fraction(2, 3)) / 3, (Fraction(2, 3) + Fraction(1, 2) + Fraction(1, 3)) / 3]
    for chosen, f in ((experts, [Fraction(1, 2)] * 2), (experts[:, :1], [Fraction(0), Fraction(1)])):
        want = 2 * sum(a * b for a, b in zip(f, P, strict=True))
        for form in losses.OPS[0].forms.values():
            within(form.function(logits, chosen), float(want), losses.balance_bound(logits, chosen, unit=UNIT))


def test_a_router_that_collapses_pays_the_number_of_experts():
    logits = np.where(np.arange(8) == 3, 60.0, np.zeros((20, 8)))
    assert abs(refimpl.load_balance_loss(logits, np.full((20, 1), 3)) - 8) < 1e-12


@pytest.mark.parametrize("bad", [-1, 5])
def test_experts_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match=r"load_balance_loss.*experts"):
        refimpl.load_balance_loss(np.zeros((3, 5)), np.full((3, 1), bad))


def test_z_loss_is_scipys_logsumexp_squared(rng):
    logits = 5 * rng.standard_normal((4, 9, 6))
    want = np.mean(scipy.special.logsumexp(logits, axis=-1) ** 2, axis=-1)
    within(refimpl.router_z_loss(logits), want, 2 * losses.z_bound(logits, unit=UNIT))


def test_expert_choice_by_hand():
    p = np.array([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.375, 0.5, 0.125], [0.25, 0.25, 0.5]])
    weights, tokens = refimpl.expert_choice(np.log(p), 2)
    assert tokens.tolist() == [[0, 2], [1, 2], [3, 0]]
    within(weights, np.array([[0.5, 0.375], [0.75, 0.5], [0.5, 0.25]]), 8 * UNIT)
    assert choice.expert_choice(np.log(p), 9)[1].shape == (3, 4)


# -- published code --------------------------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize("form", list(mixture.OPS[0].forms))
def test_is_mixtral(form, rng):
    torch = pytest.importorskip("torch")
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2, hidden_act="silu", router_jitter_noise=0.0)
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config).double()
    call = mixture.OPS[0].sample(rng, T=40, d=16, E=6, f=24)
    parameters = dict(block.named_parameters())
    with torch.no_grad():
        parameters["gate.weight"].copy_(torch.from_numpy(call["router"].T.copy()))
        joined = np.concatenate([call["w_gate"], call["w_in"]], axis=-1).transpose(0, 2, 1)
        parameters["experts.gate_up_proj"].copy_(torch.from_numpy(joined.copy()))
        parameters["experts.down_proj"].copy_(torch.from_numpy(call["w_out"].transpose(0, 2, 1).copy()))
    x = torch.from_numpy(call["x"])[None].requires_grad_()
    result = block(x)
    y = (result[0] if isinstance(result, tuple) else result)[0]
    single = 2.0**-23  # its softmax computes in float32, whatever the rest does
    limit = mixture.error_bound(**call, k=2, unit=UNIT) * (single / UNIT)
    within(mixture.OPS[0].forms[form].function(**call, k=2), y.detach().numpy(), limit)
    dy = rng.standard_normal(y.shape)
    y.backward(torch.from_numpy(dy))
    ours = refimpl.moe_vjp(dy, **call, k=2)
    theirs = {
        "x": x.grad[0].numpy(),
        "router": parameters["gate.weight"].grad.numpy().T,
        "w_out": parameters["experts.down_proj"].grad.numpy().transpose(0, 2, 1),
    }
    for name, g in theirs.items():
        assert np.max(abs(ours[name] - g)) <= 64 * single * np.max(abs(g)), name


@pytest.mark.peers
def test_transformers_counts_tokens_in_its_load_balance_loss(rng):
    torch = pytest.importorskip("torch")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    call = losses.OPS[0].sample(rng, T=30, E=6, k=2, batch=())
    chosen = refimpl.route(call["logits"], 2)[1]
    theirs = load_balancing_loss_func((torch.from_numpy(call["logits"]),), num_experts=6, top_k=2)
    ours = refimpl.load_balance_loss(call["logits"], chosen)
    assert abs(2 * float(ours) - float(theirs)) < 1e-6 * float(theirs)
