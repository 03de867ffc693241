"""The steps of `chunkwise.Memory` on a device: products by cuBLAS, the rest by ``cuda/kernel_chunks.cu``.

Every method does what the one of the same name in `chunk_steps.Steps` does, on CuPy arrays. How a product of two stacks of matrices
becomes a call of cuBLAS is `plan`, which looks at shapes and strides alone.
"""

import ctypes
import math
from typing import NamedTuple

import cupy as cp
import numpy as np
from refimpl.gpu import chunk_steps
from refimpl.gpu.arrays import TYPES, cast
from refimpl.gpu.grouped import cublas_function, cublas_handle
from refimpl.gpu.launch import Kernel

FILE = "kernel_chunks.cu"
_CHANNELS = 16  # of which a thread of chunk_pairs keeps what is left of a key
_ROWS = 32  # of the weights, that a block of chunk_weigh makes
_WIDTHS = {2: 4, 4: 4, 8: 2}  # numbers that are one access, by the size of the largest
_CUDA_TYPES = {"float32": 0, "float64": 1, "bfloat16": 14}  # cudaDataType
_COMPUTE = {"float32": 68, "bfloat16": 68, "float64": 70, "tf32": 77}  # cublasComputeType


def _kernel(name: str, *parameters) -> Kernel:
    return Kernel(FILE, f"{name}<{', '.join(map(str, parameters))}>")


def _flag(value: bool) -> str:
    return "true" if value else "false"


_OPERANDS = {"float": ("float", "Tf32", "__nv_bfloat16"), "double": ("double",)}  # what products read, by the precision of sums
_PAIRS = [(X, S) for X, stored in _OPERANDS.items() for S in stored]


def _of_heads() -> list[Kernel]:
    found = []
    for X, S in _PAIRS:
        widths = (1, 2 if X == "double" else 4)
        ins = (X,) if S == "Tf32" else tuple({X: 0, S: 0})  # TF32 is read as the float32 that it is
        found += [_kernel("chunk_scale", a, b, _flag(e), V) for a in ins for b in {X: 0, S: 0} for e in (False, True) for V in widths]
        if S != "Tf32":
            found += [_kernel("chunk_finish", S, out, V) for out in {X: 0, S: 0} for V in widths]
            found += [_kernel("chunk_dots", a, b) for a in ins for b in ins]
        found += [_kernel("chunk_carry", X, S, _flag(back)) for back in (False, True)]
        found += [_kernel("chunk_weigh", X, S), _kernel("chunk_weigh_vjp", X, S)]
    found += [_kernel(name, X) for name in ("chunk_spans", "chunk_spans_vjp") for X in _OPERANDS]
    return list(dict.fromkeys(found))


BY_HEAD = tuple(_of_heads())  # what decays of a head need
BY_CHANNEL = (
    *(_kernel("chunk_pairs", S, _CHANNELS) for _, S in _PAIRS),
    *(_kernel("chunk_pairs_vjp", S) for _, S in _PAIRS if S != "Tf32"),
    *(_kernel("chunk_inverse", X) for X in _OPERANDS),
)
KERNELS = (*BY_HEAD, *BY_CHANNEL)


class Operand(NamedTuple):
    """A stack of matrices as cuBLAS takes it: the distance of its rows in memory, whether these are columns, and of its batch axes."""

    ld: int
    transposed: bool
    steps: tuple[int, ...]


def operand(shape: tuple[int, ...], strides: tuple[int, ...], batch: tuple[int, ...]) -> Operand | None:
    """Of an array's shape and strides (in elements) for a batch that it is broadcast to; None if it must be copied first."""
    (rows, columns), (row, column) = shape[-2:], strides[-2:]
    steps = tuple(0 if n == 1 else s for n, s in zip(shape[:-2], strides[:-2], strict=True))
    steps = (0,) * (len(batch) - len(steps)) + steps
    if (column == 1 or columns == 1) and (row >= columns or rows == 1):
        return Operand(max(row if rows > 1 else columns, 1), False, steps)
    if (row == 1 or rows == 1) and (column >= rows or columns == 1):
        return Operand(max(column if columns > 1 else rows, 1), True, steps)
    return None


def even(batch: tuple[int, ...], steps: tuple[int, ...]) -> int | None:
    """The one distance between neighbours of a whole batch, if there is one."""
    inner, distance = 1, None
    for size, step in reversed(list(zip(batch, steps, strict=True))):
        if size == 1:
            continue
        if distance is None:
            distance = step
        elif step != distance * inner:
            return None
        inner *= size
    return distance or 0


class Plan(NamedTuple):
    """A product of stacks as the arguments of cuBLAS, whose order of columns makes it the transposes' product, b before a."""

    m: int
    n: int
    k: int
    first: Operand
    second: Operand
    distances: tuple[int, int] | None  # None: pointers


def plan(batch: tuple[int, ...], rows: int, inner: int, columns: int, a: Operand, b: Operand) -> Plan:
    """Of the product of stacks of (rows, inner) and (inner, columns) matrices into a contiguous one."""
    distances = even(batch, b.steps), even(batch, a.steps)
    known = None if None in distances else distances
    return Plan(columns, rows, inner, b, a, known)  # type: ignore[arg-type]


class Steps(chunk_steps.Steps):
    """CuPy's."""

    xp = cp

    def __init__(self, dtype) -> None:
        super().__init__(dtype)
        self.X = TYPES[self.wide.name]
        self.S = "Tf32" if self.tf32 else TYPES[self.operand.name]

    # -- elementwise ---------------------------------------------------------------------------------------------------

    def store(self, x):
        """What a product can read."""
        if not self.tf32:
            return cast(x, self.operand)
        x = cast(x, self.operand)
        return self._scale(x, cp.ones((len(x), *(1,) * (x.ndim - 1)), self.wide), self.S, exponential=False)

    def scaled(self, x, factor):
        """x times a factor, for a product to read."""
        return self._scale(x, factor, self.S, exponential=False)

    def faded(self, x, exponent):
        """x e^exponent, for a product to read."""
        return self._scale(x, exponent, self.S, exponential=True)

    def grown(self, x, exponent):
        """x e^exponent in the precision of sums."""
        return self._scale(x, exponent, self.X, exponential=True)

    def _scale(self, x, f, out: str, exponential: bool):
        x, f = cp.ascontiguousarray(x), cp.ascontiguousarray(f)
        lead, x_heads, f_heads = _heads(x, f)
        rows, columns = math.prod(x.shape[2:-1]), x.shape[-1]
        f_rows, f_columns = math.prod(f.shape[2:-1]), f.shape[-1]
        y = cp.empty((*lead, *x.shape[2:]), self.operand if out == self.S else self.wide)
        V = _pack(columns, x, y)
        kernel = _kernel("chunk_scale", TYPES[x.dtype.name], out, _flag(exponential), V)
        sizes = (np.int64(rows), np.int32(columns), np.int64(f_rows * f_columns), np.int32(f_columns if f_rows > 1 else 0))
        sizes = (*sizes, np.int32(f_columns > 1), np.int32(lead[1]), np.int32(x_heads), np.int32(f_heads))
        kernel(_grid(lead, rows * columns // V), (256,), (x, f, y, *sizes))
        return y

    def dots(self, x, y):
        """Sums of x y along the last axis."""
        shape = x.shape
        x, y = ((cp.ascontiguousarray(v) if v.ndim > 3 else cp.ascontiguousarray(v)[:, None]) for v in (x, y))
        lead, x_heads, y_heads = _heads(x, y)
        rows, columns = math.prod(x.shape[2:-1]), x.shape[-1]
        sums = cp.empty((*lead, *x.shape[2:-1]), self.wide)
        sizes = (np.int64(rows), np.int32(columns), np.int32(lead[1]), np.int32(x_heads), np.int32(y_heads))
        _kernel("chunk_dots", TYPES[x.dtype.name], TYPES[y.dtype.name])(_grid(lead, 32 * rows), (256,), (x, y, sums, *sizes))
        return sums if len(shape) > 3 else sums[:, 0]

    def finish(self, within, before, factor=None, exponent=None, x=None, D=None, z=None, scale=1, dtype=None):
        """(scale (within + factor before) + D x) silu(z)."""
        out, S = np.dtype(dtype or self.wide), self.X if self.tf32 else self.S
        factor = factor if exponent is None else exponent
        before = cp.ascontiguousarray(before)
        within, factor, x, D, z = (None if v is None else cp.ascontiguousarray(v) for v in (within, factor, x, D, z))
        G, H, *inside, columns = before.shape
        y = cp.empty(before.shape, out)
        V = _pack(columns, before, y, *(v for v in (within, x, z) if v is not None))
        pointers = [np.uint64(0) if v is None else v for v in (within, before, factor, x, D, z)]
        sizes = (self.wide.type(scale), np.int64(math.prod(inside)))
        sizes = (*sizes, *_ints(columns, exponent is not None, H, 1 if factor is None else factor.shape[1]))
        kernel = _kernel("chunk_finish", S, TYPES[out.name], V)
        kernel(_grid((G, H), math.prod(inside) * columns // V), (256,), (*pointers, y, *sizes))
        return y

    # -- products ------------------------------------------------------------------------------------------------------

    def product(self, a, b):
        """a b for each chunk, in the precision of sums."""
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        rows, inner, columns = a.shape[-2], a.shape[-1], b.shape[-1]
        out = cp.empty((*batch, rows, columns), self.wide)
        if not (out.size and inner):
            out[...] = 0
            return out
        a, b = (_ready(x, batch) for x in (a, b))
        how = plan(batch, rows, inner, columns, _operand(a, batch), _operand(b, batch))
        number = ctypes.c_double if self.wide == np.float64 else ctypes.c_float
        one, zero, kind = number(1), number(0), _CUDA_TYPES[self.operand.name]
        compute = _COMPUTE["tf32" if self.tf32 else self.operand.name]
        count, first, second, size = math.prod(batch), how.first, how.second, rows * columns
        common = (cublas_handle(), int(first.transposed), int(second.transposed), how.m, how.n, how.k, ctypes.byref(one))
        if how.distances is not None:
            status = cublas_function("cublasGemmStridedBatchedEx")(
                *common, _address(b), kind, first.ld, how.distances[0], _address(a), kind, second.ld, how.distances[1], ctypes.byref(zero),
                _address(out), _CUDA_TYPES[out.dtype.name], columns, size, count, compute, -1,
            )  # fmt: skip
        else:
            pointers = [
                _pointers(b, first, batch),
                _pointers(a, second, batch),
                _address(out) + cp.arange(count, dtype=np.uint64) * (size * out.itemsize),
            ]
            status = cublas_function("cublasGemmBatchedEx")(
                *common, _address(pointers[0]), kind, first.ld, _address(pointers[1]), kind, second.ld, ctypes.byref(zero),
                _address(pointers[2]), _CUDA_TYPES[out.dtype.name], columns, count, compute, -1,
            )  # fmt: skip
        if status:
            raise RuntimeError(
                f"cuBLAS: status {status} for {count} products of {rows} x {inner} and {inner} x {columns} {self.operand.name}"
            )
        return out

    # -- decays --------------------------------------------------------------------------------------------------------

    def spans(self, w):
        """F relative to its largest value, the logarithms of that and of what is left of F_{L-1}, log K_s."""
        w = cp.ascontiguousarray(w)
        (*lead, L, features), entries = w.shape, math.prod(w.shape[:-2])
        since, kept = (cp.empty(w.shape, self.wide) for _ in range(2))
        peak, rest = (cp.empty((*lead, features), self.wide) for _ in range(2))
        arrays = (w, since, peak, rest, kept)
        _kernel("chunk_spans", self.X)((-(-entries * features // 128),), (128,), (*arrays, np.int64(entries), *_ints(L, features)))
        return since, peak, rest, kept

    def spans_vjp(self, dw, of_since, of_kept, held):
        """dw_r and the cotangents of all exponents that span r; in the memory of dw."""
        dw, of_since, of_kept, held = (cp.ascontiguousarray(x) for x in (dw, of_since, of_kept, held))
        (*_, L, features), entries = dw.shape, math.prod(dw.shape[:-2])
        arrays = (dw, of_since, of_kept, held)
        _kernel("chunk_spans_vjp", self.X)((-(-entries * features // 128),), (128,), (*arrays, np.int64(entries), *_ints(L, features)))
        return dw

    def weigh(self, product, w, strict: bool, gain=None):
        """product ∘ E, columns times e^gain, on and below the diagonal (`strict`: below), for a product to read."""
        gain = np.uint64(0) if gain is None else cp.ascontiguousarray(gain)
        w, (lead, product_heads, w_heads) = cp.ascontiguousarray(w), _heads(product, w)
        chunks, L = product.shape[2:4]
        weights = cp.empty((*lead, chunks, L, L), self.operand)
        sizes = (np.int64(chunks), np.int32(L), np.int32(_ROWS), *_ints(strict, lead[1], product_heads, w_heads))
        grid = (math.prod(lead) * chunks, -(-L // _ROWS))
        _kernel("chunk_weigh", self.X, self.S)(grid, (_threads(L),), (product, w, gain, weights, *sizes))
        return weights

    def weigh_vjp(self, product, weights, w, strict: bool, gain=None):
        """Cotangents of the product (for a product to read) and of w."""
        gain = np.uint64(0) if gain is None else cp.ascontiguousarray(gain)
        w, (G, H, chunks, L) = cp.ascontiguousarray(w), weights.shape[:4]
        d_product, dw = cp.empty(weights.shape, self.operand), cp.empty((G, H, chunks, L, 1), self.wide)
        sizes = (np.int64(chunks), *_ints(L, strict, H, product.shape[1], w.shape[1]))
        shared = (32 * (L + 1) + L) * self.wide.itemsize
        arrays = (product, weights, w, gain, d_product, dw)
        _kernel("chunk_weigh_vjp", self.X, self.S)((G * H * chunks,), (_threads(L),), (*arrays, *sizes), shared)
        return d_product, dw

    def pairs(self, q, k, w, strict: bool):
        """M_ts = Σ_i q_ti k_si e^(w_(s+1)i + ... + w_ti), for a product to read."""
        q, k, w = (cp.ascontiguousarray(x) for x in (q, k, w))
        G, heads = q.shape[0], max(x.shape[1] for x in (q, k, w))
        chunks, L, d = q.shape[2:]
        weights = cp.empty((G, heads, chunks, L, L), self.operand)
        sizes = (np.int64(chunks), *_ints(L, d, strict, heads, q.shape[1], k.shape[1], w.shape[1]))
        shared = (L * L + 2 * L * _CHANNELS) * self.wide.itemsize
        _kernel("chunk_pairs", self.S, _CHANNELS)((G * heads * chunks,), (_threads(L),), (q, k, w, weights, *sizes), shared)
        return weights

    def pairs_vjp(self, q, k, w, weights, strict: bool):
        """Cotangents of q, k and w."""
        q, k, w = (cp.ascontiguousarray(x) for x in (q, k, w))
        (G, heads, chunks, L), d = weights.shape[:4], q.shape[-1]
        gradients = tuple(cp.empty((G, heads, chunks, L, d), self.wide) for _ in range(3))
        sizes = (np.int64(chunks), *_ints(L, d, strict, heads, q.shape[1], k.shape[1], w.shape[1]))
        grid, shared = (G * heads * chunks, -(-d // 32)), 5 * 32 * L * self.wide.itemsize
        _kernel("chunk_pairs_vjp", self.X if self.tf32 else self.S)(grid, (32,), (q, k, w, weights, *gradients, *sizes), shared)
        return gradients

    def inverse(self, weights, beta):
        """(I + diag(β) A)⁻¹."""
        beta, L = cp.ascontiguousarray(beta), weights.shape[-1]
        inverse = cp.empty(weights.shape, self.wide)
        count = weights.size // max(L * L, 1)
        _kernel("chunk_inverse", self.X)((count,), (_threads(L),), (weights, beta, inverse, np.int32(L)), L * L * self.wide.itemsize)
        return inverse

    # -- from chunk to chunk -------------------------------------------------------------------------------------------

    def carry(self, added, peak, rest, state):
        """x_c = e^peak x, then x <- e^rest x_c + added_c: all x_c, and the last x."""
        return self._carry(added, peak, rest, state, back=False)

    def carry_back(self, added, peak, rest, state):
        """x_c = x, then x <- e^peak (e^rest x + added_c), last chunk first."""
        return self._carry(added, peak, rest, state, back=True)

    def _carry(self, added, peak, rest, state, back: bool):
        added, peak, rest, state = (cp.ascontiguousarray(x) for x in (added, peak, rest, state))
        G, H, chunks, d, e = added.shape
        passed, last = cp.empty(added.shape, self.operand), cp.empty(state.shape, self.wide)
        kernel = _kernel("chunk_carry", self.X, self.S, _flag(back))
        sizes = (np.int64(chunks), *_ints(d, e, peak.shape[-1]))
        kernel((G * H, -(-(d * e) // 256)), (256,), (added, peak, rest, state, passed, last, *sizes))
        return passed, last


def _heads(x, y) -> tuple[tuple[int, int], int, int]:
    """(G, H) of two arrays that may share heads, and how many each has."""
    if x.shape[0] != y.shape[0] or not (x.shape[1] == y.shape[1] or 1 in (x.shape[1], y.shape[1])):
        raise ValueError(f"arrays must have the same groups, and heads alike or one, got {x.shape} and {y.shape}")
    return (x.shape[0], max(x.shape[1], y.shape[1])), x.shape[1], y.shape[1]


def _ints(*values):
    return tuple(np.int32(v) for v in values)


def _threads(L: int) -> int:
    return min(128, -(-L // 32) * 32)


def _pack(columns: int, *arrays) -> int:
    """How many neighbours a thread moves at once."""
    V = _WIDTHS[max(x.itemsize for x in arrays)]
    return V if columns % V == 0 and all(_address(x) % (V * x.itemsize) == 0 for x in arrays) else 1


def _grid(lead: tuple[int, int], work: int) -> tuple[int, int]:
    return math.prod(lead), min(-(-work // 256), 65535)


def _operand(x, batch) -> Operand | None:
    return operand(x.shape, tuple(s // x.itemsize for s in x.strides), batch)


def _ready(x, batch):
    """An array that cuBLAS can take: itself, or a copy. Halves begin, and lie apart, by whole runs of 16 bytes."""
    how = _operand(x, batch)
    if how is not None and (x.itemsize > 2 or (_address(x) % 16 == 0 and all(n % 8 == 0 for n in (how.ld, *how.steps)))):
        return x
    return x.copy(order="C")


def _address(x) -> int:
    return x.data.ptr


def _pointers(x, how: Operand, batch):
    """The address of every matrix of a batch, computed on the device."""
    at = cp.zeros((), np.int64)
    for axis, (size, step) in enumerate(zip(batch, how.steps, strict=True)):
        at = at + (cp.arange(size) * (step * x.itemsize)).reshape(size, *(1,) * (len(batch) - axis - 1))
    return (_address(x) + at.ravel()).astype(np.uint64)
