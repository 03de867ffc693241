"""What is called: axes from the catalogue, and one plain call (required arrays, options at their defaults) for all benchmarks."""

import contextlib
import sys
import time
from typing import Any

import numpy as np

import refimpl
from refimpl.complexity.runs import GRADIENT, arguments, letters
from refimpl.complexity.table import WIDTHS, predict
from refimpl.op import Op

from . import ROOT

FORMS = [f"{op.name}.{form}" for op in refimpl.OPS.values() for form in op.forms]
MIRRORED = sorted({p.stem for p in (ROOT / "gpu").glob("*/*.py")} & refimpl.OPS.keys())
SHORT, LONG = (64, 512), (4096,)  # `make bench` leaves the long ones out
LENGTHS = SHORT + LONG
DTYPES = ("float32", "float64")
WORK, DEPTH, PEAK = 4e9, 3e5, 1e8  # of the chapter's formula: what needs more, takes longer than it tells


def split(form: str) -> tuple[Op, str]:
    """``attention.tiled`` as operator and form; an operator alone has its definition."""
    name, _, form = form.partition(".")
    op = refimpl.OPS[name]
    return op, form or next(iter(op.forms))


def sizes(op: Op, length: int, batch: tuple[int, ...] = ()) -> dict[str, Any]:
    """Sizes by letter: the length wherever one is due, features and states of usual widths."""
    usual = {k: v for k, v in WIDTHS.items() if k in letters(op) and k not in op.lengths}
    more = {"batch": batch} if batch and letters(op).get("batch") == () else {}
    rows = {"batch": (length,)} if not op.lengths and letters(op).get("batch") == () else {}  # elementwise: rows are the length
    return usual | dict.fromkeys(op.lengths, length) | more | rows


def draw(form: str, dtype: str, length: int, batch: tuple[int, ...] = (), work: float = WORK) -> dict[str, Any]:
    """The arguments of a call by name.

    Raises
    ------
    NotImplementedError
        If the call takes too long, or the form takes no plain call.
    """
    op, form = split(form)
    at = sizes(op, length, batch)
    says = predict(op, form, **at)
    if says.work > work or says.depth > DEPTH or says.peak > PEAK:
        raise NotImplementedError(
            f"{op.name}.{form}: {says.work:.1g} operations in a chain of {says.depth:.1g}, {says.peak:.1g} elements alive, at a length of {length}"
        )
    call = arguments(op, form, **at)
    if refused(op, form, call):
        kinds = (k for k in op.hard if not _raises(lambda k=k: arguments(op, form, hard=k, **at)))
        call = next((c for c in (arguments(op, form, hard=k, **at) for k in kinds) if not refused(op, form, c)), None)
        if call is None:
            raise NotImplementedError(f"{op.name}.{form} takes no plain call of length {length}")
    return {name: rounded(value, dtype) for name, value in call.items()}


def refused(op: Op, form: str, call: dict[str, Any]) -> bool:
    """Whether a form does not take a call; if it does, it has warmed up."""
    return _raises(lambda: op.forms[form].function(**call))


def _raises(function) -> bool:
    with contextlib.suppress(ValueError):
        function()
        return False
    return True


def rounded(value: Any, dtype: str) -> Any:
    """Floats and complex numbers in the precision of a dtype; tuples part by part."""
    if isinstance(value, tuple):
        parts = [rounded(v, dtype) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    if kind == "c":
        return value.astype(np.complex128 if dtype == "float64" else np.complex64)
    return value.astype(_dtype(dtype)) if kind == "f" else value


def _dtype(name: str) -> np.dtype:
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name, None) or name)


def gradient_call(form: str, dtype: str, length: int) -> dict[str, Any]:
    """The same for an operator's gradient."""
    op, _ = split(form)
    return {name: rounded(value, dtype) for name, value in arguments(op, GRADIENT, **sizes(op, length)).items()}


def seconds() -> float:
    """A clock that waits for the device, where one is in use."""
    if "cupy" in sys.modules:
        sys.modules["cupy"].cuda.get_current_stream().synchronize()
    return time.perf_counter()
