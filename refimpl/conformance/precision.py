"""The precisions in which candidates are judged."""

from dataclasses import dataclass

import numpy as np

from refimpl.core.contract import Contract
from refimpl.core.dtypes import HALF

TF32 = "tf32"  # no dtype of its own: float32 arrays, of which products see 11 bits


@dataclass(frozen=True)
class Precision:
    """A floating-point format: its dtype, unit roundoff, the format it computes in, and the roundoff of what may be kept on the way.

    `store` is 0 where operands and intermediate results have as many bits as the arithmetic. Of tf32 it is twice the unit
    roundoff, since tensor cores may cut the lower bits off where code does not round.
    """

    name: str
    dtype: np.dtype
    unit: float
    compute: np.dtype
    compute_unit: float
    store: float

    @property
    def half(self) -> bool:
        """Whether results themselves are given back in a half precision."""
        return self.dtype.name in HALF

    @property
    def coarse(self) -> bool:
        """Whether right algorithms round so coarsely on the way that mistakes hide below the bound, and peers are asked."""
        return self.store > 0

    @property
    def common(self) -> float:
        """The roundoff of which a share may be common to all of a result: cutting bits off shortens everything alike; and
        constants are not kept in two or three bits."""
        return 4 * self.store if self.name == TF32 else min(self.unit, 2.0**-4)

    @property
    def narrow(self) -> bool:
        """Whether it holds eight bits, and results are usually given back in more."""
        return self.dtype.itemsize == 1

    @property
    def truth(self) -> np.dtype:
        """The precision in which the truth about it is computed."""
        return np.dtype(np.longdouble) if self.dtype == np.float64 else np.dtype(np.float64)

    @property
    def largest(self) -> float:
        import ml_dtypes

        return float(ml_dtypes.finfo(self.dtype).max)

    def cast(self, x: np.ndarray) -> np.ndarray:
        """A real array in this precision."""
        with np.errstate(over="ignore"):
            y = x.astype(self.dtype)
        return eleven_bits(y) if self.name == TF32 else y


def precision(name: str) -> Precision:
    """A precision by name.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    import ml_dtypes

    bits = {"float64": 53, "float32": 24, TF32: 11, "float16": 11, "bfloat16": 8, "float8_e4m3fn": 4, "float8_e5m2": 3}
    if name not in bits:
        raise ValueError(f"check: dtypes must be among {', '.join(bits)}, got {name!r}")
    kind = "float32" if name == TF32 else name
    dtype = np.dtype(getattr(ml_dtypes, kind)) if hasattr(ml_dtypes, kind) else np.dtype(kind)
    compute, unit = dtype if bits[kind] > 11 else np.dtype(np.float32), 2.0 ** -bits[name]
    return Precision(name, dtype, unit, compute, 2.0 ** -bits[compute.name], 2 * unit if name == TF32 else unit if bits[name] <= 11 else 0.0)


def eleven_bits(x: np.ndarray, cut: bool = False) -> np.ndarray:
    """Float32 numbers rounded to TF32's 11 significant bits, to the nearest, ties to even; or the others `cut` off."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    if not cut:
        bits = bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    rounded = (bits & np.uint32(0xFFFFE000)).view(np.float32).reshape(np.shape(x))
    return np.where(np.isfinite(x), rounded, x)


def rounded(contract: Contract, call: dict, to: Precision) -> dict | None:
    """A call's arrays in a precision (states in that of computation); None where a value overflows."""
    kinds = {a.name.partition(".")[0]: a.kind for a in contract.arrays}

    def cast(name: str, x):
        if isinstance(x, tuple):
            return type(x)(*(cast(name, part) for part in x))
        if not isinstance(x, np.ndarray) or x.dtype.kind not in "fc":
            return x
        wide = name == "state" or kinds[name] == "free"
        if x.dtype.kind == "c":
            return x.astype(np.result_type(to.compute, np.complex64))
        with np.errstate(over="ignore"):
            return x.astype(to.compute) if wide else to.cast(x)

    result = {name: cast(name, v) if name in kinds else v for name, v in call.items()}
    for name, value in result.items():
        for before, after in zip(_parts(call[name]), _parts(value), strict=True):
            if isinstance(after, np.ndarray) and after.dtype.kind not in "iub":
                if np.any(np.isfinite(before) & ~np.isfinite(after.astype(before.dtype))):
                    return None
    return result


def widened(call: dict, dtype: np.dtype) -> dict:
    """Exact copies of a call's floating arrays in a wider precision."""

    def widen(x):
        if isinstance(x, tuple) and hasattr(x, "_fields"):
            return type(x)(*map(widen, x))
        if not isinstance(x, np.ndarray) or (x.dtype.kind in "iub"):
            return x
        return x.astype(np.result_type(dtype, np.complex64) if x.dtype.kind == "c" else dtype)

    return {name: widen(v) for name, v in call.items()}


def _parts(value) -> tuple:
    return value if isinstance(value, tuple) and hasattr(value, "_fields") else (value,)


class _Rounding(np.ndarray):
    """An array whose every further result is rounded to a lesser precision, as code does that stores all it computes."""

    to: Precision | None = None

    def __array_finalize__(self, parent):
        self.to = getattr(parent, "to", None)

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **keywords):
        to = next(x.to for x in (*inputs, *(out or ())) if isinstance(x, _Rounding) and x.to is not None)
        plain = [x.view(np.ndarray) if isinstance(x, _Rounding) else x for x in inputs]
        if out is not None:
            keywords["out"] = tuple(x.view(np.ndarray) if isinstance(x, _Rounding) else x for x in out)
        result = getattr(ufunc, method)(*plain, **keywords)
        return tuple(rounding(r, to) for r in result) if isinstance(result, tuple) else rounding(result, to)

    def __array_function__(self, function, types, args, kwargs):
        result = super().__array_function__(function, types, args, kwargs)
        return result if self.to is None or not isinstance(result, np.ndarray) else rounding(result, self.to)


def rounding(x, to: Precision):
    """An array of which everything that is computed is rounded to a precision, step by step."""
    if not isinstance(x, np.ndarray | np.floating) or x.dtype.kind != "f":
        return x
    with np.errstate(over="ignore"):
        rounded = np.asarray(x).astype(to.dtype).astype(x.dtype).view(_Rounding)
    rounded.to = to
    return rounded
