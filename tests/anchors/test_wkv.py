"""wkv, wkv6 and wkv7 against numbers worked by hand, exact fractions, decimal arithmetic, and public implementations."""

import importlib.util
from decimal import Decimal, localcontext
from fractions import Fraction
from math import log
from pathlib import Path

import numpy as np
import pytest

from refimpl.ops.linear_attention import wkv, wkv6, wkv7

UNIT = 2.0**-53
FOUR, SIX, SEVEN = (chapter.OPS[0] for chapter in (wkv, wkv6, wkv7))
EVERY_FORM = [pytest.param(op, form, id=f"{op.name}-{form}") for op in (FOUR, SIX, SEVEN) for form in op.forms]
OF_FOUR, OF_SIX, OF_SEVEN = (pytest.mark.parametrize("form", list(op.forms)) for op in (FOUR, SIX, SEVEN))


def column(*values):
    return np.array(values, dtype=float)[:, None]


def within(got, want, bound):
    """Elementwise, of arrays or of nested tuples of them."""
    if isinstance(got, tuple):
        for g, w, b in zip(got, want, bound, strict=True):
            within(g, w, b)
        return
    want = np.asarray(want, dtype=float)
    assert got.shape == want.shape
    assert np.all(abs(got - want) <= bound), f"{np.max(abs(got - want) / np.maximum(bound, 1e-300)):.3g} times the bound"


def agree(op, form, call, want):
    """`want` is correctly rounded; logarithms in the call are off by half a unit, as much as any of the bound's roundings."""
    function, bound = op.forms[form].function, op.error_bound(**call, unit=2 * UNIT)
    within(function(**call), want, bound)
    if form == "chunkwise":
        within(function(**call, chunk=2), want, bound)


# -- RWKV-4 by hand ---------------------------------------------------------------------------------------------------


@OF_FOUR
def test_three_steps_by_hand(form):
    """Half is left after a step, a bonus counts threefold: 8; (8 + 3·2)/4; ((8/2 + 2) + 3·2·5)/((1/2 + 1) + 3·2)."""
    call = {"k": np.log(column(1, 1, 2)), "v": column(8, 2, 5), "w": np.log([2.0]), "u": np.log([3.0]), "return_state": True}
    y = column(8, 14 / 4, 36 / 7.5)
    # N = 6/2 + 2·5 = 13 and D = 1.5/2 + 2 = 11/4, in units of the largest exponent, log 2
    agree(FOUR, form, call, (y, wkv.State(np.array([13 / 2]), np.array([11 / 8]), np.log([2.0]))))


@OF_FOUR
def test_the_state_is_in_units_of_e_to_the_max(form):
    """(5, 2, log 3) stands for N = 15, D = 6: with k = 0, v = 1, u = 0, y = 16/7; w = log 3 leaves N = 5 + 1, D = 2 + 1."""
    state = wkv.State(np.array([5.0]), np.array([2.0]), np.log([3.0]))
    call = {"k": column(0), "v": column(1), "w": np.log([3.0]), "u": np.zeros(1), "state": state, "return_state": True}
    agree(FOUR, form, call, (column(16 / 7), wkv.State(np.array([6.0]), np.array([3.0]), np.zeros(1))))


@OF_FOUR
def test_each_channel_has_a_decay_and_a_bonus_of_its_own(form):
    k, v = np.zeros((3, 2)), np.array([[4.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    call = {"k": k, "v": v, "w": np.log([2.0, 4.0]), "u": np.log([1.0, 3.0])}
    agree(FOUR, form, call, [[4, 4], [4 / 2, 4 / 4], [(4 / 2) / (1 / 2 + 1 + 1), (4 / 4) / (1 / 4 + 1 + 3)]])


# -- RWKV-4 in exact arithmetic ---------------------------------------------------------------------------------------


@OF_FOUR
def test_is_exact_in_fractions(form, rng):
    """e^k, e^u and e^-w powers of two: equation (1), term by term, in rational numbers."""
    T, c = 21, 3
    k, u, w = rng.integers(-4, 5, (T, c)), np.array([-2, 1, 3]), np.array([1, 2, 3])
    v = rng.integers(-9, 10, (T, c))
    want = np.zeros((T, c))
    for t in range(T):
        for i in range(c):
            terms = [(Fraction(2) ** int(k[j, i] - (t - 1 - j) * w[i]), int(v[j, i])) for j in range(t)]
            terms.append((Fraction(2) ** int(u[i] + k[t, i]), int(v[t, i])))
            want[t, i] = sum(x * y for x, y in terms) / sum(x for x, _ in terms)
    agree(FOUR, form, {"k": k * log(2), "v": v.astype(float), "w": w * log(2), "u": u * log(2)}, want)


@OF_FOUR
def test_huge_keys_in_decimal_arithmetic(form, rng):
    """Keys of ±80 and ±700, which no exponential survives in floats: equation (1) with 60 digits."""
    T = 12
    k, v = rng.standard_normal(T) + rng.choice([-700.0, -80.0, 0.0, 80.0, 700.0], T), rng.standard_normal(T)
    w, u = 0.625, -3.5
    want = []
    with localcontext() as context:
        context.prec = 60
        for t in range(T):
            terms = [((Decimal(k[j]) - (t - 1 - j) * Decimal(w)).exp(), Decimal(v[j])) for j in range(t)]
            terms.append(((Decimal(u) + Decimal(k[t])).exp(), Decimal(v[t])))
            want.append(float(sum(x * y for x, y in terms) / sum(x for x, _ in terms)))
    agree(FOUR, form, {"k": k[:, None], "v": v[:, None], "w": np.array([w]), "u": np.array([u])}, column(*want))


@OF_FOUR
def test_no_decay_is_a_running_softmax(form, rng):
    """With w and u next to nothing, y is the mean of all values so far under softmax weights of the keys."""
    scipy_special = pytest.importorskip("scipy.special")
    k, v = rng.standard_normal((2, 30))
    want = [scipy_special.softmax(k[: t + 1]) @ v[: t + 1] for t in range(30)]
    agree(FOUR, form, {"k": k[:, None], "v": v[:, None], "w": np.array([2.0**-80]), "u": np.zeros(1)}, column(*want))


# -- RWKV-6 and RWKV-7 by hand ----------------------------------------------------------------------------------------


@OF_SIX
def test_two_steps_of_rwkv6_by_hand(form):
    """o_0 = (3·1·2 + 5·1·0)·7 = 42; S = (14, 0), untouched when o_1 reads it: 14 + (3·2·1 + 5·1·4)·10; then (14/2, 0) + (1, 4)·10."""
    r, k = np.array([[3.0, 5.0], [1.0, 1.0]]), np.array([[2.0, 0.0], [1.0, 4.0]])
    r[1] = [1, 1]
    call = {"r": r, "k": k, "v": column(7, 10), "w": np.log([[0.25, 0.25], [0.5, 0.25]]), "u": np.array([1.0, 5.0])}
    agree(SIX, form, {**call, "return_state": True}, (column(42, 14 + (1 + 20) * 10), column(7 + 10, 40)))


@OF_SEVEN
def test_two_steps_of_rwkv7_by_hand(form):
    """S = (2, 1)·6 = (12, 6). aᵀS = -12 + 6 = -6 is read before the decay: (6, 1.5) + (1/2, 1)·(-6) + (0, 1)·10 = (3, 5.5)."""
    call = {
        "r": np.array([[1.0, 0.0], [1.0, 2.0]]),
        "w": np.log([[0.5, 0.5], [0.5, 0.25]]),
        "k": np.array([[2.0, 1.0], [0.0, 1.0]]),
        "v": column(6, 10),
        "a": np.array([[9.0, 9.0], [-1.0, 1.0]]),
        "b": np.array([[9.0, 9.0], [0.5, 1.0]]),
        "return_state": True,
    }
    agree(SEVEN, form, call, (column(12, 3 + 11), column(3, 5.5)))


@OF_SIX
def test_rwkv6_in_fractions(form, rng):
    """Decays that are powers of two, small integers else: equation (3), every pair of steps, in rational numbers."""
    T, d, e = 19, 3, 2
    r, k, v, u = (rng.integers(-3, 4, shape) for shape in ((T, d), (T, d), (T, e), d))
    w, S = rng.integers(-2, 1, (T, d)), rng.integers(-3, 4, (d, e))
    want = np.zeros((T, e))
    for t in range(T):
        for x in range(e):
            total = Fraction(int((r[t] * u * k[t]).sum() * v[t, x]))
            for i in range(d):
                past = [int(k[j, i] * v[j, x]) * Fraction(2) ** int(w[j + 1 : t, i].sum()) for j in range(t)]
                total += int(r[t, i]) * (sum(past) + int(S[i, x]) * Fraction(2) ** int(w[:t, i].sum()))
            want[t, x] = total
    call = {"r": r, "k": k, "v": v, "w": w * log(2), "u": u, "state": S}
    agree(SIX, form, {n: x.astype(float) for n, x in call.items()}, want)


@OF_SEVEN
def test_rwkv7_in_fractions(form, rng):
    """The product of all transitions between two steps, diag(e^w) + b aᵀ, in rational numbers."""
    T, d, e = 11, 3, 2
    r, k, v = (rng.integers(-3, 4, shape) for shape in ((T, d), (T, d), (T, e)))
    w, a, b = rng.integers(-2, 1, (T, d)), rng.integers(-2, 3, (T, d)), rng.integers(-2, 3, (T, d)) / 4
    exact = np.vectorize(Fraction, otypes=[object])
    want, steps = np.zeros((T, e)), []
    for t in range(T):
        transition = np.diag(exact(2.0 ** w[t])) + np.outer(exact(b[t]), exact(a[t].astype(float)))
        steps = [transition @ S for S in steps] + [np.outer(exact(k[t].astype(float)), exact(v[t].astype(float)))]
        want[t] = sum(exact(r[t].astype(float)) @ S for S in steps)
    call = {"r": r, "w": w * log(2), "k": k, "v": v, "a": a, "b": b}
    agree(SEVEN, form, {n: np.asarray(x, dtype=float) for n, x in call.items()}, want)


@pytest.mark.parametrize(("op", "form"), EVERY_FORM)
def test_the_bound_would_see_a_tenth_of_a_float32_mistake(op, form, rng):
    """1e-4 relative, as from a product in TF32, is far beyond float32's bound at small sizes."""
    call = op.sample(rng, T=7)
    got = op.forms[form].function(**call)
    assert np.mean(abs(1e-4 * got) > op.error_bound(**call, unit=2.0**-24)) > 0.5


# -- public implementations -------------------------------------------------------------------------------------------


def published(part):
    """A module of fla's operators by its file: the package itself does not import without a GPU compiler."""
    spec = importlib.util.find_spec("fla")
    for folder in spec.submodule_search_locations if spec else ():
        path = Path(folder, "ops", part)
        if path.exists():
            found = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
            return module
    return pytest.skip("needs fla-core")


def tensors(call, *names):
    torch = pytest.importorskip("torch")
    return [torch.from_numpy(np.ascontiguousarray(call[n])) for n in names]


@pytest.mark.peers
@OF_FOUR
@pytest.mark.parametrize("with_state", [False, True])
def test_is_rwkv4_of_transformers(form, with_state, rng):
    """Its `time_decay` is log w."""
    peer = pytest.importorskip("transformers.models.rwkv.modeling_rwkv").rwkv_linear_attention_cpu
    call = {n: x.astype(np.float32) for n, x in FOUR.sample(rng, T=50, c=8, batch=(2,)).items() if n != "state"}
    w, u, k, v = tensors({**call, "log_w": np.log(call["w"])}, "log_w", "u", "k", "v")
    state = FOUR.sample(rng, T=1, c=8, batch=(2,))["state"] if with_state else None
    theirs = None if state is None else [*tensors(dict(enumerate(x.astype(np.float32) for x in state)), 0, 1, 2)]
    want, last = peer(w, u, k, v, state=theirs, return_state=True)
    call |= {"state": None if state is None else wkv.State(*(x.astype(np.float32) for x in state)), "return_state": True}
    wide = {n: x.astype(float) if isinstance(x, np.ndarray) else x for n, x in call.items()}
    within(FOUR.forms[form].function(**wide), (want.numpy(), tuple(x.numpy() for x in last)), FOUR.error_bound(**wide, unit=2.0**-23))


@pytest.mark.peers
@OF_SIX
def test_is_rwkv6_of_fla(form, rng):
    """fla's recurrence in float32, forwards."""
    peer = published("rwkv6/recurrent_naive.py").naive_recurrent_rwkv6
    call = {n: x.astype(np.float32) for n, x in SIX.sample(rng, T=40, d=8, e=6, batch=(2,)).items()}
    want, last = peer(*tensors(call, "r", "k", "v", "w", "u"), scale=1.0, initial_state=tensors(call, "state")[0], output_final_state=True)
    wide = {n: x.astype(float) for n, x in call.items()} | {"return_state": True}
    within(SIX.forms[form].function(**wide), (want.numpy(), last.numpy()), SIX.error_bound(**wide, unit=2.0**-24))


@pytest.mark.peers
def test_the_gradient_is_rwkv6_of_fla(rng):
    """fla's hand-written adjoint, but for w, whose last entry it leaves at 0 whatever the state's cotangent is (here 0)."""
    peer = published("rwkv6/recurrent_naive.py").naive_recurrent_rwkv6_bwd
    call = {n: x.astype(np.float32) for n, x in SIX.sample(rng, T=12, d=4, e=4, batch=(2,)).items() if n != "state"}
    dy = rng.standard_normal(call["v"].shape).astype(np.float32)
    arrays = tensors({**call, "dy": dy}, "r", "k", "v", "w", "u", "v", "dy")
    want = dict(zip("rkvwu", peer(*arrays), strict=False))
    got = SIX.gradient(dy.astype(float), **{n: x.astype(float) for n, x in call.items()})
    for name, x in want.items():
        assert np.all(abs(got[name] - x.numpy()) <= 2.0**-12 * abs(x.numpy()).max()), name


@pytest.mark.peers
@OF_SEVEN
def test_is_rwkv7_of_fla(form, rng):
    """fla's recurrence with a diagonal plus a matrix of rank one, in float32; it multiplies r by 1/√d."""
    peer = published("generalized_delta_rule/dplr/naive.py").dplr_recurrence
    call = {n: x.astype(np.float32) for n, x in SEVEN.sample(rng, T=40, d=16, e=6, batch=(2,)).items()}
    arrays = tensors({**call, "r": 4 * call["r"]}, "r", "k", "v", "a", "b", "w")
    want, last = peer(*arrays, initial_state=tensors(call, "state")[0])
    wide = {n: x.astype(float) for n, x in call.items()} | {"return_state": True}
    within(SEVEN.forms[form].function(**wide), (want.numpy(), last.numpy()), SEVEN.error_bound(**wide, unit=2.0**-24))
