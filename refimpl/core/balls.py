"""Balls: arrays of intervals that provably hold the exact value, for running spec code unchanged.

    x ∈ [mid - rad, mid + rad],        x ∘ y computed as an interval that holds every a ∘ b with a in x, b in y     (1)

A chapter's code, run on `Balls`, returns for each element an interval in which the exact result of the equation
provably lies [1]. Raise the precision, and the interval shrinks: the truth, to as many digits as one cares to ask for.

`Balls` is an ndarray of dtype object whose elements are python-flint's real and complex balls (arb, acb). The
subclass exists because a raw object array of balls answers questions that it cannot know: ``max`` and ``sort`` compare
overlapping intervals and take a false answer for a fact, ``.imag`` is zero, ``float(x)`` forgets the radius. Here

- a comparison that the intervals do not decide raises `Undecided`: raise the precision, or accept a tie;
- maxima and minima are intervals that hold the true one, whether or not one knows which argument it is;
- float operands enter exactly, in any precision up to longdouble;
- conversions to floating point raise (`midpoint_radius` is the way out), and so does every NumPy function that has no
  rigorous meaning here.

What balls do not model: overflow, subnormal numbers, the sign of zero, NaN that means something. NaN is an interval
about which nothing is known, so it is neither equal nor unequal to anything. Infinities are exact values, with the
limits e^-∞ = 0, log 0 = -∞; a division by zero is NaN. One leak cannot be closed from here: storing balls into an
array of floats (``buffer[...] = x``) rounds them; spec code has no such buffers, and tests that compare with a second
precision would see one.

References
    [1] F. Johansson, "Arb: efficient arbitrary-precision midpoint-radius interval arithmetic", IEEE Transactions on
        Computers 66(8), 2017, pp. 1281-1292, section 2.
"""
# mypy: disable-error-code="override, misc"
# (the methods of an ndarray, of which this class has its own, have overloads that do not concern it)

import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

try:
    import flint
    from flint import acb, arb
except ImportError as _error:
    raise ImportError("refimpl.core.balls needs python-flint: install refimpl[flint]") from _error


class Undecided(ArithmeticError):
    """The intervals overlap, so a comparison has no answer at this precision."""


@contextmanager
def precision(bits: int) -> Iterator[None]:
    """Compute with `bits` of precision inside the block.

    Examples
    --------
    >>> from refimpl.core.balls import precision, to_balls
    >>> with precision(200):
    ...     third = to_balls(1.0) / 3
    >>> bool(third.midpoint_radius()[1] < 1e-16), third.contains(1 / 3).item()
    (True, False)
    """
    with flint.ctx.workprec(bits):
        yield


def to_balls(x, radius=None) -> "Balls":
    """An array of balls that holds exactly the numbers of `x`.

    Parameters
    ----------
    x : array_like
        Booleans, integers, floats of any precision up to longdouble, complex numbers, or balls.
    radius : array_like, optional
        Makes each an interval [x - radius, x + radius]; 0 by default.

    Returns
    -------
    Balls, of the shape of `x`

    Raises
    ------
    TypeError
        If `x` is not numeric.

    Examples
    --------
    >>> import numpy as np
    >>> from refimpl.core.balls import to_balls
    >>> x = to_balls(np.array([0.1, 0.2], dtype=np.float32))
    >>> x.contains(np.array([0.1, 0.2], dtype=np.float32)), x.contains(np.array([0.1, 0.2]))
    (array([ True,  True]), array([False, False]))
    """
    if isinstance(x, Balls) and radius is None:
        return x
    balls = _wrap(_exact(x))
    return balls if radius is None else balls + _wrap(_radius(_exact(radius)))


class Balls(np.ndarray):
    """An array of intervals; made by `to_balls`. Arithmetic, indexing and NumPy functions as for any array."""

    __array_priority__ = 100.0

    # -- out of the ball world --------------------------------------------------------------------------------------

    def midpoint_radius(self, dtype=np.float64) -> tuple[np.ndarray, np.ndarray]:
        """Midpoints rounded to `dtype`, and radii (float64, rounded up) of intervals around them that hold the balls.

        For complex balls the midpoints are complex, and the radius bounds the distance in the plane. Unknown (NaN)
        has midpoint NaN and radius infinity.
        """
        complex_values = np.iscomplexobj(self)
        real = np.dtype(dtype)
        kind = np.result_type(real, np.complex64) if complex_values else real
        mid, radius = np.empty(self.shape, kind), np.empty(self.shape)
        for index in np.ndindex(self.shape):
            ball: Any = self._raw()[index]
            if isinstance(ball, acb):
                point = np.empty((), kind)
                point.real, point.imag = _nearest(ball.real, real), _nearest(ball.imag, real)
                mid[index] = point[()]
                away = (ball - _ball(mid[index])).abs_upper() if ball.is_finite() else arb("inf")
            else:
                mid[index] = nearest = _nearest(ball, real)
                away = arb(0) if _infinite(ball) else abs(ball - _ball(nearest)).upper() if ball.is_finite() else arb("inf")
            radius[index] = _upwards(away)
        return mid, radius

    def contains(self, x) -> np.ndarray:
        """Whether each interval holds the number `x` (taken exactly)."""
        return _elementwise(lambda a, b: bool(a.contains(b)) if type(a) is type(b) else bool(acb(a).contains(acb(b))), self, x, to=bool)

    def overlaps(self, x) -> np.ndarray:
        """Whether the intervals have a number in common."""
        return _elementwise(lambda a, b: bool(a.overlaps(b)) if type(a) is type(b) else bool(acb(a).overlaps(acb(b))), self, x, to=bool)

    # -- what ndarray would get wrong ---------------------------------------------------------------------------------

    @property
    def real(self) -> "Balls":
        return _wrap(_map(lambda a: a.real, self._raw()))

    @property
    def imag(self) -> "Balls":
        return _wrap(_map(lambda a: a.imag, self._raw()))

    def __getitem__(self, index):
        return _wrap(self._raw()[index])

    def __setitem__(self, index, value):
        self._raw()[index] = _exact(value)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __repr__(self):
        return f"Balls({self._raw()}, shape={self.shape})"

    def __str__(self):
        return str(self._raw())

    def __bool__(self):
        if self.size != 1:
            raise ValueError("the truth value of an array with more than one element is ambiguous")
        return bool(self != 0)

    def __float__(self):
        raise TypeError("a ball has no float value: use midpoint_radius")

    __int__ = __complex__ = __index__ = __float__

    def astype(self, dtype, *args, **kwargs):
        if np.dtype(dtype).kind != "O":
            raise TypeError(f"balls cannot be rounded to {np.dtype(dtype)}: use midpoint_radius")
        return self.copy()

    def item(self, *index):
        return self._raw().item(*index)

    def conj(self):
        return np.conjugate(self)

    conjugate = conj

    def sum(self, axis=None, dtype=None, out=None, keepdims=False, **kwargs):
        return _reduce(np.add, self, axis, keepdims=keepdims, **kwargs)

    def prod(self, axis=None, dtype=None, out=None, keepdims=False, **kwargs):
        return _reduce(np.multiply, self, axis, keepdims=keepdims, **kwargs)

    def max(self, axis=None, out=None, keepdims=False, **kwargs):
        return _reduce(_MAXIMUM, self, axis, keepdims=keepdims, **kwargs)

    def min(self, axis=None, out=None, keepdims=False, **kwargs):
        return _reduce(_MINIMUM, self, axis, keepdims=keepdims, **kwargs)

    def mean(self, axis=None, dtype=None, out=None, keepdims=False):
        return np.mean(self, axis=axis, keepdims=keepdims)

    def cumsum(self, axis=None, dtype=None, out=None):
        return np.cumsum(self, axis=axis)

    def cumprod(self, axis=None, dtype=None, out=None):
        return np.cumprod(self, axis=axis)

    def argmax(self, axis=None, out=None, *, keepdims=False):
        return np.argmax(self, axis=axis, keepdims=keepdims)

    def argmin(self, axis=None, out=None, *, keepdims=False):
        return np.argmin(self, axis=axis, keepdims=keepdims)

    def argsort(self, axis=-1, kind=None, order=None, *, stable=None):
        return np.argsort(self, axis=axis)

    def sort(self, axis=-1, kind=None, order=None, *, stable=None):
        self[...] = np.sort(self, axis=axis)

    def clip(self, min=None, max=None, out=None, **kwargs):
        return np.clip(self, min, max)

    def dot(self, b, out=None):
        return np.dot(self, b)

    def trace(self, *args, **kwargs):
        return np.trace(self, *args, **kwargs)

    def take(self, indices, axis=None, out=None, mode="raise"):
        return np.take(self, indices, axis=axis, mode=mode)

    def _refuse(self, *args, **kwargs):
        raise TypeError("this method has no rigorous meaning for balls")

    round = partition = argpartition = searchsorted = nonzero = tofile = dump = _refuse

    def _raw(self) -> np.ndarray:
        return self.view(np.ndarray)

    # -- NumPy's protocols --------------------------------------------------------------------------------------------

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, where=True, **kwargs):
        if where is not True and method == "__call__":
            raise TypeError(f"balls: {ufunc.__name__} takes no where=; use np.where")
        if method == "__call__":
            if ufunc.__name__ not in _UFUNCS:
                raise TypeError(f"balls: {ufunc.__name__} has no rigorous counterpart")
            result = _UFUNCS[ufunc.__name__](*map(_exact, inputs), **kwargs)
        elif method in ("reduce", "accumulate", "outer"):
            step = {"maximum": _MAXIMUM, "minimum": _MINIMUM, "add": np.add, "multiply": np.multiply, "subtract": np.subtract}.get(
                ufunc.__name__
            )
            if step is None:
                raise TypeError(f"balls: {ufunc.__name__}.{method} has no rigorous counterpart")
            kwargs = {k: v for k, v in kwargs.items() if k != "dtype"}
            if method == "reduce":
                result = _reduce(step, inputs[0], kwargs.pop("axis", 0), where=where, **kwargs)
            else:
                result = getattr(step, method)(*map(_exact, inputs), **kwargs)
        else:
            raise TypeError(f"balls: {ufunc.__name__}.{method} is not supported")
        if out is not None:
            return _store(result, out)
        return tuple(map(_wrap, result)) if isinstance(result, tuple) else _wrap(result)

    def __array_function__(self, function, types, args, kwargs):
        name = f"{function.__module__}.{function.__name__}"
        kwargs = {k: v for k, v in kwargs.items() if not (k in ("out", "dtype", "where") and v is None)}
        if name in _FUNCTIONS:
            return _FUNCTIONS[name](*args, **kwargs)
        if name in _VIEWS:
            return _wrap_all(function(*_strip(args), **_strip(kwargs)))
        if name in _PLAIN:
            return _wrap_all(function(*_strip(args), **_strip(kwargs)), fill=True)
        raise TypeError(f"balls: {name} has no rigorous counterpart")


# -- exact conversions -----------------------------------------------------------------------------------------------


def _ball(x) -> Any:
    """One number as a ball that holds nothing else."""
    if type(x) is arb or type(x) is acb:
        return x
    if isinstance(x, float | int):  # numpy.float64 is a float
        return arb(x)
    if isinstance(x, np.ndarray):
        return _ball(x.item())
    if isinstance(x, complex | np.complexfloating):
        return acb(_ball(x.real), _ball(x.imag))
    if isinstance(x, np.integer | np.bool_):
        return arb(int(x))
    if isinstance(x, np.longdouble):
        if not np.isfinite(x):
            return arb(float(x))
        mantissa, exponent = np.frexp(x)
        return arb((int(np.ldexp(mantissa, 64)), int(exponent) - 64))
    if isinstance(x, np.generic):  # half precisions
        return arb(float(x))
    raise TypeError(f"balls hold numbers, got {type(x).__name__}")


_EACH_BALL = np.frompyfunc(_ball, 1, 1)


def _exact(x) -> np.ndarray:
    """A raw object array of balls, each exactly the number given."""
    if isinstance(x, Balls):
        return x._raw()
    x = np.asarray(x, dtype=object) if isinstance(x, arb | acb) else np.asarray(x)
    if x.dtype.kind not in "biufcOV" or (x.dtype.kind == "V" and x.dtype.names):
        raise TypeError(f"balls hold numbers, got dtype {x.dtype}")
    if x.dtype.kind == "V":  # ml_dtypes' half precisions
        x = x.astype(np.float64)
    return np.asarray(_EACH_BALL(x), dtype=object)


def _radius(r: np.ndarray) -> np.ndarray:
    return _map(lambda a: arb(0, a.upper()), r)


def _map(function: Callable, *arrays: np.ndarray) -> np.ndarray:
    return np.asarray(np.frompyfunc(function, len(arrays), 1)(*arrays), dtype=object)


def _elementwise(function: Callable, *arrays, to=object) -> np.ndarray:
    return _map(function, *map(_exact, arrays)).astype(to)


def _wrap(x):
    """Balls, if x is made of objects (scalars become 0-d); anything else as it is."""
    if isinstance(x, arb | acb):
        x = np.asarray(x, dtype=object)
    return x.view(Balls) if isinstance(x, np.ndarray) and x.dtype.kind == "O" else x


def _wrap_all(x, fill=False):
    if isinstance(x, list | tuple):
        return type(x)(_wrap_all(v, fill) for v in x)
    if fill and isinstance(x, np.ndarray) and x.dtype.kind == "O":
        x = np.asarray(_EACH_BALL(x), dtype=object)
    return _wrap(x)


def _strip(x):
    """Arguments of a NumPy function without the subclass, floats made exact; integers and masks stay what they are."""
    if isinstance(x, tuple | list):
        return type(x)(map(_strip, x))
    if isinstance(x, dict):
        return {k: _strip(v) for k, v in x.items()}
    floats = isinstance(x, np.ndarray | np.generic) and x.dtype.kind in "fcV"
    return _exact(x) if isinstance(x, Balls) or floats else x


def _store(result, out):
    target = out[0]
    if not isinstance(target, Balls) and target.dtype.kind != "O" and np.asarray(result).dtype.kind == "O":
        raise TypeError(f"balls cannot be rounded to {target.dtype}: use midpoint_radius")
    target[...] = result
    return target


def _infinite(ball: arb) -> bool:
    """Exactly +∞ or -∞."""
    return not ball.is_finite() and not ball.is_nan() and bool(ball == ball)


def _nearest(ball: arb, dtype: np.dtype):
    """A number of `dtype` near the midpoint (the nearest, but for double rounding in longdouble's last bit)."""
    if _infinite(ball) or ball.is_nan():
        return dtype.type(float(ball))
    mid = ball.mid()
    high = float(mid)
    if dtype.itemsize <= 8 or not np.isfinite(high):
        return dtype.type(high)
    return dtype.type(high) + dtype.type(float(mid - arb(high)))


def _upwards(radius: arb) -> float:
    value = float(radius.upper())
    return value if value in (0, np.inf) and radius.upper() <= arb(value) else float(np.nextafter(value, np.inf))


# -- comparisons -----------------------------------------------------------------------------------------------------


def _comparison(name: str, compare: Callable, opposite: Callable) -> Callable:
    def decide(a, b) -> bool:
        if compare(a, b):
            return True
        if opposite(a, b):
            return False
        raise Undecided(f"{a} {name} {b} is not decided at {flint.ctx.prec} bits")

    return lambda a, b: _map(decide, a, b).astype(bool)


_LESS = _comparison("<", operator.lt, operator.ge)


def _maximum(a, b):
    if a >= b:
        return a
    return b if b >= a else a.max(b)


def _minimum(a, b):
    if a <= b:
        return a
    return b if b <= a else a.min(b)


_MAXIMUM, _MINIMUM = np.frompyfunc(_maximum, 2, 1), np.frompyfunc(_minimum, 2, 1)


def _certain(test: Callable) -> Callable:
    """A predicate of finite and infinite values, that raises where nothing is known."""

    def ask(a) -> bool:
        parts = (a.real, a.imag) if isinstance(a, acb) else (a,)
        if not all(p.is_finite() or _infinite(p) for p in parts):
            raise Undecided(f"nothing is known about {a} at {flint.ctx.prec} bits")
        return any(map(test, parts))

    return lambda a: _map(ask, a).astype(bool)


def _in_order(a: np.ndarray) -> list[int]:
    """Positions in rising order, equal ones (exact ties) as they stand."""

    def compare(i, j):
        return -1 if a[i] < a[j] else 1 if a[i] > a[j] else 0 if a[i] == a[j] else _tie(a[i], a[j])

    return sorted(range(len(a)), key=functools.cmp_to_key(compare))


def _tie(a, b):
    raise Undecided(f"the order of {a} and {b} is not decided at {flint.ctx.prec} bits")


def _first_best(a: np.ndarray, better: Callable) -> int:
    """The first of those that are certainly not beaten: with the best midpoint, and checked against all others."""
    best = 0
    for i in range(1, len(a)):
        best = i if better(a[i].mid(), a[best].mid()) else best
    for i in range(len(a)):
        if a[i] == a[best]:
            best = min(i, best)
        elif i != best and not better(a[best], a[i]):
            _tie(a[i], a[best])
    return best


# -- elementary functions --------------------------------------------------------------------------------------------


def _method(name: str) -> Callable:
    return lambda a: _map(operator.methodcaller(name), a)


def _log(a):
    return arb("-inf") if a == 0 else a.log()


def _log1p(a):
    return arb("-inf") if a == -1 else a.log1p()


def _erf(a):
    return a.sgn() if isinstance(a, arb) and _infinite(a) else a.erf()


def _sign(a):
    return a / abs(a) if isinstance(a, acb) and a != 0 else a.sgn()


def _logaddexp(a, b):
    if _infinite(a) or _infinite(b):
        return _maximum(a, b)
    low, high = (a, b) if float(a.mid()) <= float(b.mid()) else (b, a)
    return high + (low - high).exp().log1p()


def _sigmoid(a):
    return 1 / (1 + (-a).exp())


def _nearest_integer(a):
    up = a + arb(0.5)
    whole = up.floor()
    if up == whole:  # half way: to even
        return 2 * (whole / 2).floor()
    if whole.is_exact() and up != whole:
        return whole
    raise Undecided(f"the integer nearest to {a} is not decided at {flint.ctx.prec} bits")


def _matmul(a, b, **kwargs):
    return np.asarray(_EACH_BALL(np.matmul(a, b, **kwargs)), dtype=object)


_UFUNCS: dict[str, Callable] = {
    **{name: _method(name) for name in ("exp", "expm1", "sqrt", "sin", "cos", "tan", "sinh", "cosh", "tanh", "floor", "ceil")},
    **{f"arc{n}": _method(f"a{n}") for n in ("sin", "cos", "tan", "sinh", "cosh", "tanh")},
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.true_divide,
    "power": np.power,
    "float_power": np.power,
    "negative": np.negative,
    "positive": lambda a: a.copy(),
    "square": lambda a: a * a,
    "reciprocal": lambda a: 1 / a,
    "absolute": lambda a: _map(abs, a),
    "fabs": lambda a: _map(abs, a),
    "conjugate": lambda a: _map(lambda v: v.conjugate() if isinstance(v, acb) else v, a),
    "sign": lambda a: _map(_sign, a),
    "log": lambda a: _map(_log, a),
    "log1p": lambda a: _map(_log1p, a),
    "log2": lambda a: _map(lambda v: _log(v) / arb.const_log2(), a),
    "log10": lambda a: _map(lambda v: _log(v) / arb.const_log10(), a),
    "exp2": lambda a: _map(lambda v: (v * arb.const_log2()).exp(), a),
    "rint": lambda a: _map(_nearest_integer, a),
    "arctan2": lambda a, b: _map(arb.atan2, a, b),
    "hypot": lambda a, b: _map(lambda v, w: (v * v + w * w).sqrt(), a, b),
    "logaddexp": lambda a, b: _map(_logaddexp, a, b),
    "maximum": _MAXIMUM,
    "minimum": _MINIMUM,
    "fmax": _MAXIMUM,
    "fmin": _MINIMUM,
    "clip": lambda a, low, high: _MINIMUM(_MAXIMUM(a, low), high),
    "less": _LESS,
    "less_equal": _comparison("<=", operator.le, operator.gt),
    "greater": _comparison(">", operator.gt, operator.le),
    "greater_equal": _comparison(">=", operator.ge, operator.lt),
    "equal": _comparison("==", operator.eq, operator.ne),
    "not_equal": _comparison("!=", operator.ne, operator.eq),
    "isfinite": lambda a: ~_certain(_infinite)(a),
    "isinf": _certain(_infinite),
    "isnan": lambda a: _certain(_infinite)(a) & False,
    "matmul": _matmul,
    "vecdot": lambda a, b: np.add.reduce(_map(lambda v: v.conjugate() if isinstance(v, acb) else v, a) * b, axis=-1),
    "expit": lambda a: _map(_sigmoid, a),
    "log_expit": lambda a: _map(lambda v: -(-v).exp().log1p(), a),
    "erf": lambda a: _map(_erf, a),
    "erfc": lambda a: _map(lambda v: 1 - _erf(v) if _infinite(v) else v.erfc(), a),
}


# -- NumPy functions -------------------------------------------------------------------------------------------------


def _reduce(step: Any, x, axis=0, keepdims=False, initial=np._NoValue, where=True, **_):
    x = _exact(x)
    if where is not True:
        if step not in (np.add, np.multiply):
            raise TypeError("balls: a maximum takes no where=; use np.where")
        x = np.where(where, x, _ball(0 if step is np.add else 1))
    axes = tuple(range(x.ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    axes = tuple(a % x.ndim for a in axes) if x.ndim else ()
    rest = tuple(a for a in range(x.ndim) if a not in axes)
    lanes = x.transpose(*rest, *axes).reshape(*(x.shape[a] for a in rest), int(np.prod([x.shape[a] for a in axes], dtype=int)))
    if initial is not np._NoValue and initial is not None:
        lanes = np.concatenate([np.broadcast_to(_exact(initial), (*lanes.shape[:-1], 1)), lanes], axis=-1)
    elif lanes.shape[-1] == 0:
        if step not in (np.add, np.multiply):
            raise ValueError("zero-size array to a maximum or minimum which has no identity")
        lanes = np.broadcast_to(_exact(0 if step is np.add else 1), (*lanes.shape[:-1], 1))
    result = np.asarray(step.reduce(lanes, axis=-1), dtype=object)
    return _wrap(result.reshape([1 if a in axes else x.shape[a] for a in range(x.ndim)]) if keepdims else result)


def _along(function: Callable, x, axis, keepdims=False):
    """function(lane) -> int or array of ints, over an axis."""
    x = _exact(x)
    flat = x.reshape(-1) if axis is None else np.moveaxis(x, axis, -1)
    lanes = flat.reshape(-1, flat.shape[-1])
    found = np.array([function(lane) for lane in lanes], dtype=np.intp)
    if found.ndim == 1 and len(lanes) and np.ndim(found[0]) == 0:
        found = found.reshape(flat.shape[:-1])
        return np.expand_dims(found, axis) if keepdims and axis is not None else found[()]
    return np.moveaxis(found.reshape(flat.shape), -1, axis if axis is not None else -1)


def _where(condition, *choices):
    if isinstance(condition, Balls):
        condition = condition != 0
    if not choices:
        return np.nonzero(condition)
    return _wrap(np.where(condition, *map(_exact, choices)))


def _argsort(x, axis=-1, **_):
    return _along(_in_order, x, axis)


def _sort(x, axis=-1, **_):
    x = _exact(x)
    if axis is None:
        x, axis = x.reshape(-1), -1
    return _wrap(np.take_along_axis(x, _argsort(x, axis).reshape(x.shape), axis))


def _mean(x, axis=None, keepdims=False, **_):
    total = _reduce(np.add, x, axis, keepdims)
    return total * total.size / max(np.size(x), 1)


def _var(x, axis=None, keepdims=False, ddof=0, **_):
    away = x - _mean(x, axis, True)
    square = (away * np.conjugate(away)).real
    return _reduce(np.add, square, axis, keepdims) / (square.size / max(_mean(x, axis).size, 1) - ddof)


def _cumulative(step):
    def run(x, axis=None, **_):
        x = _exact(x)
        x, axis = (x.reshape(-1), 0) if axis is None else (x, axis)
        return _wrap(step.accumulate(x, axis=axis))

    return run


def _linear_algebra(method: str) -> Callable:
    """solve, inv, det of each matrix of a stack, by flint's."""

    def run(A, *b):
        A, b = _exact(A), tuple(map(_exact, b))
        vector = bool(b) and b[0].ndim == 1
        b = (b[0][:, None],) if vector else b
        batch = np.broadcast_shapes(*(x.shape[:-2] for x in (A, *b)))
        A, b = np.broadcast_to(A, batch + A.shape[-2:]), tuple(np.broadcast_to(x, batch + x.shape[-2:]) for x in b)
        like = b[0] if b else A
        result = np.empty(batch if method == "det" else like.shape, dtype=object)
        for index in np.ndindex(batch):
            try:
                found = getattr(_matrix(A[index]), method)(*(_matrix(x[index]) for x in b))
            except ZeroDivisionError:
                raise Undecided(f"balls: a matrix is not certainly invertible at {flint.ctx.prec} bits") from None
            if method == "det":
                result[index] = found
            elif found.nrows() and found.ncols():
                result[index] = np.array(found.tolist(), dtype=object)
        return _wrap(result[..., 0] if vector else result)

    return run


def _matrix(a: np.ndarray):
    kind = flint.acb_mat if any(isinstance(v, acb) for v in a.flat) else flint.arb_mat
    return kind(*a.shape, list(a.flat)) if a.size else kind(*a.shape)


def matrix_exponential(x: Balls) -> Balls:
    """e^x of each matrix of a stack, by flint's."""
    return _linear_algebra("exp")(x)


def _norm(x, ord=None, axis=None, keepdims=False):
    if ord not in (None, 2) or (ord == 2 and isinstance(axis, tuple)):
        raise TypeError(f"balls: norm of order {ord!r} is not supported")
    return np.sqrt(_reduce(np.add, np.absolute(x) ** 2, axis, keepdims))


def _is_complex(x) -> bool:
    return any(isinstance(v, acb) for v in _exact(x).flat) if isinstance(x, Balls) else np.iscomplexobj(x)


def _full_like(x, value, *, shape=None, **_):
    shape = np.shape(x) if shape is None else shape
    return _wrap(np.array(np.broadcast_to(_exact(value), shape)))


def _array_equal(a, b, **_):
    return np.shape(a) == np.shape(b) and bool(np.all(_UFUNCS["equal"](_exact(a), _exact(b))))


_FUNCTIONS: dict[str, Callable] = {
    "numpy.where": _where,
    "numpy.sum": lambda x, axis=None, **k: _reduce(np.add, x, axis, **k),
    "numpy.prod": lambda x, axis=None, **k: _reduce(np.multiply, x, axis, **k),
    "numpy.max": lambda x, axis=None, **k: _reduce(_MAXIMUM, x, axis, **k),
    "numpy.amax": lambda x, axis=None, **k: _reduce(_MAXIMUM, x, axis, **k),
    "numpy.min": lambda x, axis=None, **k: _reduce(_MINIMUM, x, axis, **k),
    "numpy.amin": lambda x, axis=None, **k: _reduce(_MINIMUM, x, axis, **k),
    "numpy.mean": _mean,
    "numpy.var": _var,
    "numpy.cumsum": _cumulative(np.add),
    "numpy.cumprod": _cumulative(np.multiply),
    "numpy.argmax": lambda x, axis=None, keepdims=False, **_: _along(lambda lane: _first_best(lane, operator.gt), x, axis, keepdims),
    "numpy.argmin": lambda x, axis=None, keepdims=False, **_: _along(lambda lane: _first_best(lane, operator.lt), x, axis, keepdims),
    "numpy.argsort": _argsort,
    "numpy.sort": _sort,
    "numpy.clip": lambda x, low=None, high=None, **k: _clip(x, k.get("a_min", k.get("min", low)), k.get("a_max", k.get("max", high))),
    "numpy.isneginf": lambda x, **_: _certain(lambda p: _infinite(p) and bool(p < 0))(_exact(x)),
    "numpy.isposinf": lambda x, **_: _certain(lambda p: _infinite(p) and bool(p > 0))(_exact(x)),
    "numpy.iscomplexobj": _is_complex,
    "numpy.isrealobj": lambda x: not _is_complex(x),
    "numpy.real": lambda x: x.real,
    "numpy.imag": lambda x: x.imag,
    "numpy.full_like": _full_like,
    "numpy.zeros_like": lambda x, **k: _full_like(x, 0, shape=k.get("shape")),
    "numpy.ones_like": lambda x, **k: _full_like(x, 1, shape=k.get("shape")),
    "numpy.empty_like": lambda x, **k: _full_like(x, np.nan, shape=k.get("shape")),
    "numpy.array_equal": _array_equal,
    "numpy.linalg.solve": _linear_algebra("solve"),
    "numpy.linalg.inv": _linear_algebra("inv"),
    "numpy.linalg.det": _linear_algebra("det"),
    "numpy.linalg.norm": _norm,
    "numpy.copyto": lambda out, x, **k: _copyto(out, x, **k),
}

_REARRANGING = """
    expand_dims squeeze moveaxis rollaxis swapaxes transpose permute_dims matrix_transpose reshape ravel broadcast_to broadcast_arrays
    flip fliplr flipud rot90 diagonal atleast_1d atleast_2d atleast_3d split array_split hsplit vsplit
    shape ndim size result_type may_share_memory shares_memory copy
"""
_COMPUTING = """
    concatenate stack vstack hstack dstack column_stack block append insert delete repeat tile roll pad take take_along_axis
    tril triu diag diagflat einsum dot inner outer vdot tensordot kron trace diff compress choose
"""
_VIEWS = frozenset(f"numpy.{name}" for name in _REARRANGING.split())
_PLAIN = frozenset(f"numpy.{name}" for name in _COMPUTING.split())


def _clip(x, low, high):
    x = x if low is None else np.maximum(x, low)
    return x if high is None else np.minimum(x, high)


def _copyto(out, x, where=True, **_):
    if not isinstance(out, Balls):
        raise TypeError(f"balls cannot be rounded to {out.dtype}: use midpoint_radius")
    np.copyto(out._raw(), _exact(x), where=where)
