"""linear_recurrence against hand-worked numbers, exact fractions, SciPy's lfilter, and public scans."""

from fractions import Fraction

import numpy as np
import pytest
import scipy.signal

from refimpl.ops.recurrence.linear_recurrence import OPS, error_bound, linear_recurrence, linear_recurrence_vjp

(OP,) = OPS
FORMS = pytest.mark.parametrize("form", list(OP.forms))
VARYING = pytest.mark.parametrize("form", [f for f in OP.forms if f != "convolution"])
UNIT = 2.0**-53


def column(*values):
    return np.array(values, dtype=np.result_type(*values, np.float64))[:, None]


def within(got, want, bound):
    assert got.shape == want.shape
    assert np.all(abs(got - want) <= bound), f"{np.max(abs(got - want) / np.maximum(bound, 1e-300)):.3g} times the bound"


# -- worked by hand: halves and integers, so that every operation is exact ----------------------------------------------


@VARYING
def test_four_steps_by_hand(form):
    """4 = 6/2 + 1, -6 = -2·4 + 2, 3 = 0·(-6) + 3, 13 = 3·3 + 4."""
    a, b, state = column(0.5, -2, 0, 3), column(1, 2, 3, 4), np.array([6.0])
    h, last = OP.forms[form].function(a, b, state=state, return_state=True)
    assert h[:, 0].tolist() == [4, -6, 3, 13]
    assert last.tolist() == [13]


@VARYING
def test_four_steps_backwards_by_hand(form):
    """22 = 3·6 + 4, 3 = 0·22 + 3, -4 = -2·3 + 2, -1 = -4/2 + 1: the state enters at the end."""
    a, b, state = column(0.5, -2, 0, 3), column(1, 2, 3, 4), np.array([6.0])
    h, last = OP.forms[form].function(a, b, state=state, reverse=True, return_state=True)
    assert h[:, 0].tolist() == [-1, -4, 3, 22]
    assert last.tolist() == [-1]


@VARYING
@pytest.mark.parametrize("T", [1, 2, 3, 7, 8, 9, 20])
def test_counts_permutations(form, T):
    """h_t = t h_{t-1} + 1 with h_0 = 1 counts the arrangements of any of t things: 1, 2, 5, 16, 65, 326, 1957 (OEIS A000522)."""
    a = column(*range(1, T + 1))
    h = OP.forms[form].function(a, np.ones((T, 1)), state=np.ones(1))
    known = [2, 5, 16, 65, 326, 1957, 13700, 109601, 986410, 9864101, 108505112]
    assert h[:11, 0].tolist() == known[:T]


@FORMS
def test_quarter_turns(form):
    """The decay i turns an impulse round the circle: 1, i, -1, -i, and the transform of it is exact to its bound."""
    a, b = np.array([1j]), column(1.0, 0, 0, 0, 0)
    h = OP.forms[form].function(a, b)
    within(h, column(1, 1j, -1, -1j, 1), error_bound(a, b, unit=UNIT))


@FORMS
@pytest.mark.parametrize("T", [1, 2, 5, 33, 64, 70])
def test_geometric_sum(form, T):
    """Halving what one adds to: 2 - 2^-t."""
    a, b = np.array([0.5]), np.ones((T, 1))
    within(OP.forms[form].function(a, b), 2 - 0.5 ** np.arange(T)[:, None], error_bound(a, b, unit=UNIT))


# -- exact fractions ------------------------------------------------------------------------------------------------------


@VARYING
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("T", [0, 1, 6, 31, 65, 130])
def test_is_exact_in_fractions(form, T, dtype, reverse, rng):
    a, b, state = rng.uniform(-1, 1, T).astype(dtype), rng.standard_normal(T).astype(dtype), dtype(1.5)
    h, want = Fraction(float(state)), [Fraction(0)] * T
    for t in reversed(range(T)) if reverse else range(T):
        h = Fraction(float(a[t])) * h + Fraction(float(b[t]))
        want[t] = h
    arguments = {"state": np.array([state]), "reverse": reverse, "return_state": True}
    got, last = OP.forms[form].function(a[:, None], b[:, None], **arguments)
    assert got.dtype == last.dtype == dtype
    wide = {**arguments, "state": np.array([float(state)])}
    E, E_last = error_bound(a[:, None].astype(float), b[:, None].astype(float), unit=float(np.finfo(dtype).eps) / 2, **wide)
    off = [abs(float(Fraction(float(x)) - y)) for x, y in zip([*got[:, 0], last[0]], [*want, h], strict=True)]
    assert np.all(np.array(off) <= [*E[:, 0], E_last[0]])


# -- SciPy ----------------------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("a", [0.9, -0.5, 1.0, 0.6 + 0.7j])
def test_is_scipy_lfilter(form, a, rng):
    """1/(1 - a z^-1); lfilter's state is a h."""
    b, state = rng.standard_normal((150, 1)), np.array([2.0])
    want, last = scipy.signal.lfilter([1.0], [1.0, -a], b[:, 0], zi=a * state)
    h, end = OP.forms[form].function(np.array([a]), b, state=state, return_state=True)
    E, E_last = error_bound(np.array([a]), b, state=state, return_state=True, unit=UNIT)
    within(h[:, 0], want, 2 * E[:, 0])
    within(a * end, last, 2 * abs(a) * E_last + UNIT * abs(last))


@FORMS
def test_backwards_is_scipy_of_reversed_time(form, rng):
    b = rng.standard_normal((77, 1))
    want = scipy.signal.lfilter([1.0], [1.0, -0.8], b[::-1, 0])[::-1]
    within(
        OP.forms[form].function(np.array([0.8]), b, reverse=True)[:, 0],
        want,
        2 * error_bound(np.array([0.8]), b, reverse=True, unit=UNIT)[:, 0],
    )


# -- gradient -------------------------------------------------------------------------------------------------------------


def test_gradient_of_two_steps_by_hand():
    """h_0 = 2·3 + 1 = 7, h_1 = 5·7 + 4 = 39; cotangents 1, 10 of h and 100 of the final state.

    g_1 = 110, g_0 = 1 + 5·110 = 551; da = (3·551, 7·110), db = (551, 110), dstate = 2·551.
    """
    g = linear_recurrence_vjp(column(1.0, 10), column(2.0, 5), column(1.0, 4), state=np.array([3.0]), dstate=np.array([100.0]))
    assert g["a"][:, 0].tolist() == [1653, 770]
    assert g["b"][:, 0].tolist() == [551, 110]
    assert g["state"].tolist() == [1102]


def test_gradient_backwards_by_hand():
    """h_1 = 5·3 + 4 = 19, h_0 = 2·19 + 1 = 39; the final state is h_0. g_0 = 101, g_1 = 10 + 2·101 = 212."""
    g = linear_recurrence_vjp(
        column(1.0, 10), column(2.0, 5), column(1.0, 4), state=np.array([3.0]), dstate=np.array([100.0]), reverse=True
    )
    assert g["a"][:, 0].tolist() == [19 * 101, 3 * 212]
    assert g["b"][:, 0].tolist() == [101, 212]
    assert g["state"].tolist() == [5 * 212]


def test_gradient_of_a_constant_decay_is_summed():
    """h = (1, 1 + a, 1 + a + a²), the sum of which has the slope 2 + 2a: 3 at a = 1/2, and twice that in two sequences."""
    g = linear_recurrence_vjp(np.ones((2, 3, 1)), np.array([0.5]), np.ones((2, 3, 1)))
    assert g["a"].shape == (1,)
    assert g["a"].tolist() == [2 * (1 + 1 + 2 * 0.5)]


def test_complex_gradient_points_uphill():
    """|h_0|² = |a s|² has the gradient 2 |s|² a in torch's convention, in which a step along it climbs; the cotangent is 2 h."""
    a, s = np.array([3 - 4j]), np.array([1 + 2j])
    g = linear_recurrence_vjp(2 * (a * s)[None], a[None], np.zeros((1, 1)), state=s)
    assert g["a"].tolist() == [[2 * 5 * (3 - 4j)]]
    assert g["state"].tolist() == [2 * 25 * (1 + 2j)]
    assert g["b"].dtype == float


# -- public implementations -----------------------------------------------------------------------------------------------


@pytest.mark.peers
@VARYING
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("T", [2, 8, 37])
def test_is_accelerated_scan(form, T, reverse, rng):
    torch = pytest.importorskip("torch")
    scan = pytest.importorskip("accelerated_scan.ref").scan
    a, b = rng.uniform(0.1, 1, (2, T, 3)), rng.standard_normal((2, T, 3))
    want = scan(*(torch.from_numpy(x.swapaxes(1, 2).copy()) for x in (a, b)), reverse=reverse).numpy().swapaxes(1, 2)
    within(OP.forms[form].function(a, b, reverse=reverse), want, 2 * error_bound(a, b, reverse=reverse, unit=UNIT))


@pytest.mark.peers
@VARYING
def test_is_mambapy_pscan_with_its_gradient(form, rng):
    torch = pytest.importorskip("torch")
    pscan = pytest.importorskip("mambapy.pscan").pscan
    a, b, dy = rng.uniform(0.1, 1, (2, 16, 3)), rng.standard_normal((2, 16, 3)), rng.standard_normal((2, 16, 3))
    ta, tb = (torch.from_numpy(x.copy()).unsqueeze(-1).requires_grad_() for x in (a, b))
    h = pscan(ta, tb)
    h.backward(torch.from_numpy(dy).unsqueeze(-1))
    within(OP.forms[form].function(a, b), h.detach().numpy()[..., 0], 2 * error_bound(a, b, unit=UNIT))
    g = linear_recurrence_vjp(dy, a, b)
    adjoint = 16 * 64 * UNIT * linear_recurrence(a, abs(dy), reverse=True).max() * max(1, linear_recurrence(a, abs(b)).max())
    within(g["a"], ta.grad.numpy()[..., 0], adjoint)
    within(g["b"], tb.grad.numpy()[..., 0], adjoint)


@pytest.mark.peers
@VARYING
def test_is_jax_associative_scan(form, rng):
    jax = pytest.importorskip("jax")
    a, b = rng.uniform(-1, 1, (29, 3)).astype(np.float32), rng.standard_normal((29, 3)).astype(np.float32)
    _, want = jax.lax.associative_scan(lambda x, y: (y[0] * x[0], y[0] * x[1] + y[1]), (a, b))
    within(OP.forms[form].function(a, b), np.asarray(want), 2 * error_bound(a.astype(float), b.astype(float), unit=2.0**-24))
