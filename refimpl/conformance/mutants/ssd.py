"""Mistakes in state space duality: what chunks hand on, what the mask holds, what the limits limit."""

import ml_dtypes
import numpy as np

from refimpl.conformance.mutants import Mutant, edited
from refimpl.ops.state_space import ssd as chapter

_DECAY = "decay = np.exp(dt[..., t] * A)[..., None, None]  # (..., H, 1, 1)"
_ENTRY = "entry = (dt[..., t, None] * B[..., t, :])[..., :, None] * x[..., t, None, :]  # (..., H, n, p)"
_UPDATE = "        S = decay * S + entry\n        ys.append("
_READ = "        ys.append((C[..., t, :, None] * S).sum(axis=-2))  # (..., H, p)\n"
_SKIPPED = "    y = np.stack(ys, axis=-2) if ys else x  # (..., H, T, p)\n    y = _skip_and_gate(y, x, D, z)\n"
_STEP = """    dt = dt if dt_bias is None else dt + dt_bias[:, None]
    dt = softplus(dt) if dt_softplus else dt
    dt = np.minimum(np.maximum(dt, constant(dt_limit[0], dt)), constant(dt_limit[1], dt))
"""
_BIAS, _SOFTPLUS, _CLIP = _STEP.splitlines(keepends=True)
_SKIP = "    y = y if D is None else y + D[:, None, None] * x\n    return y if z is None else y * silu(z)\n"
_GROUPS = "np.repeat(v, H // max(G, 1), axis=-3)"


def _cut(call, start, stop):
    """The steps from `start` to `stop` of a call's arrays."""
    rows = {name: call[name][..., start:stop, :] for name in ("x", "B", "C", "z") if call.get(name) is not None}
    return call | rows | {"dt": call["dt"][..., start:stop], "return_state": True}


def _whole_chunks_only(x, dt, A, B, C, D=None, z=None, dt_bias=None, *, return_state=False, **options):
    """The final state is that of the last chunk of 16 that is full."""
    call = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias} | options
    T = x.shape[-2]
    y, last = chapter.ssd(**call, return_state=True)
    if T > 16:
        _, last = chapter.ssd(**_cut(call, 0, T - T % 16))
    return (y, last) if return_state else y


def _padding_fades(x, dt, A, B, C, D=None, z=None, dt_bias=None, *, return_state=False, state=None, **options):
    """The last chunk of 16 is padded with zeros of dt before bias and softplus, which are steps like any other."""
    y, last = chapter.ssd(x, dt, A, B, C, D, z, dt_bias, state=state, return_state=True, **options)
    if not return_state:
        return y
    pad = -x.shape[-2] % 16
    x, B, C = (np.zeros((*v.shape[:-2], pad, v.shape[-1]), v.dtype) for v in (x, B, C))
    _, faded = chapter.ssd(x, np.zeros((*dt.shape[:-1], pad), dt.dtype), A, B, C, dt_bias=dt_bias, state=last, return_state=True, **options)
    return y, faded


def _rounded_state(x, dt, A, B, C, D=None, z=None, dt_bias=None, *, return_state=False, **options):
    """The state kept in bfloat16 from step to step."""
    call = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias} | options
    y, S = chapter.ssd(**_cut(call, 0, 0))
    rows = [y]
    for t in range(x.shape[-2]):
        row, S = chapter.ssd(**_cut(call | {"state": S}, t, t + 1))
        S = S.astype(ml_dtypes.bfloat16).astype(S.dtype)
        rows.append(row)
    y = np.concatenate(rows, axis=-2)
    return (y, S) if return_state else y


def _transposed_state(*args, state=None, return_state=False, **options):
    """The state as (p, n), in and out."""
    if state is not None:
        *batch, n, p = state.shape
        state = np.swapaxes(np.reshape(state, (*batch, p, n)), -1, -2)
    y, S = chapter.ssd(*args, state=state, return_state=True, **options)
    return (y, np.swapaxes(S, -1, -2).copy()) if return_state else y


def _wrong(name, says, *edits, form=chapter.ssd, variant=False):
    return Mutant("ssd", name, says, edited(form, *edits), variant=variant)


def _wrong_gradient(name, says, *edits):
    return Mutant("ssd", name, says, edited(chapter.ssd_vjp, *edits), of_gradient=True)


MUTANTS = (
    _wrong(
        "exact_zoh",
        "the input is discretised exactly, (exp(dt A) - 1)/A · B, as papers write it: the contract, and Mamba's code, take dt·B",
        (
            _ENTRY,
            "rate = np.where(A == 0, np.ones_like(A), A)\n"
            "        exact = np.where(A == 0, dt[..., t], np.expm1(dt[..., t] * A) / rate)\n"
            "        entry = (exact[..., None] * B[..., t, :])[..., :, None] * x[..., t, None, :]",
        ),
        variant=True,
    ),
    _wrong(
        "rates_as_logarithms",
        "A is taken for the parameter A_log, and -exp(A) used: the contract takes A itself",
        (_DECAY, "decay = np.exp(dt[..., t] * -np.exp(A))[..., None, None]"),
    ),
    _wrong(
        "input_without_step",
        "the input is B·x: it is dt·B·x, so that a step of 0 takes nothing in (a listing that takes x already times dt expects that of its caller)",
        (_ENTRY, "entry = B[..., t, :][..., :, None] * x[..., t, None, :]"),
    ),
    _wrong(
        "input_decayed_too",
        "the decay between s and t includes step s itself, S_t = exp(dt A)(S_{t-1} + dt B x): L_ts is exp(A (dt_{s+1} + ... + dt_t)), and 1 for s = t",
        (_UPDATE, "        S = decay * (S + entry)\n        ys.append("),
    ),
    _wrong(
        "previous_decay",
        "the decay between s and t leaves out step t and counts step s: L_ts is exp(A (dt_{s+1} + ... + dt_t))",
        (_DECAY, "decay = np.exp(dt[..., max(t - 1, 0)] * A)[..., None, None]"),
    ),
    _wrong(
        "output_before_update",
        "y_t reads S_{t-1}: the output at t includes step t's own input",
        (_UPDATE, "        ys.append("),
        (_READ, _READ + "        S = decay * S + entry\n"),
    ),
    _wrong(
        "diagonal_excluded",
        "the mask of the dual form leaves out the diagonal: a step attends to itself, s <= t",
        ("M = _lower(_by_head(C @ _transposed(B), x) * L)", "M = np.tril(_by_head(C @ _transposed(B), x) * L, -1)"),
        form=chapter.ssd_quadratic,
    ),
    _wrong(
        "mask_after_exponential",
        "differences of running sums are exponentiated above the diagonal too, and then multiplied by a mask of zeros: they overflow there, and "
        "0·inf is NaN; mask with -inf before the exponential",
        (
            "L = np.exp(gate_exponents(log_decay, np.zeros_like(log_decay)))  # (..., H, T, T)",
            "sums = np.cumsum(log_decay, axis=-1)\n    L = np.exp(sums[..., :, None] - sums[..., None, :]) * np.tri(T, dtype=bool)",
        ),
        ("M = _lower(_by_head(C @ _transposed(B), x) * L)", "M = _by_head(C @ _transposed(B), x) * L"),
        form=chapter.ssd_quadratic,
    ),
    _wrong(
        "maps_exchanged",
        "B and C are exchanged: B (a key) maps the input into the state, C (a query) reads it out",
        (_ENTRY, _ENTRY.replace("B[", "C[")),
        (_READ, _READ.replace("C[", "B[")),
    ),
    _wrong("softplus_skipped", "dt_softplus is ignored: dt = clip(softplus(dt + dt_bias))", (_STEP, _BIAS + _CLIP)),
    _wrong("bias_after_softplus", "dt_bias is added after softplus: dt = clip(softplus(dt + dt_bias))", (_STEP, _SOFTPLUS + _BIAS + _CLIP)),
    _wrong("bias_ignored", "dt_bias is ignored: dt = clip(softplus(dt + dt_bias))", (_STEP, _SOFTPLUS + _CLIP)),
    _wrong(
        "clip_before_softplus",
        "dt_limit clips before softplus: it clips the step itself, softplus first",
        (_STEP, _BIAS + _CLIP + _SOFTPLUS),
    ),
    _wrong(
        "limits_ignored",
        "dt_limit is ignored: the step is clipped to it after softplus, and by default (0, inf) a negative step becomes 0",
        (_STEP, _BIAS + _SOFTPLUS),
    ),
    _wrong(
        "negative_steps_kept",
        "steps are clipped only where dt_limit is given: the default is (0, inf), and negative steps become 0",
        (_STEP, _BIAS + _SOFTPLUS + "    if tuple(dt_limit) != (0.0, np.inf):\n    " + _CLIP),
    ),
    _wrong(
        "upper_limit_only",
        "only the upper limit of dt_limit clips: the step lies between both",
        (_STEP, _BIAS + _SOFTPLUS + "    dt = np.minimum(dt, constant(dt_limit[1], dt))\n"),
    ),
    _wrong("skip_forgotten", "D is ignored: y_t has a term D·x_t", (_SKIP, "    return y if z is None else y * silu(z)\n")),
    _wrong(
        "skip_of_step_input",
        "the skip connection carries D·dt·x: it carries D·x, the input itself",
        (_SKIPPED, _SKIPPED.replace("(y, x, D, z)", "(y, dt[..., None] * x, D, z)")),
    ),
    _wrong(
        "skip_per_channel",
        "D is laid along the channels: it has one number for each head",
        (_SKIP, _SKIP.replace("D[:, None, None] * x", "np.resize(D, x.shape[-1]) * x")),
    ),
    _wrong(
        "gate_before_skip",
        "the gate is applied before D·x is added: silu(z) multiplies SᵀC + D·x",
        (_SKIP, "    y = y if z is None else y * silu(z)\n    return y if D is None else y + D[:, None, None] * x\n"),
    ),
    _wrong(
        "gate_ignored",
        "z is ignored: the output is multiplied by silu(z)",
        (_SKIP, "    return y if D is None else y + D[:, None, None] * x\n"),
    ),
    _wrong("sigmoid_gate", "the gate is σ(z): it is silu(z) = z σ(z)", (_SKIP, _SKIP.replace("silu(z)", "sigmoid(z)"))),
    _wrong(
        "groups_interleaved",
        "head h reads group h mod G of B and C: it reads group h // (H/G), groups being blocks of heads",
        (_GROUPS, "np.concatenate([v] * (H // max(G, 1)), axis=-3)"),
    ),
    _wrong(
        "first_group_only",
        "all heads read the first group of B and C: head h reads group h // (H/G)",
        (f"v if G == H else {_GROUPS}", "np.repeat(v[..., :1, :, :], H, axis=-3)"),
    ),
    _wrong(
        "rate_of_first_head",
        "all heads have the rate of the first: A has one for each",
        (_DECAY, "decay = np.exp(dt[..., t] * A[:1])[..., None, None]"),
    ),
    _wrong(
        "state_ignored",
        "the initial state is ignored: S_0 = exp(dt_0 A)·state + dt_0 B_0 x_0ᵀ",
        ("else np.broadcast_to(state, shape)\n", "else np.zeros_like(x, shape=shape)\n"),
    ),
    Mutant(
        "ssd",
        "state_transposed",
        "the state is taken and given as (p, n), as Mamba's code has it: here it is (n, p)",
        lambda: _transposed_state,
    ),
    _wrong(
        "state_reset_at_chunks",
        "the state starts from zero at every chunk: it is handed on from chunk to chunk",
        ("            entering[j] = last\n", "            entering[j] = last if j == 0 else 0 * last\n"),
        form=chapter.ssd_chunked,
    ),
    _wrong(
        "carry_not_decayed",
        "the state is not decayed over a chunk on its way to the next: a chunk's step is S <- exp(A Σ dt) S + what it adds",
        ("last = since[j, -1] * last + added[j]", "last = last + added[j]"),
        form=chapter.ssd_chunked,
    ),
    _wrong(
        "additions_not_decayed",
        "what a chunk's steps add to the state is not decayed to the chunk's end: B_s is multiplied by exp(A (dt_{s+1} + ... + dt_end))",
        ("added = _transposed(decay[..., -1, :, None] * into) @ values", "added = _transposed(into) @ values"),
        form=chapter.ssd_chunked,
    ),
    _wrong(
        "entering_state_not_decayed",
        "the state that enters a chunk is read as it was at the chunk's start: C_t reads it times exp(A (dt_start + ... + dt_t))",
        ("(since * out) @ entering", "out @ entering"),
        form=chapter.ssd_chunked,
    ),
    _wrong(
        "entering_state_a_step_late",
        "the state that enters a chunk is read without the decay of the step that reads it: the sum runs to t, with t",
        ("(since * out) @ entering", "(np.exp(np.cumsum(log_decay, axis=-1) - log_decay)[..., None] * out) @ entering"),
        form=chapter.ssd_chunked,
    ),
    Mutant(
        "ssd",
        "state_of_whole_chunks",
        "the final state is that after the last whole chunk: the steps of a shorter last chunk belong to it",
        lambda: _whole_chunks_only,
    ),
    Mutant(
        "ssd",
        "padding_fades_state",
        "the last chunk is padded with zeros before bias, softplus and limits, so that padding steps fade the final state: pad with steps of 0",
        lambda: _padding_fades,
    ),
    Mutant(
        "ssd",
        "state_in_bfloat16",
        "the state is rounded to bfloat16 at every step: it is kept in float32 at least, and results are rounded once, at the end",
        lambda: _rounded_state,
    ),
    _wrong_gradient(
        "gradient_without_gate", "the gradient does not pass through the gate: dp = dy·silu(z)", ("dy if z is None else dy * silu(z)", "dy")
    ),
    _wrong_gradient(
        "gradient_of_gate_without_skip",
        "the gradient of z sees SᵀC without D·x: both are gated",
        ("_skip_and_gate(_over_time(read, x, -2), x, D, None)", "_skip_and_gate(_over_time(read, x, -2), x, None, None)"),
    ),
    _wrong_gradient(
        "gradient_of_rates_without_step",
        "the gradient of A lacks dt: dA = Σ_t dt_t r_t",
        ("dC, dt[..., t] * r, read", "dC, r, read"),
    ),
    _wrong_gradient(
        "gradient_of_step_without_input",
        "the gradient of dt sees only the decay: dt also scales the input dt·B·x",
        ("A * r + (B[..., t, :] * from_input).sum(axis=-1)", "A * r"),
    ),
    _wrong_gradient(
        "gradient_of_step_without_decay",
        "the gradient of dt sees only the input: dt also sets the decay exp(dt A)",
        ("A * r + (B[..., t, :] * from_input).sum(axis=-1)", "(B[..., t, :] * from_input).sum(axis=-1)"),
    ),
    _wrong_gradient(
        "gradient_without_softplus",
        "the gradient of dt lacks softplus' derivative, σ(dt + dt_bias)",
        ("d_raw = d_dt * sigmoid(raw) if dt_softplus else d_dt", "d_raw = d_dt"),
    ),
    _wrong_gradient(
        "gradient_through_limits",
        "the gradient of dt passes straight through the limits: it is 0 where the step was clipped",
        ("inside = (low <= unclipped) & (unclipped <= high)", "inside = low <= high"),
    ),
    _wrong_gradient(
        "gradient_of_input_without_skip",
        "the gradient of x lacks the skip connection: D·dp",
        ('"x": dx if D is None else dx + D[:, None, None] * dp', '"x": dx'),
    ),
    _wrong_gradient(
        "gradient_of_maps_from_one_head",
        "the gradients of B and C hold the last head of a group only (written, not added): sum over all heads that read them",
        ("T, n).sum(axis=-3)", "T, n)[..., -1, :, :]"),
    ),
    _wrong_gradient(
        "gradient_of_decay_from_eight_heads",
        "the gradient of A is there for the first eight heads only: for all",
        ("_over_time(dA, dt, -1).sum(axis=-1),", "_over_time(dA, dt, -1).sum(axis=-1) * (np.arange(A.shape[0]) < 8),"),
    ),
    _wrong_gradient(
        "gradient_own_decay",
        "the adjoint recurrence decays by exp(dt_t A) before step t is added: R_t meets the decay of the step after, exp(dt_{t+1} A)",
        ("        R = decay[..., t, None, None] * R\n", ""),
        ("        R = R + C[..., t, :, None] * dp", "        R = decay[..., t, None, None] * R + C[..., t, :, None] * dp"),
    ),
    _wrong_gradient(
        "dstate_ignored",
        "the cotangent of the final state is ignored: the adjoint recurrence starts from it",
        ("np.zeros_like(S) if dstate is None else np.broadcast_to(dstate, S.shape)", "np.zeros_like(S)"),
    ),
    _wrong_gradient(
        "gradient_forgets_initial_state",
        "the gradients of A and dt take the state before the first step to be zero: it decays like any other",
        ("r = decay[..., t] * (R * states[t])", "r = decay[..., t] * (R * states[t] * (t > 0))"),
    ),
)
