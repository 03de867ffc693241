"""Ternary weights in bytes: four to a byte by two bits each, or five to a byte in base 3.

    2bit     byte = Σ_{i<4} (q_i + 1) 4^i          2 bits for a weight                                           (1)
    base3    byte = Σ_{i<5} (q_i + 1) 3^i          1.6 bits for a weight: 3^5 = 243 fit into 256                  (2)

log2 3 = 1.585 bits are the least that three values need. The first weight stands in the lowest digit; rows are filled up
with zeros to whole bytes, each row for itself, so that a row can be read alone. What a packed layer weighs is counted
here, not claimed: `PackedWeights.bits_per_weight` divides the bits that are stored, scale included, by the weights.

References
    [1] S. Ma et al., "The era of 1-bit LLMs: all large language models are in 1.58 bits", arXiv:2402.17764, section 2.
"""

from typing import NamedTuple

import numpy as np

from refimpl.core.options import one_of
from refimpl.ops.quantization.ternary import absmax_quantize, binary_quantize, ternary_quantize

__all__ = ["PackedWeights", "bitlinear_packed", "pack_ternary", "pack_weights", "unpack_ternary"]

_LAYOUTS = {"2bit": (4, 4), "base3": (3, 5)}  # the base of a digit, and digits in a byte


def pack_ternary(q, *, layout="2bit"):
    """Pack weights -1, 0, 1 into bytes along the last axis.

    Parameters
    ----------
    q : ndarray of int, shape (..., n)
        Values -1, 0 and 1.
    layout : {"2bit", "base3"}
        Four or five weights to a byte, equations (1) and (2).

    Returns
    -------
    packed : ndarray of uint8, shape (..., ceil(n / 4)) or (..., ceil(n / 5))

    Raises
    ------
    ValueError, TypeError
        If q has no axis, holds other values, or layout is none of these.

    Examples
    --------
    >>> import numpy as np
    >>> pack_ternary(np.array([1, 0, -1, -1, 1]), layout="base3")
    array([167], dtype=uint8)
    """
    q = np.asarray(q)
    one_of("pack_ternary", "layout", layout, _LAYOUTS)
    if q.dtype.kind not in "iu":
        raise TypeError(f"pack_ternary: q must be integer, got dtype {q.dtype}")
    if q.ndim == 0:
        raise ValueError("pack_ternary: q must have at least one axis, got shape ()")
    if q.size and (np.min(q) < -1 or np.max(q) > 1):
        raise ValueError(f"pack_ternary: q must hold -1, 0 and 1 only, got {np.min(q)} to {np.max(q)}")
    base, count = _LAYOUTS[layout]
    fill = np.zeros((*q.shape[:-1], -q.shape[-1] % count), q.dtype)
    digits = np.concatenate([q, fill], axis=-1).reshape(*q.shape[:-1], -1, count) + 1  # (..., bytes, count)
    return np.sum(digits * base ** np.arange(count), axis=-1).astype(np.uint8)


def unpack_ternary(packed, length, *, layout="2bit"):
    """The weights that `pack_ternary` packed.

    Parameters
    ----------
    packed : ndarray of uint8, shape (..., bytes)
    length : int
        Weights per row; the rest of the last byte is dropped.
    layout : {"2bit", "base3"}

    Returns
    -------
    q : ndarray of int8, shape (..., length)

    Raises
    ------
    ValueError, TypeError
        If packed is not uint8, length does not fit it, or layout is none of these.

    Examples
    --------
    >>> import numpy as np
    >>> unpack_ternary(np.array([167], np.uint8), 5, layout="base3")
    array([ 1,  0, -1, -1,  1], dtype=int8)
    """
    packed = np.asarray(packed)
    one_of("unpack_ternary", "layout", layout, _LAYOUTS)
    if packed.dtype != np.uint8 or packed.ndim == 0:
        raise TypeError(f"unpack_ternary: packed must be an array of uint8, got dtype {packed.dtype}, shape {packed.shape}")
    base, count = _LAYOUTS[layout]
    if isinstance(length, bool) or not isinstance(length, int | np.integer) or -(-length // count) != packed.shape[-1]:
        raise ValueError(f"unpack_ternary: length must fit {packed.shape[-1]} bytes of {count} weights, got {length!r}")
    digits = packed[..., None] // base ** np.arange(count) % base  # (..., bytes, count)
    return (digits.reshape(*packed.shape[:-1], -1)[..., :length] - 1).astype(np.int8)


class PackedWeights(NamedTuple):
    """A matrix of ternary or binary weights, packed: what a deployed `refimpl.bitlinear` keeps.

    Attributes
    ----------
    data : ndarray of uint8, shape (e, bytes)
        A row for each output.
    scale : ndarray, shape ()
        What a unit is worth.
    inputs : int
        c, weights per output.
    layout : str
        "2bit", "base3", or "1bit" for binary weights.
    """

    data: np.ndarray
    scale: np.ndarray
    inputs: int
    layout: str

    @property
    def nbytes(self) -> int:
        """Bytes that are stored: weights and scale."""
        return self.data.nbytes + self.scale.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Counted: eight times the bytes, over the number of weights."""
        return 8 * self.nbytes / (self.data.shape[0] * self.inputs)

    def unpack(self) -> np.ndarray:
        """The integers, (c, e)."""
        if self.layout == "1bit":
            bits = np.unpackbits(self.data, axis=-1, count=self.inputs, bitorder="little")
            return (2 * bits.astype(np.int8) - 1).T
        return unpack_ternary(self.data, self.inputs, layout=self.layout).T


def pack_weights(w, *, weights="ternary", layout="base3"):
    """Quantise and pack the weights of a linear layer.

    Parameters
    ----------
    w : ndarray, shape (c, e)
    weights : {"ternary", "binary"}
        As in `refimpl.bitlinear`. Binary weights take a bit each, whatever the layout.
    layout : {"2bit", "base3"}
        As in `refimpl.pack_ternary`.

    Returns
    -------
    PackedWeights

    Raises
    ------
    ValueError, TypeError
        If w is no matrix or an option is none of its values.

    Examples
    --------
    >>> import numpy as np
    >>> w = np.random.default_rng(0).standard_normal((4000, 100))
    >>> [round(pack_weights(w, layout=layout).bits_per_weight, 3) for layout in ("2bit", "base3")]
    [2.0, 1.6]
    >>> round(pack_weights(w, weights="binary").bits_per_weight, 3)
    1.0
    """
    w = np.asarray(w)
    one_of("pack_weights", "weights", weights, ("ternary", "binary"))
    if w.ndim != 2:
        raise ValueError(f"pack_weights: w must have shape (c, e), got {w.shape}")
    if weights == "binary":
        q, scale = binary_quantize(w)
        return PackedWeights(np.packbits(q.T > 0, axis=-1, bitorder="little"), scale, w.shape[0], "1bit")
    q, scale = ternary_quantize(w)
    return PackedWeights(pack_ternary(np.ascontiguousarray(q.T), layout=layout), scale, w.shape[0], layout)


def bitlinear_packed(x, packed, bias=None, *, activation_bits=8):
    """`refimpl.bitlinear` with weights that were packed once.

    Parameters
    ----------
    x : ndarray, shape (..., c)
    packed : PackedWeights
    bias : ndarray, shape (e,), optional
    activation_bits : int

    Returns
    -------
    y : ndarray, shape (..., e)

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit.

    Notes
    -----
    Integers throughout, 2 c e operations per token; the scales come last. The weights are unpacked in every call: this
    shows what is computed and what is stored, not how fast a kernel that reads the bytes would be.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> x, w = rng.standard_normal((3, 8)), rng.standard_normal((8, 4))
    >>> from refimpl.ops.quantization.bitlinear import bitlinear
    >>> bool(np.allclose(bitlinear_packed(x, pack_weights(w)), bitlinear(x, w)))
    True
    """
    x = np.asarray(x)
    if not isinstance(packed, PackedWeights):
        raise TypeError(f"bitlinear_packed: packed must be PackedWeights, got {type(packed).__name__}")
    if x.ndim == 0 or x.shape[-1] != packed.inputs:
        raise ValueError(f"bitlinear_packed: x must have shape (..., {packed.inputs}), got {x.shape}")
    x_q, step = absmax_quantize(x, bits=activation_bits)
    whole = x_q.astype(np.int64) @ packed.unpack().astype(np.int64)  # (..., e)
    y = (whole * (step[..., None] * packed.scale)).astype(step.dtype)
    return y if bias is None else y + bias
