"""Arrays as kernels take them: one batch axis, strides in numbers, a C++ type."""

import math

import cupy as cp
import numpy as np

TYPES = {
    "float32": "float",
    "float64": "double",
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "complex64": "Complex<float>",
    "complex128": "Complex<double>",
}


def cpp(dtype) -> str:
    """The type of `numbers.cuh` that stores a dtype."""
    return TYPES[np.dtype(dtype).name]


def arithmetic(dtype) -> np.dtype:
    """In what a dtype is computed: float32 for the halves, itself otherwise."""
    dtype = np.dtype(dtype)
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def cast(x, dtype):
    """An array in a dtype: itself, if it has that already (CuPy's astype copies bfloat16 to bfloat16)."""
    return x if x.dtype == dtype else x.astype(dtype)


def flat(x, batch: tuple[int, ...], axes: int):
    """(..., axes) -> (N, axes), N the number of batch elements: a view, of stride 0 where all share one, or a copy."""
    own, count = x.shape[x.ndim - axes :], math.prod(batch)
    if all(size == 1 for size in x.shape[: x.ndim - axes]):
        return cp.broadcast_to(x.reshape(own), (count, *own))
    return cp.broadcast_to(x, (*batch, *own)).reshape(count, *own)


def strides(x) -> tuple[np.int64, ...]:
    """An array's strides in numbers."""
    return tuple(np.int64(s // x.dtype.itemsize) for s in x.strides)


def aligned(x, axis: int, width: int) -> bool:
    """Whether `width` neighbours along an axis are one access: contiguous there, and every such group starts at a multiple of its size."""
    size = x.dtype.itemsize
    if x.shape[axis] % width or x.data.ptr % (width * size):
        return False
    others = (s for i, (s, n) in enumerate(zip(x.strides, x.shape, strict=True)) if i != axis % x.ndim and n > 1)
    return (x.strides[axis] == size or x.shape[axis] == 1 == width) and all(s % (width * size) == 0 for s in others)


def or_null(x):
    """An array as a kernel takes it; a null pointer for none."""
    return np.uint64(0) if x is None else x
