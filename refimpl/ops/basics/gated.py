"""Gated pairs: an activated branch multiplies another one, element by element.

    swiglu(gate, up) = silu(gate) up,    geglu(gate, up) = gelu(gate) up                                         (1)

The middle of the feed-forward layers of Llama (swiglu) and Gemma (geglu): two projections of the same token go in, and
a third one takes the product back. No network of one branch of the same size does as well [1].

Glossary
    gate, up    the two branches                              x W, x V [1, equations 5, 6]
    approximate "none" for x Φ(x), "tanh" for its approximation, as in `refimpl.gelu`

Where implementations differ
    Which half of a joined projection is the gate differs from model to model; Gemma's gelu is the one with tanh.

References
    [1] N. Shazeer, "GLU variants improve transformer", arXiv:2002.05202, equations 5-6.
"""

import numpy as np

from refimpl.core import numerics
from refimpl.core.contract import Contract
from refimpl.core.numerics import silu_derivative
from refimpl.core.options import one_of
from refimpl.laws import carries_nan
from refimpl.op import Cost, Form, Law, Op
from refimpl.ops.basics.activations import gelu, gelu_bound, gelu_vjp, silu_bound

SWIGLU = Contract("swiglu", takes="gate (...); up (...)", gives="y (...)")
GEGLU = Contract(
    "geglu",
    takes="gate (...); up (...)",
    gives="y (...)",
    check=lambda arguments, sizes: one_of("geglu", "approximate", arguments.get("approximate", "none"), ("none", "tanh")),
)


@SWIGLU.form
def swiglu(gate, up):
    """silu(gate) · up, equation (5): the gate of Llama's feed-forward layers.

    Parameters
    ----------
    gate, up : ndarray, shapes that broadcast together

    Returns
    -------
    y : ndarray

    Raises
    ------
    ValueError, TypeError
        If the shapes do not broadcast or an array is not numeric.

    Notes
    -----
    Three operations. The projections before it and after it are the caller's.

    Examples
    --------
    >>> import numpy as np
    >>> swiglu(np.array([1.0, -1.0]), np.array([2.0, 2.0])).round(4)
    array([ 1.4621, -0.5379])
    """
    return numerics.silu(gate) * up


@SWIGLU.gradient
def swiglu_vjp(dy, gate, up):
    """Gradient of `swiglu`: dgate = dy up silu'(gate), dup = dy silu(gate).

    Parameters
    ----------
    dy : ndarray, the result's shape

    Returns
    -------
    dict
        "gate" and "up".
    """
    return {"gate": dy * up * silu_derivative(gate), "up": dy * numerics.silu(gate)}


def swiglu_bound(gate, up, *, unit, store=0.0):
    """|computed - exact|: silu's, times up, and a rounding; half-precision kernels may round silu, and its steps, before the product."""
    return silu_bound(gate, unit=unit, store=store) * abs(up) + (2 * unit + store) * abs(numerics.silu(gate) * up)


@GEGLU.form
def geglu(gate, up, *, approximate="none"):
    """gelu(gate) · up, equation (5).

    Parameters
    ----------
    gate, up : ndarray, shapes that broadcast together
    approximate : {"none", "tanh"}
        As in `refimpl.gelu`.

    Returns
    -------
    y : ndarray

    Raises
    ------
    ValueError, TypeError
        If the shapes do not broadcast, an array is not numeric, or approximate is neither.

    Notes
    -----
    The projections before it and after it are the caller's.

    Examples
    --------
    >>> import numpy as np
    >>> geglu(np.array([1.0, -1.0]), np.array([2.0, 2.0])).round(4)
    array([ 1.6827, -0.3173])
    """
    return gelu(gate, approximate=approximate) * up


@GEGLU.gradient
def geglu_vjp(dy, gate, up, *, approximate="none"):
    """Gradient of `geglu`: dgate = dy up gelu'(gate), dup = dy gelu(gate).

    Parameters
    ----------
    dy : ndarray, the result's shape

    Returns
    -------
    dict
        "gate" and "up".
    """
    slope = gelu_vjp(np.ones_like(gate), gate, approximate=approximate)["x"]
    return {"gate": dy * up * slope, "up": dy * gelu(gate, approximate=approximate)}


def geglu_bound(gate, up, *, unit, store=0.0, approximate="none"):
    """|computed - exact|: gelu's, times up, and a rounding; half-precision kernels may round gelu, and its steps, before the product."""
    of_gelu = gelu_bound(gate, unit=unit, store=store, approximate=approximate)
    return of_gelu * abs(up) + (2 * unit + store) * abs(gelu(gate, approximate=approximate) * up)


# -- the records -----------------------------------------------------------------------------------------------------


def _sample(rng, *, c=33, batch=(7,)):
    return {"gate": 3 * rng.standard_normal((*batch, c)), "up": rng.standard_normal((*batch, c))}


def _with(change):
    def draw(rng, **sizes):
        call = _sample(rng, **sizes)
        return call | {"gate": change(rng, call["gate"])}

    return draw


_HARD = {
    "zero": _with(lambda rng, x: 0 * x),
    "large": _with(lambda rng, x: 100 * x + 1000 * np.sign(x)),  # as in `refimpl.ops.basics.activations`
    "far to the left": _with(lambda rng, x: -abs(x) - 5),
    "far to the right": _with(lambda rng, x: abs(x) + 20),
    "tiny": _with(lambda rng, x: x * 2.0**-40),
}


def _linear_in_up(f, call, bound, rng):
    twice = call | {"up": 2 * call["up"]}
    yield "y of twice up", f(**twice), 2 * f(**call), 4 * bound(**call)


def _gates_make_one(f, call, bound, rng):
    """f(gate, up) - f(-gate, up) = gate up."""
    there, back = (call | {"gate": v} for v in (call["gate"], -call["gate"]))
    got = f(**there).astype(np.float64) - f(**back).astype(np.float64)
    product = call["gate"].astype(np.float64) * call["up"].astype(np.float64)
    yield "f(gate, up) - f(-gate, up)", got, product, bound(**there) + bound(**back)


def _cost(each):
    return lambda c=1, batch=1: Cost(each * c * batch, each, 2 * c * batch)


_SIZES = ({"c": 1}, {"c": 256}, {"batch": ()}, {"batch": (2, 3)})
_LAWS = (Law("linear_in_up", _linear_in_up, ("up",)), Law("gates_make_one", _gates_make_one, ("gate",)))

OPS = (
    Op(
        name="swiglu",
        summary="silu(gate) · up",
        contract=SWIGLU,
        forms={"definition": Form(swiglu, _cost(3), exact=("work", "depth", "peak"))},
        gradient=swiglu_vjp,
        sample=_sample,
        hard=_HARD,
        error_bound=swiglu_bound,
        references=("shazeer2020, equation 6",),
        lengths=(),
        sizes=_SIZES,
        laws=(*_LAWS, carries_nan(SWIGLU, "gate", "up")),
    ),
    Op(
        name="geglu",
        summary="gelu(gate) · up",
        contract=GEGLU,
        forms={"definition": Form(geglu, _cost(3), exact=("work", "depth", "peak"))},
        gradient=geglu_vjp,
        sample=_sample,
        options={"approximate": ("none", "tanh")},
        hard=_HARD,
        error_bound=geglu_bound,
        references=("shazeer2020, equation 5",),
        lengths=(),
        sizes=_SIZES,
        laws=(*_LAWS, carries_nan(GEGLU, "gate", "up")),
    ),
)
