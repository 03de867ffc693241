"""Feature maps of linear attention: φ, its adjoint, and how far a right φ may be off.

    elu+1     φ(x) = x + 1 for x > 0, e^x for x <= 0                                                    (1)
    relu      φ(x) = max(x, 0)                                                                          (2)
    taylor    φ(x) = (1, x', x'⊗x'/√2),  x' = x d^(-1/4):  φ(q)·φ(k) = 1 + s + s²/2,  s = q·k/√d         (3)

(1) is positive everywhere, so that a normaliser never vanishes [1, equation 7]. (3) is the second-order Taylor polynomial
of e^s, the weight of softmax attention, and never below 1/2 [2, section 3.1]; it makes d features 1 + d + d².

References
    [1] A. Katharopoulos, A. Vyas, N. Pappas and F. Fleuret, "Transformers are RNNs", ICML 2020, section 3.2.
    [2] S. Arora, S. Eyuboglu, M. Zhang, A. Timalsina, S. Alberti, D. Zinsley, J. Zou, A. Rudra and C. Ré, "Simple linear
        attention language models balance the recall-throughput tradeoff", ICML 2024, section 3.1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.core.numerics import sqrt_of

__all__ = ["FeatureMap"]


@dataclass(frozen=True)
class FeatureMap:
    """A map of features (..., d) -> (..., m) with its adjoint, for the option `feature_map`.

    Attributes
    ----------
    function : callable
        ``function(x) -> φ(x)``, shape (..., d) -> (..., m), in the precision of x; the same for every row.
    vjp : callable
        ``vjp(dphi, x) -> dx``: φ'(x)ᵀ dphi.
    error : callable, optional
        ``error(x, unit)``: |computed φ(x) - exact|, elementwise; by default 4 unit |φ(x)|.

    Examples
    --------
    >>> import numpy as np
    >>> square = FeatureMap(lambda x: x * x, lambda dphi, x: 2 * x * dphi)
    >>> square(np.array([3.0]))
    array([9.])
    """

    function: Callable[[Any], Any]
    vjp: Callable[[Any, Any], Any]
    error: Callable[[Any, float], Any] | None = None

    def __call__(self, x):
        return self.function(x)


def _elu_plus_1(x):
    return np.maximum(x, 0) + np.exp(np.minimum(x, 0))


def _taylor(x):
    x = x / _fourth_root(x)
    pairs = x[..., :, None] * x[..., None, :] / sqrt_of(2, x)  # (..., d, d)
    return np.concatenate([np.ones_like(x[..., :1]), x, pairs.reshape(*x.shape[:-1], x.shape[-1] ** 2)], axis=-1)


def _taylor_vjp(dphi, x):
    d, root = x.shape[-1], _fourth_root(x)
    dpairs = dphi[..., d + 1 :].reshape(*dphi.shape[:-1], d, d)  # (..., d, d)
    through_pairs = ((dpairs + np.swapaxes(dpairs, -1, -2)) * (x / root)[..., None, :]).sum(axis=-1)
    return (dphi[..., 1 : d + 1] + through_pairs / sqrt_of(2, x)) / root


def _fourth_root(x):
    """d^(1/4)"""
    return sqrt_of(sqrt_of(x.shape[-1], x), x)


MAPS = {
    # elu(x) + 1 as it is usually written rounds to a multiple of the unit: an absolute error
    "elu+1": FeatureMap(_elu_plus_1, lambda dphi, x: dphi * np.exp(np.minimum(x, 0)), lambda x, unit: 2 * unit * (1 + _elu_plus_1(x))),
    "relu": FeatureMap(
        lambda x: np.maximum(x, 0), lambda dphi, x: np.where(x > 0, dphi, np.zeros_like(dphi)), lambda x, unit: np.zeros_like(x)
    ),
    "taylor": FeatureMap(_taylor, _taylor_vjp, lambda x, unit: 8 * unit * abs(_taylor(x))),
}


def feature_map_of(option):
    """The map that an option names, or is; None for None."""
    return MAPS[option] if isinstance(option, str) else option


def width(option, x):
    """How many features a map makes of those of x."""
    phi = feature_map_of(option)
    return x.shape[-1] if phi is None else np.shape(phi(x[..., :0, :]))[-1]


def map_error(option, x, unit):
    """|computed φ(x) - exact|, elementwise."""
    phi = feature_map_of(option)
    if phi is None:
        return np.zeros_like(x)
    error = getattr(phi, "error", None)
    return 4 * unit * abs(phi(x)) if error is None else error(x, unit)
