"""WKV of RWKV-7: a memory that forgets by key, not only by channel; the delta rule with its two halves set free.

    S_t = diag(e^{w_t}) S_{t-1} + b_t (a_tᵀ S_{t-1}) + k_t v_tᵀ                                          (1)
    o_t = S_tᵀ r_t                                                                                     (2)

a_tᵀ S is what the memory holds under the key a_t, and b_t says what to do with it: with a = -κ, b = β κ and k = β κ, (1) is the
delta rule without decay, S - β κ (κᵀS - vᵀ). RWKV-7 takes b = κ ∘ η, a learning rate per channel, and a key k of its own, so
that what is removed and what is written need not match. The transition diag(e^w) + b aᵀ is not diagonal any more; products
of T of them track states that no diagonal recurrence can [1, section 3]. Both terms read S_{t-1} as it was, before its decay.

Let p_t = S_{t-1}ᵀ a_t be what is read. Unrolled, (1) is a sum over the past of all that was written, and p itself, which
follows from the p before it, solves a triangular system; with e^{[j,t)} the decays of the steps after j and before t,

    p_t = Sᵀ(a_t ∘ e^{[-1,t)}) + Σ_{j<t} (a_t·e^{[j,t)} b_j) p_j + (a_t·e^{[j,t)} k_j) v_j                              (3)
    o_t = Sᵀ(r_t ∘ e^{[-1,t]}) + Σ_{j<=t} (r_t·e^{[j,t]} b_j) p_j + (r_t·e^{[j,t]} k_j) v_j                             (4)

Glossary
    r, k, v     receptance, (replacement) key, value      r_t, k̃_t, v_t in [1, eq. 13-17]
    w           log-decay of a step, w <= 0               log of [1]'s w_t, which lies in (0.54, 1)
    a, b        what is read, and where it is added       -κ̂_t and κ̂_t ∘ a_t in [1, eq. 17]: [1]'s a_t is η above, not this a
    S           memory, rows follow keys                  wkv_tᵀ in [1, eq. 17]

Where implementations differ
    [1] writes Sᵀ, rows following values, with the transition on the right: v kᵀ + Sᵀ (diag(w) - κ̂ (κ̂ ∘ η)ᵀ) with the decay as a
    factor. The author's CUDA kernels take d with e^w = exp(-exp(d)); fla takes the log-decay, and the arguments in this order.
    As a DPLR recurrence, fla scales r by 1/√d unless told otherwise. `wkv` (RWKV-4) takes the decay itself, -w.

References
    [1] B. Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", 2025, sections 3 and 4.1, appendix G.
    [2] S. Yang, B. Wang, Y. Zhang, Y. Shen, Y. Kim, "Parallelizing Linear Transformers with the Delta Rule over Sequence
        Length", NeurIPS 2024, section 3.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.linalg import solve_unit_lower
from refimpl.core.numerics import masked_matmul, times_exp
from refimpl.core.options import positive_int
from refimpl.laws import causal, hand_off, linear
from refimpl.op import Cost, Form, Law, Op
from refimpl.ops.linear_attention.channel_decay import aligned, chunks, fading, hidden, kept, matched
from refimpl.ops.linear_attention.wkv7_bound import bound


def _check(arguments, sizes):
    for name in ("r", "w", "k", "v", "a", "b"):
        if arguments[name].dtype.kind == "c":
            raise TypeError(f"wkv7: {name} must be real, got dtype {arguments[name].dtype}")


CONTRACT = Contract(
    "wkv7",
    takes="r (..., H?, T, d); w (..., H?, T, d); k (..., H?, T, d); v (..., H?, T, e); a (..., H?, T, d); b (..., H?, T, d);"
    "state (..., H?, d, e)",
    gives="o (..., H?, T, e)",
    check=_check,
)


@CONTRACT.form
def wkv7(r, w, k, v, a, b, *, state=None, return_state=False):
    """WKV of RWKV-7, equations (1) and (2), one step at a time.

    Parameters
    ----------
    r : ndarray, shape (..., H, T, d)
        Receptances: what the memory is read with. Without the axis H there is one head, and so for the other arguments.
    w : ndarray, shape (..., H, T, d)
        Log-decay of each key channel, as a rule negative.
    k : ndarray, shape (..., H, T, d)
        Keys under which values are written.
    v : ndarray, shape (..., H, T, e)
        Values.
    a, b : ndarray, shape (..., H, T, d)
        What is read from the memory before the step, and the key under which it is added: -κ and κ∘η in RWKV-7.
    state : ndarray, shape (..., H, d, e), optional
        S before the first step; zeros by default.
    return_state : bool
        Also return the final S.

    Returns
    -------
    o : ndarray, shape (..., H, T, e)
    state : ndarray, shape (..., H, d, e), only with `return_state`

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit or an array is not real.

    Warnings
    --------
    w is a log-decay. `wkv` (RWKV-4) takes the decay itself, which is -w. The order of the arguments is r, w, k, v, a, b.

    Notes
    -----
    About 9 T d e operations a head, T long; S is all that is kept. The error is at most ``error_bound``. Nothing keeps a and b
    from making S grow without end: |e^w + b·a| <= 1 or so is for the caller to see to.

    Examples
    --------
    Reading with -κ and adding under κ empties the memory under that key, so that 5 replaces 3:

    >>> import numpy as np
    >>> key, v = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[3.0], [5.0]])
    >>> wkv7(key, 0 * key, key, v, -key, key)[:, 0]
    array([3., 5.])
    """
    r, w, v, k, a, b, S = aligned(state, r, w, v, k, a, b)
    outputs = []
    for t in range(r.shape[-2]):
        S = _step(S, w[..., t, :], k[..., t, :], v[..., t, :], a[..., t, :], b[..., t, :])
        outputs.append((r[..., t, None, :] @ S)[..., 0, :])  # (..., H, e)
    o = np.stack(outputs, axis=-2) if outputs else v  # (..., H, T, e)
    return (o, S) if return_state else o


def _step(S, w, k, v, a, b):
    """(1)."""
    p = (a[..., None, :] @ S)[..., 0, :]  # (..., H, e)
    return np.exp(w)[..., None] * S + b[..., :, None] * p[..., None, :] + k[..., :, None] * v[..., None, :]


@CONTRACT.form
def wkv7_chunkwise(r, w, k, v, a, b, *, state=None, return_state=False, chunk=32):
    """The same in chunks: the triangular system (3) and the attention (4) inside a chunk, the memory between chunks.

    The right side of (3) holds the memory that enters the chunk, which is not known yet; but p is affine in it, P = P̂ + W S,
    with P̂ and W solved for all chunks at once [2]. T/chunk products remain sequential. A chunk takes four matrices of weights, of
    chunk² d exponentials: T (chunk (30 d + 7 e) + 8 d e) operations or so, chunk + T/chunk deep.
    """
    positive_int("wkv7", "chunk", chunk)
    r, w, v, k, a, b, S = aligned(state, r, w, v, k, a, b)
    T, e = v.shape[-2:]
    if T == 0:
        return (v, S) if return_state else v
    r, w, k, v, a, b = (chunks(x, min(chunk, max(T, 1))) for x in (r, w, k, v, a, b))  # (..., H, T/L, L, d or e)
    A, since, peak = fading(w)
    before, after = A[..., :-1, :], A[..., 1:, :]
    of_k = matched(a, k, before, own=False)
    right = np.concatenate([masked_matmul(of_k, v, hidden(of_k, own=False)), a * since[..., :-1, :]], axis=-1)
    solved = solve_unit_lower(-matched(a, b, before, own=False), right)  # (..., H, T/L, L, e + d)
    written, through = solved[..., :e], solved[..., e:]  # P̂, W
    from_k, from_b = (np.swapaxes(kept(x, A), -1, -2) for x in (k, b))  # (..., H, T/L, d, L)
    entering, ps = [], []
    for c in range(r.shape[-3]):
        entering.append(times_exp(S, peak[..., c, :, None]))
        ps.append(written[..., c, :, :] + through[..., c, :, :] @ entering[-1])
        S = since[..., c, -1, :, None] * entering[-1] + from_b[..., c, :, :] @ ps[-1] + from_k[..., c, :, :] @ v[..., c, :, :]
    p = np.stack(ps, axis=-3)  # (..., H, T/L, L, e)
    of_k, of_b = matched(r, k, after, own=True), matched(r, b, after, own=True)
    seen = hidden(of_k, own=True)
    read = masked_matmul(of_k, v, seen) + masked_matmul(of_b, p, seen) + (r * since[..., 1:, :]) @ np.stack(entering, axis=-3)
    o = read.reshape(*read.shape[:-3], -1, e)[..., :T, :]
    return (o, S) if return_state else o


@CONTRACT.gradient
def wkv7_vjp(dy, r, w, k, v, a, b, *, state=None, dstate=None):
    """Gradient of `wkv7`: (2) and (1) transposed, last step first.

    With dS the cotangent of S_t, S the memory before step t, and p = Sᵀ a:

        (2)  dr = S_t do,    dS += r doᵀ
        (1)  dk = dS v,    dv = dSᵀ k,    db = dS p,    dp = dSᵀ b,    da = S dp,    dw = Σ_e e^w (dS ∘ S)
             dS_{t-1} = e^w dS + a dpᵀ

    The adjoint is a recurrence of the same kind, with a and b exchanged.

    Parameters
    ----------
    dy : ndarray, shape (..., H, T, e)
        Cotangent of o.
    dstate : ndarray, shape (..., H, d, e), optional
        Cotangent of the final S.

    Returns
    -------
    dict
        "r", "w", "k", "v", "a", "b", and "state" where one was given.

    Notes
    -----
    Keeps all T states, T d e elements a head. 22 T d e operations or so.
    """
    r, w, v, k, a, b, S = aligned(state, r, w, v, k, a, b)
    T, states = r.shape[-2], [S]
    for t in range(T):
        states.append(_step(states[-1], w[..., t, :], k[..., t, :], v[..., t, :], a[..., t, :], b[..., t, :]))
    dS = np.zeros_like(S) if dstate is None else dstate
    steps = []
    for t in reversed(range(T)):
        a_t, S, do = a[..., t, :], states[t], dy[..., t, :]
        dr = (states[t + 1] @ do[..., None])[..., 0]
        dS = dS + r[..., t, :, None] * do[..., None, :]
        p = (a_t[..., None, :] @ S)[..., 0, :]  # (..., H, e)
        dk, db = (dS @ v[..., t, :, None])[..., 0], (dS @ p[..., None])[..., 0]  # (..., H, d)
        dv, dp = (k[..., t, None, :] @ dS)[..., 0, :], (b[..., t, None, :] @ dS)[..., 0, :]  # (..., H, e)
        da = (S @ dp[..., None])[..., 0]
        dS = np.exp(w[..., t, :, None]) * dS
        dw = (dS * S).sum(axis=-1)
        dS = dS + a_t[..., :, None] * dp[..., None, :]
        steps.append((dr, dw, dk, dv, da, db))
    stacked = (np.stack(x, axis=-2) for x in zip(*steps[::-1], strict=True)) if steps else (r, w, k, v, a, b)
    return dict(zip("rwkvab", stacked, strict=True)) | {"state": dS}


@CONTRACT.form
def error_bound(r, w, k, v, a, b, *, unit, store=0.0, state=None, return_state=False):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`: derived in `wkv7_bound`.

    What a step does wrong is carried on by the transitions themselves, not by their absolute values, under which even a memory
    that is emptied at every step would seem to grow.
    """
    r, w, v, k, a, b, S = aligned(state, r, w, v, k, a, b)
    E, error = bound(r, w, k, v, a, b, S, unit=unit, store=store)
    return (E if v.shape[-2] else v, error) if return_state else (E if v.shape[-2] else v)


# -- laws and the catalogue -----------------------------------------------------------------------------------------------


def _reads_nothing(f, call, bound, rng):
    """Where nothing is read (a = 0) it does not matter where it would be added, and the other way round."""
    call = {**call, "return_state": False}
    no_a, no_b = {**call, "a": 0 * call["a"]}, {**call, "b": 0 * call["b"]}
    yield "o with a = 0, and with b = 0", f(**no_a), f(**no_b), 2 * bound(**no_a)


def _overwrites(f, call, bound, rng):
    """With a = -κ, b = k = κ, no decay: orthonormal keys recall what was written last under them, and nothing else."""
    like, d, e = call["r"], call["r"].shape[-1], call["v"].shape[-1]
    basis = np.linalg.qr(rng.standard_normal((d, d)))[0][None].astype(like.dtype)
    first, second = (rng.standard_normal((1, d, e)).astype(like.dtype) for _ in range(2))
    half, nothing = d // 2, np.zeros_like(basis)
    keys = np.concatenate([basis, basis[:, :half], nothing], axis=-2)
    values = np.concatenate([first, second[:, :half], 0 * first], axis=-2)
    written = np.concatenate([second[:, :half], first[:, half:]], axis=-2)
    reads = np.concatenate([0 * keys[:, : d + half], basis], axis=-2)
    call = {"r": reads, "w": 0 * keys, "k": keys, "v": values, "a": -keys, "b": keys}
    if like.dtype.itemsize < 4:
        return  # rounded keys are not orthonormal
    rounded = 8 * np.finfo(like.dtype).eps * d * (abs(first) + abs(second)).max()
    yield "what orthonormal keys recall", f(**call)[..., -d:, :], written, 2 * bound(**call)[..., -d:, :] + rounded


def _sample(rng, *, H=2, T=7, d=4, e=3, batch=()):
    """a and b as in RWKV-7: -κ and κ∘η with keys κ of length 0.7 to 1.1 and rates η of 0.2 to 1.1."""
    heads = (*batch, H)
    key = rng.standard_normal((*heads, T, d))
    key = key / np.sqrt((key * key).sum(axis=-1, keepdims=True)) * rng.uniform(0.7, 1.1, (*heads, T, 1))
    return {
        "r": rng.standard_normal((*heads, T, d)),
        "w": -rng.uniform(0.05, 0.8, (*heads, T, d)),
        "k": rng.standard_normal((*heads, T, d)),
        "v": rng.standard_normal((*heads, T, e)),
        "a": -key,
        "b": key * rng.uniform(0.2, 1.1, (*heads, T, d)),
        "state": rng.standard_normal((*heads, d, e)),
    }


def _with(**changes):
    """A hard call: the sample, with some arrays replaced, or left out (None)."""

    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        call |= {name: change(rng, call[name]) for name, change in changes.items()}
        return {name: x for name, x in call.items() if x is not None}

    return draw


def _same_key(rate):
    """One key of length 1 at every step, read and taken away `rate` times: 1 empties the memory under it, 2 reflects it."""

    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        key = call["a"][..., :1, :] + 0 * call["a"] if call["a"].shape[-2] else call["a"]
        key = key / np.sqrt((key * key).sum(axis=-1, keepdims=True))
        return call | {"a": -key, "b": rate * key, "w": 0 * call["w"]}

    return draw


def _rows_of_zeros(rng, x):
    return x * (rng.random((*x.shape[:-1], 1)) < 0.5)


def _chunked(T, d, e, L, times):
    chunks = T / L
    return Cost(
        (T * (L * (30 * d + 7 * e) + 8 * d * e + 17 * d + 2 * e) + 5 * chunks * d * e) * times,
        3 * L + max(log2_ceil(L), d - log2_ceil(L)) + chunks * (7 + log2_ceil(d) + log2_ceil(L)),
        (2 * T * L * d + 8 * T * (d + e) + 2 * (chunks + 1) * d * e) * times,
    )


_cost = {
    "recurrent": lambda T, d, e, H=1, batch=1, **_: Cost(
        T * (9 * d * e + d) * H * batch, T * (4 + log2_ceil(d)) + log2_ceil(d) + 1, (4 * d * e + T * (e + 1)) * H * batch
    ),
    "chunkwise": lambda T, d, e, H=1, batch=1, chunk=32, **_: _chunked(T, d, e, min(chunk, max(T, 1)), H * batch),
}

OPS = (
    Op(
        name="wkv7",
        summary="RWKV-7: S <- e^w S + b (aᵀ S) + k vᵀ, o = Sᵀ r: a delta rule whose two halves are free",
        contract=CONTRACT,
        forms={"recurrent": Form(wkv7, _cost["recurrent"], exact=("work", "depth")), "chunkwise": Form(wkv7_chunkwise, _cost["chunkwise"])},
        gradient=wkv7_vjp,
        sample=_sample,
        hard={
            "decays of 0": _with(w=lambda rng, w: np.where(rng.random(w.shape) < 0.3, -1e3, w)),
            "no decay": _with(w=lambda rng, w: 0 * w),
            "one key over and over": _same_key(1.0),
            "reflections": _same_key(2.0),
            "rows of zeros": _with(r=_rows_of_zeros, k=_rows_of_zeros, a=_rows_of_zeros, b=_rows_of_zeros),
            "large a, small b": _with(a=lambda rng, a: a * 2.0**20, b=lambda rng, b: b * 2.0**-20),
            "values that cancel": _with(v=lambda rng, v: v + np.where(np.arange(v.shape[-2]) % 2, -1e3, 1e3)[:, None]),
            "no initial state": _with(state=lambda rng, S: None),
        },
        error_bound=error_bound,
        bound_work=lambda T, H, d, e, batch=1: batch * T * H * e * 4 * d**3,
        references=("peng2025, sections 3 and 4.1, equation 17", "yang2024delta, section 3"),
        sizes=({"d": 1, "e": 1}, {"H": 1, "d": 5, "e": 5}, {"d": 16, "e": 8}, {"H": 3, "batch": (2,)}),
        laws=(
            causal(CONTRACT, "r", "w", "k", "v", "a", "b"),
            hand_off(CONTRACT),
            linear(CONTRACT, "v", "state"),
            Law("reads_nothing", _reads_nothing, ("a", "b")),
            Law("overwrites", _overwrites, ("a", "b", "k")),
        ),
    ),
)
