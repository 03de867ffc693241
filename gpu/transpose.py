"""Time first or channels first: layouts exchanged in one pass over the data, half precisions widened or narrowed on the way."""

import cupy as cp
import numpy as np
from refimpl.gpu.launch import Kernel

_C = {"float32": "float", "float64": "double", "float16": "__half", "bfloat16": "__nv_bfloat16"}
_PAIRS = [("float32", "float32"), ("float64", "float64"), *((h, "float32") for h in ("float16", "bfloat16"))]
_PAIRS += [(b, a) for a, b in _PAIRS if a != b]
INSTANCES = {pair: Kernel("kernel_transpose.cu", f"transpose<{_C[pair[0]]}, {_C[pair[1]]}>") for pair in _PAIRS}


def transposed(x: cp.ndarray, dtype) -> cp.ndarray:
    """The last two axes exchanged, in new memory of another precision: (..., r, c) -> (..., c, r), contiguous."""
    *batch, rows, columns = x.shape
    out = cp.empty((*batch, columns, rows), dtype)
    if not x.size:
        return out
    x = x.reshape(-1, rows, columns)
    if (x.strides[2] != x.itemsize and columns > 1) or min(x.strides) < 0:
        x = cp.ascontiguousarray(x)
    count, size = len(x), x.itemsize
    kernel = INSTANCES[x.dtype.name, np.dtype(dtype).name]
    grid = (-(-rows // 64), min(-(-columns // 64) * count, 65535))
    steps = (np.int64(v) for v in (count, rows, columns, x.strides[0] // size, x.strides[1] // size))
    kernel(grid, (256,), (x, out, *steps))
    return out
