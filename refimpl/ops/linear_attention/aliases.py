"""Retention, gated linear attention and the delta rules, by their papers' names: `linear_attention` with some arguments left out."""

import numpy as np

from refimpl.ops.linear_attention.linear_attention import linear_attention

__all__ = ["delta_rule", "gated_delta_rule", "gla", "retention"]


def retention(q, k, v, log_gamma, *, scale=None, state=None, return_state=False):
    """Retention of RetNet: S_t = γ S_{t-1} + k_t v_tᵀ, o_t = scale · S_tᵀ q_t, with a constant γ for each head.

    Parameters
    ----------
    q, k, v : ndarray, shapes (..., Hq, T, d), (..., Hkv, T, d), (..., Hkv, T, e)
        Queries, keys (rotated already, where rotation is wanted), values.
    log_gamma : float or ndarray, shape (Hkv,)
        log γ. RetNet takes γ = 1 - 2^-(5 + h) for head h. A Python number is rounded to the keys' precision, an array takes
        part in the choice of precision: give one in float32 with keys in a half type.
    scale, state, return_state
        As in `linear_attention`.

    Returns
    -------
    o : ndarray, shape (..., Hq, T, e)
    state : ndarray, shape (..., Hkv, d, e), only with `return_state`

    References
    ----------
    Y. Sun et al., "Retentive network", 2023, equations (5)-(8); its group norm and output gate are not part of this.

    Examples
    --------
    >>> import numpy as np
    >>> q = k = np.ones((3, 1))
    >>> retention(q, k, np.array([[8.0], [0.0], [0.0]]), np.log(0.5))[:, 0]
    array([8., 4., 2.])
    """
    k = np.asarray(k)
    log_gamma = np.asarray(log_gamma, dtype=k.dtype if isinstance(log_gamma, float) and k.dtype.kind not in "iub" else None)
    if log_gamma.ndim > 1 or (log_gamma.ndim == 1 and (k.ndim < 3 or log_gamma.shape != k.shape[-3:-2])):
        raise ValueError(f"retention: log_gamma must be a number or have shape (Hkv,), got {log_gamma.shape} with k of shape {k.shape}")
    decay = np.broadcast_to(log_gamma[..., None], (*np.shape(k)[:-2], np.shape(k)[-2]))
    return linear_attention(q, k, v, decay=decay, scale=scale, state=state, return_state=return_state)


def gla(q, k, v, log_alpha, *, scale=None, state=None, return_state=False):
    """Gated linear attention: S_t = diag(α_t) S_{t-1} + k_t v_tᵀ, o_t = scale · S_tᵀ q_t, with a gate for each key channel.

    Parameters
    ----------
    q, k, v : ndarray, shapes (..., Hq, T, d), (..., Hkv, T, d), (..., Hkv, T, e)
        Queries, keys, values.
    log_alpha : ndarray, shape (..., Hkv, T, d)
        log α_t; the paper takes log σ(x W) / 16.
    scale, state, return_state
        As in `linear_attention`.

    Returns
    -------
    o : ndarray, shape (..., Hq, T, e)
    state : ndarray, shape (..., Hkv, d, e), only with `return_state`

    References
    ----------
    S. Yang et al., "Gated linear attention transformers with hardware-efficient training", ICML 2024, equation (3).

    Examples
    --------
    >>> import numpy as np
    >>> k = np.array([[1.0, 1.0], [0.0, 0.0]])  # one channel forgets, the other does not
    >>> gla(np.ones((2, 2)), k, np.array([[8.0], [0.0]]), np.log([[1.0, 1.0], [0.5, 1.0]]), scale=1.0)[:, 0]
    array([16., 12.])
    """
    return linear_attention(q, k, v, decay=log_alpha, scale=scale, state=state, return_state=return_state)


def delta_rule(q, k, v, beta, *, scale=None, state=None, return_state=False):
    """The delta rule of DeltaNet: S_t = (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ, o_t = scale · S_tᵀ q_t.

    Parameters
    ----------
    q, k, v : ndarray, shapes (..., Hq, T, d), (..., Hkv, T, d), (..., Hkv, T, e)
        Queries, keys, values. Nothing is normalised in here; with β |k|² > 2 the memory diverges.
    beta : ndarray, shape (..., Hkv, T)
        Learning rates.
    scale, state, return_state
        As in `linear_attention`.

    Returns
    -------
    o : ndarray, shape (..., Hq, T, e)
    state : ndarray, shape (..., Hkv, d, e), only with `return_state`

    References
    ----------
    S. Yang et al., "Parallelizing linear transformers with the delta rule over sequence length", NeurIPS 2024, section 2.2.

    Examples
    --------
    >>> import numpy as np
    >>> key = np.array([[1.0, 0.0], [1.0, 0.0]])
    >>> delta_rule(key, key, np.array([[3.0], [5.0]]), np.array([1.0, 0.5]), scale=1.0)[:, 0]
    array([3., 4.])
    """
    return linear_attention(q, k, v, beta=beta, scale=scale, state=state, return_state=return_state)


def gated_delta_rule(q, k, v, log_alpha, beta, *, scale=None, state=None, return_state=False):
    """The gated delta rule: S_t = (I - β_t k_t k_tᵀ) α_t S_{t-1} + β_t k_t v_tᵀ, o_t = scale · S_tᵀ q_t.

    Parameters
    ----------
    q, k, v : ndarray, shapes (..., Hq, T, d), (..., Hkv, T, d), (..., Hkv, T, e)
        Queries, keys, values.
    log_alpha : ndarray, shape (..., Hkv, T) or (..., Hkv, T, d)
        log α_t of the head (Gated DeltaNet) or of each key channel (Kimi Delta Attention); the decay comes before the correction.
    beta : ndarray, shape (..., Hkv, T)
        Learning rates.
    scale, state, return_state
        As in `linear_attention`.

    Returns
    -------
    o : ndarray, shape (..., Hq, T, e)
    state : ndarray, shape (..., Hkv, d, e), only with `return_state`

    References
    ----------
    S. Yang, J. Kautz and A. Hatamizadeh, "Gated delta networks", ICLR 2025, equation (10).

    Examples
    --------
    What is replaced is what is left of the old value, 4 of 8; so half of the way from 4 to 6 is 5:

    >>> import numpy as np
    >>> key = np.array([[1.0], [1.0]])
    >>> gated_delta_rule(key, key, np.array([[8.0], [6.0]]), np.log([1.0, 0.5]), np.array([1.0, 0.5]))[:, 0]
    array([8., 5.])
    """
    return linear_attention(q, k, v, decay=log_alpha, beta=beta, scale=scale, state=state, return_state=return_state)
