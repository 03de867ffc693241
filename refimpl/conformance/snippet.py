"""Python that reproduces a failure, with nothing but the package, NumPy and the candidate."""

import numpy as np

from refimpl.op import Op

_INLINE = 220


def snippet(op: Op, candidate: str, call: dict, required: list[str], dtype: str, recall: str, output: str) -> str:
    """Lines to paste: inputs written out where they are few, drawn again where they are many."""
    lines = ["import numpy as np, refimpl"]
    arrays = {n: v for n, v in call.items() if isinstance(v, np.ndarray) or (isinstance(v, tuple) and hasattr(v, "_fields"))}
    inline = sum(_size(v) for v in arrays.values()) <= _INLINE and not any(_exotic(v) for v in arrays.values())
    if inline:
        lines += [f"call = dict({', '.join(f'{n}={_literal(v)}' for n, v in call.items())})"]
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
    with np.printoptions(floatmode="unique", threshold=_INLINE + 1, linewidth=10**6):
        text = np.array2string(value, separator=", ", max_line_width=10**6).replace("\n", "")
    text = " ".join(text.split()).replace("nan", "np.nan").replace("inf", "np.inf")
    if value.size == 0:
        return f"np.zeros({value.shape}, {value.dtype.name!r})"
    return f"np.array({text}, {value.dtype.name!r})"
