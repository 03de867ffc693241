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
    lines, source = _inputs({"call": _call(call)}, call, "call = recall", recall), "call"
    if way:
        source = "there"
        lines += ["from refimpl.conformance.candidate import given", f"there = given({op.name!r}, call, {way})"]
    arguments = ", ".join([*(f'{source}["{n}"]' for n in required), *(f'{n}={source}["{n}"]' for n in passed)])
    lines += ["import torch"] if candidate.startswith("torch.") else []
    lines += [f"got = {candidate}({arguments})  # {output} is wrong", f"expected = refimpl.{op.name}(**call)"]
    return "\n".join(lines)


def gradient_snippet(op: Op, candidate: str, vjp: str, call: dict, cotangents: tuple, recall: str, output: str, way: str) -> str:
    """The same for a gradient: of the candidate by its framework, or by the function named `vjp`."""
    dy, dstate = cotangents
    given = {"call": _call(call), "dy": _literal(dy)} | ({} if dstate is None else {"dstate": _literal(dstate)})
    lines = _inputs(given, call | {"dy": dy, "dstate": dstate}, "call, dy, dstate = recall_gradient", recall)
    arguments = ["call", "dy", *(["dstate"] if "dstate" in given else []), *([f"vjp={vjp}"] if vjp else []), *([way] if way else [])]
    state = ", dstate=dstate" if "dstate" in given else ""
    lines += [
        "from refimpl.conformance.candidate import gradient_of",
        f"got = gradient_of({op.name!r}, {candidate}, {', '.join(arguments)})  # {output} is wrong",
        f"expected = refimpl.{op.name}_vjp(dy, **{{n: v for n, v in call.items() if n != 'return_state'}}{state})",
    ]
    return "\n".join(lines)


def _inputs(written: dict[str, str], values: dict, recalled: str, recall: str) -> list[str]:
    """Lines that bind each name to what is written, or, where that is long, to what is drawn again."""
    if sum(_size(v) for v in values.values()) <= INLINE and not any(callable(v) for v in values.values()):
        texts = [f"{name} = {text}" for name, text in written.items()]
        lines = ["import numpy as np, refimpl", *(["import ml_dtypes"] if any("ml_dtypes." in text for text in texts) else [])]
        for text in texts:
            lines += textwrap.wrap(text, 132, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
        return lines
    names = "Domain, multiple_of" if "multiple_of(" in recall else "Domain" if "Domain(" in recall else ""
    place = "trial_gradients import recall_gradient" if "gradient" in recalled else "cases import recall"
    return ["import refimpl", *([f"from refimpl import {names}"] if names else []), f"from refimpl.conformance.{place}", f"{recalled}({recall})"]


def _call(call: dict) -> str:
    return f"dict({', '.join(f'{n}={_literal(v)}' for n, v in call.items())})"


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
