"""mLSTM, the matrix memory of xLSTM: a linear attention whose gates are exponential, and therefore need a stabiliser.

    C_t = f_t C_{t-1} + i_t k_t v_tᵀ,      n_t = f_t n_{t-1} + i_t k_t                                  (1)
    h_t = C_tᵀ q_t / max(|n_tᵀ q_t|, 1)                                                                (2)

with keys divided by √d, i_t = exp(ĩ_t), and f_t = σ(f̃_t) or exp(f̃_t). C is an associative memory: it stores values under
keys, and a query reads a mixture of the values, weighted by how well their keys match; n is what the same memory makes of
the constant value 1, so that (2) is a weighted mean as long as enough was written, and fades to 0 where it was not.

exp(ĩ) overflows. So only C e^-m and n e^-m are kept, with m the running maximum of the exponents [1, eq. 15]:

    m_t = max(log f_t + m_{t-1}, ĩ_t),     f'_t = exp(log f_t + m_{t-1} - m_t),    i'_t = exp(ĩ_t - m_t)   (3)

(1) then holds with f', i' in place of f, i; and the 1 of (2), in the same units, is e^{-m}:

    h_t = C_tᵀ q_t / (max(|n_tᵀ q_t|, e^{-m_t}) + eps)                                                  (4)

With eps = 0, h does not depend on m at all: (C, n, m) and (e^a C, e^a n, m - a) are the same memory.

Glossary
    q, k, v         query, key, value: q_t, k_t (times √d), v_t in [1, eq. 22-24]
    i, f            ĩ_t, f̃_t: gate pre-activations [1, eq. 25-26], one per head
    C, n, m         matrix memory, normaliser state, stabiliser state; together the state
    F               log f_t
    A_tj            exponent of step j's weight at time t: log f_{j+1} + ... + log f_t + ĩ_j

Where implementations differ
    The bound of (2) is 1 in true units, in the paper and here; some codes take max(|n·q|, 1) of the stabilised n, which makes
    h depend on the stabiliser. Published kernels add eps = 1e-6 (stabilised units); the paper has none. Some kernels start at
    m = 0 rather than -∞: that shows in the returned m, and in h only if eps > 0. Some scale q by 1/√d rather than k: that
    shows in the returned C and n only. xLSTM's own gates are capped (15 tanh(x / 15)) before they come here.

References
    [1] M. Beck, K. Pöppel, M. Spanring, A. Auer, O. Prudnikova, M. Kopp, G. Klambauer, J. Brandstetter, S. Hochreiter,
        "xLSTM: Extended Long Short-Term Memory", NeurIPS 2024, section 2.3 and appendix A.3.
    [2] M. Beck, K. Pöppel, P. Lippe, S. Hochreiter, "Tiled Flash Linear Attention", 2025, section 3.
"""

from typing import NamedTuple

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.numerics import constant, finite_or_zero, gate_exponents, log_sigmoid, masked_matmul, sigmoid, sqrt_of
from refimpl.core.options import one_of, positive_int
from refimpl.core.parallel import over_threads
from refimpl.laws import carries_nan, causal, hand_off
from refimpl.op import Cost, Form, Op
from refimpl.ops.gated_rnn.mlstm_bound import bound
from refimpl.ops.gated_rnn.mlstm_cases import hard_inputs
from refimpl.ops.gated_rnn.mlstm_laws import RECALLS, SAME_MEMORY


class State(NamedTuple):
    """The memory between two steps; stands for (C, n)·e^m. Before the first step C = n = 0, m = -∞.

    Attributes
    ----------
    C : ndarray, shape (..., H, d, e)
    n : ndarray, shape (..., H, d)
    m : ndarray, shape (..., H)
    """

    C: np.ndarray
    n: np.ndarray
    m: np.ndarray


def _check(arguments, sizes):
    for name in ("q", "k", "v", "i", "f"):
        if arguments[name].dtype.kind == "c":
            raise TypeError(f"mlstm: {name} must be real, got dtype {arguments[name].dtype}")
    one_of("mlstm", "forget", arguments.get("forget", "exp"), ("sigmoid", "exp"))
    eps = arguments.get("eps", 0)
    if isinstance(eps, bool) or not isinstance(eps, int | float | np.floating) or not 0 <= eps < np.inf:
        raise ValueError(f"mlstm: eps must be a finite number of at least 0, got {eps!r}")


CONTRACT = Contract(
    "mlstm",
    takes="q (..., H?, T, d); k (..., H?, T, d); v (..., H?, T, e); i (..., H?, T); f (..., H?, T);"
    "state.C (..., H?, d, e); state.n (..., H?, d); state.m (..., H?)",
    gives="h (..., H?, T, e)",
    check=_check,
)


@CONTRACT.form
def mlstm(q, k, v, i, f, *, forget="sigmoid", eps=0.0, state=None, return_state=False):
    """mLSTM, equations (1), (3) and (4), one step at a time.

    Parameters
    ----------
    q, k : ndarray, shape (..., H, T, d)
        Queries and keys; keys are divided by √d in here. Without the axis H there is one head.
    v : ndarray, shape (..., H, T, e)
        Values.
    i, f : ndarray, shape (..., H, T)
        Pre-activations of the input gate (i = exp) and of the forget gate.
    forget : {"sigmoid", "exp"}
        Activation of the forget gate.
    eps : float
        Added to the denominator, in stabilised units.
    state : State, optional
        (C, n, m) before the first step; (0, 0, -∞) by default.
    return_state : bool
        Also return the final state.

    Returns
    -------
    h : ndarray, shape (..., H, T, e)
    state : State, only with `return_state`

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, an array is not numeric, `forget` is unknown or `eps` is negative.

    Notes
    -----
    About 5 T d e operations per head, T long; the state is all that is kept. Every exponent is at most 0, so that nothing
    overflows for any gates. The error is at most ``error_bound``; it is large where n·q cancels and e^-m is small.

    Examples
    --------
    Two orthogonal keys; the second query reads what the first step stored:

    >>> import numpy as np
    >>> q, k = np.array([[1.0, 0], [1, 0]]), np.sqrt(2) * np.array([[1.0, 0], [0, 1]])
    >>> mlstm(q, k, np.array([[3.0], [5.0]]), np.zeros(2), np.zeros(2), forget="exp")[:, 0]
    array([3., 3.])
    """
    q, k, v, i, F, C, n, m = _prepare(q, k, v, i, f, forget, state)
    hs = []
    for t in range(q.shape[-2]):
        C, n, m = _step(k[..., t, :], v[..., t, :], i[..., t], F[..., t], C, n, m)
        numerator = (q[..., t, None, :] @ C)[..., 0, :]  # (..., H, e)
        overlap = (n * q[..., t, :]).sum(axis=-1)  # (..., H)
        hs.append(numerator / _denominator(overlap, m, eps)[..., None])
    h = np.stack(hs, axis=-2) if hs else v  # (..., H, T, e)
    return (h, State(C, n, m)) if return_state else h


def _step(k, v, i, F, C, n, m):
    """(1) in the units of (3)."""
    decayed = F + m
    m = np.maximum(decayed, i)  # (..., H)
    f_prime, i_prime = np.exp(decayed - finite_or_zero(m)), np.exp(i - finite_or_zero(m))
    C = f_prime[..., None, None] * C + i_prime[..., None, None] * k[..., :, None] * v[..., None, :]  # (..., H, d, e)
    n = f_prime[..., None] * n + i_prime[..., None] * k  # (..., H, d)
    return C, n, m


@CONTRACT.form
def mlstm_parallel(q, k, v, i, f, *, forget="sigmoid", eps=0.0, state=None, return_state=False):
    """The same as an attention: (1) unrolled is a sum over the past, h_t ~ Σ_j exp(A_tj) (q_t·k_j) v_j.

    m_t is the largest exponent of row t, as in a softmax; the initial state is one more term of the sum, with the exponent
    log f_0 + ... + log f_t + m_{-1}. 2 T² (d + e) operations and T² memory; T deep, since
    decays are added one by one, and log T beyond that.
    """
    q, k, v, i, F, C, n, m = _prepare(q, k, v, i, f, forget, state)
    if q.shape[-2] == 0:
        return (v, State(C, n, m)) if return_state else v
    A = gate_exponents(F, i)  # (..., H, T, T)
    a = np.cumsum(F, axis=-1) + m[..., None]  # the initial state's exponent: (..., H, T)
    m = np.maximum(a, A.max(axis=-1))
    weight, initial = np.exp(A - finite_or_zero(m)[..., None]), np.exp(a - finite_or_zero(m))
    match = weight * np.tril(q @ _transposed(k))  # (..., H, T, T)
    numerator = masked_matmul(match, v, A) + initial[..., None] * (q @ C)  # (..., H, T, e)
    overlap = match.sum(axis=-1) + initial * (q @ n[..., None])[..., 0]  # (..., H, T)
    h = numerator / _denominator(overlap, m, eps)[..., None]
    if not return_state:
        return h
    kept, last = weight[..., -1, :, None] * k, initial[..., -1, None]  # (..., H, T, d), (..., H, 1)
    return h, State(last[..., None] * C + _transposed(kept) @ v, last * n + kept.sum(axis=-2), m[..., -1])


@CONTRACT.form
def mlstm_chunkwise(q, k, v, i, f, *, forget="sigmoid", eps=0.0, state=None, return_state=False, chunk=64):
    """The same in chunks: the parallel form inside a chunk, the state between chunks.

    What a chunk adds to the state is one matrix product, computed for all chunks at once; only the T/chunk states are
    sequential. 2 T (chunk (d + e) + 2 d e) operations, chunk + T/chunk deep: linear in T, and all of it matrix products.
    This is the form of GPU kernels [2]. n is carried as one more column of C, the memory of the value 1.
    """
    positive_int("mlstm", "chunk", chunk)
    q, k, v, i, F, C, n, m = _prepare(q, k, v, i, f, forget, state)
    T, batch, last = q.shape[-2], m.shape, State(C, n, m)
    if T == 0 or m.size == 0:
        return (v, last) if return_state else v
    length = min(chunk, max(T, 1))
    memory = np.concatenate([C, n[..., None]], axis=-1)  # (..., H, d, e + 1)
    heads = [x.reshape(m.size, *x.shape[len(batch) :]) for x in (q, k, v, i, F, memory, m[..., None])]
    done = over_threads(lambda head: _one_head(*(x[head] for x in heads), eps, length), range(m.size), q, k, v)
    h, memory, m = (np.stack(x).reshape(*batch, *x[0].shape) for x in zip(*done, strict=True))
    return (h, State(memory[..., :-1], memory[..., -1], m)) if return_state else h


def _one_head(q, k, v, i, F, memory, m, eps, L):
    """One head, in chunks of L steps: q, k (T, d), v (T, e), i, F (T), memory (d, e + 1), m (1)."""
    T = q.shape[0]
    v1 = np.concatenate([v, np.ones_like(v, shape=(T, 1))], axis=1)
    q, k, v1, F = (_chunks(x, L, 0) for x in (q, k, v1, F))  # (T/L, L, d), (T/L, L, e + 1), (T/L, L)
    i = _chunks(i, L, -np.inf)  # steps after the end write nothing and forget nothing
    A = gate_exponents(F, i)  # within chunks: (T/L, L, L)
    m_local = A.max(axis=-1)  # (T/L, L)
    F_sum = np.cumsum(F, axis=-1)
    write = np.exp(A[:, -1, :] - finite_or_zero(m_local[:, -1:]))  # weights at the chunk's end: (T/L, L)
    added = _transposed(k * write[:, :, None]) @ v1  # (T/L, d, e + 1)

    memories, ms = [], []
    for c in range(len(F)):
        memories.append(memory)
        ms.append(m)
        decayed = F_sum[c, -1:] + m
        m = np.maximum(decayed, m_local[c, -1:])
        memory = np.exp(decayed - finite_or_zero(m)) * memory + np.exp(m_local[c, -1:] - finite_or_zero(m)) * added[c]

    a = F_sum + np.stack(ms)  # exponent of the state from before the chunk: (T/L, L)
    m_t = np.maximum(a, m_local)
    match = np.exp(A - finite_or_zero(m_t)[:, :, None]) * np.tril(q @ _transposed(k))  # (T/L, L, L)
    read = masked_matmul(match, v1, A) + np.exp(a - finite_or_zero(m_t))[:, :, None] * (q @ np.stack(memories))  # (T/L, L, e + 1)
    h = read[..., :-1] / _denominator(read[..., -1], m_t, eps)[..., None]
    return h.reshape(len(h) * L, h.shape[-1])[:T], memory, m[0]


@CONTRACT.gradient
def mlstm_vjp(dy, q, k, v, i, f, *, forget="sigmoid", eps=0.0, state=None, dstate=None):
    """Gradient of `mlstm`: (4), (1) and (3) transposed, last step first.

    With D the denominator of (4), s = n·q, and dC, dn, dm the cotangents of the state after step t:

        (4)  dq = C dh / D,  dC += q dhᵀ / D,  dD = -dh·h / D
             if |s| >= e^-m:  dq += sign(s) dD n,  dn += sign(s) dD q;       else:  dm -= e^-m dD
        (1)  dk = i' (dC v + dn),  dv = i' dCᵀk;    df' = <dC, C_{t-1}> + dn·n_{t-1},  di' = (dC v + dn)·k
             dC_{t-1} = f' dC,  dn_{t-1} = f' dn
        (3)  d(log f + m_{t-1}) = f' df',  dĩ = i' di',  dm -= f' df' + i' di';  then dm goes to the larger argument of the max

    So the gradient passes through the stabiliser, as it must: with eps = 0 and no cotangent of the final state all that
    arrives at m cancels, and the gradient with respect to state.m is what a change of scale of (C, n) is worth.

    Ties: |n·q| = e^-m counts as |n·q|; log f + m_{t-1} = ĩ sends dm to the left; d|s|/ds = 0 at s = 0.

    Parameters
    ----------
    dy : ndarray, shape (..., H, T, e)
        Cotangent of h.
    dstate : State, optional
        Cotangent (dC, dn, dm) of the final state.

    Returns
    -------
    dict
        "q", "k", "v", "i", "f", and "state" (a State) where one was given.

    Notes
    -----
    Keeps all T states: T d e elements a head. 16 T d e operations or so.
    """
    scale = sqrt_of(q.shape[-1], q)
    pre_activation = f
    q, k, v, i, F, C, n, m = _prepare(q, k, v, i, f, forget, state)
    states = [State(C, n, m)]
    for t in range(q.shape[-2]):
        states.append(State(*_step(k[..., t, :], v[..., t, :], i[..., t], F[..., t], *states[-1])))
    dC, dn, dm = (np.zeros_like(x) for x in (C, n, m)) if dstate is None else dstate
    gradients = {name: [] for name in ("q", "k", "v", "i", "f")}
    for t in reversed(range(q.shape[-2])):
        (C, n, m), before = states[t + 1], states[t]
        q_t, k_t, v_t = q[..., t, :], k[..., t, :], v[..., t, :]
        overlap = (n * q_t).sum(axis=-1)
        D = _denominator(overlap, m, eps)  # (..., H)
        h = (q_t[..., None, :] @ C)[..., 0, :] / D[..., None]  # (..., H, e)
        dh = dy[..., t, :]
        dD = -(h * dh).sum(axis=-1) / D
        enough = abs(overlap) >= _lower_bound(m)
        ds = np.where(enough, np.sign(overlap) * dD, 0)  # (..., H)
        dq = (C @ dh[..., None])[..., 0] / D[..., None] + ds[..., None] * n  # (..., H, d)
        q_D = q_t / D[..., None]  # first: q = 0 makes D the least number that there is
        dC, dn = dC + q_D[..., :, None] * dh[..., None, :], dn + ds[..., None] * q_t
        dm = dm + np.where(enough, 0, (h * dh).sum(axis=-1) / (1 + constant(eps, q) / _lower_bound(m)))

        decayed = F[..., t] + before.m
        f_prime, i_prime = np.exp(decayed - finite_or_zero(m)), np.exp(i[..., t] - finite_or_zero(m))
        dk = (dC @ v_t[..., None])[..., 0] + dn
        dv = (k_t[..., None, :] @ dC)[..., 0, :]
        d_decayed = f_prime * ((dC * before.C).sum(axis=(-2, -1)) + (dn * before.n).sum(axis=-1))
        d_input = i_prime * (dk * k_t).sum(axis=-1)
        dm = dm - d_decayed - d_input
        to_left = decayed >= i[..., t]
        d_decayed, d_input = d_decayed + np.where(to_left, dm, 0), d_input + np.where(to_left, 0, dm)
        dC, dn, dm = f_prime[..., None, None] * dC, f_prime[..., None] * dn, d_decayed
        d_forget = d_decayed * sigmoid(-pre_activation[..., t]) if forget == "sigmoid" else d_decayed
        step = (dq, i_prime[..., None] * dk / scale, i_prime[..., None] * dv, d_input, d_forget)
        for name, value in zip(gradients, step, strict=True):
            gradients[name].append(value)
    empty = {"q": q, "k": k, "v": v, "i": i, "f": F}
    axis = {"i": -1, "f": -1}
    stacked = {name: np.stack(x[::-1], axis=axis.get(name, -2)) if x else empty[name] for name, x in gradients.items()}
    return stacked | {"state": State(dC, dn, dm)}


@CONTRACT.form
def error_bound(q, k, v, i, f, *, unit, store=0.0, forget="sigmoid", eps=0.0, state=None, return_state=False):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`: derived in `mlstm_bound`.

    A weight's relative error is that of its exponent, hence grows with |log f| and |ĩ|; h loses digits where n·q cancels
    while e^-m is small.
    """
    prepared = _prepare(q, k, v, i, f, forget, state)
    if q.shape[-2] == 0:
        E, errors = np.zeros_like(prepared[2]), map(np.zeros_like, prepared[-3:])
    else:
        h = mlstm_parallel(q, k, v, i, f, forget=forget, eps=eps, state=state)
        E, errors = bound(*prepared, h, _lower_bound, eps=eps, unit=unit, store=store)
    return (E, State(*errors)) if return_state else E


# -- what the forms share --------------------------------------------------------------------------------------------


def _prepare(q, k, v, i, f, forget, state):
    """Keys scaled, the forget gate as a logarithm, a state; batch axes of one shape."""
    F = log_sigmoid(f) if forget == "sigmoid" else f
    k = k / sqrt_of(k.shape[-1], k)
    arrays = {2: [q, k, v], 1: [i, F]}  # by the number of axes after the heads
    if state is not None:
        arrays = {2: [q, k, v, state[0]], 1: [i, F, state[1]], 0: [state[2]]}
    batch = np.broadcast_shapes(*(x.shape[: x.ndim - own] for own, xs in arrays.items() for x in xs))
    if state is None:
        zeros = np.zeros_like(k, shape=(*batch, k.shape[-1], v.shape[-1] + 1))
        state = zeros[..., :-1], zeros[..., -1], np.full_like(k, -np.inf, shape=batch)
        arrays = {2: [*arrays[2], state[0]], 1: [*arrays[1], state[1]], 0: [state[2]]}
    (q, k, v, C), (i, F, n), (m,) = ([np.broadcast_to(x, (*batch, *x.shape[x.ndim - own :])) for x in xs] for own, xs in arrays.items())
    return q, k, v, i, F, C, n, m


def _lower_bound(m):
    """e^-m, the 1 of (2) in stabilised units; in floating point never 0, or a query of zeros would give 0/0."""
    if m.dtype.kind == "O":
        return np.exp(-m)
    with np.errstate(over="ignore"):
        return np.exp(-np.minimum(m, -np.log(np.finfo(m.dtype).tiny)))


def _denominator(overlap, m, eps):
    """That of (4)."""
    return np.maximum(abs(overlap), _lower_bound(m)) + constant(eps, m)


def _chunks(x, length, fill):
    """(T, ...) as (T/length, length, ...), the end filled up."""
    pad = np.full_like(x, fill, shape=(-len(x) % length, *x.shape[1:]))
    return np.concatenate([x, pad]).reshape(-(-len(x) // length), length, *x.shape[1:])


def _transposed(x):
    return np.swapaxes(x, -1, -2)


def _sample(rng, *, H=2, T=7, d=4, e=3, batch=()):
    heads = (*batch, H)
    return {
        "q": rng.standard_normal((*heads, T, d)),
        "k": rng.standard_normal((*heads, T, d)),
        "v": rng.standard_normal((*heads, T, e)),
        "i": rng.standard_normal((*heads, T)),
        "f": 0.5 + 0.7 * rng.standard_normal((*heads, T)),
        "state": State(rng.standard_normal((*heads, d, e)) / 2, rng.standard_normal((*heads, d)) / 2, rng.uniform(-1, 1, heads)),
    }


def _cost(work, depth, peak):
    return lambda T, d, e, H=1, batch=1, chunk=64, **_: Cost(
        work(T, d, e, min(chunk, max(T, 1))) * H * batch,
        depth(T, d, e, min(chunk, max(T, 1))),
        peak(T, d, e, min(chunk, max(T, 1))) * H * batch,
    )


OPS = (
    Op(
        name="mlstm",
        summary="matrix memory with exponential gates, (C, n) <- f (C, n) + i k (v, 1)ᵀ, h = Cᵀq / max(|n·q|, 1)",
        contract=CONTRACT,
        forms={
            "recurrent": Form(
                mlstm,
                _cost(
                    lambda T, d, e, c: T * (5 * d * e + 7 * d + e + 13),
                    lambda T, d, e, c: 2 * T + log2_ceil(d) + 11,
                    lambda T, d, e, c: 4.5 * d * e + T * (e + 3),
                ),
                exact=("work", "depth"),
            ),
            "parallel": Form(
                mlstm_parallel,
                _cost(
                    lambda T, d, e, c: T * T * (2 * d + 2 * e + 6) + T * (2 * d * e + 3 * d + 3 * e + 13) - 1,
                    lambda T, d, e, c: T + 2 * log2_ceil(T) + 11,
                    lambda T, d, e, c: 3 * T * T + T * (d + 3 * e + 4) + d * (e + 1),
                ),
                exact=("work", "depth"),
            ),
            "chunkwise": Form(
                mlstm_chunkwise,
                _cost(
                    lambda T, d, e, c: T * (c * (2 * d + 2 * e + 7) + 4 * d * e + 6 * d + 3 * e + 16) + (T / c) * (3 * d * e + 3 * d + 5),
                    lambda T, d, e, c: c + 2 * T / c + 2 * log2_ceil(c) + log2_ceil(d) + 11,
                    lambda T, d, e, c: 3 * T * c + 2 * (T / c) * d * e + T * (d + 3 * e),
                ),
            ),
        },
        gradient=mlstm_vjp,
        sample=_sample,
        options={"forget": ("sigmoid", "exp"), "eps": (0.0, 0.25)},
        hard=hard_inputs(_sample),
        error_bound=error_bound,
        references=("beck2024, equations 19-27, appendix A.3", "beck2025, section 3"),
        sizes=({"d": 1, "e": 1}, {"d": 5, "e": 5}, {"d": 16, "e": 8}, {"H": 1}, {"H": 3, "batch": (2,)}, {"batch": (2, 2)}),
        laws=(causal(CONTRACT, "q", "k", "v", "i", "f"), hand_off(CONTRACT), SAME_MEMORY, RECALLS, carries_nan(CONTRACT, "v")),
    ),
)
