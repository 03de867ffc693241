"""The language of contracts: what fits, what broadcasts, what precision comes out, and what the messages say."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import broadcastable_shapes, mutually_broadcastable_shapes

from refimpl.core.contract import Contract, tuple_of
from refimpl.core.dtypes import unbroadcast
from refimpl.core.options import one_of, positive_int
from refimpl.core.shapes import Shape

FAST = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SUM = Contract(
    "weigh",
    takes="x (..., H?, T, d); w (d, e); g (..., H?, T); b (e) | (..., H?, T, e); keep:bool (..., H?, T); at:int (T)",
    gives="y (..., H?, T, e)",
)


@SUM.form
def weigh(x, w, g=None, b=None, keep=None, at=None, *, scale=1):
    y = scale * (x @ w)
    y = y if g is None else y * g[..., None]
    y = y if b is None else y + b
    return y if keep is None else np.where(keep[..., None], y, np.zeros_like(y))


@SUM.gradient
def weigh_vjp(dy, x, w, g=None, b=None, keep=None, at=None, *, scale=1):
    dy = dy if keep is None else np.where(keep[..., None], dy, np.zeros_like(dy))
    inner = dy if g is None else dy * g[..., None]
    found = {"x": scale * inner @ np.swapaxes(w, -1, -2), "w": scale * np.einsum("...td,...te->...de", x, inner), "b": dy}
    if g is not None:
        found["g"] = (dy * scale * (x @ w)).sum(axis=-1)
    return found


def arrays(batch=(2,), H=3, T=4, d=5, e=6, rng=None):
    rng = np.random.default_rng(0) if rng is None else rng
    return {"x": rng.standard_normal((*batch, H, T, d)), "w": rng.standard_normal((d, e))}


# -- shapes ----------------------------------------------------------------------------------------------------------


def test_shapes_are_read_and_written():
    assert str(Shape.parse("(..., H?, T, d)")) == "(..., H, T, d)"
    assert str(Shape.parse("(c)")) == "(c,)"
    assert Shape.parse("()").axes == ()
    assert Shape.parse("(..., W-1, c)") == Shape(("W-1", "c"), True)
    assert Shape.parse("(..., H?, n, d)").heads == -3
    assert Shape.parse("(n, d)").heads is None


@pytest.mark.parametrize("text", ["x", "x ..., T", "(T)", "x y (T)"])
def test_what_cannot_be_read_is_said(text):
    with pytest.raises(ValueError, match="cannot read"):
        Contract("broken", takes=text, gives="y (T)")


@FAST
@given(shapes=mutually_broadcastable_shapes(num_shapes=3, max_dims=3, max_side=3), T=st.integers(0, 4), seed=st.integers(0, 99))
def test_batch_axes_broadcast_as_in_numpy(shapes, T, seed):
    """Whatever broadcasts, broadcasts here, and the gradient of what was spread is the sum over where it went."""
    rng = np.random.default_rng(seed)
    one, two, three = shapes.input_shapes
    x = rng.standard_normal((*one, 2, T, 3))
    call = {"x": x, "w": rng.standard_normal((3, 2)), "g": rng.standard_normal((*two, 2, T)), "keep": rng.random((*three, 2, T)) < 0.7}
    if len(two) < len(one) or len(three) < len(one):
        call["g"] = call["g"].reshape((1,) * max(len(one) - len(two), 0) + call["g"].shape)
        call["keep"] = call["keep"].reshape((1,) * max(len(one) - len(three), 0) + call["keep"].shape)
    y = weigh(**call)
    assert y.shape == (*shapes.result_shape, 2, T, 2)
    wide = {
        n: np.broadcast_to(v, (*shapes.result_shape, *v.shape[-k:]))
        for (n, v), k in zip(call.items(), (3, 2, 2, 2), strict=True)
        if n != "w"
    }
    assert np.array_equal(y, weigh(**{**wide, "w": call["w"]}))
    dy = rng.standard_normal(y.shape)
    gradient, full = weigh_vjp(dy, **call), weigh_vjp(dy, **{**wide, "w": call["w"]})
    for n in ("x", "g", "w"):
        assert gradient[n].shape == call[n].shape
        assert np.allclose(gradient[n], unbroadcast(full[n], call[n].shape))


@FAST
@given(data=st.data(), shape=st.lists(st.integers(1, 3), max_size=3))
def test_unbroadcast_undoes_broadcasting(data, shape):
    small = data.draw(
        broadcastable_shapes(tuple(shape), max_dims=len(shape), max_side=3).filter(
            lambda s: np.broadcast_shapes(s, tuple(shape)) == tuple(shape)
        )
    )
    ones = np.ones(shape)
    got = unbroadcast(ones, small)
    assert got.shape == small
    assert got.sum() == ones.sum()


def test_batches_that_do_not_broadcast_are_named():
    call = arrays()
    with pytest.raises(ValueError, match=r"weigh: batch axes must broadcast together, got x \(2,\).* g \(3,\)"):
        weigh(**call, g=np.ones((3, 3, 4)))


@pytest.mark.parametrize("extra", [{}, {"g": np.ones(4)}, {"b": np.ones((4, 6))}, {"b": np.ones(6), "keep": np.ones(4, bool)}])
def test_two_dimensions_are_one_head(extra):
    x, w = arrays(batch=(), H=1).values()
    y = weigh(x[0], w, **extra)
    assert y.shape == (4, 6)
    spread = {n: v[None] if n != "b" or v.ndim > 1 else v for n, v in extra.items()}
    assert np.array_equal(y, weigh(x, w, **spread)[0])
    for n, g in weigh_vjp(y, x[0], w, **extra).items():
        assert g.shape == {"x": x[0], "w": w, **extra}[n].shape


def test_one_letter_has_one_size():
    call = arrays()
    with pytest.raises(ValueError, match=r"weigh: w must have shape \(d, e\), got \(6, 6\) \(d = 5 from x, got 6\)"):
        weigh(call["x"], np.ones((6, 6)))
    with pytest.raises(ValueError, match="weigh: at must have shape"):
        weigh(**call, at=np.arange(3))


def test_alternatives_are_told_apart_by_rank():
    call = arrays()
    row, all_ = np.arange(6.0), np.ones((2, 3, 4, 6))
    assert np.array_equal(weigh(**call, b=row), weigh(**call) + row)
    assert np.array_equal(weigh(**call, b=all_), weigh(**call) + 1)
    with pytest.raises(ValueError, match=r"b must have shape \(e,\) or \(..., H, T, e\)"):
        weigh(**call, b=np.ones((7, 6)))


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [("k divides n", (2, 4), (3, 4)), ("k at most n", (4, 4), (5, 4)), ("k at least n", (4, 4), (3, 4)), ("k at least 2", (2, 0), (1, 0))],
)
def test_rules_between_sizes(rule, good, bad):
    contract = Contract("ruled", takes="x (k); y (n)", gives="z (k)", rules=(rule,))
    f = contract.form(lambda x, y: x)
    f(*map(np.ones, good))
    with pytest.raises(ValueError, match=rf"ruled: {rule} is required, got k = {bad[0]}, "):
        f(*map(np.ones, bad))


def test_derived_sizes():
    contract = Contract("conv", takes="w (W); state (..., W-1)", gives="y (W)")
    f = contract.form(lambda w, state: w)
    assert f(np.ones(4), np.ones((2, 3))).shape == (4,)
    with pytest.raises(ValueError, match=r"conv: state must have shape \(..., W-1\), got \(2, 4\) \(W-1 = 3 from w, got 4\)"):
        f(np.ones(4), np.ones((2, 4)))


def test_axes_of_letters():
    call = arrays() | {"g": np.ones((2, 3, 4))}
    assert SUM.axis("T", **call) == {"x": -2, "g": -1}
    assert SUM.axis("H", **call) == {"x": -3, "g": -2}
    assert SUM.result_axis("e") == {"y": -1}
    assert SUM.sizes(**call) == ({"H": 3, "T": 4, "d": 5, "e": 6}, (2,))
    assert SUM.result_shapes({"H": 3, "T": 4, "e": 6}, (2,)) == [(2, 3, 4, 6)]


# -- precisions ------------------------------------------------------------------------------------------------------

F16, F32, F64, LD, BF16, C64 = np.float16, np.float32, np.float64, np.longdouble, ml_dtypes.bfloat16, np.complex64


@pytest.mark.parametrize(
    ("x", "w", "y"),
    [
        (F32, F32, F32),
        (F32, F64, F64),
        (LD, F32, LD),
        (F32, np.int64, F32),
        (F32, np.int8, F32),
        (np.int64, np.int64, F64),
        (bool, F32, F32),
        (F16, F16, F16),
        (BF16, BF16, BF16),
        (F16, BF16, F32),
        (BF16, F32, F32),
        (BF16, F64, F64),
        (BF16, np.int32, BF16),
        (C64, F32, C64),
        (C64, F64, np.complex128),
        (BF16, C64, C64),
        (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fn),
    ],
)
def test_the_common_precision(x, w, y):
    call = arrays()
    result = weigh(call["x"].astype(x), call["w"].astype(w))
    assert result.dtype == np.dtype(y)


def test_scalars_and_masks_do_not_promote():
    call = {n: v.astype(F32) for n, v in arrays().items()}
    contract = Contract("scaled", takes="x (T); s ()", gives="y (T)")
    f = contract.form(lambda x, s: x * s)
    for s in (2, 2.0, True, np.float64(2.0), np.int64(2)):
        assert f(np.ones(3, F32), s).dtype == F32
    assert f(np.ones(3, F32), np.asarray(2.0)).dtype == F64
    assert weigh(**call, keep=np.ones((2, 3, 4), bool), at=np.arange(4), scale=2).dtype == F32


def test_half_precisions_are_rounded_once():
    rng = np.random.default_rng(1)
    x, w = (v.astype(BF16) for v in arrays(d=64, rng=rng).values())
    assert np.array_equal(weigh(x, w), (x.astype(F32) @ w.astype(F32)).astype(BF16))


def test_gradients_have_their_arguments_dtype():
    x, w = arrays().values()
    dy = np.ones((2, 3, 4, 6))
    for dtype in (F16, BF16, F32, F64, LD):
        g = weigh_vjp(dy, x.astype(dtype), w.astype(F32))
        assert g["x"].dtype == dtype
        assert g["w"].dtype == F32
    assert weigh_vjp(dy + 0j, x, w + 0j)["x"].dtype == F64  # the real part, for a real argument
    assert weigh_vjp(dy + 0j, x, w + 0j)["w"].dtype == np.complex128


# -- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"x": "text"}, TypeError, "weigh: x must be numeric, got dtype <U4"),
        ({"x": None}, TypeError, "weigh: x must be an array, got None"),
        ({"x": [[1.0], [1.0, 2.0]]}, TypeError, "weigh: x must be an array, got list"),
        ({"x": np.array([["a"]], object)}, TypeError, "weigh: x must be numeric, got objects such as str"),
        ({"x": np.zeros((4, 5), "M8[D]")}, TypeError, "weigh: x must be numeric"),
        ({"x": np.ones(5)}, ValueError, r"weigh: x must have shape \(..., H, T, d\), got \(5,\)"),
        ({"keep": np.ones((2, 3, 4))}, TypeError, "weigh: keep must be boolean"),
        ({"at": np.ones(4)}, TypeError, "weigh: at must be integer, got dtype float64"),
        ({"sclae": 2}, TypeError, "weigh: unknown argument 'sclae'; the arguments are x, w, g, b, keep, at, scale"),
    ],
)
def test_messages_name_the_operator_the_argument_and_the_value(changes, error, says):
    with pytest.raises(error, match=says):
        weigh(**{**arrays(), **changes})


def test_a_missing_argument_is_named():
    with pytest.raises(TypeError, match="weigh: missing a required argument: 'w'"):
        weigh(arrays()["x"])


@pytest.mark.parametrize("dy", [np.ones((2, 3, 4)), np.ones((3, 4, 6)), np.ones((2, 3, 4, 7))])
def test_cotangents_have_the_results_shape(dy):
    with pytest.raises(ValueError, match=r"weigh: dy must have the result's shape \(2, 3, 4, 6\), got"):
        weigh_vjp(dy, **arrays())


def test_too_many_cotangents():
    with pytest.raises(ValueError, match="weigh: dy must have at most 1 parts, got 2"):
        weigh_vjp((None, None), **arrays())


def test_results_are_nobodys_but_the_callers():
    """A form that hands an argument through returns a copy of it."""
    x = np.ones(3)
    given_back = Contract("same", takes="x (T)", gives="y (T)").form(lambda x: x)(x)
    given_back[:] = 0
    assert np.all(x == 1)


def test_options():
    one_of("f", "method", "a", ("a", "b"))
    with pytest.raises(ValueError, match="f: method must be one of 'a', 'b', got 'c'"):
        one_of("f", "method", "c", ("a", "b"))
    positive_int("f", "block", np.int64(3))
    for bad in (0, -1, 1.0, True, None):
        with pytest.raises(ValueError, match="f: block must be an integer of at least 1"):
            positive_int("f", "block", bad)


def test_a_real_array_takes_part_in_the_precision_and_is_not_complex():
    contract = Contract("real_parts", takes="x:real (T); w (T)", gives="y (T)")
    times = contract.form(lambda x, w: x * w)
    one = np.ones(3, np.float32)
    assert times(one, one).dtype == np.float32
    assert times(one.astype(np.float64), one).dtype == np.float64
    assert times(one, one + 0j).dtype == np.complex64
    with pytest.raises(TypeError, match="real_parts: x must be real, got dtype complex64"):
        times(one + 0j, one)


# -- tuples of arrays ------------------------------------------------------------------------------------------------

CHAIN = Contract("chain", takes="x (..., T, c); gates[N] (..., T, c); w (N, c)", gives="y (..., T, c)")


@CHAIN.form
def chain(x, gates, w):
    assert type(gates) is not list
    for gate, factor in zip(gates, w, strict=True):
        x = x * gate * factor
    return x


@CHAIN.gradient
def chain_vjp(dy, x, gates, w):
    parts = [dy * chain(x, gates, w) / gate for gate in gates]
    return {
        "x": dy * chain(np.ones_like(x), gates, w),
        "gates": tuple(parts),
        "w": np.stack([(p * g).sum(axis=-2) for p, g in zip(parts, gates, strict=True)]) / w,
    }


def test_a_tuple_of_arrays_is_read_part_by_part():
    """Each part has batch axes of its own and takes part in the choice of precision; N is how many there are."""
    rng = np.random.default_rng(0)
    x, a, b = rng.random((2, 4, 3)) + 1, rng.random((5, 1, 4, 3)) + 1, rng.random((4, 3)) + 1
    w = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    for gates in ((a, b), [a, b], tuple_of("gates", (a, b))):
        y = chain(x, gates, w)
        assert y.shape == (5, 2, 4, 3)
        assert np.array_equal(y, x * a * w[0] * b * w[1])
    assert CHAIN.sizes(x=x, gates=(a, b), w=w) == ({"N": 2, "T": 4, "c": 3}, (5, 2))
    assert CHAIN.layout(x=x, gates=(a, b)) == {"x": ("T", "c"), "gates": ("T", "c")}
    assert chain(x.astype("f4"), (a.astype("f4"), b.astype("f4")), w.astype("f4")).dtype == np.float32
    assert chain(x.astype("f4"), (a.astype("f4"), b), w.astype("f4")).dtype == np.float64
    assert np.array_equal(chain(x, (), np.ones((0, 3))), x)


def test_the_gradient_of_a_tuple_is_a_tuple_of_its_kind():
    rng = np.random.default_rng(0)
    x, a, b = rng.random((2, 4, 3)) + 1, rng.random((5, 1, 4, 3)).astype("f4") + 1, rng.random((4, 3)) + 1
    dy = rng.random((5, 2, 4, 3))
    plain = chain_vjp(dy, x, (a, b), np.ones((2, 3)))["gates"]
    assert type(plain) is tuple
    assert [(g.shape, g.dtype) for g in plain] == [(a.shape, a.dtype), (b.shape, b.dtype)]
    assert np.allclose(plain[1], (dy * x * a).sum(axis=(0, 1)), rtol=1e-14)
    named = tuple_of("gates", (a, b))
    assert type(chain_vjp(dy, x, named, np.ones((2, 3)))["gates"]) is type(named)


@pytest.mark.parametrize(
    ("gates", "error", "words"),
    [
        (np.ones((2, 4, 3)), TypeError, r"chain: gates must be a tuple of arrays \(\.\.\., T, c\), got shape \(2, 4, 3\)"),
        ((np.ones((4, 3)), "no"), TypeError, r"chain: gates\[1\] must be numeric"),
        ((np.ones((4, 3)), np.ones((4, 2))), ValueError, r"chain: gates\[1\] must have shape .* got \(4, 2\) \(c = 3 from x, got 2\)"),
        ((np.ones((4, 3)),), ValueError, r"chain: w must have shape .* \(N = 1 from gates, got 2\)"),
        ((np.ones((3, 4, 3)), np.ones((2, 4, 3))), ValueError, r"chain: batch axes must broadcast together, got .*gates\[1\] \(2,\)"),
        (None, TypeError, "chain: gates must be an array"),
    ],
)
def test_what_is_wrong_with_a_tuple_is_said(gates, error, words):
    with pytest.raises(error, match=words):
        chain(np.ones((4, 3)), gates, np.ones((2, 3)))
