"""Selective scan: the recurrence at the heart of Mamba, a state space model whose steps depend on the input.

    dt_t = softplus(delta_t + delta_bias)                                    (softplus and bias where asked for)   (1)
    h_t  = exp(dt_t A) h_{t-1} + dt_t B_t u_t,        h_{-1} = state, 0 if none is given                           (2)
    y_t  = (C_t · h_t + D u_t) silu(z_t)              (D and gate where given)                                     (3)

Each of c channels has n states of its own, each decaying at its own rate A < 0. In earlier state space models the
step dt and the vectors B, C are constants, so that (2) is a convolution; here they are functions of the input. A large
dt forgets the past and takes in the present, dt = 0 keeps the state and skips the token: the model selects [1, section
3.5]. That ends the convolution, but not the parallelism, for (2) is still linear in h: a `linear_recurrence` of c·n
lanes with the decays exp(dt A). What it costs is memory, T·c·n states where input and output have T·c numbers; hence
the form `chunked`, which never has more than a chunk of them, and which is the algorithm of the published kernel.
Held constant, dt, B and C give `ssm` again, of `discretize_diagonal(A, B, dt, method="mamba")`; one A and one dt for
many channels and states give `ssd`; a second scan from the other end, `bidirectional_scan`.

Glossary
    u, y      input, output of the scan      x, y in [1, algorithm 2]
    delta     step size, before (1)          Δ, its argument of τ_Δ
    dt        step size                      Δ
    A         rates, (c, n)                  A
    B, C      input and output maps          B, C: s_B(x), s_C(x), shared by all channels (or by groups of them)
    D, z      skip connection, gate          D and the second branch of [1, figure 3]
    h, state  states, (..., c, n)            h

Where implementations differ
    The paper writes the exact discretisation (exp(dt A) - 1)/A · B for the input [1, equation 4]; its code, and every
    port, computes dt·B, as (2) does. `discretize(method="mamba")` is this pair, `method="zoh"` the paper's.
    Complex A stands for conjugate pairs of which one is given: y = 2 Re(C·h) + D u, with nothing conjugated. The
    operator `ssm` takes Re without the factor 2 unless told `pairs=True`.
    Groups: channel j reads group j // (c/G) of B and C. Layouts: Mamba's own has time last, (batch, c, T), and B as
    (batch, n, T) or (batch, G, n, T). Some ports return the gated output of the last step as "last state": here it is h.
    Frameworks replace softplus(x) by x beyond a threshold of 20 and so lose 2e-9 there; this chapter does not.

References
    [1] A. Gu and T. Dao, "Mamba: linear-time sequence modeling with selective state spaces", arXiv:2312.00752, 2023,
        equations 2-4, algorithm 2, sections 3.3 and 3.5, theorem 1.
    [2] A. Ali, I. Zimerman and L. Wolf, "The hidden attention of Mamba models", arXiv:2403.01590, 2024, section 3.1.
    [3] T. Dao and A. Gu, "Transformers are SSMs", arXiv:2405.21060, 2024, section 6 and listing 1 (segment sums).
    [4] N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM, 2002, section 3.3.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.numerics import sigmoid, silu, silu_derivative, softplus
from refimpl.core.options import one_of, positive_int
from refimpl.core.parallel import over_threads
from refimpl.laws import causal, hand_off, linear
from refimpl.op import Cost, Form, Op
from refimpl.ops.recurrence.linear_recurrence import linear_recurrence, linear_recurrence_blelloch
from refimpl.ops.state_space.selective_scan_bound import bound, bound_of_steps
from refimpl.ops.state_space.selective_scan_cases import HARD, sample


def _check(arguments, sizes):
    """What shapes cannot say. Complex rates alone make a complex system: B and C of one are then complex at will."""
    for name in ("u", "delta", "D", "z", "delta_bias"):
        if arguments.get(name) is not None and np.iscomplexobj(arguments[name]):
            raise TypeError(f"selective_scan: {name} must be real, got dtype {arguments[name].dtype}")
    for name in ("B", "C", "state"):
        if arguments.get(name) is not None and np.iscomplexobj(arguments[name]) and not np.iscomplexobj(arguments["A"]):
            raise TypeError(
                f"selective_scan: {name} may be complex only where A is, got {name} of dtype {arguments[name].dtype} and a real A"
            )
    one_of("selective_scan", "delta_softplus", arguments.get("delta_softplus", False), (False, True))
    for name in ("chunk", "channels"):
        positive_int("selective_scan", name, arguments.get(name, 1))


CONTRACT = Contract(
    "selective_scan",
    takes="u (..., T, c); delta (..., T, c); A (c, n); B (..., T, n) | (..., T, G, n); C (..., T, n) | (..., T, G, n);"
    "D (c); z (..., T, c); delta_bias (c); state (..., c, n)",
    gives="y (..., T, c)",
    rules=("G divides c",),
    check=_check,
)


@CONTRACT.form
def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, *, delta_softplus=False, state=None, return_state=False):
    """Selective scan, equations (1)-(3), one step at a time.

    Parameters
    ----------
    u : ndarray, shape (..., T, c)
        Input. T may be 0.
    delta : ndarray, shape (..., T, c)
        Step sizes; with `delta_softplus`, what softplus makes them of.
    A : ndarray, shape (c, n)
        Rates, usually negative; complex A stands for conjugate pairs.
    B, C : ndarray, shape (..., T, n) or (..., T, G, n)
        Input and output maps of every step, for all channels or for each of G groups of channels in order; complex
        only where A is.
    D : ndarray, shape (c,), optional
        Skip connection, added before the gate.
    z : ndarray, shape (..., T, c), optional
        Gate: the output is multiplied by silu(z).
    delta_bias : ndarray, shape (c,), optional
        Added to `delta` before softplus.
    delta_softplus : bool
        Whether the step size is softplus of delta + delta_bias, or that sum itself.
    state : ndarray, shape (..., c, n), optional
        h before the first step; 0 by default.
    return_state : bool
        Also return the last h, to go on from.

    Returns
    -------
    y : ndarray, shape (..., T, c)
        Real, for complex A too.
    state : ndarray, shape (..., c, n), only with `return_state`

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, G does not divide c, an array is not numeric or is complex where it must be real.

    Notes
    -----
    About 7 T c n operations, an exponential among them, 2 T deep; c n states alive at once. The error is at most
    ``error_bound``: with decays below 1 it does not grow with T.

    References
    ----------
    [1, algorithm 2 and equation 2].

    Examples
    --------
    A state that is filled at the first step and halves at every step (dt = 1, A = -log 2):

    >>> import numpy as np
    >>> one = np.ones((3, 1))
    >>> selective_scan(np.array([[1.0], [0.0], [0.0]]), one, np.array([[-np.log(2)]]), B=one, C=one)[:, 0]
    array([1.  , 0.5 , 0.25])
    """
    u, dt, B, C, h = _prepare(u, delta, A, B, C, z, delta_bias, delta_softplus, state)
    ys = []
    for t in range(u.shape[-2]):
        decay = np.exp(dt[..., t, :, None] * A)  # (..., c, n)
        entry = (dt[..., t, :] * u[..., t, :])[..., None] * _by_channel(B[..., t, :, :], A)  # (..., c, n)
        h = decay * h + entry
        ys.append((_by_channel(C[..., t, :, :], A) * h).sum(axis=-1))  # (..., c)
    y = np.stack(ys, axis=-2) if ys else u  # (..., T, c)
    y = _skip_and_gate(_observed(y, A), u, D, z)
    return (y, h) if return_state else y


@CONTRACT.form
def selective_scan_associative(u, delta, A, B, C, D=None, z=None, delta_bias=None, *, delta_softplus=False, state=None, return_state=False):
    """The same by a parallel prefix scan: (2) is a `linear_recurrence` with a_t = exp(dt_t A) and b_t = dt_t B_t u_t.

    Its steps compose, whatever they depend on, as long as they do not depend on h. All T c n decays and inputs are
    formed, and scanned by `linear_recurrence_blelloch`: 4 log2 T deep and no more work than the loop, up to a factor,
    but T times its memory [1, section 3.3.2].
    """
    u, dt, B, C, h = _prepare(u, delta, A, B, C, z, delta_bias, delta_softplus, state)
    decay = np.exp(dt[..., None] * A)  # (..., T, c, n)
    entry = (dt * u)[..., None] * _by_channel(B, A)  # (..., T, c, n)
    hs = _over_time(linear_recurrence_blelloch, decay, entry, h)  # (..., T, c, n)
    y = _observed((_by_channel(C, A) * hs).sum(axis=-1), A)
    y = _skip_and_gate(y, u, D, z)
    return (y, hs[..., -1, :, :] if u.shape[-2] else h) if return_state else y


@CONTRACT.form
def selective_scan_chunked(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, *, delta_softplus=False, state=None, return_state=False, chunk=32, channels=512
):
    """The same, a chunk of steps of a block of channels at a time: the states never leave fast memory.

    Equation (2) needs T c n decays and inputs, (3) is done with them at once. So form them for one chunk, small enough
    for the cache (shared memory, on a GPU), run the recurrence over it, contract the states with C, and keep only the
    last [1, section 3.3.2]. Nothing is approximated, and blocks of channels, being independent, go to threads.
    """
    u, dt, B, C, h = _prepare(u, delta, A, B, C, z, delta_bias, delta_softplus, state)
    (T, c), batch = u.shape[-2:], u.shape[:-2]
    y = np.zeros_like(h, shape=u.shape)
    h = h.copy()
    B, C = (np.broadcast_to(x, (*batch, *x.shape[-3:])) for x in (B, C))

    def scan(piece):
        index, block = piece
        rates = A[block].T.copy()  # (n, c'): states before channels, so that channels are contiguous
        last = h[index][block].T
        for start in range(0, T, chunk):
            now = slice(start, start + chunk)
            step = dt[index][now, block]  # (L, c')
            into, out = (_for_block(x[index][now], block, c) for x in (B, C))  # (L, n, 1 or c')
            entry = into * (step * u[index][now, block])[:, None, :]  # (L, n, c')
            hs = np.exp(step[:, None, :] * rates)  # (L, n, c'): decays, which row by row become states
            for row, arrives in zip(hs, entry, strict=True):
                row *= last
                row += arrives
                last = row
            y[index][now, block] = np.einsum("tnc,tnc->tc", out, hs)
        h[index][block] = last.T

    pieces = [(index, slice(j, j + channels)) for index in np.ndindex(batch) for j in range(0, c, channels)]
    over_threads(scan, pieces, y)
    y = _skip_and_gate(_observed(y, A), u, D, z)
    return (y, h) if return_state else y


@CONTRACT.form
def selective_scan_attention(u, delta, A, B, C, D=None, z=None, delta_bias=None, *, delta_softplus=False, state=None, return_state=False):
    """The same as attention: unrolling (2) gives every channel a lower triangular matrix of its own, y = M u, with

        M_ts = Σ_n C_t[n] exp(A[n] (dt_{s+1} + ... + dt_t)) B_s[n] dt_s,        s <= t                             (4)

    C_t is a query, B_s a key, and what stands between them fades with the time that lies between [2, section 3.1]: as
    many matrices as channels, where an attention layer has a few heads. T² c n operations; one channel's T² n numbers
    are alive at once. Times between steps are added up from s on, for a difference of two sums from the beginning would
    lose what they have in common [3, section 6].
    """
    u, dt, B, C, h = _prepare(u, delta, A, B, C, z, delta_bias, delta_softplus, state)
    T, c = u.shape[-2:]
    reaches = np.tri(T, dtype=bool)  # s <= t
    ys, states = [], []
    for j in range(c):
        step, Bj, Cj = dt[..., j], B[..., j * B.shape[-2] // c, :], C[..., j * C.shape[-2] // c, :]  # (..., T), (..., T, n)
        after = np.where(reaches & ~np.eye(T, dtype=bool), step[..., :, None], np.zeros_like(step)[..., :, None])  # dt_r at r > s
        elapsed = np.cumsum(after, axis=-2)  # (..., T, T): dt_{s+1} + ... + dt_t, and 0 for s >= t
        kept = np.exp(elapsed[..., None] * A[j])  # (..., T, T, n)
        M = (Cj[..., :, None, :] * kept * Bj[..., None, :, :]).sum(axis=-1) * step[..., None, :]  # (..., T, T), for s <= t
        terms = M * u[..., None, :, j]
        terms = np.where(reaches, terms, np.zeros_like(terms))  # masked last, so that a NaN of the future stays there
        fade = np.exp(np.cumsum(step, axis=-1)[..., None] * A[j])  # (..., T, n)
        from_state = fade * h[..., None, j, :]
        ys.append(terms.sum(axis=-1) + (Cj * from_state).sum(axis=-1))
        if T:
            states.append((kept[..., -1, :, :] * Bj * (step * u[..., j])[..., None]).sum(axis=-2) + from_state[..., -1, :])
    y = _skip_and_gate(_observed(np.stack(ys, axis=-1), A), u, D, z)
    return (y, np.stack(states, axis=-2) if T else h) if return_state else y


@CONTRACT.gradient
def selective_scan_vjp(dy, u, delta, A, B, C, D=None, z=None, delta_bias=None, *, delta_softplus=False, state=None, dstate=None):
    """Gradient of `selective_scan`: through gate and skip to p = C·h + D u, then an adjoint recurrence, backwards.

        dp_t = dy_t silu(z_t),              dz_t = dy_t p_t silu'(z_t),      dD = Σ_t dp_t u_t
        g_t  = conj(C_t) dp_t + exp(dt_{t+1} conj(A)) g_{t+1},      g_{T-1} also takes dstate                      (5)
        dC_t = dp_t conj(h_t),              dB_t = g_t dt_t u_t              (each summed over its channels)
        r_t  = conj(exp(dt_t A) h_{t-1}) g_t                                 (cotangent of the logarithm dt_t A)
        dA   = Σ_t dt_t r_t,                d(dt_t) = Re Σ_n (conj(A) r_t + conj(B_t) u_t g_t)
        du_t = D dp_t + dt_t Re Σ_n conj(B_t) g_t,                   dstate_in = exp(dt_0 conj(A)) g_0

    and d(delta) = σ(delta + delta_bias) d(dt) by softplus' derivative. For complex A, C enters twice: y = 2 Re(C·h).

    Parameters
    ----------
    dy : ndarray, shape (..., T, c)
        Cotangent of y.
    dstate : ndarray, shape (..., c, n), optional
        Cotangent of the final state.

    Returns
    -------
    dict
        "u", "delta", "A", "B", "C", and "D", "z", "delta_bias", "state" where they were given.

    Notes
    -----
    Keeps T c n states. Kernels recompute them chunk by chunk from the inputs [1, section 3.3.2], to the same effect.
    """
    shared = {"B": _group_axis(u, A, B) is None, "C": _group_axis(u, A, C) is None}
    raw = delta if delta_bias is None else delta + delta_bias
    u, dt, B, C, h = _prepare(u, delta, A, B, C, z, delta_bias, delta_softplus, state)
    B_all, C_all, T = _by_channel(B, A), _by_channel(C, A), u.shape[-2]  # (..., T, c or 1, n)
    decay = np.exp(dt[..., None] * A)  # (..., T, c, n)
    hs = _over_time(linear_recurrence, decay, (dt * u)[..., None] * B_all, h)
    before = np.concatenate([h[..., None, :, :], hs], axis=-3)[..., :-1, :, :]  # h_{t-1}

    dp = dy if z is None else dy * silu(z)
    p = _skip_and_gate(_observed((C_all * hs).sum(axis=-1), A), u, D, None)
    into_h = _observed_adjoint(dp, A)[..., None]  # (..., T, c, 1)
    last = np.zeros_like(h) if dstate is None else np.broadcast_to(dstate, h.shape)
    later = np.concatenate([decay[..., 1:, :, :], np.ones_like(decay[..., :1, :, :])], axis=-3)  # exp(dt_{t+1} A)
    g = _over_time(linear_recurrence, np.conj(later), into_h * np.conj(C_all), last, reverse=True)  # (..., T, c, n)
    r = np.conj(decay * before) * g
    from_entry = (np.conj(B_all) * g).sum(axis=-1).real  # (..., T, c)
    d_dt = (np.conj(A) * r).sum(axis=-1).real + u * from_entry
    d_raw = d_dt * sigmoid(raw) if delta_softplus else d_dt
    gradient = {
        "u": dt * from_entry if D is None else dt * from_entry + D * dp,
        "delta": d_raw,
        "A": (dt[..., None] * r).sum(axis=-3),
        "B": _by_group(g * (dt * u)[..., None], B, shared["B"]),
        "C": _by_group(into_h * np.conj(hs), C, shared["C"]),
        "delta_bias": d_raw,
        "D": dp * u,
        "state": np.conj(decay[..., 0, :, :]) * g[..., 0, :, :] if T else last,
    }
    return gradient if z is None else gradient | {"z": dy * p * silu_derivative(z)}


@CONTRACT.form
def error_bound(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, *, unit, store=0.0, delta_softplus=False, state=None, return_state=False
):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`: `selective_scan_bound` derives it.

    `store` allows for dt, dt·B·u, the h that is read out, the carry of every 64 steps and the gate's factors, rounded once
    each to that unit; not for rounding decays or the state at every step, for a state is kept in full precision.
    """
    raw = delta if delta_bias is None else delta + delta_bias
    u, dt, B, C, h = _prepare(u, delta, A, B, C, z, delta_bias, delta_softplus, state)
    off_dt = bound_of_steps(raw, dt, biased=delta_bias is not None, softplus=delta_softplus, unit=unit, store=store)
    off_y, off_h = bound(u, dt, A, _by_channel(B, A), _by_channel(C, A), D, z, h, off_dt=off_dt, unit=unit, store=store)
    return (off_y, off_h) if return_state else off_y


# -- what the forms share --------------------------------------------------------------------------------------------


def _prepare(u, delta, A, B, C, z, delta_bias, delta_softplus, state):
    """Inputs and steps (1) with all batch axes, B and C with groups (..., T, G, n), and a state."""
    dt = delta if delta_bias is None else delta + delta_bias
    dt = softplus(dt) if delta_softplus else dt
    B, C = (x[..., None, :] if _group_axis(u, A, x) is None else x for x in (B, C))
    batch = np.broadcast_shapes(u.shape[:-2], dt.shape[:-2], B.shape[:-3], C.shape[:-3])
    batch = np.broadcast_shapes(batch, () if z is None else z.shape[:-2], () if state is None else state.shape[:-2])
    h = np.zeros_like(A, shape=(*batch, *A.shape)) if state is None else np.broadcast_to(state + np.zeros_like(A), (*batch, *A.shape))
    u, dt = (np.broadcast_to(x, (*batch, *x.shape[-2:])) for x in (u, dt))
    return u, dt, B, C, h


def _group_axis(u, A, x):
    """Where the axis of groups stands in B or C, if there is one: the contract decides."""
    return CONTRACT.axis("G", u=u, A=A, B=x).get("B")


def _by_channel(x, A):
    """Of maps for each group, (..., G, n), those that each channel reads, (..., c, n); one group serves all by broadcasting."""
    G, c = x.shape[-2], A.shape[0]
    return x if G == 1 else np.repeat(x, c // G, axis=-2)


def _for_block(x, block, c):
    """The same for a block of channels, states first: (L, G, n) -> (L, n, c') or (L, n, 1)."""
    G = x.shape[-2]
    mine = x if G == 1 else x[..., np.arange(c)[block] // (c // G), :]
    return np.swapaxes(mine, -1, -2)


def _by_group(gradient, x, shared):
    """The adjoint of `_by_channel`: sum over each group's channels; without the axis of groups where none was given."""
    G, (c, n) = x.shape[-2], gradient.shape[-2:]
    total = gradient.reshape(*gradient.shape[:-2], G, c // G, n).sum(axis=-2)
    return total[..., 0, :] if shared else total


def _over_time(form, a, b, h, **options):
    """A linear recurrence of states (..., T, c, n), as one of c·n lanes."""
    batch, (c, n) = np.broadcast_shapes(a.shape, b.shape)[:-2], h.shape[-2:]
    a, b = (np.broadcast_to(x, (*batch, c, n)).reshape(*batch, c * n) for x in (a, b))
    return form(a, b, state=h.reshape(*h.shape[:-2], c * n), **options).reshape(*batch, c, n)


def _observed(y, A):
    """C·h as a real number: both of a conjugate pair, where A is complex."""
    return 2 * y.real if np.iscomplexobj(A) else y


def _observed_adjoint(dp, A):
    return 2 * dp if np.iscomplexobj(A) else dp


def _skip_and_gate(y, u, D, z):
    y = y if D is None else y + D * u
    return y if z is None else y * silu(z)


_tree = lambda T: max(1, log2_ceil(T))

OPS = (
    Op(
        name="selective_scan",
        summary="h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = (C_t·h_t + D u_t) silu(z_t): Mamba",
        contract=CONTRACT,
        forms={
            "recurrent": Form(
                selective_scan,
                lambda T, c, n, batch=1, G=0: Cost(7 * T * c * n * batch, 2 * T + log2_ceil(n) + 3, (2 * T + 3 * n) * c * batch),
                exact=("work", "depth"),
            ),
            "associative": Form(
                selective_scan_associative,
                lambda T, c, n, batch=1, G=0: Cost(11 * T * n * c * batch, 4 * _tree(T) + log2_ceil(n) + 1, (8 * n + 2) * T * c * batch),
                stops="dt A > 0: products of decays may overflow where h does not",
            ),
            "chunked": Form(
                selective_scan_chunked,
                lambda T, c, n, batch=1, G=0, chunk=32, channels=512: Cost(
                    (7 * n + 1) * T * c * batch,
                    2 * T + log2_ceil(n) + 3,
                    2 * T * c * batch + 3 * n * min(chunk, T) * min(channels, c) + n * c * batch,
                ),
                exact=("work", "depth"),
            ),
            "attention": Form(
                selective_scan_attention,
                lambda T, c, n, batch=1, G=0: Cost(
                    ((5 * n + 3) * T * T + 8 * n * T - 1) * c * batch,
                    2 * _tree(T) + log2_ceil(n) + 7,
                    ((3 * n + 4) * T * T + 2 * T * c) * batch,
                ),
                exact=("work", "depth"),
            ),
        },
        gradient=selective_scan_vjp,
        sample=sample,
        options={"delta_softplus": (False, True)},
        hard=HARD,
        error_bound=error_bound,
        references=("gu2023, algorithm 2 and section 3.3", "ali2024, section 3.1", "dao2024, section 6", "higham2002, section 3.3"),
        sizes=(
            {"c": 1},
            {"n": 1},
            {"n": 16},
            {"c": 6, "G": 2},
            {"c": 6, "G": 6},
            {"G": 1},
            {"c": 40},
            {"batch": (2,)},
            {"batch": (2, 3), "G": 2},
        ),
        laws=(causal(CONTRACT, "u", "delta", "B", "C", "z"), linear(CONTRACT, "u", "state"), hand_off(CONTRACT)),
    ),
)
