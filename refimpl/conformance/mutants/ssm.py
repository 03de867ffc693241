"""Mistakes in linear time-invariant systems: which power meets which input, what is real, what counts twice."""

import numpy as np

from refimpl.conformance.mutants import Mutant, edited
from refimpl.ops.state_space import ssm as chapter
from refimpl.ops.state_space import ssm_kernel as kernel

_UPDATE = "        x = applied(A_bar, x) + B_bar * u[..., t, :, None]  # (..., c, n)\n"
_READ = "        ys.append((C * x).sum(axis=-1))  # (..., c)\n"
_APPLIED = "return A * x if A.ndim == 2 else (A @ x[..., None])[..., 0]"
_OBSERVED = "return 2 * y.real if pairs else y.real"
_FREE = "free = orbit(A_bar, applied(A_bar, x), T)"
_LAST = "(answers[::-1] * u[..., None]).sum(axis=-3) + free[..., -1, :, :]"
_ROW = "        rows.append((C * x).sum(axis=-1))  # (c,)\n"
_STEP = "        x = applied(A_bar, x)\n"


def _wrong(name, says, *edits, form=chapter.ssm, operator="ssm"):
    return Mutant(operator, name, says, edited(form, *edits))


def _wrong_gradient(name, says, *edits, form=chapter.ssm_vjp, operator="ssm"):
    return Mutant(operator, name, says, edited(form, *edits), of_gradient=True)


def _wrong_kernel(name, says, *edits, form=kernel.ssm_kernel):
    return _wrong(name, says, *edits, form=form, operator="ssm_kernel")


def _wrong_kernel_gradient(name, says, *edits):
    return _wrong_gradient(name, says, *edits, form=kernel.ssm_kernel_vjp, operator="ssm_kernel")


def _circular(u, A_bar, B_bar, C, D=None, *, pairs=False, state=None, return_state=False):
    """Transforms as long as the sequence, without padding."""
    T = u.shape[-2]
    y, x = chapter.ssm(u, A_bar, B_bar, C, D, pairs=pairs, state=state, return_state=True)
    if T:
        K = np.broadcast_to(kernel.ssm_kernel(A_bar, B_bar, C, T, pairs=pairs), (T, u.shape[-1]))
        wrapped = np.zeros_like(y)
        for s in range(1, T):
            wrapped[..., :s, :] += K[s] * u[..., T - s :, :]  # what falls off the end
        y = y + wrapped
    return (y, x) if return_state else y


_SSM = (
    _wrong(
        "output_before_update",
        "y_t reads x_{t-1}, y_t = C x_{t-1} + D u_t, as textbooks and scipy.signal.dlsim do: here step t's output includes its input, y_t = C x_t + D u_t",
        (_UPDATE + _READ, _READ + _UPDATE),
    ),
    _wrong(
        "input_steps_too",
        "the input takes the step as well, x_t = Ā (x_{t-1} + B̄ u_t): x_t = Ā x_{t-1} + B̄ u_t, so that K_0 = C B̄ and not C Ā B̄",
        (_UPDATE, "        x = applied(A_bar, x + B_bar * u[..., t, :, None])\n"),
    ),
    _wrong(
        "matrix_transposed",
        "a dense Ā is applied as its transpose, x Ā (row vectors): x_t = Ā x_{t-1}, a sum over Ā's last axis",
        (_APPLIED, "return A * x if A.ndim == 2 else (np.swapaxes(A, -1, -2) @ x[..., None])[..., 0]"),
    ),
    _wrong(
        "eigenvalues_conjugated",
        "Ā is conjugated: the states turn the other way",
        (_APPLIED, "return np.conj(A) * x if A.ndim == 2 else (np.conj(A) @ x[..., None])[..., 0]"),
    ),
    _wrong(
        "output_map_conjugated",
        "C is conjugated (an inner product): y = Re(C x) + D u, with nothing conjugated",
        (_READ, _READ.replace("C * x", "np.conj(C) * x")),
    ),
    _wrong("modulus_of_output", "y is |C x|, the modulus: it is the real part", (_OBSERVED, "return 2 * abs(y) if pairs else abs(y)")),
    _wrong("imaginary_part", "y is Im(C x): it is the real part", (_OBSERVED, "return 2 * y.imag if pairs else y.imag")),
    _wrong(
        "real_maps",
        "the imaginary parts of C and of the states are dropped before they meet: Re(C x) = Re C Re x - Im C Im x",
        (_READ, _READ.replace("C * x", "C.real * x.real")),
    ),
    _wrong(
        "half_of_a_pair",
        "pairs=True gives Re(C x), half of what both of a conjugate pair give: y = 2 Re(C x) + D u",
        (_OBSERVED, "return y.real"),
    ),
    _wrong(
        "always_pairs",
        "the real part is doubled whatever `pairs` says (S4D's convention): by default all states are given, y = Re(C x) + D u",
        (_OBSERVED, "return 2 * y.real"),
    ),
    _wrong(
        "skip_counted_twice",
        "with pairs=True the skip connection is doubled too: y = 2 Re(C x) + D u",
        (
            "return (_with_skip(y, u, D), x) if return_state else _with_skip(y, u, D)\n\n\n@CONTRACT.form\ndef ssm_convolution",
            "y = _with_skip(y, u, D if D is None or not pairs else 2 * D)\n"
            "    return (y, x) if return_state else y\n\n\n@CONTRACT.form\ndef ssm_convolution",
        ),
    ),
    _wrong("skip_forgotten", "D is ignored: y_t has a term D·u_t", ("return y if D is None else y + D * u", "return y")),
    _wrong(
        "state_ignored",
        "the initial state is ignored: x_0 = Ā·state + B̄ u_0",
        ("return zero if state is None else zero + state", "return zero"),
    ),
    _wrong(
        "state_not_stepped",
        "the initial state is read at t = 0 without a step, C Ā^t·state: it stands before the first step, so y_t holds C Ā^(t+1)·state",
        (_FREE, "free = orbit(A_bar, x, T)"),
        form=chapter.ssm_convolution,
    ),
    _wrong(
        "state_without_the_past",
        "the final state of the convolution is the free one, Ā^T·state: the inputs have left Σ_s Ā^(T-1-s) B̄ u_s in it",
        (_LAST, "free[..., -1, :, :]"),
        form=chapter.ssm_convolution,
    ),
    _wrong(
        "final_state_in_wrong_order",
        "the final state meets inputs and powers in the same order: the last input meets Ā⁰ B̄, the first one Ā^(T-1) B̄",
        (_LAST, "(answers * u[..., None]).sum(axis=-3) + free[..., -1, :, :]"),
        form=chapter.ssm_convolution,
    ),
    Mutant(
        "ssm",
        "circular_convolution",
        "transforms are as long as the sequence, and the end wraps onto the beginning: pad to twice the length",
        lambda: _circular,
    ),
    _wrong(
        "powers_not_squared",
        "every round of the scan steps by Ā: round r brings what lies 2^r steps back, by Ā^(2^r)",
        ("reach, power = 2 * reach, squared(power)", "reach = 2 * reach"),
        form=chapter.ssm_scan,
    ),
    _wrong_gradient(
        "gradient_of_pairs_halved",
        "the gradient lacks the factor 2 of pairs=True, for Ā, B̄, u and state: conj(C) dy enters twice",
        ("into = np.conj(C) * ((2 if pairs else 1) * dy)", "into = np.conj(C) * (dy)"),
    ),
    _wrong_gradient(
        "gradient_of_map_halved",
        "the gradient of C lacks the factor 2 of pairs=True",
        ('"C": ((2 if pairs else 1) * dy[..., None]', '"C": (dy[..., None]'),
    ),
    _wrong_gradient(
        "conj_forgotten",
        "the gradient of complex arguments lacks the conjugates: g_t = conj(C) dy_t + Āᴴ g_{t+1} (JAX's convention returns conj(g))",
        ("into = np.conj(C) *", "into = C *"),
        ("return np.conj(A) if A.ndim == 2 else np.conj(np.swapaxes(A, -1, -2))", "return A if A.ndim == 2 else np.swapaxes(A, -1, -2)"),
        (
            "return g * np.conj(before) if A.ndim == 2 else g[..., :, None] * np.conj(before)[",
            "return g * before if A.ndim == 2 else g[..., :, None] * (before)[",
        ),
        ("du = (np.conj(B_bar) * g)", "du = (B_bar * g)"),
        ("* np.conj(states[..., 1:, :, :])", "* states[..., 1:, :, :]"),
    ),
    _wrong_gradient(
        "adjoint_not_transposed",
        "the adjoint recurrence conjugates a dense Ā but does not transpose it",
        ("np.conj(np.swapaxes(A, -1, -2))", "np.conj(A)"),
    ),
    _wrong_gradient(
        "gradient_of_matrix_transposed",
        "the gradient of a dense Ā is the transpose, Σ_t conj(x_{t-1}) g_tᵀ: it is Σ_t g_t x_{t-1}ᴴ",
        ("g[..., :, None] * np.conj(before)[..., None, :]", "g[..., None, :] * np.conj(before)[..., :, None]"),
    ),
    _wrong_gradient(
        "gradient_of_matrix_a_step_late",
        "the gradient of Ā meets x_t: the step from t-1 to t multiplies x_{t-1}",
        ("gradient_of_matrix(A_bar, g, states[..., :-1, :, :])", "gradient_of_matrix(A_bar, g, states[..., 1:, :, :])"),
    ),
    _wrong_gradient(
        "gradient_forgets_initial_state",
        "the gradient of Ā takes the state before the first step to be zero",
        ("    xs = [x]\n", "    xs = [0 * x]\n"),
    ),
    _wrong_gradient(
        "gradient_of_input_without_skip",
        "the gradient of u lacks the skip connection: D·dy",
        ('"u": du if D is None else du + D * dy', '"u": du'),
    ),
    _wrong_gradient(
        "dstate_ignored",
        "the cotangent of the final state is ignored: the adjoint recurrence starts from it",
        ("last = np.zeros_like(C * x) if dstate is None else np.broadcast_to(dstate, x.shape)", "last = np.zeros_like(C * x)"),
    ),
)

_KERNEL = (
    _wrong_kernel("off_by_one_power", "the kernel starts with C Ā B̄: K_0 = C B̄", (_ROW + _STEP, _STEP + _ROW)),
    _wrong_kernel(
        "time_reversed",
        "the kernel is given last power first, as a correlation wants it: K_0 = C B̄ comes first",
        ("observed(np.stack(rows), pairs)", "observed(np.stack(rows[::-1]), pairs)"),
    ),
    _wrong_kernel(
        "half_of_a_pair",
        "pairs=True gives Re(C Ā^k B̄), half of what both of a conjugate pair give: K = 2 Re(C Ā^k B̄)",
        (_OBSERVED, "return y.real"),
    ),
    _wrong_kernel(
        "always_pairs",
        "the real part is doubled whatever `pairs` says (S4D's convention): by default all states are given",
        (_OBSERVED, "return 2 * y.real"),
    ),
    _wrong_kernel("modulus", "K is |C Ā^k B̄|, the modulus: it is the real part", (_OBSERVED, "return 2 * abs(y) if pairs else abs(y)")),
    _wrong_kernel(
        "powers_of_the_modulus",
        "powers of |Ā| are taken, without the rotation: Ā^k = |Ā|^k e^(ikθ)",
        ("orbit(A_bar, np.ones_like(A_bar), length)", "orbit(abs(A_bar), np.ones_like(A_bar), length)"),
        form=kernel.ssm_kernel_vandermonde,
    ),
    _wrong_kernel(
        "output_map_conjugated",
        "C is conjugated (an inner product): K_k = Re(C Ā^k B̄), with nothing conjugated",
        (_ROW, _ROW.replace("C * x", "np.conj(C) * x")),
    ),
    _wrong_kernel(
        "matrix_transposed",
        "powers of a dense Ā are those of its transpose: that is the kernel with B̄ and C exchanged",
        (_APPLIED, "return A * x if A.ndim == 2 else (np.swapaxes(A, -1, -2) @ x[..., None])[..., 0]"),
    ),
    _wrong_kernel(
        "truncated_output_map",
        "the kernel is that of C (I - Ā^L), S4's trained parameter: the contract takes C, and the L is the caller's to undo",
        (
            "    return observed(np.stack(rows), pairs) if rows",
            "    rows = [r - (C * y).sum(axis=-1) for r, y in zip(rows, orbit(A_bar, x, length), strict=True)]\n"
            "    return observed(np.stack(rows), pairs) if rows",
        ),
    ),
    _wrong_kernel_gradient(
        "gradient_of_pairs_halved",
        "the gradient lacks the factor 2 of pairs=True, for Ā and B̄",
        ("into = np.conj(C) * ((2 if pairs else 1) * dy)", "into = np.conj(C) * (dy)"),
    ),
    _wrong_kernel_gradient(
        "conj_forgotten",
        "the gradient lacks the conjugates: g_k = conj(C) dK_k + Āᴴ g_{k+1} (JAX's convention returns conj(g))",
        ("into = np.conj(C) *", "into = C *"),
        ("return np.conj(A) if A.ndim == 2 else np.conj(np.swapaxes(A, -1, -2))", "return A if A.ndim == 2 else np.swapaxes(A, -1, -2)"),
        (
            "return g * np.conj(before) if A.ndim == 2 else g[..., :, None] * np.conj(before)[",
            "return g * before if A.ndim == 2 else g[..., :, None] * (before)[",
        ),
        ("* dy[..., None] * np.conj(x)", "* dy[..., None] * x"),
    ),
    _wrong_kernel_gradient(
        "gradient_of_matrix_a_step_late",
        "the gradient of Ā meets x_k: the step from k-1 to k multiplies x_{k-1}",
        ("gradient_of_matrix(A_bar, g[1:], x[:-1])", "gradient_of_matrix(A_bar, g, x)"),
    ),
    _wrong_kernel_gradient(
        "adjoint_not_carried",
        "a row's cotangent is not handed on to the powers before it: g_k = conj(C) dK_k + Āᴴ g_{k+1}",
        ("        g = applied(back, g)\n", "        g = 0 * applied(back, g)\n"),
    ),
)

MUTANTS = _SSM + _KERNEL
