"""Group norm: layer norm of each of some groups of features.

    x = (x_1, ..., x_G), groups of c/G neighbours,    y_g = (x_g - mean x_g) / √(var x_g + ε) · weight_g + bias_g   (1)

One group is layer norm; as many groups as heads normalise each head's result by itself, as RetNet, RWKV and xLSTM do.

Glossary
    groups          G, the number of groups                   G [1, section 3]
    weight, bias    for every feature                         γ, β [1, eq. 6]

Where implementations differ
    The statistics are those of one position (row), so that no position hears of another. torch's GroupNorm on (N, C, L)
    also averages over L, the sequence: on (N·L, C) it is this one. Groups are of neighbouring features.

References
    [1] Y. Wu, K. He, "Group normalization", ECCV 2018, section 3.1, equations 1-7.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.options import at_least_zero, positive_int
from refimpl.laws import carries_nan
from refimpl.op import Cost, Form, Law, Op
from refimpl.ops.basics.normalised import hard_rows, normalised, normalised_bound, normalised_vjp


def _check(arguments, sizes):
    """Options that are not there, because only shapes or precision are asked about, are not looked at."""
    at_least_zero("group_norm", "eps", arguments.get("eps", 0.0))
    if "groups" in arguments:
        positive_int("group_norm", "groups", arguments["groups"])
        if sizes["c"] % arguments["groups"]:
            raise ValueError(f"group_norm: groups must divide the features of x, got groups = {arguments['groups']}, c = {sizes['c']}")


CONTRACT = Contract("group_norm", takes="x (..., c); weight (c); bias (c)", gives="y (..., c)", check=_check)


@CONTRACT.form
def group_norm(x, groups, weight=None, bias=None, *, eps=1e-5):
    """Group norm over the last axis, equation (1).

    Parameters
    ----------
    x : ndarray, shape (..., c)
    groups : int
        Number of groups; divides c.
    weight, bias : ndarray, shape (c,), optional
    eps : float
        Added to the variance.

    Returns
    -------
    y : ndarray, shape (..., c)

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit, groups does not divide c, or eps is negative.

    Notes
    -----
    5 c operations per row.

    Examples
    --------
    >>> import numpy as np
    >>> group_norm(np.array([[1.0, 3.0, 10.0, 30.0]]), 2, eps=0.0)
    array([[-1.,  1., -1.,  1.]])
    """
    y = normalised(_split(x, groups), eps)[0].reshape(x.shape)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@CONTRACT.gradient
def group_norm_vjp(dy, x, groups, weight=None, bias=None, *, eps=1e-5):
    """Gradient of `group_norm`: that of layer norm, in each group.

    Parameters
    ----------
    dy : ndarray, shape (..., c)
        Cotangent of y.

    Returns
    -------
    dict
        "x", and "weight" and "bias" where they were given.
    """
    n, r = normalised(_split(x, groups), eps)
    dn = dy if weight is None else dy * weight
    dx = normalised_vjp(_split(np.broadcast_to(dn, x.shape), groups), n, r)
    return {"x": dx.reshape(x.shape), "weight": dy * n.reshape(x.shape), "bias": dy}


def error_bound(x, groups, weight=None, bias=None, *, unit, store=0.0, eps=1e-5):
    """|computed - exact|, elementwise, of any form: that of layer norm, in each group.

    See `normalised_bound`; times the weight, and two roundings.
    """
    n, off = (v.reshape(x.shape) for v in normalised_bound(_split(x, groups), eps, unit, store))
    off = off + (2 * unit + store) * abs(n)
    n, off = (n, off) if weight is None else (n * weight, off * abs(weight))
    return off if bias is None else off + 2 * unit * (abs(bias) + abs(n)) + store * abs(n)


def _split(x, groups):
    return x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)  # (..., G, c/G)


def _sample(rng, *, c=12, groups=3, batch=(7,)):
    least = 1 if np.prod(batch, dtype=int) > 1 else 2  # torch refuses to normalise one number of one token
    c = max(least, c // groups) * groups if c >= groups else 4 * groups  # two are ill-conditioned: ±1 whatever they are
    return {
        "x": 2 * rng.standard_normal((*batch, c)) + rng.standard_normal((*batch, groups)).repeat(c // groups, axis=-1),
        "groups": groups,
        "weight": rng.standard_normal(c) + 1,
        "bias": rng.standard_normal(c) + 1,
    }


def _each_group_alone(f, call, bound, rng):
    """The first group alone, and the last, are what they are among the others."""
    width = call["x"].shape[-1] // call["groups"]
    for part in (slice(0, width), slice(-width, None)) if width else ():
        alone = {n: v[..., part] if isinstance(v, np.ndarray) else v for n, v in call.items()} | {"groups": 1}
        yield "y of a group alone", f(**alone), f(**call)[..., part], 2 * bound(**alone)


def _shifted_groups(f, call, bound, rng):
    """A number added to a group changes nothing (integers to integers, which is exact)."""
    whole = np.clip(np.rint(4 * call["x"].astype(np.float64)), -60, 60)
    more = 32 * rng.integers(-2, 3, call["groups"]).repeat(call["x"].shape[-1] // call["groups"])
    one, two = (call | {"x": v.astype(call["x"].dtype)} for v in (whole, whole + more))
    yield "y of shifted groups", f(**two), f(**one), bound(**one) + bound(**two)


def _cost(c, groups=1, batch=1):
    return Cost((5 * c + 3 * groups) * batch, 2 * log2_ceil(c / groups) + 8, (2 * c + 2 * groups) * batch)


OPS = (
    Op(
        name="group_norm",
        summary="layer norm of each of some groups of features",
        contract=CONTRACT,
        forms={"definition": Form(group_norm, _cost, exact=("work", "depth", "peak"))},
        gradient=group_norm_vjp,
        sample=_sample,
        options={"eps": (1e-5, 0.25)},
        hard=hard_rows(_sample),
        error_bound=error_bound,
        references=("wu2018, section 3.1",),
        lengths=(),
        sizes=({"c": 12, "groups": 1}, {"c": 12, "groups": 12}, {"c": 256, "groups": 8}, {"batch": ()}, {"batch": (2, 3)}),
        laws=(
            carries_nan(CONTRACT, "x"),
            Law("each_group_alone", _each_group_alone, ("x",)),
            Law("shifted_groups", _shifted_groups, ("x",)),
        ),
    ),
)
