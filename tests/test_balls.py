"""Intervals: that they hold what they must, refuse what they cannot know, and that every chapter runs on them."""

import inspect

import ml_dtypes
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

import refimpl
from refimpl.conformance.cases import Support, draw, factors, pairwise
from refimpl.conformance.domain import Domain
from refimpl.core import numerics

pytest.importorskip("flint")

from refimpl.core.balls import Balls, Undecided, precision, to_balls

REAL = np.array([[0.1, -2.5, 3.0], [1e-3, 0.75, -0.2]])
POSITIVE = np.abs(REAL)


@pytest.fixture(autouse=True)
def _many_bits():
    with precision(160):
        yield


# -- conversions -----------------------------------------------------------------------------------------------------

FORMATS = [np.float16, np.float32, np.float64, np.longdouble, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]


@pytest.mark.parametrize("dtype", FORMATS, ids=lambda d: np.dtype(d).name)
def test_floats_enter_exactly(dtype):
    x = (np.array([1, 3, -7, 0]) / np.longdouble(3)).astype(dtype)
    balls = to_balls(x)
    mid, radius = balls.midpoint_radius(np.longdouble)
    assert np.array_equal(mid, x.astype(np.longdouble))
    assert not radius.any()
    assert balls.contains(x).all()


def test_other_numbers_enter_exactly():
    assert to_balls([True, False]).midpoint_radius()[0].tolist() == [1, 0]
    assert to_balls(np.int64(2**53 + 1)).item() == 2**53 + 1
    assert np.array_equal(to_balls(np.array([1 + 2j, -0.1j], np.complex64)).midpoint_radius()[0], np.array([1 + 2j, -0.1j], np.complex64))
    assert np.array_equal(to_balls([np.inf, -np.inf]).midpoint_radius()[0], [np.inf, -np.inf])


@pytest.mark.parametrize("x", [["a"], np.array(["1.0"]), np.array([None]), np.array(["2020-01-01"], "M8[D]")])
def test_what_is_no_number_is_refused(x):
    with pytest.raises(TypeError, match="balls hold numbers"):
        to_balls(x)


def test_a_radius_makes_an_interval():
    x = to_balls([1.0, 2.0], radius=[0.25, 0.5])
    assert x.contains([1.25, 2.5]).all()
    assert x.contains([0.75, 1.5]).all()
    assert not x.contains([1.26, 1.49]).any()
    mid, radius = x.midpoint_radius()
    assert mid.tolist() == [1, 2]
    assert (radius >= [0.25, 0.5]).all()
    assert np.allclose(radius, [0.25, 0.5])


def test_the_radius_counts_the_rounding_of_the_midpoint():
    third = to_balls(1) / 3
    mid, radius = third.midpoint_radius(np.float32)
    assert mid.dtype == np.float32
    assert to_balls(mid, radius=radius).contains(third.midpoint_radius(np.longdouble)[0])
    assert 2**-27 < radius <= 2**-26


def test_nothing_known_is_infinitely_wide():
    mid, radius = (to_balls([0.0]) / to_balls([0.0])).midpoint_radius()
    assert np.isnan(mid[0])
    assert radius[0] == np.inf


@pytest.mark.parametrize(
    "leak",
    [
        lambda x: float(x[0, 0]),
        lambda x: int(x[0, 0]),
        lambda x: complex(x[0, 0]),
        lambda x: x.astype(np.float64),
        lambda x: x.astype(np.longdouble),
        lambda x: np.ones((2, 3)).__iadd__(x),
        lambda x: np.add(x, x, out=np.ones((2, 3))),
        lambda x: np.copyto(np.ones((2, 3)), x),
        lambda x: range(3)[x[0, 0]],
    ],
)
def test_conversions_to_floats_raise(leak):
    with pytest.raises(TypeError, match=r"midpoint_radius|float"):
        leak(to_balls(REAL))


@pytest.mark.parametrize(
    "call", [np.fft.fft, np.linalg.eigvals, np.median, np.unique, np.partition, np.nan_to_num, np.cbrt, np.spacing, np.signbit]
)
def test_what_has_no_rigorous_meaning_raises(call):
    with pytest.raises(TypeError, match="rigorous"):
        call(to_balls(REAL), *([1] if call is np.partition else []))


# -- arithmetic against longdouble -----------------------------------------------------------------------------------


EPS = np.finfo(np.longdouble).eps
TINY = np.finfo(float).tiny


def agrees(balls, value, unit=EPS):
    """Whether intervals of many bits lie within a few longdouble roundings of a longdouble computation."""
    assert isinstance(balls, Balls)
    value = np.asarray(value)
    assert balls.shape == value.shape
    mid, radius = balls.midpoint_radius(np.longdouble)
    scale = max(np.max(abs(value), initial=0), 1)
    return bool(np.all(abs(mid - value) <= radius + 64 * unit * scale) and np.all(radius <= 4 * unit * scale))


UNARY = [
    *(np.exp, np.expm1, np.log, np.log1p, np.log2, np.log10, np.exp2, np.sqrt, np.square, np.reciprocal, np.tanh, np.sinh, np.cosh),
    *(
        np.sin,
        np.cos,
        np.tan,
        np.arctan,
        np.arcsinh,
        np.negative,
        np.positive,
        np.abs,
        np.fabs,
        np.sign,
        np.conj,
        np.floor,
        np.ceil,
        np.rint,
    ),
]


@pytest.mark.parametrize("f", UNARY, ids=lambda f: f.__name__)
def test_elementary_functions(f):
    x = POSITIVE if f in (np.log, np.log2, np.log10, np.sqrt) else POSITIVE - 0.5
    assert agrees(f(to_balls(x)), f(x.astype(np.longdouble)))


@pytest.mark.parametrize(
    "f", [scipy.special.expit, scipy.special.log_expit, scipy.special.erf, scipy.special.erfc], ids=lambda f: f.__name__
)
def test_special_functions(f):
    assert agrees(f(to_balls(REAL)), f(REAL), unit=np.finfo(float).eps)


BINARY = [
    np.add,
    np.subtract,
    np.multiply,
    np.divide,
    np.power,
    np.maximum,
    np.minimum,
    np.fmax,
    np.fmin,
    np.logaddexp,
    np.arctan2,
    np.hypot,
]


@pytest.mark.parametrize("other", [np.float32(0.3), np.full(3, 1.5, np.float32), np.longdouble(1) / 3, 2, np.array([1, 2, 3]), 0.5])
@pytest.mark.parametrize("f", BINARY, ids=lambda f: f.__name__)
def test_binary_functions_take_floats_exactly(f, other):
    wide = np.asarray(other, np.longdouble)
    x = POSITIVE.astype(np.longdouble)
    assert agrees(f(to_balls(POSITIVE), other), f(x, wide))
    assert agrees(f(other, to_balls(POSITIVE)), f(wide, x))


def test_operators_and_their_reflections():
    x, y = to_balls(REAL), REAL.astype(np.longdouble)
    assert agrees(1 - 2 * x / 3 + x**2 - 2.0**x, 1 - 2 * y / 3 + y**2 - 2.0**y)
    assert agrees(x @ x.T, y @ y.T)
    assert agrees(REAL @ x.T, y @ y.T)
    z = x + 0
    z += 1
    z[0] = np.float32(0.5)
    z[1, 1:] *= 2
    expected = y + 1
    expected[0] = 0.5
    expected[1, 1:] *= 2
    assert agrees(z, expected)


def test_integer_powers_of_negative_numbers_and_of_zero():
    mid, _ = (to_balls([-2.0, 0.0, 0.0, -2.0]) ** np.array([3, 0, 2, -1])).midpoint_radius()
    assert mid.tolist() == [-8, 1, 0, -0.5]


def test_complex():
    c = REAL + 1j * REAL[::-1]
    x, y = to_balls(c), c.astype(np.clongdouble)
    assert np.iscomplexobj(x)
    assert not np.iscomplexobj(to_balls(REAL))
    for f in (
        np.exp,
        np.sqrt,
        np.conj,
        lambda v: v * v / (1 + v),
        lambda v: v.real,
        lambda v: v.imag,
        abs,
        np.sign,
        np.real,
        np.imag,
        np.log,
    ):
        assert agrees(f(x), f(y))
    assert agrees((x * to_balls(REAL)).sum(axis=0), (y * REAL).sum(axis=0))
    assert x.contains(c).all()
    assert not x.contains(c + 1e-9j).any()
    assert np.iscomplexobj(1j * to_balls(REAL))


def test_infinities_have_their_limits():
    x = to_balls([-np.inf, 0.0, np.inf])
    assert np.exp(x).midpoint_radius()[0].tolist() == [0, 1, np.inf]
    assert np.tanh(x).midpoint_radius()[0].tolist() == [-1, 0, 1]
    assert np.log(to_balls([0.0, 1.0])).midpoint_radius()[0].tolist() == [-np.inf, 0]
    assert np.logaddexp(x, -np.inf).midpoint_radius()[0].tolist() == [-np.inf, 0, np.inf]
    assert np.isneginf(x).tolist() == [True, False, False]
    assert np.isposinf(x).tolist() == [False, False, True]
    assert np.isfinite(x).tolist() == [False, True, False]
    assert np.isinf(x).tolist() == [True, False, True]
    assert (x == -np.inf).tolist() == [True, False, False]


@pytest.mark.parametrize(
    "f", [numerics.sigmoid, numerics.log_sigmoid, numerics.softplus, numerics.silu, numerics.silu_derivative], ids=lambda f: f.__name__
)
def test_stable_functions_run_on_balls(f):
    x = np.array([-1000.0, -30.5, -1.0, 0.0, 1e-9, 2.0, 50.0, 1000.0])
    assert agrees(f(to_balls(x)), f(x.astype(np.longdouble)))


def test_differences_of_infinities_are_guarded():
    a, b = np.array([-np.inf, -np.inf, 1.0, 0.0]), np.array([-np.inf, 2.0, 1.0, 3.0])
    assert agrees(
        numerics.exp_of_difference(to_balls(a), to_balls(b)), numerics.exp_of_difference(a.astype(np.longdouble), b.astype(np.longdouble))
    )
    x = to_balls(REAL)
    assert agrees(numerics.sqrt_of(3, x), np.sqrt(np.longdouble(3)))
    assert agrees(x * numerics.constant(0.5, x), REAL / 2)


# -- what is not decided is not answered -----------------------------------------------------------------------------


@pytest.mark.parametrize("compare", [np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal])
def test_comparisons_answer_only_what_is_certain(compare):
    values = np.array([1.0, 2.0, 3.0])
    assert np.array_equal(compare(to_balls(values), 2.0), compare(values, 2.0))
    with pytest.raises(Undecided):
        compare(to_balls([1.0, 2.0], radius=0.1), 2.05)
    root = np.sqrt(to_balls(2.0))
    with pytest.raises(Undecided):
        compare(root, root + 0)


def test_a_comparison_that_touches_may_be_certain():
    x = to_balls(1.0, radius=1.0)
    assert bool(x <= 3)
    assert bool(x < 3)
    assert not bool(x < -1)


@pytest.mark.parametrize(
    "ask", [np.isfinite, np.isnan, np.isinf, np.isneginf, lambda x: x < 1, lambda x: x == x, lambda x: bool(x), np.rint, np.sort]
)
def test_nothing_is_said_about_nan(ask):
    unknown = to_balls([1.0]) / to_balls(0.0, radius=1.0)
    with pytest.raises(Undecided):
        ask(np.concatenate([unknown, unknown]) if ask is np.sort else unknown)


@pytest.mark.parametrize("order", [np.argmax, np.argmin, np.sort, np.argsort])
def test_an_undecided_order_raises(order):
    overlapping = to_balls([1.0, 1.05, 3.0], radius=0.1)
    if order is np.argmax:
        assert order(overlapping) == 2
        overlapping = overlapping[:2]
    with pytest.raises(Undecided):
        order(overlapping)
    assert np.array_equal(np.asarray(to_balls([3.0, 1.0, 2.0]).argsort()), [1, 2, 0])


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_decided_orders(axis):
    x = to_balls(REAL)
    for f in (np.argmax, np.argmin, np.argsort):
        assert np.array_equal(f(x, axis=axis), f(REAL, axis=axis))
    assert agrees(np.sort(x, axis=axis), np.sort(REAL, axis=axis))
    ties = np.array([[2.0, 1.0, 2.0, 1.0]])
    assert np.array_equal(np.argsort(to_balls(ties), axis=-1), np.argsort(ties, axis=-1, kind="stable"))
    assert np.argmax(to_balls(ties)) == 0


def test_maxima_hold_the_true_one_whichever_it_is():
    a, b = to_balls(1.0, radius=0.25), to_balls(1.125, radius=0.25)
    top = np.maximum(a, b)
    assert all(top.contains(max(x, y)) for x in (0.75, 1.0, 1.25) for y in (0.875, 1.125, 1.375))
    assert not top.contains(0.8)
    assert np.stack([a, b]).max().contains(1.375)
    bottom = np.minimum(a, b)
    assert bottom.contains(0.75)
    assert not bottom.contains(1.3)
    assert np.maximum(to_balls(-np.inf), a).overlaps(a)
    assert np.isposinf(np.maximum(to_balls(np.inf), a))


def test_truth_values_must_be_certain():
    assert bool(to_balls(1.0))
    assert not bool(to_balls(0.0))
    with pytest.raises(Undecided):
        bool(to_balls(0.0, radius=1.0))
    with pytest.raises(ValueError, match="ambiguous"):
        bool(to_balls([1.0, 2.0]))


@given(st.lists(st.tuples(st.floats(-4, 4), st.floats(0, 1), st.floats(-1, 1)), min_size=2, max_size=5))
def test_intervals_hold_the_image_of_every_point(points):
    """The law of interval arithmetic: from points inside one gets values inside."""
    mid, radius, inside = (np.array(v) for v in zip(*points))
    x, value = to_balls(mid, radius=radius), to_balls(mid) + to_balls(radius) * to_balls(inside)
    for f in (
        lambda v: v * v[::-1] - v,
        np.tanh,
        np.exp,
        lambda v: np.maximum(v, v[::-1]),
        lambda v: v.max(keepdims=True) - v.min(),
        numerics.softplus,
        numerics.silu,
        lambda v: np.exp(v - v.max()) / np.exp(v - v.max()).sum(),
        lambda v: np.logaddexp(v, v[::-1]),
        lambda v: np.clip(v, -1, 1),
    ):
        assert f(x).overlaps(f(value)).all()
        low, _ = f(value).midpoint_radius()
        mid_, radius_ = f(x).midpoint_radius()
        assert np.all(abs(low - mid_) <= radius_ * (1 + 1e-9) + 1e-12)


# -- NumPy's functions -----------------------------------------------------------------------------------------------

STRUCTURE = {
    "concatenate": lambda x: np.concatenate([x, np.ones((1, 3), np.float32), x]),
    "stack": lambda x: np.stack([x, 0 * x], axis=-1),
    "expand and squeeze": lambda x: np.squeeze(np.expand_dims(x, 1), 1),
    "moveaxis": lambda x: np.moveaxis(x, 0, -1),
    "swapaxes": lambda x: np.swapaxes(x, 0, -1),
    "transpose": lambda x: x.transpose(1, 0).T.mT,
    "reshape": lambda x: x.reshape(-1).reshape(3, 2),
    "broadcast_to": lambda x: np.broadcast_to(x, (2, 2, 3)),
    "flip": lambda x: np.flip(x, 0)[..., ::-1],
    "take": lambda x: np.take(x, [0, 2], axis=1),
    "take_along_axis": lambda x: np.take_along_axis(x, np.array([[0], [1]]), axis=1),
    "repeat": lambda x: np.repeat(x, 2, axis=0),
    "tile": lambda x: np.tile(x, (2, 1)),
    "roll": lambda x: np.roll(x, 1, axis=1),
    "pad": lambda x: np.pad(x, [(1, 0), (0, 2)]),
    "tril": np.tril,
    "triu": lambda x: np.triu(x, 1),
    "where": lambda x: np.where(np.arange(3) > 1, x, -2),
    "where on a comparison": lambda x: np.where(x > 0, x, 0.5),
    "zeros_like": lambda x: np.zeros_like(x, shape=(4,)) + x[0, 0],
    "ones_like": np.ones_like,
    "full_like": lambda x: np.full_like(x, 2.5),
    "diff": lambda x: np.diff(x, axis=1),
    "sum": lambda x: x.sum(axis=(0, 1), keepdims=True) + x.sum() + np.sum(x, axis=0),
    "sum of nothing": lambda x: np.sum(x[:0], axis=0) + x[:0].sum(),
    "prod": lambda x: np.prod(x, axis=1) * x[:0].prod(),
    "mean": lambda x: x.mean(axis=-1, keepdims=True) + np.mean(x),
    "var": lambda x: np.var(x, axis=-1),
    "max": lambda x: x.max(axis=0) + np.max(x) + np.max(x, axis=1, keepdims=True) + np.max(x[:0], axis=0, initial=-1),
    "min": lambda x: x.min(axis=0) - np.min(x),
    "reduce": lambda x: np.maximum.reduce(x, axis=-1) + np.add.reduce(x, axis=(0, 1)),
    "accumulate": lambda x: np.maximum.accumulate(x, axis=1) + np.add.accumulate(x, axis=1),
    "cumsum": lambda x: np.cumsum(x, axis=0) + x.cumsum(axis=1),
    "cumprod": lambda x: np.cumprod(x, axis=-1),
    "outer": lambda x: np.multiply.outer(x[0], x[1]) + np.outer(x[0], x[1]),
    "einsum": lambda x: np.einsum("ij,kj->ik", x, x) + np.einsum("ij,ij->", x, x),
    "einsum with floats": lambda x: np.einsum("ij,kj->ik", x, np.ones((2, 3), np.float32)),
    "dot": lambda x: np.dot(x, x.T) + x.dot(x.T) + np.tensordot(x, x, axes=([1], [1])),
    "matmul of a stack": lambda x: np.matmul(np.stack([x, x]), x.T),
    "matmul over nothing": lambda x: x[:, :0] @ x[:0],
    "vecdot": lambda x: np.vecdot(x, x),
    "clip": lambda x: np.clip(x, -1, 1) + x.clip(0, None),
    "norm": lambda x: np.linalg.norm(x, axis=-1),
    "split": lambda x: np.split(x, 3, axis=1)[1] + np.array_split(x, 2, axis=1)[0][:, :1],
    "block": lambda x: np.vstack([x, np.hstack([x[:, :1], x[:, 1:]])]),
    "atleast_3d": np.atleast_3d,
    "copy": lambda x: np.copy(x) + x.copy(),
    "iteration": lambda x: np.stack([row * 2 for row in x]),
    "kron": lambda x: np.kron(x, x),
    "square matrices": lambda x: np.linalg.solve(x @ x.T + np.eye(2), x) + (np.linalg.inv(x @ x.T) @ x) * np.linalg.det(x @ x.T),
    "a stack of systems": lambda x: np.linalg.solve(np.stack([x @ x.T, np.eye(2) + 0 * (x @ x.T)]), x[:, :1]),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_array_functions(name):
    f = STRUCTURE[name]
    expected = f(REAL)  # numpy.linalg has no longdouble
    assert agrees(f(to_balls(REAL)), expected, unit=np.finfo(float).eps)


def test_results_hold_nothing_but_balls():
    """Zeros of `zeros_like`, sums over nothing and padding are balls too, else they would escape the rules."""
    from flint import acb, arb

    for name, f in STRUCTURE.items():
        assert all(type(v) in (arb, acb) for v in f(to_balls(REAL)).view(np.ndarray).flat), name


def test_elements_stay_guarded():
    x = to_balls([1.0, 2.0], radius=2.0)
    assert isinstance(x[0], Balls)
    assert all(isinstance(v, Balls) for v in x)
    with pytest.raises(Undecided):
        _ = x[0] < x[1]


def test_a_singular_matrix_is_not_inverted():
    with pytest.raises(Undecided):
        np.linalg.inv(to_balls([[1.0, 1.0], [1.0, 1.0]], radius=0.1))


def test_precision_is_a_block():
    wide = to_balls(1) / 3
    with precision(40):
        narrow = to_balls(1) / 3
    assert narrow.midpoint_radius()[1] > 1e-13 > wide.midpoint_radius()[1]
    assert narrow.overlaps(wide)


# -- the book on balls -----------------------------------------------------------------------------------------------

FORMS = [(op, form) for op in refimpl.OPS.values() for form, f in op.forms.items() if f.on_balls]


def _tiny_calls(op, rng):
    """All pairs of options and optional arrays, three or four steps long, and the hard inputs."""
    sizes = dict.fromkeys(op.lengths, 3) | ({op.lengths[1]: 4} if len(op.lengths) > 1 else {})
    everything = {"batch": ()} if "batch" in inspect.signature(op.sample).parameters else {}
    chosen = factors(op, Support(), Domain())
    for combo in pairwise(chosen, rng) if chosen else [{}]:
        yield draw(op, rng, {**everything, **sizes}, combo)
    for hard in op.hard.values():
        yield hard(rng, **sizes)


def _balls(call):
    def convert(v):
        if isinstance(v, tuple) and hasattr(v, "_fields"):
            return type(v)(*map(convert, v))
        return to_balls(v) if isinstance(v, np.ndarray) and v.dtype.kind in "fc" else v

    return {n: convert(v) for n, v in call.items()}


def _wide(call):
    def convert(v):
        if isinstance(v, tuple) and hasattr(v, "_fields"):
            return type(v)(*map(convert, v))
        if isinstance(v, np.ndarray) and v.dtype.kind in "fc":
            return v.astype(np.clongdouble if v.dtype.kind == "c" else np.longdouble)
        return v

    return {n: convert(v) for n, v in call.items()}


def _leaves(x):
    if isinstance(x, tuple | list):
        return [leaf for v in x for leaf in _leaves(v)]
    if isinstance(x, dict):
        return [leaf for v in x.values() for leaf in _leaves(v)]
    return [] if x is None else [np.asanyarray(x)]


def _compared(op, function, call, what):
    """Run on longdouble and on balls; the intervals must be narrow and near."""
    wide = _wide(call)
    with np.errstate(all="ignore"):
        try:
            value = function(**wide)
        except ValueError as refusal:
            if op.name not in str(refusal):
                raise
            return False
        bound = op.error_bound(**wide, unit=EPS)
    with precision(256):
        intervals = function(**_balls(call))
    for v, b, limit in zip(_leaves(value), _leaves(intervals), _leaves(bound), strict=False):
        assert v.shape == b.shape, what
        if v.dtype.kind in "iub":
            assert np.array_equal(v, b), what
            continue
        if not v.size:
            continue
        assert isinstance(b, Balls), f"{what}: the result is {type(b).__name__}, not Balls"
        mid, radius = b.midpoint_radius(np.longdouble)
        fine = np.isfinite(v)
        assert np.array_equal(v[~fine], mid[~fine]) or np.isnan(v[~fine]).any(), f"{what}: non-finite places differ"
        limit = np.broadcast_to(limit, v.shape)[fine] + TINY + 4 * EPS * abs(v[fine])
        assert np.all(radius[fine] <= limit), f"{what}: the interval's radius {radius[fine].max()} says too little"
        worst = np.max(abs(v[fine] - mid[fine]) - radius[fine] - limit, initial=-1)
        assert worst <= 0, f"{what}: longdouble is {worst} beyond the interval and the bound"
    return True


@pytest.mark.parametrize(("op", "form"), FORMS, ids=[f"{op.name}-{form}" for op, form in FORMS])
def test_spec_code_runs_on_balls(op, form, rng):
    """The form's intervals at 256 bits are narrow, and agree with its longdouble results within the error bound.

    A conversion to floats anywhere in the chapter shows: at 53 bits it is a thousand times the longdouble bound.
    """
    ran = 0
    for call in _tiny_calls(op, rng):
        arrays = ", ".join(f"{n}={v!r}" if not isinstance(v, np.ndarray | tuple) else n for n, v in call.items())
        ran += _compared(op, op.forms[form].function, call, f"{op.name}, {form}({arrays})")
    assert ran, f"{op.name}: {form} refused every call"


WITH_GRADIENT = [op for op in refimpl.OPS.values() if op.gradient is not None and next(iter(op.forms.values())).on_balls]


@pytest.mark.parametrize("op", WITH_GRADIENT, ids=lambda op: op.name)
def test_gradients_run_on_balls(op, rng):
    """Gradients have no stated bound; but longdouble must be much nearer to the intervals than float64 is.

    A conversion to floats in the chapter would make both equally far.
    """
    takes = inspect.signature(op.gradient).parameters
    for call in _tiny_calls(op, rng):
        result = op.definition(**call)
        outputs = list(result) if isinstance(result, tuple) and not hasattr(result, "_fields") else [result]
        dstate = outputs.pop() if call.get("return_state") else None
        dy = [np.where(np.isfinite(v), rng.standard_normal(v.shape), np.zeros_like(v)) if v.dtype.kind in "fc" else None for v in outputs]
        seeds = {"dy": tuple(dy) if len(dy) > 1 else dy[0]} | ({"dstate": dstate} if dstate is not None else {})
        arguments = {n: v for n, v in {**call, **seeds}.items() if n in takes}
        with np.errstate(all="ignore"):
            double = op.gradient(**arguments)
            value = op.gradient(**_deep(_wide, arguments))
        with precision(256):
            intervals = op.gradient(**_deep(_balls, arguments))
        assert double.keys() == value.keys() == intervals.keys()
        for name in value:
            for d, v, b in zip(*(_leaves(g[name]) for g in (double, value, intervals)), strict=True):
                if not v.size:
                    continue
                assert isinstance(b, Balls), f"gradient of {name} is {type(b).__name__}, not Balls"
                mid, radius = b.midpoint_radius(np.longdouble)
                fine = np.isfinite(v)
                least = np.finfo(v.dtype).eps * np.max(abs(v[fine]), initial=0) + 2.0**-200  # a Python float's gradient is float64
                assert np.all(radius[fine] <= least), f"gradient of {name}: radius {radius.max()}"
                off, off_in_double = (np.max(abs(x[fine] - mid[fine]), initial=0) for x in (v, d))
                assert off <= 64 * least + off_in_double / 16, f"gradient of {name}: longdouble is {off} off, float64 {off_in_double}"


def _deep(convert, arguments):
    """As `convert`, into plain tuples of cotangents too."""
    tuples = {n: tuple(None if p is None else convert({"p": p})["p"] for p in v) for n, v in arguments.items() if type(v) is tuple}
    return convert(arguments) | tuples


def _rounded_on_the_way(function):
    """The same function, with its floating arguments rounded to float64 after a detour: what a cast in a chapter does."""

    def cast(v):
        if isinstance(v, tuple):
            return type(v)(*map(cast, v))
        if isinstance(v, Balls):
            return to_balls((v / 3).midpoint_radius()[0]) * 3
        if isinstance(v, np.ndarray) and v.dtype.kind in "fc":
            return v / 3 * 3
        return v

    return lambda **call: function(**{n: cast(v) for n, v in call.items()})


@pytest.mark.parametrize("op", refimpl.OPS.values(), ids=lambda op: op.name)
def test_a_cast_to_floats_in_a_chapter_would_be_seen(op, rng):
    """The gate for the gate: 53 bits on the way are not taken for truth."""
    call = draw(op, rng, {}, {})
    assert _compared(op, op.definition, call, op.name)
    with pytest.raises(AssertionError, match="longdouble is"):
        _compared(op, _rounded_on_the_way(op.definition), call, op.name)
