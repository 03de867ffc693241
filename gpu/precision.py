"""Halves in float32."""

import cupy as cp

from refimpl.core.dtypes import HALF


def widened(*arrays):
    """Arrays of half precision in float32, others as they are; None stays None."""
    return tuple(x if x is None or x.dtype.name not in HALF else x.astype(cp.float32) for x in arrays)
