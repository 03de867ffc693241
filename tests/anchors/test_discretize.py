"""discretize against SciPy's cont2discrete and expm_frechet, flint's exponential, closed forms and exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.signal

from refimpl.ops.state_space.discretize import METHODS, OPS, discretize, discretize_vjp, error_bound

(OP,) = OPS
FORMS = pytest.mark.parametrize("form", list(OP.forms))
UNIT = 2.0**-53
SCIPY = {"zoh": "zoh", "bilinear": "bilinear", "euler": "euler", "backward_euler": "backward_diff"}


def legs(n):
    i = np.arange(n)
    return -np.tril(np.sqrt((2 * i[:, None] + 1) * (2 * i + 1)), -1) - np.diag(i + 1.0)


def within(got, want, bound):
    for x, y, b in zip(got, want, bound, strict=True):
        assert x.shape == y.shape
        assert np.all(abs(x - y) <= b), f"{np.max(abs(x - y) / np.maximum(b, 1e-300)):.3g} times the bound"


@FORMS
@pytest.mark.parametrize("method", list(SCIPY))
@pytest.mark.parametrize("system", ["random", "legs", "singular", "oscillator"])
def test_is_scipy_cont2discrete(form, method, system, rng):
    A = {
        "random": rng.standard_normal((5, 5)) - 2 * np.eye(5),
        "legs": legs(5),
        "singular": np.diag([0.0, -1, -2, 0, 3]),
        "oscillator": np.eye(5, k=1) - np.eye(5, k=-1),
    }[system]
    B, dt = rng.standard_normal((5, 2)), 0.3
    want = scipy.signal.cont2discrete((A, B, np.eye(5), np.zeros((5, 2))), dt, method=SCIPY[method])[:2]
    within(OP.forms[form].function(A, B, dt, method=method), want, [2 * E for E in error_bound(A, B, dt, unit=UNIT, method=method)])


@FORMS
def test_mamba_is_scipy_expm_and_dt_b(form, rng):
    A, B, dt = legs(4), rng.standard_normal((4, 1)), 0.2
    within(
        OP.forms[form].function(A, B, dt, method="mamba"),
        (scipy.linalg.expm(dt * A), dt * B),
        [2 * E for E in error_bound(A, B, dt, unit=UNIT, method="mamba")],
    )


@FORMS
def test_integrators_without_an_inverse(form):
    """x''' = u: exp(dt A) is a finite sum, exact in fractions."""
    dt = Fraction(3, 8)
    A, B = np.eye(3, k=1), np.array([0.0, 0.0, 1.0])
    want = np.array([[1, dt, dt**2 / 2], [0, 1, dt], [0, 0, 1]], dtype=float), np.array([dt**3 / 6, dt**2 / 2, dt], dtype=float)
    within(OP.forms[form].function(A, B, float(dt)), want, error_bound(A, B, float(dt), unit=UNIT))


@FORMS
def test_damped_oscillator_in_closed_form(form):
    decay, turn, dt = 0.3, 2.0, 0.7
    A, B = np.array([[-decay, turn], [-turn, -decay]]), np.array([1.0, 0.0])
    e, c, s = np.exp(-decay * dt), np.cos(turn * dt), np.sin(turn * dt)
    z = (np.exp((-decay + 1j * turn) * dt) - 1) / (-decay + 1j * turn)  # ∫ e^(λ s) ds, of (x_1 - i x_2)
    want = e * np.array([[c, s], [-s, c]]), np.array([z.real, -z.imag])
    within(OP.forms[form].function(A, B, dt), want, error_bound(A, B, dt, unit=UNIT))


@FORMS
def test_bilinear_in_fractions(form):
    A, B, dt = [[Fraction(-1), Fraction(2)], [Fraction(0), Fraction(-3)]], [Fraction(1), Fraction(4)], Fraction(1, 2)
    m00, m01, m11 = 1 - dt / 2 * A[0][0], -dt / 2 * A[0][1], 1 - dt / 2 * A[1][1]  # upper triangular, inverted by hand
    inverse = [[1 / m00, -m01 / (m00 * m11)], [Fraction(0), 1 / m11]]
    plus = [[1 + dt / 2 * A[0][0], dt / 2 * A[0][1]], [Fraction(0), 1 + dt / 2 * A[1][1]]]
    want = (
        np.array([[sum(inverse[i][k] * plus[k][j] for k in range(2)) for j in range(2)] for i in range(2)], dtype=float),
        np.array([sum(inverse[i][k] * dt * B[k] for k in range(2)) for i in range(2)], dtype=float),
    )
    A, B, dt = np.array(A, dtype=float), np.array(B, dtype=float), float(dt)
    within(OP.forms[form].function(A, B, dt, method="bilinear"), want, error_bound(A, B, dt, unit=UNIT, method="bilinear"))


@pytest.mark.parametrize("n", [2, 6])
def test_longdouble_is_flints_exponential(n):
    """Beyond SciPy: 64 bits of mantissa against intervals of 200."""
    flint = pytest.importorskip("flint")
    if np.finfo(np.longdouble).nmant < 60:
        pytest.skip("longdouble is no longer than float64 here")
    A, B, dt = legs(n), np.arange(1.0, n + 1), 0.125
    with flint.ctx.workprec(200):
        E = flint.arb_mat([[dt * A[i, j] for j in range(n)] + [dt * B[i]] for i in range(n)] + [[0] * (n + 1)]).exp()
        exact = [[E[i, j].mid() for j in range(n + 1)] for i in range(n)]
        want = np.array([[np.longdouble(float(x)) + np.longdouble(float(x - flint.arb(float(x)))) for x in row] for row in exact])
    within(
        discretize(*map(np.longdouble, (A, B)), np.asarray(dt, np.longdouble)),
        (want[:, :n], want[:, n]),
        error_bound(A, B, dt, unit=2.0**-64),
    )


def test_hold_is_exact_for_piecewise_constant_input(rng):
    """The differential equation, solved by Runge-Kutta with the input held, visits the same states."""
    A, B, dt, u = legs(3), rng.standard_normal(3), 0.25, rng.standard_normal(6)
    A_bar, B_bar = discretize(A, B, dt)
    x = y = np.zeros(3)
    for value in u:
        x = A_bar @ x + B_bar * value
        solution = scipy.integrate.solve_ivp(
            lambda t, s, value=value: A @ s + B * value, (0, dt), y, method="DOP853", rtol=1e-12, atol=1e-13
        )
        y = solution.y[:, -1]
    assert np.all(abs(x - y) <= 6 * 1e-12 * (1 + abs(x)))


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("backward_euler", 1), ("bilinear", 2)])
def test_order_of_accuracy(method, order):
    """The state after one unit of time, in 2^k steps: the error falls as dt^order."""
    A, B, exact = legs(4) / 4, np.ones(4), scipy.linalg.expm(legs(4) / 4)
    errors = []
    for k in range(6, 11):
        A_bar, _ = discretize(A, B, 2.0**-k, method=method)
        errors.append(abs(np.linalg.matrix_power(A_bar, 2**k) - exact).max())
    slope = np.polyfit(np.arange(6, 11), -np.log2(errors), 1)[0]
    assert abs(slope - order) < 0.05
    A_bar, _ = discretize(A, B, 2.0**-6)
    assert abs(np.linalg.matrix_power(A_bar, 64) - exact).max() < errors[-1] / 1000


@pytest.mark.parametrize("method", METHODS)
def test_left_half_plane_inside_the_unit_circle(method):
    """HiPPO-LegS has eigenvalues -1 ... -n; forward Euler leaves the circle when dt n > 2, the others never."""
    A_bar, _ = discretize(legs(8), np.ones(8), 2.0, method=method)
    assert (np.abs(np.linalg.eigvals(A_bar)).max() < 1) == (method != "euler")


@pytest.mark.parametrize("dt", [1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("method", ["bilinear", "backward_euler", "zoh"])
def test_stable_systems_stay_stable_at_any_step(method, dt, rng):
    """Eigenvalues λ of the left half plane, of matrices that are not normal, go where the formula sends them: inside the circle."""
    for n in (2, 3, 5, 8):
        eigenvalues = -rng.uniform(0.01, 3, n) + 1j * rng.uniform(-10, 10, n)
        S = rng.standard_normal((n, n)) + 1j * rng.standard_normal((n, n))
        A = S @ np.diag(eigenvalues) @ np.linalg.inv(S)
        z = dt * eigenvalues
        image = {"bilinear": lambda z: (1 + z / 2) / (1 - z / 2), "backward_euler": lambda z: 1 / (1 - z), "zoh": np.exp}[method](z)
        found = np.linalg.eigvals(discretize(A, np.ones(n) + 0j, dt, method=method)[0])
        assert np.all(abs(image) < 1)
        assert np.max(abs(np.sort_complex(found) - np.sort_complex(image))) < 1e-9 * np.linalg.cond(S) ** 2
        assert np.max(abs(found)) < 1 + 1e-12 * np.linalg.cond(S) ** 2


@pytest.mark.parametrize("method", ["zoh", "mamba"])
def test_gradient_is_scipy_expm_frechet(method, rng):
    A, B, dt = rng.standard_normal((4, 4)), rng.standard_normal((4, 2)), 0.6
    dA_bar, dB_bar, V = rng.standard_normal((4, 4)), rng.standard_normal((4, 2)), rng.standard_normal((4, 4))
    g = discretize_vjp((dA_bar, dB_bar), A, B, dt, method=method)
    if method == "zoh":
        M, direction = np.zeros((6, 6)), np.zeros((6, 6))
        M[:4], direction[:4, :4] = np.concatenate([dt * A, dt * B], axis=1), dt * V
        change = scipy.linalg.expm_frechet(M, direction, compute_expm=False)[:4]
        want = (dA_bar * change[:, :4]).sum() + (dB_bar * change[:, 4:]).sum()
    else:
        want = (dA_bar * scipy.linalg.expm_frechet(dt * A, dt * V, compute_expm=False)).sum()
    scale = abs(g["A"]).sum() * abs(V).sum()
    assert abs((g["A"] * V).sum() - want) <= 64 * UNIT * scale


def test_a_step_for_each_channel(rng):
    A, B, dt = legs(3), rng.standard_normal(3), np.array([0.1, 0.2, 0.4])
    A_bar, B_bar = discretize(A, B, dt)
    assert A_bar.shape == (3, 3, 3)
    assert B_bar.shape == (3, 3)
    for i, step in enumerate(dt):
        within(
            (A_bar[i], B_bar[i]),
            scipy.signal.cont2discrete((A, B[:, None], A, B[:, None]), step)[0:1]
            + (scipy.signal.cont2discrete((A, B[:, None], A, B[:, None]), step)[1][:, 0],),
            [2 * E for E in error_bound(A, B, step, unit=UNIT)],
        )


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"discretize: method must be one of 'zoh', .*, got 'tustin'"):
        discretize(np.eye(2), np.ones(2), 0.1, method="tustin")
    with pytest.raises(ValueError, match="discretize: I - dt/2 A must have an inverse for the method 'bilinear'"):
        discretize(np.diag([2.0, 1.0]), np.ones(2), 1.0, method="bilinear")
    with pytest.raises(ValueError, match="discretize: dy must be a tuple"):
        discretize_vjp(np.eye(2), np.eye(2), np.ones(2), 1.0)


def test_step_as_a_python_number_does_not_promote():
    A, B = np.eye(2, dtype=np.float32), np.ones(2, dtype=np.float32)
    assert [x.dtype for x in discretize(A, B, 0.1)] == [np.float32, np.float32]
    assert [x.dtype for x in discretize(A, B, np.float64(0.1))] == [np.float32, np.float32]
