"""RoPE: positions as rotations, so that a score knows only how far apart query and key stand.

    θ_ti = p_t ω_i,    ω_i = base^{-2i / dims},    i = 0 ... dims/2 - 1                                        (1)
    y_ti = (a cos θ_ti - b sin θ_ti,  a sin θ_ti + b cos θ_ti)    for the i-th pair (a, b) of features of x_t   (2)

Every pair of features is a point in a plane, and is turned by an angle in proportion to the position p_t; features from
`dims` on are left alone. Turning q by θ_s and k by θ_t leaves the product of q with k turned by θ_t - θ_s: applied to
queries and keys, positions enter attention as differences only, with nothing to learn and nothing added to the values.

Which features make a pair is a convention, and the two in use are both called RoPE: `layout="half"` pairs feature i with
feature i + dims/2 ("rotate half": Llama, GPT-NeoX, Qwen), `layout="interleaved"` pairs 2i with 2i + 1 (the paper, GPT-J).
They differ by a permutation of the features; weights trained with one are noise to the other.

Glossary
    x           queries or keys                      q, k [1, eq. 13]
    positions   p_t, integer or real                 m [1, eq. 14]
    omega       frequencies, radians per position    θ_i [1, section 3.2.2]
    theta       angles                               m θ_i [1, eq. 15]
    a, b        first and second of each pair        x_{2i}, x_{2i+1} [1, eq. 34]

Where implementations differ
    The layout, as said. The frequencies of a partial rotation: base^{-2i/dims} here, as in GPT-J and GPT-NeoX, not
    base^{-2i/d}. Scaled variants (linear, NTK, YaRN, Llama 3) differ from (1) in the frequencies only: pass `inv_freq`.
    Angles must not be formed in half precision: bfloat16 has no odd integers above 256.

References
    [1] J. Su et al., "RoFormer: enhanced transformer with rotary position embedding", Neurocomputing 568, 2024
        (arXiv:2104.09864), sections 3.2.2 and 3.4.2, equations 14, 15 and 34.
    [2] N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., SIAM, 2002, section 3.1.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.numerics import constant
from refimpl.core.options import one_of
from refimpl.laws import linear
from refimpl.op import Cost, Form, Law, Op


def _check(arguments, sizes):
    for name in ("x", "positions", "inv_freq"):
        value = arguments.get(name)
        if value is not None and (np.iscomplexobj(value) or value.dtype.kind == "b"):
            raise TypeError(f"rope: {name} must be real numbers, got dtype {value.dtype}")
    base, dims, inv_freq = arguments.get("base", 1.0), arguments.get("dims"), arguments.get("inv_freq")
    one_of("rope", "layout", arguments.get("layout", "half"), ("half", "interleaved"))
    try:
        good = np.ndim(base) == 0 and not isinstance(base, bool | str) and bool(np.isfinite(base)) and base > 0
    except TypeError:
        good = False
    if not good:
        raise ValueError(f"rope: base must be a positive number, got {base!r}")
    d = sizes["d"]
    if dims is not None and (isinstance(dims, bool) or not isinstance(dims, int | np.integer)):
        raise TypeError(f"rope: dims must be an even integer or None, got {dims!r}")
    wanted = d if dims is None and inv_freq is None else 2 * inv_freq.shape[-1] if dims is None else dims
    if wanted < 0 or wanted > d or wanted % 2:
        rule = f"rope: dims must be even, at least 0 and at most d = {d}"
        if dims is None and inv_freq is None:
            raise ValueError(f"{rule}; it is d unless given")
        raise ValueError(f"{rule}, got {f'{wanted} from inv_freq of {wanted // 2} entries' if dims is None else dims}")
    if inv_freq is not None and wanted != 2 * inv_freq.shape[-1]:
        raise ValueError(f"rope: inv_freq must have dims / 2 entries, got {inv_freq.shape[-1]} with dims = {dims}")


CONTRACT = Contract(
    "rope",
    takes="x (..., T, d); positions:free (..., T); inv_freq:free (f)",
    gives="y (..., T, d)",
    check=_check,
)


@CONTRACT.form
def rope(x, positions, *, base=10000.0, dims=None, inv_freq=None, layout="half"):
    """Rotary position embedding, equations (1) and (2), pair by pair.

    Parameters
    ----------
    x : ndarray, shape (..., T, d)
        Queries or keys; any heads are among the batch axes.
    positions : ndarray, shape (T,) or (..., T)
        Integer or real; does not take part in the choice of precision. Batch axes broadcast against those of x: with
        x of shape (batch, heads, T, d), positions of each sequence have shape (batch, 1, T).
    base : float
        θ of the papers' configurations; not looked at where `inv_freq` is given.
    dims : int, optional
        How many features are turned, the first ones; even. All of them by default (or as many as `inv_freq` says).
    inv_freq : ndarray, shape (dims/2,), optional
        Frequencies in radians per position, instead of (1); does not take part in the choice of precision.
    layout : {"half", "interleaved"}
        Whether feature i is paired with i + dims/2, or 2i with 2i + 1.

    Returns
    -------
    y : ndarray, shape (..., T, d)

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, dims is odd, negative or more than d, or an option has none of its values.

    Notes
    -----
    3 T d operations and T dims/2 sines and cosines. An angle is as exact as its precision allows: in float32, a position
    of 10^5 has the fastest pair in error by 10^5 u = 0.006 radians, here and everywhere else. Half precisions compute
    angles in float32.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    >>> y = rope(x, np.arange(3))
    >>> y @ y.T  # cos of the difference of the positions
    array([[ 1.        ,  0.54030231, -0.41614684],
           [ 0.54030231,  1.        ,  0.54030231],
           [-0.41614684,  0.54030231,  1.        ]])
    """
    theta = _angles(x, positions, base, dims, inv_freq)  # (..., T, dims/2)
    a, b, rest = _pairs(x, theta, layout)  # (..., T, dims/2) twice, (..., T, d - dims)
    cos, sin = np.cos(theta), np.sin(theta)
    return _joined(a * cos - b * sin, a * sin + b * cos, rest, layout)


@CONTRACT.form
def rope_complex(x, positions, *, base=10000.0, dims=None, inv_freq=None, layout="half"):
    """The same, the pair (a, b) being the complex number a + ib, and turning it a product: (a + ib) e^{iθ}.

    This is how [1, eq. 12] writes it and Llama's first code computed it. Six operations for a pair, as before.
    """
    theta = _angles(x, positions, base, dims, inv_freq)
    a, b, rest = _pairs(x, theta, layout)
    y = (a + 1j * b) * np.exp(1j * theta)
    return _joined(y.real, y.imag, rest, layout)


@CONTRACT.form
def rope_matrix(x, positions, *, base=10000.0, dims=None, inv_freq=None, layout="half"):
    """The same as one product with an orthogonal matrix, y_t = R_t x_t, R_t block-diagonal up to the layout [1, eq. 15].

    d² instead of 3 d operations a step, nearly all with zeros: what the proof looks at, and no kernel should.
    """
    theta = _angles(x, positions, base, dims, inv_freq)
    cos, sin, d, dims = np.cos(theta), np.sin(theta), x.shape[-1], 2 * theta.shape[-1]
    first, second = _places(dims, layout)
    R = np.zeros_like(theta, shape=(*theta.shape[:-1], d, d))  # (..., T, d, d)
    R[..., first, first], R[..., first, second] = cos, -sin
    R[..., second, first], R[..., second, second] = sin, cos
    R[..., range(dims, d), range(dims, d)] = 1
    return (R @ x[..., None])[..., 0]


@CONTRACT.gradient
def rope_vjp(dy, x, positions, *, base=10000.0, dims=None, inv_freq=None, layout="half"):
    """Gradient of `rope`: the transpose of a rotation is the rotation back.

        dx = R_{-θ} dy,    dθ = (dy)_b y_a - (dy)_a y_b,    dp_t = Σ_i ω_i dθ_ti,    dω_i = Σ_t p_t dθ_ti

    Parameters
    ----------
    dy : ndarray, shape (..., T, d)
        Cotangent of y.

    Returns
    -------
    dict
        "x"; "positions" if they are floating; "inv_freq" where given.
    """
    theta = _angles(x, positions, base, dims, inv_freq)
    cos, sin = np.cos(theta), np.sin(theta)
    a, b, _ = _pairs(x, theta, layout)
    da, db, rest = _pairs(dy, theta, layout)
    turned = db * (a * cos - b * sin) - da * (a * sin + b * cos)  # dθ: (..., T, dims/2)
    gradients = {"x": _joined(da * cos + db * sin, db * cos - da * sin, rest, layout)}
    if positions.dtype.kind not in "iu":
        gradients["positions"] = (turned * _frequencies(x, base, dims, inv_freq)).sum(axis=-1)
    if inv_freq is not None:
        gradients["inv_freq"] = (turned * constant(positions, x)[..., None]).sum(axis=tuple(range(turned.ndim - 1)))
    return gradients


@CONTRACT.form
def error_bound(x, positions, *, unit, store=0.0, base=10000.0, dims=None, inv_freq=None, layout="half"):
    """|computed - exact|, elementwise, of any form in arithmetic of unit roundoff `unit`.

    An angle is in error by four roundings of its size (position, frequency, product, reduction) and, where the frequency
    is computed, by those of its exponent too: base^z magnifies them by |z ln base| = |ln ω| [2]. An angle's error moves
    the point along its circle. Sines, cosines, products and the sum add 8 u of what they multiply; `store` allows for
    sines and cosines kept in half precision and products rounded to it.
    """
    theta, omega = _angles(x, positions, base, dims, inv_freq), _frequencies(x, base, dims, inv_freq)
    growth = 4 if inv_freq is not None else 8 + 4 * abs(np.log(omega))
    moved = np.minimum(unit * growth * abs(theta), 2)
    a, b, rest = _pairs(x, theta, layout)
    cos, sin = np.cos(theta), np.sin(theta)
    bend = (abs(a) + abs(b)) * (moved**2 / 2 + 4 * unit)
    along_a, along_b = abs(a * sin + b * cos) * moved, abs(a * cos - b * sin) * moved
    E_a = along_a + bend + (4 * unit + 2 * store) * (abs(a * cos) + abs(b * sin))
    E_b = along_b + bend + (4 * unit + 2 * store) * (abs(a * sin) + abs(b * cos))
    return _joined(E_a, E_b, np.zeros_like(rest), layout)


# -- what the forms share --------------------------------------------------------------------------------------------


def _frequencies(x, base, dims, inv_freq):
    """ω_i of (1), or those given: (dims/2,)."""
    if inv_freq is not None:
        return constant(inv_freq, x)
    dims = x.shape[-1] if dims is None else dims
    i = np.zeros_like(x, shape=(dims // 2,)) + constant(np.arange(dims // 2), x)
    return np.full_like(x, base, shape=(dims // 2,)) ** (-2 * i / max(dims, 1))


def _angles(x, positions, base, dims, inv_freq):
    return constant(positions, x)[..., None] * _frequencies(x, base, dims, inv_freq)  # (..., T, dims/2)


def _places(dims, layout):
    """Where the first and the second of each pair stand."""
    half = dims // 2
    return (np.arange(half), np.arange(half, dims)) if layout == "half" else (np.arange(0, dims, 2), np.arange(1, dims, 2))


def _pairs(x, theta, layout):
    """First and second of each pair, and the features that are not turned, with the batch axes of the result."""
    batch = np.broadcast_shapes(x.shape[:-1], theta.shape[:-1])
    first, second = _places(2 * theta.shape[-1], layout)
    return x[..., first], x[..., second], np.broadcast_to(x[..., 2 * theta.shape[-1] :], (*batch, x.shape[-1] - 2 * theta.shape[-1]))


def _joined(a, b, rest, layout):
    """The reverse of `_pairs`."""
    turned = np.concatenate([a, b], axis=-1) if layout == "half" else np.stack([a, b], axis=-1).reshape(*a.shape[:-1], 2 * a.shape[-1])
    return np.concatenate([turned, rest], axis=-1)


# -- laws and the operator -------------------------------------------------------------------------------------------


def _wide(x):
    return x.astype(np.result_type(x.dtype, np.float32)).astype(np.result_type(np.float64, np.result_type(x.dtype, np.float32)))


def _only_differences(f, call, bound, rng):
    """y(x, p)·y(x', p') is the same with all positions moved."""
    moved = {**call, "positions": call["positions"] + 5}
    y, y_moved, E, E_moved = _wide(f(**call)), _wide(f(**moved)), bound(**call), bound(**moved)
    product = lambda u, v: u @ v[..., ::-1, :].mT
    tolerance = sum(2 * product(e, abs(z)) + 2 * product(abs(z), e) + product(e, e) for z, e in ((y, E), (y_moved, E_moved)))
    yield "products of rows, all positions moved by 5", product(y_moved, y_moved), product(y, y), tolerance


def _keeps_length(f, call, bound, rng):
    y, E, x = _wide(f(**call)), bound(**call), _wide(call["x"])
    length = lambda v: (v * v).sum(axis=-1)
    yield (
        "squared length of rows",
        length(y),
        np.broadcast_to(length(x), y.shape[:-1]),
        (2 * abs(y) * E + 2 * E * E).sum(axis=-1) + length(E),
    )


def _nothing_at_zero(f, call, bound, rng):
    still = {**call, "positions": 0 * call["positions"]}
    y = f(**still)
    yield "y at position 0", y, np.broadcast_to(call["x"], y.shape), 2 * bound(**still)


def _arrange(call):
    """`inv_freq` says how many features are turned; a drawn `dims` beside it would have to say the same."""
    return {n: v for n, v in call.items() if n != "dims"} if call.get("inv_freq") is not None else call


def _sample(rng, *, T=7, d=8, batch=()):
    return {
        "x": rng.standard_normal((*batch, T, d)),
        "positions": np.cumsum(rng.integers(1, 4, (*batch, T)), axis=-1),
        "inv_freq": np.sort(rng.uniform(0.05, 1.5, (3 * d + 7) // 8))[::-1].copy(),
    }


def _with(**changes):
    """A hard call: the sample, with some arrays replaced."""

    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        return call | {name: change(rng, call[name]) for name, change in changes.items()}

    return draw


_cost = lambda per_pair, depth, peak: lambda T, d, f=0, batch=1: Cost(batch * T * per_pair(d), depth(d), batch * T * peak(d))

OPS = (
    Op(
        name="rope",
        summary="rotary position embedding: every pair of features turned by position times frequency",
        contract=CONTRACT,
        forms={
            "pairs": Form(rope, _cost(lambda d: 4.5 * d, lambda d: 4, lambda d: 5.5 * d), exact=("work", "depth", "peak")),
            "complex": Form(rope_complex, _cost(lambda d: 8.5 * d, lambda d: 4, lambda d: 4.5 * d), exact=("work", "depth", "peak")),
            "matrix": Form(
                rope_matrix,
                _cost(lambda d: 2 * d * d + 1.5 * d, lambda d: log2_ceil(d) + 3, lambda d: d * d + 2.5 * d),
                exact=("work", "depth"),
                stops="non-finite features: a product with 0 spreads them",
            ),
        },
        gradient=rope_vjp,
        sample=_sample,
        options={
            "base": (10000.0, 300.0),
            "dims": (None, lambda d, **_: 2 * ((d + 2) // 4)),
            "layout": ("half", "interleaved"),
        },
        hard={
            "position 0": _with(positions=lambda rng, p: 0 * p),
            "the same position": _with(positions=lambda rng, p: 0 * p + 11),
            "negative positions": _with(positions=lambda rng, p: -p),
            "positions in disorder": _with(positions=lambda rng, p: rng.permuted(p, axis=-1)),
            "positions beyond 256": _with(positions=lambda rng, p: p + 1001),
            "late positions": _with(positions=lambda rng, p: p + 100_000),
            "real positions": _with(positions=lambda rng, p: p / 4 - 1.125),
            "frequency 0": _with(inv_freq=lambda rng, w: w * (np.arange(w.size) % 2)),
            "one feature": _with(x=lambda rng, x: x * (np.arange(x.shape[-1]) == 1)),
        },
        error_bound=error_bound,
        references=("su2024, equations 14, 15 and 34", "higham2002, section 3.1"),
        sizes=({"d": 2}, {"d": 64}, {"d": 12}, {"d": 8, "batch": (2, 3)}),
        laws=(
            linear(CONTRACT, "x"),
            Law("only_differences", _only_differences, ("positions",)),
            Law("keeps_length", _keeps_length, ("x",)),
            Law("nothing_at_zero", _nothing_at_zero, ("positions",)),
        ),
        arrange=_arrange,
    ),
)
