"""Speculative sampling: a small model guesses, a large one decides, and the law of what comes out is the large one's.

A draft model has drawn γ tokens x_t ~ q_t; the target model gives its own distributions p_t for all of them at once.

    accept x_t with probability min(1, p_t(x_t) / q_t(x_t)),  t = 0, 1 ...  until the first rejection            (1)
    rejected at t:       draw from  max(p_t - q_t, 0) / Σ max(p_t - q_t, 0)                                        (2)
    nothing rejected:    draw one more token from p_γ                                                              (3)

Whatever q is, the token at a place is distributed as p: it is x with probability min(p, q)(x) by acceptance, and the mass
that acceptance leaves out, 1 - Σ min(p, q) = Σ max(p - q, 0), is given by (2) to max(p - q, 0)(x); the two add up to p(x).
The nearer q is to p, the more tokens one pass of the target yields: with acceptance rate α = Σ min(p, q) on average
(1 - α^{γ+1}) / (1 - α) of them.

Glossary
    target, draft    p, q [1, section 2.1]; q, p in [2]
    tokens           x_1 ... x_γ                    γ: gamma, the number of guesses
    α                acceptance rate [1, definition 3.1]

Where implementations differ
    Some libraries stop after (2) and draw no additional token (3). Comparing a uniform number with p/q by < or <= differs
    only where the ratio is exactly 0: a token that the target excludes must never be accepted, so < it is.

References
    [1] Y. Leviathan, M. Kalman, Y. Matias, "Fast inference from transformers via speculative decoding", ICML 2023,
        section 2.3, algorithm 1, appendix A.1.
    [2] C. Chen et al., "Accelerating large language model decoding with speculative sampling", 2023, algorithm 2.
"""

import numpy as np

__all__ = ["acceptance_rate", "expected_tokens", "residual_distribution", "speculative_sample"]


def speculative_sample(target, draft, tokens, *, rng):
    """Which of the draft's tokens stand, and the one that follows them, rules (1)-(3).

    Parameters
    ----------
    target : ndarray, shape (..., γ + 1, V)
        The target's distributions at the γ places, and at the one after them.
    draft : ndarray, shape (..., γ, V)
        The draft's distributions, from which `tokens` were drawn.
    tokens : ndarray of int, shape (..., γ)
    rng : numpy.random.Generator, or a seed of one

    Returns
    -------
    out : ndarray of int, shape (..., γ + 1)
        Accepted tokens, then one more, then -1.
    count : ndarray of int, shape (...,)
        How many of the draft's tokens were accepted; ``count + 1`` entries of `out` are tokens.

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit, a row is not a distribution, a token is outside 0 ... V-1, or one that the draft excludes.

    Notes
    -----
    O(γ V) operations. Exact for exact p and q; rounding them by u changes probabilities by u.

    References
    ----------
    [1, algorithm 1].

    Examples
    --------
    Where draft and target agree every guess stands.

    >>> import numpy as np
    >>> p = np.array([[0.5, 0.5], [0.25, 0.75], [0.0, 1.0]])
    >>> tokens, count = speculative_sample(p, p[:2], np.array([0, 1]), rng=0)
    >>> tokens, int(count)
    (array([0, 1, 1]), 2)
    """
    target, draft, tokens = np.asarray(target), np.asarray(draft), np.asarray(tokens)
    _check(target, draft, tokens)
    rng = np.random.default_rng(rng)
    gamma = tokens.shape[-1]
    at = lambda p: np.take_along_axis(p, tokens[..., None], axis=-1)[..., 0]  # (..., γ)
    accepted = rng.random(tokens.shape) * at(draft) < at(target[..., :gamma, :])
    count = np.cumprod(accepted, axis=-1).sum(axis=-1)  # guesses before the first rejection
    nothing = np.zeros_like(target[..., :1, :])
    q = np.concatenate([draft, nothing], axis=-2)  # (..., γ + 1, V); rule (3) is (2) with q = 0
    here = lambda p: np.take_along_axis(p, count[..., None, None], axis=-2)[..., 0, :]  # (..., V)
    follow = _draw(residual_distribution(here(target), here(q)), rng)
    place = np.arange(gamma + 1)
    padded = np.concatenate([tokens, np.zeros_like(tokens[..., :1])], axis=-1) if gamma else np.zeros((*count.shape, 1), dtype=tokens.dtype)
    out = np.where(place < count[..., None], padded, np.where(place == count[..., None], follow[..., None], -1))
    return out, count


def residual_distribution(target, draft):
    """Rule (2): max(p - q, 0), normalised; p itself where the two are equal, and nothing can be rejected.

    Parameters
    ----------
    target, draft : ndarray, shape (..., V)

    Returns
    -------
    ndarray, shape (..., V)

    Examples
    --------
    >>> import numpy as np
    >>> residual_distribution(np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25]))
    array([1., 0., 0.])
    """
    rest = np.maximum(target - draft, 0)
    total = rest.sum(axis=-1, keepdims=True)
    return np.where(total > 0, rest / np.where(total > 0, total, np.ones_like(total)), target)


def acceptance_rate(target, draft):
    """α = Σ min(p, q): the probability that a guess stands.

    Parameters
    ----------
    target, draft : ndarray, shape (..., V)

    Returns
    -------
    ndarray, shape (...,)

    References
    ----------
    [1, theorem 3.5].

    Examples
    --------
    >>> import numpy as np
    >>> float(acceptance_rate(np.array([0.5, 0.5]), np.array([0.25, 0.75])))
    0.75
    """
    return np.minimum(target, draft).sum(axis=-1)


def expected_tokens(rate, gamma):
    """Tokens per pass of the target: (1 - α^{γ+1}) / (1 - α) = 1 + α + ... + α^γ.

    Parameters
    ----------
    rate : float or ndarray
        α, in [0, 1].
    gamma : int
        Guesses per pass.

    Returns
    -------
    float or ndarray

    References
    ----------
    [1, equation 1].

    Examples
    --------
    >>> round(expected_tokens(0.8, 4), 4)
    3.3616
    """
    return sum(rate**j for j in range(gamma + 1))


def _draw(p, rng):
    """One index of each distribution, by inversion; never one of probability 0."""
    cumulative = np.cumsum(p, axis=-1)
    u = rng.random(p.shape[:-1])[..., None] * cumulative[..., -1:]
    return np.minimum((cumulative <= u).sum(axis=-1), p.shape[-1] - 1)


def _check(target, draft, tokens):
    name = "speculative_sample"
    if tokens.dtype.kind not in "iu":
        raise TypeError(f"{name}: tokens must be integers, got dtype {tokens.dtype}")
    gamma = tokens.shape[-1] if tokens.ndim else -1
    if draft.ndim != tokens.ndim + 1 or draft.shape[:-1] != tokens.shape:
        raise ValueError(f"{name}: draft must have shape (..., γ, V) with tokens of shape (..., γ), got {draft.shape} and {tokens.shape}")
    if target.shape != (*draft.shape[:-2], gamma + 1, draft.shape[-1]):
        raise ValueError(f"{name}: target must have shape (..., γ + 1, V) = {(*draft.shape[:-2], gamma + 1, draft.shape[-1])}, got {target.shape}")
    for label, p in (("target", target), ("draft", draft)):
        if p.dtype.kind != "f":
            raise TypeError(f"{name}: {label} must be floating, got dtype {p.dtype}")
        total = p.sum(axis=-1)
        slack = 4 * p.shape[-1] * np.finfo(p.dtype).eps
        if np.any(p < 0) or not np.all(abs(total - 1) <= slack):
            raise ValueError(f"{name}: each row of {label} must be a distribution, got entries from {p.min(initial=0)} and sums such as {total.flat[np.argmax(abs(total - 1))]}")
    if tokens.size and (tokens.min() < 0 or tokens.max() >= draft.shape[-1]):
        raise ValueError(f"{name}: tokens must lie in 0 ... {draft.shape[-1] - 1}, got {tokens.min()} to {tokens.max()}")
    if tokens.size and np.any(np.take_along_axis(draft, tokens[..., None], axis=-1) == 0):
        raise ValueError(f"{name}: tokens must be possible under draft, got one of probability 0")
