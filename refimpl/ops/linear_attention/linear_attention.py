"""Linear attention: a matrix memory that is decayed, corrected, written and read at every step.

    S'_t = diag(e^{g_t}) S_{t-1}                                                                        (1)
    u_t  = v_t,    or, with the delta rule,    u_t = β_t (v_t - S'_tᵀ k_t)                               (2)
    S_t  = S'_t + k_t u_tᵀ                                                                              (3)
    o_t  = scale · S_tᵀ q_t,    or, normalised,    o_t = S_tᵀ q_t / q_t·z_t,   z_t = e^{g_t} z_{t-1} + k_t   (4)

Softmax attention without the softmax is a product of three matrices, and brackets can be set the other way: (q kᵀ) v =
q (kᵀ v). So the past fits into one d × e matrix, and a step costs d e operations however long the sequence is [1]. What
the family adds is how the memory forgets, and how it writes:

    e^{g_t} a constant of the head          RetNet's retention [2]
    e^{g_t} per key channel, from the data  gated linear attention [3]
    β_t (v_t - S'ᵀk_t) in place of v_t      the delta rule, DeltaNet [4]: what the key k_t recalls is replaced, not added to
    both                                    Gated DeltaNet [5]; per key channel, Kimi Delta Attention [6]
    φ(q), φ(k) in place of q, k             linear transformers [1], Based [7]; `feature_maps` has the maps

(2) and (3) are one step of gradient descent on |Sᵀk_t - v_t|²/2 with the learning rate β_t. With β = 1 and keys of unit
length the memory afterwards recalls v_t exactly under k_t, and keeps what stands under keys orthogonal to it.

Unrolled, (1)-(3) is a masked attention. With D_tj = diag(e^{g_{j+1} + ... + g_t}) and M_tj = k_tᵀ D_tj k_j for j < t,

    (I + diag(β) M) U = diag(β) (V - K' S_0),    o_t = scale · ( Σ_{j<=t} q_tᵀ D_tj k_j u_j + q'_tᵀ S_0 )       (5)

where primes stand for the decay since S_0: a triangular system, which is the WY form of a product of Householder-like
matrices I - β k kᵀ [4, section 3]. Without β it is u_j = v_j, and nothing is to be solved.

Glossary
    q, k, v     query, key, value: q_t, k_t, v_t, after the feature map
    decay       g_t, the logarithm of the decay: log γ in [2], log α_t in [3], [5]; a scalar or one per key channel
    beta        β_t in [4], [5]
    S, z        memory and normaliser, the state; rows of S follow k, columns follow v (S transposed in [4], [5])
    A           exponents g_{j+1} + ... + g_t

Where implementations differ
    The decay comes before the delta correction, as in [5] and flash-linear-attention. Decays are passed as logarithms here and
    there, and in (0, 1) elsewhere. Heads: q may have more than k and v, as in ONNX; in Qwen3-Next v has more. `scale` is
    1/√d where public delta rules often have q normalised outside and scale 1. Many codes add eps to the normaliser of (4) or
    take the maximum of it and 1; here it is bare. Keys and queries are not normalised in here, as some kernels offer.

References
    [1] A. Katharopoulos, A. Vyas, N. Pappas and F. Fleuret, "Transformers are RNNs", ICML 2020, sections 3.2-3.4.
    [2] Y. Sun et al., "Retentive network", 2023, section 2.1, equations (5)-(7).
    [3] S. Yang, B. Wang, Y. Shen, R. Panda and Y. Kim, "Gated linear attention transformers with hardware-efficient
        training", ICML 2024, section 4.
    [4] S. Yang, B. Wang, Y. Zhang, Y. Shen and Y. Kim, "Parallelizing linear transformers with the delta rule over sequence
        length", NeurIPS 2024, section 3.
    [5] S. Yang, J. Kautz and A. Hatamizadeh, "Gated delta networks", ICLR 2025, section 3.1, equation (10).
    [6] Kimi Team, "Kimi Linear", 2025, section 3.
    [7] S. Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff", ICML 2024.
"""

import numpy as np

from refimpl.core.costs import log2_ceil
from refimpl.core.linalg import solve_unit_lower
from refimpl.core.numerics import gate_exponents, masked_matmul, times_exp
from refimpl.core.options import positive_int
from refimpl.core.parallel import over_threads
from refimpl.laws import causal, hand_off, linear
from refimpl.op import Cost, Form, Op
from refimpl.ops.linear_attention import linear_attention_cases as cases
from refimpl.ops.linear_attention.feature_maps import map_error
from refimpl.ops.linear_attention.linear_attention_bound import bound
from refimpl.ops.linear_attention.linear_attention_contract import CONTRACT, grouped, prepare, ungrouped
from refimpl.ops.linear_attention.linear_attention_gradient import linear_attention_vjp
from refimpl.ops.linear_attention.linear_attention_laws import ADDS, DECAYS, MEAN, OVERWRITES, UNITS, unless
from refimpl.ops.linear_attention.state import State


@CONTRACT.form
def linear_attention(q, k, v, *, decay=None, beta=None, feature_map=None, normalize=False, scale=None, state=None, return_state=False):
    """Linear attention, equations (1)-(4), one step at a time.

    Parameters
    ----------
    q : ndarray, shape (..., Hq, T, d)
        Queries. Without the axis Hq there is one head, and so for the other arguments.
    k : ndarray, shape (..., Hkv, T, d)
        Keys; Hkv divides Hq, and head h of q reads head h // (Hq // Hkv).
    v : ndarray, shape (..., Hkv, T, e)
        Values.
    decay : ndarray, shape (..., Hkv, T) or (..., Hkv, T, m), optional
        Logarithm of the decay, g in (1), of any sign: of the head, or of each of the m key channels (after the feature map).
        No decay by default.
    beta : ndarray, shape (..., Hkv, T), optional
        Learning rate of the delta rule; without it values are added, not corrected.
    feature_map : {"elu+1", "relu", "taylor"}, callable or None
        Map φ applied to q and k, (..., d) -> (..., m). A callable needs an attribute `vjp` for gradients: `FeatureMap`.
    normalize : bool
        Divide by q·z; not with `beta`. Nothing is added to the denominator: where it is 0 the result is not finite.
    scale : float, optional
        Factor of the result, 1/√d by default, 1 with a feature map; it cancels with `normalize`.
    state : ndarray, shape (..., Hkv, m, e), or State, optional
        S before the first step, or (S, z) with `normalize`; zeros by default.
    return_state : bool
        Also return the final state.

    Returns
    -------
    o : ndarray, shape (..., Hq, T, e)
    state : ndarray or State, only with `return_state`

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, an array is not real, a feature map is unknown, or `normalize` comes with `beta`.

    Notes
    -----
    5 T d e operations a head, 7 T d e with the delta rule; T long. The error is at most ``error_bound``. With a decay above
    1 the memory may grow beyond the precision's range, as the equation says; normalised results do not survive that, for
    the state has no stabiliser (`mlstm` has one).

    Examples
    --------
    The delta rule replaces what it finds under a key; a sum would have recalled 3 + 5:

    >>> import numpy as np
    >>> key, v = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[3.0], [5.0]])
    >>> linear_attention(key, key, v, beta=np.ones(2), scale=1.0)[:, 0]
    array([3., 5.])
    >>> linear_attention(key, key, v, scale=1.0)[:, 0]
    array([3., 8.])
    """
    q, k, v, g, beta, S, z, scale = prepare(q, k, v, decay, beta, feature_map, normalize, scale, state)
    outputs = []
    for t in range(k.shape[-2]):
        k_t, v_t = k[..., t, :], v[..., t, :]  # (..., Hkv, m), (..., Hkv, e)
        S = np.exp(g[..., t, :, None]) * S
        u = v_t if beta is None else beta[..., t, :] * (v_t - _recall(S, k_t))
        S = S + k_t[..., :, None] * u[..., None, :]
        o = q[..., t, :] @ S  # (..., Hkv, group, e)
        if normalize:
            z = np.exp(g[..., t, :]) * z + k_t
            o = o / (q[..., t, :] @ z[..., None])
        outputs.append(o if normalize else scale * o)
    o = ungrouped(np.stack(outputs, axis=-2)) if outputs else _nothing(q, v)
    return (o, State(S, z) if normalize else S) if return_state else o


@CONTRACT.form
def linear_attention_parallel(
    q, k, v, *, decay=None, beta=None, feature_map=None, normalize=False, scale=None, state=None, return_state=False
):
    """The same as a masked attention, equation (5): all pairs of steps at once, with the delta rule a triangular system.

    2 T² (m + e) operations a head and T² memory, twice that and T² e more for the triangular system, and T² m memory for a decay per
    channel. Exponents are sums of log-decays, so that a decay of 0 is no hindrance. The normaliser is the memory of the value 1.
    """
    q, k, v, g, beta, S, z, scale = prepare(q, k, v, decay, beta, feature_map, normalize, scale, state)
    if k.shape[-2] == 0:
        return (_nothing(q, v), State(S, z) if normalize else S) if return_state else _nothing(q, v)
    if normalize:
        v, S = _with_ones(v), np.concatenate([S, z[..., None]], axis=-1)
    A, since, peak = _exponents(g)
    S_peak = times_exp(S, peak[..., None])
    u = v
    if beta is not None:
        u = solve_unit_lower(beta * _match(k, k, A), beta * (v - (k * since) @ S_peak))
    match = _match(q, k[..., None, :, :], A[..., None, :, :, :])  # (..., Hkv, group, T, T)
    read = masked_matmul(match, u[..., None, :, :], _causal(match)) + (q * since[..., None, :, :]) @ S_peak[..., None, :, :]
    o = ungrouped(read[..., :-1] / read[..., -1:] if normalize else scale * read)
    if not return_state:
        return o
    S = since[..., -1, :, None] * S_peak + _transposed(_kept(k, A)) @ u
    return o, State(S[..., :-1], S[..., -1]) if normalize else S


@CONTRACT.form
def linear_attention_chunkwise(
    q, k, v, *, decay=None, beta=None, feature_map=None, normalize=False, scale=None, state=None, return_state=False, chunk=64
):
    """The same in chunks: equation (5) inside a chunk, the state between chunks; linear in T, and all of it matrix products.

    The right side of the system (5) holds S_0, which is not known before the chunks in front are done. But it is linear in S_0:
    U = Û - W S_0, with Û and W solved for all chunks at once, and only T/chunk products W S_0 and the states themselves
    remain sequential. 2 T (chunk (m + e) + 2 m e) operations a head, and T (chunk (2 m + e) + 2 m e) more for the delta rule.
    """
    positive_int("linear_attention", "chunk", chunk)
    q, k, v, g, beta, S, z, scale = prepare(q, k, v, decay, beta, feature_map, normalize, scale, state)
    T, batch = k.shape[-2], k.shape[:-2]
    if T == 0 or k.size == 0 or q.size == 0:
        empty = ungrouped(np.zeros_like(v, shape=(*q.shape[:-1], v.shape[-1])))
        return (empty, State(S, z) if normalize else S) if return_state else empty
    if normalize:
        v, S = _with_ones(v), np.concatenate([S, z[..., None]], axis=-1)
    heads = [x if x is None else x.reshape(-1, *x.shape[len(batch) :]) for x in (q, k, v, g, beta, S)]
    done = over_threads(
        lambda h: _one_head(*(x if x is None else x[h] for x in heads), min(chunk, max(T, 1))), range(len(heads[1])), q, k, v
    )
    read, S = (np.stack(x).reshape(*batch, *x[0].shape) for x in zip(*done, strict=True))
    o = ungrouped(read[..., :-1] / read[..., -1:] if normalize else scale * read)
    return (o, State(S[..., :-1], S[..., -1]) if normalize else S) if return_state else o


def _one_head(q, k, v, g, beta, S, L):
    """One head of k, in chunks of L steps: q (group, T, m), k (T, m), v (T, e), g (T, 1 or m), beta (T, 1), S (m, e)."""
    T, e = v.shape
    q, k, v, g = (_chunks(x, L) for x in (q, k, v, g))  # (group, T/L, L, m), (T/L, L, m), (T/L, L, e), (T/L, L, 1 or m)
    A, since, peak = _exponents(g)
    u, w = v, None
    if beta is not None:
        beta = _chunks(beta, L)
        u_and_w = solve_unit_lower(beta * _match(k, k, A), beta * np.concatenate([v, k * since], axis=-1))
        u, w = u_and_w[..., :e], u_and_w[..., e:]
    kept, through = _transposed(_kept(k, A)), since[:, -1, :, None]
    entering, written = [], []
    for c in range(len(k)):
        S_peak = times_exp(S, peak[c][:, None])
        u_c = u[c] if w is None else u[c] - w[c] @ S_peak  # (L, e)
        S = through[c] * S_peak + kept[c] @ u_c
        entering.append(S_peak)
        written.append(u_c)
    match = _match(q, k, A)
    read = masked_matmul(match, np.stack(written), _causal(match)) + (q * since) @ np.stack(entering)  # (group, T/L, L, e)
    return read.reshape(len(read), -1, e)[:, :T], S


@CONTRACT.form
def error_bound(
    q, k, v, *, unit, store=0.0, decay=None, beta=None, feature_map=None, normalize=False, scale=None, state=None, return_state=False
):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`: derived in `linear_attention_bound`.

    Without the delta rule a recurrence of absolute values; with it one of the lengths of the error's columns, which a step
    multiplies by at most max(1, |1 - β |k|²|) times its largest decay.
    """
    prepared = prepare(q, k, v, decay, beta, feature_map, normalize, scale, state)
    dq, dk = grouped(map_error(feature_map, q, unit), k.shape[-3]), map_error(feature_map, k, unit)
    E, (E_S, E_z) = bound(*prepared, dq, dk, normalize=normalize, unit=unit, store=store)
    o = ungrouped(E) if k.shape[-2] else _nothing(prepared[0], prepared[2])
    return (o, State(E_S, E_z) if normalize else E_S) if return_state else o


# -- what the forms share --------------------------------------------------------------------------------------------


def _nothing(q, v):
    return ungrouped(np.zeros_like(v, shape=(*q.shape[:-1], v.shape[-1])))


def _recall(S, k):
    """Sᵀk: what the memory holds under a key."""
    return (k[..., None, :] @ S)[..., 0, :]


def _exponents(g):
    """Of log-decays (..., L, c): sums A_tj over j+1 ... t (..., c, L, L), e^(sum over 0 ... t - peak) (..., L, c), and peak (..., c).

    The peak, the largest sum or 0, goes to the state, where it cannot overflow unless the state itself does. What is not
    finite is no peak: it must not reach the steps before it.
    """
    A = gate_exponents(_transposed(g), np.zeros_like(_transposed(g)))
    sums = np.cumsum(g, axis=-2)
    peak = np.maximum(np.where(np.isfinite(sums), sums, np.zeros_like(sums)).max(axis=-2), 0)
    return A, np.exp(sums - peak[..., None, :]), peak


def _match(q, k, A):
    """Σ_i q_ti k_ji exp(A_tj) at [t, j], 0 for j > t: the weights of the values."""
    if A.shape[-3] == 1:
        return np.tril(times_exp(q @ _transposed(k), A[..., 0, :, :]))
    channels = range(k.shape[-1])
    return np.tril(sum(times_exp(q[..., :, None, i] * k[..., None, :, i], A[..., i, :, :]) for i in channels))


def _kept(k, A):
    """Keys times what is left of them at the end, (..., L, m)."""
    return times_exp(k, _transposed(A[..., -1, :]))


def _causal(match):
    """0 for pairs that see each other, -∞ for the others: (L, L)."""
    seen = np.arange(match.shape[-1]) <= np.arange(match.shape[-2])[:, None]
    return np.where(seen, np.zeros(()), np.full((), -np.inf))


def _chunks(x, L):
    """(..., T, f) as (..., T/L, L, f); the steps after the end are zeros, which write nothing and forget nothing."""
    pad = np.zeros_like(x, shape=(*x.shape[:-2], -x.shape[-2] % L, x.shape[-1]))
    return np.concatenate([x, pad], axis=-2).reshape(*x.shape[:-2], -1, L, x.shape[-1])


def _with_ones(v):
    return np.concatenate([v, np.ones_like(v[..., :1])], axis=-1)


def _transposed(x):
    return np.swapaxes(x, -1, -2)


# -- the catalogue ---------------------------------------------------------------------------------------------------


def _cost(work, depth, peak):
    def cost(T, d, e, Hq=1, Hkv=1, batch=1, chunk=64, **options):
        if options.get("feature_map") == "taylor":
            d = 1 + d + d * d
        c = min(chunk, max(T, 1))
        return Cost(work(T, d, e, c, Hkv / Hq) * Hq * batch, depth(T, d, c), peak(T, d, e, c) * Hq * batch)

    return cost


OPS = (
    Op(
        name="linear_attention",
        summary="a matrix memory: S <- e^g S, S <- S + k u^T, o = S^T q, with decay, delta rule, feature maps, normaliser",
        contract=CONTRACT,
        forms={
            "recurrent": Form(
                linear_attention,
                _cost(
                    lambda T, d, e, c, share: 2 * T * d * e + T * e + (3 * T - 1) * d * e * share,
                    lambda T, d, c: 2 * T + log2_ceil(d) + 2,
                    lambda T, d, e, c: 2.5 * d * e + 2 * T * e,
                ),
                exact=("work", "depth"),
            ),
            "parallel": Form(
                linear_attention_parallel,
                _cost(
                    lambda T, d, e, c, share: 2 * T * T * (d + e + 1) + T * (d + 2 * e + 2 * d * e),
                    lambda T, d, c: log2_ceil(T) + log2_ceil(d) + 6,
                    lambda T, d, e, c: 4 * T * T + 2 * T * (d + e),
                ),
                exact=("work", "depth"),
            ),
            "chunkwise": Form(
                linear_attention_chunkwise,
                _cost(
                    lambda T, d, e, c, share: T * (c * (2 * d + 2 * e + 2) + 4 * d * e + 2 * d + 4 * e) + 3 * (T / c) * d * e,
                    lambda T, d, c: 4 * T / c + log2_ceil(c) + log2_ceil(d) + 2,
                    lambda T, d, e, c: 2 * T * c + (T / c) * d * e + 2 * T * (d + e),
                ),
            ),
        },
        gradient=linear_attention_vjp,
        sample=cases.sample,
        options={"feature_map": (None, "elu+1", "relu", "taylor"), "normalize": (False, True), "scale": (None, 0.4)},
        hard=cases.HARD,
        arrange=cases.arrange,
        error_bound=error_bound,
        references=(
            "katharopoulos2020, sections 3.2-3.4",
            "sun2023, equations 5-7",
            "yang2024gla, section 4",
            "yang2024delta, section 3",
            "yang2025, equation 10",
            "kimi2025, section 3",
        ),
        sizes=(
            {"d": 1, "e": 1},
            {"Hq": 1, "Hkv": 1, "per_channel": True},
            {"Hq": 6, "Hkv": 2, "d": 5, "e": 5, "per_channel": True},
            {"d": 16, "e": 8},
            {"Hq": 3, "Hkv": 3, "batch": (2,)},
        ),
        laws=(
            causal(CONTRACT, "q", "k", "v", "decay", "beta"),
            hand_off(CONTRACT),
            unless("normalize", linear(CONTRACT, "v", "state")),
            DECAYS,
            unless("normalize", UNITS),
            OVERWRITES,
            ADDS,
            MEAN,
        ),
    ),
)
