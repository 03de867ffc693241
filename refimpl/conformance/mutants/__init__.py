"""The catalogue of mistakes: each a small transformation of a chapter, found in the wild or easy to make.

A mutant serves twice. Diagnosis compares a failing candidate with each of them and names the one that it equals; and
the kit's own tests demand that every one is caught. A file per part of the book holds ``MUTANTS``.
"""

import functools
import importlib
import pkgutil
import types
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A known mistake, or a legitimate variant of an operator.

    Attributes
    ----------
    operator, name : str
        ``attention``, ``causal_top_left``: what was done, in two or three words.
    says : str
        What the author of such code should read: what theirs does, and what the contract says instead.
    build : callable
        ``build() -> function``: an implementation with the operator's signature; with `of_gradient`, of its vjp.
    variant : bool
        The table "where implementations differ" allows it: the verdict is "deviates", not "wrong".
    of_gradient : bool
        The mistake is in the vjp; the forward is right.
    hidden : tuple of str
        Precisions in which no observer can tell it from a right one, with the reason in `says`
        ("float32" for an error of 1e-9).
    """

    operator: str
    name: str
    says: str
    build: Callable[[], Callable]
    variant: bool = False
    of_gradient: bool = False
    hidden: tuple[str, ...] = ()

    @functools.cached_property
    def function(self) -> Callable:
        return self.build()


def edited(function: Callable, *edits: tuple[str, str]) -> Callable[[], Callable]:
    """A chapter's function after edits of the chapter's source, each ``(old, new)``; built when first used.

    Every `old` must occur in the chapter exactly once, so that a mutant cannot silently become the original.
    """

    def build() -> Callable:
        module = importlib.import_module(function.__module__)
        with open(module.__file__, encoding="utf-8") as file:
            source = file.read()
        for old, new in edits:
            if source.count(old) != 1:
                raise ValueError(f"mutant of {function.__name__}: {old!r} occurs {source.count(old)} times in {module.__name__}, expected once")
            source = source.replace(old, new)
        mutated = types.ModuleType(module.__name__ + "__mutant")
        mutated.__file__ = module.__file__
        exec(compile(source, module.__file__, "exec"), mutated.__dict__)
        return getattr(mutated, function.__name__)

    return build


@functools.cache
def mutants(operator: str | None = None) -> tuple[Mutant, ...]:
    """All mutants, or those of one operator."""
    modules = sorted(m.name for m in pkgutil.iter_modules(__path__))
    found = [m for name in modules for m in getattr(importlib.import_module(f"{__name__}.{name}"), "MUTANTS", ())]
    return tuple(m for m in found if operator in (None, m.operator))
