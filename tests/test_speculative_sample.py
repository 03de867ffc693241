"""The law of speculative sampling: what comes out is distributed as the target, whatever the draft."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import scipy.stats

import refimpl


def simplex(n, parts):
    """All distributions over n tokens whose probabilities are multiples of 1/parts."""
    return [tuple(Fraction(i, parts) for i in c) for c in product(range(parts + 1), repeat=n) if sum(c) == parts]


def test_law_is_exact_on_every_small_pair():
    """Enumerated in rationals: acceptance and residual together give p(x), for all p and q on a grid."""
    for p, q in product(simplex(3, 4), repeat=2):
        accepted = [min(a, b) for a, b in zip(p, q, strict=True)]  # q(x) min(1, p/q)
        rest = refimpl.residual_distribution(np.array(p, dtype=float), np.array(q, dtype=float))
        total = [float(a) + float(1 - sum(accepted)) * r for a, r in zip(accepted, rest, strict=True)]
        np.testing.assert_allclose(total, np.array(p, dtype=float), rtol=0, atol=2**-52)


@pytest.mark.parametrize("kind", ["near", "far", "zeros in the target", "zeros in the draft"])
def test_tokens_follow_the_target(rng, kind):
    V, gamma, N = 5, 3, 40_000
    p, q = rng.dirichlet(np.ones(V), gamma + 1), rng.dirichlet(np.ones(V), gamma)
    if kind == "near":
        q = 0.9 * p[:gamma] + 0.1 * q
    if kind == "zeros in the target":
        p[:, 1] = 0
    if kind == "zeros in the draft":
        q[:, 2] = 0
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    guesses = np.stack([rng.choice(V, N, p=row) for row in q], axis=-1)
    out, count = refimpl.speculative_sample(np.broadcast_to(p, (N, *p.shape)), np.broadcast_to(q, (N, *q.shape)), guesses, rng=rng)
    for place in range(gamma + 1):
        seen = np.bincount(out[count >= place, place], minlength=V)
        assert not np.any(seen[p[place] == 0])
        possible = p[place] > 0
        expected = seen.sum() * p[place][possible]
        assert scipy.stats.chisquare(seen[possible], expected).pvalue > 1e-4
    alpha = refimpl.acceptance_rate(p[0], q[0])
    assert scipy.stats.binomtest(int((count >= 1).sum()), N, float(alpha)).pvalue > 1e-4
    assert np.all(out[np.arange(gamma + 1) > count[:, None]] == -1)
    assert np.all(out[np.arange(gamma + 1) <= count[:, None]] >= 0)


def test_a_mistaken_rule_is_seen(rng):
    """The chi-square above can fail: drawing the replacement from p instead of the residual is caught."""
    V, N = 4, 40_000
    p, q = np.array([0.5, 0.3, 0.1, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])
    guesses = rng.choice(V, N, p=q)
    accepted = rng.random(N) * q[guesses] < p[guesses]
    out = np.where(accepted, guesses, rng.choice(V, N, p=p))
    assert scipy.stats.chisquare(np.bincount(out, minlength=V), N * p).pvalue < 1e-8


def test_expected_tokens_is_the_mean(rng):
    p, q, N, gamma = np.array([0.6, 0.4]), np.array([0.3, 0.7]), 50_000, 3
    guesses = rng.choice(2, (N, gamma), p=q)
    _, count = refimpl.speculative_sample(np.broadcast_to(p, (N, gamma + 1, 2)), np.broadcast_to(q, (N, gamma, 2)), guesses, rng=rng)
    expected = refimpl.expected_tokens(refimpl.acceptance_rate(p, q), gamma)
    assert abs((count + 1).mean() - expected) < 4 * (count + 1).std() / np.sqrt(N)


def test_no_guess_is_plain_sampling():
    out, count = refimpl.speculative_sample(np.array([[0.0, 1.0]]), np.zeros((0, 2)), np.zeros(0, dtype=int), rng=0)
    assert out.tolist() == [1] and count == 0


@pytest.mark.parametrize("change, error, message", [
    ({"tokens": np.array([0.0])}, TypeError, "tokens must be integers"),
    ({"tokens": np.array([7])}, ValueError, "0 ... 1"),
    ({"draft": np.array([[0.5, 0.6]])}, ValueError, "draft must be a distribution"),
    ({"target": np.array([[0.5, 0.5]])}, ValueError, "target must have shape"),
    ({"draft": np.array([[1.0, 0.0]]), "tokens": np.array([1])}, ValueError, "probability 0"),
])  # fmt: skip
def test_bad_input(change, error, message):
    good = {"target": np.full((2, 2), 0.5), "draft": np.full((1, 2), 0.5), "tokens": np.array([0])}
    with pytest.raises(error, match=message):
        refimpl.speculative_sample(**(good | change), rng=0)
