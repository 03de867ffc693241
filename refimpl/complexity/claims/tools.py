"""What several sections compute with: growth, and operators in their other forms."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from refimpl.catalogue import catalogue
from refimpl.complexity.growth import Fit, fit
from refimpl.complexity.runs import measure

KIB, MIB, GIB = 2.0**10, 2.0**20, 2.0**30
A100 = {"tensor": 312e12, "fp32": 19.5e12, "bytes": 2.04e12, "sms": 108, "sram": 192 * KIB, "clock": 1.41e9}


def slope(f: Callable[[int], float], sizes: Sequence[int]) -> float:
    """d log f / d log n between the two largest sizes: the exponent, where they are large enough for the leading term."""
    low, high = sorted(sizes)[-2:]
    return float(np.log(f(high) / f(low)) / np.log(high / low))


@functools.cache
def counted(operator: str, name: str, **sizes: Any) -> Fit:
    """Growth of what a form costs with the sequence's length, counted on runs."""
    if operator == "attention":
        return fit(operator, name, Hq=1, Hkv=1, d=4, e=4, **sizes)
    return fit(operator, name, lengths=(8, 16, 32, 64, 128), **sizes)


@functools.cache
def per_state() -> float:
    """Operations of a selective scan for each element of its state and each step, counted: by how much more states cost."""
    T, c = 16, 4
    work = [measure("selective_scan", "recurrent", T=T, c=c, n=n).work for n in (8, 24)]
    return (work[1] - work[0]) / (16 * c * T)


def form(operator: str, name: str) -> Callable[..., Any]:
    """A form of an operator."""
    return catalogue()[operator].forms[name].function


def call_of(operator: str, seed: int = 0, **sizes: Any) -> dict[str, Any]:
    """One call of an operator's own sample, without the optional state."""
    call = catalogue()[operator].sample(np.random.default_rng(seed), **sizes)
    return {name: value for name, value in call.items() if name != "state" and value is not None}


def qkv(n: int, d: int, heads: int = 1, kv_heads: int | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    """Standard normal queries, keys and values."""
    rng = np.random.default_rng(seed)
    shapes = [(heads, n, d), (kv_heads or heads, n, d), (kv_heads or heads, n, d)]
    return dict(zip("qkv", (rng.standard_normal(shape) for shape in shapes)))


@functools.cache
def lengths(low: int, high: int) -> tuple[int, ...]:
    """Powers of two from one to the other."""
    return tuple(2**i for i in range(int(np.log2(low)), int(np.log2(high)) + 1))
