"""Products of groups of rows with a matrix of each group, where only the device knows how long a group is.

Rows get slots: sorted by group, every group filled up to whole blocks, all of one size. There are at most rows / size + groups
blocks, however rows are distributed. Halves on Hopper go to a kernel of our own that finds its tiles on the device; everything
else is a batch of cuBLAS, one product a block, whose pointers are computed on the device.
"""

import ctypes
from functools import cache
from typing import NamedTuple

import cupy as cp
import numpy as np
from refimpl.gpu import tensor_map
from refimpl.gpu.arrays import TYPES as STORED
from refimpl.gpu.arrays import cast
from refimpl.gpu.launch import Kernel, capability, multiprocessors

ACTIVATIONS = ("silu", "gelu", "relu")
_NOTHING = np.uint64(0)

# -- kernels -----------------------------------------------------------------------------------------------------------------------

_HALVES = ("float16", "bfloat16")
_WIDTHS = {"float32": 4, "float64": 2, "float16": 8, "bfloat16": 8}  # numbers of an access of 16 bytes
_PLACES = Kernel("kernel_places.cu", "places")
_PLAN, _STAND = (Kernel("kernel_experts.cu", name) for name in ("plan", "stand"))
_OUTER_TILE = {"float32": 128, "float64": 64}
_OUTER = {x: Kernel("kernel_grouped_outer.cu", f"grouped_outer<{STORED[x]}, {tile // 16}>") for x, tile in _OUTER_TILE.items()}


def _rowwise(name: str, width: int, *dtypes: str) -> Kernel:
    """A kernel of rows, by accesses of so many numbers."""
    return Kernel("kernel_experts.cu", f"{name}<{', '.join(STORED[x] for x in dtypes)}, {width}>")


def _hopper(dtype: str, form: str, activation: str, shared: str) -> Kernel:
    name = f"grouped_product<{dtype}, {form}, {activation}, {shared}>"
    return Kernel("kernel_grouped_hopper.cu", name, hopper=True)


_FORMS = (
    *((form, activation) for form in ("GATED", "PLAIN") for activation in ("SILU", "RELU")),
    *((form, "NONE") for form in ("PLAIN", "TRANSPOSED", "OUTER")),
)
SHARED = {256: "WEIGHTS", 128: "ROWS"}  # what a pair of blocks shares, by the size of blocks of slots
KERNELS = (
    *(_PLACES, _PLAN, _STAND, *_OUTER.values()),
    *(_rowwise(name, v, x) for name in ("gather_rows", "activate", "activate_backwards") for x in _WIDTHS for v in (1, _WIDTHS[x])),
    *(_rowwise("combine_rows", v, x, x) for x in _WIDTHS for v in (1, _WIDTHS[x])),
    *(_rowwise("combine_rows", v, x, "float32") for x in _HALVES for v in (1, 8)),
    *(_hopper(dtype, *form, shared) for dtype in _HALVES for form in _FORMS for shared in SHARED.values()),
)


# -- who goes where ------------------------------------------------------------------------------------------------------------------


def places(group: cp.ndarray, groups: int) -> tuple[cp.ndarray, cp.ndarray]:
    """The number of each row in its group, and the length of each group: of (entries, rows) -> (entries, rows), (entries, groups)."""
    entries, rows = group.shape
    place, counts = cp.empty(group.shape, np.int64), cp.empty((entries, groups), np.int64)
    arguments = (cp.ascontiguousarray(group), place, counts, np.int64(rows), np.int32(groups))
    _PLACES((groups, entries), (1024,), arguments)
    return place, counts


class Groups(NamedTuple):
    """Pairs of a token and a group, sorted by group.

    Attributes
    ----------
    slot : ndarray of int, shape (tokens * k,)
        Where each pair stands; -1 for dropped ones.
    pair_of : ndarray of int, shape (blocks * size,)
        Which pair stands in each slot; -1 for none.
    of_block : ndarray of int, shape (blocks,)
        The group of each block.
    starts, counts : ndarray of int, shape (groups,)
        First slot and number of pairs of each group.
    k, size : int
        Groups of each token; slots of a block.
    tensor_cores : bool
        Whether products are Hopper's.
    """

    slot: cp.ndarray
    pair_of: cp.ndarray
    of_block: cp.ndarray
    starts: cp.ndarray
    counts: cp.ndarray
    k: int
    size: int
    tensor_cores: bool

    @classmethod
    def of(cls, choice: cp.ndarray, groups: int, capacity: int | None = None, tensor_cores: bool = False) -> "tuple[Groups, cp.ndarray]":
        """From the groups of each token, (entries, T, k), of which each takes `capacity` pairs of an entry; nothing goes to the host.

        Also how many pairs of an entry each group takes, (entries, groups).
        """
        entries, T, k = choice.shape
        pairs = choice.size
        if tensor_cores:
            size = 256 if pairs >= 2048 * groups else 128
        else:
            size = 256 if pairs >= 2048 * groups else 64 if pairs >= 256 * groups else 16
        blocks, most = -(-pairs // size) + groups, np.int64(pairs if capacity is None else min(capacity, pairs))
        place, counts = places(choice.reshape(entries, T * k), groups)
        before, (totals, starts), of_block = cp.empty_like(counts), cp.empty((2, groups), np.int64), cp.empty(blocks, np.int64)
        sizes = (most, np.int64(entries), np.int32(groups), np.int32(size), np.int32(blocks))
        _PLAN((1,), (256,), (counts, before, totals, starts, of_block, *sizes))
        slot, pair_of = cp.empty(pairs, np.int64), cp.full(blocks * size, -1, np.int64)
        sizes = (most, np.int64(pairs), np.int64(T * k), np.int32(groups))
        _STAND((-(-pairs // 256),), (256,), (choice, place, before, starts, slot, pair_of, *sizes))
        return cls(slot, pair_of, of_block, starts, totals, k, size, tensor_cores), counts

    # -- rows there and back --

    def take(self, x: cp.ndarray) -> cp.ndarray:
        """The rows of x (tokens, d) in their slots, zeros where there is none."""
        rows = cp.empty((len(self.pair_of), x.shape[1]), x.dtype)
        arguments = (x, self.pair_of, rows, np.int32(self.k), np.int32(x.shape[1]))
        _rowwise("gather_rows", _width(x), x.dtype.name)((len(rows),), (128,), arguments)
        return rows

    def back(self, rows: cp.ndarray, weights: cp.ndarray | None = None, dtype=None) -> cp.ndarray:
        """The sum over each token's pairs, in their order, of weight times row: (tokens, d)."""
        y = cp.empty((len(self.slot) // self.k, rows.shape[1]), dtype or rows.dtype)
        kernel = _rowwise("combine_rows", _width(rows), rows.dtype.name, y.dtype.name)
        arguments = (rows, self.slot, _NOTHING if weights is None else weights, y, np.int32(self.k), np.int32(rows.shape[1]))
        kernel((len(y),), (128,), arguments)
        return y

    # -- products --

    def hidden(self, rows: cp.ndarray, w_in: cp.ndarray, w_gate: cp.ndarray | None, activation: str) -> cp.ndarray:
        """act(rows w_gate) * (rows w_in), or act(rows w_in), each with its group's matrices."""
        if self.tensor_cores and activation != "gelu":  # erfc takes more registers than there are beside the sums
            form, *more = ("PLAIN", w_in) if w_gate is None else ("GATED", w_in, w_gate)
            return self._hopper(form, (rows,), more, w_in.shape[2], activation)
        a = self.product(rows, w_in)
        g = _NOTHING if w_gate is None else self.product(rows, w_gate)
        sizes = (np.int32(ACTIVATIONS.index(activation)), np.int32(a.shape[1]))
        _rowwise("activate", _width(a), a.dtype.name)((len(a),), (256,), (a, g, a, self.pair_of, *sizes))
        return a

    def product(self, rows: cp.ndarray, w: cp.ndarray) -> cp.ndarray:
        """rows @ w[group]; halves are summed in float32."""
        if self.tensor_cores:
            return self._hopper("PLAIN", (rows,), (w,), w.shape[2])
        return _batched(rows, w, self.of_block, False)

    def product_transposed(self, *factors: cp.ndarray) -> cp.ndarray:
        """rows @ w[group].T for rows, w; or the sum of several such products, for rows, w, rows, w."""
        rows, w = factors[::2], factors[1::2]
        if self.tensor_cores:
            return self._hopper("TRANSPOSED", rows, w, w[0].shape[1])
        total = _batched(rows[0], w[0], self.of_block, True)
        for r, m in zip(rows[1:], w[1:], strict=True):
            total = _batched(r, m, self.of_block, True, total)
        return total

    def outer(self, a: cp.ndarray, b: cp.ndarray) -> cp.ndarray:
        """aᵀ b of each group's rows, (groups, p, q)."""
        if self.tensor_cores:
            return self._hopper("OUTER", (a,), (b,), b.shape[1])
        out = cp.empty((len(self.starts), a.shape[1], b.shape[1]), a.dtype)
        p, q = out.shape[1:]
        tile, arguments = _OUTER_TILE[a.dtype.name], (a, b, self.starts, self.counts, out, np.int32(p), np.int32(q))
        _OUTER[a.dtype.name]((len(out) * -(-p // tile), -(-q // tile)), (256,), arguments)
        return out

    def _hopper(self, form, rows, w, columns, activation="none", shared=None, band=2048):
        """kernel_grouped_hopper.cu; `band`: rows of a group taken up together."""
        outer, groups = form == "OUTER", len(self.counts)
        out = cp.empty((groups, rows[0].shape[1], columns) if outer else (len(rows[0]), columns), rows[0].dtype)
        maps = [tensor_map.panels(x[None, None], 64) for x in rows]
        maps_w = [tensor_map.panels(x[None, None] if outer else x[None], 64) for x in w]
        shared = shared or SHARED[self.size]
        unit = 256 if shared == "WEIGHTS" else 128
        sizes = (groups, self.size, rows[0].shape[1] if outer else 0, columns, rows[0].shape[1], len(rows), max(1, band // unit))
        raw = np.frombuffer(np.array(sizes, np.int32).tobytes(), np.dtype((np.void, 28))).copy()
        kernel = _hopper(out.dtype.name, form, activation.upper(), shared)
        kernel(
            (multiprocessors() // 2 * 2,), (384,), (raw, maps[0], maps[-1], maps_w[0], maps_w[-1], self.counts, out),
            4 * 6 * 64 * 128 + 1024 + 128,
        )  # fmt: skip
        return out

    def activate_backwards(self, a, g, dh, weights, activation: str) -> cp.ndarray:
        """Gradients of a and g in their places, weight times h in dh's place; the gradient of the weights, (tokens, k).

        `dh` is the cotangent of h as if all weights were 1.
        """
        dweights = cp.zeros(len(self.slot), weights.dtype)
        sizes = (np.int32(ACTIVATIONS.index(activation)), np.int32(a.shape[1]))
        arguments = (a, _NOTHING if g is None else g, dh, self.pair_of, weights, dweights, *sizes)
        _rowwise("activate_backwards", _width(a), a.dtype.name)((len(a),), (256,), arguments)
        return dweights.reshape(-1, self.k)


def tensor_cores_fit(x: cp.ndarray, w_in: cp.ndarray) -> bool:
    """Whether Hopper's kernel takes such rows and matrices: halves, both sizes multiples of 8."""
    d, f = w_in.shape[1:]
    return x.dtype.name in _HALVES and d % 8 == 0 == f % 8 and min(d, f) > 0 and capability() == "90"


def packed(x: cp.ndarray | None) -> cp.ndarray | None:
    """Contiguous, from an address that is a multiple of 16 bytes: itself or a copy."""
    if x is None:
        return None
    x = cp.ascontiguousarray(x)
    return x if _address(x) % 16 == 0 else x.copy()


def _width(x: cp.ndarray) -> int:
    width = _WIDTHS[x.dtype.name]
    return width if x.shape[-1] % width == 0 else 1


# -- cuBLAS ------------------------------------------------------------------------------------------------------------------------

_CUDA_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}  # cudaDataType
_COMPUTE_32F, _COMPUTE_64F = 68, 70


def product_of_halves(a: cp.ndarray, b: cp.ndarray) -> cp.ndarray:
    """a (m, n) @ b (n, p) in float32: products of halves are exact there, and nothing is copied first."""
    (m, n), p = a.shape, b.shape[1]
    if n % 8 or p % 8 or not m:  # cuBLAS wants halves aligned
        a, b = a.astype(np.float32), b.astype(np.float32)
        return a @ b if n else cp.zeros((m, p), np.float32)
    out = cp.empty((m, p), np.float32)
    kind, (one, zero) = _CUDA_TYPES[a.dtype.name], (ctypes.c_float(v) for v in (1, 0))
    status = cublas_function("cublasGemmStridedBatchedEx")(
        cublas_handle(), 0, 0, p, m, n, ctypes.byref(one), _address(b), kind, p, 0, _address(a), kind, n, 0, ctypes.byref(zero),
        _address(out), _CUDA_TYPES["float32"], p, 0, 1, _COMPUTE_32F, -1,
    )  # fmt: skip
    if status:
        raise RuntimeError(f"cublasGemmStridedBatchedEx: status {status} for a product of {m} x {n} and {n} x {p}")
    return out


def _batched(x, w, of_block, transposed, total=None):
    """x[block] @ w[group of the block], or with w transposed; added to `total`, if there is one, in its place."""
    dtype, size, inner = x.dtype, len(x) // len(of_block), x.shape[1]
    if x.itemsize == 2 and (inner % 8 or w.shape[2] % 8 or w.shape[1] % 8):  # cuBLAS wants halves aligned
        wide = (cast(v, np.dtype(np.float32)) for v in (x, w))
        y = _batched(*wide, of_block, transposed)
        return (y if total is None else y + total).astype(dtype)
    columns = w.shape[1] if transposed else w.shape[2]
    out = cp.empty((len(x), columns), dtype) if total is None else total
    if not out.size:
        return out
    if not inner:
        out[...] = 0
        return out
    steps = cp.arange(len(of_block))
    # in cuBLAS's order of columns the result's transpose: (w of the group)ᵀ (rows of the block)ᵀ
    pointers = (
        _address(w) + of_block * (w.shape[1] * w.shape[2] * w.itemsize),
        _address(x) + steps * (size * inner * x.itemsize),
        _address(out) + steps * (size * columns * out.itemsize),
    )
    pointers = [p.astype(np.uint64) for p in pointers]
    wide = x.dtype == np.float64
    one, keep = ((ctypes.c_double if wide else ctypes.c_float)(v) for v in (1, total is not None))
    status = cublas_function("cublasGemmBatchedEx")(
        cublas_handle(), int(transposed), 0, columns, size, inner, ctypes.byref(one),
        _address(pointers[0]), _CUDA_TYPES[w.dtype.name], w.shape[2], _address(pointers[1]), _CUDA_TYPES[x.dtype.name], inner, ctypes.byref(keep),
        _address(pointers[2]), _CUDA_TYPES[out.dtype.name], columns, len(of_block), _COMPUTE_64F if wide else _COMPUTE_32F, -1,
    )  # fmt: skip
    if status:
        raise RuntimeError(f"cublasGemmBatchedEx: status {status} for {len(of_block)} products of {size} x {inner} and {inner} x {columns}")
    return out


def _address(x: cp.ndarray) -> int:
    return x.data.ptr


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
