"""Long convolution on the device: transforms inside one block, each value read once and written once."""

import math
from functools import cache

import cupy as cp
import numpy as np
import scipy.fft
from refimpl.gpu import mirror
from refimpl.gpu.launch import Kernel, multiprocessors, shared_memory
from refimpl.gpu.transpose import INSTANCES, transposed

from refimpl.ops.recurrence.long_conv import CONTRACT

_POINTS = {6: 3, 8: 4, 10: 4, 11: 4, 12: 5, 13: 5, 14: 5}  # log2 of half a transform's length: log2 of the complex points of a thread
LONGEST = 14  # half transforms that fit into Hopper's shared memory; longer sequences are cut into segments
_FILE = "kernel_long_conv.cu"
_ROWS = (12, 13, 14)  # of those, the ones that `kernel_long_conv_rows.cu` knows, for sequences of one segment
_MOST = 320  # products of spectra a row, beyond which one long transform by cuFFT is less work


def _kernel(name: str, log: int, *options: bool) -> Kernel:
    arguments = ", ".join([str(log), str(_POINTS[log]), *("true" if o else "false" for o in options)])
    return Kernel(_FILE, f"long_conv_{name}<{arguments}>", spills=name == "convolve")  # up to 100 bytes


def _of_rows(name: str, log: int) -> Kernel:
    return Kernel("kernel_long_conv_rows.cu", f"long_conv_{name}<{log - 10}>", spills=name == "rows")  # up to 30 bytes


KERNELS = (
    *(_kernel(name, log, flag) for log in _POINTS for name in ("spectra", "convolve") for flag in (False, True)),
    *(_kernel("lags", log) for log in _POINTS),
    *(_of_rows(name, log) for log in _ROWS for name in ("kernels", "rows")),
    *INSTANCES.values(),
)


@mirror.form(CONTRACT)
def long_conv(u, kernel, skip=None):
    """Causal convolution along time on CuPy arrays; arguments and results as `refimpl.long_conv`.

    Notes
    -----
    Real float32, float16 and bfloat16: transforms of at most 2^15 points inside a block, in float32 (``kernel_long_conv_rows.cu`` for
    more than 2048 steps, else ``kernel_long_conv.cu``); sequences beyond 16384 steps as sums over segments. float64, complex,
    and sequences so long that one transform is less work: cuFFT. Where time is contiguous (a transposed (batch, channel, time) array of float32) nothing is copied; other layouts are
    transposed in one pass over the data, and back.
    """
    plan = _Plan.of(u, kernel)
    if plan is None:
        return _by_cufft(u, kernel, skip)
    rows, direct = plan.rows(u), plan.direct(skip)
    if plan.in_one_transform():
        return plan.result(plan.convolve_rows(rows, plan.rows_of_kernel(kernel), direct), u)
    return plan.result(plan.convolve(rows, plan.spectra_of_kernel(kernel), direct), u)


@mirror.gradient(CONTRACT)
def long_conv_vjp(dy, u, kernel, skip=None):
    """Gradient of `long_conv` on CuPy arrays, as `refimpl.long_conv_vjp`; by the same transforms.

    Notes
    -----
    Keeps the spectra of u and dy, four times their memory. The sums over the batch are in a fixed order: the same bits every time.
    """
    plan = _Plan.of(u, kernel)
    if plan is None:
        return _vjp_by_cufft(dy, u, kernel, skip)
    rows, cotangents, spectra = plan.rows(u), plan.rows(dy), plan.spectra_of_kernel(kernel)
    dskip = None if skip is None else _products(rows, cotangents, -1).reshape(-1, plan.c)
    kept = plan.room(plan.batch * plan.channels)
    du = plan.result(plan.convolve(cotangents, spectra, plan.direct(skip), adjoint=True, kept=kept), dy)
    lags = plan.lags(plan.spectra_of_rows(rows), kept)
    return {"u": du, "kernel": plan.result_of_kernel(lags, kernel), "skip": dskip}


class _Plan:
    """How one call is cut into transforms. Rows are (batch, channels, T), time contiguous, float32."""

    @classmethod
    def of(cls, u, kernel) -> "_Plan | None":
        """None where cuFFT, or no transform at all, is the way."""
        halves = {"float32", "float16", "bfloat16"}
        T, K = u.shape[-2], kernel.shape[-2]
        if u.dtype.name not in halves or kernel.dtype.name not in halves or not (T and K and u.size and kernel.size):
            return None
        plan = cls(u, kernel)
        return plan if plan.segments * plan.windows <= _MOST else None

    def __init__(self, u, kernel):
        self.batch_shape = np.broadcast_shapes(u.shape[:-2], kernel.shape[:-2])
        self.T, self.c = u.shape[-2:]
        self.K = kernel.shape[-2]
        self.own_kernels = kernel.size != self.K * self.c  # of each batch element: then they are all channels
        batch = math.prod(self.batch_shape)
        self.batch, self.channels = (1, batch * self.c) if self.own_kernels else (batch, self.c)
        for log in _POINTS:
            self.S, held = 2**log, 2 ** _POINTS[log]
            threads = self.S // held
            block = (threads, max(1, 256 // threads))
            shared, ring = block[1] * (self.S + threads + held) * 8, block[1] * threads * 8 * 16
            if shared + ring > shared_memory() - 1024 or log > LONGEST:
                break
            self.log, self.block, self.shared, self.ring = log, block, shared, ring
            if self.S >= self.T:
                break
        self.S = 2**self.log
        self.segments = -(-self.T // self.S)
        self.windows = min(self.segments, -(-self.K // self.S) + 1)

    def rows(self, x):
        x = cp.broadcast_to(x, (*self.batch_shape, self.T, self.c))
        if _time_is_contiguous(x):
            x = x.swapaxes(-1, -2).reshape(self.batch, self.channels, self.T)
            return x if x.strides[-1] == x.itemsize or self.T == 1 else cp.ascontiguousarray(x)
        return transposed(x, cp.float32).reshape(self.batch, self.channels, self.T)

    def result(self, y, like):
        """Rows as the caller's array: in the layout that `like` has."""
        y = y.reshape(*self.batch_shape, self.c, self.T)
        return y.swapaxes(-1, -2) if _time_is_contiguous(like) else transposed(y, like.dtype)

    def result_of_kernel(self, lags, kernel):
        """Gradients of windows (channels, windows, 2 S) as those of the kernel's rows: window j holds row j S + n at n, and j S - S + n at S + n."""
        half, (channels, windows, _) = self.S, lags.shape
        known = min(self.K, self.T)
        total = cp.zeros((channels, windows + 1, half), cp.float32)
        total[:, :windows] = lags[..., :half]
        if windows > 1:
            total[:, : windows - 1] += lags[:, 1:, half:]
        total = total.reshape(channels, -1)[:, :known]
        out = cp.zeros((channels, self.K), cp.float32)
        out[:, :known] = total
        shape = (*self.batch_shape, self.c, self.K) if self.own_kernels else (self.c, self.K)
        return transposed(out.reshape(shape), cp.float32)

    def direct(self, skip):
        if skip is None:
            return np.uint64(0)
        skip = cp.ascontiguousarray(skip, cp.float32)
        return cp.tile(skip, self.channels // self.c) if self.own_kernels else skip

    def room(self, lanes: int):
        return cp.empty((lanes, self.segments, self.S // 2, 4), cp.float32)

    def rows_of_kernel(self, kernel):
        shape = (*self.batch_shape, self.K, self.c) if self.own_kernels else (self.K, self.c)
        kernel = cp.broadcast_to(kernel, shape) if self.own_kernels else kernel.reshape(shape)
        kernel = kernel[..., : self.T, :]
        rows = kernel.swapaxes(-1, -2) if _time_is_contiguous(kernel) else transposed(kernel, cp.float32)
        rows = rows.reshape(self.channels, -1)
        return rows if rows.strides[-1] == rows.itemsize else cp.ascontiguousarray(rows)

    def spectra_of_kernel(self, kernel):
        out = cp.empty((self.channels, self.windows, self.S // 2, 4), cp.float32)
        self._spectra(self.rows_of_kernel(kernel)[None], out, self.windows, True)
        return out

    @property
    def shared_of_rows(self) -> int:
        """Points, ring and table of `long_conv_rows`."""
        return 8 * self.S + self.S // 32 * (8 * 16 + (3 + 2**14 // self.S) * 8)

    def in_one_transform(self) -> bool:
        """Whether `convolve_rows` can do it."""
        return self.segments == 1 and self.log in _ROWS and self.shared_of_rows <= shared_memory() - 1024

    def convolve_rows(self, rows, kernels, skip):
        threads = self.S // 32
        kept = cp.empty((self.channels, self.S // 2, 4), cp.float32)
        sizes = np.int64(kernels.strides[0] // kernels.itemsize), kept, np.int32(kernels.shape[1])
        _of_rows("kernels", self.log)((self.channels,), (threads,), (kernels, *sizes), 8 * self.S)
        y = cp.empty((self.batch, self.channels, self.T), cp.float32)
        grid = min(self.batch * self.channels, multiprocessors() * (512 // threads))
        sizes = np.int64(self.batch), np.int64(self.channels), np.int32(self.T)
        _of_rows("rows", self.log)((grid,), (threads,), (rows, *_strides(rows), y, kept, skip, *sizes), self.shared_of_rows)
        return y

    def spectra_of_rows(self, rows):
        out = self.room(self.batch * self.channels)
        self._spectra(rows, out, self.segments, False)
        return out

    def _spectra(self, rows, out, count, window):
        batch, channels, length = rows.shape
        sizes = (np.int64(batch), np.int64(channels), np.int64(length), np.int32(count))
        grid = (-(-channels * batch * count // self.block[1]),)
        _kernel("spectra", self.log, window)(grid, self.block, (rows, *_strides(rows), out, *sizes), self.shared)

    def convolve(self, rows, spectra, skip, adjoint=False, kept=None):
        y = cp.empty((self.batch, self.channels, self.T), cp.float32)
        grid, keep_all = -(-self.channels * self.batch // self.block[1]), kept is not None
        if self.segments > 1 and not keep_all:
            grid = min(grid, multiprocessors() * _resident(self.shared + self.ring))
            kept = self.room(grid * self.block[1])
        sizes = (np.int64(self.batch), np.int64(self.channels), np.int64(self.T), np.int32(self.segments), np.int32(self.windows))
        arguments = (rows, *_strides(rows), y, spectra, skip, np.uint64(0) if kept is None else kept)
        _kernel("convolve", self.log, adjoint)((grid,), self.block, (*arguments, *sizes, np.int32(keep_all)), self.shared + self.ring)
        return y

    def lags(self, of_u, of_dy):
        out = cp.empty((self.channels, self.windows, 2 * self.S), cp.float32)
        grid = (-(-self.channels * self.windows // self.block[1]),)
        sizes = (np.int64(self.batch), np.int64(self.channels), np.int32(self.segments), np.int32(self.windows))
        _kernel("lags", self.log)(grid, self.block, (of_u, of_dy, out, *sizes), self.shared + self.ring)
        return out


def _resident(shared: int) -> int:
    """Blocks that share a multiprocessor, at most two by their registers."""
    return 2 if shared <= 110 * 1024 else 1


def _strides(rows):
    return np.int64(rows.strides[0] // rows.itemsize), np.int64(rows.strides[1] // rows.itemsize)


def _time_is_contiguous(x) -> bool:
    return x.dtype == cp.float32 and x.shape[-2] > 1 and x.strides[-2] == x.itemsize and x.shape[-1] > 1


# -- cuFFT, whose plans CuPy keeps -------------------------------------------------------------------------------------


def _by_cufft(u, kernel, skip):
    u, kernel, skip = (None if x is None else _wide(x) for x in (u, kernel, skip))
    T = u.shape[-2]
    kernel = kernel[..., :T, :]
    shape = np.broadcast_shapes(u.shape[:-2], kernel.shape[:-2])
    kind = np.result_type(u.dtype, kernel.dtype, *(() if skip is None else (skip.dtype,)))
    if T and kernel.shape[-2] and u.size and kernel.size:
        forward, back, n = _transforms(u, kernel)
        y = back(forward(u) * forward(kernel), T)
    else:
        y = cp.zeros((*shape, *u.shape[-2:]), kind)
    return y if skip is None else y + skip * u


def _vjp_by_cufft(dy, u, kernel, skip):
    dy, u, kernel, skip = (None if x is None else _wide(x) for x in (dy, u, kernel, skip))
    T, K = u.shape[-2], kernel.shape[-2]
    direct = 0 if skip is None else skip.conj() * dy
    dskip = None if skip is None else _products(u, dy, tuple(range(dy.ndim - 1)))
    if not (T and K and u.size and kernel.size):
        return {"u": direct + cp.zeros_like(dy), "kernel": cp.zeros_like(kernel), "skip": dskip}
    forward, back, n = _transforms(u, kernel, dy)
    cotangent = forward(dy)
    du = back(cotangent * forward(kernel[..., :T, :]).conj(), T) + direct
    lags = back(cotangent * forward(u).conj(), min(K, T))
    dkernel = cp.zeros((*lags.shape[:-2], K, lags.shape[-1]), lags.dtype)
    dkernel[..., : min(K, T), :] = lags
    return {"u": du, "kernel": dkernel, "skip": dskip}


def _transforms(u, kernel, *more):
    """A transform along time of a length at which nothing wraps around, and its inverse, cut to so many steps."""
    length = u.shape[-2] + min(kernel.shape[-2], u.shape[-2]) - 1
    if any(x.dtype.kind == "c" for x in (u, kernel, *more)):
        n = scipy.fft.next_fast_len(length)
        return (lambda x: cp.fft.fft(x, n, axis=-2)), (lambda x, steps: cp.fft.ifft(x, n, axis=-2)[..., :steps, :]), n
    n = scipy.fft.next_fast_len(length, real=True)
    return (lambda x: cp.fft.rfft(x, n, axis=-2)), (lambda x, steps: cp.fft.irfft(x, n, axis=-2)[..., :steps, :]), n


def _wide(x):
    return x if x.dtype.kind == "c" or x.dtype == cp.float64 else x.astype(cp.float32, copy=False)


def _products(u, dy, axis):
    """conj(u) dy summed in one pass."""
    return _sum_of_products(u.dtype.kind == "c")(*cp.broadcast_arrays(u, dy), axis=axis)


@cache
def _sum_of_products(conjugate: bool):
    return cp.ReductionKernel("T u, S dy", "S sum", "(conj(u) * dy)" if conjugate else "(S)u * dy", "a + b", "sum = a", "0", "products")
