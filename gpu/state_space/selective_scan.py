"""`selective_scan` on the device: states in registers, step sizes, B and C through shared memory, nothing of size T·n anywhere.

See ``cuda/kernel_selective_scan.cu``, ``kernel_selective_scan_gradient.cu`` and, for bfloat16, ``kernel_selective_scan_strips.cu``,
``kernel_selective_scan_ring.cu`` and ``kernel_selective_scan_tensor_gradient.cu`` for the algorithms and `docs/gpu/selective_scan.md` for what
was measured.
"""

from dataclasses import dataclass, replace

import cupy as cp
import numpy as np
from refimpl.gpu import mirror
from refimpl.gpu.arrays import aligned, arithmetic, cast, cpp, flat, strides
from refimpl.gpu.launch import Kernel, multiprocessors, shared_memory

from refimpl.ops.state_space.selective_scan import CONTRACT

FILE, FILE_GRADIENT, FILE_TENSOR_GRADIENT = (f"kernel_selective_scan{part}.cu" for part in ("", "_gradient", "_tensor_gradient"))


@dataclass(frozen=True)
class Tiles:
    """How a block cuts its work: lanes a channel, states a lane, threads, steps a tile, blocks that a multiprocessor must hold,
    how many channels a lane has; of the gradient one, or with `tensor` two, and sums by matrix instructions."""

    lanes: int
    states: int
    threads: int
    steps: int
    blocks: int
    each: int = 1
    tensor: bool = False

    @property
    def channels(self) -> int:
        return self.threads // self.lanes * self.each


# By the number of states that they hold. For real numbers of 4 bytes (and halves, which are computed in them):
FAST = {4: Tiles(4, 1, 256, 16, 2), 16: Tiles(2, 8, 128, 8, 3), 64: Tiles(16, 4, 256, 16, 2), 128: Tiles(32, 4, 256, 32, 1)}
FAST_GRADIENT = {4: Tiles(4, 1, 256, 16, 2), 16: Tiles(4, 4, 256, 16, 2), 64: Tiles(16, 4, 128, 16, 2), 128: Tiles(32, 4, 64, 32, 1)}
FEW_GRADIENT = {16: Tiles(16, 1, 256, 16, 2)}
TENSOR_GRADIENT = Tiles(8, 2, 256, 16, 2, 2, True)  # for strips, with 106 KiB of shared memory
# For bfloat16 with 16 states and whole strips of 16 channels: warps to a strip, strips to a block, blocks that a multiprocessor must hold.
STRIP = 16
STRIPS = {"RESULTS": (2, 4, 2), "CHECKPOINTS": (1, 4, 2)}
TEAMS = 6  # of a ring
# For float64 and complex rates: right, not tuned.
SLOW = {16: Tiles(16, 1, 128, 16, 1), 64: Tiles(16, 4, 128, 16, 1)}
SLOW_GRADIENT = {16: Tiles(16, 1, 128, 16, 1), 64: Tiles(32, 2, 32, 32, 1)}

# (storage of u, delta, z; storage of B, C; arithmetic of A and the states)
FAST_TYPES = tuple((name, name, "float32") for name in ("float32", "float16", "bfloat16"))
SLOW_TYPES = (("float64", "float64", "float64"), ("float32", "complex64", "complex64"), ("float64", "complex128", "complex128"))


def _kernel(mode: str, types, tiles: Tiles) -> Kernel:
    numbers = f"{tiles.lanes}, {tiles.states}, {tiles.each}, {tiles.threads}, {tiles.steps}, {tiles.blocks}"
    few = tiles.blocks > 1 and tiles.lanes == 16  # a register or two, where more would halve the number of warps
    return Kernel(FILE, f"selective_scan<{mode}, {', '.join(map(cpp, types))}, {numbers}>", spills=few)


def _gradient_kernel(types, tiles: Tiles) -> Kernel:
    if tiles.tensor:
        return Kernel(FILE_TENSOR_GRADIENT, f"selective_scan_tensor_gradient<{cpp(types[0])}, {tiles.threads}, {tiles.blocks}>")
    numbers = f"{tiles.lanes}, {tiles.states}, {tiles.threads}, {tiles.steps}, {tiles.blocks}"
    few = tiles == FAST_GRADIENT[16]  # a register or two of 128, where more would halve the number of warps
    return Kernel(FILE_GRADIENT, f"selective_scan_gradient<{', '.join(map(cpp, types))}, {numbers}>", spills=few)


def _carry_kernel(types) -> Kernel:
    return Kernel(FILE, f"carry_states<{cpp(arithmetic(types[0]))}, {cpp(types[1])}, {cpp(types[2])}>")


def _strips(mode: str) -> Kernel:
    return Kernel(
        "kernel_selective_scan_strips.cu", f"selective_scan_strips<{mode}, {cpp('bfloat16')}, {', '.join(map(str, STRIPS[mode]))}>"
    )


def _ring() -> Kernel:
    return Kernel("kernel_selective_scan_ring.cu", f"selective_scan_ring<{cpp('bfloat16')}, {TEAMS}>")


def _checkpoint_tiles(tiles: Tiles, gradient: Tiles) -> Tiles:
    """The forward kernel's tiles, cut where the gradient wants its checkpoints."""
    return replace(tiles, steps=gradient.steps)


def _instances() -> tuple[Kernel, ...]:
    found = [_strips("RESULTS"), _strips("CHECKPOINTS"), _ring(), _gradient_kernel(("bfloat16",), TENSOR_GRADIENT)]
    for kinds, plan, plans in ((FAST_TYPES, FAST, (FAST_GRADIENT, FEW_GRADIENT)), (SLOW_TYPES, SLOW, (SLOW_GRADIENT,))):
        for types in kinds:
            found.append(_carry_kernel(types))
            for size, tiles in plan.items():
                found += [_kernel("RESULTS", types, tiles), _kernel("STATES", types, tiles)]
                for gradients in plans:
                    if size in gradients:
                        checkpoints = _kernel("CHECKPOINTS", types, _checkpoint_tiles(tiles, gradients[size]))
                        found += [checkpoints, _gradient_kernel(types, gradients[size])]
    return tuple(dict.fromkeys(found))


KERNELS = _instances()


class _Prepared:
    """Arguments as the kernels take them: (N, T, c) arrays with contiguous channels, and the plan for their sizes."""

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, state):
        (self.T, self.c), (self.n, G) = u.shape[-2:], (A.shape[1], 1)
        complex_rates = A.dtype.kind == "c"
        self.grouped = {
            "B": CONTRACT.axis("G", u=u, A=A, B=B).get("B") is not None,
            "C": CONTRACT.axis("G", u=u, A=A, B=C).get("B") is not None,
        }
        B, C = (x if self.grouped[name] else x[..., None, :] for name, x in (("B", B), ("C", C)))
        G = max(B.shape[-2], C.shape[-2])
        self.G = G
        self.batch = np.broadcast_shapes(*(x.shape[:-2] for x in (u, delta, z, state) if x is not None), *(x.shape[:-3] for x in (B, C)))
        self.N = int(np.prod(self.batch, dtype=np.int64))
        store = np.dtype(np.float64) if u.dtype == np.float64 else np.dtype(np.float32) if complex_rates else u.dtype
        maps = np.result_type(store, np.complex64) if complex_rates else store
        self.real, self.number = arithmetic(store), maps if complex_rates else arithmetic(store)
        self.types = (store.name, maps.name, self.number.name)
        self.u, self.delta, self.z = (None if x is None else self._channels(x, store) for x in (u, delta, z))
        self.B, self.C = (self._maps(x, maps) for x in (B, C))
        self.A = cp.ascontiguousarray(cast(A, maps))
        self.D, self.bias = (None if x is None else cp.ascontiguousarray(cast(x, store)) for x in (D, delta_bias))
        self.state = None if state is None else self.states(state)
        self.fast = self.types in FAST_TYPES
        sizes = FAST if self.fast else SLOW
        if self.n > max(sizes):
            raise NotImplementedError(
                f"selective_scan: in {self.number.name} the kernels hold at most {max(sizes)} states a channel, got n = {self.n}"
            )
        self.size = min(size for size in sizes if self.n <= size)

    def states(self, x):
        """(..., c, n) -> (N, c, n), contiguous."""
        return cp.ascontiguousarray(flat(cast(x, self.number), self.batch, 2))

    def _channels(self, x, dtype):
        x = cast(x, dtype)
        return flat(x if x.strides[-1] == dtype.itemsize or x.shape[-1] == 1 else cp.ascontiguousarray(x), self.batch, 2)

    def _maps(self, x, dtype):
        x = cast(x, dtype)
        x = flat(x if x.strides[-1] == dtype.itemsize or x.shape[-1] == 1 else cp.ascontiguousarray(x), self.batch, 3)
        return cp.broadcast_to(x, (self.N, self.T, self.G, self.n))

    @property
    def forward(self) -> Tiles:
        return (FAST if self.fast else SLOW)[self.size]

    @property
    def backward(self) -> Tiles:
        """With few channels, more lanes to each."""
        if not self.fast:
            return SLOW_GRADIENT[self.size]
        if self.strips and _shared(self, TENSOR_GRADIENT) <= shared_memory():
            return TENSOR_GRADIENT
        many = FAST_GRADIENT[self.size]
        return FEW_GRADIENT.get(self.size, many) if self.blocks(many) < multiprocessors() else many

    def blocks(self, tiles: Tiles, segments=1) -> int:
        return self.N * segments * self.G * -(-(self.c // self.G) // tiles.channels)

    @property
    def strips(self) -> int:
        """How many strips of 16 channels there are, if the kernels for them can take these arrays; else 0."""
        if self.types != ("bfloat16",) * 2 + ("float32",) or self.n != STRIP or self.c // self.G % STRIP or self.T >= 2**31 - 8 * STRIP:
            return 0
        arrays = [(x, 2) for x in (self.u, self.delta, self.z) if x is not None] + [(self.B, 3), (self.C, 3)]
        return self.N * self.c // STRIP if all(_by_packs(x, axis) for x, axis in arrays) else 0

    def packed(self, tiles: Tiles, *arrays) -> np.int32:
        """Whether all (time, channel) arrays can be read in packs of the widest access."""
        width = min(4, tiles.steps * tiles.channels // tiles.threads)
        whole = self.c // self.G % width == 0
        return np.int32(whole and all(aligned(x, 2, width) for x in (self.u, self.delta, self.z, *arrays) if x is not None))


def _by_packs(x, axis: int) -> bool:
    """Whether rows can be read eight halves at a time, from places that a 32-bit stride of time leads to."""
    return aligned(x, axis, 8) and 0 <= x.strides[1] < 2**32


def _rows(x):
    """A (time, channel) array's pointer and strides of batch and time; none for what is not given."""
    return (np.uintp(0), np.int64(0), np.int64(0)) if x is None else (x, *strides(x)[:2])


def _pointer(x):
    return np.uintp(0) if x is None else x


def _run(p: _Prepared, mode, tiles, softplus, *, state=None, last=None, y=None, elapsed=None, segments=1, length=None):
    everything = (
        *_rows(p.u), *_rows(p.delta), *_rows(p.z if mode == "RESULTS" else None), p.B, *strides(p.B)[:3], p.C, *strides(p.C)[:3],
        p.A, *map(_pointer, (p.D, p.bias, state, last, y, elapsed)), np.int64(p.T), np.int32(p.c), np.int32(p.n), np.int32(p.G),
        np.int64(segments), np.int64(p.T if length is None else length), np.int32(softplus), p.packed(tiles, *([] if y is None else [y])),
    )  # fmt: skip
    shared = _shared_of_scan(p, tiles, mode == "RESULTS")
    _kernel(mode, p.types, tiles)((p.blocks(tiles, segments),), (tiles.threads,), everything, shared)


def _in_bytes(x, batch, time, *group):
    """As the kernels for strips take an array's strides: that of time in bytes."""
    return x, batch, np.uint32(2 * time), *group


def _run_strips(p: _Prepared, mode, softplus, *, last=None, y=None, ring=False):
    """Results, or checkpoints, by strips."""
    everything = (
        *(x for given in (p.u, p.delta, p.z) for x in _in_bytes(*_rows(given))), *_in_bytes(p.B, *strides(p.B)[:3]),
        *_in_bytes(p.C, *strides(p.C)[:3]), p.A, *map(_pointer, (p.D, p.bias, p.state, last, y)), np.int32(p.T), np.int32(p.c), np.int32(p.G), np.int32(softplus),
    )  # fmt: skip
    raw, entering, sums, ends = 5 * 320 * 2, 2 * 324 * 4, 320 * 4, 2 * 16 * 4  # bytes of what they are made of
    if ring:
        shared = TEAMS * (2 * raw + entering + 2 * sums + 64 * 16) + ends
        _ring()((p.strips,), (64 * TEAMS,), everything, shared)
    else:
        warps, strips, _ = STRIPS[mode]
        parts = -(-(p.c // p.G) // (STRIP * strips))
        shared = strips * (4 * raw + 2 * entering + 2 * warps * sums + ends)
        _strips(mode)((p.N * p.G * parts,), (32 * warps * strips,), everything, shared)


def _in_a_ring(p: _Prepared) -> bool:
    """Whether strips are too few for a warp each, and enough for a block each."""
    return multiprocessors() // 2 <= p.strips <= 2 * multiprocessors()


def _by_strips(p: _Prepared) -> bool:
    """Whether two warps to a strip are faster than one, as which the other kernel takes it."""
    return 2 * multiprocessors() < p.strips <= 6 * multiprocessors()


def _shared_of_scan(p: _Prepared, tiles: Tiles, results: bool) -> int:
    """Bytes of two `ScanTile`."""
    real, number, row, parts = p.real.itemsize, p.number.itemsize, tiles.steps + 4, min(tiles.lanes, 8)
    states, steps = tiles.lanes * tiles.states, tiles.steps if results else 1
    sizes = (
        tiles.steps * tiles.channels * 2 * real, states * row * number, (states if results else 1) * row * number,
        steps * parts * (tiles.channels + 32 // parts) * real,
    )  # fmt: skip
    return 2 * sum(-(-size // 16) * 16 for size in sizes)


def _segments(p: _Prepared, tiles: Tiles) -> tuple[int, int]:
    """Into how many segments time is cut, and their length: more than one where channels alone leave multiprocessors idle."""
    blocks = p.blocks(tiles)
    wanted = max(tiles.blocks * multiprocessors() // blocks, 1)  # all at once
    wanted = wanted if wanted > 2 else 1  # for they are run twice
    length = -(-max(p.T // wanted, 8 * tiles.steps) // tiles.steps) * tiles.steps
    return -(-p.T // length), length


@mirror.form(CONTRACT)
def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, *, delta_softplus=False, state=None, return_state=False):
    """`refimpl.selective_scan` on CuPy arrays, with softplus, skip and gate in one kernel.

    Parameters
    ----------
    u, delta, z : cupy.ndarray, shape (..., T, c)
        float16, bfloat16, float32 or float64; read in place if channels are contiguous, else copied once.
    A : cupy.ndarray, shape (c, n)
        n at most 128, or 64 in float64 or for complex rates: the same kernel, not tuned for them.
    B, C : cupy.ndarray, shape (..., T, n) or (..., T, G, n)
    D, delta_bias : cupy.ndarray, shape (c,), optional
    delta_softplus : bool
    state : cupy.ndarray, shape (..., c, n), optional
    return_state : bool

    Returns
    -------
    y : cupy.ndarray, shape (..., T, c)
    state : cupy.ndarray, shape (..., c, n), only with `return_state`
        In float32 where the arrays are halves.

    Raises
    ------
    NotImplementedError
        If there are more states.

    Notes
    -----
    Bit for bit the same in every run. Halves are computed in float32; exponentials are ex2.approx (2 ulp); subnormals are flushed.
    """
    p = _Prepared(u, delta, A, B, C, D, z, delta_bias, state)
    y = cp.empty((p.N, p.T, p.c), p.types[0])
    last = cp.empty((p.N, p.c, p.n), p.number) if return_state else None
    if y.size and (_in_a_ring(p) or _by_strips(p)):
        _run_strips(p, "RESULTS", delta_softplus, last=last, y=y, ring=_in_a_ring(p))
    elif y.size and p.n:
        tiles = p.forward
        segments, length = _segments(p, tiles)
        before = p.state
        if segments > 1:
            before, elapsed = cp.empty((p.N, segments, p.c, p.n), p.number), cp.empty((p.N, segments, p.c), p.real)
            _run(p, "STATES", tiles, delta_softplus, last=before, elapsed=elapsed, segments=segments, length=length)
            lanes = p.N * p.c * p.n
            arguments = (before, elapsed, p.A, _pointer(p.state), np.int64(p.N), np.int64(segments), np.int32(p.c), np.int32(p.n))
            _carry_kernel(p.types)((-(-lanes // 256),), (256,), arguments)
        _run(p, "RESULTS", tiles, delta_softplus, state=before, last=last, y=y, segments=segments, length=length)
    else:
        last = (cp.zeros((p.N, p.c, p.n), p.number) if p.state is None else p.state.copy()) if return_state else None
        if y.size:  # no states: what is left is the skip
            y[...] = 0 if p.D is None else (p.D * p.u if p.z is None else p.D * p.u * p.z / (1 + cp.exp(-p.z)))
    y = y.reshape(*p.batch, p.T, p.c)
    return (y, last.reshape(*p.batch, p.c, p.n)) if return_state else y


@mirror.gradient(CONTRACT)
def selective_scan_vjp(dy, u, delta, A, B, C, D=None, z=None, delta_bias=None, *, delta_softplus=False, state=None, dstate=None):
    """Gradient of `selective_scan`: checkpoints every 16 steps, then one kernel backwards that recomputes the rest.

    Parameters
    ----------
    dy : cupy.ndarray, shape (..., T, c)
    dstate : cupy.ndarray, shape (..., c, n), optional

    Returns
    -------
    dict
        "u", "delta", "A", "B", "C", and "D", "z", "delta_bias", "state" where they were given.

    Notes
    -----
    Always bit for bit the same: no atomic additions. That costs an array (c/64, ..., T, n) of dB and of dC in float32, which is
    then summed.
    """
    p = _Prepared(u, delta, A, B, C, D, z, delta_bias, state)
    N, T, c, n, G = p.N, p.T, p.c, p.n, p.G
    dy = p._channels(dy, np.dtype(p.types[0]))
    dlast = None if dstate is None else p.states(dstate)
    du, ddelta = cp.empty((N, T, c), p.types[0]), cp.empty((N, T, c), p.types[0])
    dz = None if z is None else cp.empty((N, T, c), p.types[0])
    if not (du.size and n):
        entering = cp.zeros((N, c, n), p.number) if dlast is None else dlast
        zeros = [cp.zeros_like(x) for x in (A, B, C)]
        raise_for_states(n)
        return {
            "u": cp.zeros_like(u), "delta": cp.zeros_like(delta), "A": zeros[0], "B": zeros[1], "C": zeros[2], "state": entering.reshape(*p.batch, c, n),
            "D": None if D is None else cp.zeros_like(D), "z": None if z is None else cp.zeros_like(z),
            "delta_bias": None if delta_bias is None else cp.zeros_like(delta_bias),
        }  # fmt: skip
    tiles = p.backward
    checkpoints = cp.empty((N, -(-T // tiles.steps), c, n), p.number)
    if tiles.steps == STRIP and p.strips:
        _run_strips(p, "CHECKPOINTS", delta_softplus, last=checkpoints)
    else:
        _run(p, "CHECKPOINTS", _checkpoint_tiles(p.forward, tiles), delta_softplus, state=p.state, last=checkpoints)

    parts = -(-(c // G) // tiles.channels)
    dA, dstate_in = cp.empty((N, c, n), p.number), cp.empty((N, c, n), p.number)
    dD, dbias = cp.empty((N, c), p.real), cp.empty((N, c), p.real)
    dB, dC = cp.empty((parts, N, T, G, n), p.number), cp.empty((parts, N, T, G, n), p.number)
    if tiles.tensor:
        dy = dy if _by_packs(dy, 2) else cp.ascontiguousarray(dy)
        sizes = (np.int32(T), np.int32(c), np.int32(G), np.int64(N), np.int32(delta_softplus))
    else:
        sizes = (np.int64(T), np.int32(c), np.int32(n), np.int32(G), np.int64(N), np.int32(delta_softplus), p.packed(tiles, dy, du))
    arguments = (
        *_rows(dy), *_rows(p.u), *_rows(p.delta), *_rows(p.z), p.B, *strides(p.B)[:3], p.C, *strides(p.C)[:3], p.A,
        *map(_pointer, (p.D, p.bias, checkpoints, dlast, du, ddelta, dz, dA, dD, dbias, dB, dC, dstate_in)), *sizes,
    )  # fmt: skip
    _gradient_kernel(p.types, tiles)((p.blocks(tiles),), (tiles.threads,), arguments, _shared(p, tiles))
    shape = (*p.batch, T, c)
    maps = {name: _maps_gradient(x, p.grouped[name], given, p.batch) for name, x, given in (("B", dB, B), ("C", dC, C))}
    return {
        "u": du.reshape(shape), "delta": ddelta.reshape(shape), "A": dA.sum(axis=0), **maps, "D": dD.sum(axis=0),
        "z": None if dz is None else dz.reshape(shape), "delta_bias": dbias.sum(axis=0), "state": dstate_in.reshape(*p.batch, c, n),
    }  # fmt: skip


def raise_for_states(n):
    """A gradient without states is left to the reference."""
    if n == 0:
        raise NotImplementedError("selective_scan: the gradient of n = 0 states is not in the mirror")


def _maps_gradient(parts, grouped, given, batch):
    """Sums over blocks of channels; over groups too, where all share one map."""
    total = parts.sum(axis=0)  # (N, T, G, n)
    own = given.shape[-2] if grouped else 1
    if own == 1 and total.shape[2] > 1:
        total = total.sum(axis=2, keepdims=True)
    total = total if grouped else total[:, :, 0]
    return total.reshape(*batch, *total.shape[1:])


def _shared(p: _Prepared, tiles: Tiles) -> int:
    """Bytes of `GradientShared`, or of `TensorGradientShared`."""
    if tiles.tensor:
        CH, TT, threads = tiles.channels, tiles.steps, tiles.threads
        halves = 2 * (4 * TT * CH + 2 * 320) + 2 * TT * (CH + 8)
        floats = 4 * (CH * (TT + 4) + CH // 2) + threads * TT + 6 * TT * (CH + 4) + threads // 2 * TT + 12 * threads + 2 * CH
        return 2 * halves + 6 * 16 + 4 * floats
    real, number, NS = p.real.itemsize, p.number.itemsize, tiles.lanes * tiles.states
    parts = (
        tiles.steps * tiles.channels * 4 * real, 2 * tiles.steps * NS * number, tiles.steps // 4 * tiles.threads * tiles.states * number,
        tiles.threads // 32 * tiles.steps * 2 * NS * number, tiles.steps * tiles.channels * 4 * real, 2 * tiles.steps * tiles.channels * real, 8 * tiles.steps * tiles.channels * np.dtype(p.types[0]).itemsize, 6 * 8,
    )  # fmt: skip
    return sum(-(-part // 16) * 16 for part in parts) + 16
