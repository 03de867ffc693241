"""lru against closed forms, SciPy's lfilter and dlsim, and exact numbers."""

import numpy as np
import pytest
import scipy.signal

from refimpl.ops.recurrence.lru import OPS, error_bound, lru, lru_vjp

(OP,) = OPS
FORMS = pytest.mark.parametrize("form", list(OP.forms))
UNIT = 2.0**-53


def within(got, want, bound):
    assert got.shape == want.shape
    assert np.all(abs(got - want) <= bound), f"{np.max(abs(got - want) / np.maximum(bound, 1e-300)):.3g} times the bound"


def parameters(lam):
    lam = np.asarray(lam, dtype=complex)
    return np.log(-np.log(abs(lam))), np.log(np.angle(lam) % (2 * np.pi))


@FORMS
def test_a_quarter_turn_by_hand(form):
    """λ = i/2 and γ = √(3/4): x = γ (1, i/2, -1/4, -i/8), and y = Re((1 - i) x) + 10 u."""
    nu, theta = parameters([0.5j])
    u = np.array([[1.0], [0.0], [0.0], [0.0]])
    B, C, D = np.ones((1, 1)), np.array([[1 - 1j]]), np.array([10.0])
    y, state = OP.forms[form].function(u, nu, theta, B, C, D, return_state=True)
    want = np.sqrt(0.75) * np.array([[1.0], [0.5], [-0.25], [-0.125]]) + 10 * u
    bound = error_bound(u, nu, theta, B, C, D, unit=UNIT, return_state=True)
    within(y, want, bound[0])
    within(state, np.sqrt(0.75) * np.array([-0.125j]), bound[1])


@FORMS
def test_one_state_is_a_resonator_of_scipy_lfilter(form, rng):
    """Re(1/(1 - λ/z)) = (1 - Re λ/z) / (1 - 2 Re λ/z + |λ|²/z²), a filter of order two with real coefficients."""
    lam = 0.9 * np.exp(0.7j)
    nu, theta = parameters([lam])
    u, one = rng.standard_normal((80, 1)), np.ones((1, 1))
    want = scipy.signal.lfilter([1, -lam.real], [1, -2 * lam.real, abs(lam) ** 2], u[:, 0])[:, None]
    args = (u, nu, theta, one, one, np.zeros(1), np.ones(1))
    within(OP.forms[form].function(*args), want, 4 * error_bound(*args, unit=UNIT))


@FORMS
def test_is_scipy_dlsim_of_the_real_system(form, rng):
    """The same system with real and imaginary parts as separate states."""
    lam, n, c, T = np.array([0.8 * np.exp(0.3j), 0.5 * np.exp(2j), 0.95 * np.exp(1.1j)]), 3, 2, 25
    B, C = rng.standard_normal((2, n, c)), rng.standard_normal((2, c, n))
    D, gamma, u = rng.standard_normal(c), rng.uniform(0.5, 1, n), rng.standard_normal((T, c))
    A = np.block([[np.diag(lam.real), -np.diag(lam.imag)], [np.diag(lam.imag), np.diag(lam.real)]])
    inputs = np.concatenate([gamma[:, None] * B[0], gamma[:, None] * B[1]])
    outputs = np.concatenate([C[0], -C[1]], axis=1)
    # dlsim's state takes its input a step later, so y_t = C (A x_{t-1} + B u_t) + D u_t
    _, want, _ = scipy.signal.dlsim((A, inputs, outputs @ A, outputs @ inputs + np.diag(D), 1), u)
    nu, theta = parameters(lam)
    args = (u, nu, theta, B[0] + 1j * B[1], C[0] + 1j * C[1], D, gamma)
    within(OP.forms[form].function(*args), want, 4 * error_bound(*args, unit=UNIT))


def test_gamma_keeps_the_variance(rng):
    """Inputs of variance 1 give states of variance 1: the mean over n independent ones is within 5 √(2/n) of it."""
    T, n = 400, 3000
    nu, theta = parameters(0.98 * np.exp(1j * rng.uniform(0.1, 3, n)))
    _, state = lru(rng.standard_normal((T, n)), nu, theta, np.eye(n), np.zeros((n, n)), np.zeros(n), return_state=True)
    assert abs(np.mean(abs(state) ** 2) - 1) < 5 * np.sqrt(2 / n)


def test_gamma_near_the_unit_circle():
    """1 - |λ|² for e^ν = 2^-40 is 2^-39 - 2^-79 ...: a difference of floats would leave 13 bits."""
    nu, one = np.log([2.0**-40]), np.ones((1, 1))
    y = lru(one, nu, np.array([-300.0]), one, one, np.zeros(1))
    w = 2.0**-39
    assert abs(y[0, 0] - np.sqrt(w - w**2 / 2)) <= 32 * UNIT * np.sqrt(w)  # of which 28 are log 2^-40


def test_gradient_of_one_step_by_hand():
    """T = 1: y = Re(C (λ s + γ B u)) + D u, with γ given; λ = i/2 and w = log λ."""
    nu, theta = parameters([0.5j])
    u, s, B, C, D, gamma = (
        np.array([[3.0]]),
        np.array([2 + 1j]),
        np.array([[1 + 2j]]),
        np.array([[1 - 1j]]),
        np.array([5.0]),
        np.array([0.5]),
    )
    g = lru_vjp(np.ones((1, 1)), u, nu, theta, B, C, D, gamma, state=s)
    turned = C[0, 0] * 0.5j * s[0]  # ∂y = Re(turned dw)
    want = {
        "u": (C[0, 0] * 0.5 * B[0, 0]).real + 5,
        "nu_log": -np.log(2) * turned.real,
        "theta_log": -np.pi / 2 * turned.imag,
        "B": np.conj(C[0, 0] * 0.5 * 3),
        "C": np.conj(0.5j * s[0] + 0.5 * B[0, 0] * 3),
        "D": 3,
        "gamma": (C[0, 0] * B[0, 0] * 3).real,
        "state": np.conj(C[0, 0] * 0.5j),
    }
    for name, value in want.items():
        assert abs(g[name].reshape(-1)[0] - value) <= 32 * UNIT * max(1, abs(value)), name


def test_real_arguments_must_be_real():
    nu, theta = parameters([0.5j])
    with pytest.raises(ValueError, match="lru: u must be real"):
        lru(np.ones((2, 1)) * 1j, nu, theta, np.ones((1, 1)), np.ones((1, 1)), np.zeros(1))
