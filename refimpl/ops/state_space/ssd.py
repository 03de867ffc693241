"""State space duality: the recurrence of Mamba-2, which is a masked attention, which is a product of blocks.

    dt_t = clip(softplus(dt_t + dt_bias), dt_limit)                          (bias and softplus where asked for)   (1)
    S_t  = exp(dt_t A) S_{t-1} + dt_t B_t x_tᵀ,       S_{-1} = state, 0 if none is given                           (2)
    y_t  = (S_tᵀ C_t + D x_t) silu(z_t)               (D and gate where given)                                     (3)

`selective_scan` with two things made smaller and one larger: the rates A, c × n of them there, are one number for each
head; a head's p channels share its step and its B and C; and in return n may be 64 or 256 in place of 16. Then the
state is a matrix, n × p, which each step fades as a whole and adds a product of rank one to: linear attention with a
decay (`linear_attention`, S_t = e^{g_t} S_{t-1} + k_t v_tᵀ, o_t = S_tᵀ q_t, under other names). Unrolled, (2) is

    y_t = Σ_{s<=t} (C_t·B_s) exp(A (dt_{s+1} + ... + dt_t)) dt_s x_s,        Y = (L ∘ C Bᵀ) (dt X)                  (4)

a product of matrices, with C for queries, B for keys and L, which fades with the time between s and t, where attention
has a causal mask [1, section 5]. This is the duality: the same function is a recurrence, linear in T, and an attention,
quadratic in T. The matrix L ∘ C Bᵀ is semiseparable: everything below its diagonal that a state must carry across a
cut at t, the block of rows >= t and columns < t, has rank n at most, whatever T is [1, section 3.2]. So cut time into
chunks, take (4) for the blocks on the diagonal and (2) from chunk to chunk for those below: that is `chunked`.

Glossary
    x, y      input, output, (..., H, T, p)   X, Y in [1]; p is the head dimension P
    dt        step, before (1) and after      Δ
    A         rate of each head               A, the scalar structure of [1, section 5]
    B, C      input and output maps           B, C; keys and queries K, Q of the dual form
    D, z      skip connection, gate           D, z in [1, section 7]
    S, state  states, (..., H, n, p)          H in [1], transposed in its code
    L         decays between steps            L = 1SS(a) in [1, section 3.2]; its logarithms are segsum in listing 1

Where implementations differ
    Mamba's state is (..., H, p, n), the transpose of S; its layouts are x (batch, T, H, p), dt (batch, T, H), B and C
    (batch, T, G, n). The short listing of [1] takes x times dt and A times dt in place of x, A and dt.
    The limits clip after softplus, and clip always: with the default (0, inf) a negative step is one of 0. Some
    ports clip before softplus, or only if softplus is asked for.
    Groups: head h reads group h // (H/G) of B and C. D may have p numbers a head in Mamba; here it has one. Mamba-2's
    block multiplies by silu(z) inside the norm that follows; here the gate is the operator's last act.
    Chunked kernels take decays for differences of running sums, which lose what the sums have in common. Here they are
    sums of the steps between, as segsum in listing 1.

References
    [1] T. Dao and A. Gu, "Transformers are SSMs: generalized models and efficient algorithms through structured state
        space duality", ICML 2024, arXiv:2405.21060, sections 3.2, 5, 6, 7.1 and listing 1.
    [2] N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM, 2002, section 3.3.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.numerics import constant, gate_exponents, masked_matmul, sigmoid, silu, silu_derivative, softplus
from refimpl.core.options import one_of, positive_int
from refimpl.core.parallel import over_threads
from refimpl.laws import causal, hand_off, linear
from refimpl.op import Cost, Form, Op
from refimpl.ops.state_space.ssd_bound import bound, bound_of_steps
from refimpl.ops.state_space.ssd_cases import HARD, NOTHING_TAKES_NO_TIME, sample


def _check(arguments, sizes):
    """What shapes cannot say."""
    for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "state"):
        if arguments.get(name) is not None and np.iscomplexobj(arguments[name]):
            raise TypeError(f"ssd: {name} must be real, got dtype {arguments[name].dtype}")
    one_of("ssd", "dt_softplus", arguments.get("dt_softplus", False), (False, True))
    positive_int("ssd", "chunk", arguments.get("chunk", 1))
    limit = arguments.get("dt_limit", (0, np.inf))
    pair = isinstance(limit, tuple | list | np.ndarray) and len(limit) == 2
    if not pair or any(isinstance(v, bool) or not isinstance(v, int | float | np.number) for v in limit) or not limit[0] <= limit[1]:
        raise ValueError(f"ssd: dt_limit must be two numbers, the lower one first, got {limit!r}")


CONTRACT = Contract(
    "ssd",
    takes="x (..., H?, T, p); dt (..., H?, T); A (H?); B (..., G?, T, n); C (..., G?, T, n); D (H?); z (..., H?, T, p);"
    "dt_bias (H?); state (..., H?, n, p)",
    gives="y (..., H?, T, p)",
    rules=("G divides H",),
    check=_check,
)


@CONTRACT.form
def ssd(x, dt, A, B, C, D=None, z=None, dt_bias=None, *, dt_softplus=False, dt_limit=(0.0, np.inf), state=None, return_state=False):
    """State space duality, equations (1)-(3), one step at a time.

    Parameters
    ----------
    x : ndarray, shape (..., H, T, p)
        Input. T may be 0. Without the axis H there is one head, and so for the other arguments.
    dt : ndarray, shape (..., H, T)
        Step sizes; with `dt_softplus`, what softplus makes them of.
    A : ndarray, shape (H,)
        Rate of each head, usually negative.
    B, C : ndarray, shape (..., G, T, n)
        Input and output maps of every step; G divides H, and head h reads group h // (H // G).
    D : ndarray, shape (H,), optional
        Skip connection, added before the gate.
    z : ndarray, shape (..., H, T, p), optional
        Gate: the output is multiplied by silu(z).
    dt_bias : ndarray, shape (H,), optional
        Added to `dt` before softplus.
    dt_softplus : bool
        Whether the step size is softplus of dt + dt_bias, or that sum itself.
    dt_limit : (float, float)
        The step size is clipped to these limits, after softplus. By default negative steps become 0.
    state : ndarray, shape (..., H, n, p), optional
        S before the first step; 0 by default.
    return_state : bool
        Also return the last S, to go on from.

    Returns
    -------
    y : ndarray, shape (..., H, T, p)
    state : ndarray, shape (..., H, n, p), only with `return_state`

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, G does not divide H, an array is not numeric or complex, or `dt_limit` is not two
        numbers in order.

    Notes
    -----
    5 T n p operations a head, 2 T deep; n p states alive at once. The error is at most ``error_bound``: with decays
    below 1 it does not grow with T.

    References
    ----------
    [1, section 6]; (1) is [1, section 7.1].

    Examples
    --------
    A state that is filled at the first step and halves at every step (dt = 1, A = -log 2):

    >>> import numpy as np
    >>> x, one = np.array([[1.0], [0.0], [0.0]]), np.ones((3, 1))
    >>> ssd(x, np.ones(3), np.array([-np.log(2)]), B=one, C=one)[:, 0]
    array([1.  , 0.5 , 0.25])
    """
    x, dt, B, C, S = _prepare(x, dt, A, B, C, z, dt_bias, dt_softplus, dt_limit, state)
    B, C = _by_head(B, x), _by_head(C, x)
    ys = []
    for t in range(x.shape[-2]):
        decay = np.exp(dt[..., t] * A)[..., None, None]  # (..., H, 1, 1)
        entry = (dt[..., t, None] * B[..., t, :])[..., :, None] * x[..., t, None, :]  # (..., H, n, p)
        S = decay * S + entry
        ys.append((C[..., t, :, None] * S).sum(axis=-2))  # (..., H, p)
    y = np.stack(ys, axis=-2) if ys else x  # (..., H, T, p)
    y = _skip_and_gate(y, x, D, z)
    return (y, S) if return_state else y


@CONTRACT.form
def ssd_quadratic(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, *, dt_softplus=False, dt_limit=(0.0, np.inf), state=None, return_state=False
):
    """The same as an attention, equation (4): queries C, keys B, values dt x, and decays L in place of softmax and mask.

    2 T² (n + p) operations a head and T² memory, but two matrix products in place of T steps. The state is one more
    thing to attend to, faded by all the time since; the diagonal belongs to the mask, for y_t reads S_t [1, section 5].
    """
    x, dt, B, C, S = _prepare(x, dt, A, B, C, z, dt_bias, dt_softplus, dt_limit, state)
    T = x.shape[-2]
    if T == 0:
        return (x, S) if return_state else x
    log_decay, values = dt * A[:, None], dt[..., None] * x  # (..., H, T), (..., H, T, p)
    L = np.exp(gate_exponents(log_decay, np.zeros_like(log_decay)))  # (..., H, T, T)
    since = np.exp(np.cumsum(log_decay, axis=-1))[..., None]  # (..., H, T, 1), of the state
    M = _lower(_by_head(C @ _transposed(B), x) * L)  # (..., H, T, T)
    B, C = _by_head(B, x), _by_head(C, x)
    y = masked_matmul(M, values, _causal(M)) + (since * C) @ S
    y = _skip_and_gate(y, x, D, z)
    if not return_state:
        return y
    return y, _transposed(L[..., -1, :, None] * B) @ values + since[..., -1:, :] * S


@CONTRACT.form
def ssd_chunked(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, *, dt_softplus=False, dt_limit=(0.0, np.inf), state=None, return_state=False, chunk=64
):
    """The same in chunks: (4) within each, the recurrence (2) between them, whose steps are now chunks [1, section 6].

    A block of the matrix below the diagonal has rank n and comes in three factors: B puts a chunk into a state (right),
    decays carry it to later chunks (centre), C reads it there (left). 2 T (chunk (n + p) + 2 n p) operations a head,
    all but T/chunk small steps of them in matrix products: linear in T, and what [1] runs on tensor cores. The products
    C Bᵀ are formed once for all heads of a group; heads, being independent, go to threads.
    """
    x, dt, B, C, S = _prepare(x, dt, A, B, C, z, dt_bias, dt_softplus, dt_limit, state)
    (*batch, H, T, p), size = x.shape, min(chunk, max(x.shape[-2], 1))
    inner = [_in_chunks(v, size) for v in (x, dt[..., None], B, C)]  # (..., H or G, T/L, L, f)
    scores = inner[3] @ _transposed(inner[2])  # (..., G, T/L, L, L)
    y = np.zeros_like(S, shape=inner[0].shape)
    S = S.copy()

    def run(index):
        *b, h = index
        group = (*b, h * B.shape[-3] // H)
        (steps, into, out), values = (inner[1][index], inner[2][group], inner[3][group]), inner[0][index] * inner[1][index]
        log_decay = (steps * A[h])[..., 0]  # (T/L, L)
        decay = np.exp(gate_exponents(log_decay, np.zeros_like(log_decay)))  # (T/L, L, L)
        since = np.exp(np.cumsum(log_decay, axis=-1))[..., None]  # (T/L, L, 1), of the state that enters
        added = _transposed(decay[..., -1, :, None] * into) @ values  # (T/L, n, p), what a chunk leaves behind
        entering, last = np.zeros_like(added), S[index]
        for j in range(len(added)):
            entering[j] = last
            last = since[j, -1] * last + added[j]
        S[index] = last
        M = _lower(scores[group] * decay)
        y[index] = masked_matmul(M, values, _causal(M)) + (since * out) @ entering

    over_threads(run, np.ndindex(*batch, H), y)
    y = y.reshape(*batch, H, y.shape[-3] * size, p)[..., :T, :]
    y = _skip_and_gate(y, x, D, z)
    return (y, S) if return_state else y


@CONTRACT.gradient
def ssd_vjp(dy, x, dt, A, B, C, D=None, z=None, dt_bias=None, *, dt_softplus=False, dt_limit=(0.0, np.inf), state=None, dstate=None):
    """Gradient of `ssd`: through gate and skip to p = Sᵀ C + D x, then (2) transposed, last step first.

        dp_t = dy_t silu(z_t),             dz_t = dy_t p_t silu'(z_t),         dD = Σ_t dp_t·x_t
        R_t  = C_t dp_tᵀ + exp(dt_{t+1} A) R_{t+1},      R_{T-1} also takes dstate                               (5)
        dC_t = S_t dp_t,      dB_t = dt_t R_t x_t        (each summed over its heads)
        r_t  = exp(dt_t A) <R_t, S_{t-1}>                (cotangent of the logarithm dt_t A)
        dA   = Σ_t dt_t r_t,  d(dt_t) = A r_t + B_tᵀ R_t x_t
        dx_t = D dp_t + dt_t R_tᵀ B_t,                   dstate_in = exp(dt_0 A) R_0

    R is a recurrence like S, with B and C, x and dp exchanged and time reversed: the dual form of the gradient is an
    attention too. Then d(dt) passes the limits where the step lies between them or on one of them (slope 1), and not
    where it was clipped (slope 0); and by softplus' derivative σ(dt + dt_bias) reaches dt and dt_bias.

    Parameters
    ----------
    dy : ndarray, shape (..., H, T, p)
        Cotangent of y.
    dstate : ndarray, shape (..., H, n, p), optional
        Cotangent of the final state.

    Returns
    -------
    dict
        "x", "dt", "A", "B", "C", and "D", "z", "dt_bias", "state" where they were given.

    Notes
    -----
    Keeps T states of n p numbers a head. Kernels keep one in every chunk, and recompute the others.
    """
    raw = dt if dt_bias is None else dt + dt_bias[:, None]
    unclipped, groups = softplus(raw) if dt_softplus else raw, B.shape[-3]
    low, high = (constant(v, unclipped) for v in dt_limit)
    x, dt, B, C, S = _prepare(x, dt, A, B, C, z, dt_bias, dt_softplus, dt_limit, state)
    B, C, T = _by_head(B, x), _by_head(C, x), x.shape[-2]
    decay = np.exp(dt * A[:, None])  # (..., H, T)
    states = [S]
    for t in range(T):
        S = decay[..., t, None, None] * S + (dt[..., t, None] * B[..., t, :])[..., :, None] * x[..., t, None, :]
        states.append(S)

    dp = np.broadcast_to(dy if z is None else dy * silu(z), x.shape)
    R = np.zeros_like(S) if dstate is None else np.broadcast_to(dstate, S.shape)
    steps = []
    for t in reversed(range(T)):
        R = R + C[..., t, :, None] * dp[..., t, None, :]  # (..., H, n, p)
        from_input = (R * x[..., t, None, :]).sum(axis=-1)  # (..., H, n): R x
        r = decay[..., t] * (R * states[t]).sum(axis=(-2, -1))  # (..., H)
        dC = (states[t + 1] * dp[..., t, None, :]).sum(axis=-1)  # (..., H, n)
        read = (states[t + 1] * C[..., t, :, None]).sum(axis=-2)  # (..., H, p)
        dx = dt[..., t, None] * (R * B[..., t, :, None]).sum(axis=-2)
        steps.append((dx, A * r + (B[..., t, :] * from_input).sum(axis=-1), dt[..., t, None] * from_input, dC, dt[..., t] * r, read))
        R = decay[..., t, None, None] * R
    dx, d_dt, dB, dC, dA, read = zip(*steps[::-1], strict=True) if steps else ((),) * 6
    inside = (low <= unclipped) & (unclipped <= high)
    d_dt = np.where(inside, _over_time(d_dt, dt, -1), np.zeros_like(dt))  # (..., H, T)
    d_raw = d_dt * sigmoid(raw) if dt_softplus else d_dt
    dx, p = _over_time(dx, x, -2), _skip_and_gate(_over_time(read, x, -2), x, D, None)  # (..., H, T, p)
    gradient = {
        "x": dx if D is None else dx + D[:, None, None] * dp,
        "dt": d_raw,
        "A": _over_time(dA, dt, -1).sum(axis=-1),
        "B": _by_group(_over_time(dB, B, -2), groups),
        "C": _by_group(_over_time(dC, C, -2), groups),
        "D": (dp * x).sum(axis=(-2, -1)),
        "dt_bias": d_raw.sum(axis=-1),
        "state": R,
    }
    return gradient if z is None else gradient | {"z": dy * p * silu_derivative(z)}


@CONTRACT.form
def error_bound(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    *,
    unit,
    store=0.0,
    dt_softplus=False,
    dt_limit=(0.0, np.inf),
    state=None,
    return_state=False,
):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`: `ssd_bound` derives it.

    `store` allows for dt, the operands dt·x and B times decays, the weights of (4), the state that is read and the gate's
    factors, rounded to that unit, and for the carry of every 64 steps; not for rounding the state at every step.
    """
    raw = dt if dt_bias is None else dt + dt_bias[:, None]
    x, dt, B, C, S = _prepare(x, dt, A, B, C, z, dt_bias, dt_softplus, dt_limit, state)
    off_dt = bound_of_steps(raw, dt, dt_limit, biased=dt_bias is not None, softened=dt_softplus, unit=unit, store=store)
    maps = _by_head(B, x), _by_head(C, x)
    off_y, off_S = bound(x, dt, A, *maps, D, z, S, off_dt=off_dt, unit=unit, store=store)
    return (off_y, off_S) if return_state else off_y


# -- what the forms share --------------------------------------------------------------------------------------------


def _prepare(x, dt, A, B, C, z, dt_bias, dt_softplus, dt_limit, state):
    """Inputs and steps (1) with all batch axes, B and C for each group, and a state."""
    dt = dt if dt_bias is None else dt + dt_bias[:, None]
    dt = softplus(dt) if dt_softplus else dt
    dt = np.minimum(np.maximum(dt, constant(dt_limit[0], dt)), constant(dt_limit[1], dt))
    given = [v for v in (x, dt[..., None], B, C, z, state) if v is not None]
    batch = np.broadcast_shapes(*(v.shape[:-3] for v in given))
    x, dt, B, C = (np.broadcast_to(v, (*batch, *v.shape[-3:])) for v in (x, dt[..., None], B, C))
    shape = (*x.shape[:-2], B.shape[-1], x.shape[-1])
    S = np.zeros_like(x, shape=shape) if state is None else np.broadcast_to(state, shape)
    return x, dt[..., 0], B, C, S


def _by_head(v, x):
    """Of maps for each group, (..., G, T, f), those that each head reads, (..., H, T, f)."""
    G, H = v.shape[-3], x.shape[-3]
    return v if G == H else np.repeat(v, H // max(G, 1), axis=-3)


def _by_group(gradient, G):
    """The adjoint of `_by_head`: sum over each group's heads."""
    *batch, H, T, n = gradient.shape
    return gradient.reshape(*batch, G, H // max(G, 1), T, n).sum(axis=-3)


def _over_time(rows, like, axis):
    """One array of all steps' rows; of none, `like`, which then has none either."""
    return np.stack(rows, axis=axis) if rows else like


def _in_chunks(v, size):
    """(..., T, f) as (..., T/L, L, f); what is appended is zeros, of dt too: steps that take no time and change nothing."""
    *batch, T, f = v.shape
    pad = np.zeros_like(v, shape=(*batch, -T % size, f))
    return np.concatenate([v, pad], axis=-2).reshape(*batch, -(-T // size), size, f)


def _lower(M):
    """M on and below the diagonal, and 0 above it, also where M has a NaN there."""
    return np.where(np.tri(M.shape[-1], dtype=bool), M, np.zeros_like(M))


def _causal(M):
    """0 where s <= t, -∞ elsewhere: (T, T)."""
    return np.where(np.tri(M.shape[-1], dtype=bool), np.zeros(()), np.full((), -np.inf))


def _transposed(v):
    return np.swapaxes(v, -1, -2)


def _skip_and_gate(y, x, D, z):
    y = y if D is None else y + D[:, None, None] * x
    return y if z is None else y * silu(z)


# -- the catalogue ---------------------------------------------------------------------------------------------------


def _cost(work, depth, peak):
    """Of one head, as functions of T, n, p and the chunk's length."""

    def cost(T, p, n, H=1, G=1, batch=1, chunk=64):
        size = min(chunk, max(T, 1))
        return Cost(work(T, n, p, size, G / H) * H * batch, depth(T, n, size), peak(T, n, p, size) * H * batch)

    return cost


OPS = (
    Op(
        name="ssd",
        summary="S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_tᵀ, y_t = (S_tᵀ C_t + D x_t) silu(z_t): Mamba-2",
        contract=CONTRACT,
        forms={
            "recurrent": Form(
                ssd,
                _cost(
                    lambda T, n, p, L, share: T * (5 * n * p + n - p + 4),
                    lambda T, n, L: 2 * T + log2_ceil(n) + 5,
                    lambda T, n, p, L: 4 * T * p + 4 * n * p,
                ),
                exact=("work", "depth"),
            ),
            "quadratic": Form(
                ssd_quadratic,
                _cost(
                    lambda T, n, p, L, share: T * T * (2 * n * share + 2 * p + 3) + T * (2 * n * p + n + 2 * p + 5) - 2,
                    lambda T, n, L: T + log2_ceil(T) + 7,
                    lambda T, n, p, L: 3.5 * T * T + 3 * T * (n + p) + n * p,
                ),
                exact=("work",),
            ),
            "chunked": Form(
                ssd_chunked,
                _cost(
                    lambda T, n, p, L, share: (
                        T * (L * (2 * n * share + 2 * p + 3) + 4 * n * p + 2 * n + 2 * p + 5) + (T / L) * (2 * n * p - 2)
                    ),
                    lambda T, n, L: L + 2 * (T / L) + log2_ceil(L) + log2_ceil(n) + 4,
                    lambda T, n, p, L: 2 * T * L + 2 * (T / L) * n * p + 2 * T * (n + p),
                ),
            ),
        },
        gradient=ssd_vjp,
        sample=sample,
        options={"dt_softplus": (False, True), "dt_limit": ((0.0, np.inf), (0.5, 1.25))},
        hard=HARD,
        error_bound=error_bound,
        references=("dao2024, sections 3.2, 5, 6 and listing 1", "higham2002, section 3.3"),
        sizes=(
            {"H": 1, "G": 1, "p": 1, "n": 1},
            {"H": 6, "G": 2, "n": 5},
            {"H": 3, "G": 3, "p": 5, "n": 2},
            {"H": 2, "G": 1, "p": 16, "n": 16},
            {"batch": (2,)},
            {"H": 2, "G": 2, "batch": (2, 3)},
        ),
        laws=(causal(CONTRACT, "x", "dt", "B", "C", "z"), linear(CONTRACT, "x", "state"), hand_off(CONTRACT), NOTHING_TAKES_NO_TIME),
    ),
)
