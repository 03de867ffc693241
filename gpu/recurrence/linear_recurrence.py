"""`linear_recurrence` on the device: one pass over the data, in whichever of the two memory layouts it comes.

See ``cuda/kernel_linear_recurrence.cu`` for the algorithm and `docs/gpu/linear_recurrence.md` for what was measured.
"""

from dataclasses import dataclass

import cupy as cp
import numpy as np
from refimpl.gpu import mirror
from refimpl.gpu.arrays import aligned, arithmetic, cast, cpp, flat, strides
from refimpl.gpu.launch import Kernel, multiprocessors

from refimpl.ops.recurrence.linear_recurrence import CONTRACT

FILE = "kernel_linear_recurrence.cu"
INPUTS = {"Forward": 2, "Adjoint": 3, "Gated": 3}
DTYPES = ("float32", "float64", "float16", "bfloat16", "complex64", "complex128")


@dataclass(frozen=True)
class Tiles:
    """How a block cuts its work: channels a lane, steps a thread, warps, and how many tiles are under way (`walk_rows`) or how
    many blocks a multiprocessor must hold (the others)."""

    channels: int
    steps: int
    warps: int
    depth: int

    def __str__(self) -> str:
        return f"{self.channels}, {self.steps}, {self.warps}, {self.depth}"

    def shared(self, inputs: int, dtype) -> int:
        """Bytes of shared memory that `walk_rows` takes."""
        ring = self.channels * dtype.itemsize * self.depth * inputs * self.steps * 32 * self.warps
        return ring + 2 * self.warps * 32 * self.channels * 2 * arithmetic(dtype).itemsize


def walking(policy: str, dtype) -> tuple[Tiles, ...]:
    """Tiles of `walk_rows`, the widest first: two blocks' worth of shared memory."""
    size = np.dtype(dtype).itemsize
    if policy == "Forward" and size <= 4:
        return Tiles(8 // size, 8, 8, 3), Tiles(1, 8, 8, 3)
    if size <= 4:
        return Tiles(8 // size, 8, 8, 2), Tiles(1, 8, 8, 3)
    return (Tiles(1, 4, 8 if size == 8 else 4, 3),)


def splitting(policy: str, dtype) -> Tiles:
    """Tiles of `split_rows`, which are in registers."""
    size = np.dtype(dtype).itemsize
    if policy == "Forward" and size <= 4:
        return Tiles(1, 16, 16, 2)
    return Tiles(1, 8 if size <= 4 else 4 if size == 8 else 2, 16, 1)


def along_lines(policy: str, dtype) -> tuple[Tiles, Tiles]:
    """Of `walk_lines`: steps a lane; for many lines a warp each, for few a block."""
    size = np.dtype(dtype).itemsize
    steps = 8 if size <= 4 else 16 // size
    return Tiles(1, steps, 1, 32 if policy == "Forward" and size == 4 else 16), Tiles(1, steps, 8, 1)


def _walk(policy, dtype, tiles: Tiles) -> Kernel:
    return Kernel(FILE, f"walk_rows<{policy}<{cpp(dtype)}>, {tiles}>")


def _split(policy, dtype, tiles: Tiles) -> Kernel:
    return Kernel(FILE, f"split_rows<{policy}<{cpp(dtype)}>, {tiles}>")


def _lines(policy, dtype, tiles: Tiles) -> Kernel:
    return Kernel(FILE, f"walk_lines<{policy}<{cpp(dtype)}>, {tiles.steps}, {tiles.warps}, {tiles.depth}>")


def instances(policy: str, dtypes=DTYPES) -> tuple[Kernel, ...]:
    """Every kernel that `scan` may start."""
    found = []
    for dtype in dtypes:
        found += [_walk(policy, dtype, tiles) for tiles in walking(policy, dtype)]
        found.append(_split(policy, dtype, splitting(policy, dtype)))
        found += [_lines(policy, dtype, tiles) for tiles in along_lines(policy, dtype)]
    return tuple(dict.fromkeys(found))


KERNELS = instances("Forward") + instances("Adjoint")


def scan(policy: str, inputs: tuple, outputs: tuple, state=None, extra=None, last=None) -> None:
    """Run a policy of the kernel over (N, T, c) arrays of one dtype; `state`, `last` (N, c) and `extra` in the arithmetic's.

    All run through axis 1 in order: a view with time reversed is how one runs backwards.
    """
    N, T, c = outputs[0].shape
    dtype, count = outputs[0].dtype, INPUTS[policy]
    operands: list = []
    for x in (*inputs, *[None] * (3 - count)):
        operands += [np.uintp(0), *[np.int64(0)] * 3] if x is None else [x, *strides(x)]
    for y in (*outputs, *[None] * (2 - len(outputs))):
        operands += [np.uintp(0), *[np.int64(0)] * 3] if y is None else [y, *strides(y)]
    operands += [np.uintp(0) if x is None else x for x in (state, extra, last)] + [np.int64(T), np.int64(c)]

    everything, enough = (*inputs, *outputs), 3 * multiprocessors() // 4
    if time_is_contiguous(outputs[0]):
        many, few = along_lines(policy, dtype)
        tiles = many if N * c >= 8 * multiprocessors() else few
        along_time = [x for x in everything if abs(x.strides[1]) == dtype.itemsize]
        whole = T % tiles.steps == 0 and all(aligned(x if x.strides[1] > 0 else x[:, ::-1], 1, tiles.steps) for x in along_time)
        _lines(policy, dtype, tiles)((N * c,), (32 * tiles.warps,), (*operands, np.int32(whole)))
        return

    def columns(tiles):
        return N * -(-c // (32 * tiles.channels))

    plans = [t for t in walking(policy, dtype) if t.channels == 1 or all(aligned(x, 2, t.channels) for x in everything)]
    tiles = next((t for t in plans if columns(t) >= enough), plans[-1])
    if columns(tiles) < enough and 4 * tiles.steps * tiles.warps < T:
        tiles = splitting(policy, dtype)
        chunks = -(-T // (tiles.steps * tiles.warps))
        board = cp.zeros(1 + 2 * columns(tiles) * chunks, np.uint32)
        told = cp.empty(3 * columns(tiles) * chunks * 32 * tiles.channels, arithmetic(dtype))
        _split(policy, dtype, tiles)((columns(tiles) * chunks,), (32 * tiles.warps,), (*operands, np.int64(chunks), board, told))
        return
    _walk(policy, dtype, tiles)((columns(tiles),), (32 * tiles.warps,), tuple(operands), tiles.shared(count, dtype))


def time_is_contiguous(x) -> bool:
    """Whether time is the axis along which (N, T, c) numbers are neighbours."""
    return abs(x.strides[1]) == x.dtype.itemsize and x.shape[1] > 1


def empty_like_layout(x, dtype=None):
    """An empty (N, T, c) array with the axes of `x` in the same order in memory."""
    N, T, c = x.shape
    dtype = x.dtype if dtype is None else dtype
    if time_is_contiguous(x):
        return cp.empty((N, c, T), dtype).transpose(0, 2, 1)
    return cp.empty((N, T, c), dtype)


def prepared(a, b, state, reverse):
    """Arrays (N, T, c) of one dtype and in scan order, the state (N, c) in the arithmetic's, the batch's shape."""
    a = a[None, :] if a.ndim == 1 else a
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2], () if state is None else state.shape[:-1])
    dtype = a.dtype if a.dtype == b.dtype else np.result_type(a.dtype, b.dtype)
    if state is not None and state.dtype.kind == "c":
        dtype = np.result_type(dtype, np.complex64)
    T, c = b.shape[-2:]
    a, b = (flat(cast(x, dtype), batch, 2) for x in (a, b))
    a = cp.broadcast_to(a, (a.shape[0], T, c))
    if reverse:
        a, b = a[:, ::-1], b[:, ::-1]
    if state is not None:
        state = cp.ascontiguousarray(flat(cast(state, arithmetic(dtype)), batch, 1))
    if time_is_contiguous(b) and b.shape[0] * c < multiprocessors() and T > 8192:
        b = cp.ascontiguousarray(b)  # a few long lines: blocks that share one want rows; two copies are less than the wait
    return a, b, state, batch


@mirror.form(CONTRACT)
def linear_recurrence(a, b, *, state=None, reverse=False, return_state=False):
    """`refimpl.linear_recurrence` on CuPy arrays, in one pass over them.

    Parameters
    ----------
    a : cupy.ndarray, shape (..., T, c), (..., 1, c) or (c,)
        Decay; float16, bfloat16, float32, float64, complex64 or complex128. A decay that is constant in time is read once.
    b : cupy.ndarray, shape (..., T, c)
        Input. Fast if channels are contiguous or if time is; right for any strides.
    state : cupy.ndarray, shape (..., c), optional
        h before the first step.
    reverse : bool
        Run backwards in time.
    return_state : bool
        Also return the last h, in float32 where the arrays are halves.

    Returns
    -------
    h : cupy.ndarray, shape (..., T, c)
        With time contiguous where it is in `b`.
    state : cupy.ndarray, shape (..., c), only with `return_state`

    Notes
    -----
    Bit for bit the same in every run on one kind of device. Halves are computed in float32; subnormals are flushed.
    """
    T, c = b.shape[-2:]
    a, b, first, batch = prepared(a, b, state, reverse)
    h, last = _forward(a, b, first, return_state)
    h = h[:, ::-1] if reverse else h
    h = h.reshape(*batch, T, c)
    return (h, last.reshape(*batch, c)) if return_state else h


def _forward(a, b, first, return_state):
    """States (N, T, c) in scan order, and the last."""
    N, T, c = b.shape
    h = empty_like_layout(b)
    last = cp.empty((N, c), arithmetic(b.dtype)) if return_state else None
    if h.size:
        scan("Forward", (a, b), (h,), first, None, last)
    elif return_state:
        last = cp.zeros((N, c), arithmetic(b.dtype)) if first is None else first.copy()
    return h, last


@mirror.gradient(CONTRACT)
def linear_recurrence_vjp(dy, a, b, *, state=None, reverse=False, dstate=None):
    """Gradient of `linear_recurrence`: the states again, then one scan backwards that gives da, db and dstate.

    Parameters
    ----------
    dy : cupy.ndarray, shape (..., T, c)
    dstate : cupy.ndarray, shape (..., c), optional

    Returns
    -------
    dict
        "a", "b", and "state" where one was given.
    """
    T, c = b.shape[-2:]
    spread = a.ndim == 1 or a.shape[-2] != T or a.ndim < b.ndim  # a's gradient will be summed, and not from halves
    if spread:
        a, b, dy = (cast(x, arithmetic(x.dtype)) for x in (a, b, dy))
    a, b, first, batch = prepared(a, b, state, reverse)
    N, dtype = b.shape[0], np.result_type(b.dtype, dy.dtype) if dy.dtype.kind == "c" else b.dtype
    a, b = (cast(x, dtype) for x in (a, b))
    dy = flat(cast(dy, dtype), batch, 2)
    last = None if dstate is None else cp.ascontiguousarray(flat(cast(dstate, arithmetic(dtype)), batch, 1))
    if first is not None:
        first = cast(first, arithmetic(dtype))
    if not b.size:
        entering = cp.zeros((N, c), arithmetic(dtype)) if last is None else last
        return {
            "a": cp.zeros_like(b).reshape(*batch, T, c),
            "b": cp.zeros_like(b).reshape(*batch, T, c),
            "state": entering.reshape(*batch, c),
        }
    h, _ = _forward(a, b, first, False)
    dy = dy[:, ::-1] if reverse else dy
    da, db, g = empty_like_layout(b), empty_like_layout(b), cp.empty((N, c), arithmetic(dtype))
    backwards = (x[:, ::-1] for x in (a, dy, h, db, da))
    a_next, dy, h_before, db_, da_ = backwards
    scan("Adjoint", (a_next, dy, h_before), (db_, da_), last, first, g)
    entering = cp.conj(a[:, 0].astype(g.dtype, copy=False)) * g
    da, db = ((x[:, ::-1] if reverse else x).reshape(*batch, T, c) for x in (da, db))
    return {"a": da, "b": db, "state": entering.reshape(*batch, c)}
