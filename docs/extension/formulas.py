"""The formulas of a form's cost: its function, called with letters in place of numbers."""

import builtins
import inspect
import math
import re
import types
from collections.abc import Callable
from typing import Any

import numpy as np

_DIGITS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_SUM, _PRODUCT, _NEGATIVE, _POWER, _ATOM = 1, 2, 3, 4, 9


class Letter:
    """A size that is not known yet: arithmetic with it writes the formula down. Comparisons take sizes for large."""

    def __init__(self, text: str, binds: int = _ATOM):
        self.text, self.binds = text, binds

    def __repr__(self) -> str:
        return self.text

    def inside(self, level: int) -> str:
        return self.text if self.binds >= level else f"({self.text})"

    def __add__(self, other):
        if _number(other) == 0:
            return self
        if isinstance(other, Letter) and other.text == self.text:
            return 2 * self
        if isinstance(other, Letter) and other.text.startswith("-") and other.binds >= _PRODUCT:
            return Letter(f"{self.text} - {other.text[1:]}", _SUM)
        return Letter(f"{self.text} + {_letter(other).text}", _SUM)

    def __radd__(self, other):
        return self if _number(other) == 0 else Letter(f"{_letter(other).text} + {self.text}", _SUM)

    def __sub__(self, other):
        return self if _number(other) == 0 else Letter(f"{self.text} - {_letter(other).inside(_PRODUCT)}", _SUM)

    def __rsub__(self, other):
        return Letter(f"{_letter(other).text} - {self.inside(_PRODUCT)}", _SUM)

    def __mul__(self, other):
        if isinstance(other, Letter):
            return Letter(f"{self.inside(_PRODUCT)} {other.inside(_PRODUCT)}", _PRODUCT)
        return other * self

    def __rmul__(self, other):
        if other in (0, 1):
            return other and self
        number, _, rest = self.text.partition(" ")
        if self.binds == _PRODUCT and rest and number.isdigit() and "/" not in self.text:
            return Letter(f"{other * int(number):g} {rest}", _PRODUCT)
        return Letter(f"{other:g} {self.inside(_PRODUCT)}", _PRODUCT)

    def __truediv__(self, other):
        return self if _number(other) == 1 else Letter(f"{self.inside(_PRODUCT)} / {_letter(other).inside(_NEGATIVE)}", _PRODUCT)

    def __rtruediv__(self, other):
        return Letter(f"{_letter(other).inside(_PRODUCT)} / {self.inside(_NEGATIVE)}", _PRODUCT)

    def __floordiv__(self, other):
        return Letter(f"⌊{self / other}⌋")

    def __rfloordiv__(self, other):
        return Letter(f"⌊{other / self}⌋")

    def __mod__(self, other):
        return Letter(f"({self.text} mod {_letter(other).text})")

    def __pow__(self, power):
        if _number(power) == 1:
            return self
        return Letter(f"{self.inside(_ATOM)}{str(power).translate(_DIGITS)}" if isinstance(power, int) else f"{self.inside(_ATOM)}^({power})", _POWER)

    def __rpow__(self, base):
        return Letter(f"{_letter(base).inside(_ATOM)}^{self.inside(_ATOM) if not self.text.startswith('⌈') else self.text}", _POWER)

    def __neg__(self):
        if match := re.fullmatch(r"⌊-([^⌊⌋]*)⌋", self.text):
            return Letter(f"⌈{match[1]}⌉")
        return Letter(f"-{self.inside(_PRODUCT)}", _NEGATIVE)

    def __bool__(self):
        return True

    def __gt__(self, other):
        return not isinstance(other, Letter)

    __ge__ = __gt__

    def __lt__(self, other):
        return False

    __le__ = __lt__


def formulas(cost: Callable) -> tuple[str, str, str] | None:
    """Work, depth and peak as text; None where the function asks more of its sizes than arithmetic.

    Examples
    --------
    >>> from refimpl.core.costs import log2_ceil
    >>> from refimpl.op import Cost
    >>> formulas(lambda T, c, batch=1: Cost(2 * T * c * batch, 2 * log2_ceil(T), T * T))
    ('2 T c batch', '2 ⌈log₂ T⌉', 'T²')
    """
    taken = inspect.signature(cost).parameters.values()
    sizes = {p.name: Letter(p.name) for p in taken if p.kind is not p.VAR_KEYWORD and not isinstance(p.default, bool) and (p.default is p.empty or not callable(p.default))}
    try:
        result = _with_letters(cost, {})(**sizes)
        return _squared(result.work), _squared(result.depth), _squared(result.peak)
    except (TypeError, ValueError, AttributeError, OverflowError):
        return None


def _squared(x: Any) -> str:
    return re.sub(r"\b([A-Za-z]\w*) \1\b", r"\1²", str(x))


def _number(x: Any) -> Any:
    return x if isinstance(x, int | float) else None


def _letter(x: Any) -> Letter:
    return x if isinstance(x, Letter) else Letter(f"{x:g}" if isinstance(x, float) else str(x))


def _named(name: str, plain: Callable) -> Callable:
    def call(*arguments):
        if not any(isinstance(a, Letter) for a in arguments):
            return plain(*arguments)
        return Letter(f"{name}({', '.join(_letter(a).text for a in arguments)})")

    return call


def _log2(x):
    return Letter(f"log₂ {x.inside(_ATOM)}", _POWER) if isinstance(x, Letter) else math.log2(x)


def _up(x):
    return (x if x.text.startswith("⌈") and x.text.endswith("⌉") else Letter(f"⌈{x.text}⌉")) if isinstance(x, Letter) else math.ceil(x)


def _larger(*arguments):
    """Sizes are more than 0, 1 or 2."""
    letters = [a for a in arguments if isinstance(a, Letter)]
    if len(letters) == 1 and all(isinstance(a, Letter) or a <= 2 for a in arguments):
        return letters[0]
    return _named("max", builtins.max)(*arguments)


def _log2_ceil(x):
    return _up(_log2(x)) if isinstance(x, Letter) else math.ceil(math.log2(x)) if x > 1 else 0


class _NumPy:
    """The few functions of NumPy that formulas use."""

    log2, ceil, maximum, minimum = staticmethod(_log2), staticmethod(_up), staticmethod(_larger), staticmethod(_named("min", builtins.min))

    def __getattr__(self, name):
        return getattr(np, name)


_REPLACED = {
    "np": _NumPy(), "max": _larger, "min": _named("min", builtins.min), "ceil": _up, "log2": _log2, "log2_ceil": _log2_ceil, "sqrt": _named("√", math.sqrt),
    "int": lambda x: x if isinstance(x, Letter) else int(x), "fft_work": _named("fft", lambda n: 2.5 * n * math.log2(n) if n > 1 else 0.0),
    "fft_depth": lambda n: 2 * _log2_ceil(n), "round": lambda x: x,
}  # fmt: skip


def _with_letters(function: Callable, seen: dict) -> Callable:
    """A copy of a function, and of those it calls, for which logarithms and maxima of letters have a meaning."""
    if not isinstance(function, types.FunctionType):
        return function
    cells = tuple(types.CellType(_with_letters(c.cell_contents, seen)) for c in function.__closure__ or ())
    copy = types.FunctionType(function.__code__, _globals(function.__globals__, seen), function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _globals(real: dict, seen: dict) -> dict:
    """A chapter's names, its own functions among them as `_with_letters` has them."""
    if id(real) not in seen:
        seen[id(real)] = fresh = real | _REPLACED
        for name, value in real.items():
            if isinstance(value, types.FunctionType) and value.__module__.startswith("refimpl.ops") and name not in _REPLACED:
                fresh[name] = _with_letters(value, seen)
    return seen[id(real)]
