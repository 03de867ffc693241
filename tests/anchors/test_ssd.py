"""ssd against hand-worked numbers, SciPy's filters, torch's derivatives and public implementations; and what the duality says."""

import numpy as np
import pytest
import scipy.signal

from refimpl.ops.linear_attention.linear_attention import linear_attention
from refimpl.ops.state_space.selective_scan import selective_scan
from refimpl.ops.state_space.ssd import OPS, error_bound, ssd, ssd_chunked, ssd_vjp

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
    "x": np.array([[3.0, 1.0], [-1.0, 0.0]]),
    "dt": np.array([1.0, 2.0]),
    "A": np.array([-np.log(2)]),
    "B": column(1, 2),
    "C": column(2, 5),
    "state": np.array([[8.0, 4.0]]),
}


def agrees(form, want, **call):
    """y and the final state are what they should be, to the bound and the roundings of the inputs themselves."""
    y, S = OP.forms[form].function(**call, return_state=True)
    E, E_last = error_bound(**call, return_state=True, unit=2 * UNIT)
    within(y, np.array(want[:-1], float), E)
    within(S[0], np.array(want[-1], float), E_last[0])


@FORMS
def test_two_steps_by_hand(form):
    """Decays 1/2 and 1/4: S = (8, 4)/2 + (3, 1) = (7, 3), y = 2 S; then S = (7, 3)/4 + 2·2·(-1, 0) = (-9/4, 3/4), y = 5 S."""
    agrees(form, [[14, 6], [-11.25, 3.75], [-2.25, 0.75]], **TWO_STEPS)


@FORMS
def test_skip_by_hand(form):
    """D = 4 adds 4 x = (12, 4) and (-4, 0)."""
    agrees(form, [[26, 10], [-15.25, 3.75], [-2.25, 0.75]], **TWO_STEPS, D=np.array([4.0]))


@FORMS
def test_gate_by_hand(form):
    """silu(0) = 0 and silu(ln 3) = 3/4 ln 3 multiply what the skip has been added to."""
    gate = 0.75 * np.log(3)
    z = np.array([[0, np.log(3)], [np.log(3), 0]])
    agrees(form, [[0, 10 * gate], [-15.25 * gate, 0], [-2.25, 0.75]], **TWO_STEPS, D=np.array([4.0]), z=z)


@FORMS
def test_softplus_after_bias_by_hand(form):
    """softplus(ln(e - 1)) = 1 and softplus(ln(e² - 1)) = 2: the steps from before, 0.5 of each logarithm given as bias."""
    dt = np.array([np.log(np.e - 1) - 0.5, np.log(np.e**2 - 1) - 0.5])
    agrees(form, [[14, 6], [-11.25, 3.75], [-2.25, 0.75]], **TWO_STEPS | {"dt": dt}, dt_bias=np.array([0.5]), dt_softplus=True)


@FORMS
def test_limits_clip_what_softplus_gives(form):
    """softplus(-100) = 0 and softplus(100) = 100 become 1 and 2, the steps from before; clipped first, they would not."""
    call = TWO_STEPS | {"dt": np.array([-100.0, 100.0])}
    agrees(form, [[14, 6], [-11.25, 3.75], [-2.25, 0.75]], **call, dt_softplus=True, dt_limit=(1, 2))


@FORMS
def test_negative_steps_take_no_time(form):
    """By default the lower limit is 0: the state is neither faded nor added to, and read by C = 7."""
    call = {name: np.insert(TWO_STEPS[name], 1, 7, axis=0) for name in ("x", "B", "C")} | {"dt": np.array([1.0, -3.0, 2.0])}
    agrees(form, [[14, 6], [49, 21], [-11.25, 3.75], [-2.25, 0.75]], **TWO_STEPS | call)


@FORMS
def test_groups_are_blocks_of_heads(form):
    """A = 0 and dt = 1 leave running sums, in integers: heads 0, 1, 2 read group 0, and 3, 4, 5 group 1."""
    x = np.arange(1.0, 25).reshape(4, 6).T[..., None]
    maps = np.ones((2, 4, 1)) * np.array([1.0, 10])[:, None, None], np.ones((2, 4, 1)) * np.array([1.0, 3])[:, None, None]
    y, S = OP.forms[form].function(x, np.ones((6, 4)), np.zeros(6), *maps, return_state=True)
    assert y[:, -1, 0].tolist() == [40, 44, 48, 30 * 52, 30 * 56, 30 * 60]
    assert S[:, 0, 0].tolist() == [40, 44, 48, 520, 560, 600]


@FORMS
def test_one_head_may_have_numbers_for_its_parameters(form):
    y = OP.forms[form].function(**{**TWO_STEPS, "A": -np.log(2)}, D=4.0)
    assert np.array_equal(y, OP.forms[form].function(**TWO_STEPS, D=np.array([4.0])))


@pytest.mark.parametrize("limit", [(1, 0), (1,), (1, 2, 3), "01", 3, (0, None), (np.nan, 1), (True, 2)])
def test_limits_are_two_numbers_in_order(limit):
    with pytest.raises(ValueError, match="ssd: dt_limit must be two numbers"):
        ssd(**TWO_STEPS, dt_limit=limit)


def test_complex_rates_are_refused():
    with pytest.raises(TypeError, match="ssd: A must be real"):
        ssd(**TWO_STEPS | {"A": np.array([-1j])})


# -- SciPy: with steps and maps constant in time, a bank of filters ---------------------------------------------------------


@FORMS
@pytest.mark.parametrize("T", [1, 40, 150])
def test_is_a_scipy_filter(form, T, rng):
    A, B, C, dt = -0.7, rng.standard_normal(3), rng.standard_normal(3), 0.2
    x = rng.standard_normal((T, 2))
    want = scipy.signal.lfilter([(C @ B) * dt], [1, -np.exp(dt * A)], x, axis=0)
    call = {"x": x, "dt": np.full(T, dt), "A": np.array([A]), "B": np.tile(B, (T, 1)), "C": np.tile(C, (T, 1))}
    within(OP.forms[form].function(**call), want, 2 * error_bound(**call, unit=UNIT))


@FORMS
def test_is_scipy_dlsim(form, rng):
    """A discrete state space with Ā = exp(dt A) I, B̄ = dt B, read after the update."""
    A, B, C, dt, n = -0.4, rng.standard_normal((3, 1)), rng.standard_normal((1, 3)), 0.5, 3
    x, decay = rng.standard_normal((30, 1)), np.exp(0.5 * -0.4)
    _, want, _ = scipy.signal.dlsim((decay * np.eye(n), dt * B, decay * C, dt * C @ B, 1.0), x)
    call = {"x": x, "dt": np.full(30, dt), "A": np.array([A]), "B": np.tile(B.T, (30, 1)), "C": np.tile(C, (30, 1))}
    within(OP.forms[form].function(**call), want, 4 * error_bound(**call, unit=UNIT))


# -- the duality ----------------------------------------------------------------------------------------------------------


def matrix_of(form, T, n, rng):
    """The T × T matrix that a head is: what it makes of the identity."""
    call = {"x": np.eye(T), "dt": rng.uniform(0.1, 1, T), "A": np.array([-0.3]), "B": rng.standard_normal((T, n))}
    call["C"] = rng.standard_normal((T, n))
    return OP.forms[form].function(**call), error_bound(**call, unit=UNIT)


@FORMS
@pytest.mark.parametrize("n", [1, 3, 8])
def test_blocks_below_the_diagonal_have_rank_n(form, n, rng):
    """Semiseparable: at every cut exactly n singular values of the block below it are more than rounding; the whole has full rank."""
    T = 40
    M, bound = matrix_of(form, T, n, rng)
    assert np.all(np.triu(M, 1) == 0)
    for cut in (1, 2, n, n + 1, T // 2, T - n, T - 1):
        block = np.linalg.svd(M[cut:, :cut], compute_uv=False)
        rounding = np.linalg.norm(bound[cut:, :cut]) + 4 * T * UNIT * block[0]
        assert (block > rounding).sum() == min(n, cut, T - cut)
    assert np.linalg.matrix_rank(M) == T


@FORMS
def test_is_linear_attention_under_other_names(form, rng):
    """q = C, k = dt B, v = x, decay = dt A, one value head for each group of one."""
    call = {n: v for n, v in OP.sample(rng, T=50, H=3, G=3).items() if n in ("x", "dt", "A", "B", "C", "state")}
    keys = call["dt"][..., None] * call["B"]
    want = linear_attention(call["C"], keys, call["x"], decay=call["dt"] * call["A"][:, None], scale=1.0, state=call["state"])
    within(OP.forms[form].function(**call), want, 2 * error_bound(**call, unit=UNIT))


@FORMS
def test_is_selective_scan_with_one_rate_a_head(form, rng):
    """Mamba with A the same for all of a head's channels and states, and dt the same for its channels."""
    H, p, n, T = 4, 3, 5, 40
    call = OP.sample(rng, H=H, G=2, T=T, p=p, n=n)
    flat = lambda v: np.moveaxis(v, -3, -2).reshape(T, H * p)  # channels: p of head 0, p of head 1, ...
    each = lambda v: np.repeat(v, p, axis=-1)
    u, z, state = flat(call["x"]), flat(call["z"]), np.swapaxes(call["state"], -1, -2).reshape(H * p, n)
    A, B, C = np.tile(each(call["A"])[:, None], n), np.moveaxis(call["B"], -3, -2), np.moveaxis(call["C"], -3, -2)
    want, last = selective_scan(
        u, each(call["dt"].T), A, B, C, each(call["D"]), z, each(call["dt_bias"]), delta_softplus=True, state=state, return_state=True
    )
    y, S = OP.forms[form].function(**call, dt_softplus=True, return_state=True)
    E, E_last = error_bound(**call, dt_softplus=True, return_state=True, unit=UNIT)
    within(flat(y), want, 2 * flat(E))
    within(np.swapaxes(S, -1, -2).reshape(H * p, n), last, 2 * np.swapaxes(E_last, -1, -2).reshape(H * p, n))


def test_work_of_chunks_is_linear_in_time():
    """By the stated cost, whose terms are the products that the code forms; the dual form's is quadratic."""
    work = {form: [f.cost(T=T, p=64, n=64, H=16).work for T in (2048, 4096)] for form, f in OP.forms.items()}
    assert work["chunked"][1] / work["chunked"][0] == pytest.approx(2)
    assert work["recurrent"][1] / work["recurrent"][0] == pytest.approx(2)
    assert work["quadratic"][1] / work["quadratic"][0] > 3.5


@FORMS
def test_the_future_stays_there(form, rng):
    """NaN and infinity from step 9 on leave the steps before as they are; in a step of 0 they still count as data."""
    call = OP.sample(rng, T=20)
    y = OP.forms[form].function(**call)
    for name in ("x", "dt", "B", "C", "z"):
        for value in (np.nan, np.inf):
            broken = call[name].copy()
            broken[(..., slice(9, None)) if name == "dt" else (..., slice(9, None), slice(None))] = value
            with np.errstate(all="ignore"):
                assert np.array_equal(OP.forms[form].function(**call | {name: broken})[..., :9, :], y[..., :9, :]), f"{value} in {name}"


# -- gradient -------------------------------------------------------------------------------------------------------------


def test_gradient_of_one_step_by_hand():
    """y = C (e^{dt A} s + dt B x) + D x with every partial derivative written out; the final state has the cotangent 10."""
    x, dt, A, B, C, D, s = 3.0, 2.0, -0.25, 5.0, 7.0, 11.0, 13.0
    e = np.exp(-0.5)
    cell = {name: np.array([[v]]) for name, v in (("x", x), ("B", B), ("C", C), ("state", s))}
    g = ssd_vjp(np.ones((1, 1)), **cell, dt=np.array([dt]), A=np.array([A]), D=np.array([D]), dstate=np.array([[10.0]]))
    through = C + 10  # of S
    want = {
        "x": through * dt * B + D,
        "dt": through * (A * e * s + B * x),
        "A": through * dt * e * s,
        "B": through * dt * x,
        "C": e * s + dt * B * x,
        "D": x,
        "state": through * e,
    }
    assert g.keys() == want.keys()
    for name, value in want.items():
        assert abs(g[name].item() - value) <= 8 * UNIT * abs(value), name


def test_gradient_at_the_limits():
    """Between the limits and on them the slope is 1, beyond them 0 (torch.clamp's convention too)."""
    one = np.ones((5, 1))
    g = ssd_vjp(one, one, np.array([0.25, 0.5, 0.75, 1.0, 1.25]), np.zeros(1), one, one, dt_limit=(0.5, 1.0))
    assert g["dt"].tolist() == [0, 4, 3, 2, 0]


def torch_loop(torch, limit, x, dt, A, B, C, D, z, dt_bias, state):
    """The equations in torch, for its automatic differentiation."""
    dt = torch.nn.functional.softplus(dt + dt_bias[:, None], threshold=100).clamp(*limit)
    B, C = (v.repeat_interleave(x.shape[-3] // v.shape[-3], -3) for v in (B, C))
    S, ys = state, []
    for t in range(x.shape[-2]):
        S = torch.exp(dt[..., t] * A)[..., None, None] * S + (dt[..., t, None] * B[..., t, :])[..., None] * x[..., t, None, :]
        ys.append((C[..., t, :, None] * S).sum(-2))
    return (torch.stack(ys, -2) + D[:, None, None] * x) * torch.nn.functional.silu(z), S


@pytest.mark.peers
@pytest.mark.parametrize("limit", [(0.0, np.inf), (0.5, 1.25)])
def test_gradient_is_torch_autograd(limit, rng):
    torch = pytest.importorskip("torch")
    call = OP.sample(rng, T=11, H=6, G=2, batch=(2,))
    y, S = ssd(**call, dt_softplus=True, dt_limit=limit, return_state=True)
    dy, dS = rng.standard_normal(y.shape), rng.standard_normal(S.shape)
    leaves = {name: torch.from_numpy(v.copy()).requires_grad_() for name, v in call.items()}
    outputs = torch_loop(torch, limit, **leaves)
    within(y, outputs[0].detach().numpy(), 2 * error_bound(**call, dt_softplus=True, dt_limit=limit, unit=UNIT))
    torch.autograd.backward(outputs, (torch.from_numpy(dy), torch.from_numpy(dS)))
    g = ssd_vjp(dy, **call, dt_softplus=True, dt_limit=limit, dstate=dS)
    assert g.keys() == leaves.keys()
    for name, leaf in leaves.items():
        within(g[name], leaf.grad.numpy(), 11 * 64 * UNIT * abs(leaf.grad.numpy()).max())


# -- public implementations -----------------------------------------------------------------------------------------------


def single(rng, **sizes):
    return {name: v.astype(np.float32) for name, v in OP.sample(rng, **sizes).items()}


def bound_of_single(call, **options):
    """Of both sides: theirs rounds too."""
    return error_bound(**{name: v.astype(float) for name, v in call.items()}, unit=2 * 2.0**-24, return_state=True, **options)


def in_their_layout(torch, call):
    """Time before heads, and a state of (p, n)."""
    moved = {n: np.moveaxis(call[n], 1, 2) for n in ("x", "dt", "B", "C")} | {"state": np.swapaxes(call["state"], -1, -2)}
    return {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in (call | moved).items()}


@pytest.mark.peers
@FORMS
@pytest.mark.parametrize("limit", [(0.0, np.inf), (0.5, 1.25)])
def test_is_transformers_mamba2(form, limit, rng):
    """The path without CUDA kernels: chunks, no gate."""
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    call = single(rng, T=37, H=6, G=2, p=4, n=8, batch=(2,))
    call.pop("z")
    theirs = in_their_layout(torch, call)
    want, last = modeling.mamba2_chunk_scan(
        *(theirs[n] for n in ("x", "dt", "A", "B", "C")),
        chunk_size=16,
        D=theirs["D"],
        dt_bias=theirs["dt_bias"],
        initial_states=theirs["state"],
        dt_softplus=True,
        dt_limit=limit,
        return_final_states=True,
    )
    y, S = OP.forms[form].function(**call, dt_softplus=True, dt_limit=limit, return_state=True)
    E, E_last = bound_of_single(call, dt_softplus=True, dt_limit=limit)
    within(y, np.moveaxis(want.numpy(), 1, 2), E)
    within(S, np.swapaxes(last.numpy(), -1, -2), E_last)


@pytest.mark.peers
@FORMS
def test_is_transformers_step(form, rng):
    """One step of decoding, with the gate."""
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    call = single(rng, T=1, H=6, G=2, p=4, n=8, batch=(2,))
    theirs = in_their_layout(torch, call)
    each = lambda v: v[..., None].expand(*v.shape, 4)  # a number for each channel
    want = modeling.mamba2_selective_state_update(
        theirs["state"],
        theirs["x"][:, 0],
        each(theirs["dt"][:, 0]),
        each(theirs["A"])[..., None].expand(-1, -1, 8),
        theirs["B"][:, 0],
        theirs["C"][:, 0],
        each(theirs["D"]),
        each(theirs["dt_bias"]),
        True,
        theirs["z"][:, :, 0],
    )
    y, S = OP.forms[form].function(**call, dt_softplus=True, return_state=True)
    E, E_last = bound_of_single(call, dt_softplus=True)
    within(y[:, :, 0], want.numpy(), E[:, :, 0])
    within(S, np.swapaxes(theirs["state"].numpy(), -1, -2), E_last)


def four_products(torch, X, log_decay, B, C, size):
    """The chunked algorithm as four einsums in torch: diagonal blocks, and right, centre and left factors of the rest."""
    b, T, H, p = X.shape
    X, B, C = (v.reshape(b, T // size, size, H, -1) for v in (X, B, C))
    a = log_decay.reshape(b, T // size, size, H).movedim(-1, 1)  # (b, H, chunks, size)
    before = torch.ones(size, size, dtype=torch.bool).tril(-1)
    sums = (a[..., :, None] * before).cumsum(-2).masked_fill(~(before | torch.eye(size, dtype=torch.bool)), -torch.inf)
    Y = torch.einsum("bctHn,bcsHn,bHcts,bcsHp->bctHp", C, B, sums.exp(), X)
    added = torch.einsum("bcsHn,bHcs,bcsHp->bcHnp", B, sums[..., -1, :].exp(), X)
    S, entering = torch.zeros_like(added[:, 0]), []
    for c in range(T // size):
        entering.append(S)
        S = a[:, :, c].sum(-1).exp()[..., None, None] * S + added[:, c]
    Y = Y + torch.einsum("bctHn,bHct,bcHnp->bctHp", C, a.cumsum(-1).exp(), torch.stack(entering, 1))
    return Y.reshape(b, T, H, p), S


@pytest.mark.peers
@pytest.mark.parametrize("size", [8, 32])
def test_is_four_products_in_torch(size, rng):
    """The listing's interface: x times dt, A times dt, no groups."""
    torch = pytest.importorskip("torch")
    call = {n: v for n, v in OP.sample(rng, T=64, H=3, G=3, p=5, n=4, batch=(2,)).items() if n in ("x", "dt", "A", "B", "C")}
    steps = torch.from_numpy(np.moveaxis(call["dt"], 1, 2).copy())
    X, B, C = (torch.from_numpy(np.moveaxis(call[n], 1, 2).copy()) for n in ("x", "B", "C"))
    want, last = four_products(torch, X * steps[..., None], steps * torch.from_numpy(call["A"]), B, C, size)
    y, S = ssd_chunked(**call, chunk=size, return_state=True)
    E, E_last = error_bound(**call, unit=2 * UNIT, return_state=True)
    within(y, np.moveaxis(want.numpy(), 1, 2), E)
    within(S, last.numpy(), E_last)
