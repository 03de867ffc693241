"""Who meets whom in attention, and at what score: equation (1) of `attention` and the pairs that it allows.

All forms take their scores from here, whole or tile by tile: `rows` and `keys` are slices of the n queries and m keys.
Causality is the window (None, 0), so position allows one band of keys, P - left <= j <= P + right with P = i + offset;
what the band does not show of a tile is neither masked nor computed.
"""

from typing import Any, NamedTuple

import numpy as np

from refimpl.core.numerics import constant, sqrt_of


def check_options(arguments, sizes):
    """What shapes cannot say; negative windows are refused because to flash-attn they mean "unbounded"."""
    for name in ("q", "k", "v", "bias", "sink"):
        value = arguments.get(name)
        if value is not None and value.dtype.kind == "c":
            raise TypeError(f"attention: {name} must be real, got dtype {value.dtype}")
    causal, offset, window = arguments.get("causal", False), arguments.get("offset"), arguments.get("window")
    if not isinstance(causal, bool):
        raise TypeError(f"attention: causal must be True or False, got {causal!r}")
    if offset is not None and not _is_integer(offset):
        raise TypeError(f"attention: offset must be an integer or None (aligned ends, m - n), got {offset!r}")
    if window is not None:
        if not isinstance(window, tuple | list) or len(window) != 2:
            raise ValueError(f"attention: window must be a pair (left, right) or None, got {window!r}")
        if not all(side is None or (_is_integer(side) and side >= 0) for side in window):
            raise ValueError(f"attention: window must hold integers of at least 0, or None for unbounded, got {window!r}")
    for name in ("scale", "softcap"):
        value = arguments.get(name)
        try:
            finite = value is None or (np.ndim(value) == 0 and not isinstance(value, bool | str | complex) and bool(np.isfinite(value)))
        except TypeError:
            raise TypeError(f"attention: {name} must be a real number, got {value!r}") from None
        if not finite:
            raise ValueError(f"attention: {name} must be a finite number, got {value!r}")
    softcap = arguments.get("softcap")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"attention: softcap must be positive, got {softcap!r}")


def _is_integer(x) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


class Pairs(NamedTuple):
    """All that decides a pair's score beside q and k."""

    scale: Any
    softcap: Any
    bias: np.ndarray | None  # broadcasts to (..., Hkv, G, n, m)
    mask: np.ndarray | None
    left: int | None
    right: int | None
    offset: int


def prepare(q, k, v, causal, offset, window, mask, bias, scale, softcap, sink):
    """Arrays with axes (Hkv, G) for heads, so that key heads broadcast over their group; sink (..., 1, 1)."""
    Hq, Hkv, n, m = q.shape[-3], k.shape[-3], q.shape[-2], k.shape[-2]
    G = Hq // max(Hkv, 1)
    left, right = (None, None) if window is None else window
    pairs = Pairs(
        scale=1 / sqrt_of(q.shape[-1], q) if scale is None else constant(scale, q),
        softcap=None if softcap is None else constant(softcap, q),
        bias=_grouped(bias, Hkv, G),
        mask=_grouped(mask, Hkv, G),
        left=left,
        right=0 if causal else right,  # causal is the window (None, 0), and both hold
        offset=m - n if offset is None else offset,
    )
    logit = np.full_like(q, -np.inf, shape=(1,)) if sink is None else np.atleast_1d(sink)
    sink = _grouped(logit[:, None, None], Hkv, G)  # (Hkv or 1, G or 1, 1, 1)
    q = q.reshape(*q.shape[:-3], Hkv, G, *q.shape[-2:])  # (..., Hkv, G, n, d)
    return q, k[..., None, :, :], v[..., None, :, :], sink, pairs


def _grouped(x, Hkv, G):
    """(..., Hq, n, m) -> (..., Hkv, G, n, m); heads of size 1, or none, broadcast."""
    if x is None or x.ndim < 3:
        return x
    heads = (Hkv, G) if x.shape[-3] == Hkv * G else (1, 1)
    return x.reshape(*x.shape[:-3], *heads, *x.shape[-2:])


def join(x):
    """(..., Hkv, G, a, b) -> (..., Hq, a, b)."""
    return None if x is None else x.reshape(*x.shape[:-4], x.shape[-4] * x.shape[-3], *x.shape[-2:])


def cotangents(dy, q):
    """do (..., Hkv, G, n, e) and dlse (..., Hkv, G, n, 1)."""
    do, *rest = dy if isinstance(dy, tuple) else (dy,)
    dlse = rest[0] if rest else np.zeros_like(do[..., 0])
    heads = q.shape[-4:-2]
    do = do.reshape(*do.shape[:-3], *heads, *do.shape[-2:])
    return do, dlse.reshape(*dlse.shape[:-2], *heads, dlse.shape[-1], 1)


def products(q, k, pairs):
    """scale q·k, scaled on the side where it cannot overflow if the result does not."""
    return (pairs.scale * q) @ k.mT if abs(pairs.scale) <= 1 else pairs.scale * (q @ k.mT)


def scores(raw, pairs, rows=None, keys=None):
    """(1) from the scaled products of `rows` and `keys`: capped, biased, and -∞ where the pair is not allowed."""
    n, m = raw.shape[-2:]
    rows, keys = rows or slice(0, n), keys or slice(0, m)
    s = raw
    if pairs.softcap is not None:
        s = pairs.softcap * np.tanh(s / pairs.softcap)
    if pairs.bias is not None:
        s = s + tile(pairs.bias, rows, keys)
        s = np.where(np.isneginf(tile(pairs.bias, rows, keys)), -np.inf, s)  # also where s is NaN
    allowed = _allowed(pairs, rows, keys)
    return s if allowed is None else np.where(allowed, s, -np.inf)


def _allowed(pairs, rows, keys):
    """Mask of a tile by position and by `mask`; None where all is allowed."""
    inside = _in_window(pairs, rows, keys)
    if pairs.mask is None:
        return inside
    mask = tile(pairs.mask, rows, keys)
    return mask if inside is None else mask & inside


def _in_window(pairs, rows, keys):
    """P - left <= j <= P + right; None where that holds throughout."""
    first, last = rows.start + pairs.offset, rows.stop - 1 + pairs.offset
    before = pairs.left is None or keys.start >= last - pairs.left
    after = pairs.right is None or keys.stop - 1 <= first + pairs.right
    if before and after:
        return None
    P, j = np.arange(first, last + 1)[:, None], np.arange(keys.start, keys.stop)  # (rows, 1), (keys)
    inside = np.full((P.size, j.size), True)
    if pairs.left is not None:
        inside = inside & (j >= P - pairs.left)
    if pairs.right is not None:
        inside = inside & (j <= P + pairs.right)
    return inside


def blocks(start, stop, size):
    """Slices of at most `size`, from start to stop."""
    return [slice(at, min(at + size, stop)) for at in range(start, stop, size)]


def seen_blocks(pairs, rows, m, size):
    """Blocks of the keys that some row of the tile can see; those that all rows see are apart, as they need no mask."""
    first, last = rows.start + pairs.offset, rows.stop - 1 + pairs.offset
    start, inner = (0, 0) if pairs.left is None else (max(0, first - pairs.left), max(0, last - pairs.left))
    stop, outer = (m, m) if pairs.right is None else (min(m, last + pairs.right + 1), min(m, first + pairs.right + 1))
    parts = ((start, inner), (inner, outer), (outer, stop)) if start <= inner <= outer <= stop else ((start, stop),)
    found = [keys for part in parts for keys in blocks(*part, size)]
    return [keys for keys in found if pairs.mask is None or tile(pairs.mask, rows, keys).any()]


def tile(x, rows, keys):
    """Rows and keys of an array whose axes may be of size 1."""
    return x[..., rows if x.shape[-2] != 1 else slice(None), keys if x.shape[-1] != 1 else slice(None)]
