"""Finds every operator in `refimpl.ops`: a chapter is any module there with a tuple `OPS`. There is no second list.

A form that fills a chapter of its own is found there: ``FORMS = {"attention": {"block_sparse": Form(...)}}``.
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Iterator, Mapping

import refimpl.ops
from refimpl.op import Op


def chapters() -> Iterator[str]:
    """Names of all chapter modules, part by part."""
    for part in sorted(m.name for m in pkgutil.iter_modules(refimpl.ops.__path__) if m.ispkg):
        package = importlib.import_module(f"refimpl.ops.{part}")
        for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
            yield f"refimpl.ops.{part}.{module}"


@functools.cache
def catalogue() -> Mapping[str, Op]:
    """Every operator by name."""
    found: dict[str, Op] = {}
    modules = {name: importlib.import_module(name) for name in chapters()}
    for name, module in modules.items():
        for op in getattr(module, "OPS", ()):
            if op.name in found:
                raise ValueError(f"catalogue: {op.name} is defined twice, the second time in {name}")
            found[op.name] = op
    for name, module in modules.items():
        for operator_name, forms in getattr(module, "FORMS", {}).items():
            op = found[operator_name]
            if twice := op.forms.keys() & forms.keys():
                raise ValueError(f"catalogue: {op.name} has the form {min(twice)} twice, the second time in {name}")
            found[operator_name] = dataclasses.replace(op, forms={**op.forms, **forms})
    return found


@functools.cache
def chapter_of(name: str) -> str:
    """The module in which an operator is defined."""
    for module in chapters():
        if any(op.name == name for op in getattr(importlib.import_module(module), "OPS", ())):
            return module
    raise ValueError(unknown(name))


def operator(name: str) -> Op:
    """An operator by name.

    Raises
    ------
    ValueError
        If there is none of that name; the message lists those that come near.
    """
    try:
        return catalogue()[name]
    except KeyError:
        raise ValueError(unknown(name)) from None


def unknown(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, catalogue(), n=3, cutoff=0.4)
    return f"no operator is called {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(catalogue())}")


@functools.cache
def public_names() -> Mapping[str, object]:
    """What `refimpl` re-exports: each operator, its vjp, and whatever else a chapter lists in ``__all__``."""
    names: dict[str, object] = {}
    for module in map(importlib.import_module, chapters()):
        for op in getattr(module, "OPS", ()):
            names[op.name] = op.definition
            if op.gradient is not None:
                names[f"{op.name}_vjp"] = op.gradient
        for name in getattr(module, "__all__", ()):
            names.setdefault(name, getattr(module, name))
    return names
