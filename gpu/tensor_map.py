"""Descriptions of arrays for Hopper's bulk tensor copy engine, as its kernels take them by value."""

import ctypes
import functools
import sys

import numpy as np

TENSOR_MAP = np.dtype((np.void, 128))
_TYPES = {"float16": 6, "float32": 7, "bfloat16": 9}  # CUtensorMapDataType
_SWIZZLE_128, _L2_256 = 3, 3  # CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B


def fits(x) -> bool:
    """Whether the engine can read a 4-d array as it lies: neighbours along the last axis, all else in steps of 16 bytes (not 0)."""
    steps = [s for s, n in zip(x.strides[:-1], x.shape[:-1], strict=True) if n > 1]
    return x.size > 0 and x.strides[-1] == x.itemsize and x.data.ptr % 16 == 0 and all(s > 0 and s % 16 == 0 for s in steps)


def panels(x, rows: int) -> np.ndarray:
    """The map that takes boxes of `rows` x 128 bytes, swizzled, from a 4-d array (batch, head, row, column).

    Raises
    ------
    RuntimeError
        If the driver refuses.
    """
    sizes = x.shape[::-1]
    strides = [s if n > 1 else 16 for n, s in zip(sizes[1:], x.strides[-2::-1], strict=True)]
    space = ctypes.create_string_buffer(192)
    address = -(-ctypes.addressof(space) // 64) * 64  # the driver writes to a multiple of 64
    many, few = ctypes.c_uint64 * 4, ctypes.c_uint32 * 4
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(address), _TYPES[x.dtype.name], 4, ctypes.c_void_p(x.data.ptr), many(*sizes), (ctypes.c_uint64 * 3)(*strides),
        few(128 // x.itemsize, rows, 1, 1), few(1, 1, 1, 1), 0, _SWIZZLE_128, _L2_256, 0,
    )  # fmt: skip
    if status != 0:
        raise RuntimeError(f"the driver makes no tensor map (error {status}) of an array of shape {x.shape}, strides {x.strides}")
    return np.frombuffer(ctypes.string_at(address, 128), TENSOR_MAP).copy()


@functools.cache
def _driver():
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
