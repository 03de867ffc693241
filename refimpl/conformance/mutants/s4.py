"""Mistakes in the S4 kernel: conjugates, truncation, pairs, the bilinear rule, the roots of unity."""

from refimpl.conformance.mutants import Mutant, edited
from refimpl.ops.state_space import s4_kernel as s4

_READ = "rows.append((C * x).sum())"
_STEP = '    A_bar, x = bilinear.discretize(_dense(Lambda, P), B, dt, method="bilinear")\n'
_RESULT = "return np.stack(rows).real if rows else"
_ROOTS = "z = np.exp(-2j * pi_of(dt) * constant(np.arange(length), dt) / length)  # (L,)"

MUTANTS = (
    Mutant(
        "s4_kernel",
        "p_not_conjugated",
        "A is diag(Λ) - P Pᵀ: the second P is conjugated, A = diag(Λ) - P Pᴴ",
        edited(s4.s4_kernel, ("- P @ np.conj(P).T\n", "- P @ P.T\n")),
    ),
    Mutant(
        "s4_kernel",
        "low_rank_added",
        "A is diag(Λ) + P Pᴴ: the low-rank part is subtracted",
        edited(s4.s4_kernel, ("- P @ np.conj(P).T\n", "+ P @ np.conj(P).T\n")),
    ),
    Mutant(
        "s4_kernel",
        "low_rank_missing",
        "P has no effect: A is diag(Λ) - P Pᴴ, diagonal models (S4D) drop P, this operator does not",
        edited(s4.s4_kernel, ("- P @ np.conj(P).T\n", "- 0 * P @ np.conj(P).T\n")),
    ),
    Mutant(
        "s4_kernel",
        "c_is_truncated",
        "C is taken for C(I - Ā^L), which S4 trains: then K_k = Re(C (I - Ā^L)⁻¹ Ā^k B̄); here C is C, so multiply it by I - Ā^L first",
        edited(s4.s4_kernel_cauchy, ("    C = C - C @ np.linalg.matrix_power(A_bar, length)  # C̃\n", "")),
        variant=True,
    ),
    Mutant(
        "s4_kernel",
        "c_conjugated",
        "C is conjugated: K_k = Re(C Ā^k B̄) takes C as it stands (some code keeps conj(C))",
        edited(s4.s4_kernel, (_READ, "rows.append((np.conj(C) * x).sum())")),
        variant=True,
    ),
    Mutant(
        "s4_kernel",
        "twice_the_real_part",
        "the kernel is doubled, as if one of each conjugate pair were given: all n eigenvalues are given here",
        edited(s4.s4_kernel, (_RESULT, "return 2 * np.stack(rows).real if rows else")),
        variant=True,
    ),
    Mutant(
        "s4_kernel",
        "half_of_the_pairs",
        "only the eigenvalues with a positive imaginary part are read, doubled: all n are given, and need not come in pairs",
        edited(s4.s4_kernel, (_READ, "rows.append((2 * C * x * (Lambda.imag > 0)).sum())")),
    ),
    Mutant(
        "s4_kernel",
        "bilinear_half_missing",
        "the bilinear rule takes the whole step on both sides: (I - dt/2 A)⁻¹ (I + dt/2 A) has half of it on each",
        edited(s4.s4_kernel, (_STEP, '    A_bar, x = bilinear.discretize(2 * _dense(Lambda, P), B, dt, method="bilinear")\n')),
    ),
    Mutant(
        "s4_kernel",
        "zero_order_hold",
        "the system is discretised by a zero-order hold, as S4D does: S4 takes the bilinear rule",
        edited(s4.s4_kernel, (_STEP, '    A_bar, x = bilinear.discretize(_dense(Lambda, P), B, dt, method="zoh")\n')),
    ),
    Mutant(
        "s4_kernel",
        "step_missing_from_b",
        "B̄ lacks its factor dt: B̄ = (I - dt/2 A)⁻¹ dt B",
        edited(s4.s4_kernel, (_STEP, _STEP + "    x = x / dt\n")),
    ),
    Mutant(
        "s4_kernel",
        "a_power_late",
        "K starts with C Ā B̄: its first row is C B̄, the answer at the moment of the impulse",
        edited(s4.s4_kernel, (_STEP, _STEP + "    x = A_bar @ x\n")),
    ),
    Mutant(
        "s4_kernel",
        "roots_turn_the_other_way",
        "the roots of unity are e^(+2πik/L) where the inverse transform expects e^(-2πik/L): the kernel comes out in reversed order",
        edited(s4.s4_kernel_cauchy, (_ROOTS, _ROOTS.replace("-2j", "2j"))),
    ),
    Mutant(
        "s4_kernel",
        "modulus_for_real_part",
        "the kernel is |C Ā^k B̄|: it is the real part",
        edited(s4.s4_kernel, (_RESULT, "return abs(np.stack(rows)) if rows else")),
    ),
    Mutant(
        "s4_kernel",
        "imaginary_part",
        "the kernel is the imaginary part: it is the real part",
        edited(s4.s4_kernel, (_RESULT, "return np.stack(rows).imag if rows else")),
    ),
    Mutant(
        "s4_kernel",
        "woodbury_without_identity",
        "the correction divides by s Pᴴ D⁻¹ P: Woodbury's identity has I + s Pᴴ D⁻¹ P",
        edited(
            s4.s4_kernel_cauchy, ("M = np.eye(P.shape[-1], dtype=sums.dtype) + s", "M = 1e-3 * np.eye(P.shape[-1], dtype=sums.dtype) + s")
        ),
    ),
    Mutant(
        "s4_kernel",
        "gradient_conjugated",
        "gradients of complex arrays come conjugated (JAX's convention): here Re<g, dx> with <a, b> = Σ conj(a) b, as in torch",
        edited(
            s4.s4_kernel_vjp,
            (
                'return {"Lambda": np.diagonal(dA), "P": dP.reshape(P.shape), "B": through["B"], "C": dC,',
                'return {"Lambda": np.conj(np.diagonal(dA)), "P": np.conj(dP.reshape(P.shape)), "B": np.conj(through["B"]), "C": np.conj(dC),',
            ),
        ),
        of_gradient=True,
    ),
    Mutant(
        "s4_kernel",
        "gradient_of_one_p",
        "dP follows one of the two P only: A = diag(Λ) - P Pᴴ gives dP = -(dA + dAᴴ) P",
        edited(s4.s4_kernel_vjp, ("dP = -(dA + np.conj(dA).T) @ columns", "dP = -dA @ columns")),
        of_gradient=True,
    ),
)
