"""The catalogue of mistakes: each a small transformation of a chapter, found in the wild or easy to make.

A mutant serves twice. Diagnosis compares a failing candidate with each of them and names the one that it equals; and
the kit's own tests demand that every one is caught. A file per part of the book holds ``MUTANTS``.
"""

import functools
import importlib
import pkgutil
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


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
    undecided : callable, optional
        ``undecided(call) -> (..., T)``: the steps at which implementations may choose (ties). It explains a result that
        is right at all others, whatever it is there.
    undecided_axis : str
        The axis of the results that they are steps of.
    """

    operator: str
    name: str
    says: str
    build: Callable[[], Callable]
    variant: bool = False
    of_gradient: bool = False
    hidden: tuple[str, ...] = ()
    undecided: Callable[[dict], np.ndarray] | None = None
    undecided_axis: str = "T"

    @functools.cached_property
    def function(self) -> Callable:
        return self.build()


def edited(function: Callable, *edits: tuple[str, str]) -> Callable[[], Callable]:
    """A chapter's function after edits of the chapter's source, each ``(old, new)``; built when first used.

    The source is the chapter's file, or, for what does not occur there, those beside it whose functions it uses. Every
    `old` must occur exactly once, so that a mutant cannot silently become the original.
    """

    def build() -> Callable:
        chapter = importlib.import_module(function.__module__)
        modules = [chapter, *_companions(chapter)]
        sources = {}
        for module in modules:
            with open(str(module.__file__), encoding="utf-8") as file:
                sources[module] = file.read()
        changed = {chapter}
        for old, new in edits:
            places = [chapter] if old in sources[chapter] else modules
            count = sum(sources[module].count(old) for module in places)
            if count != 1:
                raise ValueError(f"mutant of {function.__name__}: {old!r} occurs {count} times in {chapter.__name__}, expected once")
            where = next(module for module in places if old in sources[module])
            sources[where] = sources[where].replace(old, new)
            changed.add(where)
        mutated = {module: _executed(module, sources[module]) for module in changed}
        for module, other in mutated.items():
            if module is not chapter:
                theirs = {id(value): name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
                ours = vars(mutated[chapter])
                ours |= {name: getattr(other, theirs[id(value)]) for name, value in ours.items() if id(value) in theirs}
        return getattr(mutated[chapter], function.__name__)

    build.edits = function, edits  # type: ignore[attr-defined]
    return build


def together(a: Mutant, b: Mutant) -> Mutant | None:
    """A mutant that makes two mistakes at once: the edits of both, or one around the other; None where neither can be."""
    (first, ours), (second, theirs) = (_edits(m) for m in (a, b))
    builds: list[Callable] = [edited(first, *ours, *theirs)] if first is not None and first is second else []
    builds += [functools.partial(_around, outer, inner) for outer, inner in ((a, b), (b, a))]
    for build in builds:
        both = Mutant(a.operator, f"{a.name} and {b.name}", f"{a.says}; {b.says}", build, of_gradient=a.of_gradient)
        try:
            if both.function is not None:
                return both
        except (ValueError, SyntaxError):  # the edits exclude one another
            continue
    return None


def _edits(mutant: Mutant) -> tuple[Any, tuple]:
    return getattr(mutant.build, "edits", (None, ()))


def _around(outer: Mutant, inner: Mutant) -> Callable | None:
    """A mutant that calls the operator, and here calls another mutant in its place; None if it does not."""
    f = outer.function
    if not isinstance(f, types.FunctionType):
        return None
    wanted = f"{outer.operator}_vjp" if outer.of_gradient else outer.operator
    names = [n for n in f.__code__.co_names if getattr(f.__globals__.get(n), "__name__", "") == wanted and f.__globals__[n] is not f]
    if not names:
        return None
    around = types.FunctionType(f.__code__, {**f.__globals__, **dict.fromkeys(names, inner.function)}, f.__name__, f.__defaults__, f.__closure__)
    around.__kwdefaults__ = f.__kwdefaults__
    return around


def _companions(chapter: types.ModuleType) -> list[types.ModuleType]:
    """The modules in a chapter's folder whose functions it uses."""
    folder = chapter.__name__.rpartition(".")[0] + "."
    names = {getattr(value, "__module__", None) or "" for value in vars(chapter).values()}
    return [sys.modules[name] for name in sorted(names) if name.startswith(folder) and name != chapter.__name__ and name in sys.modules]


def _executed(module: types.ModuleType, source: str) -> types.ModuleType:
    mutated = types.ModuleType(module.__name__ + "__mutant")
    mutated.__file__ = module.__file__
    exec(compile(source, str(module.__file__), "exec"), mutated.__dict__)
    return mutated


@functools.cache
def mutants(operator: str | None = None) -> tuple[Mutant, ...]:
    """All mutants, or those of one operator."""
    modules = sorted(m.name for m in pkgutil.iter_modules(__path__))
    found = [m for name in modules for m in getattr(importlib.import_module(f"{__name__}.{name}"), "MUTANTS", ())]
    return tuple(m for m in found if operator in (None, m.operator))
