"""The S4 kernel against exact fractions, SciPy's discretisation and impulse response, and complex steps."""

from fractions import Fraction

import numpy as np
import pytest
import scipy.signal

from refimpl.ops.state_space.hippo import hippo, nplr
from refimpl.ops.state_space.s4_kernel import OPS, error_bound, s4_kernel, s4_kernel_cauchy, s4_kernel_vjp

(OP,) = OPS
FORMS = pytest.mark.parametrize("form", list(OP.forms))
UNIT = 2.0**-53


def within(form, call, want):
    got, bound = OP.forms[form].function(**call), error_bound(**call, unit=UNIT)
    assert got.shape == want.shape
    assert np.all(abs(got - want) <= bound + 4 * UNIT * abs(want)), np.max(abs(got - want) / bound)


@FORMS
@pytest.mark.parametrize("length", [0, 1, 2, 5, 16])
def test_exact_fractions(form, length):
    """n = 2, real: A = diag(-1, -2) - p pᵀ with p = (1, 1/2), powers by hand in fractions."""
    F = Fraction
    h = F(1, 4)  # dt/2
    A = [[F(-2), F(-1, 2)], [F(-1, 2), F(-9, 4)]]
    m = [[1 - h * A[0][0], -h * A[0][1]], [-h * A[1][0], 1 - h * A[1][1]]]
    det = m[0][0] * m[1][1] - m[0][1] * m[1][0]
    inverse = [[m[1][1] / det, -m[0][1] / det], [-m[1][0] / det, m[0][0] / det]]
    plus = [[1 + h * A[0][0], h * A[0][1]], [h * A[1][0], 1 + h * A[1][1]]]
    A_bar = [[sum(inverse[i][k] * plus[k][j] for k in range(2)) for j in range(2)] for i in range(2)]
    B, C, want = [F(3), F(-1)], [F(2), F(5)], []
    x = [sum(inverse[i][k] * 2 * h * B[k] for k in range(2)) for i in range(2)]
    for _ in range(length):
        want.append(float(C[0] * x[0] + C[1] * x[1]))
        x = [sum(A_bar[i][k] * x[k] for k in range(2)) for i in range(2)]
    call = {"Lambda": np.array([-1, -2 + 0j]), "P": np.array([1, 0.5 + 0j]), "B": np.array([3, -1 + 0j])}
    within(form, call | {"C": np.array([2, 5 + 0j]), "dt": np.asarray(0.5), "length": length}, np.array(want))


@FORMS
@pytest.mark.parametrize("measure", ["legs", "legt", "lagt"])
def test_is_the_impulse_response_of_hippo_by_scipy(form, measure, rng):
    """In the real basis, by cont2discrete and dimpulse, whose output comes a step late: its row k + 1 is C Ā^k B̄."""
    n, L, dt = 8, 40, 0.05
    A, B = hippo(measure, n)
    C = rng.standard_normal(n)
    A_bar, B_bar, *_ = scipy.signal.cont2discrete((A, B[:, None], C[None, :], np.zeros((1, 1))), dt, method="bilinear")
    _, (response,) = scipy.signal.dimpulse((A_bar, B_bar, C[None, :], np.zeros((1, 1)), dt), n=L + 1)
    Lambda, P, B_, V = nplr(measure, n)
    call = {"Lambda": Lambda, "P": P, "B": B_, "C": C @ V, "dt": np.asarray(dt), "length": L}
    got, want = OP.forms[form].function(**call), response[1:, 0]
    bound = error_bound(**call, unit=UNIT)
    assert np.all(abs(got - want) <= bound + 200 * n * UNIT * np.linalg.norm(C) * np.linalg.norm(B))


def test_diagonal_in_closed_form(rng):
    """Without P: K_k = Re Σ C B dt λ̄^k / (1 - dt λ/2), λ̄ = (1 + dt λ/2) / (1 - dt λ/2)."""
    call = OP.sample(rng, L=30, n=5)
    call["P"] = 0 * call["P"]
    z = call["dt"] * call["Lambda"] / 2
    bar = (1 + z) / (1 - z)
    want = ((call["C"] * call["B"] * call["dt"] / (1 - z)) * bar ** np.arange(30)[:, None]).sum(axis=-1).real
    for form in OP.forms:
        within(form, call, want)


@pytest.mark.parametrize(("n", "length"), [(1, 1), (4, 7), (16, 257), (64, 1024), (64, 4096)])
@pytest.mark.parametrize("matrix", [False, True])
def test_forms_agree(n, length, matrix, rng):
    call = OP.sample(rng, n=n, L=length, matrix=matrix)
    one, other = s4_kernel(**call), s4_kernel_cauchy(**call)
    assert np.max(abs(one - other)) <= 1e-10 * max(1, np.max(abs(one)))
    assert np.all(abs(one - other) <= 2 * error_bound(**call, unit=UNIT))


def test_forms_agree_on_hippo(rng):
    Lambda, P, B, _ = nplr("legs", 64)
    C = rng.standard_normal(64) + 1j * rng.standard_normal(64)
    call = {"Lambda": Lambda, "P": P[:, 0], "B": B, "C": C, "dt": 1e-2, "length": 1024}
    one, other = s4_kernel(**call), s4_kernel_cauchy(**call)
    assert np.max(abs(one - other)) <= 1e-10 * np.max(abs(one))


@pytest.mark.parametrize("matrix", [False, True])
def test_gradient_by_central_differences_in_longdouble(matrix, rng):
    """Re<g, dx> for random directions, complex ones where the argument is complex."""
    call = OP.sample(rng, L=9, matrix=matrix)
    dy = rng.standard_normal(9)
    gradient = s4_kernel_vjp(dy, **call)
    assert gradient.keys() == {"Lambda", "P", "B", "C", "dt"}
    for name, g in gradient.items():
        assert g.shape == call[name].shape and g.dtype == call[name].dtype
        for _ in range(3):
            e = rng.standard_normal(g.shape) + (1j * rng.standard_normal(g.shape) if g.dtype.kind == "c" else 0)
            wide = {k: v.astype(np.result_type(v.dtype, np.longdouble)) if isinstance(v, np.ndarray) else v for k, v in call.items()}
            h = np.longdouble(1e-7)
            ahead, behind = (s4_kernel(**{**wide, name: wide[name] + sign * h * e}) for sign in (1, -1))
            want = float(((ahead - behind) / (2 * h)) @ dy)
            got = float(np.sum(np.conj(g) * e).real)
            assert abs(got - want) <= 1e-8 * max(1, abs(want)), name


def test_dt_as_a_number(rng):
    call = OP.sample(rng)
    assert np.array_equal(s4_kernel(**call), s4_kernel(**{**call, "dt": float(call["dt"])}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"length": -1}, "length must be an integer of at least 0, got -1"),
        ({"length": 2.5}, "length must be an integer"),
        ({"dt": np.asarray(1j)}, "dt must be real"),
        ({"dt": np.ones(2)}, "dt must have shape"),
        ({"C": np.ones(3)}, "C must have shape"),
        ({"P": np.ones((3, 1))}, "P must have shape"),
    ],
)
@FORMS
def test_bad_input(form, changes, says, rng):
    with pytest.raises(ValueError, match=f"s4_kernel: {says}"):
        OP.forms[form].function(**{**OP.sample(rng), **changes})
