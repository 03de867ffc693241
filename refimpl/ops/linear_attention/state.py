"""The state of normalised linear attention."""

from typing import NamedTuple

import numpy as np


class State(NamedTuple):
    """Memory and normaliser between two steps; without `normalize` the state is S alone.

    Attributes
    ----------
    S : ndarray, shape (..., Hkv, m, e)
    z : ndarray, shape (..., Hkv, m)
    """

    S: np.ndarray
    z: np.ndarray
