"""Mistakes in linear attention, its decays, delta rules and feature maps."""

import functools

import numpy as np

from refimpl.conformance.mutants import Mutant, edited
from refimpl.ops.linear_attention import linear_attention as la
from refimpl.ops.linear_attention import linear_attention_gradient as gradient
from refimpl.ops.linear_attention.feature_maps import FeatureMap, feature_map_of

_RECURRENT, _PARALLEL, _CHUNKWISE, _VJP = la.linear_attention, la.linear_attention_parallel, la.linear_attention_chunkwise, gradient.linear_attention_vjp


def _called_with(change):
    """The definition, its arguments changed first: ``change(call) -> call``."""

    def build():
        @functools.wraps(_RECURRENT)
        def mutant(q, k, v, **options):
            return _RECURRENT(**change({"q": np.asarray(q), "k": np.asarray(k), "v": np.asarray(v)} | options))

        return mutant

    return build


def _groups_interleaved(call):
    """Head h reads group h % Hkv."""
    q, k = call["q"], call["k"]
    if q.ndim < 3 or not k.shape[-3]:
        return call
    Hq, Hkv = q.shape[-3], k.shape[-3]
    repeat = np.arange(Hq) % Hkv

    def of_query_heads(x, axis):
        return None if x is None else np.take(x, repeat, axis=axis)

    changed = {n: of_query_heads(call.get(n), -3) for n in ("k", "v")}
    changed["beta"] = of_query_heads(call.get("beta"), -2)
    decay = call.get("decay")
    changed["decay"] = of_query_heads(decay, -3 if decay is not None and decay.ndim == q.ndim else -2)
    state = call.get("state")
    if isinstance(state, tuple):
        changed["state"] = type(state)(of_query_heads(state[0], -3), of_query_heads(state[1], -2))
    else:
        changed["state"] = of_query_heads(state, -3)
    return call | changed


def _interleaved():
    """The state has as many heads as k, so it comes from the right heads: only the reading is wrong."""

    @functools.wraps(_RECURRENT)
    def mutant(q, k, v, **options):
        call = {"q": np.asarray(q), "k": np.asarray(k), "v": np.asarray(v)} | options
        if not options.get("return_state"):
            return _RECURRENT(**_groups_interleaved(call))
        return _RECURRENT(**_groups_interleaved(call))[0], _RECURRENT(**call)[1]

    return mutant


def _mapped(**others):
    """The definition with other feature maps."""

    def change(call):
        option = call.get("feature_map")
        if option not in others:
            return call
        phi = feature_map_of(option)
        return call | {"feature_map": FeatureMap(lambda x: others[option](phi, x), phi.vjp)}

    return _called_with(change)


def _taylor_without_root(phi, x):
    mapped, d = phi(x), x.shape[-1]
    return np.concatenate([mapped[..., : d + 1], mapped[..., d + 1 :] * np.sqrt(np.asarray(2, dtype=x.dtype))], axis=-1)


def _taylor_unscaled(phi, x):
    return phi(x * np.sqrt(np.sqrt(np.asarray(x.shape[-1], dtype=x.dtype))))


def _keys_normalised(call):
    k = call["k"] if call["k"].dtype.kind == "f" else call["k"].astype(np.float32)
    length = np.sqrt((k * k).sum(axis=-1, keepdims=True))
    return call | {"k": (k / np.where(length == 0, 1, length)).astype(call["k"].dtype)}


def _decay_of_sigmoid(call):
    """A decay in (0, 1) is expected: what is passed is taken as it is."""
    if call.get("decay") is None:
        return call
    with np.errstate(all="ignore"):
        return call | {"decay": np.log(np.maximum(call["decay"], np.asarray(1e-30, dtype=call["decay"].dtype)))}


def _decay_clipped(call):
    return call if call.get("decay") is None else call | {"decay": np.minimum(call["decay"], 0)}


def _mutant(name, says, build, **others):
    return Mutant("linear_attention", name, says, build, **others)


_FORWARD = (
    _mutant(
        "decay_after_correction",
        "the delta rule corrects S before it is decayed: u = β (v - S_{t-1}ᵀk); the contract decays first, u = β (v - S'ᵀk) with S' = e^g S",
        edited(
            _RECURRENT,
            ("        S = np.exp(g[..., t, :, None]) * S\n        u = v_t", "        u = v_t"),
            ("        S = S + k_t[..., :, None] * u[..., None, :]\n        o =", "        S = np.exp(g[..., t, :, None]) * S\n        S = S + k_t[..., :, None] * u[..., None, :]\n        o ="),
        ),
    ),
    _mutant(
        "decay_after_everything",
        "the decay acts on the whole of S - β k (Sᵀk)ᵀ + β k vᵀ, so that a step decays what it has just written; the contract decays what was there before",
        edited(
            _RECURRENT,
            ("        S = np.exp(g[..., t, :, None]) * S\n        u = v_t", "        u = v_t"),
            ("        S = S + k_t[..., :, None] * u[..., None, :]\n        o =", "        S = np.exp(g[..., t, :, None]) * (S + k_t[..., :, None] * u[..., None, :])\n        o ="),
        ),
    ),
    _mutant(
        "decay_on_columns",
        "a decay per channel multiplies columns of S, which follow v; the contract's channels are those of k, the rows of S",
        edited(
            _RECURRENT,
            (
                "        S = np.exp(g[..., t, :, None]) * S\n        u = v_t",
                "        a = np.exp(g[..., t, :]); S = (np.resize(a, (*a.shape[:-1], S.shape[-1]))[..., None, :] if a.shape[-1] > 1 else a[..., None]) * S\n        u = v_t",
            ),
        ),
    ),
    _mutant(
        "decay_squared",
        "the decay is applied twice at every step, e^2g",
        edited(_RECURRENT, ("S = np.exp(g[..., t, :, None]) * S", "S = np.exp(2 * g[..., t, :, None]) * S")),
    ),
    _mutant(
        "decay_sign",
        "the decay is e^-g: a positive rate was expected; the contract's decay is its logarithm, e^g",
        edited(_RECURRENT, ("S = np.exp(g[..., t, :, None]) * S", "S = np.exp(-g[..., t, :, None]) * S")),
    ),
    _mutant(
        "decay_of_the_first_channel",
        "all channels decay as the first one does",
        edited(_RECURRENT, ("S = np.exp(g[..., t, :, None]) * S", "S = np.exp(g[..., t, :1, None]) * S")),
    ),
    _mutant(
        "decay_one_step_late",
        "what was written at step t is decayed at step t+1 by g_t, not by g_{t+1}: the running sums start one step early",
        edited(_RECURRENT, ("S = np.exp(g[..., t, :, None]) * S", "S = np.exp(g[..., max(t - 1, 0), :, None]) * S")),
    ),
    _mutant(
        "decay_between_0_and_1",
        "the decay is taken as a factor in (0, 1); the contract passes its logarithm",
        _called_with(_decay_of_sigmoid),
        variant=True,
    ),
    _mutant(
        "decay_clipped",
        "log-decays above 0 are clipped to 0: nothing may grow; the contract takes them as they are",
        _called_with(_decay_clipped),
    ),
    _mutant(
        "decay_ignored",
        "the decay is not applied",
        _called_with(lambda call: {n: x for n, x in call.items() if n != "decay"}),
    ),
    _mutant(
        "decay_divided_out",
        "pairs are weighted by e^F_t / e^F_j with F the running sum of log-decays: it overflows, and is 0/0 after a strong decay; "
        "e^(F_t - F_j) does not",
        edited(
            _PARALLEL,
            (
                "    A, since, peak = _exponents(g)\n    S_peak",
                "    A, since, peak = _exponents(g); F = _transposed(np.cumsum(g, axis=-2)); A = np.log(np.exp(F)[..., :, None] / np.exp(F)[..., None, :])\n    S_peak",
            ),
        ),
    ),
    _mutant(
        "state_reset_at_chunks",
        "queries see the steps of their own chunk only: S of the chunks before is not read",
        edited(_CHUNKWISE, ("entering.append(S_peak)", "entering.append(0 * S_peak)")),
    ),
    _mutant(
        "correction_within_chunks",
        "the delta rule corrects what its own chunk has written, but not what the chunks before have: W S_0 is missing in U = Û - W S_0",
        edited(_CHUNKWISE, ("u[c] if w is None else u[c] - w[c] @ S_peak", "u[c]")),
    ),
    _mutant(
        "state_decayed_from_the_chunk_end",
        "the state from before a chunk is read with the decay of the whole chunk by all its steps; step t has seen e^(g_0 + ... + g_t)",
        edited(_CHUNKWISE, ("(q * since) @ np.stack(entering)", "(q * since[:, -1:]) @ np.stack(entering)")),
    ),
    _mutant(
        "running_sum_over_chunks",
        "the running sum of log-decays is not started anew in a chunk: the state from before the chunk is decayed since the beginning of the sequence",
        edited(
            _CHUNKWISE,
            (
                "    A, since, peak = _exponents(g)\n    u, w = v, None",
                "    A, since, peak = _exponents(g); before = np.concatenate([0 * g[:1, -1:], g.sum(axis=1, keepdims=True)[:-1]]).cumsum(axis=0); since = since * np.exp(before)\n    u, w = v, None",
            ),
        ),
    ),
    _mutant(
        "wy_without_decay",
        "the triangular system of a chunk is built from k·k alone; its entries decay like everything else, e^(F_t - F_j) k_t·k_j",
        edited(_CHUNKWISE, ("u_and_w = solve_unit_lower(beta * _match(k, k, A)", "u_and_w = solve_unit_lower(beta * (k @ _transposed(k))")),
    ),
    _mutant(
        "wy_first_order",
        "(I + M)⁻¹ is replaced by I - M: the corrections of corrections are missing",
        edited(
            _CHUNKWISE,
            (
                "u_and_w = solve_unit_lower(beta * _match(k, k, A), beta * np.concatenate([v, k * since], axis=-1))",
                "right = beta * np.concatenate([v, k * since], axis=-1); u_and_w = right - np.tril(beta * _match(k, k, A), -1) @ right",
            ),
        ),
    ),
    _mutant(
        "beta_on_values_only",
        "β multiplies v but not what is taken away: u = β v - S'ᵀk; the contract's β multiplies the difference",
        edited(_RECURRENT, ("beta[..., t, :] * (v_t - _recall(S, k_t))", "beta[..., t, :] * v_t - _recall(S, k_t)")),
    ),
    _mutant(
        "beta_on_correction_only",
        "β multiplies what is taken away but not v: u = v - β S'ᵀk",
        edited(_RECURRENT, ("beta[..., t, :] * (v_t - _recall(S, k_t))", "v_t - beta[..., t, :] * _recall(S, k_t)")),
    ),
    _mutant(
        "beta_twice",
        "β multiplies both the key and the difference, β² in all",
        edited(_RECURRENT, ("beta[..., t, :] * (v_t - _recall(S, k_t))", "beta[..., t, :] ** 2 * (v_t - _recall(S, k_t))")),
    ),
    _mutant(
        "beta_as_a_gate",
        "β multiplies v and nothing is taken away: a gated write, not the delta rule",
        edited(_RECURRENT, ("beta[..., t, :] * (v_t - _recall(S, k_t))", "beta[..., t, :] * v_t")),
    ),
    _mutant(
        "beta_sigmoid",
        "σ is applied to beta; the contract's beta is the learning rate itself",
        edited(_RECURRENT, ("beta[..., t, :] * (v_t - _recall(S, k_t))", "1 / (1 + np.exp(-beta[..., t, :])) * (v_t - _recall(S, k_t))")),
    ),
    _mutant(
        "correction_by_query",
        "what the query recalls is taken away, S'ᵀq; the delta rule takes away what the key recalls, S'ᵀk",
        edited(_RECURRENT, ("(v_t - _recall(S, k_t))", "(v_t - _recall(S, q[..., 0, t, :]))")),
    ),
    _mutant(
        "keys_normalised",
        "keys are normalised to unit length, as some kernels offer; the contract takes them as they are",
        _called_with(_keys_normalised),
        variant=True,
    ),
    _mutant(
        "output_before_update",
        "o_t is read from S_{t-1} (decayed): the diagonal is left out; the contract reads after step t has written",
        edited(
            _RECURRENT,
            ("        S = S + k_t[..., :, None] * u[..., None, :]\n        o = q[..., t, :] @ S  # (..., Hkv, group, e)", "        o = q[..., t, :] @ S; S = S + k_t[..., :, None] * u[..., None, :]"),
        ),
    ),
    _mutant(
        "output_before_decay",
        "o_t is read from S_{t-1} as the step found it, neither decayed nor written to",
        edited(
            _RECURRENT,
            ("        S = np.exp(g[..., t, :, None]) * S\n", "        o_t = q[..., t, :] @ S; S = np.exp(g[..., t, :, None]) * S\n"),
            ("        o = q[..., t, :] @ S  # (..., Hkv, group, e)", "        o = o_t"),
        ),
    ),
    _mutant(
        "diagonal_excluded",
        "pairs of a step with itself are masked (j < t); the contract includes them",
        edited(_PARALLEL, ("match = _match(q, k[..., None, :, :], A[..., None, :, :, :])", "match = np.tril(_match(q, k[..., None, :, :], A[..., None, :, :, :]), -1)")),
    ),
    _mutant(
        "not_causal",
        "every step sees all steps: the causal mask is missing",
        edited(
            _PARALLEL,
            ("match = _match(q, k[..., None, :, :], A[..., None, :, :, :])", "match = q @ _transposed(k[..., None, :, :])"),
            ("masked_matmul(match, u[..., None, :, :], _causal(match))", "masked_matmul(match, u[..., None, :, :], 0 * match)"),
        ),
    ),
    _mutant(
        "scale_missing",
        "scale is not applied; its default is 1/√d without a feature map",
        edited(_RECURRENT, ("outputs.append(o if normalize else scale * o)", "outputs.append(o)")),
    ),
    _mutant(
        "scale_twice",
        "scale is applied to q and to k",
        edited(_RECURRENT, ("outputs.append(o if normalize else scale * o)", "outputs.append(o if normalize else scale * scale * o)")),
    ),
    _mutant(
        "scale_of_keys",
        "1/√d is applied to k, so the state is smaller by it (and the delta rule is another one); the contract scales what is read",
        edited(
            _RECURRENT,
            (
                "    outputs = []\n",
                "    outputs = []; k = k if normalize else scale * k\n",
            ),
            ("outputs.append(o if normalize else scale * o)", "outputs.append(o)"),
        ),
        variant=True,
    ),
    _mutant(
        "scale_with_feature_map",
        "the default scale is 1/√d with a feature map too; there it is 1",
        _called_with(
            lambda call: call
            | ({"scale": float(call["q"].shape[-1]) ** -0.5} if call.get("feature_map") is not None and call.get("scale") is None else {})
        ),
    ),
    _mutant(
        "scale_of_0_not_given",
        "a scale of 0 is taken for none (`scale or ...`), and 1/√d is used",
        _called_with(lambda call: call if call.get("scale") else {n: x for n, x in call.items() if n != "scale"}),
    ),
    _mutant(
        "values_wider_than_keys",
        "from the 64th step on, nothing is written to the columns of S beyond its d-th: S is not square, its columns are those of v",
        edited(
            _RECURRENT,
            (
                "        S = S + k_t[..., :, None] * u[..., None, :]\n        o =",
                "        S = S + k_t[..., :, None] * u[..., None, :] * ((np.arange(v.shape[-1]) < max(k.shape[-1], 1)) | (t < 64))\n        o =",
            ),
        ),
    ),
    _mutant(
        "z_does_not_decay",
        "the normaliser z accumulates keys but is not decayed as S is",
        edited(_RECURRENT, ("z = np.exp(g[..., t, :]) * z + k_t", "z = z + k_t")),
    ),
    _mutant(
        "normaliser_of_the_past",
        "q·z is taken before the step's own key is added to z",
        edited(
            _RECURRENT,
            (
                "            z = np.exp(g[..., t, :]) * z + k_t\n            o = o / (q[..., t, :] @ z[..., None])",
                "            z = np.exp(g[..., t, :]) * z; o = o / (q[..., t, :] @ z[..., None]); z = z + k_t",
            ),
        ),
    ),
    _mutant(
        "normalize_ignored",
        "the result is not divided by q·z",
        edited(_RECURRENT, ("            o = o / (q[..., t, :] @ z[..., None])\n", "")),
    ),
    _mutant(
        "normaliser_at_least_1",
        "the normaliser is max(|q·z|, 1), as in retention and mLSTM; the contract divides by q·z",
        edited(_RECURRENT, ("o = o / (q[..., t, :] @ z[..., None])", "o = o / np.maximum(abs(q[..., t, :] @ z[..., None]), 1)")),
    ),
    _mutant(
        "normaliser_eps",
        "1e-3 is added to q·z, and smaller numbers elsewhere; the contract adds nothing",
        edited(_RECURRENT, ("o = o / (q[..., t, :] @ z[..., None])", "o = o / (q[..., t, :] @ z[..., None] + np.asarray(1e-3, dtype=q.dtype))")),
        variant=True,
    ),
    _mutant(
        "groups_interleaved",
        "head h of q reads head h % Hkv of k and v (tile); the contract's is h // (Hq // Hkv) (repeat_interleave)",
        _interleaved,
    ),
    _mutant(
        "state_transposed",
        "the initial state is read with k along its columns; its rows follow k",
        edited(
            _RECURRENT,
            ("    outputs = []\n", "    outputs = []; S = _transposed(S) if S.shape[-1] == S.shape[-2] else S[..., ::-1, :]\n"),
        ),
    ),
    _mutant(
        "initial_state_ignored",
        "the initial state is not read",
        _called_with(lambda call: {n: x for n, x in call.items() if n != "state"}),
    ),
    _mutant(
        "map_on_queries_only",
        "the feature map is applied to q, not to k",
        edited(
            _RECURRENT,
            (
                "    outputs = []\n",
                "    outputs = []; k = raw_k if feature_map in ('elu+1', 'relu') else k\n",
            ),
            ("    q, k, v, g, beta, S, z, scale = prepare(q, k, v, decay, beta, feature_map, normalize, scale, state)\n    outputs", "    raw_k = k; q, k, v, g, beta, S, z, scale = prepare(q, k, v, decay, beta, feature_map, normalize, scale, state)\n    outputs"),
        ),
    ),
    _mutant(
        "taylor_without_root",
        "the second-order features are x'⊗x', not x'⊗x'/√2: φ(q)·φ(k) = 1 + s + s²",
        _mapped(taylor=_taylor_without_root),
    ),
    _mutant(
        "taylor_unscaled",
        "x' = x: the factor d^(-1/4) is missing, so s = q·k",
        _mapped(taylor=_taylor_unscaled),
    ),
    _mutant(
        "taylor_scaled_twice",
        "x' = x/√d: with q and k both scaled, s = q·k/d",
        _mapped(taylor=lambda phi, x: phi(x / np.sqrt(np.sqrt(np.asarray(x.shape[-1], dtype=x.dtype))))),
    ),
    _mutant(
        "elu_without_1",
        "φ = elu, without the 1: features are negative, and q·z may vanish",
        _mapped(**{"elu+1": lambda phi, x: phi(x) - 1}),
    ),
    _mutant(
        "relu_for_elu",
        'feature_map="elu+1" is relu(x) + 1: what is below 0 is cut off',
        _mapped(**{"elu+1": lambda phi, x: np.maximum(x, 0) + 1}),
    ),
)

_GRADIENT = (
    _mutant(
        "grad_dstate_ignored",
        "the cotangent of the final state is not used",
        edited(_VJP, ("        dS, dz = dstate if normalize else (dstate, np.zeros_like(z))", "        dS, dz = np.zeros_like(S), np.zeros_like(z)")),
        of_gradient=True,
    ),
    _mutant(
        "grad_beta_without_correction",
        "dβ = du·v: the part of what the key recalled, du·(v - S'ᵀk), is missing",
        edited(_VJP, ("dbeta = (dv * residual).sum(axis=-1)", "dbeta = (dv * v_t).sum(axis=-1)")),
        of_gradient=True,
    ),
    _mutant(
        "grad_key_of_correction",
        "dk lacks -S' dv: the key of the correction S'ᵀk is held constant",
        edited(_VJP, ("            dk = dk - (S_old @ dv[..., None])[..., 0]\n", "")),
        of_gradient=True,
    ),
    _mutant(
        "grad_state_of_correction",
        "dS' lacks -k dvᵀ: the gradient does not pass through what the correction reads",
        edited(_VJP, ("            dS = dS - k_t[..., :, None] * dv[..., None, :]\n", "")),
        of_gradient=True,
    ),
    _mutant(
        "grad_decay_one_step_off",
        "dg_t = <dS, S> of the same step, after it was written; the decay acts on S_{t-1}: <dS', e^g S_{t-1}>",
        edited(_VJP, ("dg = (dS * S_old).sum(axis=-1) + dz * z_old", "dg = (dS * S).sum(axis=-1) + dz * z")),
        of_gradient=True,
    ),
    _mutant(
        "grad_decay_not_logarithmic",
        "the gradient is that of e^g, not of g: a factor e^g is missing",
        edited(_VJP, ("dg = (dS * S_old).sum(axis=-1) + dz * z_old", "dg = (dS * S_before).sum(axis=-1) + dz * z_before")),
        of_gradient=True,
    ),
    _mutant(
        "grad_not_decayed",
        "the cotangent of the state is handed back without e^g",
        edited(_VJP, ("dS, dz = a[..., None] * dS, a * dz", "dS, dz = dS * 1, dz * 1")),
        of_gradient=True,
    ),
    _mutant(
        "grad_one_query_of_the_group",
        "dk, dv and the state's gradient come from the first query head of the group only: the sum over the group is missing",
        edited(_VJP, ("dS = dS + _transposed(q_t) @ dN", "dS = dS + _transposed(q_t[..., :1, :]) @ dN[..., :1, :]")),
        of_gradient=True,
    ),
    _mutant(
        "grad_normaliser_detached",
        "the normaliser q·z is held constant in the gradient",
        edited(_VJP, ("dD = -(dN * (q_t @ S)).sum(axis=-1, keepdims=True) / D", "dD = 0 * D")),
        of_gradient=True,
    ),
    _mutant(
        "grad_query_unscaled",
        "scale is missing in the gradient",
        edited(_VJP, ("dN = scale * do", "dN = 1 * do")),
        of_gradient=True,
    ),
    _mutant(
        "grad_query_before_update",
        "dq is read from the state before the step's own update",
        edited(_VJP, ("dq = dN @ _transposed(S)", "dq = dN @ _transposed(S_old)")),
        of_gradient=True,
    ),
    _mutant(
        "grad_map_ignored",
        "the gradients of q and k are those of φ(q), φ(k): the derivative of the feature map is missing (cut to d features where it makes more)",
        edited(
            _VJP,
            ("        dq = phi.vjp(dq, ", "        dq = (lambda g, x: g[..., : x.shape[-1]])(dq, "),
            ("        dk = phi.vjp(dk, ", "        dk = (lambda g, x: g[..., : x.shape[-1]])(dk, "),
        ),
        of_gradient=True,
    ),
)

MUTANTS = (*_FORWARD, *_GRADIENT)
