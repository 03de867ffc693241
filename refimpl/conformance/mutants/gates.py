"""Mistakes in recurrences whose decays are made of parameters and gates: lru, rg_lru."""

from refimpl.conformance.mutants import Mutant, edited
from refimpl.ops.recurrence import lru as lu
from refimpl.ops.recurrence import rg_lru as rg

_ROOT = "a, m = np.exp(w), np.sqrt(-np.expm1(2 * w))"
_STARTS = "a, m = np.where(starts, np.zeros_like(a), a), np.where(starts, np.ones_like(m), m)"

_RG_LRU = (
    Mutant(
        "rg_lru",
        "exponent_divides",
        "log a_t is r_t log a / exponent, as one public port has it; the paper's a^(c r) multiplies: exponent · r_t · log a",
        edited(rg.rg_lru, ("w = exponent * r * log_a", "w = r * log_a / exponent")),
        variant=True,
    ),
    Mutant(
        "rg_lru",
        "exponent_fixed",
        "the exponent is 8 whatever is asked for: it is an option",
        edited(rg.rg_lru, ("w = exponent * r * log_a", "w = 8 * r * log_a")),
    ),
    Mutant(
        "rg_lru",
        "root_of_one_minus_a",
        "the input is scaled by √(1 - a_t): the square of a_t stands under the root",
        edited(rg.rg_lru, (_ROOT, "a, m = np.exp(w), np.sqrt(-np.expm1(w))")),
    ),
    Mutant(
        "rg_lru",
        "factor_without_root",
        "the input is scaled by 1 - a_t²: by its root, which keeps the variance",
        edited(rg.rg_lru, (_ROOT, "a, m = np.exp(w), -np.expm1(2 * w)")),
    ),
    Mutant(
        "rg_lru",
        "factor_missing",
        "the input is not scaled: √(1 - a_t²) multiplies i_t x_t",
        edited(rg.rg_lru, (_ROOT, "a, m = np.exp(w), np.ones_like(w)")),
    ),
    Mutant(
        "rg_lru",
        "input_gate_forgotten",
        "i is not used: the input is i_t x_t",
        edited(rg.rg_lru, ("return a, m * (i * x)", "return a, m * x")),
    ),
    Mutant(
        "rg_lru",
        "recurrence_gate_forgotten",
        "r is not used: the decay is a^(exponent r_t), another at every step",
        edited(rg.rg_lru, ("w = exponent * r * log_a", "w = exponent * log_a + 0 * r")),
    ),
    Mutant(
        "rg_lru",
        "gates_swapped",
        "r gates the input and i the recurrence: r_t multiplies log a, i_t multiplies x_t",
        edited(
            rg.rg_lru,
            (
                "    a, m = _decay_and_factor(r, log_a, exponent, reset)\n    return",
                "    r, i = i, r\n    a, m = _decay_and_factor(r, log_a, exponent, reset)\n    return",
            ),
        ),
    ),
    Mutant(
        "rg_lru",
        "reset_ignored",
        "reset is ignored: where it holds, a segment starts and a_t = 0",
        edited(rg.rg_lru, (_STARTS, "pass")),
    ),
    Mutant(
        "rg_lru",
        "reset_keeps_factor",
        "at a reset the input is still scaled by √(1 - a²): the factor is 1 there",
        edited(rg.rg_lru, (_STARTS, "a = np.where(starts, np.zeros_like(a), a)")),
    ),
    Mutant(
        "rg_lru",
        "reset_one_late",
        "the state is cleared after the step that has the reset: h_t itself must not see what was before",
        edited(
            rg.rg_lru,
            (
                "starts = reset[..., None]",
                "starts = np.concatenate([0 * reset[..., :1], reset[..., :-1]], axis=-1).astype(bool)[..., None]",
            ),
        ),
    ),
    Mutant(
        "rg_lru",
        "gradient_not_through_factor",
        "the gates have no gradient through √(1 - a²): it depends on r and log_a as a does",
        edited(rg.rg_lru_vjp, ('dw = a * through["a"] + slope * np.conj(i * x) * db', 'dw = a * through["a"]')),
        of_gradient=True,
    ),
)

_LAMBDA = "return np.exp(-np.exp(nu_log) + 1j * np.exp(theta_log))"
_SCALE = "return np.sqrt(-np.expm1(-2 * np.exp(nu_log)))"
_OUT = "y = (x @ C.T).real + D * u"

_LRU = (
    Mutant(
        "lru",
        "gamma_missing",
        "the input is not scaled: γ = √(1 - |λ|²) multiplies B u where no gamma is given",
        edited(lu.lru, (_SCALE, "return np.ones_like(nu_log)")),
    ),
    Mutant(
        "lru",
        "gamma_of_lambda_not_squared",
        "γ is √(1 - |λ|): the square of |λ| stands under the root",
        edited(lu.lru, (_SCALE, "return np.sqrt(-np.expm1(-np.exp(nu_log)))")),
    ),
    Mutant(
        "lru",
        "gamma_is_a_logarithm",
        "gamma is exponentiated, as in code whose parameter is log γ: here it is γ itself",
        edited(
            lu.lru,
            (
                "gamma = _normaliser(nu_log) if gamma is None else gamma\n    x, last",
                "gamma = _normaliser(nu_log) if gamma is None else np.exp(gamma)\n    x, last",
            ),
        ),
    ),
    Mutant(
        "lru",
        "gamma_given_is_ignored",
        "γ is computed from λ though one is given",
        edited(
            lu.lru, ("gamma = _normaliser(nu_log) if gamma is None else gamma\n    x, last", "gamma = _normaliser(nu_log)\n    x, last")
        ),
    ),
    Mutant(
        "lru",
        "one_exponential_of_nu",
        "|λ| is exp(-ν): nu_log is the logarithm of the rate, |λ| = exp(-exp(ν))",
        edited(lu.lru, (_LAMBDA, "return np.exp(-abs(nu_log) + 1j * np.exp(theta_log))")),
    ),
    Mutant(
        "lru",
        "one_exponential_of_theta",
        "the angle of λ is θ: theta_log is its logarithm, the angle is exp(θ)",
        edited(lu.lru, (_LAMBDA, "return np.exp(-np.exp(nu_log) + 1j * theta_log)")),
    ),
    Mutant(
        "lru",
        "eigenvalues_conjugated",
        "the state turns the other way: λ = exp(-e^ν + i e^θ)",
        edited(lu.lru, (_LAMBDA, "return np.exp(-np.exp(nu_log) - 1j * np.exp(theta_log))")),
    ),
    Mutant(
        "lru",
        "real_part_doubled",
        "y = 2 Re(C x), as if one of each conjugate pair were given: all eigenvalues are, and the real part counts once",
        edited(lu.lru, (_OUT, "y = 2 * (x @ C.T).real + D * u")),
    ),
    Mutant(
        "lru",
        "real_part_of_the_state",
        "the output map sees only the real part of the state: Re(C x) is not C.real x.real",
        edited(lu.lru, (_OUT, "y = x.real @ C.real.T + D * u")),
    ),
    Mutant(
        "lru",
        "direct_path_forgotten",
        "D is ignored: y has a term D u",
        edited(lu.lru, (_OUT, "y = (x @ C.T).real")),
    ),
    Mutant(
        "lru",
        "output_before_update",
        "y_t is read from x_{t-1}: it sees the input of its own step",
        edited(
            lu.lru,
            (
                _OUT,
                "x = np.concatenate([(0 * last if state is None else state + 0 * last)[..., None, :], x[..., :-1, :]], axis=-2)[..., : x.shape[-2], :]\n    y = (x @ C.T).real + D * u",
            ),
        ),
    ),
    Mutant(
        "lru",
        "gradient_not_through_gamma",
        "ν has no gradient through γ: without a given gamma, γ depends on ν",
        edited(lu.lru_vjp, ("        dnu = dnu + np.where(still", "        dnu = dnu + 0 * np.where(still")),
        of_gradient=True,
    ),
    Mutant(
        "lru",
        "gradient_not_conjugated",
        "the gradient of the eigenvalues lacks a conjugate: dw = conj(λ) dλ",
        edited(lu.lru_vjp, ("dw = np.conj(lam) * through", "dw = lam * through")),
        of_gradient=True,
    ),
)

MUTANTS = _RG_LRU + _LRU
