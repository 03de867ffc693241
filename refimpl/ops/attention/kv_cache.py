"""The key-value cache: what attention remembers, how many bytes that takes, and what fewer bits do to the result.

A decoder computes k_t and v_t once, and keeps them; each new query then attends to all that was kept. Three policies:

    growing      every token stays; bytes grow in proportion to the length
    rolling      the last w tokens stay: exactly attention with the window (w - 1, 0), in constant memory
    quantised    entries of b bits in groups that share a smallest value and a step:
                 code = round((x - low) / step),  step = (high - low) / (2^b - 1),  x̂ = low + step code             (1)

By (1) no entry is off by more than step / 2. Keys have channels that are large throughout, so a group of keys is a run of
tokens of one channel; values have none, so a group of values is a run of channels of one token [1, section 3.1]. The last
tokens, too few for a group of keys, are kept as they are.

What that does to attention: with |k̂ - k| <= κ, |v̂ - v| <= ν, a score moves by at most δ_j = scale Σ_c |q_c| κ_jc, hence a
weight by a factor within e^{±2δ}, δ = max δ_j, and, since weights sum to 1 before and after,

    |ô - o| <= Σ_j p̂_j ν_j + (e^{2δ} - 1) Σ_j p̂_j |v̂_j - ô|                                                      (2)

stated in what the cache still has (p̂, v̂), so that it can be evaluated without the originals.

Glossary
    k, v      appended keys and values, shape (..., H, T, d) and (..., H, T, e)
    group     entries that share low and step            G [1, section 3.2]
    recent    tokens not yet quantised                    the residual [1, section 3.2]

Where implementations differ
    KIVI [1] stores the zero point as an integer; here low is kept in the entries' precision. Some caches group keys by token:
    cheaper to append to, and several times less exact where a channel is large.

References
    [1] Z. Liu et al., "KIVI: a tuning-free asymmetric 2bit quantization for KV cache", ICML 2024, sections 3.1-3.2.
    [2] A. Q. Jiang et al., "Mistral 7B", 2023, section 2 (rolling buffer cache).
"""

import numpy as np

from refimpl.core.options import positive_int

__all__ = ["KVCache"]


class KVCache:
    """Keys and values of a sequence so far.

    Parameters
    ----------
    window : int, optional
        Keep only the last `window` tokens.
    bits : {8, 4}, optional
        Quantise entries, by rule (1).
    group : int
        Entries that share a smallest value and a step; used with `bits`.

    Raises
    ------
    ValueError
        If `window` or `group` is not an integer of at least 1, or `bits` is neither 8 nor 4; from `append`, if shapes do not
        fit each other or what is cached.

    Notes
    -----
    `append` of one token costs O(H (d + e)), and now and then the quantisation of a group. `view` costs O(H T (d + e)).
    The error of what `view` returns is at most `entry_error`, and of attention to it `output_error`.

    References
    ----------
    [1, section 3.2], [2, section 2].

    Examples
    --------
    >>> import numpy as np
    >>> cache = KVCache(window=2)
    >>> for t in range(3):
    ...     cache.append(np.full((1, 1, 4), t), np.full((1, 1, 4), t))
    >>> k, v = cache.view()
    >>> k[0, :, 0], cache.start
    (array([1, 2]), 1)
    """

    def __init__(self, *, window=None, bits=None, group=32):
        if window is not None:
            positive_int("KVCache", "window", window)
        positive_int("KVCache", "group", group)
        if bits not in (None, 8, 4):
            raise ValueError(f"KVCache: bits must be 8, 4 or None, got {bits!r}")
        self.window, self.bits, self.group = window, bits, group
        self.length = 0
        self._keys: list = []  # quantised runs of `group` tokens, or with bits=None nothing
        self._values: list = []
        self._recent = None  # (k, v) not quantised

    @property
    def start(self) -> int:
        """Position of the oldest token that is visible."""
        return 0 if self.window is None else max(0, self.length - self.window)

    def append(self, k, v):
        """Add tokens at the end.

        Parameters
        ----------
        k : ndarray, shape (..., H, T, d)
        v : ndarray, shape (..., H, T, e)
        """
        k, v = np.asarray(k), np.asarray(v)
        if k.ndim < 2 or v.ndim < 2 or k.shape[:-1] != v.shape[:-1]:
            raise ValueError(f"KVCache: k and v must have shapes (..., T, d) and (..., T, e), got {k.shape} and {v.shape}")
        if self._recent is None:
            self._recent = k[..., :0, :].copy(), v[..., :0, :].copy()
        for name, new, old in zip("kv", (k, v), self._recent, strict=True):
            if new.shape[:-2] != old.shape[:-2] or new.shape[-1] != old.shape[-1]:
                raise ValueError(f"KVCache: {name} must continue shape {(*old.shape[:-2], '...', old.shape[-1])}, got {new.shape}")
        self._recent = tuple(np.concatenate([old, new], axis=-2) for old, new in zip(self._recent, (k, v), strict=True))
        self.length += k.shape[-2]
        self._settle()

    def view(self):
        """What attention sees.

        Returns
        -------
        k : ndarray, shape (..., H, t, d)
        v : ndarray, shape (..., H, t, e)
            The last t = length - start tokens, in order.

        Raises
        ------
        ValueError
            If nothing was ever appended: the shapes are not known.
        """
        return self._collect(lambda run: run.restored(), lambda x: x)

    def entry_error(self):
        """Bounds on |k̂ - k| and |v̂ - v|, in the shapes of `view`: step / 2, and the rounding of (1)."""
        return self._collect(lambda run: run.error(), np.zeros_like)

    def output_error(self, q, *, scale=None):
        """Bound (2) on what quantisation does to attention of `q` to the whole view.

        Parameters
        ----------
        q : ndarray, shape (..., H, n, d)
        scale : float, optional
            1/√d by default.

        Returns
        -------
        ndarray, shape (..., H, n, e)
        """
        k, v = self.view()
        dk, dv = self.entry_error()
        scale = 1 / np.sqrt(q.shape[-1]) if scale is None else scale
        s = scale * (q @ k.mT)  # (..., n, t)
        p = np.exp(s - s.max(axis=-1, keepdims=True))
        p = p / p.sum(axis=-1, keepdims=True)
        delta = (abs(scale) * (abs(q) @ dk.mT)).max(axis=-1, keepdims=True)  # (..., n, 1)
        o = p @ v
        away = (p[..., None] * abs(v[..., None, :, :] - o[..., None, :])).sum(axis=-2)  # (..., n, e)
        return p @ dv + np.expm1(2 * delta) * away

    def bytes(self) -> int:
        """Bytes that the entries take: packed codes, smallest values and steps, and recent tokens."""
        recent = sum(x.nbytes for x in self._recent) if self._recent is not None else 0
        return recent + sum(run.bytes() for run in (*self._keys, *self._values))

    def _settle(self):
        """Quantise whole groups of recent tokens, and drop what is out of sight."""
        k, v = self._recent
        while self.bits is not None and k.shape[-2] >= self.group:
            self._keys.append(_Run(k[..., : self.group, :], self.bits, self.group, axis=-2))
            self._values.append(_Run(v[..., : self.group, :], self.bits, self.group, axis=-1))
            k, v = k[..., self.group :, :].copy(), v[..., self.group :, :].copy()
        if self.window is not None:
            first = self.length - k.shape[-2] - self.group * len(self._keys)  # position of the oldest token kept
            while self._keys and first + self.group <= self.start:
                del self._keys[0], self._values[0]
                first += self.group
            if not self._keys and k.shape[-2] > self.window:
                k, v = k[..., -self.window :, :].copy(), v[..., -self.window :, :].copy()
        self._recent = k, v

    def _collect(self, of_run, of_recent):
        if self._recent is None:
            raise ValueError("KVCache: nothing was appended yet, so the shapes of k and v are not known")
        seen = self.length - self.start
        parts = []
        for runs, recent in zip((self._keys, self._values), self._recent, strict=True):
            x = np.concatenate([*map(of_run, runs), of_recent(recent)], axis=-2)
            parts.append(x[..., x.shape[-2] - seen :, :])
        return tuple(parts)


class _Run:
    """A run of tokens, quantised in groups along one axis, codes packed two to a byte where they have 4 bits."""

    def __init__(self, x, bits, group, axis):
        self.dtype, self.shape, self.axis, self.bits = x.dtype, x.shape, axis, bits
        compute = np.float64 if x.dtype == np.float64 else np.float32
        groups = _grouped(x.astype(compute), group, axis)  # (..., group), the last one padded with its own last entry
        low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
        self.low, self.step = low, (high - low) / (2**bits - 1)
        codes = np.rint((groups - low) / np.where(self.step == 0, np.ones_like(self.step), self.step)).astype(np.uint8)
        self.size = codes.shape[-1]
        self.codes = codes if bits == 8 else _packed(codes)

    def restored(self):
        codes = self.codes if self.bits == 8 else _unpacked(self.codes, self.size)
        return _ungrouped(self.low + self.step * codes, self.shape, self.axis).astype(self.dtype)

    def error(self):
        """Half a step, the roundings of (1) in the arithmetic of `low`, and that of giving the entry back in its own precision."""
        reach = abs(self.low) + self.step * (2**self.bits - 1)
        unit = np.finfo(self.low.dtype).eps
        own = 0.0 if self.dtype == self.low.dtype else 2.0**-8 if self.dtype.itemsize == 2 and self.dtype.kind != "f" else np.finfo(self.dtype).eps
        error = np.broadcast_to(self.step / 2 * (1 + 4 * unit) + (4 * unit + own) * reach, (*self.low.shape[:-1], self.size))
        return _ungrouped(error, self.shape, self.axis)

    def bytes(self):
        return self.codes.nbytes + self.low.nbytes + self.step.nbytes


def _grouped(x, group, axis):
    """Entries along an axis in groups of `group`: (..., groups, group)."""
    x = np.moveaxis(x, axis, -1)
    group = min(group, x.shape[-1]) or 1
    short = -x.shape[-1] % group
    x = np.concatenate([x, np.repeat(x[..., -1:], short, axis=-1)], axis=-1)
    return x.reshape(*x.shape[:-1], -1, group)


def _ungrouped(groups, shape, axis):
    """Back, without the padding."""
    x = groups.reshape(*groups.shape[:-2], -1)[..., : shape[axis]]
    return np.moveaxis(x, -1, axis)


def _packed(codes):
    """Two codes of 4 bits to a byte, the first in the low bits."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    return codes[..., ::2] | codes[..., 1::2] << 4


def _unpacked(packed, size):
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)[..., :size]
