"""WKV of RWKV-6: a linear attention whose decay depends on the data, and where the current step has a bonus of its own.

    o_t = (S_{t-1} + (u ∘ k_t) v_tᵀ)ᵀ r_t                                                               (1)
    S_t = diag(e^{w_t}) S_{t-1} + k_t v_tᵀ                                                              (2)

The memory S is a matrix per head, as in `linear_attention`: values stored under keys, read by r, the receptance. Two things
are RWKV's own. The output is read before the memory is touched: w_t acts on what comes after step t, not on o_t. And so
that a step sees itself all the same, (1) adds its own pair, with each key channel weighted by the bonus u, which is
a parameter of the head. With u = 1 a step counts as the linear attention would have it, but for the decay of its past.

Unrolled, with F_t = w_0 + ... + w_{t-1}, (1) is an attention:

    o_t = Σ_{j<t} (Σ_i r_ti k_ji e^{F_ti - F_{j+1,i}}) v_j + (Σ_i r_ti u_i k_ti) v_t + Sᵀ (r_t ∘ e^{F_t})              (3)

Glossary
    r, k, v     receptance, key, value      r_t, k_t, v_t in [1, eq. 16-19]
    w           log-decay of a step, w <= 0; [1]'s w_t is e^w here: its eq. 14-15 make it as exp(-exp(d_t)), pass -exp(d_t)
    u           bonus of the current step   u in [1, eq. 19]
    S           memory, rows follow keys    S_{t-1} = wkv' of [1, eq. 19]

Where implementations differ
    w is a log-decay here and in fla; the author's CUDA kernel takes d, and exponentiates twice. `wkv` (RWKV-4) takes the decay
    itself, -w. fla scales r by 1/√d unless told otherwise; RWKV-6 does not, and neither does this. Some codes keep Sᵀ.

References
    [1] B. Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", COLM 2024, section 4.2.2.
    [2] S. Yang, B. Wang, Y. Shen, R. Panda, Y. Kim, "Gated Linear Attention Transformers with Hardware-Efficient Training",
        ICML 2024, section 4.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.numerics import masked_matmul, times_exp
from refimpl.core.options import positive_int
from refimpl.laws import causal, hand_off, linear
from refimpl.op import Cost, Form, Law, Op
from refimpl.ops.linear_attention.channel_decay import aligned, chunks, fading, hidden, kept, matched


def _check(arguments, sizes):
    for name in ("r", "k", "v", "w", "u"):
        if arguments[name].dtype.kind == "c":
            raise TypeError(f"wkv6: {name} must be real, got dtype {arguments[name].dtype}")


CONTRACT = Contract(
    "wkv6",
    takes="r (..., H?, T, d); k (..., H?, T, d); v (..., H?, T, e); w (..., H?, T, d); u (H?, d); state (..., H?, d, e)",
    gives="o (..., H?, T, e)",
    check=_check,
)


@CONTRACT.form
def wkv6(r, k, v, w, u, *, state=None, return_state=False):
    """WKV of RWKV-6, equations (1) and (2), one step at a time.

    Parameters
    ----------
    r, k : ndarray, shape (..., H, T, d)
        Receptances and keys. Without the axis H there is one head, and so for the other arguments.
    v : ndarray, shape (..., H, T, e)
        Values.
    w : ndarray, shape (..., H, T, d)
        Log-decay of each key channel, as a rule negative; e^w is left of what steps before t wrote when t is over.
    u : ndarray, shape (H, d)
        Bonus of the current step.
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
    w is a log-decay. `wkv` (RWKV-4) takes the decay itself, which is -w.

    Notes
    -----
    About 5 T d e operations a head, T long; S is all that is kept. The error is at most ``error_bound``.

    Examples
    --------
    A step counts u times for itself, in full for the next, and half for the one after:

    >>> import numpy as np
    >>> one, v = np.ones((3, 1)), np.array([[1.0], [0.0], [0.0]])
    >>> wkv6(one, one, v, np.log(one / 2), np.array([5.0]))[:, 0]
    array([5. , 1. , 0.5])
    """
    r, k, v, w, S = aligned(state, r, k, v, w)
    outputs = []
    for t in range(r.shape[-2]):
        r_t, k_t, v_t = r[..., t, :], k[..., t, :], v[..., t, :]  # (..., H, d), (..., H, d), (..., H, e)
        own = (r_t * u * k_t).sum(axis=-1)  # (..., H)
        outputs.append((r_t[..., None, :] @ S)[..., 0, :] + own[..., None] * v_t)
        S = np.exp(w[..., t, :, None]) * S + k_t[..., :, None] * v_t[..., None, :]  # (..., H, d, e)
    o = np.stack(outputs, axis=-2) if outputs else v  # (..., H, T, e)
    return (o, S) if return_state else o


@CONTRACT.form
def wkv6_chunkwise(r, k, v, w, u, *, state=None, return_state=False, chunk=32):
    """The same in chunks: the attention (3) inside a chunk, the memory between chunks.

    What a chunk adds to S is one product, for all chunks at once; only T/chunk steps are sequential. Decays per channel
    do not come out of the product r·k, so that a chunk takes chunk² d exponentials: 2 T (chunk (4 d + e) + 2 d e) operations,
    chunk + T/chunk deep. Kernels split the exponent in two factors [2], which bounds how far a decay may go.
    """
    positive_int("wkv6", "chunk", chunk)
    r, k, v, w, S = aligned(state, r, k, v, w)
    T, e = v.shape[-2:]
    if v.shape[-2] == 0:
        return (v, S) if return_state else v
    L = min(chunk, max(T, 1))
    own = (r * u[:, None, :] * k).sum(axis=-1, keepdims=True)  # (..., H, T, 1)
    r, k, values, w = (chunks(x, L) for x in (r, k, v, w))  # (..., H, T/L, L, d or e)
    A, since, peak = fading(w)
    added = np.swapaxes(kept(k, A), -1, -2) @ values  # (..., H, T/L, d, e)
    entering = []
    for c in range(r.shape[-3]):
        entering.append(times_exp(S, peak[..., c, :, None]))
        S = since[..., c, -1, :, None] * entering[-1] + added[..., c, :, :]
    match = matched(r, k, A[..., :-1, :], own=False)  # (..., H, T/L, L, L)
    read = masked_matmul(match, values, hidden(match, own=False)) + (r * since[..., :-1, :]) @ np.stack(entering, axis=-3)
    o = read.reshape(*read.shape[:-3], -1, e)[..., :T, :] + own * v
    return (o, S) if return_state else o


@CONTRACT.gradient
def wkv6_vjp(dy, r, k, v, w, u, *, state=None, dstate=None):
    """Gradient of `wkv6`: (2) and (1) transposed, last step first.

    With dS the cotangent of S_t, and c = v_t·do:

        (2)  dk = dS v,    dv = dSᵀ k,    dw = Σ_e e^w (dS ∘ S_{t-1}),    dS_{t-1} = e^w dS
        (1)  dr = S_{t-1} do + c u∘k,    dk += c u∘r,    dv += (r·(u∘k)) do,    du = Σ_t c r∘k,    dS_{t-1} += r doᵀ

    Parameters
    ----------
    dy : ndarray, shape (..., H, T, e)
        Cotangent of o.
    dstate : ndarray, shape (..., H, d, e), optional
        Cotangent of the final S.

    Returns
    -------
    dict
        "r", "k", "v", "w", "u", and "state" where one was given.

    Notes
    -----
    Keeps all T states, T d e elements a head. 16 T d e operations or so.
    """
    r, k, v, w, S = aligned(state, r, k, v, w)
    T, before = r.shape[-2], [S]
    for t in range(T - 1):
        before.append(np.exp(w[..., t, :, None]) * before[-1] + k[..., t, :, None] * v[..., t, None, :])
    dS = np.zeros_like(S) if dstate is None else dstate
    du = np.zeros_like(r, shape=(*r.shape[:-2], r.shape[-1]))  # (..., H, d)
    steps = []
    for t in reversed(range(T)):
        r_t, k_t, v_t, do, S = r[..., t, :], k[..., t, :], v[..., t, :], dy[..., t, :], before[t]
        decay = np.exp(w[..., t, :, None])
        dk, dv = (dS @ v_t[..., None])[..., 0], (k_t[..., None, :] @ dS)[..., 0, :]
        dw = (decay * dS * S).sum(axis=-1)
        c = (v_t * do).sum(axis=-1, keepdims=True)  # (..., H, 1)
        dr = (S @ do[..., None])[..., 0] + c * u * k_t
        dk, dv = dk + c * u * r_t, dv + (r_t * u * k_t).sum(axis=-1, keepdims=True) * do
        du = du + c * r_t * k_t
        dS = decay * dS + r_t[..., :, None] * do[..., None, :]
        steps.append((dr, dk, dv, dw))
    stacked = (np.stack(x, axis=-2) for x in zip(*steps[::-1], strict=True)) if steps else (r, k, v, w)
    return dict(zip("rkvw", stacked, strict=True)) | {"u": du, "state": dS}


@CONTRACT.form
def error_bound(r, k, v, w, u, *, unit, store=0.0, state=None, return_state=False):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`.

    Everything is a sum of products, so absolute values bound it: with H the memory of absolute values, and F the running sum of
    log-decays, whose differences a form may exponentiate,

        E_t = e^{w_t} E_{t-1} + ε_t e^{w_t} H_{t-1} + (4 u + 8 v) |k_t| |v_t|ᵀ + (u + v/64) H_t,    ε_t = u (4 + |w_t| + 2 |F_t|)

    to which a state that is one long sum adds 2 √t u H; and a reading of d channels and t steps (4 + 4 √d + 2 √t) u |r|ᵀH
    (and the same of the step's own term), with 2 u |F_{t+1}| H for (3): a form may get F_t from F_{t+1} = F_t + w_t,
    or by a sum of its own. v is `store`, the unit roundoff of operands and weights that are kept in halves, and of a
    state rounded once in 64 steps.
    """
    r, k, v, w, H = (abs(x) if i != 3 else x for i, x in enumerate(aligned(state, r, k, v, w)))
    E, F, outputs, d = np.zeros_like(H), np.zeros_like(r[..., :1, :].sum(axis=-2)), [], r.shape[-1]
    for t in range(r.shape[-2]):
        r_t, pair, g = r[..., t, :], k[..., t, :, None] * v[..., t, None, :], w[..., t, :]
        gamma = unit * (4 + 4 * np.sqrt(d) + 2 * np.sqrt(t + 1.0)) + 8 * store
        own = (r_t * abs(u) * k[..., t, :]).sum(axis=-1)[..., None] * v[..., t, :]  # (..., H, e)
        F = F + _size(g)
        outputs.append((r_t[..., None, :] @ (E + (gamma + 2 * unit * F[..., None]) * H))[..., 0, :] + gamma * own)
        old = np.exp(g)[..., None] * H
        E = np.exp(g)[..., None] * E + (unit * (4 + _size(g) + 2 * F))[..., None] * old + (4 * unit + 8 * store) * pair
        H = old + pair
        E = E + (unit + store / 64) * H
    E = E + 2 * np.sqrt(r.shape[-2]) * unit * H
    o = np.stack(outputs, axis=-2) if outputs else v
    return (o, E) if return_state else o


def _size(x):
    return np.where(np.isfinite(x), abs(x), 0)


# -- laws and the catalogue -----------------------------------------------------------------------------------------------


def _bonus(f, call, bound, rng):
    """u enters linearly and at the current step alone: it adds (r·(u∘k)) v to what u = 0 gives."""
    call = {**call, "return_state": False}
    none = {**call, "u": 0 * call["u"]}
    u, own = call["u"][..., None, :], 2 * bound(**call) + 2 * bound(**none)
    added = (call["r"] * u * call["k"]).sum(axis=-1, keepdims=True) * call["v"]
    if added.dtype.itemsize < 4:
        return  # the sum of two rounded results
    yield "o less o without a bonus", f(**call) - f(**none), added, own


def _decays_later(f, call, bound, rng):
    """w_t acts after o_t is read: other decays of the last step change the state, and no output."""
    call = {**call, "return_state": False}
    other = {**call, "w": call["w"].copy()}
    other["w"][..., -1:, :] = -3
    yield "o with another decay of the last step", f(**other), f(**call), 2 * bound(**call)


def _sample(rng, *, H=2, T=7, d=4, e=3, batch=()):
    heads = (*batch, H)
    return {
        "r": rng.standard_normal((*heads, T, d)),
        "k": rng.standard_normal((*heads, T, d)),
        "v": rng.standard_normal((*heads, T, e)),
        "w": -rng.uniform(0.05, 1.2, (*heads, T, d)),
        "u": rng.standard_normal((H, d)),
        "state": rng.standard_normal((*heads, d, e)),
    }


def _with(**changes):
    """A hard call: the sample, with some arrays replaced, or left out (None)."""

    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        call |= {name: change(rng, call[name]) for name, change in changes.items()}
        return {name: x for name, x in call.items() if x is not None}

    return draw


def _rows_of_zeros(rng, x):
    return x * (rng.random((*x.shape[:-1], 1)) < 0.5)


def _chunked(T, d, e, L, times):
    chunks = T / L
    return Cost(
        (T * (L * (8 * d + 2 * e) + 4 * d * e + 15 * d + 3 * e) + 4 * chunks * d * e) * times,
        L + log2_ceil(L) + max(d + 7, 4 * chunks + log2_ceil(d) + 4),
        (2 * T * L * d + 4 * T * (d + e) + 3 * (chunks + 1) * d * e) * times,
    )


_cost = {
    "recurrent": lambda T, d, e, H=1, batch=1, **_: Cost(
        T * (5 * d * e + 4 * d + 2 * e - 1) * H * batch, 2 * T + log2_ceil(d) + 1, (4 * d * e + T * (e + 1)) * H * batch
    ),
    "chunkwise": lambda T, d, e, H=1, batch=1, chunk=32, **_: _chunked(T, d, e, min(chunk, max(T, 1)), H * batch),
}

OPS = (
    Op(
        name="wkv6",
        summary="RWKV-6: o = (S + (u∘k) vᵀ)ᵀ r, then S <- e^w S + k vᵀ, with a log-decay per key channel",
        contract=CONTRACT,
        forms={"recurrent": Form(wkv6, _cost["recurrent"], exact=("work", "depth")), "chunkwise": Form(wkv6_chunkwise, _cost["chunkwise"])},
        gradient=wkv6_vjp,
        sample=_sample,
        hard={
            "decays slightly above 1": _with(w=lambda rng, w: -w * 2.0**-10),
            "decays of 0": _with(w=lambda rng, w: np.where(rng.random(w.shape) < 0.3, -1e3, w)),
            "no decay": _with(w=lambda rng, w: 0 * w),
            "little is left": _with(w=lambda rng, w: w - 5),
            "all but forgotten": _with(w=lambda rng, w: w - 20),
            "large and small channels": _with(k=lambda rng, k: k * 2.0 ** (10 * np.arange(k.shape[-1])), u=lambda rng, u: u * 2.0**-10),
            "large bonuses": _with(u=lambda rng, u: u * 1e3),
            "receptances and keys of zeros": _with(r=_rows_of_zeros, k=_rows_of_zeros),
            "values that cancel": _with(
                v=lambda rng, v: v + np.where(np.arange(v.shape[-2]) % 2, -1e3, 1e3)[:, None], w=lambda rng, w: w / 64
            ),
            "no initial state": _with(state=lambda rng, S: None),
        },
        error_bound=error_bound,
        references=("peng2024, section 4.2.2, equation 19", "yang2024gla, section 4"),
        sizes=({"d": 1, "e": 1}, {"H": 1, "d": 5, "e": 5}, {"d": 16, "e": 8}, {"H": 3, "batch": (2,)}),
        laws=(
            causal(CONTRACT, "r", "k", "v", "w"),
            hand_off(CONTRACT),
            linear(CONTRACT, "v", "state"),
            Law("bonus", _bonus, ("u",)),
            Law("decays_later", _decays_later, ("w",)),
        ),
    ),
)
