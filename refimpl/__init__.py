"""refimpl: the ground truth for sequence-model operators, and the kit that holds implementations against it.

``refimpl.attention(q, k, v)`` and every other operator of the catalogue, its ``_vjp``, and ``refimpl.OPS``, the
catalogue itself; ``refimpl.check(operator, candidate)``, the conformance kit. Names are imported on first use.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "check": "refimpl.conformance.check",
    "Domain": "refimpl.conformance.domain",
    "multiple_of": "refimpl.conformance.domain",
    "Report": "refimpl.conformance.report",
    "Op": "refimpl.op",
    "Form": "refimpl.op",
    "Cost": "refimpl.op",
    "Law": "refimpl.op",
}


def __getattr__(name: str) -> Any:
    if name == "adapters":
        value: Any = importlib.import_module("refimpl.conformance.adapters")
    elif name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    elif name.startswith("_"):
        raise AttributeError(f"module 'refimpl' has no attribute {name!r}")
    else:
        value = _from_the_book(name)
    globals()[name] = value
    return value


def _from_the_book(name: str) -> Any:
    from refimpl.catalogue import catalogue, public_names

    if name == "OPS":
        return catalogue()
    try:
        return public_names()[name]
    except KeyError:
        raise AttributeError(f"module 'refimpl' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    from refimpl.catalogue import public_names

    return sorted({*globals(), *_LAZY, "OPS", "adapters", *public_names()})
