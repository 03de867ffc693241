"""Python that reproduces a failure, with nothing but the package, NumPy and the candidate."""

import textwrap
from typing import Any

import numpy as np

from refimpl.op import Op

INLINE = 300  # elements that are written out


def snippet(op: Op, candidate: str, call: dict, required: list[str], passed: list[str], recall: str, output: str, way: str) -> str:
    """Lines to paste: inputs written out where they are few, drawn again where they are many.

    `way` says in which framework, memory layout and order of axes the candidate is given them, where that is not as they are.
    """
    lines = ["import numpy as np, refimpl"]
    if sum(_size(v) for v in call.values()) <= INLINE and not any(callable(v) for v in call.values()):
        text = f"call = dict({', '.join(f'{n}={_literal(v)}' for n, v in call.items())})"
        lines += ["import ml_dtypes"] if "ml_dtypes." in text else []
        lines += textwrap.wrap(text, 132, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    else:
        names = "Domain, multiple_of" if "multiple_of(" in recall else "Domain" if "Domain(" in recall else ""
        lines = ["import refimpl", *([f"from refimpl import {names}"] if names else []), "from refimpl.conformance.cases import recall"]
        lines.append(f"call = recall({recall})")
    source = "call"
    if way:
        source = "there"
        lines += ["from refimpl.conformance.candidate import given", f"there = given({op.name!r}, call, {way})"]
    arguments = ", ".join([*(f'{source}["{n}"]' for n in required), *(f'{n}={source}["{n}"]' for n in passed)])
    lines += [f"got = {candidate}({arguments})  # {output} is wrong", f"expected = refimpl.{op.name}(**call)"]
    return "\n".join(lines)


def _size(value) -> int:
    return sum(map(_size, value)) if isinstance(value, tuple) else value.size if isinstance(value, np.ndarray) else 0


def _exotic(x: np.ndarray) -> bool:
    return x.dtype.kind == "V" or x.dtype.name.startswith(("bfloat", "float8"))


def _literal(value) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, np.generic):
        return _nested(np.asarray(value))
    if isinstance(value, float) and not np.isfinite(value):
        return _nested(np.asarray(value))
    if not isinstance(value, np.ndarray):
        return repr(value)
    if _exotic(value):
        return f"{_literal(value.astype(np.float32))}.astype(ml_dtypes.{value.dtype.name})"
    if value.size == 0:
        return f"np.zeros({value.shape}, {value.dtype.name!r})"
    return f"np.array({_nested(value)}, {value.dtype.name!r})"


def _nested(value: np.ndarray) -> str:
    """The numbers in brackets, each with as many digits as tell it from its neighbours."""
    if value.ndim:
        return f"[{', '.join(map(_nested, value))}]"
    x: Any = value[()]
    if x.dtype.kind == "c":
        return repr(complex(x)) if np.isfinite(x) else f"complex({_nested(value.real)}, {_nested(value.imag)})"
    if x.dtype.kind != "f":
        return repr(x.item())
    if not np.isfinite(x):
        return "np.nan" if np.isnan(x) else "np.inf" if x > 0 else "-np.inf"
    return np.format_float_positional(x, trim="-") if x == 0 or 1e-4 < abs(float(x)) < 1e6 else np.format_float_scientific(x, trim="-")
