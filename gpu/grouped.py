"""Products of groups of rows with a matrix of each group, by cuBLAS, where only the device knows how long a group is.

Rows are sorted by group and every group is filled up to whole blocks, all of one size; a block is one product of a batch, whose
pointers are computed on the device. There are at most rows / block + groups blocks, however rows are distributed: that many are run.
"""

import ctypes
from functools import cache
from typing import NamedTuple

import cupy as cp
import numpy as np
from refimpl.gpu.launch import Kernel

_OUTER = {x: Kernel("kernel_grouped_outer.cu", f"grouped_outer<{c}>") for x, c in (("float32", "float"), ("float64", "double"))}
_PLACES = Kernel("kernel_places.cu", "places")
KERNELS = (*_OUTER.values(), _PLACES)
_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}  # cudaDataType
_COMPUTE_32F, _COMPUTE_64F = 68, 70


class Groups(NamedTuple):
    """Rows sorted by group.

    Attributes
    ----------
    slot : ndarray of int, shape (rows,)
        Where each row stands; the last slot + 1, which holds nothing, for rows of no group.
    source : ndarray of int, shape (blocks * size,)
        Which row stands in each slot; -1 for none.
    of_block : ndarray of int, shape (blocks,)
        The group of each block.
    starts, counts : ndarray of int, shape (groups,)
        First slot and number of rows of each group.
    """

    slot: cp.ndarray
    source: cp.ndarray
    of_block: cp.ndarray
    starts: cp.ndarray
    counts: cp.ndarray

    @classmethod
    def of(cls, group: cp.ndarray, groups: int) -> "Groups":
        """From the group of each row, `groups` for none. Nothing goes to the host."""
        rows = len(group)
        size = 256 if rows >= 2048 * groups else 64 if rows >= 256 * groups else 16
        blocks = -(-rows // size) + groups
        place, counts = places(group[None], groups)
        place, counts = place[0], counts[0]
        filled = -(-counts // size)  # blocks of each group
        upto = cp.cumsum(filled)
        starts = (upto - filled) * size
        of_block = cp.minimum(cp.searchsorted(upto, cp.arange(blocks), side="right"), groups - 1)
        slot = cp.where(group < groups, starts[cp.minimum(group, groups - 1)] + place, blocks * size)
        source = cp.full(blocks * size + 1, -1, np.int64)
        source[slot] = cp.arange(rows)
        return cls(slot, source[:-1], of_block, starts.astype(np.int64), counts)

    def take(self, x: cp.ndarray) -> cp.ndarray:
        """The rows of x in their slots, zeros where there is none."""
        rows = cp.where((self.source >= 0)[:, None], x[cp.maximum(self.source, 0)], cp.zeros((), x.dtype))
        return rows.astype(x.dtype, copy=False)  # CuPy has no `where` of bfloat16, and widens

    def product(self, x: cp.ndarray, w: cp.ndarray, transposed: bool = False, dtype=None) -> cp.ndarray:
        """x[slot] @ w[group], or with w transposed; halves are summed in float32."""
        return _grouped_product(x, w, self.of_block, transposed, np.dtype(dtype or x.dtype))

    def outer(self, a: cp.ndarray, b: cp.ndarray) -> cp.ndarray:
        """aᵀ b of each group's rows, (groups, p, q)."""
        out = cp.empty((len(self.starts), a.shape[1], b.shape[1]), a.dtype)
        p, q = out.shape[1:]
        arguments = (a, b, self.starts, self.counts, out, np.int32(p), np.int32(q))
        _OUTER[a.dtype.name]((len(out), -(-p // 64), -(-q // 64)), (256,), arguments)
        return out


def places(group: cp.ndarray, groups: int) -> tuple[cp.ndarray, cp.ndarray]:
    """The number of each row in its group, and the length of each group: of (entries, rows) -> (entries, rows), (entries, groups)."""
    entries, rows = group.shape
    place, counts = cp.zeros(group.shape, np.int64), cp.zeros((entries, groups), np.int64)
    arguments = (cp.ascontiguousarray(group), place, counts, np.int64(rows), np.int32(groups))
    _PLACES((groups, entries), (256,), arguments)
    return place, counts


def _grouped_product(x, w, of_block, transposed, dtype):
    size, inner = len(x) // len(of_block), x.shape[1]
    if x.itemsize == 2 and (inner % 8 or w.shape[2] % 8 or w.shape[1] % 8):  # cuBLAS wants halves aligned
        return _grouped_product(x.astype(np.float32), w.astype(np.float32), of_block, transposed, np.dtype(np.float32)).astype(dtype)
    columns = w.shape[1] if transposed else w.shape[2]
    out = cp.empty((len(x), columns), dtype)
    if not out.size:
        return out
    steps = cp.arange(len(of_block))
    # in cuBLAS's order of columns the result's transpose: (w of the group)ᵀ (rows of the block)ᵀ
    pointers = (
        w.data.ptr + of_block * (w.shape[1] * w.shape[2] * w.itemsize),
        x.data.ptr + steps * (size * inner * x.itemsize),
        out.data.ptr + steps * (size * columns * out.itemsize),
    )
    pointers = [p.astype(np.uint64) for p in pointers]
    wide = x.dtype == np.float64
    one, zero = ((ctypes.c_double if wide else ctypes.c_float)(v) for v in (1, 0))
    status = cublas_function("cublasGemmBatchedEx")(
        cublas_handle(), int(transposed), 0, columns, size, inner, ctypes.byref(one),
        pointers[0].data.ptr, _TYPES[w.dtype.name], w.shape[2], pointers[1].data.ptr, _TYPES[x.dtype.name], inner, ctypes.byref(zero),
        pointers[2].data.ptr, _TYPES[out.dtype.name], columns, len(of_block), _COMPUTE_64F if wide else _COMPUTE_32F, -1,
    )  # fmt: skip
    if status:
        raise RuntimeError(f"cublasGemmBatchedEx: status {status} for {len(of_block)} products of {size} x {inner} and {inner} x {columns}")
    return out


def cublas_handle() -> ctypes.c_void_p:
    """CuPy's handle, on the current stream."""
    from cupy_backends.cuda.libs import cublas

    handle = cp.cuda.Device().cublas_handle
    cublas.setStream(handle, cp.cuda.get_current_stream().ptr)
    return ctypes.c_void_p(handle)


_POINTER, _INT, _MATRIX = ctypes.c_void_p, ctypes.c_int, (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
_STRIDED = (*_MATRIX, ctypes.c_longlong)
_ARGUMENTS = {
    "cublasGemmBatchedEx": (*_MATRIX, *_MATRIX, _POINTER, *_MATRIX, _INT, _INT, _INT),
    "cublasGemmStridedBatchedEx": (*_STRIDED, *_STRIDED, _POINTER, *_STRIDED, _INT, _INT, _INT),
}


@cache
def cublas_function(name: str):
    """A function of cuBLAS with matrices of mixed precision, which CuPy wraps not at all, or not with pointers."""
    with open("/proc/self/maps", encoding="utf-8") as maps:  # the library that CuPy has loaded, wherever it lies
        path = next(line.split()[-1] for line in maps if "libcublas.so" in line)
    function = getattr(ctypes.CDLL(path), name)
    function.argtypes = [_POINTER, _INT, _INT, _INT, _INT, _INT, _POINTER, *_ARGUMENTS[name]]
    function.restype = _INT
    return function
