"""selective_scan against hand-worked numbers, decimal arithmetic index by index, SciPy's filters, torch and public ports."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
import scipy.signal

from refimpl.ops.state_space.selective_scan import OPS, error_bound, selective_scan, selective_scan_vjp

(OP,) = OPS
FORMS = pytest.mark.parametrize("form", list(OP.forms))
UNIT = 2.0**-53


def column(*values):
    return np.array(values, dtype=float)[:, None]


def within(got, want, bound):
    assert got.shape == want.shape
    assert np.all(abs(got - want) <= bound), f"{np.max(abs(got - want) / np.maximum(bound, 1e-300)):.3g} times the bound"


# -- worked by hand -------------------------------------------------------------------------------------------------------

TWO_STEPS = {
    "u": column(3, -1),
    "delta": column(1, 2),
    "A": np.array([[-np.log(2)]]),
    "B": column(1, 2),
    "C": column(2, 5),
    "state": np.array([[8.0]]),
}


def agrees(form, want, **call):
    """y and the final state are what they should be, to the bound and the roundings of the inputs themselves."""
    y, h = OP.forms[form].function(**call, return_state=True)
    E, E_last = error_bound(**call, return_state=True, unit=2 * UNIT)
    within(y[:, 0], np.array(want[:-1]), E[:, 0])
    within(h[0, 0], np.array(want[-1]), E_last[0, 0])


@FORMS
def test_two_steps_by_hand(form):
    """Decays 1/2 and 1/4: h = 8/2 + 1·1·3 = 7, y = 2·7; then h = 7/4 + 2·2·(-1) = -9/4, y = 5·(-9/4)."""
    agrees(form, [14, -11.25, -2.25], **TWO_STEPS)


@FORMS
def test_skip_by_hand(form):
    """D = 4 adds 12 and -4."""
    agrees(form, [26, -15.25, -2.25], **TWO_STEPS, D=np.array([4.0]))


@FORMS
def test_gate_by_hand(form):
    """silu(0) = 0 and silu(ln 3) = 3/4 ln 3 multiply C·h + D·u, the skip too."""
    agrees(form, [0, -15.25 * 0.75 * np.log(3), -2.25], **TWO_STEPS, D=np.array([4.0]), z=column(0, np.log(3)))


@FORMS
def test_softplus_after_bias_by_hand(form):
    """softplus(ln(e - 1)) = 1 and softplus(ln(e² - 1)) = 2: the steps from before, 0.5 of each logarithm given as bias."""
    delta = column(np.log(np.e - 1) - 0.5, np.log(np.e**2 - 1) - 0.5)
    agrees(form, [14, -11.25, -2.25], **TWO_STEPS | {"delta": delta}, delta_bias=np.array([0.5]), delta_softplus=True)


@FORMS
def test_bias_without_softplus_by_hand(form):
    agrees(form, [14, -11.25, -2.25], **TWO_STEPS | {"delta": column(0.75, 1.75)}, delta_bias=np.array([0.25]))


@FORMS
def test_complex_pair_by_hand(form):
    """A = iπ/2, a quarter turn a step: h = i·1 + 1, then i·(1 + i) + 0 = -1 + i; y = 2 Re((1 - 2i) h) = 6, then 2."""
    call = {"u": column(1, 0), "delta": column(1, 1), "A": np.array([[0.5j * np.pi]]), "B": column(1, 1) + 0j}
    agrees(form, [6, 2, -1 + 1j], **call, C=np.full((2, 1), 1 - 2j), state=np.ones((1, 1), complex))


@FORMS
def test_groups_are_blocks_of_channels(form):
    """A = 0 and dt = 1 leave running sums, in integers: channels 0, 1, 2 read group 0, and 3, 4, 5 group 1."""
    u = np.arange(1.0, 25).reshape(4, 6)
    B = np.broadcast_to(np.array([[1.0], [10]]), (4, 2, 1))
    C = np.broadcast_to(np.array([[1.0], [3]]), (4, 2, 1))
    y, h = OP.forms[form].function(u, np.ones((4, 6)), np.zeros((6, 1)), B, C, return_state=True)
    assert y[-1].tolist() == [40, 44, 48, 30 * 52, 30 * 56, 30 * 60]
    assert h[:, 0].tolist() == [40, 44, 48, 520, 560, 600]


@FORMS
def test_no_step_is_no_time(form):
    """dt = 0 skips a token: it is neither remembered nor forgotten for."""
    call = TWO_STEPS | {"u": column(3, 100, -1), "delta": column(1, 0, 2), "B": column(1, 7, 2), "C": column(2, 1, 5)}
    agrees(form, [14, 7, -11.25, -2.25], **call)


# -- decimal arithmetic, index by index -----------------------------------------------------------------------------------


def in_decimal(u, delta, A, B, C, D, z, delta_bias, state, softplus):
    """One sequence in 60 digits, a number at a time, as the equations stand."""
    (T, c), n, G = u.shape, A.shape[1], B.shape[1]
    exact = np.frompyfunc(Decimal, 1, 1)
    u, delta, A, B, C, D, z, delta_bias, state = (exact(x.astype(object)) for x in (u, delta, A, B, C, D, z, delta_bias, state))
    y, h = np.empty((T, c), object), state.copy()
    with localcontext() as context:
        context.prec = 60
        for t in range(T):
            for j in range(c):
                dt = delta[t, j] + delta_bias[j]
                dt = (1 + dt.exp()).ln() if softplus else dt
                g, total = j // (c // G), D[j] * u[t, j]
                for i in range(n):
                    h[j, i] = (dt * A[j, i]).exp() * h[j, i] + dt * B[t, g, i] * u[t, j]
                    total += C[t, g, i] * h[j, i]
                y[t, j] = total * z[t, j] / (1 + (-z[t, j]).exp())
    return y, h


@FORMS
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("G", [1, 2, 4])
def test_is_decimal_arithmetic(form, G, dtype, softplus, rng):
    T, c, n = 9, 4, 3
    r = rng.standard_normal
    call = {
        "u": r((T, c)),
        "delta": r((T, c)) / 2,
        "A": -rng.uniform(0.1, 3, (c, n)),
        "B": r((T, G, n)),
        "C": r((T, G, n)),
        "D": r(c),
        "z": 3 * r((T, c)),
        "delta_bias": r(c) / 2,
        "state": r((c, n)),
    }
    call = {name: x.astype(dtype) for name, x in call.items()}
    want, last = in_decimal(**call, softplus=softplus)
    y, h = OP.forms[form].function(**call, delta_softplus=softplus, return_state=True)
    assert y.dtype == h.dtype == dtype
    wide = {name: x.astype(float) for name, x in call.items()}
    bounds = error_bound(**wide, delta_softplus=softplus, return_state=True, unit=float(np.finfo(dtype).eps) / 2)
    for got, exact, E in zip((y, h), (want, last), bounds, strict=True):
        off = np.array([float(abs(Decimal(float(x)) - w)) for x, w in zip(got.flat, exact.flat, strict=True)])
        assert np.all(off <= E.ravel())


# -- SciPy: with steps and maps constant in time, a bank of filters ---------------------------------------------------------


@FORMS
@pytest.mark.parametrize("T", [1, 40, 100])
def test_is_a_bank_of_scipy_filters(form, T, rng):
    A, B, C, dt = -np.array([0.1, 1.0, 5.0]), rng.standard_normal(3), rng.standard_normal(3), 0.2
    u = rng.standard_normal(T)
    want = sum(scipy.signal.lfilter([C[i] * dt * B[i]], [1, -np.exp(dt * A[i])], u) for i in range(3))
    call = {"u": u[:, None], "delta": np.full((T, 1), dt), "A": A[None], "B": np.tile(B, (T, 1)), "C": np.tile(C, (T, 1))}
    within(OP.forms[form].function(**call)[:, 0], want, 2 * error_bound(**call, unit=UNIT)[:, 0])


@FORMS
def test_conjugate_pair_is_a_real_second_order_filter(form, rng):
    """2 Re of one is the sum of both: poles p and p*, by SciPy's partial fractions put together."""
    a, k, dt, T = -0.3 + 2j, 0.7 - 0.4j, 0.5, 60
    u, p = rng.standard_normal(T), np.exp(0.5 * (-0.3 + 2j))
    b, den = scipy.signal.invresz([k * dt, np.conj(k) * dt], [p, np.conj(p)], [])
    want = scipy.signal.lfilter(b.real, den.real, u)
    call = {"u": u[:, None], "delta": np.full((T, 1), dt), "A": np.array([[a]]), "B": np.ones((T, 1)), "C": np.full((T, 1), k)}
    within(OP.forms[form].function(**call)[:, 0], want, 8 * error_bound(**call, unit=UNIT)[:, 0])


# -- gradient -------------------------------------------------------------------------------------------------------------


def test_gradient_of_one_step_by_hand():
    """y = C (e^{dt A} s + dt B u) + D u with every partial derivative written out; the final state is h, its cotangent 10."""
    u, dt, A, B, C, D, s = 3.0, 2.0, -0.25, 5.0, 7.0, 11.0, 13.0
    e = np.exp(-0.5)
    cell = {name: np.array([[x]]) for name, x in (("u", u), ("delta", dt), ("A", A), ("B", B), ("C", C), ("state", s))}
    g = selective_scan_vjp(np.ones((1, 1)), **cell, D=np.array([D]), dstate=np.array([[10.0]]))
    through = C + 10  # of h
    want = {
        "u": through * dt * B + D,
        "delta": through * (A * e * s + B * u),
        "A": through * dt * e * s,
        "B": through * dt * u,
        "C": e * s + dt * B * u,
        "D": u,
        "state": through * e,
    }
    assert g.keys() == want.keys()
    for name, value in want.items():
        assert abs(g[name].item() - value) <= 8 * UNIT * abs(value), name


def torch_loop(torch, u, delta, A, B, C, D, z, delta_bias, state):
    """The equations over (b, T, c) in torch, for its automatic differentiation."""
    dt = torch.nn.functional.softplus(delta + delta_bias, threshold=100)
    per_channel = u.shape[-1] // B.shape[-2]
    B, C = B.repeat_interleave(per_channel, -2), C.repeat_interleave(per_channel, -2)
    h, ys = state, []
    for t in range(u.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt * u)[:, t, :, None] * B[:, t]
        y = (C[:, t] * h).sum(-1)
        ys.append(2 * y.real if A.is_complex() else y)
    return (torch.stack(ys, 1) + D * u) * torch.nn.functional.silu(z), h


@pytest.mark.peers
@pytest.mark.parametrize("complex_rates", [False, True])
def test_gradient_is_torch_autograd(complex_rates, rng):
    torch = pytest.importorskip("torch")
    call = OP.hard["complex throughout"](rng, T=11, c=6, G=2, batch=(2,)) if complex_rates else OP.sample(rng, T=11, c=6, G=2, batch=(2,))
    y, h = selective_scan(**call, delta_softplus=True, return_state=True)
    dy, dh = rng.standard_normal(y.shape), rng.standard_normal(h.shape) + (1j * rng.standard_normal(h.shape) if complex_rates else 0)
    leaves = {name: torch.from_numpy(x.copy()).requires_grad_() for name, x in call.items()}
    outputs = torch_loop(torch, **leaves)
    within(y, outputs[0].detach().numpy(), 2 * error_bound(**call, delta_softplus=True, unit=UNIT))
    torch.autograd.backward(outputs, (torch.from_numpy(dy), torch.from_numpy(dh)))
    g = selective_scan_vjp(dy, **call, delta_softplus=True, dstate=dh)
    assert g.keys() == leaves.keys()
    for name, leaf in leaves.items():
        scale = abs(leaf.grad.numpy()).max()
        within(g[name], leaf.grad.numpy(), 11 * 64 * UNIT * scale)


# -- public implementations -----------------------------------------------------------------------------------------------


def single(rng, **sizes):
    call = OP.sample(rng, **sizes)
    return {name: x.astype(np.float32) for name, x in call.items() if name != "state"}


def bound_of_single(call, **options):
    """Of both sides: theirs rounds too."""
    return error_bound(**{name: x.astype(float) for name, x in call.items()}, unit=2 * 2.0**-24, **options)


@pytest.mark.peers
@FORMS
@pytest.mark.parametrize("mambapy", [False, True])
def test_is_transformers_mamba(form, mambapy, rng):
    """The path without CUDA kernels: a loop, or mambapy's parallel scan; time is its last axis."""
    torch = pytest.importorskip("torch")
    scan = pytest.importorskip("transformers.models.mamba.modeling_mamba").mamba_selective_scan
    call = single(rng, T=21, c=6, n=4, batch=(2,))
    theirs = {name: torch.from_numpy(x.swapaxes(1, 2).copy() if x.ndim == 3 else x) for name, x in call.items()}
    names = ("u", "delta", "A", "B", "C")
    options = {name: theirs[name] for name in ("D", "z", "delta_bias")}
    want, last = scan(*(theirs[n] for n in names), **options, delta_softplus=True, return_last_state=True, use_mambapy=mambapy)
    y, h = OP.forms[form].function(**call, delta_softplus=True, return_state=True)
    E, E_last = bound_of_single(call, delta_softplus=True, return_state=True)
    within(y, want.detach().numpy().swapaxes(1, 2), E)
    within(h, last.detach().numpy(), E_last)


@pytest.mark.peers
@FORMS
def test_is_mambapy(form, rng):
    torch = pytest.importorskip("torch")
    mamba = pytest.importorskip("mambapy.mamba")
    call = {name: x for name, x in single(rng, T=19, c=8, n=4, batch=(2,)).items() if name not in ("z", "delta_bias")}
    block = mamba.MambaBlock(mamba.MambaConfig(d_model=4, n_layers=1, d_state=4, expand_factor=2))
    arrays = {name: torch.from_numpy(x) for name, x in call.items()}
    for theirs in (block.selective_scan, block.selective_scan_seq):
        want = theirs(*(arrays[n] for n in ("u", "delta", "A", "B", "C", "D"))).detach().numpy()
        within(OP.forms[form].function(**call), want, bound_of_single(call))
