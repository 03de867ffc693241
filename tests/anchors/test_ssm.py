"""ssm against hand-worked numbers, exact fractions, SciPy's simulations and filters, the analytic solution and torch's derivatives."""

from fractions import Fraction

import numpy as np
import pytest
import scipy.signal

from refimpl.ops.state_space.discretize import discretize
from refimpl.ops.state_space.discretize_diagonal import discretize_diagonal
from refimpl.ops.state_space.ssm import OPS, error_bound, ssm, ssm_vjp

(OP,) = OPS
FORMS = pytest.mark.parametrize("form", list(OP.forms))
UNIT = 2.0**-53


def column(*values):
    return np.array(values, dtype=float)[:, None]


def within(got, want, bound):
    assert got.shape == want.shape
    assert np.all(abs(got - want) <= bound), f"{np.max(abs(got - want) / np.maximum(bound, 1e-300)):.3g} times the bound"


def agrees(form, want, last, **call):
    y, x = OP.forms[form].function(**call, return_state=True)
    E, E_last = error_bound(**call, return_state=True, unit=UNIT)
    within(y, np.array(want, float), E)
    within(x, np.array(last), E_last)


# -- worked by hand -------------------------------------------------------------------------------------------------------


@FORMS
def test_three_steps_by_hand(form):
    """x = 8/2 + 2·3 = 10, then 10/2 - 2 = 3, then 3/2; y = 5 x + 7 u."""
    call = {"u": column(3, -1, 0), "A_bar": np.array([[0.5]]), "B_bar": np.array([[2.0]]), "C": np.array([[5.0]])}
    agrees(form, column(71, 8, 7.5), [[1.5]], **call, D=np.array([7.0]), state=np.array([[8.0]]))


@FORMS
def test_a_pair_by_hand(form):
    """Ā = i: x = i·1 + 1, then i·(1 + i) = -1 + i; Re((1 - 2i) x) = 3, then 1; twice that with pairs, and D u once."""
    call = {"u": column(1, 0), "A_bar": np.array([[1j]]), "B_bar": np.array([[1.0]]), "C": np.array([[1 - 2j]])}
    call |= {"state": np.ones((1, 1), complex), "D": np.array([10.0])}
    agrees(form, column(13, 1), [[-1 + 1j]], **call)
    agrees(form, column(16, 2), [[-1 + 1j]], **call, pairs=True)


@FORMS
def test_a_matrix_acts_on_columns(form):
    """Ā = [[0, 0], [1, 0]] moves x_0 to x_1: the second state is the input of the step before."""
    call = {
        "u": column(3, 5, 7),
        "A_bar": np.array([[[0.0, 0.0], [1.0, 0.0]]]),
        "B_bar": np.array([[1.0, 0.0]]),
        "C": np.array([[1.0, 10.0]]),
    }
    agrees(form, column(3, 35, 57), [[7.0, 5.0]], **call)


@FORMS
def test_channels_are_each_their_own(form):
    """Running sums of one channel, alternating ones of the other; a first axis of 1 serves both."""
    call = {"u": np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]), "A_bar": np.array([[1.0], [-1.0]])}
    call |= {"B_bar": np.ones((1, 1)), "C": np.array([[1.0], [2.0]])}
    agrees(form, [[1, 20], [3, 20], [6, 40]], [[6.0], [20.0]], **call)


@pytest.mark.parametrize("name", ["u", "D"])
def test_input_and_skip_are_real(name, rng):
    call = OP.sample(rng)
    with pytest.raises(TypeError, match=f"ssm: {name} must be real"):
        ssm(**call | {name: call[name] + 0j})


@FORMS
def test_is_fractions(form, rng):
    """A dense real system in exact arithmetic, index by index."""
    T, n = 12, 3
    A, B, C = (rng.integers(-8, 9, s) / 16 for s in ((n, n), (n,), (n,)))
    u, x, want = rng.integers(-9, 9, T), [Fraction(1, 2)] * n, []
    exact = np.frompyfunc(Fraction, 1, 1)
    for t in range(T):
        x = [sum(a * v for a, v in zip(row, x, strict=True)) + b * int(u[t]) for row, b in zip(exact(A), exact(B), strict=True)]
        want.append(float(sum(c * v for c, v in zip(exact(C), x, strict=True))))
    call = {"u": u[:, None].astype(float), "A_bar": A[None], "B_bar": B[None], "C": C[None], "state": np.full((1, n), 0.5)}
    agrees(form, column(*want), [[float(v) for v in x]], **call)


# -- SciPy ----------------------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("T", [1, 50, 200])
def test_is_scipy_dlsim(form, T, rng):
    """dlsim reads before it writes, so it gets C Ā and D + C B̄."""
    n = 4
    A, B, C = 0.4 * rng.standard_normal((n, n)), rng.standard_normal((n, 1)), rng.standard_normal((1, n))
    u, x0 = rng.standard_normal((T, 1)), rng.standard_normal(n)
    _, want, _ = scipy.signal.dlsim((A, B, C @ A, 0.5 + C @ B, 1.0), u, x0=x0)
    call = {"u": u, "A_bar": A[None], "B_bar": B.T, "C": C, "D": np.array([0.5]), "state": x0[None]}
    within(OP.forms[form].function(**call), want, 2 * error_bound(**call, unit=UNIT))


@FORMS
def test_diagonal_pairs_are_a_scipy_filter(form, rng):
    """Poles, residues and their conjugates, put together by partial fractions."""
    p = np.array([0.9 * np.exp(0.5j), 0.6 * np.exp(2j)])
    k = rng.standard_normal(2) + 1j * rng.standard_normal(2)
    b, a = scipy.signal.invresz(np.concatenate([k, np.conj(k)]), np.concatenate([p, np.conj(p)]), [])
    u = rng.standard_normal((80, 1))
    want = scipy.signal.lfilter(b.real, a.real, u, axis=0)
    call = {"u": u, "A_bar": p[None], "B_bar": np.ones((1, 2)), "C": k[None], "pairs": True}
    within(OP.forms[form].function(**call), want, 8 * error_bound(**call, unit=UNIT))


@FORMS
def test_held_inputs_are_simulated_exactly(form, rng):
    """From x' = A x + B u, by SciPy: cont2discrete makes the system, and lsim integrates the continuous one for held inputs."""
    n, dt, T = 3, 0.3, 40
    A, B, C = rng.standard_normal((n, n)) - 2 * np.eye(n), rng.standard_normal((n, 1)), rng.standard_normal((1, n))
    u = rng.standard_normal(T)
    A_bar, B_bar, *_ = scipy.signal.cont2discrete((A, B, C, np.zeros((1, 1))), dt, method="zoh")
    call = {"u": u[:, None], "A_bar": A_bar[None], "B_bar": B_bar.T, "C": C}
    y = OP.forms[form].function(**call)[:, 0]
    _, want, _ = scipy.signal.lsim((A, B, C, 0), np.append(u, 0), dt * np.arange(T + 1), interp=False)
    assert np.max(abs(y - want[1:])) < 1e-11 * np.max(abs(want))
    ours = discretize(A[None], B.T, dt, method="zoh")
    within(OP.forms[form].function(u[:, None], *ours, C)[:, 0], y, 1e-12 * np.max(abs(y)))


@FORMS
def test_damped_oscillator_rings_as_the_closed_form_says(form):
    """x'' + 2 a x' + (a² + w²) x = 0 from x = 1, x' = -a is e^(-at) cos wt: one pair of eigenvalues -a ± i w, half its size each."""
    a, w, dt, T = 0.3, 2.0, 0.1, 60
    A_bar, B_bar = discretize_diagonal(np.array([[-a + 1j * w]]), np.ones((1, 1)), dt)
    call = {"u": np.zeros((T, 1)), "A_bar": A_bar, "B_bar": B_bar, "C": np.full((1, 1), 0.5), "state": np.ones((1, 1)), "pairs": True}
    t = dt * np.arange(1, T + 1)
    within(OP.forms[form].function(**call)[:, 0], np.exp(-a * t) * np.cos(w * t), 2 * error_bound(**call, unit=UNIT)[:, 0])


def test_a_constant_input_is_reached_as_the_final_value_theorem_says(rng):
    """After long enough y is C (I - Ā)⁻¹ B̄ + D."""
    call = OP.sample(rng, T=400, dense=True)
    call |= {"u": np.ones((400, 3)), "A_bar": 0.5 * call["A_bar"]}
    settled = np.linalg.solve(np.eye(4) - call["A_bar"], call["B_bar"][..., None])[..., 0]
    want = (call["C"] * settled).sum(axis=-1).real + call["D"]
    within(ssm(**call)[-1], want, 4 * error_bound(**call, unit=UNIT)[-1] + 16 * UNIT * abs(want))


# -- forms ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dense", "n"), [(False, 64), (True, 8)])
def test_convolution_and_scan_are_the_recurrence(dense, n, rng):
    """In float64, ten digits of the largest output, for many states and steps."""
    call = OP.sample(rng, T=1000, c=2, n=n, dense=dense)
    y, x = ssm(**call, return_state=True)
    for form in ("convolution", "scan"):
        other, last = OP.forms[form].function(**call, return_state=True)
        assert np.max(abs(other - y)) < 1e-10 * np.max(abs(y)), form
        assert np.max(abs(last - x)) < 1e-10 * np.max(abs(x)), form


@FORMS
def test_is_a_toeplitz_matrix(form, rng):
    """The fourth life: every diagonal of the matrix is one number, and the column of the first input the kernel."""
    call = {n: v for n, v in OP.sample(rng, T=9, c=1).items() if n in ("A_bar", "B_bar", "C")}
    M = OP.forms[form].function(np.eye(9)[..., None], **call)[..., 0].T  # a batch of impulses
    A, B, C = (call[n][0] for n in ("A_bar", "B_bar", "C"))
    want = np.array([(C @ np.linalg.matrix_power(np.diag(A), k) @ B).real for k in range(9)])
    bound = 2 * error_bound(np.eye(9)[..., None], **call, unit=UNIT)[..., 0].T
    for k in range(-8, 9):
        within(np.diag(M, -k), np.full(9 - abs(k), want[k] if k >= 0 else 0), np.diag(bound, -k) if k >= 0 else bound.max())


# -- gradient -------------------------------------------------------------------------------------------------------------


def test_gradient_of_one_step_by_hand():
    """y = 2 Re(C (A s + B u)) + D u; the final state has the cotangent 1 + i. All is complex, so conjugates show."""
    u, A, B, C, D, s, e = 3.0, 0.5 + 1j, 2 - 1j, 1 + 3j, 7.0, -1 + 2j, 1 + 1j
    cell = {name: np.array([[v]]) for name, v in (("u", u), ("A_bar", A), ("B_bar", B), ("C", C), ("state", s))}
    g = ssm_vjp(np.ones((1, 1)), **cell, D=np.array([D]), pairs=True, dstate=np.array([[e]]))
    through = 2 * np.conj(C) + e  # of x
    want = {
        "u": (np.conj(B) * through).real + D,
        "A_bar": through * np.conj(s),
        "B_bar": through * u,
        "C": 2 * np.conj(A * s + B * u),
        "D": u,
        "state": np.conj(A) * through,
    }
    assert g.keys() == want.keys()
    for name, value in want.items():
        assert abs(g[name].item() - value) <= 8 * UNIT * abs(value), name


def torch_loop(torch, pairs, u, A_bar, B_bar, C, D, state):
    """The equations in torch, for its automatic differentiation."""
    x, ys = state, []
    for t in range(u.shape[-2]):
        stepped = (A_bar @ x[..., None])[..., 0] if A_bar.ndim == 3 else A_bar * x
        x = stepped + B_bar * u[..., t, :, None]
        ys.append((C * x).sum(-1).real)
    return (2 if pairs else 1) * torch.stack(ys, -2) + D * u, x


@pytest.mark.peers
@pytest.mark.parametrize("sizes", [{}, {"dense": True}, {"shared": True}])
@pytest.mark.parametrize("pairs", [False, True])
def test_gradient_is_torch_autograd(pairs, sizes, rng):
    torch = pytest.importorskip("torch")
    call = OP.sample(rng, T=11, batch=(2,), **sizes)
    y, x = ssm(**call, pairs=pairs, return_state=True)
    dy, dx = rng.standard_normal(y.shape), rng.standard_normal(x.shape) + 1j * rng.standard_normal(x.shape)
    leaves = {name: torch.from_numpy(v.copy()).requires_grad_() for name, v in call.items()}
    outputs = torch_loop(torch, pairs, **leaves)
    within(y, outputs[0].detach().numpy(), 2 * error_bound(**call, pairs=pairs, unit=UNIT))
    torch.autograd.backward(outputs, (torch.from_numpy(dy), torch.from_numpy(dx)))
    g = ssm_vjp(dy, **call, pairs=pairs, dstate=dx)
    assert g.keys() == leaves.keys()
    for name, leaf in leaves.items():
        within(g[name], leaf.grad.numpy(), 11 * 64 * UNIT * abs(leaf.grad.numpy()).max())
