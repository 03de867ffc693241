"""Mistakes in discretisation: the step, the hold, and which inverse."""

from refimpl.conformance.mutants import Mutant, edited
from refimpl.ops.state_space import discretize as de
from refimpl.ops.state_space import discretize_diagonal as dd

_HOLD = "A_bar, B_bar = _augmented_exponential(dt * A, dt * B)"
_DIAGONAL_HOLD = "A_bar, B_bar = np.exp(z), dt * phi1(z) * b"

_DISCRETIZE = (
    Mutant(
        "discretize",
        "b_bar_is_dt_b",
        "B̄ of a zero-order hold is dt·B, as every Mamba code has it; the exact hold is the integral of e^(sA) B: ask for method='mamba' to get dt·B",
        edited(de.discretize, (_HOLD, "A_bar, B_bar = linalg.expm(dt * A), dt * B")),
        variant=True,
    ),
    Mutant(
        "discretize",
        "euler_for_zoh",
        "the exponential is cut after its first term, I + dt A: that is method 'euler'; a hold is exact",
        edited(de.discretize, (_HOLD, "A_bar, B_bar = _identity(A) + dt * A, dt * B")),
    ),
    Mutant(
        "discretize",
        "elementwise_exponential",
        "the exponential is taken of each entry: e^(dt A) is the exponential of a matrix",
        edited(de.discretize, (_HOLD, "A_bar, B_bar = np.exp(dt * A), _augmented_exponential(dt * A, dt * B)[1]")),
    ),
    Mutant(
        "discretize",
        "step_missing_from_b",
        "B̄ is as if dt were 1 in B's term: the input acts for dt",
        edited(de.discretize, (_HOLD, "A_bar, B_bar = _augmented_exponential(dt * A, B)")),
    ),
    Mutant(
        "discretize",
        "step_twice_in_b",
        "B̄ holds dt twice: the integral over the step has it already",
        edited(de.discretize, (_HOLD, _HOLD + "\n        B_bar = dt * B_bar")),
    ),
    Mutant(
        "discretize",
        "hold_by_inverse",
        "B̄ is computed as A⁻¹ (Ā - I) B: that divides by zero where A is singular and cancels where the step is short; the augmented exponential does neither",
        edited(de.discretize, (_HOLD, "A_bar = linalg.expm(dt * A)\n        B_bar = linalg.solve(A, (A_bar - _identity(A)) @ B)")),
    ),
    Mutant(
        "discretize",
        "a_transposed",
        "A acts from the right: x' = A x, with x a column",
        edited(
            de.discretize,
            (
                "A, B, dt, column = _together(A, B, dt)\n    if method",
                "A, B, dt, column = _together(A, B, dt)\n    A = np.swapaxes(A, -1, -2)\n    if method",
            ),
        ),
    ),
    Mutant(
        "discretize",
        "bilinear_half_missing",
        "the bilinear method solves with I - dt A: half the step belongs to each side, I - dt/2 A and I + dt/2 A",
        edited(de.discretize, ("return eye - alpha * A, np", "return eye - (alpha > 0) * A, np")),
    ),
    Mutant(
        "discretize",
        "bilinear_b_halved",
        "B̄ of the bilinear method has dt/2: it is (I - dt/2 A)⁻¹ dt B",
        edited(
            de.discretize,
            (
                "(_solve(M, R, method), A.shape[-1])\n    return",
                "(_solve(M, R, method), A.shape[-1])\n        B_bar = B_bar / 2 if method == 'bilinear' else B_bar\n    return",
            ),
        ),
    ),
    Mutant(
        "discretize",
        "bilinear_b_not_solved",
        "B̄ of an implicit method is dt B: it goes through the same solve as Ā",
        edited(
            de.discretize,
            ("(_solve(M, R, method), A.shape[-1])\n    return", "(_solve(M, R, method), A.shape[-1])\n        B_bar = dt * B\n    return"),
        ),
    ),
    Mutant(
        "discretize",
        "forward_and_backward_swapped",
        "'euler' is implicit and 'backward_euler' explicit: forward Euler is I + dt A, backward (I - dt A)⁻¹",
        edited(
            de.discretize,
            (
                'IMPLICITNESS = {"euler": 0, "bilinear": 0.5, "backward_euler": 1}',
                'IMPLICITNESS = {"euler": 1, "bilinear": 0.5, "backward_euler": 0}',
            ),
        ),
    ),
    Mutant(
        "discretize",
        "gradient_not_adjoint",
        "the gradient goes forward through the exponential: the adjoint of its derivative at X is the derivative at Xᴴ",
        edited(de.discretize_vjp, ("[_adjoint(A), _adjoint(B / size)]", "[A, _adjoint(B / size)]")),
        of_gradient=True,
    ),
    Mutant(
        "discretize",
        "gradient_of_step_without_input",
        "d(dt) forgets B: the step scales the input too",
        edited(de.discretize_vjp, (" + (np.conj(B) * dY).sum(axis=(-2, -1))\n", "\n")),
        of_gradient=True,
    ),
)

_DISCRETIZE_DIAGONAL = (
    Mutant(
        "discretize_diagonal",
        "b_bar_is_dt_b",
        "b̄ of a zero-order hold is dt·b, as every Mamba code has it; the exact hold is dt φ(dt a) b: ask for method='mamba' to get dt·b",
        edited(dd.discretize_diagonal, (_DIAGONAL_HOLD, "A_bar, B_bar = np.exp(z), dt * b")),
        variant=True,
    ),
    Mutant(
        "discretize_diagonal",
        "euler_for_zoh",
        "the exponential is cut after its first term, 1 + dt a: that is method 'euler'; a hold is exact",
        edited(dd.discretize_diagonal, (_DIAGONAL_HOLD, "A_bar, B_bar = 1 + z, dt * b")),
    ),
    Mutant(
        "discretize_diagonal",
        "hold_by_difference",
        "b̄ is (e^z - 1) b / a: 0/0 at a = 0, and all digits cancel as dt a -> 0; use expm1",
        edited(dd.discretize_diagonal, (_DIAGONAL_HOLD, "A_bar, B_bar = np.exp(z), (np.exp(z) - 1) / z * dt * b")),
    ),
    Mutant(
        "discretize_diagonal",
        "step_missing_from_b",
        "b̄ is φ(dt a) b: the input acts for dt, so there is a factor dt",
        edited(dd.discretize_diagonal, (_DIAGONAL_HOLD, "A_bar, B_bar = np.exp(z), phi1(z) * b")),
    ),
    Mutant(
        "discretize_diagonal",
        "sign_of_a",
        "ā = e^(-dt a): a is the eigenvalue itself (negative where the state decays), not a rate of decay",
        edited(dd.discretize_diagonal, (_DIAGONAL_HOLD, "A_bar, B_bar = np.exp(-z), dt * phi1(-z) * b")),
    ),
    Mutant(
        "discretize_diagonal",
        "imaginary_part_dropped",
        "the state decays but does not turn: a is complex, and its imaginary part is the frequency",
        edited(dd.discretize_diagonal, (_DIAGONAL_HOLD, "A_bar, B_bar = np.exp(z.real) + 0 * z, dt * phi1(z.real) * b + 0 * z")),
    ),
    Mutant(
        "discretize_diagonal",
        "bilinear_half_missing",
        "the bilinear method divides by 1 - dt a: half the step belongs to each side, 1 - dt/2 a and 1 + dt/2 a",
        edited(
            dd.discretize_diagonal,
            (
                "A_bar, B_bar = (1 + (1 - alpha) * z) / (1 - alpha * z), dt * b / (1 - alpha * z)",
                "A_bar, B_bar = (1 + (1 - alpha) * z) / (1 - (alpha > 0) * z), dt * b / (1 - (alpha > 0) * z)",
            ),
        ),
    ),
    Mutant(
        "discretize_diagonal",
        "gradient_ignores_input",
        "da comes from ā alone: b̄ of a hold depends on a too",
        edited(
            dd.discretize_diagonal_vjp,
            ("dz = np.conj(dA_dz) * dA_bar + np.conj(dt * b * gain_dz) * dB_bar", "dz = np.conj(dA_dz) * dA_bar"),
        ),
        of_gradient=True,
    ),
)

MUTANTS = _DISCRETIZE + _DISCRETIZE_DIAGONAL
