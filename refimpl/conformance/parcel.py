"""A function for a process of its own: by the name under which it can be imported there, or by value.

A copy of this process (a fork) would hold all that this one has computed, expected results included. So what cannot be
imported elsewhere, a closure, a lambda, a notebook's function, is sent: its code, and of its surroundings what the code
speaks of.
"""

import builtins
import functools
import importlib
import io
import marshal
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any


class CannotSend(TypeError):
    """A function that another process cannot be given."""


def parcel(function: Callable | str) -> str | bytes:
    """Where another process finds a function, ``module:name`` or ``file.py:name``; or the function itself, as bytes.

    Raises
    ------
    CannotSend
        If it can be neither found there nor sent.
    """
    if isinstance(function, str):
        return function
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if _is_there(module, name, function):
        return f"{module}:{name}"
    try:
        file = io.BytesIO()
        _Packer(file, protocol=5).dump(function)
        return file.getvalue()
    except Exception as error:  # whatever a candidate's own __reduce__ may raise
        found = sys.modules.get(module or "")
        place = getattr(found, "__file__", None)
        if place and place.endswith(".py") and module != "__main__" and _attribute(found, name) is function:
            return f"{Path(place).resolve()}:{name}"
        shown = name or type(function).__name__
        raise CannotSend(
            f"check: isolate=True: {shown} can be neither imported by another process nor sent to one ({error}); "
            "name it as 'file.py:name', or run it in this process with isolate=False"
        ) from None


def unpacked(data: bytes) -> Callable:
    """The function that `parcel` made bytes of."""
    _spaces.clear()
    return pickle.loads(data)


def _is_there(module: str | None, name: str, thing: Any) -> bool:
    """Whether a fresh interpreter, importing the module, would find this very thing."""
    found = sys.modules.get(module or "")
    if found is None or module in (None, "__main__") or "<" in name or _attribute(found, name) is not thing:
        return False
    return _importable(module, getattr(found, "__file__", None))


def _attribute(thing: Any, name: str) -> Any:
    for part in name.split("."):
        thing = getattr(thing, part, None)
    return thing


@functools.cache
def _importable(module: str, file: str | None) -> bool:
    path, spec = None, None
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        specs = (finder.find_spec(name, path) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        spec = next((s for s in specs if s is not None), None)
        if spec is None:
            return False
        path = spec.submodule_search_locations
    return file is None or spec is None or spec.origin in (None, "built-in", "frozen") or Path(spec.origin) == Path(file)


class _Packer(pickle.Pickler):
    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self.spaces: dict[int, int] = {}  # functions of one module share its global names

    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, types.ModuleType):
            if not _importable(thing.__name__, getattr(thing, "__file__", None)):
                raise pickle.PicklingError(f"its module {thing.__name__!r} cannot be imported there")
            return importlib.import_module, (thing.__name__,)
        if isinstance(thing, types.FunctionType) and not _is_there(thing.__module__, thing.__qualname__, thing):
            space = self.spaces.setdefault(id(thing.__globals__), len(self.spaces))
            return _function_parts(thing, space)
        if isinstance(thing, type) and thing.__module__ != "builtins" and not _is_there(thing.__module__, thing.__qualname__, thing):
            return _class_parts(thing)
        return NotImplemented


def _function_parts(f: types.FunctionType, space: int) -> tuple:
    names = _names(f.__code__)
    cells = [_content(cell) for cell in f.__closure__ or ()]
    state = {
        "globals": {n: f.__globals__[n] for n in sorted(names) if n in f.__globals__},
        "cells": cells,
        "attributes": {"__name__": f.__name__, "__defaults__": f.__defaults__, "__kwdefaults__": f.__kwdefaults__, "__doc__": f.__doc__, "__module__": f.__module__},
        "own": dict(vars(f)),
    }
    return _bare_function, (marshal.dumps(f.__code__), space, f.__qualname__, len(cells)), state, None, None, _fill_function


def _class_parts(c: type) -> tuple:
    own = {n: v for n, v in vars(c).items() if n not in ("__dict__", "__weakref__") and not isinstance(v, types.MemberDescriptorType)}
    return _bare_class, (type(c), c.__name__, c.__qualname__, c.__bases__), own, None, None, _fill_class


def _names(code: types.CodeType) -> set[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


def _content(cell: types.CellType) -> tuple:
    try:
        return (cell.cell_contents,)
    except ValueError:  # not yet assigned
        return ()


_spaces: dict[int, dict[str, Any]] = {}


def _bare_function(code: bytes, space: int, qualname: str, cells: int) -> types.FunctionType:
    names = _spaces.setdefault(space, {"__builtins__": builtins})
    f = types.FunctionType(marshal.loads(code), names, None, None, tuple(types.CellType() for _ in range(cells)))
    f.__qualname__ = qualname
    return f


def _fill_function(f: types.FunctionType, state: dict) -> None:
    f.__globals__.update(state["globals"])
    f.__globals__.setdefault("__name__", state["attributes"]["__module__"])
    for cell, content in zip(f.__closure__ or (), state["cells"], strict=True):
        if content:
            cell.cell_contents = content[0]
    for name, value in state["attributes"].items():
        setattr(f, name, value)
    vars(f).update(state["own"])


def _bare_class(metaclass: type, name: str, qualname: str, bases: tuple) -> type:
    return metaclass(name, bases, {"__qualname__": qualname})


def _fill_class(c: type, own: dict) -> None:
    for name, value in own.items():
        setattr(c, name, value)
