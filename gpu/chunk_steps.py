"""The steps of `chunkwise.Memory` on NumPy arrays: what each of them is. `chunk_kernels.py` has the same for a device.

Products read arrays of the precision `operand`; sums are formed, and states handed from chunk to chunk, in `wide`, float32 for the
halves. What a device would round between two steps is rounded here.

For bfloat16, products read bfloat16. For float16 they do not read float16, in which a memory overflows at 65504 and a product of small
queries and keys loses its digits, but TF32, float16's 11 digits with float32's range, in arrays of float32: tensor cores leave the
other digits out, so that whatever is stored for them is rounded first.
"""

import numpy as np
from refimpl.gpu.arrays import cast

from refimpl.core.dtypes import HALF
from refimpl.core.linalg import solve_unit_lower
from refimpl.core.numerics import constant, gate_exponents, silu, times_exp


class Steps:
    """NumPy's. Arrays are (G, H, T/L, L, features), with 1 in place of H where heads share one.

    Parameters
    ----------
    dtype : dtype
        The call's precision.

    Attributes
    ----------
    operand, wide : dtype
        Of what products read, and of sums.
    tf32 : bool
        Whether `operand` is float32 of which 11 digits are read.
    """

    xp = np

    def __init__(self, dtype) -> None:
        dtype = np.dtype(dtype)
        self.wide = np.dtype(np.float32) if dtype.name in HALF else dtype
        self.tf32 = dtype == np.float16
        self.operand = self.wide if self.tf32 else dtype

    # -- layout --------------------------------------------------------------------------------------------------------

    def cut(self, x, length: int, features: bool = True):
        """(G, H, T, f) as (G, H, T/L, L, f): zeros after the end, and with `features` after the last one, as `padded` has them."""
        chunks = max(1, -(-x.shape[2] // length))
        more = (chunks * length - x.shape[2], self._more(x.shape[3]) if features else 0)
        return self._filled(x, more).reshape(*x.shape[:2], chunks, length, x.shape[3] + more[1])

    def padded(self, state):
        """(G, H, d, e) with as many rows and columns as `cut` gives keys and values."""
        return self._filled(state, tuple(self._more(size) for size in state.shape[2:]))

    def _more(self, size: int) -> int:
        """Tensor cores want halves in runs of 16 bytes."""
        return -size % 8 if self.operand.itemsize == 2 else 0

    def _filled(self, x, more: tuple[int, int]):
        if more == (0, 0):
            return x
        rows, columns = x.shape[2:]
        full = self.xp.zeros((*x.shape[:2], rows + more[0], columns + more[1]), _raw(x).dtype)
        full[:, :, :rows, :columns] = _raw(x)
        return full.view(x.dtype)

    def with_ones(self, v):
        """One more feature, 1 at every step."""
        ones = cast(self.xp.ones((*v.shape[:-1], 1), self.wide), v.dtype)
        return self.xp.concatenate([_raw(v), _raw(ones)], axis=-1).view(v.dtype)

    # -- elementwise ---------------------------------------------------------------------------------------------------

    def store(self, x):
        """What a product can read."""
        return _tf32(cast(x, self.operand)) if self.tf32 else cast(x, self.operand)

    def scaled(self, x, factor):
        """x times a factor of each row, or of each element, for a product to read."""
        return self.store(cast(x, self.wide) * factor)

    def faded(self, x, exponent):
        """x e^exponent, likewise; 0 for x = 0, however large the exponent."""
        return self.store(self.grown(x, exponent))

    def grown(self, x, exponent):
        """x e^exponent in the precision of sums."""
        return times_exp(cast(x, self.wide), exponent)

    def dots(self, x, y):
        """Sums of x y along the last axis."""
        return (cast(x, self.wide) * cast(y, self.wide)).sum(axis=-1)

    def finish(self, within, before, factor=None, exponent=None, x=None, D=None, z=None, scale=1, dtype=None):
        """(scale (within + factor before) + D x) silu(z), in `dtype` or the precision of sums.

        The factor, or its logarithm, is a number of each row, D of each head; what is None is left out.
        """
        y = self.grown(before, exponent) if exponent is not None else before if factor is None else factor * before
        y = constant(scale, before) * (y if within is None else within + y)
        y = y if D is None else y + D.reshape(*D.shape, *(1,) * (y.ndim - 2)) * cast(x, self.wide)
        y = y if z is None else y * silu(cast(z, self.wide))
        return cast(y, dtype or self.wide)

    # -- products ------------------------------------------------------------------------------------------------------

    def product(self, a, b):
        """a b for each chunk, in the precision of sums."""
        return cast(a, self.wide) @ cast(b, self.wide)

    # -- decays --------------------------------------------------------------------------------------------------------

    def spans(self, w):
        """Of log-decays (..., L, f): F relative to its largest value, the logarithms of that and of what is left of F_{L-1}, log K_s.

        What is not finite is no largest value: a decay of 0 stays one.
        """
        sums = np.cumsum(w, axis=-2)
        peak = np.maximum(np.where(np.isfinite(sums), sums, np.zeros_like(sums)).max(axis=-2), 0)  # (..., f)
        kept = np.concatenate([_from_behind(w)[..., 1:, :], np.zeros_like(w[..., :1, :])], axis=-2)
        return np.exp(sums - peak[..., None, :]), peak, sums[..., -1, :] - peak, kept

    def spans_vjp(self, dw, of_since, of_kept, held):
        """dw_r and the cotangents of all exponents that span r: of F_t for t >= r, of K_s for s < r, of F_{L-1} (..., f)."""
        before = np.concatenate([np.zeros_like(of_kept[..., :1, :]), np.cumsum(of_kept, axis=-2)[..., :-1, :]], axis=-2)
        return dw + held[..., None, :] + before + _from_behind(of_since)

    def weigh(self, product, w, strict: bool, gain=None):
        """product ∘ E on and below the diagonal (`strict`: below), for a product to read; w (..., L, 1).

        The gain (..., L, 1) is one more exponent of each column.
        """
        return self.store(self._under(times_exp(product, _exponents_of_pairs(w, gain)), strict))

    def weigh_vjp(self, product, weights, w, strict: bool, gain=None):
        """Cotangents of the product (for a product to read) and of w (..., L, 1), of those of the weights."""
        faded = self._under(times_exp(weights, _exponents_of_pairs(w, gain)), strict)
        return self.store(faded), _over_spans(faded * product)[..., None]

    def pairs(self, q, k, w, strict: bool):
        """M_ts = Σ_i q_ti k_si e^(w_(s+1)i + ... + w_ti), likewise; w (..., L, d)."""
        q, k = (cast(x, self.wide).swapaxes(-1, -2) for x in (q, k))
        terms = q[..., :, None] * times_exp(k[..., None, :], _exponents(w))  # (..., d, L, L)
        return self.store(self._under(terms.sum(axis=-3), strict))

    def pairs_vjp(self, q, k, w, weights, strict: bool):
        """Cotangents of q, k and w, (..., L, d) each."""
        q, k, weights = q.astype(self.wide), k.astype(self.wide), self._under(weights, strict)
        A, q, k = _exponents(w), q.swapaxes(-1, -2)[..., :, None], k.swapaxes(-1, -2)[..., None, :]
        to_q = weights[..., None, :, :] * times_exp(k, A)  # (..., d, L, L)
        to_k = weights[..., None, :, :] * times_exp(q, A)
        return tuple(x.swapaxes(-1, -2) for x in (to_q.sum(axis=-1), to_k.sum(axis=-2), _over_spans(to_q * q)))

    def inverse(self, weights, beta):
        """(I + diag(β) A)⁻¹, for a product to read."""
        eye = np.broadcast_to(np.eye(weights.shape[-1], dtype=self.wide), weights.shape)
        return self.store(solve_unit_lower(beta * cast(weights, self.wide), eye))

    # -- from chunk to chunk -------------------------------------------------------------------------------------------

    def carry(self, added, peak, rest, state):
        """x_c = e^peak x, then x <- e^rest x_c + added_c: all x_c, for products to read, and the last x."""
        entering = []
        for c in range(added.shape[2]):
            state = self.grown(state, peak[:, :, c, :, None])
            entering.append(self.store(state))
            state = self.grown(state, rest[:, :, c, :, None]) + added[:, :, c]
        return np.stack(entering, axis=2), state

    def carry_back(self, added, peak, rest, state):
        """x_c = x, then x <- e^peak (e^rest x + added_c), last chunk first."""
        leaving = []
        for c in reversed(range(added.shape[2])):
            leaving.append(self.store(state))
            state = self.grown(self.grown(state, rest[:, :, c, :, None]) + added[:, :, c], peak[:, :, c, :, None])
        return np.stack(leaving[::-1], axis=2), state

    @staticmethod
    def _under(x, strict: bool):
        return np.tril(x, -1 if strict else 0)


def _from_behind(x):
    """Sums over the steps from each to the last."""
    return np.flip(np.cumsum(np.flip(x, -2), axis=-2), -2)


def _raw(x):
    """An array to be moved as it is: not every operation of CuPy's knows bfloat16."""
    return x.view(np.uint16) if x.itemsize == 2 else x


def _tf32(x):
    """float32 rounded to 11 binary digits; halves away from 0."""
    rounded = ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def _exponents(w):
    """w_{s+1} + ... + w_t at [t, s] of each feature: (..., L, f) -> (..., f, L, L)."""
    w = w.swapaxes(-1, -2)
    return gate_exponents(w, np.zeros_like(w))


def _exponents_of_pairs(w, gain):
    """Of decays of a head, with those of the columns: (..., L, L)."""
    A = _exponents(w)[..., 0, :, :]
    return A if gain is None else A + gain.swapaxes(-1, -2)


def _over_spans(z):
    """Σ_{s < r <= t} z_ts at r: (..., L, L) -> (..., L)."""
    before = np.concatenate([np.zeros_like(z[..., :1]), np.cumsum(z, axis=-1)[..., :-1]], axis=-1)  # of s < r
    return np.tril(before).sum(axis=-2)
