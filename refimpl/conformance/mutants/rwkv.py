"""Mistakes in RWKV's memories: WKV of RWKV-4, -6 and -7."""

from refimpl.conformance.mutants import Mutant, edited
from refimpl.ops.linear_attention import wkv

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
        "bonus_forgotten",
        "the current step counts e^k; the contract gives it a bonus, e^(u+k)",
        edited(wkv.wkv, ("    bonus = u + k\n", "    bonus = 0 * u + k\n")),
    ),
    Mutant(
        "wkv",
        "bonus_in_denominator_forgotten",
        "the denominator counts the current step as e^k, the numerator as e^(u+k): no longer a mean",
        edited(
            wkv.wkv, ("/ (past * before.den + present)", "/ (past * before.den + np.exp(k - finite_or_zero(top)))")
        ),
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
        edited(wkv.wkv, ("State(*(np.broadcast_to(x, channels) for x in state))", "State(*(np.broadcast_to(x, channels) for x in (*state[:2], 0 * state[1])))")),
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
            ("top = np.maximum(before.max, bonus)\n    past, present = np.exp(before.max - finite_or_zero(top)), np.exp(bonus - finite_or_zero(top))\n    return", "top = np.zeros_like(bonus)\n    past, present = np.exp(before.max - finite_or_zero(top)), np.exp(bonus - finite_or_zero(top))\n    return"),
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

MUTANTS = _WKV
