"""One recurrence, four lives: each step from x' = A x + B u to Mamba-2, and what is composed of such steps.

The introduction to the part tells it (and runs); here every form is held against every other, within the chapters' bounds.
"""

import numpy as np
import pytest
import scipy.signal
from scipy.special import eval_legendre

import refimpl
from refimpl import OPS, bidirectional_scan, discretize, discretize_diagonal, hippo, lssl, selective_scan, ssm

UNIT = 2.0**-53


def within(got, want, bound):
    assert got.shape == want.shape
    assert np.all(abs(got - want) <= bound), f"{np.max(abs(got - want) / np.maximum(bound, 1e-300)):.3g} times the bound"


def forms(name):
    return pytest.mark.parametrize("form", list(OPS[name].forms))


def lanes(x):
    """(..., T, c, n) -> (..., T, c·n)."""
    return x.reshape(*x.shape[:-2], -1)


# -- the thread ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["zoh", "bilinear", "backward_euler", "euler", "mamba"])
def test_a_diagonal_matrix_is_discretised_elementwise(method, rng):
    A, B = -rng.uniform(0.1, 3, 5) + 1j * rng.uniform(-3, 3, 5), rng.standard_normal(5) + 0j
    dense, diagonal = discretize(np.diag(A), B, 0.3, method=method), discretize_diagonal(A, B, 0.3, method=method)
    bounds = OPS["discretize"].error_bound(np.diag(A), B, 0.3, method=method, unit=UNIT)
    near = OPS["discretize_diagonal"].error_bound(A, B, 0.3, method=method, unit=UNIT)
    within(dense[0], np.diag(diagonal[0]), bounds[0] + np.diag(near[0]))
    within(dense[1], diagonal[1], bounds[1] + near[1])


@forms("linear_recurrence")
def test_recurrence_is_a_linear_recurrence_of_lanes(form, rng):
    call = OPS["ssm"].sample(rng, T=50, batch=(2,))
    y, last = ssm(**call, return_state=True)
    inputs = call["B_bar"] * call["u"][..., None]
    h = OPS["linear_recurrence"].forms[form].function(lanes(call["A_bar"][None])[0], lanes(inputs), state=lanes(call["state"]))
    h = h.reshape(2, 50, 3, 4)
    off_y, off_last = OPS["ssm"].error_bound(**call, return_state=True, unit=UNIT)
    off_h = (
        OPS["linear_recurrence"]
        .error_bound(lanes(call["A_bar"][None]), lanes(inputs), state=lanes(call["state"]), unit=UNIT)
        .reshape(h.shape)
    )
    within((call["C"] * h).sum(axis=-1).real + call["D"] * call["u"], y, 2 * off_y + (abs(call["C"]) * off_h).sum(axis=-1))
    within(h[:, -1], last, off_last + off_h[:, -1])


@forms("selective_scan")
@pytest.mark.parametrize("complex_rates", [False, True])
def test_a_selective_scan_that_does_not_select_is_a_state_space_model(form, complex_rates, rng):
    """Held dt, B and C: ssm of Mamba's discretisation; complex rates are pairs there, and pairs=True here."""
    T, c, n, dt = 40, 3, 4, rng.uniform(0.01, 0.3, 3)
    A = -rng.uniform(0.5, 4, (c, n)) + (1j * rng.uniform(-3, 3, (c, n)) if complex_rates else 0)
    u, B, C, D = rng.standard_normal((T, c)), rng.standard_normal((1, n)), rng.standard_normal((1, n)), rng.standard_normal(c)
    system = *discretize_diagonal(A, B + 0 * A, dt[:, None], method="mamba"), C
    held = u, np.broadcast_to(dt, (T, c)), A, np.repeat(B, T, axis=0), np.repeat(C, T, axis=0), D
    got, bound = OPS["selective_scan"].forms[form].function(*held), OPS["selective_scan"].error_bound(*held, unit=UNIT)
    for other in OPS["ssm"].forms.values():
        want = other.function(u, *system, D, pairs=complex_rates)
        within(got, want, bound + 2 * OPS["ssm"].error_bound(u, *system, D, pairs=complex_rates, unit=UNIT))


@forms("linear_recurrence")
def test_a_selective_scan_is_a_linear_recurrence_of_lanes(form, rng):
    """Decays that depend on the input may be scanned all the same (the form for constant decays refuses)."""
    call = {n: v for n, v in OPS["selective_scan"].sample(rng, T=40).items() if n in ("u", "delta", "A", "B", "C", "state")}
    y, last = selective_scan(**call, return_state=True)
    decay = np.exp(call["delta"][..., None] * call["A"])
    B, C = (x if x.ndim == 3 else x[:, None, :] for x in (call["B"], call["C"]))
    B, C = (np.repeat(x, len(call["A"]) // x.shape[1], axis=1) for x in (B, C))
    inputs, state = lanes((call["delta"] * call["u"])[..., None] * B), lanes(call["state"])
    if form == "convolution":
        with pytest.raises(ValueError, match="constant in time"):
            OPS["linear_recurrence"].forms[form].function(lanes(decay), inputs, state=state)
        return
    h = OPS["linear_recurrence"].forms[form].function(lanes(decay), inputs, state=state).reshape(decay.shape)
    off_y, off_last = OPS["selective_scan"].error_bound(**call, return_state=True, unit=UNIT)
    off_h = OPS["linear_recurrence"].error_bound(lanes(decay), inputs, state=state, unit=UNIT).reshape(h.shape)
    within((C * h).sum(axis=-1), y, 2 * off_y + (abs(C) * off_h).sum(axis=-1))
    within(h[-1], last, 2 * off_last + off_h[-1])


# -- compositions ----------------------------------------------------------------------------------------------------


def two_scans(rng, **sizes):
    """A call, and what its scan from the end has of its own."""
    call = OPS["selective_scan"].sample(rng, **sizes)
    call.pop("state")
    other = OPS["selective_scan"].sample(rng, **sizes)
    return call, {n: other[n] for n in ("u", "delta", "A", "B", "C", "D", "delta_bias")}


@pytest.mark.parametrize("sizes", [{"T": 20}, {"T": 9, "batch": (2,)}, {"T": 11, "c": 6, "G": 2}, {"T": 1}, {"T": 0}])
def test_bidirectional_scan_is_two_scans(sizes, rng):
    call, own = two_scans(rng, **sizes)
    got = bidirectional_scan(**call, delta_softplus=True, backward=own)
    time = {n: a for n, a in OPS["selective_scan"].contract.axis("T", **call).items()}
    turned = {n: np.flip(v, time[n]) if n in time else v for n, v in (call | own).items()}
    want = selective_scan(**call, delta_softplus=True) + np.flip(selective_scan(**turned, delta_softplus=True), -2)
    np.testing.assert_array_equal(got, want)


def test_bidirectional_scan_of_reversed_time_exchanges_its_scans(rng):
    call, own = two_scans(rng, T=15)
    own = {n: v for n, v in own.items() if n in ("A", "D", "delta_bias")}
    turned = {n: v[::-1] if n in ("u", "delta", "B", "C", "z") else v for n, v in call.items()}
    exchanged = bidirectional_scan(**turned | own, backward={n: call[n] for n in own})
    np.testing.assert_array_equal(exchanged[::-1], bidirectional_scan(**call, backward=own))


def test_bidirectional_scan_is_scipy_filters_from_both_ends(rng):
    """Held steps and maps: Σ_n B C dt / (1 - e^(dt A) z⁻¹), forwards and backwards."""
    T, A, dt = 60, -rng.uniform(0.5, 4, (1, 3)), 0.2
    u, B, C = rng.standard_normal((T, 1)), rng.standard_normal((1, 3)), rng.standard_normal((1, 3))
    held = np.full((T, 1), dt), A, np.repeat(B, T, axis=0), np.repeat(C, T, axis=0)
    one = lambda x: sum(scipy.signal.lfilter([B[0, j] * C[0, j] * dt], [1, -np.exp(dt * A[0, j])], x[:, 0]) for j in range(3))[:, None]
    bound = OPS["selective_scan"].error_bound(u, *held, unit=UNIT) + OPS["selective_scan"].error_bound(u[::-1], *held, unit=UNIT)[::-1]
    within(bidirectional_scan(u, *held), one(u) + one(u[::-1])[::-1], 2 * bound)


def test_bidirectional_scan_refuses_what_a_scan_has_not(rng):
    call, _ = two_scans(rng, T=3)
    with pytest.raises(TypeError, match="bidirectional_scan: backward has no argument 'x'"):
        bidirectional_scan(**call, backward={"x": call["u"]})
    with pytest.raises(ValueError, match="selective_scan: A must have shape"):
        bidirectional_scan(**call, backward={"A": np.ones((7, 2))})


@pytest.mark.parametrize("method", ["bilinear", "zoh", "euler"])
@pytest.mark.parametrize("steps", ["one step", "a step a channel"])
def test_lssl_is_discretize_and_ssm(method, steps, rng):
    A, B = hippo("legs", 5)
    u, C, D = rng.standard_normal((2, 30, 3)), rng.standard_normal((3, 5)), rng.standard_normal(3)
    dt = 0.02 if steps == "one step" else np.array([0.01, 0.02, 0.03])
    y, x = lssl(u, A, B, C, D, dt=dt, method=method, return_state=True)
    pieces = [discretize(A, B, step, method=method) for step in np.broadcast_to(dt, 3)]
    A_bar, B_bar = (np.stack(p) for p in zip(*pieces, strict=True))
    bounds = OPS["ssm"].error_bound(u, A_bar, B_bar, C, D, return_state=True, unit=UNIT)
    for form in OPS["ssm"].forms.values():
        want = form.function(u, A_bar, B_bar, C, D, return_state=True)
        for got, right, bound in zip((y, x), want, bounds, strict=True):
            within(got, right, 2 * bound)


def test_lssl_is_scipy_cont2discrete_and_dlsim(rng):
    """SciPy reads before it writes: y_t of dlsim is C x_{t-1} + D u_t, so C Ā and D + C B̄ are handed to it."""
    A, B = hippo("legs", 4)
    C, u = rng.standard_normal((1, 4)), rng.standard_normal((40, 1))
    Ad, Bd, *_ = scipy.signal.cont2discrete((A, B[:, None], C, np.zeros((1, 1))), 0.05, method="bilinear")
    _, want, _ = scipy.signal.dlsim((Ad, Bd, C @ Ad, C @ Bd, 1.0), u)
    A_bar, B_bar = discretize(A[None], B[None], 0.05, method="bilinear")
    within(lssl(u, A, B, C, dt=0.05), want, 8 * OPS["ssm"].error_bound(u, A_bar, B_bar, C, unit=UNIT))


def test_lssl_hands_its_state_on(rng):
    A, B = hippo("legt", 4)
    u, C = rng.standard_normal((20, 2)), rng.standard_normal((2, 4))
    y, last = lssl(u, A, B, C, dt=0.1, return_state=True)
    first, state = lssl(u[:7], A, B, C, dt=0.1, return_state=True)
    rest, end = lssl(u[7:], A, B, C, dt=0.1, state=state, return_state=True)
    np.testing.assert_array_equal(np.concatenate([first, rest]), y)
    np.testing.assert_array_equal(end, last)


def test_lssl_at_twice_the_step_is_a_system_twice_as_fast(rng):
    """Powers of 2: to the last bit."""
    A, B = hippo("legs", 4)
    u, C = rng.standard_normal((20, 2)), rng.standard_normal((2, 4))
    np.testing.assert_array_equal(lssl(u, A, B, C, dt=0.125), lssl(u, A / 2, B / 2, C, dt=0.25))


def test_lssl_with_a_sliding_window_is_a_delay():
    """HiPPO-LegT read where its window is half as old: u(t - 1/2) = Σ x_i √(2i+1) P_i(0), better with every coefficient.

    Bilinear, a step takes its input for the mean of the step, which is half a step later.
    """
    steps, dt = 512, 1 / 128
    t = (np.arange(steps) + 1) * dt
    errors = {}
    for n in (4, 8, 16):
        A, B = hippo("legt", n)
        C = (np.sqrt(2 * np.arange(n) + 1) * eval_legendre(np.arange(n), 0.0))[None]
        y = lssl(np.sin(5 * t)[:, None], A, B, C, dt=dt)[:, 0]
        late = t > 2
        errors[n] = np.sqrt(np.mean((y - np.sin(5 * (t - 0.5 + dt / 2)))[late] ** 2))
    assert errors[8] < errors[4] / 4 and errors[16] < 0.02, errors


def test_they_are_public():
    assert refimpl.lssl is lssl and refimpl.bidirectional_scan is bidirectional_scan
