"""Python that reproduces a failure, with nothing but the package, NumPy and the candidate."""

import textwrap
from typing import Any

import numpy as np

from refimpl.op import Op

INLINE = 300  # elements that are written out


def snippet(op: Op, candidate: str, call: dict, required: list[str], dtype: str, recall: str, output: str) -> str:
    """Lines to paste: inputs written out where they are few, drawn again where they are many."""
    lines = ["import numpy as np, refimpl"]
    arrays = {n: v for n, v in call.items() if isinstance(v, np.ndarray) or (isinstance(v, tuple) and hasattr(v, "_fields"))}
    inline = sum(_size(v) for v in arrays.values()) <= INLINE and not any(_exotic(v) for v in arrays.values())
    if inline:
        text = f"call = dict({', '.join(f'{n}={_literal(v)}' for n, v in call.items())})"
        lines += textwrap.wrap(text, 132, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    else:
        lines = ["import refimpl", "from refimpl.conformance.cases import recall", f"call = recall({recall})"]
    arguments = ", ".join([*(f'call["{n}"]' for n in required), *(f'{n}=call["{n}"]' for n in call if n not in required)])
    lines += [f"got = {candidate}({arguments})  # {output} is wrong", f"expected = refimpl.{op.name}(**call)"]
    return "\n".join(lines)


def _size(value) -> int:
    return sum(v.size for v in value) if isinstance(value, tuple) else value.size


def _exotic(value) -> bool:
    return any(v.dtype.kind == "V" or v.dtype.name.startswith(("bfloat", "float8")) for v in (value if isinstance(value, tuple) else (value,)))


def _literal(value) -> str:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return f"({', '.join(_literal(v) for v in value)},)"
    if not isinstance(value, np.ndarray):
        return repr(value)
    if value.size == 0:
        return f"np.zeros({value.shape}, {value.dtype.name!r})"
    return f"np.array({_nested(value)}, {value.dtype.name!r})"


def _nested(value: np.ndarray) -> str:
    """The numbers in brackets, each with as many digits as tell it from its neighbours."""
    if value.ndim:
        return f"[{', '.join(map(_nested, value))}]"
    x: Any = value[()]
    if x.dtype.kind != "f":
        return repr(x.item()) if np.isfinite(x) else f"complex({_nested(value.real)}, {_nested(value.imag)})"
    if not np.isfinite(x):
        return "np.nan" if np.isnan(x) else "np.inf" if x > 0 else "-np.inf"
    return np.format_float_positional(x, trim="-") if x == 0 or 1e-4 < abs(x) < 1e6 else np.format_float_scientific(x, trim="-")
