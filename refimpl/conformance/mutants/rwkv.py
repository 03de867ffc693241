"""Mistakes in RWKV's memories: WKV of RWKV-4, -6 and -7."""

import numpy as np

from refimpl.conformance.mutants import Mutant, edited
from refimpl.ops.linear_attention import wkv, wkv6, wkv7

_WRITE = "before = _join(before, w, State(v_t, np.ones_like(v_t), k_t))"
_WKV = (
    Mutant(
        "wkv",
        "decay_exponentiated",
        "a step leaves exp(-exp(w)): w is taken for the logarithm of the decay, as checkpoints store it (time_decay); the contract's w is "
        "the decay itself, and exp(-w) is left",
        edited(wkv.wkv, (_WRITE, _WRITE.replace("before, w", "before, np.exp(w)"))),
    ),
    Mutant(
        "wkv",
        "log_decay",
        "a step leaves exp(w): w is taken for a log-decay, as wkv6 and wkv7 do; wkv takes w > 0, and exp(-w) is left",
        edited(wkv.wkv, (_WRITE, _WRITE.replace("before, w", "before, -w"))),
    ),
    Mutant(
        "wkv",
        "decay_is_w",
        "a step leaves w, not exp(-w): its logarithm is taken once too often",
        edited(wkv.wkv, (_WRITE, _WRITE.replace("before, w", "before, -np.log(w)"))),
    ),
    Mutant(
        "wkv",
        "bonus_on_all_steps",
        "u is written to the memory with the key, so every step counts e^u times as much; it is for the current step alone",
        edited(wkv.wkv, (_WRITE, _WRITE.replace("k_t))", "u + k_t))"))),
    ),
    Mutant(
        "wkv",
        "denominator_bounded",
        "the denominator stops at 50; where hardly anything decays it counts the steps, without end",
        edited(wkv.wkv, (_WRITE, _WRITE + "; before = before._replace(den=np.minimum(before.den, 50))")),
    ),
    Mutant(
        "wkv",
        "bonus_forgotten",
        "the current step counts e^k; the contract gives it a bonus, e^(u+k)",
        edited(wkv.wkv, ("    bonus = u + k\n", "    bonus = 0 * u + k\n")),
    ),
    Mutant(
        "wkv",
        "bonus_in_denominator_forgotten",
        "the denominator counts the current step as e^k, the numerator as e^(u+k): no longer a mean",
        edited(wkv.wkv, ("/ (past * before.den + present)", "/ (past * before.den + np.exp(k - finite_or_zero(top)))")),
    ),
    Mutant(
        "wkv",
        "current_missing_in_denominator",
        "the denominator is that of the steps before; the current step's e^(u+k) belongs to it too",
        edited(wkv.wkv, ("/ (past * before.den + present)", "/ np.where(before.den > 0, past * before.den, present)")),
    ),
    Mutant(
        "wkv",
        "output_after_update",
        "y_t is read after step t was written, which counts it twice and fades what was before; the contract reads the memory of the "
        "steps before t",
        edited(
            wkv.wkv,
            ("        ys.append(_read(k_t, v_t, u, before))\n", ""),
            (_WRITE, _WRITE + "\n        ys.append(_read(k_t, v_t, u, before))"),
        ),
    ),
    Mutant(
        "wkv",
        "no_bonus_step",
        "y_t is num/den after step t was written: the current step counts e^k and everything before has faded by one more step",
        edited(
            wkv.wkv,
            ("        ys.append(_read(k_t, v_t, u, before))\n", ""),
            (_WRITE, _WRITE + "\n        ys.append(before.num / before.den)"),
        ),
    ),
    Mutant(
        "wkv",
        "own_decay",
        "a step fades before it is first read, (t - i) w: the contract has (t - 1 - i) w, so the step just before counts in full",
        edited(wkv.wkv_parallel, ("lag = steps[:, None] - 1 - steps[:T]", "lag = steps[:, None] - steps[:T]")),
    ),
    Mutant(
        "wkv",
        "max_not_carried",
        "num and den are handed on without their unit e^max: the next call reads them as if max were 0",
        edited(
            wkv.wkv,
            (
                "State(*(np.broadcast_to(x, channels) for x in state))",
                "State(*(np.broadcast_to(x, channels) for x in (*state[:2], 0 * state[1])))",
            ),
        ),
    ),
    Mutant(
        "wkv",
        "max_without_decay",
        "the maximum is max(max, k) without the decay: y may survive that, but max is not the largest exponent any more, and what is "
        "in its units underflows in the end",
        edited(wkv.wkv, ("m = np.maximum(faded, later.max)", "m = np.maximum(earlier.max, later.max)")),
    ),
    Mutant(
        "wkv",
        "old_units",
        "the maximum moves, but num and den stay in the units of the old one: only e^-w is applied to them",
        edited(wkv.wkv, ("np.exp(faded - finite_or_zero(m)), np.exp(later.max", "np.exp(-decay) * np.ones_like(m), np.exp(later.max")),
    ),
    Mutant(
        "wkv",
        "not_stabilised",
        "keys are exponentiated as they are (max = 0): overflows for large keys",
        edited(
            wkv.wkv,
            ("m = np.maximum(faded, later.max)", "m = np.zeros_like(faded)"),
            (
                "top = np.maximum(before.max, bonus)\n    past, present = np.exp(before.max - finite_or_zero(top)), "
                "np.exp(bonus - finite_or_zero(top))\n    return",
                "top = np.zeros_like(bonus)\n    past, present = np.exp(before.max - finite_or_zero(top)), "
                "np.exp(bonus - finite_or_zero(top))\n    return",
            ),
        ),
    ),
    Mutant(
        "wkv",
        "keys_clipped",
        "keys are clipped to at most 60 before exp, in the way of an unstabilised code; the contract does not clip",
        edited(wkv.wkv, ("    ys = []\n", "    k = np.minimum(k, 60)\n    ys = []\n")),
    ),
    Mutant(
        "wkv",
        "den_does_not_decay",
        "den <- den + e^k: the denominator's memory does not fade, so the weights do not sum to 1",
        edited(wkv.wkv, ("old * earlier.den + new * later.den", "old * np.exp(decay) * earlier.den + new * later.den")),
    ),
    Mutant(
        "wkv",
        "eps_in_denominator",
        "something is added to the denominator to keep it from 0; it is at least 1 in its own units, and nothing is to be added",
        edited(wkv.wkv, ("/ (past * before.den + present)", "/ (past * before.den + present + 0.015625)")),
    ),
    Mutant(
        "wkv",
        "max_starts_at_0",
        "max starts at 0; the contract starts at -∞, and then max is the largest exponent seen",
        edited(wkv.wkv, ("np.full_like(k, -np.inf, shape=channels)", "np.full_like(k, 0, shape=channels)")),
        variant=True,
    ),
    Mutant(
        "wkv",
        "initial_state_ignored",
        "the initial state is not read",
        edited(wkv.wkv, ("    k, v, before = _prepare(k, v, state)\n    ys = []", "    k, v, before = _prepare(k, v, None)\n    ys = []")),
    ),
    Mutant(
        "wkv",
        "run_fades_by_one_step",
        "in the scan a run fades by w when a longer run is joined to it; it has to fade by as many w as that one has steps",
        edited(wkv.wkv_scan, ("reach * w, ", "w, ")),
    ),
    Mutant(
        "wkv",
        "grad_bonus_of_memory",
        "the gradient of u lacks the denominator's part: v in place of v - y",
        edited(wkv.wkv_vjp, ("        du = du + d_bonus\n", "        du = du + present * g * v_t\n")),
        of_gradient=True,
    ),
    Mutant(
        "wkv",
        "grad_u_of_last_step",
        "the gradient of u is that of one step; u acts on every step, and the gradients sum",
        edited(wkv.wkv_vjp, ("        du = du + d_bonus\n", "        du = d_bonus\n")),
        of_gradient=True,
    ),
    Mutant(
        "wkv",
        "grad_w_sign",
        "the gradient of w has the sign of that of the log-decay -w",
        edited(wkv.wkv_vjp, ("dw = dw - d_old", "dw = dw + d_old")),
        of_gradient=True,
    ),
    Mutant(
        "wkv",
        "grad_w_of_log_w",
        "the gradient of w is that of log w (time_decay): a factor w too many",
        edited(wkv.wkv_vjp, ("dw = dw - d_old", "dw = dw - d_old * w")),
        of_gradient=True,
    ),
    Mutant(
        "wkv",
        "grad_bonus_key_forgotten",
        "the gradient of k has only what goes through the memory; k_t also acts on y_t itself, in e^(u+k)",
        edited(wkv.wkv_vjp, ("dks.append(d_new + d_bonus)", "dks.append(d_new)")),
        of_gradient=True,
    ),
    Mutant(
        "wkv",
        "grad_stabiliser_detached",
        "the maximum is held constant in the gradient (stop_gradient): wrong for cotangents of the final state, which is in its units",
        edited(wkv.wkv_vjp, ("to_m = dm - d_old - d_new", "to_m = np.zeros_like(dm)")),
        of_gradient=True,
    ),
    Mutant(
        "wkv",
        "grad_final_state_ignored",
        "the cotangent of the final state is not used",
        edited(wkv.wkv_vjp, ("(np.zeros_like(first.num),) * 3 if dstate is None else dstate", "(np.zeros_like(first.num),) * 3")),
        of_gradient=True,
    ),
)

_READ_6 = "        outputs.append((r_t[..., None, :] @ S)[..., 0, :] + own[..., None] * v_t)\n"
_WRITE_6 = "        S = np.exp(w[..., t, :, None]) * S + k_t[..., :, None] * v_t[..., None, :]  # (..., H, d, e)\n"
_WKV6 = (
    Mutant(
        "wkv6",
        "decay_exponentiated_twice",
        "a step leaves exp(-exp(w)), as the author's kernel does with its own w; the contract's w is the log-decay, and exp(w) is left",
        edited(wkv6.wkv6, (_WRITE_6, _WRITE_6.replace("np.exp(w[..., t, :, None])", "np.exp(-np.exp(w[..., t, :, None]))"))),
        variant=True,
    ),
    Mutant(
        "wkv6",
        "decay_not_exponentiated",
        "S is multiplied by w itself; w is a log-decay, and exp(w) is left",
        edited(wkv6.wkv6, (_WRITE_6, _WRITE_6.replace("np.exp(w[..., t, :, None])", "w[..., t, :, None]"))),
    ),
    Mutant(
        "wkv6",
        "decay_sign",
        "a step leaves exp(-w), as if w were the decay of RWKV-4; wkv6 takes the log-decay, and exp(w) is left",
        edited(wkv6.wkv6, (_WRITE_6, _WRITE_6.replace("np.exp(w[", "np.exp(-w["))),
    ),
    Mutant(
        "wkv6",
        "bonus_forgotten",
        "the current step counts for itself as it is (u = 1); the contract weights its key channels by u",
        edited(wkv6.wkv6, ("own = (r_t * u * k_t).sum(axis=-1)", "own = (r_t * k_t).sum(axis=-1)")),
    ),
    Mutant(
        "wkv6",
        "bonus_exponentiated",
        "the current step counts e^u, as in RWKV-4, where u stands in an exponent; here u is a factor",
        edited(wkv6.wkv6, ("own = (r_t * u * k_t).sum(axis=-1)", "own = (r_t * np.exp(u) * k_t).sum(axis=-1)")),
    ),
    Mutant(
        "wkv6",
        "bonus_on_all_steps",
        "u∘k is written to the memory in place of k, so every later step sees the bonus; it is for the current step alone",
        edited(wkv6.wkv6, (_WRITE_6, _WRITE_6.replace("+ k_t[..., :, None]", "+ (u * k_t)[..., :, None]"))),
    ),
    Mutant(
        "wkv6",
        "bonus_added_to_memory",
        "(1 + u)∘k: the output is read after step t was written, and u added on top of that; u stands in place of 1",
        edited(wkv6.wkv6, ("own = (r_t * u * k_t).sum(axis=-1)", "own = (r_t * (1 + u) * k_t).sum(axis=-1)")),
    ),
    Mutant(
        "wkv6",
        "bonus_per_value_channel",
        "u weights the channels of the output; it belongs to those of the key, inside the product r·k",
        edited(
            wkv6.wkv6,
            ("own = (r_t * u * k_t).sum(axis=-1)", "own = (r_t * k_t).sum(axis=-1)"),
            ("own[..., None] * v_t)", "own[..., None] * v_t * np.resize(u, (*u.shape[:-1], v.shape[-1])))"),
        ),
    ),
    Mutant(
        "wkv6",
        "output_after_update",
        "o_t is read after step t was written, without a bonus, as in plain linear attention; the contract reads S_{t-1}, and u∘k for step t",
        edited(wkv6.wkv6, (_READ_6, ""), (_WRITE_6, _WRITE_6 + "        outputs.append((r_t[..., None, :] @ S)[..., 0, :])\n")),
    ),
    Mutant(
        "wkv6",
        "decay_before_reading",
        "the decay of step t acts before o_t is read; the contract reads S_{t-1} as the step before left it",
        edited(
            wkv6.wkv6,
            (_READ_6, "        S = np.exp(w[..., t, :, None]) * S\n" + _READ_6),
            (_WRITE_6, _WRITE_6.replace("np.exp(w[..., t, :, None]) * S", "S")),
        ),
    ),
    Mutant(
        "wkv6",
        "input_decays_at_once",
        "a step's own decay acts on what it writes, S <- e^w (S + k vᵀ); it acts on what was there before",
        edited(
            wkv6.wkv6,
            (_WRITE_6, "        S = np.exp(w[..., t, :, None]) * (S + k_t[..., :, None] * v_t[..., None, :])\n"),
        ),
    ),
    Mutant(
        "wkv6",
        "r_and_k_swapped",
        "r and k have changed places: the memory is written under r and read with k",
        edited(wkv6.wkv6, ("    outputs = []\n    for t in range(r", "    r, k = k, r\n    outputs = []\n    for t in range(r")),
    ),
    Mutant(
        "wkv6",
        "scaled_by_root_d",
        "o carries a factor 1/√d, as fla's code does unless told otherwise; RWKV-6 does not scale",
        edited(
            wkv6.wkv6,
            (
                "    o = np.stack(outputs, axis=-2) if outputs else v  # (..., H, T, e)",
                "    o = np.stack(outputs, axis=-2) / np.sqrt(r.shape[-1] + 0 * v) if outputs else v",
            ),
        ),
        variant=True,
    ),
    Mutant(
        "wkv6",
        "state_transposed",
        "the state is taken and given as Sᵀ, rows following values; the contract's S has a row for each key channel",
        lambda: _transposed_state,
        variant=True,
    ),
    Mutant(
        "wkv6",
        "state_reset_at_chunks",
        "a chunk does not read the memory of the chunks before it",
        edited(wkv6.wkv6_chunkwise, ("entering.append(times_exp(S, peak[..., c, :, None]))", "entering.append(0 * S)")),
    ),
    Mutant(
        "wkv6",
        "initial_state_ignored",
        "the initial state is not read",
        edited(
            wkv6.wkv6,
            ("    r, k, v, w, S = aligned(state, r, k, v, w)\n    outputs", "    r, k, v, w, S = aligned(None, r, k, v, w)\n    outputs"),
        ),
    ),
    Mutant(
        "wkv6",
        "grad_u_of_first_step",
        "the gradient of u is that of one step; u acts on every step, and the gradients sum",
        edited(wkv6.wkv6_vjp, ("du = du + c * r_t * k_t", "du = c * r_t * k_t")),
        of_gradient=True,
    ),
    Mutant(
        "wkv6",
        "grad_w_of_decay",
        "the gradient of w is that of the decay e^w: the factor e^w is missing",
        edited(wkv6.wkv6_vjp, ("dw = (decay * dS * S).sum(axis=-1)", "dw = (dS * S).sum(axis=-1)")),
        of_gradient=True,
    ),
    Mutant(
        "wkv6",
        "grad_w_of_next_state",
        "the gradient of w is taken with S_t in place of e^w S_{t-1}: it counts what step t wrote, which had not decayed",
        edited(
            wkv6.wkv6_vjp,
            ("dw = (decay * dS * S).sum(axis=-1)", "dw = (dS * (decay * S + k_t[..., :, None] * v_t[..., None, :])).sum(axis=-1)"),
        ),
        of_gradient=True,
    ),
    Mutant(
        "wkv6",
        "grad_bonus_not_in_v",
        "the gradient of v lacks what the current step's own term gives to it",
        edited(wkv6.wkv6_vjp, ("dv + (r_t * u * k_t).sum(axis=-1, keepdims=True) * do", "dv")),
        of_gradient=True,
    ),
    Mutant(
        "wkv6",
        "grad_final_state_ignored",
        "the cotangent of the final state is not used",
        edited(wkv6.wkv6_vjp, ("np.zeros_like(S) if dstate is None else dstate", "np.zeros_like(S)")),
        of_gradient=True,
    ),
)


def _transposed_state(r, k, v, w, u, *, state=None, return_state=False):
    if r.shape[-1] == v.shape[-1] and state is not None:
        state = np.swapaxes(state, -1, -2)
    result = wkv6.wkv6(r, k, v, w, u, state=state, return_state=return_state)
    return (result[0], np.swapaxes(result[1], -1, -2)) if return_state and r.shape[-1] == v.shape[-1] else result


_STEP_7 = "return np.exp(w)[..., None] * S + b[..., :, None] * p[..., None, :] + k[..., :, None] * v[..., None, :]"
_READ_7 = "outputs.append((r[..., t, None, :] @ S)[..., 0, :])  # (..., H, e)\n"
_UNPACK_7 = "    r, w, v, k, a, b, S = aligned(state, r, w, v, k, a, b)\n    outputs"
_WKV7 = (
    Mutant(
        "wkv7",
        "decay_exponentiated_twice",
        "a step leaves exp(-exp(w)), as the author's kernels do with their own w; the contract's w is the log-decay, and exp(w) is left",
        edited(wkv7.wkv7, (_STEP_7, _STEP_7.replace("np.exp(w)", "np.exp(-np.exp(w))"))),
        variant=True,
    ),
    Mutant(
        "wkv7",
        "decay_not_exponentiated",
        "S is multiplied by w itself; w is a log-decay, and exp(w) is left",
        edited(wkv7.wkv7, (_STEP_7, _STEP_7.replace("np.exp(w)", "w"))),
    ),
    Mutant(
        "wkv7",
        "decay_sign",
        "a step leaves exp(-w), as if w were the decay of RWKV-4; wkv7 takes the log-decay, and exp(w) is left",
        edited(wkv7.wkv7, (_STEP_7, _STEP_7.replace("np.exp(w)", "np.exp(-w)"))),
    ),
    Mutant(
        "wkv7",
        "a_and_b_swapped",
        "a and b have changed places: b is read and a is added; the contract reads with a, aᵀS, and adds that under b",
        edited(wkv7.wkv7, (_UNPACK_7, _UNPACK_7.replace("\n    outputs", "\n    a, b = b, a\n    outputs"))),
    ),
    Mutant(
        "wkv7",
        "r_and_k_swapped",
        "r and k have changed places: values are written under r and read with k",
        edited(wkv7.wkv7, (_UNPACK_7, _UNPACK_7.replace("\n    outputs", "\n    r, k = k, r\n    outputs"))),
    ),
    Mutant(
        "wkv7",
        "decay_before_removal",
        "aᵀS is read from the memory after its decay, as the gated delta rule does; the contract reads S_{t-1} as it was",
        edited(
            wkv7.wkv7,
            (
                "    p = (a[..., None, :] @ S)[..., 0, :]  # (..., H, e)\n    return",
                "    p = (a[..., None, :] @ (np.exp(w)[..., None] * S))[..., 0, :]\n    return",
            ),
        ),
    ),
    Mutant(
        "wkv7",
        "decay_after_update",
        "the decay acts on all of S_t, what step t wrote and moved included; it acts on S_{t-1} alone",
        edited(
            wkv7.wkv7,
            (_STEP_7, "return np.exp(w)[..., None] * (S + b[..., :, None] * p[..., None, :] + k[..., :, None] * v[..., None, :])"),
        ),
    ),
    Mutant(
        "wkv7",
        "removal_sign",
        "b (aᵀS) is subtracted, as if a were κ; the contract adds it, and RWKV-7 hands in a = -κ",
        edited(wkv7.wkv7, (_STEP_7, _STEP_7.replace("+ b[", "- b["))),
    ),
    Mutant(
        "wkv7",
        "removal_forgotten",
        "b (aᵀS) is missing: that is a linear attention with decay (GLA)",
        edited(wkv7.wkv7, (_STEP_7, _STEP_7.replace("b[..., :, None] * p[..., None, :]", "0 * b[..., :, None] * p[..., None, :]"))),
    ),
    Mutant(
        "wkv7",
        "output_before_update",
        "o_t is read from S_{t-1}, as in wkv6; wkv7 reads S_t, which holds step t",
        edited(
            wkv7.wkv7,
            (
                "        S = _step(S, w[..., t, :], k[..., t, :], v[..., t, :], a[..., t, :], b[..., t, :])\n        outputs",
                "        outputs",
            ),
            (_READ_7, _READ_7 + "        S = _step(S, w[..., t, :], k[..., t, :], v[..., t, :], a[..., t, :], b[..., t, :])\n"),
        ),
    ),
    Mutant(
        "wkv7",
        "read_on_the_value_side",
        "r is multiplied to the columns of S, S r for Sᵀ r (rows of S follow keys, columns follow values)",
        edited(
            wkv7.wkv7,
            (_READ_7, "outputs.append((r[..., t, None, :] @ (np.swapaxes(S, -1, -2) if r.shape[-1] == v.shape[-1] else S))[..., 0, :])\n"),
        ),
    ),
    Mutant(
        "wkv7",
        "transition_transposed",
        "(S a) is read over the values and b added across them: the transition stands on the wrong side of S",
        edited(
            wkv7.wkv7,
            (
                _STEP_7,
                "p = (S @ a[..., :, None])[..., 0] if a.shape[-1] == v.shape[-1] else p\n    "
                "return np.exp(w)[..., None] * S + (p[..., :, None] * b[..., None, :] if a.shape[-1] == v.shape[-1] else "
                "b[..., :, None] * p[..., None, :]) + k[..., :, None] * v[..., None, :]",
            ),
        ),
    ),
    Mutant(
        "wkv7",
        "scaled_by_root_d",
        "o carries a factor 1/√d, as fla's code for this recurrence does unless told otherwise; RWKV-7 does not scale",
        edited(
            wkv7.wkv7, (_READ_7, "outputs.append((r[..., t, None, :] / np.sqrt(r.shape[-1] + 0 * r[..., t, None, :]) @ S)[..., 0, :])\n")
        ),
        variant=True,
    ),
    Mutant(
        "wkv7",
        "chunk_system_not_solved",
        "in a chunk aᵀS is read as if nothing of the chunk had been moved: P̂ is the right side of the triangular system, which has to be solved",
        edited(wkv7.wkv7_chunkwise, ("solved = solve_unit_lower(-matched(a, b, before, own=False), right)", "solved = right")),
    ),
    Mutant(
        "wkv7",
        "state_reset_at_chunks",
        "a chunk does not read the memory of the chunks before it",
        edited(wkv7.wkv7_chunkwise, ("entering.append(times_exp(S, peak[..., c, :, None]))", "entering.append(0 * S)")),
    ),
    Mutant(
        "wkv7",
        "initial_state_ignored",
        "the initial state is not read",
        edited(wkv7.wkv7, (_UNPACK_7, _UNPACK_7.replace("aligned(state", "aligned(None"))),
    ),
    Mutant(
        "wkv7",
        "grad_without_removal",
        "the cotangent is handed back through the decay alone; b aᵀ is part of the transition, and gives a (bᵀdS)",
        edited(wkv7.wkv7_vjp, ("dS = dS + a_t[..., :, None] * dp[..., None, :]", "dS = dS + 0 * a_t[..., :, None] * dp[..., None, :]")),
        of_gradient=True,
    ),
    Mutant(
        "wkv7",
        "grad_a_and_b_swapped",
        "the gradients of a and b have changed places",
        edited(wkv7.wkv7_vjp, ("steps.append((dr, dw, dk, dv, da, db))", "steps.append((dr, dw, dk, dv, db, da))")),
        of_gradient=True,
    ),
    Mutant(
        "wkv7",
        "grad_w_of_decay",
        "the gradient of w is that of the decay e^w: the factor e^w is missing",
        edited(wkv7.wkv7_vjp, ("dw = (dS * S).sum(axis=-1)", "dw = (dS * S).sum(axis=-1) / np.exp(w[..., t, :])")),
        of_gradient=True,
    ),
    Mutant(
        "wkv7",
        "grad_p_held_constant",
        "aᵀS is held constant in the gradient (stop_gradient): a gets none",
        edited(wkv7.wkv7_vjp, ("da = (S @ dp[..., None])[..., 0]", "da = 0 * (S @ dp[..., None])[..., 0]")),
        of_gradient=True,
    ),
    Mutant(
        "wkv7",
        "grad_final_state_ignored",
        "the cotangent of the final state is not used",
        edited(wkv7.wkv7_vjp, ("np.zeros_like(S) if dstate is None else dstate", "np.zeros_like(S)")),
        of_gradient=True,
    ),
)

MUTANTS = (*_WKV, *_WKV6, *_WKV7)
