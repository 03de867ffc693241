"""What adapters share: telling frameworks apart, spreading and folding batch axes, refusing."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np


def is_torch(x: Any) -> bool:
    return type(x).__module__.partition(".")[0] == "torch"


def is_jax(x: Any) -> bool:
    return not isinstance(x, np.ndarray) and hasattr(x, "at")


def spread(x, shape: tuple[int, ...]):
    """Broadcast, in the array's own framework."""
    if is_torch(x):
        return x.expand(shape)
    if is_jax(x):
        import jax.numpy as jnp

        return jnp.broadcast_to(x, shape)
    return np.broadcast_to(x, shape)


def leading(*pairs: tuple[Any, int]) -> tuple[int, ...]:
    """The batch axes common to arrays, each given with its number of other axes."""
    return np.broadcast_shapes(*(tuple(x.shape)[: x.ndim - core] for x, core in pairs if x is not None))


def fold(x, core: int, lead: tuple[int, ...]):
    """All batch axes as one: ``(batch, *core)``."""
    if x is None:
        return None
    shape = tuple(x.shape)[x.ndim - core :]
    return spread(x, (*lead, *shape)).reshape((math.prod(lead), *shape))


def unfold(x, lead: tuple[int, ...]):
    return x.reshape((*lead, *tuple(x.shape)[1:]))


def refuse(condition: bool, why: str) -> None:
    if condition:
        raise NotImplementedError(why)


def stock(array, like):
    """A NumPy array in another's framework, on its device."""
    if is_torch(like):
        import torch

        return torch.from_numpy(np.ascontiguousarray(array)).to(like.device)
    if is_jax(like):
        import jax.numpy as jnp

        return jnp.asarray(array)
    return array


def like_operator(operator: str) -> Callable:
    """Name an adapter's result after the operator and the function adapted, for reports."""

    def name(adapter: Callable) -> Callable:
        @functools.wraps(adapter)
        def build(f, *args, **kwargs):
            candidate = adapter(f, *args, **kwargs)
            candidate.__name__ = candidate.__qualname__ = f"{adapter.__name__}({getattr(f, '__name__', type(f).__name__)})"
            return candidate

        build.operator = operator  # type: ignore[attr-defined]
        return build

    return name
