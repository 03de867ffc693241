"""`attention` on the device: tensor cores where they compute in the arrays' precision, plain arithmetic everywhere else.

Which kernel runs (`docs/gpu/attention.md` has what was measured):

    decoding   halves, few queries for many keys (those of all heads that share a key head at most 16), head size 64 or 128, no
               mask or bias: ``kernel_attention_decode.cu``
    hopper     halves on sm_90, head sizes to 128 in steps of 8: ``kernel_attention_hopper.cu``; the gradient, without mask and
               bias: ``kernel_attention_hopper_ordered.cu`` from `FIVE_PRODUCTS` queries and keys on, and
               ``kernel_attention_hopper_gradient.cu`` for fewer, for head sizes to 64 and for softcap
    tiled      all else, in float32 (halves too) or float64: ``kernel_attention.cu``; float32 of head sizes to 128, without mask, bias
               and softcap: ``kernel_attention_float.cu``

Arrays are read as they lie; one copy is made of an array whose last axis is not contiguous, or whose batch axes are not one.
Tiles of pairs that position, or a mask, hides are not computed. The gradient is made of sums in a fixed order: the same
bits every time.
"""

from typing import Any, NamedTuple

import cupy as cp
import numpy as np
from refimpl.gpu import mirror, tensor_map
from refimpl.gpu.arrays import arithmetic, flat
from refimpl.gpu.launch import Kernel, capability, multiprocessors, shared_memory

from refimpl.ops.attention.attention import CONTRACT

TILED, FLOAT, DECODE = "kernel_attention.cu", "kernel_attention_float.cu", "kernel_attention_decode.cu"
HOPPER, HOPPER_GRADIENT = "kernel_attention_hopper.cu", "kernel_attention_hopper_gradient.cu"
ORDERED = "kernel_attention_hopper_ordered.cu"
FIVE_PRODUCTS = 1024  # with fewer there is little to gain, and less was tried
TYPES = {"float32": "float", "float64": "double", "float16": "float16", "bfloat16": "bfloat16"}
HALVES = ("float16", "bfloat16")
CALL = np.dtype(
    [(name, "i8", 3) for name in ("q", "k", "v", "dy")] + [(name, "i8", 4) for name in ("mask", "bias")]
    + [("scale", "f8"), ("softcap", "f8")]
    + [(name, "i4") for name in ("B", "Hq", "Hkv", "n", "m", "d", "e", "below", "above", "vectors", "splits", "heads")]
)  # fmt: skip
RAW = np.dtype((np.void, CALL.itemsize))  # as kernels take it: CuPy needs not know what is inside
NOTHING = np.uintp(0)
SLICES = ((64, 3), (32, 2))  # features, or keys, of a slice, and how many in shared memory: on Hopper, on a device with less of it
L2 = 24 << 20  # bytes of keys and values that are read from memory once for all rows of their heads


class Problem(NamedTuple):
    """One call: arrays (B, heads, rows, columns), the sink of each head, and the structure `Call` of the kernels."""

    q: Any
    k: Any
    v: Any
    mask: Any
    bias: Any
    sink: Any
    call: np.ndarray
    batch: tuple

    @property
    def maps(self) -> bool:
        return self.mask is not None or self.bias is not None

    @property
    def options(self) -> tuple:
        return tuple(NOTHING if x is None else x for x in (self.mask, self.bias, self.sink))


@mirror.form(CONTRACT)
def attention(
    q, k, v, *, causal=False, offset=None, window=None, mask=None, bias=None, scale=None, softcap=None, sink=None, return_lse=False
):
    """`refimpl.attention`: arguments, shapes and results are the same.

    Notes
    -----
    float32 is computed in float32 (no TF32). Halves are multiplied as they are and summed in float32; weights are rounded to
    the halves before they meet the values. A value of infinity or NaN behind a mask spoils its tile's rows (the reference's not).
    """
    problem = prepare(q, k, v, causal, offset, window, mask, bias, scale, softcap, sink)
    o, lse = forward(problem)
    shape = (*problem.batch, *o.shape[1:])
    return (o.reshape(shape), lse.reshape(shape[:-1])) if return_lse else o.reshape(shape)


@mirror.gradient(CONTRACT)
def attention_vjp(
    dy, q, k, v, *, causal=False, offset=None, window=None, mask=None, bias=None, scale=None, softcap=None, sink=None, return_lse=False
):
    """Gradient of `attention`: of q, k, v, and of bias and sink where given. The forward pass is made again."""
    problem = prepare(q, k, v, causal, offset, window, mask, bias, scale, softcap, sink)
    o, lse = forward(problem)
    do, *rest = dy if isinstance(dy, tuple) else (dy,)
    do, dlse = rows_of(do, problem.batch), cp.ascontiguousarray(rest[0]).reshape(lse.shape).astype(lse.dtype) if rest else None
    if takes_tensor_cores(problem) and not problem.maps:
        dq, dk, dv, across = hopper_backward(problem, do, o, lse, dlse)
        dbias = None
    else:
        across = -(do.astype(lse.dtype) * o.astype(lse.dtype, copy=False)).sum(axis=-1)
        across = across if dlse is None else across + dlse
        dq, dk, dv, dbias = backward(problem, do, lse, across)
    found = {"q": dq, "k": dk, "v": dv, "bias": dbias}
    if sink is not None:
        finite = cp.where(cp.isneginf(lse), lse.dtype.type(0), lse)
        found["sink"] = (cp.exp(problem.sink[:, None] - finite) * across).sum(axis=-1)
    return {name: g.reshape(*problem.batch, *g.shape[1:]) for name, g in found.items() if g is not None}


def prepare(q, k, v, causal, offset, window, mask, bias, scale, softcap, sink) -> Problem:
    """Axes, strides and the band of keys that position allows, i + below <= j <= i + above for query i."""
    batch = np.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v)), *(x.shape[:-3] for x in (mask, bias) if x is not None))
    (Hq, n, d), (Hkv, m, e) = q.shape[-3:], v.shape[-3:]
    q, k, v = (rows_of(x, batch) for x in (q, k, v))
    mask, bias = (None if x is None else flat(cp.broadcast_to(x, (*x.shape[:-3], Hq, n, m)), batch, 3) for x in (mask, bias))
    at = m - n if offset is None else int(offset)
    left, right = (None, None) if window is None else window
    right = 0 if causal else right  # causal is the window (None, 0), and both hold
    within = lambda x: min(max(int(x), -n - 1), m + 1)  # beyond that it makes no difference
    call = np.zeros(1, CALL)
    size = q.itemsize
    for name, x in {"q": q, "k": k, "v": v, "mask": mask, "bias": bias}.items():
        if x is not None:
            call[name][0] = [s // x.itemsize for s in x.strides[: call[name].shape[-1]]]
    whole = all(x.data.ptr % 16 == 0 and all(s % 16 == 0 for s in x.strides[:-1]) for x in (q, k, v))
    call["scale"], call["softcap"] = d**-0.5 if scale is None else float(scale), 0 if softcap is None else float(softcap)
    call["below"], call["above"] = within(-n - 1 if left is None else at - left), within(m + 1 if right is None else at + right)
    call["vectors"] = whole and d * size % 16 == 0 and e * size % 16 == 0
    for name, value in zip(("B", "Hq", "Hkv", "n", "m", "d", "e"), (q.shape[0], Hq, max(Hkv, 1), n, m, d, e), strict=True):
        call[name] = value
    if sink is not None:
        sink = cp.ascontiguousarray(cp.broadcast_to(sink.astype(arithmetic(q.dtype)), (Hq,)))
    return Problem(q, k, v, mask, bias, sink, call, batch)


def rows_of(x, batch):
    """(B, heads, rows, columns), rows contiguous."""
    x = flat(x, batch, 3)
    return x if x.strides[-1] == x.itemsize or x.shape[-1] <= 1 else cp.ascontiguousarray(x)


def forward(p: Problem):
    """o (B, Hq, n, e), in a half where tensor cores made it, and lse (B, Hq, n)."""
    call = p.call[0]
    if (
        p.q.dtype.name in HALVES
        and not p.maps
        and call["d"] == call["e"]
        and call["d"] in (64, 128)
        and call["vectors"]
        and call["B"] < 2**16
    ):
        if call["m"] >= 256 and 0 < call["Hq"] // call["Hkv"] * call["n"] <= 16 and call["scale"] > 0:
            return decode(p)
    return hopper(p) if takes_tensor_cores(p) else tiled(p)


def takes_tensor_cores(p: Problem) -> bool:
    """Whether Hopper's kernels do it: halves, head sizes to 128 in steps of 8."""
    call = p.call[0]
    there = min(call[x] for x in ("B", "Hq", "n", "m", "e")) > 0 and call["scale"] > 0  # of scores the largest is that of products
    sizes = max(call["d"], call["e"]) <= 128 and call["d"] % 8 == 0 and call["e"] % 8 == 0
    return p.q.dtype.name in HALVES and there and sizes and capability() == "90"


def results(p: Problem, dtype=None):
    """Empty o and lse."""
    accumulator = arithmetic(p.q.dtype)
    shape = (*p.q.shape[:-1], p.v.shape[-1])
    return cp.empty(shape, accumulator if dtype is None else dtype), cp.empty(shape[:-1], accumulator)


def _tiled(name: str) -> Kernel:
    A = "double" if name == "float64" else "float"
    return Kernel(TILED, f"attention_tiled<{TYPES[name]}, {A}, 4, 4>", spills=name == "float64")


def _float(columns: int, width: int, ring: int) -> Kernel:
    return Kernel(FLOAT, f"attention_float<{columns // 16}, {width}, {ring}>")


def tiled(p: Problem):
    """Plain arithmetic. Head sizes to 128 in float32 without mask, bias and softcap take the large tiles."""
    call, name = p.call[0], p.q.dtype.name
    if name == "float32" and not p.maps and call["softcap"] == 0 and call["scale"] > 0 and call["d"] <= 128:
        for slices in SLICES:
            if _float_shared(*slices) <= shared_memory():
                return tiled_float(p, *slices)
    o, lse = results(p)
    size = o.itemsize
    width, vector = 128 // size, 16 // size
    shared = size * (64 * (64 + vector) + 3 * max(128 * (width + vector), width * 64))
    grid = int(call["B"]) * int(call["Hq"]) * -(-int(call["n"]) // 64) * max(1, -(-int(call["e"]) // 64))
    _tiled(name)((grid,), (256,), (p.call.view(RAW), p.q, p.k, p.v, *p.options, o, lse), shared)
    return o, lse


def _float_shared(width: int, ring: int) -> int:
    return 4 * (128 * 132 + 8 * 16 * 72 + ring * width * 132) + 16 * ring


def tiled_float(p: Problem, width: int, ring: int, together: int | None = None):
    """Tiles of 128 queries and 128 keys in float32."""
    call = p.call.copy()
    heads, tiles = int(call["B"][0]) * int(call["Hq"][0]), -(-int(call["n"][0]) // 128)
    # The longest rows of a group of heads come first; a group keeps all multiprocessors busy several times over, so that it ends well.
    call["heads"] = together or -(-heads // max(1, heads * tiles // (4 * multiprocessors())))
    columns = 64 if call["e"] <= 64 else 128
    o, lse = results(p)
    grid = heads * tiles * max(1, -(-int(call["e"][0]) // columns))
    _float(columns, width, ring)((grid,), (256,), (call.view(RAW), p.q, p.k, p.v, p.options[2], o, lse), _float_shared(width, ring))
    return o, lse


def _gradient(name: str, of: str) -> Kernel:
    A, columns = ("double", 2) if name == "float64" else ("float", 4)
    return Kernel(TILED, f"attention_gradient<{TYPES[name]}, {A}, {of}, {columns}>", spills=name == "float64")


def backward(p: Problem, do, lse, across):
    """dq, dk, dv, and the bias's gradient for every pair, by plain arithmetic; across = dlse - do.o of each query."""
    call, name, A = p.call.copy(), p.q.dtype.name, lse.dtype
    call["dy"][0] = [s // do.itemsize for s in do.strides[:3]]
    call["vectors"] &= do.data.ptr % 16 == 0 and all(s % 16 == 0 for s in do.strides[:-1])
    c = call[0]
    dbias = None if p.bias is None else cp.zeros((*p.q.shape[:-1], int(c["m"])), A)
    width, vector = 128 // A.itemsize, 16 // A.itemsize
    shared = A.itemsize * (64 * (64 + vector) + 3 * max(128 * (width + vector), width * 64))
    columns_of = 32 if name == "float64" else 64  # columns of the result that a block makes
    found = []
    for of, like, columns in (("QUERIES", p.q, "d"), ("KEYS", p.k, "d"), ("VALUES", p.v, "e")):
        out = cp.empty(like.shape, A)
        grid = like.shape[0] * like.shape[1] * -(-like.shape[2] // 64) * -(-int(c[columns]) // columns_of)
        maps = p.options[:2]
        _gradient(name, of)(
            (grid,), (256,), (call.view(RAW), p.q, p.k, p.v, do, *maps, lse, across, out, NOTHING if dbias is None else dbias), shared
        )
        found.append(out)
    return (*found, dbias)


# -- tensor cores --------------------------------------------------------------------------------------------------------


def _hopper(name: str, D: int, warpgroups: int, keys: int, capped: bool, maps: bool) -> Kernel:
    flags = ", ".join("true" if x else "false" for x in (capped, maps))
    return Kernel(HOPPER, f"attention_forward<{TYPES[name]}, {D}, {warpgroups}, {keys}, {flags}>", hopper=True)


def hopper(p: Problem, warpgroups: int | None = None, keys: int | None = None):
    """wgmma, with tiles brought by the bulk tensor copy engine."""
    call, name = p.call.copy(), p.q.dtype.name
    c = call[0]
    D = 64 if max(c["d"], c["e"]) <= 64 else 128
    plain = not p.maps and c["softcap"] == 0
    W = warpgroups or (3 if D == 64 and plain else 2)
    keys = keys or (176 if D == 128 and plain and c["m"] >= 8192 else 128)
    q, k, v = (x if tensor_map.fits(x) else cp.ascontiguousarray(x) for x in (p.q, p.k, p.v))
    for key, x in (("q", q), ("k", k), ("v", v)):
        call[key][0] = [s // x.itemsize for s in x.strides[:3]]
    heads, tiles = int(c["B"]) * int(c["Hq"]), -(-int(c["n"]) // (64 * W))
    group = int(c["Hq"]) // int(c["Hkv"])
    fit = max(1, L2 // (int(c["m"]) * (int(c["d"]) + int(c["e"])) * 2)) * group
    call["heads"] = min(heads, fit)
    o, lse = results(p, p.q.dtype)
    maps = (tensor_map.panels(q, 64 * W), tensor_map.panels(k, keys), tensor_map.panels(v, keys))
    shared = 1024 + (64 * W + 4 * keys) * D * 2 + 256
    kernel = _hopper(name, D, W, keys, bool(c["softcap"] > 0), p.maps)
    kernel(
        (min(heads * tiles, multiprocessors()),),
        (128 * (W + 1),),
        (call.view(RAW), *maps, *p.options, o, lse, cp.zeros(1, np.int32)),
        shared,
    )
    return o, lse


def _hopper_gradient(name: str, of: str, *more) -> Kernel:
    spills = (of, *more) == ("gradient_keys", 128, "true")
    return Kernel(HOPPER_GRADIENT, f"attention_{of}<{', '.join((TYPES[name], *map(str, more)))}>", hopper=of != "across", spills=spills)


def _ordered(name: str) -> Kernel:
    return Kernel(ORDERED, f"attention_gradient_ordered<{TYPES[name]}>", hopper=True, spills=True)


def _sum(name: str) -> Kernel:
    return Kernel(ORDERED, f"attention_gradient_sum<{TYPES[name]}>", hopper=True)


def hopper_backward(p: Problem, do, o, lse, dlse):
    """dq, dk, dv in the arrays' precision, and across = dlse - do.o (B, Hq, n)."""
    call, name = p.call.copy(), p.q.dtype.name
    B, Hq, Hkv, n, m, d, e = (int(call[x][0]) for x in ("B", "Hq", "Hkv", "n", "m", "d", "e"))
    q, k, v, do = (x if tensor_map.fits(x) else cp.ascontiguousarray(x) for x in (p.q, p.k, p.v, do))
    for key, x in (("q", q), ("k", k), ("v", v), ("dy", do)):
        call[key][0] = [s // x.itemsize for s in x.strides[:3]]
    D, capped = 64 if max(d, e) <= 64 else 128, "true" if call["softcap"][0] > 0 else "false"
    padded = -(-n // 128) * 128
    lse2, across = cp.empty((2, B, Hq, padded), np.float32)
    _hopper_gradient(name, "across")((-(-B * Hq * padded // 32),), (128,), (
        call.view(RAW), o, do, lse, NOTHING if dlse is None else dlse, across, lse2, np.int32(padded)))  # fmt: skip
    shared = 1024 + 2 * 128 * D * 2 + 3 * (2 * 64 * D * 2 + 2 * 64 * 4) + 64
    if D == 128 and capped == "false" and min(n, m) >= FIVE_PRODUCTS:
        return (*in_order(call, name, (q, k, v, do), lse2, across, padded), across[..., :n])
    found = []
    for of, heads, rows, boxes, passing in (
        ("queries", Hq, n, (128, 64, 64, 128), (p.k.nbytes + p.v.nbytes) // (B * Hkv)),
        ("keys", Hkv, m, (64, 128, 128, 64), (q.nbytes + do.nbytes) // (B * Hkv)),
    ):
        maps = [tensor_map.panels(x, box) for x, box in zip((q, k, v, do), boxes, strict=True)]
        call["heads"] = min(B * heads, max(1, L2 // (passing + 1)) * heads // Hkv)
        out = [cp.empty(x.shape, x.dtype) for x in ((q,) if of == "queries" else (k, v))]
        kernel = _hopper_gradient(name, f"gradient_{of}", D, capped)
        kernel((B * heads * -(-rows // 128),), (384,), (call.view(RAW), *maps, lse2, across, np.int32(padded), *out), shared)
        found += out
    return (*found, across[..., :n])


def in_order(call, name: str, arrays, lse2, across, padded: int, turns: tuple[int, int] | None = None):
    """dq, dk, dv by five products; the parts of dq are added up in a fixed order."""
    q, k, v, do = arrays
    B, Hq, Hkv, n, m = (int(call[x][0]) for x in ("B", "Hq", "Hkv", "n", "m"))
    tiles, parts_of = -(-m // 128), B * Hq * -(-n // 64)
    # Heads in work at the same time: so many that a block starts about two steps after the one before it, and few enough for L2.
    heads = max(1.0, 5.4 * multiprocessors() / max(1, -(-n // 64)))
    together, apart = turns or (-(-int(heads) // tiles), max(1, round(tiles / heads)))
    call["heads"], call["splits"] = together, apart
    items = together * -(-tiles // apart) * (tiles + apart * (-(-B * Hkv // together) - 1))
    maps = [tensor_map.panels(x, box) for x, box in zip(arrays, (64, 128, 128, 64), strict=True)]
    dq, dk, dv = (cp.empty(x.shape, x.dtype) for x in (q, k, v))
    parts, order = cp.empty(parts_of * 64 * 128, np.float32), cp.zeros(1 + 2 * parts_of, np.int32)
    shared = 1024 + 3 * 2**16 + 2**15 + 2 * 512 + 256  # K and V, Q and dO, dS, dQ, of each query two numbers, barriers
    _ordered(name)((items,), (384,), (call.view(RAW), *maps, lse2, across, np.int32(padded), parts, order, dk, dv), shared)
    _sum(name)((parts_of,), (256,), (call.view(RAW), parts, order, dq))
    return dq, dk, dv


def _portions(name: str, D: int, halves: int) -> Kernel:
    return Kernel(DECODE, f"attention_portions<{TYPES[name]}, {D}, {halves}>")


def _merge(name: str) -> Kernel:
    return Kernel(DECODE, f"attention_merge<{TYPES[name]}>")


def decode(p: Problem, splits: int | None = None):
    """Portions of the keys side by side, then merged: flash-decoding."""
    call, name = p.call.copy(), p.q.dtype.name
    B, Hq, Hkv, n, m, d = (int(call[x][0]) for x in ("B", "Hq", "Hkv", "n", "m", "d"))
    splits = splits or max(1, min(16 * multiprocessors() // (B * Hkv), m // 256))
    call["splits"] = splits
    part_o, part_lse = cp.empty((B, Hq, n, splits, d), np.float32), cp.empty((B, Hq, n, splits), np.float32)
    o, lse = results(p, p.q.dtype)
    halves = 1 if Hq // Hkv * n <= 8 else 2
    _portions(name, d, halves)((splits, Hkv, B), (128,), (call.view(RAW), p.q, p.k, p.v, part_o, part_lse))
    sink = NOTHING if p.sink is None else p.sink
    _merge(name)((-(-B * Hq * n // 4),), (128,), (call.view(RAW), part_o, part_lse, sink, o, lse))
    return o, lse


KERNELS = (
    *(_tiled(name) for name in TYPES),
    *(_float(columns, *slices) for columns in (64, 128) for slices in SLICES),
    *(_gradient(name, of) for name in TYPES for of in ("QUERIES", "KEYS", "VALUES")),
    *(_hopper(name, D, 2, 128, capped, maps) for name in HALVES for D in (64, 128) for capped in (False, True) for maps in (False, True)),
    *(_hopper(name, 64, 3, 128, False, False) for name in HALVES),
    *(_hopper(name, 128, 2, 176, False, False) for name in HALVES),
    *(_hopper_gradient(name, "across") for name in HALVES),
    *(
        _hopper_gradient(name, f"gradient_{of}", *sizes)
        for name in HALVES
        for of in ("queries", "keys")
        for sizes in ((64, "false"), (64, "true"), (128, "false"), (128, "true"))
    ),
    *(of(name) for of in (_ordered, _sum) for name in HALVES),
    *(_portions(name, D, halves) for name in HALVES for D in (64, 128) for halves in (1, 2)),
    *(_merge(name) for name in HALVES),
)
