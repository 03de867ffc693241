"""Precisions and broadcasting: what an argument is computed in, and how a result or a gradient goes back to its argument's kind."""

import numpy as np

from refimpl.core.shapes import Array

HALF = frozenset(
    {"float16", "bfloat16", "float8_e4m3", "float8_e4m3fn", "float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2"}
    | {"float8_e5m2fnuz", "float8_e3m4", "float8_e8m0fnu", "float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn"}
)


def is_array(value) -> bool:
    """Whether a value is an array of NumPy, or one that answers to NumPy's functions (CuPy's)."""
    return isinstance(value, np.ndarray) or (hasattr(value, "__array_function__") and hasattr(value, "dtype"))


def real_dtype(dtype) -> np.dtype:
    """The real counterpart of a dtype: float32 of complex64."""
    dtype = np.dtype(dtype)
    return np.empty(0, dtype).real.dtype if dtype.kind == "c" else dtype


def unbroadcast(gradient: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum a gradient over the axes along which its argument, of `shape`, was broadcast (or spread a smaller one)."""
    if gradient.shape == shape:
        return gradient
    extra = gradient.ndim - len(shape)
    if extra > 0:
        gradient = gradient.sum(axis=tuple(range(extra)))
    axes = tuple(i for i, (g, s) in enumerate(zip(gradient.shape, shape, strict=True)) if s == 1 and g != 1)
    return gradient.sum(axis=axes, keepdims=True) if axes else gradient


def common(arrays: list[np.ndarray]) -> tuple[np.dtype | None, np.dtype | None]:
    """(compute, out) dtypes: halves compute in float32, and are given back only if there is one kind of them."""
    if any(a.dtype.kind == "O" for a in arrays):
        return None, None
    dtypes = {a.dtype for a in arrays if a.dtype.kind in "fc" or a.dtype.name in HALF}
    if not dtypes:
        return np.dtype(np.float64), np.dtype(np.float64)
    wide = [np.dtype(np.float32) if d.name in HALF else d for d in dtypes]
    compute = np.result_type(*wide)
    only_half = len(dtypes) == 1 and next(iter(dtypes)).name in HALF
    return compute, next(iter(dtypes)) if only_half else compute


def cast(value: np.ndarray, array: Array, compute: np.dtype | None) -> np.ndarray:
    """An argument in the precision of the computation, complex where it was; integers and booleans as they are."""
    if compute is None or array.kind not in ("number", "real", "free") or value.dtype.kind == "O":
        return value
    if array.kind == "free" and value.dtype.kind in "iu":
        return value
    complex_value = value.dtype.kind == "c"
    target = np.result_type(compute, np.complex64) if complex_value else real_dtype(compute)
    return value if value.dtype == target else value.astype(target, copy=False)  # CuPy copies bfloat16 to bfloat16


def rounded(value, out: np.dtype | None):
    """A result rounded to the half precision in which it is given back."""
    if out is None or out.name not in HALF or not is_array(value) or value.dtype.kind != "f":
        return value
    return value.astype(out)


def owned(value, given):
    """The result itself, or a copy where it is (part of) an argument: a state handed through must not be the caller's."""
    if isinstance(value, tuple):
        return type(value)(*(owned(v, given) for v in value)) if hasattr(value, "_fields") else tuple(owned(v, given) for v in value)
    on_host = isinstance(value, np.ndarray)
    shared = is_array(value) and any(isinstance(g, np.ndarray) == on_host and np.may_share_memory(value, g) for g in given)
    return value.copy() if shared else value


def like_argument(gradient, normal: np.ndarray, original: np.ndarray) -> np.ndarray:
    """A gradient in its argument's own shape, kind and dtype: broadcast axes summed, the imaginary part of a real one dropped."""
    gradient = unbroadcast(np.broadcast_to(gradient, np.broadcast_shapes(np.shape(gradient), normal.shape)), normal.shape)
    gradient = gradient.reshape(original.shape)
    if original.dtype.kind == "O" or gradient.dtype.kind == "O":
        return gradient.real if np.iscomplexobj(gradient) and not np.iscomplexobj(original) else gradient
    if original.dtype.kind != "c" and gradient.dtype.kind == "c":
        gradient = gradient.real
    floating = original.dtype.kind in "fc" or original.dtype.name in HALF
    if isinstance(gradient, np.ndarray) or gradient.dtype != original.dtype:  # a copy on the host; on a device it costs as much as the work
        return gradient.astype(original.dtype) if floating else gradient
    return gradient
