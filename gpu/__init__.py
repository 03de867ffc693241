"""The mirror of `refimpl` on CUDA devices: the same operators, names and arguments on CuPy arrays.

``refimpl.gpu.attention(q, k, v, causal=True)`` mirrors ``refimpl.attention``; the modules are named as the chapters are,
so ``refimpl.gpu.attention.attention`` is found by ``importlib.import_module`` and by ``from ... import``. Nothing in
`refimpl` imports this package unless asked for by name. `refimpl.gpu.teaching` needs no CuPy where Numba simulates a device.
"""

import importlib
import importlib.util
import os
import pkgutil
import sys
from types import ModuleType
from typing import Any

if importlib.util.find_spec("cupy") is None and os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
    raise ImportError(
        "refimpl.gpu needs CuPy, which is not installed. Install the extra that fits the driver: "
        "pip install 'refimpl[cuda12]' for CUDA 12, pip install 'refimpl[cuda13]' for CUDA 13 (never both).",
        name="cupy",
    )

_PARTS = tuple(m.name for m in pkgutil.iter_modules(__path__) if m.ispkg and m.name not in ("cuda", "teaching"))


class _Mirror(ModuleType):
    """A package of which some parts and operators share a name: as an attribute, the name is the operator."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in _PARTS):  # what importing a part would set
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        for part in _PARTS:
            package = importlib.import_module(f"{self.__name__}.{part}")
            chapter = name.removesuffix("_vjp")
            if any(m.name == chapter for m in pkgutil.iter_modules(package.__path__)):
                value = getattr(importlib.import_module(f"{self.__name__}.{part}.{chapter}"), name)
                super().__setattr__(name, value)
                return value
        raise AttributeError(f"refimpl.gpu has no {name!r}; it mirrors {', '.join(self.__dir__())}")

    def __dir__(self) -> list[str]:
        parts = (importlib.import_module(f"{self.__name__}.{part}") for part in _PARTS)
        return sorted(m.name for package in parts for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


sys.modules[__name__].__class__ = _Mirror
