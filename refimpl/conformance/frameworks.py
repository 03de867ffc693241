"""Arrays of NumPy, torch, JAX and CuPy: made with a chosen memory layout, and read back bit by bit.

Frameworks are imported when asked for, and only then.
"""

import contextlib
from typing import Any

import numpy as np

from refimpl.conformance import disk

_array = np.array  # kept, since a candidate may replace what NumPy calls by this name


class Numpy:
    """NumPy itself; the others have the same methods."""

    name = "numpy"

    def __init__(self, device: str | None = None):
        if device not in (None, "cpu"):
            raise ValueError(f"check: framework {self.name!r} has no device {device!r}")

    def array(self, x: np.ndarray, view: str) -> Any:
        if view == "transposed" and x.ndim > 1:
            return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)
        if view == "strided" and x.ndim:
            wide = _poisoned((*x.shape[:-1], 2 * x.shape[-1] + 1), x.dtype)
            wide[..., 1::2] = x
            return wide[..., 1::2]
        if view == "reversed" and x.ndim:
            return np.ascontiguousarray(x[..., ::-1])[..., ::-1]
        if view == "repeated" and repeats(x):
            return np.lib.stride_tricks.as_strided(x[:1].copy(), x.shape, (0, *x[:1].copy().strides[1:]))
        return x.copy()

    def numpy(self, y: Any) -> np.ndarray:
        if isinstance(y, bool | int | float | complex | np.generic):
            return np.array(y)
        if not isinstance(y, np.ndarray) and not hasattr(y, "__array__") and not hasattr(y, "__dlpack__"):
            raise TypeError(f"returned {type(y).__name__}, not an array")
        if not isinstance(y, np.ndarray) and hasattr(y, "detach"):
            return Torch.to_numpy(y)
        return _array(y, copy=True, subok=False)

    def overwrite(self, x: Any, value: np.ndarray) -> None:
        """Put other values into an array's memory."""
        x[...] = value

    def gradient(self, function, positional: list, keywords: dict, names: list, cotangents, alone: str = "", other: tuple | None = None, twice: bool = False) -> dict:
        """Gradients by argument, or of the argument `alone` only.

        `other`, a call, is made between the function's and its backward pass; `twice` gives what a second such pass does.
        """
        raise TypeError("NumPy functions have no gradient of their own: pass candidate_vjp")

    def inference(self) -> contextlib.AbstractContextManager:
        """The framework's mode without gradients."""
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        pass


class Torch(Numpy):
    name = "torch"

    def __init__(self, device: str | None = None):
        import torch

        self.torch, self.device = torch, device or "cpu"
        torch.empty(0, device=self.device)

    def array(self, x: np.ndarray, view: str) -> Any:
        torch = self.torch
        t = self._from_numpy(x).to(self.device)
        if view == "transposed" and t.ndim > 1:
            return t.swapaxes(-1, -2).contiguous().swapaxes(-1, -2)
        if view == "strided" and t.ndim:
            wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), 0, dtype=t.dtype, device=t.device)
            if t.is_floating_point() or t.is_complex():
                wide = wide + float("nan") if t.element_size() > 1 else wide
            wide[..., 1::2] = t
            return wide[..., 1::2]
        if view == "reversed" and t.numel():  # torch has no negative strides: an unaligned start instead
            buffer = torch.empty(t.numel() + 3, dtype=t.dtype, device=t.device)
            buffer[3:] = t.reshape(-1)
            return buffer[3:].view(t.shape)
        if view == "repeated" and repeats(x):
            return t[:1].clone().expand(t.shape)
        return t

    def _from_numpy(self, x: np.ndarray):
        torch = self.torch
        x = np.array(x, order="C", copy=True)
        if x.dtype.isbuiltin == 1 and x.dtype.name != "float128" and hasattr(torch, x.dtype.name):
            return torch.from_numpy(x.reshape(-1)).reshape(x.shape)
        bits = {1: np.uint8, 2: np.int16}[x.dtype.itemsize]
        return torch.from_numpy(x.reshape(-1).view(bits)).view(getattr(torch, x.dtype.name)).reshape(x.shape)

    @staticmethod
    def to_numpy(y) -> np.ndarray:
        import torch

        y = y.detach().resolve_conj().resolve_neg().cpu().contiguous()
        name = str(y.dtype).removeprefix("torch.")
        if name == "bfloat16" or name.startswith("float8"):
            import ml_dtypes

            bits = torch.int16 if name == "bfloat16" else torch.uint8
            flat = y.reshape(-1).view(bits).numpy().copy()
            return flat.view(getattr(ml_dtypes, name)).reshape(tuple(y.shape))
        return _array(y.numpy(), copy=True)

    def overwrite(self, x: Any, value: np.ndarray) -> None:
        with self.torch.no_grad():
            x.copy_(self._from_numpy(value))

    def numpy(self, y: Any) -> np.ndarray:
        return self.to_numpy(y) if isinstance(y, self.torch.Tensor) else super().numpy(y)

    def gradient(self, function, positional: list, keywords: dict, names: list, cotangents, alone: str = "", other: tuple | None = None, twice: bool = False) -> dict:
        torch = self.torch

        def leaf(x):
            if isinstance(x, tuple):
                parts = [leaf(v) for v in x]
                return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
            return x.requires_grad_() if isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex()) else x

        def leaves_of(positional, keywords):
            return [leaf(x) if alone in ("", n) else x for n, x in zip(names, positional, strict=True)], {
                n: leaf(x) if alone in ("", n) else x for n, x in keywords.items()
            }

        positional, keywords = leaves_of(positional, keywords)
        outputs = flat(function(*positional, **keywords))
        if other is not None:
            positional_between, keywords_between = leaves_of(*other)
            function(*positional_between, **keywords_between)
        given = dict(zip(names, positional, strict=True)) | keywords
        leaves = [x for x in flat(list(given.values())) if isinstance(x, torch.Tensor) and x.requires_grad]
        pairs = [(o, c) for o, c in zip(outputs, flat(cotangents), strict=False) if o.requires_grad and c is not None]
        grads = [None] * len(leaves)  # of results that depend on nothing: zeros
        if pairs:
            for again in (True, False) if twice else (False,):
                grads = torch.autograd.grad([o for o, _ in pairs], leaves, [c.to(o.dtype) for o, c in pairs], allow_unused=True, retain_graph=again)
        grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
        found = {id(x): g for x, g in zip(leaves, grads, strict=True)}

        def pick(x):
            if isinstance(x, tuple):
                return tuple(pick(v) for v in x)
            return found.get(id(x))

        return {n: g for n, x in given.items() if (g := pick(x)) is not None and not (isinstance(g, tuple) and all(v is None for v in g))}

    def inference(self) -> contextlib.AbstractContextManager:
        return self.torch.no_grad()

    def synchronize(self) -> None:
        if str(self.device).startswith("cuda"):
            self.torch.cuda.synchronize()


class Jax(Numpy):
    name = "jax"

    def __init__(self, device: str | None = None):
        import jax

        jax.config.update("jax_enable_x64", True)  # float64 candidates need it; float32 stays float32
        self.jax, self.device = jax, jax.devices(device)[0] if device else None
        _keep_compiled(jax)

    def array(self, x: np.ndarray, view: str) -> Any:
        return self.jax.device_put(np.array(x, order="C", copy=True), self.device)

    def numpy(self, y: Any) -> np.ndarray:
        return _array(y, copy=True)

    def overwrite(self, x: Any, value: np.ndarray) -> None:
        """JAX's arrays cannot be changed: the first values stay."""

    def gradient(self, function, positional: list, keywords: dict, names: list, cotangents, alone: str = "", other: tuple | None = None, twice: bool = False) -> dict:
        jax = self.jax
        given = dict(zip(names, positional, strict=True)) | {n: v for n, v in keywords.items() if _has_arrays(v, jax.Array)}
        options = {n: v for n, v in keywords.items() if n not in given}
        inexact = lambda x: isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.numpy.inexact)
        smooth = {n: v for n, v in given.items() if all(map(inexact, flat(v))) and alone in ("", n)}
        rest = {n: v for n, v in given.items() if n not in smooth}

        def call(arguments):
            arguments = arguments | rest
            return flat(function(*[arguments[n] for n in names], **{n: v for n, v in arguments.items() if n not in names}, **options))

        outputs, pull = jax.vjp(call, smooth)
        if other is not None:
            function(*other[0], **other[1])
        seeds = flat(cotangents) + [None] * len(outputs)
        seeds = [jax.numpy.zeros_like(o) if c is None else c.astype(o.dtype) for o, c in zip(outputs, seeds, strict=False)]
        for _ in range(2 if twice else 1):
            (grads,) = pull([jax.numpy.conj(s) for s in seeds])
        return {n: jax.tree.map(jax.numpy.conj, g) for n, g in grads.items()}  # JAX's cotangents are the conjugates of ours


def _keep_compiled(jax) -> None:
    """What XLA compiles for one shape after the other, hundreds of them in a check, is kept for the next check, unless the user has a place for it."""
    place = disk.folder("jax")
    if place is None or jax.config.jax_compilation_cache_dir:
        return
    try:
        from jax.experimental.compilation_cache import compilation_cache

        place.mkdir(parents=True, exist_ok=True)
        disk.make_room(place, suffixes=("-cache", "-atime"))
        jax.config.update("jax_compilation_cache_dir", str(place))
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        compilation_cache.reset_cache()  # or it stays unused where something was compiled before
    except (OSError, ImportError, AttributeError):
        return


class Cupy(Numpy):
    name = "cupy"

    def __init__(self, device: str | None = None):
        import cupy

        self.cupy = cupy
        if device is not None:
            cupy.cuda.Device(int(device.rpartition(":")[2] or 0)).use()

    def array(self, x: np.ndarray, view: str) -> Any:
        cupy = self.cupy
        t = cupy.asarray(np.ascontiguousarray(x).reshape(x.shape))
        if view == "transposed" and t.ndim > 1:
            return cupy.ascontiguousarray(t.swapaxes(-1, -2)).swapaxes(-1, -2)
        if view == "strided" and t.ndim:
            wide = cupy.asarray(_poisoned((*x.shape[:-1], 2 * x.shape[-1] + 1), x.dtype))
            wide[..., 1::2] = t
            return wide[..., 1::2]
        if view == "reversed" and t.ndim:
            return cupy.ascontiguousarray(t[..., ::-1])[..., ::-1]
        return cupy.broadcast_to(t[:1], t.shape) if view == "repeated" and repeats(x) else t.copy()

    def overwrite(self, x: Any, value: np.ndarray) -> None:
        x[...] = self.cupy.asarray(value)

    def numpy(self, y: Any) -> np.ndarray:
        return self.cupy.asnumpy(y) if isinstance(y, self.cupy.ndarray) else super().numpy(y)

    def synchronize(self) -> None:
        self.cupy.cuda.Device().synchronize()


FRAMEWORKS = {c.name: c for c in (Numpy, Torch, Jax, Cupy)}


def framework(name: str, device: str | None = None) -> Numpy:
    """A framework by name.

    Raises
    ------
    ValueError
        If the name is unknown.
    ImportError
        If it is not installed.
    """
    if name not in FRAMEWORKS:
        raise ValueError(f"check: framework must be one of {', '.join(FRAMEWORKS)}, got {name!r}")
    try:
        return FRAMEWORKS[name](device)
    except ImportError as error:
        raise ImportError(f"check: framework {name!r} is not installed ({error})") from None


def repeats(x: np.ndarray) -> bool:
    """Whether all rows along the first axis are the same."""
    return x.ndim > 1 and x.shape[0] > 1 and x.size > 0 and bool(np.all(x == x[:1]))


def flat(tree: Any) -> list:
    """Leaves of nested tuples and lists, in order."""
    if isinstance(tree, tuple | list):
        return [leaf for branch in tree for leaf in flat(branch)]
    return [tree]


def _has_arrays(value, kind) -> bool:
    return any(isinstance(v, kind) for v in flat(value))


def _poisoned(shape: tuple, dtype: np.dtype) -> np.ndarray:
    """Memory around the values that nobody may read: NaN, or the largest integer."""
    filler = {"i": lambda: np.iinfo(dtype).max, "u": lambda: np.iinfo(dtype).max, "b": lambda: True}.get(dtype.kind, lambda: np.nan)()
    return np.full(shape, filler, dtype=dtype)
