"""RMS norm: a vector divided by its root mean square.

    y = x / √(mean x² + ε) · weight                                                                              (1)

Layer norm without the mean: cheaper, and as good in practice [1]. State space models put a gate beside it, before or after:

    y = (x silu(g)) / √(mean (x silu(g))² + ε) · weight          `gate_first` (Mamba-2)                          (2)
    y = x / √(mean x² + ε) · weight · silu(g)                    not `gate_first` (Qwen3-Next)                   (3)

Glossary
    x, weight     input and gain, c features              a, g [1, eq. 4]
    gate          g of (2) and (3)                        z [2, section 7]
    eps           ε, inside the root

Where implementations differ
    ε inside the root (nearly all) or added to it. Gemma stores weight - 1. Llama's code rounds to half precision before it
    multiplies by the weight. With a gate: the two orders of (2) and (3), which are both called gated RMS norm.

References
    [1] B. Zhang, R. Sennrich, "Root mean square layer normalization", NeurIPS 2019, equation 4.
    [2] T. Dao, A. Gu, "Transformers are SSMs", ICML 2024, section 7 (the norm before the output projection).
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.numerics import constant, silu, silu_derivative, silu_rounding
from refimpl.core.options import at_least_zero
from refimpl.laws import carries_nan
from refimpl.op import Cost, Form, Law, Op
from refimpl.ops.basics.normalised import small_rows, underflow

CONTRACT = Contract(
    "rms_norm",
    takes="x (..., c); weight (c); gate (..., c)",
    gives="y (..., c)",
    check=lambda arguments, sizes: at_least_zero("rms_norm", "eps", arguments.get("eps", 0.0)),
)


@CONTRACT.form
def rms_norm(x, weight=None, *, eps=1e-6, gate=None, gate_first=True):
    """RMS norm over the last axis, equations (1) to (3).

    Parameters
    ----------
    x : ndarray, shape (..., c)
    weight : ndarray, shape (c,), optional
    eps : float
        Added to the mean square.
    gate : ndarray, shape (..., c), optional
        silu(gate) multiplies.
    gate_first : bool
        Before the norm (Mamba-2), or after it.

    Returns
    -------
    y : ndarray, shape (..., c)

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit or eps is negative.

    Notes
    -----
    3 c operations per row. Squares overflow where |x| is beyond the root of the precision's maximum, 1.8e19 in float32,
    and vanish below 1e-19: as everywhere. The form "scaled" has no such limits.

    Examples
    --------
    >>> import numpy as np
    >>> rms_norm(np.array([[3.0, 4.0, 0.0, 0.0]]), eps=0.0)
    array([[1.2, 1.6, 0. , 0. ]])
    """
    x = x * silu(gate) if gate is not None and gate_first else x
    y = x / np.sqrt(_mean(x * x) + constant(eps, x))  # (..., c)
    return _gained(y, weight, gate, gate_first)


@CONTRACT.form
def rms_norm_scaled(x, weight=None, *, eps=1e-6, gate=None, gate_first=True):
    """The same with every row divided by its largest element first, so that no square overflows.

    With m = max |x|, x / √(mean x² + ε) = (x/m) / √(mean (x/m)² + ε/m²). A row of zeros has m = 1.
    """
    x = x * silu(gate) if gate is not None and gate_first else x
    largest = np.max(abs(x), axis=-1, keepdims=True, initial=0)  # (..., 1)
    largest = np.where(largest == 0, np.ones_like(largest), largest)
    x = x / largest
    y = x / np.sqrt(_mean(x * x) + constant(eps, x) / largest / largest)
    return _gained(y, weight, gate, gate_first)


@CONTRACT.gradient
def rms_norm_vjp(dy, x, weight=None, *, eps=1e-6, gate=None, gate_first=True):
    """Gradient of `rms_norm`. With r = 1/√(mean x² + ε), n = r x and dn = dy · weight,

        dx = r (dn - n mean(n dn)),    dweight = Σ dy n

    With a gate first, that is the gradient of x silu(g), and goes on to both; with a gate last, dy silu(g) comes in.

    Parameters
    ----------
    dy : ndarray, shape (..., c)
        Cotangent of y.

    Returns
    -------
    dict
        "x", and "weight" and "gate" where they were given.
    """
    s = np.ones_like(x) if gate is None else silu(gate)
    h = x * s if gate_first else x
    r = 1 / np.sqrt(_mean(h * h) + constant(eps, h))
    n = h * r
    last = dy if gate_first else dy * s  # cotangent of n · weight
    dn = last if weight is None else last * weight
    dh = r * (dn - n * _mean(n * dn))
    found = {"x": dh * s if gate_first else dh, "weight": last * n}
    if gate is not None:
        ds = dh * x if gate_first else dy * (n if weight is None else n * weight)
        found["gate"] = ds * silu_derivative(gate)
    return found


def error_bound(x, weight=None, *, unit, store=0.0, eps=1e-6, gate=None, gate_first=True):
    """|computed - exact|, elementwise, of any form; relative to y.

    The mean of c squares is off by c + 2 roundings, its root by half of them; a silu by 8, and 4 |g| for a fast
    exponential, which a gate that comes first brings into the root as well; and by 2 |g| of 1, where σ is made of tanh,
    which in the root weighs as much as what it is of. Half-precision code that is written out
    rounds squares, their mean, with ε, its root, the quotient, and every step of the gate's silu.
    """
    h = x * silu(gate) if gate is not None and gate_first else x
    total = _mean(h * h) + eps
    relative = unit * (x.shape[-1] / 2 + 8) + 4 * store + underflow(store) / np.where(total == 0, 1, total)
    if gate is not None:
        off = unit * (10 + 4 * abs(gate)) + store + silu_rounding(gate, store) / np.maximum(abs(silu(gate)), np.finfo(gate.dtype).tiny)
        of_tanh = 2 * unit * np.minimum(abs(gate), 2.0**10) / np.maximum(abs(silu(gate)), np.finfo(gate.dtype).tiny)
        relative = relative + off + of_tanh
        if gate_first:
            relative = relative + np.max(off, axis=-1, keepdims=True, initial=0) + _mean(h * h * of_tanh * (1 + of_tanh)) / np.where(total == 0, 1, total)
    return abs(rms_norm(x, weight, eps=eps, gate=gate, gate_first=gate_first)) * relative


# -- what the forms share --------------------------------------------------------------------------------------------


def _mean(x):
    return np.sum(x, axis=-1, keepdims=True) / max(x.shape[-1], 1)  # (..., 1)


def _gained(y, weight, gate, gate_first):
    y = y if weight is None else y * weight
    return y if gate is None or gate_first else y * silu(gate)


def _sample(rng, *, c=9, batch=(7,)):
    return {
        "x": 2 * rng.standard_normal((*batch, c)),
        "weight": rng.standard_normal(c) + 1,
        "gate": rng.standard_normal((*batch, c)),
    }


def _with(x=lambda rng, x: x, gate=lambda rng, gate: gate, options=None):
    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        return call | {"x": x(rng, call["x"]), "gate": gate(rng, call["gate"])} | (options or {})

    return draw


def _any_scale(f, call, bound, rng):
    """Without ε, a row times a power of two has the same norm."""
    call = call | {"eps": 0.0}
    factor = 2.0 ** rng.integers(-6, 7, (*call["x"].shape[:-1], 1))
    scaled = call | {"x": (call["x"] * factor.astype(np.float32)).astype(call["x"].dtype)}
    yield "y of rows times powers of two", f(**scaled), f(**call), 2 * bound(**call)


def _features_are_equals(f, call, bound, rng):
    order = rng.permutation(call["x"].shape[-1])
    moved = {n: v[..., order] if isinstance(v, np.ndarray) else v for n, v in call.items()}
    yield "y of the features in another order", f(**moved), f(**call)[..., order], 2 * bound(**call)[..., order]


def _mean_square_is_one(f, call, bound, rng):
    """Without ε, weight and a gate that comes last, the mean of y² is 1."""
    call = {n: v for n, v in call.items() if n != "weight"} | {"eps": 0.0}
    if (call.get("gate") is None or call.get("gate_first", True)) and call["x"].shape[-1] > 1 and call["x"].size:
        y, off = f(**call).astype(np.float64), bound(**call).astype(np.float64)
        yield "mean of y²", np.mean(y * y, axis=-1), np.ones(y.shape[:-1]), np.mean(3 * abs(y) * off + off * off, axis=-1)


def _cost(c, batch=1):
    return Cost((3 * c + 2) * batch, log2_ceil(c) + 5, (c + 2) * batch)


OPS = (
    Op(
        name="rms_norm",
        summary="x / √(mean x² + ε) · weight, with a gate before or after",
        contract=CONTRACT,
        forms={
            "definition": Form(rms_norm, _cost, exact=("work", "depth", "peak")),
            "scaled": Form(
                rms_norm_scaled,
                lambda c, batch=1: Cost((5 * c + 5) * batch, 2 * log2_ceil(c) + 9, (2 * c + 3) * batch),
                exact=("work", "peak"),
            ),
        },
        gradient=rms_norm_vjp,
        sample=_sample,
        options={"eps": (1e-6, 0.25), "gate_first": (True, False)},
        hard={
            "rows of zeros": _with(lambda rng, x: x * (rng.random((*x.shape[:-1], 1)) < 0.5)),
            "as small as eps": _with(lambda rng, x: x * 2.0**-10),
            "small, and a smaller eps": _with(lambda rng, x: small_rows(x, 2.0**-13), options={"eps": 1e-12}),
            "very small, and hardly an eps": _with(lambda rng, x: small_rows(x, 2.0**-24), options={"eps": 1e-20}),
            "much smaller than eps": _with(lambda rng, x: x * 2.0**-30),
            "large": _with(lambda rng, x: x * 2.0**40),
            "one needle": _with(lambda rng, x: np.where(np.arange(x.shape[-1]) == 0, 200.0, x / 1000)),  # squares overflow in float16 beyond 256
            "far from 0": _with(lambda rng, x: x + 100),
            "gates nearly shut": _with(gate=lambda rng, gate: gate - 5),
        },
        error_bound=error_bound,
        references=("zhang2019, equation 4", "dao2024mamba2, section 7"),
        lengths=(),
        sizes=({"c": 1}, {"c": 2}, {"c": 256}, {"batch": ()}, {"batch": (2, 3)}),
        laws=(
            carries_nan(CONTRACT, "x"),
            Law("any_scale", _any_scale, ("x",)),
            Law("features_are_equals", _features_are_equals, ("x", "weight", "gate")),
            Law("mean_square_is_one", _mean_square_is_one, ("x",)),
        ),
    ),
)
