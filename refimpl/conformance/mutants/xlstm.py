"""Mistakes in the networks of xLSTM: mLSTM, sLSTM."""


from refimpl.conformance.mutants import Mutant, edited
from refimpl.ops.gated_rnn import mlstm, slstm

_MLSTM = (
    Mutant(
        "mlstm",
        "bound_in_stabilised_units",
        "the normaliser is max(|n·q|, 1) of the stabilised n, so h depends on the stabiliser; the contract's bound is 1 in true "
        "units, which is e^-m here",
        edited(mlstm.mlstm, ("np.maximum(abs(overlap), _lower_bound(m))", "np.maximum(abs(overlap), 1)")),
        variant=True,
    ),
    Mutant(
        "mlstm",
        "eps_1e-6",
        "1e-6 is added to the normaliser, as published kernels do; the contract's eps is 0 unless it is asked for",
        edited(mlstm.mlstm, ("+ constant(eps, m)", "+ constant(eps + 1e-6, m)")),
        variant=True,
    ),
    Mutant(
        "mlstm",
        "m_starts_at_0",
        "the stabiliser starts at m = 0; the contract starts at -∞, and then m is the largest exponent seen",
        edited(mlstm.mlstm, ("np.full_like(k, -np.inf, shape=batch)", "np.full_like(k, 0, shape=batch)")),
        variant=True,
    ),
    Mutant(
        "mlstm",
        "query_scaled",
        "1/√d is applied to q; the contract scales k, so C and n hold keys divided by √d (h is the same without a state)",
        edited(
            mlstm.mlstm,
            ("k = k / sqrt_of(k.shape[-1], k)", "k = k + 0"),
            (
                "numerator = (q[..., t, None, :] @ C)[..., 0, :]  # (..., H, e)",
                "q_t = q[..., t, :] / sqrt_of(q.shape[-1], q); numerator = (q_t[..., None, :] @ C)[..., 0, :]",
            ),
            ("overlap = (n * q[..., t, :]).sum(axis=-1)  # (..., H)", "overlap = (n * q_t).sum(axis=-1)"),
        ),
        variant=True,
    ),
    Mutant(
        "mlstm",
        "abs_forgotten",
        "the normaliser is max(n·q, e^-m): the absolute value of n·q is missing, so a negative overlap counts as none",
        edited(mlstm.mlstm, ("np.maximum(abs(overlap), ", "np.maximum(overlap, ")),
    ),
    Mutant(
        "mlstm",
        "max_forgotten",
        "h is divided by |n·q| alone; the contract divides by max(|n·q|, 1), e^-m for the 1 in stabilised units",
        edited(mlstm.mlstm, ("np.maximum(abs(overlap), _lower_bound(m))", "abs(overlap)")),
    ),
    Mutant(
        "mlstm",
        "eps_inside_max",
        "eps is added to e^-m inside the maximum; the contract adds it to the maximum: max(|n·q|, e^-m) + eps",
        edited(
            mlstm.mlstm,
            (
                "np.maximum(abs(overlap), _lower_bound(m)) + constant(eps, m)",
                "np.maximum(abs(overlap), _lower_bound(m) + constant(eps, m))",
            ),
        ),
    ),
    Mutant(
        "mlstm",
        "keys_not_scaled",
        "keys are not divided by √d; the contract does so before they are written to C and n",
        edited(mlstm.mlstm, ("k = k / sqrt_of(k.shape[-1], k)", "k = k + 0")),
    ),
    Mutant(
        "mlstm",
        "scaled_twice",
        "both q and k are divided by √d (1/d in all); the contract scales k only",
        edited(mlstm.mlstm, ("k = k / sqrt_of(k.shape[-1], k)", "k, q = k / sqrt_of(k.shape[-1], k), q / sqrt_of(k.shape[-1], k)")),
    ),
    Mutant(
        "mlstm",
        "stabiliser_not_undone",
        "the old state is multiplied by f and not by f' = exp(log f + m_{t-1} - m_t): what was stored stays in the units of the "
        "old m, so the stabiliser changes the result",
        edited(
            mlstm.mlstm, ("np.exp(decayed - finite_or_zero(m)), np.exp(i - finite_or_zero(m))", "np.exp(F), np.exp(i - finite_or_zero(m))")
        ),
    ),
    Mutant(
        "mlstm",
        "m_without_log_f",
        "m_t = max(m_{t-1}, ĩ_t) leaves out log f_t; h may survive that, but m is not the running maximum of the exponents, "
        "and a state cannot be compared or stays far above what it stabilises",
        edited(mlstm.mlstm, ("m = np.maximum(decayed, i)  # (..., H)", "m = np.maximum(m, i)")),
    ),
    Mutant(
        "mlstm",
        "not_stabilised",
        "gates are exponentiated as they are (m = 0): overflows for large pre-activations",
        edited(mlstm.mlstm, ("m = np.maximum(decayed, i)  # (..., H)", "m = np.zeros_like(i)")),
    ),
    Mutant(
        "mlstm",
        "state_reset_at_chunks",
        "queries see the steps of their own chunk only: C and n of the chunks before are not read",
        edited(mlstm.mlstm_chunkwise, ("memories.append(memory)", "memories.append(np.zeros_like(memory))")),
    ),
    Mutant(
        "mlstm",
        "m_not_handed_across_chunks",
        "the state of the chunks before is read as if its m were 0: C and n are in units of e^m, and m has to be handed on with them",
        edited(mlstm.mlstm_chunkwise, ("ms.append(m)", "ms.append(np.zeros_like(m))")),
    ),
    Mutant(
        "mlstm",
        "initial_state_ignored",
        "the initial state is not read",
        edited(mlstm.mlstm, ("    if state is not None:\n        arrays", "    state = None\n    if state is not None:\n        arrays")),
    ),
    Mutant(
        "mlstm",
        "forget_always_sigmoid",
        'forget="exp" is not seen: the forget gate is σ(f̃) whatever was asked for',
        edited(mlstm.mlstm, ('F = log_sigmoid(f) if forget == "sigmoid" else f', "F = log_sigmoid(f)")),
    ),
    Mutant(
        "mlstm",
        "forget_always_exp",
        'the forget gate is exp(f̃): log f = f̃ where forget="sigmoid" wants log σ(f̃)',
        edited(mlstm.mlstm, ('F = log_sigmoid(f) if forget == "sigmoid" else f', "F = f")),
    ),
    Mutant(
        "mlstm",
        "input_gate_sigmoid",
        "the input gate is σ(ĩ), as in an LSTM; here it is exp(ĩ)",
        edited(mlstm.mlstm, ("return q, k, v, i, F, C, n, m", "return q, k, v, log_sigmoid(i), F, C, n, m")),
    ),
    Mutant(
        "mlstm",
        "input_gate_clipped",
        "ĩ is clipped to at most 1 before exp, in the way of an unstabilised code; the contract does not clip",
        edited(mlstm.mlstm, ("return q, k, v, i, F, C, n, m", "return q, k, v, np.minimum(i, 1), F, C, n, m")),
    ),
    Mutant(
        "mlstm",
        "input_decays_at_once",
        "a step's own forget gate acts on its own input, C <- f (C + i k vᵀ): decays are off by one step",
        edited(mlstm.mlstm_parallel, ("A = gate_exponents(F, i)  # (..., H, T, T)", "A = gate_exponents(F, i + F)")),
    ),
    Mutant(
        "mlstm",
        "decay_one_step_late",
        "the forget gate of step t acts on what is stored after step t is read: log f_j + ... + log f_{t-1} for log f_{j+1} + ... + log f_t",
        edited(
            mlstm.mlstm_parallel,
            ("A = gate_exponents(F, i)  # (..., H, T, T)", "A = gate_exponents(np.concatenate([0 * F[..., :1], F[..., :-1]], axis=-1), i)"),
        ),
    ),
    Mutant(
        "mlstm",
        "n_does_not_decay",
        "n <- n + i k: the normaliser is not multiplied by the forget gate",
        edited(mlstm.mlstm, ("n = f_prime[..., None] * n + ", "n = n + ")),
    ),
    Mutant(
        "mlstm",
        "memory_transposed",
        "the query is multiplied to the value side, C q for Cᵀ q (rows of C follow k, columns follow v)",
        edited(
            mlstm.mlstm,
            (
                "numerator = (q[..., t, None, :] @ C)[..., 0, :]",
                "numerator = (q[..., t, None, :] @ (_transposed(C) if q.shape[-1] == v.shape[-1] else C))[..., 0, :]",
            ),
        ),
    ),
    Mutant(
        "mlstm",
        "reads_before_writing",
        "h_t is read from C_{t-1}; the contract reads after step t was written",
        edited(
            mlstm.mlstm,
            ("        C, n, m = _step(k[..., t, :]", "        after = _step(k[..., t, :]"),
            (
                "hs.append(numerator / _denominator(overlap, m, eps)[..., None])",
                "hs.append(numerator / _denominator(overlap, m, eps)[..., None])\n        C, n, m = after",
            ),
        ),
    ),
    Mutant(
        "mlstm",
        "grad_stabiliser_detached",
        "the stabiliser is held constant in the gradient (stop_gradient on m): wrong wherever m is more than a choice of units, "
        "for eps > 0 and for cotangents of the final state",
        edited(
            mlstm.mlstm_vjp,
            ("dm = dm - d_decayed - d_input", "dm = np.zeros_like(dm)"),
            ("dm = dm + np.where(enough, 0, ", "dm = dm + 0 * np.where(enough, 0, "),
        ),
        of_gradient=True,
    ),
    Mutant(
        "mlstm",
        "grad_normaliser_detached",
        "the normaliser is held constant in the gradient: the term of n·q is missing",
        edited(mlstm.mlstm_vjp, ("ds = np.where(enough, np.sign(overlap) * dD, 0)", "ds = 0 * dD")),
        of_gradient=True,
    ),
    Mutant(
        "mlstm",
        "grad_bound_ignored",
        "the gradient takes the branch |n·q| of the maximum everywhere; where e^-m is larger, n·q has no gradient",
        edited(mlstm.mlstm_vjp, ("enough = abs(overlap) >= _lower_bound(m)", "enough = abs(overlap) >= 0")),
        of_gradient=True,
    ),
    Mutant(
        "mlstm",
        "grad_sign_forgotten",
        "d|n·q| is taken for d(n·q): the sign of n·q is missing in the gradient",
        edited(mlstm.mlstm_vjp, ("np.sign(overlap) * dD", "dD")),
        of_gradient=True,
    ),
    Mutant(
        "mlstm",
        "grad_k_not_scaled",
        "the gradient of k lacks the factor 1/√d",
        edited(mlstm.mlstm_vjp, ("i_prime[..., None] * dk / scale", "i_prime[..., None] * dk")),
        of_gradient=True,
    ),
    Mutant(
        "mlstm",
        "grad_f_of_log_f",
        "the gradient of f is that of log f: the factor σ(-f̃) is missing",
        edited(mlstm.mlstm_vjp, ("d_decayed * sigmoid(-pre_activation[..., t])", "d_decayed")),
        of_gradient=True,
    ),
    Mutant(
        "mlstm",
        "grad_final_state_ignored",
        "the cotangent of the final state is not used",
        edited(
            mlstm.mlstm_vjp,
            ("(np.zeros_like(x) for x in (C, n, m)) if dstate is None else dstate", "(np.zeros_like(x) for x in (C, n, m))"),
        ),
        of_gradient=True,
    ),
)

_SLSTM = (
    Mutant(
        "slstm",
        "R_transposed",
        "the recurrent matrices act from the right, h R; the contract's (R h)_i is the sum over j of R_ij h_j",
        edited(
            slstm.slstm,
            ("return (R @ h[..., None, :, :, None])[..., 0]", "return (np.swapaxes(R, -1, -2) @ h[..., None, :, :, None])[..., 0]"),
        ),
    ),
    Mutant(
        "slstm",
        "gates_in_order_ifzo",
        "R is read in the order i, f, z, o, as xlstm stores it; the contract's order is z, i, f, o",
        edited(slstm.slstm, ("a = x + _recurrent(R, h)", "a = x + _recurrent(R[[2, 0, 1, 3]], h)")),
    ),
    Mutant(
        "slstm",
        "recurrence_reads_c",
        "R is multiplied to the cell state c; the contract's recurrence reads h",
        edited(slstm.slstm, ("a = x + _recurrent(R, h)", "a = x + _recurrent(R, c)")),
    ),
    Mutant(
        "slstm",
        "gates_not_recurrent",
        "only z reads h; the contract gives each of the four gates a recurrent matrix",
        edited(slstm.slstm, ("a = x + _recurrent(R, h)", "a = x + _recurrent(R * (np.arange(4) == 0)[:, None, None, None], h)")),
    ),
    Mutant(
        "slstm",
        "reads_another_head",
        "a head's recurrence reads h of its neighbour; R is block diagonal, each head reads its own",
        edited(slstm.slstm, ("a = x + _recurrent(R, h)", "a = x + _recurrent(R, np.roll(h, 1, axis=-2))")),
    ),
    Mutant(
        "slstm",
        "reads_h_late",
        "the recurrence reads h_{t-2}: h is stored one step too late",
        edited(
            slstm.slstm,
            (
                "    hs = []\n    for t in range(x.shape[-2]):\n        c, n, h, m = _step(x[..., t, :], R, forget, c, n, h, m)[0]",
                "    hs, late = [], h\n    for t in range(x.shape[-2]):\n        late, (c, n, h, m) = h, _step(x[..., t, :], R, forget, c, n, late, m)[0]",
            ),
        ),
    ),
    Mutant(
        "slstm",
        "tanh_of_cell",
        "h = o tanh(c/n), as in an LSTM; c/n is a mean of values in (-1, 1) and needs no tanh",
        edited(slstm.slstm, ("o * (c / n), m)", "o * np.tanh(c / n), m)")),
    ),
    Mutant(
        "slstm",
        "normaliser_at_least_1",
        "h = o c / max(n, 1); the contract divides by n",
        edited(slstm.slstm, ("o * (c / n), m)", "o * (c / np.maximum(n, 1)), m)")),
    ),
    Mutant(
        "slstm",
        "normaliser_forgotten",
        "h = o c: the division by n is missing",
        edited(slstm.slstm, ("o * (c / n), m)", "o * c, m)")),
    ),
    Mutant(
        "slstm",
        "n_does_not_decay",
        "n <- n + i: the normaliser is not multiplied by the forget gate",
        edited(slstm.slstm, ("c, n = f_prime * c + i_prime * z, f_prime * n + i_prime", "c, n = f_prime * c + i_prime * z, n + i_prime")),
    ),
    Mutant(
        "slstm",
        "stabiliser_not_undone",
        "the old state is multiplied by f and not by f' = exp(log f + m_{t-1} - m_t): the stabiliser changes the result",
        edited(
            slstm.slstm, ("np.exp(decayed - finite_or_zero(m)), np.exp(i - finite_or_zero(m))", "np.exp(F), np.exp(i - finite_or_zero(m))")
        ),
    ),
    Mutant(
        "slstm",
        "m_without_log_f",
        "m_t = max(m_{t-1}, ĩ_t) leaves out log f_t; h survives it, but m is not the running maximum of the exponents",
        edited(slstm.slstm, ("m = np.maximum(decayed, i)", "m = np.maximum(m, i)")),
    ),
    Mutant(
        "slstm",
        "not_stabilised",
        "gates are exponentiated as they are (m = 0): overflows for large pre-activations, and 0/0 for very negative ones",
        edited(slstm.slstm_naive),
    ),
    Mutant(
        "slstm",
        "m_starts_at_0",
        "the stabiliser starts at m = 0; the contract starts at -∞, and then m is the largest exponent seen",
        edited(
            slstm.slstm, ("return x, zeros, zeros, zeros, np.full_like(x, -np.inf, shape=heads)", "return x, zeros, zeros, zeros, zeros")
        ),
        variant=True,
    ),
    Mutant(
        "slstm",
        "forget_always_sigmoid",
        'forget="exp" is not seen: the forget gate is σ(f̃) whatever was asked for',
        edited(
            slstm.slstm,
            ('F = log_sigmoid(a[..., 2, :, :]) if forget == "sigmoid" else a[..., 2, :, :]', "F = log_sigmoid(a[..., 2, :, :])"),
        ),
    ),
    Mutant(
        "slstm",
        "forget_always_exp",
        'the forget gate is exp(f̃) where forget="sigmoid" wants σ(f̃)',
        edited(slstm.slstm, ('F = log_sigmoid(a[..., 2, :, :]) if forget == "sigmoid" else a[..., 2, :, :]', "F = a[..., 2, :, :]")),
    ),
    Mutant(
        "slstm",
        "input_gate_sigmoid",
        "the input gate is σ(ĩ), as in an LSTM; here it is exp(ĩ)",
        edited(
            slstm.slstm,
            (
                "z, i, o = np.tanh(a[..., 0, :, :]), a[..., 1, :, :], sigmoid",
                "z, i, o = np.tanh(a[..., 0, :, :]), log_sigmoid(a[..., 1, :, :]), sigmoid",
            ),
        ),
    ),
    Mutant(
        "slstm",
        "bias_ignored",
        "the bias is not added",
        edited(slstm.slstm, ("x = x if bias is None else x + bias[..., None, :]", "x = x + 0")),
    ),
    Mutant(
        "slstm",
        "initial_h_ignored",
        "the first step does not read the state's h: hand-off loses the recurrent part",
        edited(
            slstm.slstm,
            (
                "    x, c, n, h, m = _prepare(z, i, f, o, R, bias, state)\n    hs = []\n    for t in range(x.shape[-2]):\n        c, n, h, m = _step",
                "    x, c, n, h, m = _prepare(z, i, f, o, R, bias, state)\n    hs, h = [], 0 * h\n    for t in range(x.shape[-2]):\n        c, n, h, m = _step",
            ),
        ),
    ),
    Mutant(
        "slstm",
        "grad_recurrence_cut",
        "the gradient does not go back through R h (truncated backpropagation)",
        edited(slstm.slstm_vjp, ("[..., 0].sum(axis=-3)  # Σ Rᵀ da", "[..., 0].sum(axis=-3) * 0")),
        of_gradient=True,
    ),
    Mutant(
        "slstm",
        "grad_through_R_transposed",
        "the gradient goes back through R in place of Rᵀ",
        edited(slstm.slstm_vjp, ("dh = (np.swapaxes(R, -1, -2) @ da[..., None])", "dh = (R @ da[..., None])")),
        of_gradient=True,
    ),
    Mutant(
        "slstm",
        "grad_stabiliser_detached",
        "the stabiliser is held constant in the gradient: wrong for cotangents of the final state, whose c, n and m depend on it",
        edited(slstm.slstm_vjp, ("dm = dm - d_decayed - d_i", "dm = 0 * dm")),
        of_gradient=True,
    ),
    Mutant(
        "slstm",
        "grad_normaliser_detached",
        "the normaliser is held constant in the gradient: -dh h/n is missing",
        edited(slstm.slstm_vjp, ("dc, dn = dc + dh * o_t / n, dn - dh * h / n", "dc = dc + dh * o_t / n")),
        of_gradient=True,
    ),
    Mutant(
        "slstm",
        "grad_final_state_ignored",
        "the cotangent of the final state is not used",
        edited(slstm.slstm_vjp, ("(np.zeros_like(s) for s in first) if dstate is None else dstate", "(np.zeros_like(s) for s in first)")),
        of_gradient=True,
    ),
)

MUTANTS = (*_MLSTM, *_SLSTM)
