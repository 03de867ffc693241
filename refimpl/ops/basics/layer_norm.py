"""Layer norm: a vector less its mean, divided by its standard deviation.

    μ = mean x,    v = mean (x - μ)²,    y = (x - μ) / √(v + ε) · weight + bias                                   (1)

The variance is that of the features themselves, divided by c. It can also be found in one pass: with k features seen,
of mean μ_k and Σ (x - μ_k)² = s_k, the next changes them to

    μ_{k+1} = μ_k + (x - μ_k) / (k + 1),    s_{k+1} = s_k + (x - μ_k)(x - μ_{k+1})                                (2)

(Welford [2]), which GPU kernels do, with blocks in place of single features. Not so v = mean x² - μ²: where the mean is
large, both terms are, and their difference has lost its digits.

Glossary
    x, weight, bias     input, gain and shift; c features     a, g, b [1, eqs. 3, 4]
    eps                 ε, inside the root

Where implementations differ
    ε is added inside the root here and in torch; some divide by √v + ε. Statistics packages divide by c - 1.

References
    [1] J. L. Ba, J. R. Kiros, G. E. Hinton, "Layer normalization", arXiv:1607.06450, equations 3-4.
    [2] B. P. Welford, "Note on a method for calculating corrected sums of squares", Technometrics 4(3), 1962.
    [3] T. F. Chan, G. H. Golub, R. J. LeVeque, "Algorithms for computing the sample variance", Am. Stat. 37(3), 1983.
"""

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.costs import log2_ceil
from refimpl.core.numerics import constant
from refimpl.core.options import at_least_zero
from refimpl.laws import carries_nan
from refimpl.op import Cost, Form, Law, Op
from refimpl.ops.basics.normalised import hard_rows, normalised, normalised_bound, normalised_vjp

CONTRACT = Contract(
    "layer_norm",
    takes="x (..., c); weight (c); bias (c)",
    gives="y (..., c)",
    check=lambda arguments, sizes: at_least_zero("layer_norm", "eps", arguments.get("eps", 0.0)),
)


@CONTRACT.form
def layer_norm(x, weight=None, bias=None, *, eps=1e-5):
    """Layer norm over the last axis, equation (1).

    Parameters
    ----------
    x : ndarray, shape (..., c)
    weight, bias : ndarray, shape (c,), optional
    eps : float
        Added to the variance.

    Returns
    -------
    y : ndarray, shape (..., c)

    Raises
    ------
    ValueError, TypeError
        If a shape does not fit or eps is negative.

    Notes
    -----
    5 c operations per row, in two passes. The error is that of the mean over the deviation: a row far from 0 for its
    width has few digits to begin with.

    Examples
    --------
    >>> import numpy as np
    >>> layer_norm(np.array([[1.0, 3.0], [101.0, 103.0]]), eps=0.0)
    array([[-1.,  1.],
           [-1.,  1.]])
    """
    return _affine(normalised(x, eps)[0], weight, bias)


@CONTRACT.form
def layer_norm_welford(x, weight=None, bias=None, *, eps=1e-5):
    """The same with mean and variance in one pass, equation (2): one feature after the other.

    As stable as two passes, since it sums products of deviations; 3 c deep, or log c with blocks that are merged [3].
    """
    mean, square = np.zeros_like(x[..., :0].sum(axis=-1)), np.zeros_like(x[..., :0].sum(axis=-1))  # (...)
    for k in range(x.shape[-1]):
        away = x[..., k] - mean
        mean = mean + away / (k + 1)
        square = square + away * (x[..., k] - mean)
    variance = square / max(x.shape[-1], 1)
    y = (x - mean[..., None]) / np.sqrt(variance + constant(eps, x))[..., None]
    return _affine(y, weight, bias)


@CONTRACT.gradient
def layer_norm_vjp(dy, x, weight=None, bias=None, *, eps=1e-5):
    """Gradient of `layer_norm`. With n = (x - μ) r, r = 1/√(v + ε) and dn = dy · weight,

        dx = r (dn - mean dn - n mean(n dn)),    dweight = Σ dy n,    dbias = Σ dy

    Parameters
    ----------
    dy : ndarray, shape (..., c)
        Cotangent of y.

    Returns
    -------
    dict
        "x", and "weight" and "bias" where they were given.
    """
    n, r = normalised(x, eps)
    return {"x": normalised_vjp(dy if weight is None else dy * weight, n, r), "weight": dy * n, "bias": dy}


def error_bound(x, weight=None, bias=None, *, unit, store=0.0, eps=1e-5):
    """|computed - exact|, elementwise, of any form.

    That of the normalised vector (see `normalised_bound`), times the weight, and two roundings; half-precision kernels
    may round before they multiply.
    """
    n, off = normalised_bound(x, eps, unit, store)
    off = off + (2 * unit + store) * abs(n)
    n, off = (n, off) if weight is None else (n * weight, off * abs(weight))
    return off if bias is None else off + 2 * unit * (abs(bias) + abs(n)) + store * abs(n)


# -- what the forms share --------------------------------------------------------------------------------------------


def _affine(y, weight, bias):
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _sample(rng, *, c=9, batch=(7,)):
    return {
        "x": 2 * rng.standard_normal((*batch, c)) + 1,
        "weight": rng.standard_normal(c) + 1,
        "bias": rng.standard_normal(c) + 1,
    }


def _shifted(f, call, bound, rng):
    """A number added to a row changes nothing (an integer to integers, which is exact)."""
    whole = np.clip(np.rint(4 * call["x"].astype(np.float64)), -60, 60)
    one, two = (call | {"x": v.astype(call["x"].dtype)} for v in (whole, whole + 64))
    yield "y of rows plus 64", f(**two), f(**one), bound(**one) + bound(**two)


def _features_are_equals(f, call, bound, rng):
    order = rng.permutation(call["x"].shape[-1])
    moved = {n: v[..., order] if isinstance(v, np.ndarray) else v for n, v in call.items()}
    yield "y of the features in another order", f(**moved), f(**call)[..., order], 2 * bound(**call)[..., order]


def _moments(f, call, bound, rng):
    """Without weight, bias and ε, y has mean 0 and mean square 1."""
    call = {n: v for n, v in call.items() if n not in ("weight", "bias")} | {"eps": 0.0}
    if call["x"].shape[-1] > 1 and call["x"].size:
        y, off = f(**call).astype(np.float64), bound(**call).astype(np.float64)
        yield "mean of y", np.mean(y, axis=-1), np.zeros(y.shape[:-1]), np.mean(2 * off, axis=-1)
        yield "mean of y²", np.mean(y * y, axis=-1), np.ones(y.shape[:-1]), np.mean(3 * abs(y) * off + off * off, axis=-1)


def _cost(c, batch=1):
    return Cost((5 * c + 3) * batch, 2 * log2_ceil(c) + 8, (2 * c + 2) * batch)


OPS = (
    Op(
        name="layer_norm",
        summary="(x - mean x) / √(var x + ε) · weight + bias",
        contract=CONTRACT,
        forms={
            "two_pass": Form(layer_norm, _cost, exact=("work", "depth", "peak")),
            "welford": Form(
                layer_norm_welford, lambda c, batch=1: Cost((8 * c + 3) * batch, 3 * c + 7, (2 * c + 5) * batch), exact=("work", "depth")
            ),
        },
        gradient=layer_norm_vjp,
        sample=_sample,
        options={"eps": (1e-5, 0.25)},
        hard=hard_rows(_sample),
        error_bound=error_bound,
        references=("ba2016, equations 3-4", "welford1962", "chan1983"),
        lengths=(),
        sizes=({"c": 1}, {"c": 2}, {"c": 256}, {"batch": ()}, {"batch": (2, 3)}),
        laws=(
            carries_nan(CONTRACT, "x"),
            Law("shifted", _shifted, ("x",)),
            Law("features_are_equals", _features_are_equals, ("x", "weight", "bias")),
            Law("moments", _moments, ("x",)),
        ),
    ),
)
