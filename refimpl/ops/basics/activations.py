"""Activations: softplus, silu, gelu.

    softplus(x) = log(1 + e^x)                                                                                   (1)
    silu(x)     = x σ(x),    σ(x) = 1 / (1 + e^-x)                                                               (2)
    gelu(x)     = x Φ(x),    Φ the normal distribution function, or its approximation                            (3)
                  x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))    = x σ(2 √(2/π) (x + 0.044715 x³))                  (4)

Elementwise, and easy to get wrong at the ends: e^x overflows, 1 + e^x loses e^x, and Φ as (1 + erf)/2 has no digit left
below x = -6. The formulas used here have full relative accuracy in both tails.

Glossary
    x           input
    Φ, φ        normal distribution function and density      [2, section 2]
    approximate "none" for (3), "tanh" for (4)

Where implementations differ
    gelu is (3) in torch's default and (4) in GPT-2's, Gemma's and JAX's; they differ by up to 5e-4. torch's softplus
    returns x above 20. torch's gelu is (1 + erf)/2: its error is relative to x, not to the result, and allowed here.

References
    [1] S. Elfwing, E. Uchibe, K. Doya, "Sigmoid-weighted linear units", Neural Networks 107, 2018, section 2.
    [2] D. Hendrycks, K. Gimpel, "Gaussian error linear units", arXiv:1606.08415, section 2.
    [3] C. Dugas et al., "Incorporating second-order functional knowledge", NeurIPS 2000: softplus.
"""

import numpy as np

from refimpl.core import numerics
from refimpl.core.contract import Contract
from refimpl.core.numerics import pi_of, sigmoid, silu_derivative
from refimpl.core.options import one_of
from refimpl.laws import carries_nan
from refimpl.op import Cost, Form, Law, Op

_GELUS = ("none", "tanh")

SOFTPLUS = Contract("softplus", takes="x (...)", gives="y (...)")
SILU = Contract("silu", takes="x (...)", gives="y (...)")
GELU = Contract(
    "gelu",
    takes="x (...)",
    gives="y (...)",
    check=lambda arguments, sizes: one_of("gelu", "approximate", arguments.get("approximate", "none"), _GELUS),
)


# -- softplus --------------------------------------------------------------------------------------------------------


@SOFTPLUS.form
def softplus(x):
    """log(1 + e^x), equation (1), as max(x, 0) + log(1 + e^-|x|).

    Parameters
    ----------
    x : ndarray, any shape

    Returns
    -------
    y : ndarray

    Raises
    ------
    TypeError
        If x is not numeric.

    Notes
    -----
    Four operations. e^x to the left, x + e^-x to the right, with full relative accuracy; no threshold.

    Examples
    --------
    >>> import numpy as np
    >>> softplus(np.array([-40.0, 0.0, 40.0]))
    array([4.24835426e-18, 6.93147181e-01, 4.00000000e+01])
    """
    return numerics.softplus(x)


@SOFTPLUS.form
def softplus_by_logaddexp(x):
    """The same as log(e^0 + e^x), the two-term log-sum-exp: it subtracts the larger of the exponents, 0 or x, first."""
    return np.logaddexp(np.zeros_like(x), x)


@SOFTPLUS.gradient
def softplus_vjp(dy, x):
    """Gradient of `softplus`: dy σ(x).

    Parameters
    ----------
    dy : ndarray, x's shape

    Returns
    -------
    dict
        "x".
    """
    return {"x": dy * sigmoid(x)}


def softplus_bound(x, *, unit, store=0.0):
    """|computed - exact|: 8 roundings of y, and 2 |x| more of its slope for a fast exponential.

    Relative to y in both tails. Half-precision code that is written out, log1p(e^-|x|) + max(x, 0), rounds two factors.
    """
    return unit * (8 * softplus(x) + 2 * abs(x) * sigmoid(-abs(x))) + 2 * store * softplus(x)


# -- silu ------------------------------------------------------------------------------------------------------------


@SILU.form
def silu(x):
    """x σ(x), equation (2); also called swish.

    Parameters
    ----------
    x : ndarray, any shape

    Returns
    -------
    y : ndarray

    Raises
    ------
    TypeError
        If x is not numeric.

    Notes
    -----
    Two operations. Its least value is -0.278, at x = -1.278. ``error_bound`` is relative to x, since σ is often computed by
    tanh; the function here keeps its digits in the left tail too.

    Examples
    --------
    >>> import numpy as np
    >>> silu(np.array([-1.0, 0.0, 1.0])).round(4)
    array([-0.2689,  0.    ,  0.7311])
    """
    return numerics.silu(x)


@SILU.gradient
def silu_vjp(dy, x):
    """Gradient of `silu`: dy σ(x) (1 + x σ(-x)).

    Parameters
    ----------
    dy : ndarray, x's shape

    Returns
    -------
    dict
        "x".
    """
    return {"x": dy * silu_derivative(x)}


def silu_bound(x, *, unit, store=0.0):
    """|computed - exact|: 8 roundings of y, and those of a fast exponential, 2 |x| times what its slope makes of them.

    And two of x: where a device has a tanh, σ(x) = (1 + tanh(x/2))/2 is how it is computed, which is off by a rounding of
    1 in the left tail. Half-precision code that is written out rounds every step of σ too.
    """
    return unit * ((8 + 2 * abs(x) * sigmoid(-x)) * abs(numerics.silu(x)) + 2 * abs(x)) + numerics.silu_rounding(x, store)


# -- gelu ------------------------------------------------------------------------------------------------------------


@GELU.form
def gelu(x, *, approximate="none"):
    """x Φ(x), equation (3), or its approximation (4).

    Parameters
    ----------
    x : ndarray, any shape
    approximate : {"none", "tanh"}

    Returns
    -------
    y : ndarray

    Raises
    ------
    ValueError, TypeError
        If x is not numeric or approximate is neither.

    Notes
    -----
    Its least value is -0.17, at x = -0.75. ``error_bound`` is relative to x, since (1 + erf)/2 is how it is computed
    nearly everywhere; the function here keeps its digits in the left tail too.

    Examples
    --------
    >>> import numpy as np
    >>> gelu(np.array([-3.0, 1.0]))
    array([-0.00404969,  0.84134475])
    >>> gelu(np.array([-3.0, 1.0]), approximate="tanh")
    array([-0.00363739,  0.84119199])
    """
    return numerics.gelu(x) if approximate == "none" else x * sigmoid(2 * _inner(x)[0])


@GELU.gradient
def gelu_vjp(dy, x, *, approximate="none"):
    """Gradient of `gelu`: dy (Φ(x) + x φ(x)); of (4), with z its argument of tanh, dy σ(2z) (1 + 2 x z' σ(-2z)).

    Parameters
    ----------
    dy : ndarray, x's shape

    Returns
    -------
    dict
        "x".
    """
    return {"x": dy * _slope(x, approximate)}


def gelu_bound(x, *, unit, store=0.0, approximate="none"):
    """|computed - exact|: 6 roundings of x.

    (1 + erf)/2 and (1 + tanh)/2 are right to a rounding or two of 1, and multiply x; the error of tanh's argument, some
    roundings of z, is multiplied by x z (1 - tanh² z), at most 0.45 x. Half-precision code that is written out rounds erf,
    half of x away from the result, and two factors.
    """
    return 6 * unit * abs(x) + store * (abs(x) / 2 + 2 * abs(gelu(x, approximate=approximate)))


def _inner(x):
    """z = √(2/π) (x + 0.044715 x³) of (4), and z'."""
    root = np.sqrt(2 / pi_of(x))
    return root * (x + x * x * x * 44715 / 1000000), root * (1 + x * x * 134145 / 1000000)


def _slope(x, approximate):
    if approximate == "none":
        return numerics.gelu_derivative(x)
    z, slope = _inner(x)
    return sigmoid(2 * z) * (1 + 2 * x * slope * sigmoid(-2 * z))


# -- the records -----------------------------------------------------------------------------------------------------


def _one(rng, *, c=33, batch=(7,)):
    return {"x": 3 * rng.standard_normal((*batch, c))}


def _hard(sample, name):
    def draws(change):
        def draw(rng, **sizes):
            call = sample(rng, **sizes)
            return call | {name: change(rng, call[name])}

        return draw

    return {
        "zero": draws(lambda rng, x: 0 * x),
        "large": draws(lambda rng, x: 100 * x + 1000 * np.sign(x)),  # between e^-88 and e^-745, σ underflows where x σ does not
        "far to the left": draws(lambda rng, x: -abs(x) - 5),
        "far to the right": draws(lambda rng, x: abs(x) + 20),
        "tiny": draws(lambda rng, x: x * 2.0**-40),
    }


def _difference_is_x(f, call, bound, rng):
    """softplus(x) - softplus(-x) = x."""
    there, back = (call | {"x": v} for v in (call["x"], -call["x"]))
    got = f(**there).astype(np.float64) - f(**back).astype(np.float64)
    yield "softplus(x) - softplus(-x)", got, call["x"].astype(np.float64), bound(**there) + bound(**back)


def _sum_is_x(f, call, bound, rng):
    """f(x) + f(-x) = x (σ(x) - σ(-x)); and f(x) - f(-x) = x, since the two weights of x make 1."""
    there, back = (call | {"x": v} for v in (call["x"], -call["x"]))
    got = f(**there).astype(np.float64) - f(**back).astype(np.float64)
    yield "f(x) - f(-x)", got, call["x"].astype(np.float64), bound(**there) + bound(**back)


def _cost(each, depth=0, alive=2):
    return lambda c=1, batch=1: Cost(each * c * batch, depth or each, alive * c * batch)


_ALL = ("work", "depth", "peak")
_SIZES = ({"c": 1}, {"c": 256}, {"batch": ()}, {"batch": (2, 3)})

OPS = (
    Op(
        name="softplus",
        summary="log(1 + e^x)",
        contract=SOFTPLUS,
        forms={
            "definition": Form(softplus, _cost(4, depth=3, alive=3), exact=_ALL),
            "logaddexp": Form(softplus_by_logaddexp, _cost(1), exact=_ALL),
        },
        gradient=softplus_vjp,
        sample=_one,
        hard=_hard(_one, "x"),
        error_bound=softplus_bound,
        references=("dugas2000",),
        lengths=(),
        sizes=_SIZES,
        laws=(Law("difference_is_x", _difference_is_x, ("x",)), carries_nan(SOFTPLUS, "x")),
    ),
    Op(
        name="silu",
        summary="x σ(x)",
        contract=SILU,
        forms={"definition": Form(silu, _cost(2), exact=_ALL)},
        gradient=silu_vjp,
        sample=_one,
        hard=_hard(_one, "x"),
        error_bound=silu_bound,
        references=("elfwing2018, section 2",),
        lengths=(),
        sizes=_SIZES,
        laws=(Law("sum_is_x", _sum_is_x, ("x",)), carries_nan(SILU, "x")),
    ),
    Op(
        name="gelu",
        summary="x Φ(x), or its approximation with tanh",
        contract=GELU,
        forms={"definition": Form(gelu, _cost(2), exact=_ALL)},
        gradient=gelu_vjp,
        sample=_one,
        options={"approximate": _GELUS},
        hard=_hard(_one, "x"),
        error_bound=gelu_bound,
        references=("hendrycks2016, section 2",),
        lengths=(),
        sizes=_SIZES,
        laws=(Law("sum_is_x", _sum_is_x, ("x",)), carries_nan(GELU, "x")),
    ),
)
