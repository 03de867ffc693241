"""How a mirrored operator takes its arguments: the chapter's own contract, on arrays that are already on the device."""

import functools
from collections.abc import Callable
from typing import Any

import cupy as cp
import numpy as np

from refimpl.core.contract import Contract


def form(contract: Contract) -> Callable[[Callable], Callable]:
    """Decorate a mirrored operator: shapes, errors, heads and precisions are the chapter's (`Contract.form`).

    Inside, arrays are CuPy's, of one precision (half precisions as they are, not widened; states in float32); batch
    axes are not broadcast yet. Half results may be returned in float32 and are rounded outside.
    """
    return lambda function: _on_device(contract, function, contract.form(function, half=True))


def gradient(contract: Contract) -> Callable[[Callable], Callable]:
    """The same for an adjoint (`Contract.gradient`): a dict of gradients, in the normalised shapes, in any precision."""
    return lambda function: _on_device(contract, function, contract.gradient(function, half=True))


def on_device(value: Any, operator: str) -> Any:
    """An argument as CuPy's, without a copy: arrays of torch, JAX and others that share device memory are taken as they are.

    Raises
    ------
    TypeError
        If the array lies in the host's memory.
    """
    if isinstance(value, tuple):
        parts = [on_device(v, operator) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, cp.ndarray):
        return value
    if hasattr(value, "__dlpack_device__") and value.__dlpack_device__()[0] == 2:  # kDLCUDA
        return cp.from_dlpack(value.detach() if hasattr(value, "detach") else value)
    if hasattr(value, "__cuda_array_interface__"):
        return cp.asarray(value)
    if (isinstance(value, np.ndarray) and value.ndim) or hasattr(value, "__dlpack_device__"):
        raise TypeError(
            f"{operator}: arrays must be on the device, got a {type(value).__name__} in host memory; cupy.asarray copies it there"
        )
    return value


def _on_device(contract: Contract, function: Callable, inner: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args, **kwargs):
        args = [on_device(a, contract.name) for a in args]
        return inner(*args, **{k: on_device(v, contract.name) for k, v in kwargs.items()})

    call.contract = contract  # type: ignore[attr-defined]
    return call
