"""What an operator takes and gives: shapes, precisions, heads. Written once per chapter, held for every form.

A contract is two lines of text, in the letters of the chapter's docstring::

    CONTRACT = Contract(
        "selective_scan",
        takes="u (..., T, c); delta (..., T, c); A (c, n); B (..., T, n) | (..., T, G, n); D (c); state (..., c, n)",
        gives="y (..., T, c)",
    )

and two decorators, `CONTRACT.form` for the algorithms and `CONTRACT.gradient` for the adjoint. They check rank,
sizes and kind of every array before any work, and bring the arguments into the one shape and the one precision in
which the chapter's equation is written; so a chapter holds mathematics and nothing else.

The language
    x (..., T, c)          batch axes, then axes named by letters; a letter has one size in the whole call
    (4, c, d), (..., W-1)  axes of a fixed or a derived size
    a (c) | (..., T, c)    alternatives, told apart by rank against the first argument's
    q (..., H?, n, d)      an axis of heads, which may be missing: one head
    gates[N] (..., T, c)   a tuple (or list) of N arrays, each of that shape, with batch axes of its own
    mask:bool, seed:int    kinds: bool, int, real (not complex); `free` is numeric but does not take part in the choice of precision
    state.C (..., d, e)    a field of a state that is a NamedTuple
    state (...); state.z   a state that is one array, or, where an option wants it, a NamedTuple of it and further fields

Precision: float32 in, float32 out, likewise float64, longdouble and complex; half types (float16, bfloat16, float8)
compute in float32 and are rounded once, at the end; states stay in the compute precision and, like integers, booleans
and Python scalars, do not promote. Object arrays (of intervals) pass through untouched.
"""

import contextlib
import functools
import inspect
import re
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refimpl.core.dtypes import HALF, cast, common, is_array, like_argument, owned, real_dtype, rounded
from refimpl.core.shapes import Array, Shape, lengths_of, misfit

_PYTHON_SCALARS = (bool, int, float, complex)


@dataclass
class _Call:
    """One call, seen through the contract: arguments in normal form, and how to undo it."""

    arguments: dict[str, Any]
    original: dict[str, Any]
    sizes: dict[str, int]
    batch: tuple[int, ...]
    layout: dict[str, tuple[str, ...]]
    one_head: bool
    compute: np.dtype | None
    out: np.dtype | None
    work: np.dtype | None  # of inputs and cotangents as an algorithm sees them: `compute`, or `out` if it takes halves as they are


@dataclass(frozen=True)
class Contract:
    """Shapes and precisions of an operator (see the module's docstring).

    Parameters
    ----------
    name : str
        The operator's name, which begins every message.
    takes, gives : str
        Arrays taken, in the order of the arguments, and given, in the order of the results (states excepted: they
        are given in the shape in which they are taken).
    rules : tuple of str
        Relations between sizes, such as ``"Hkv divides Hq"``.
    check : callable, optional
        ``check(arguments, sizes)`` raises ValueError for what shapes cannot say; called with normalised arguments. It
        may add to `sizes` the letters of the results that follow from others.
    """

    name: str
    takes: str
    gives: str
    rules: tuple[str, ...] = ()
    check: Callable[[dict, dict], None] | None = None
    arrays: tuple[Array, ...] = field(init=False, repr=False)
    results: tuple[Array, ...] = field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "arrays", tuple(Array.parse(t) for t in self.takes.split(";")))
        object.__setattr__(self, "results", tuple(Array.parse(t) for t in self.gives.split(";")))

    # -- what other parts ask -------------------------------------------------------------------------------------

    @property
    def inputs(self) -> tuple[Array, ...]:
        """The arrays that are not states."""
        return tuple(a for a in self.arrays if a.name.split(".")[0] != "state")

    @property
    def states(self) -> tuple[Array, ...]:
        """The state's arrays: none, one, or the fields of a NamedTuple."""
        return tuple(a for a in self.arrays if a.name.split(".")[0] == "state")

    def form(self, function: Callable, half: bool = False) -> Callable:
        """Decorate an algorithm: validate, normalise, compute, round. With `half`, it takes half precisions as they are."""
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args, **kwargs):
            bound = self._bind(signature, args, kwargs)
            seen = self._see(bound, half=half)
            result = function(**seen.arguments)
            return self._give(result, seen, bound.get("return_state", False))

        call.contract = self  # type: ignore[attr-defined]
        return call

    def gradient(self, function: Callable, half: bool = False) -> Callable:
        """Decorate an adjoint ``vjp(dy, *inputs, dstate=None, **options) -> dict``.

        The function returns gradients in the normalised, broadcast shapes; the decorator sums broadcast axes, takes
        the real part for real arguments, and casts each to its argument's dtype. `dy` and `dstate` arrive in the
        compute precision, with heads; a missing part of a tuple `dy` arrives as zeros. With `half`, half precisions
        arrive as they are.
        """
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args, **kwargs):
            bound = self._bind(signature, args, kwargs)
            dy, dstate = bound.pop("dy"), bound.pop("dstate", None)
            seen = self._see(bound, half=half)
            extra = {"dstate": self._cotangent_state(dstate, seen)} if "dstate" in signature.parameters else {}
            gradients = function(self._cotangent(dy, seen), **seen.arguments, **extra)
            return self._give_gradients(gradients, seen)

        call.contract = self  # type: ignore[attr-defined]
        return call

    def result_shapes(self, sizes: Mapping[str, int], batch: tuple[int, ...], one_head=False) -> list[tuple[int, ...]]:
        """Shapes of the results (states excepted) for given sizes: of alternatives, the first whose letters all have one."""
        chosen = [next((s for s in r.shapes if s.letters <= sizes.keys()), r.shapes[0]) for r in self.results]
        return [lengths_of(shape, sizes, batch, drop_heads=one_head) for shape in chosen]

    def entries(self, call: Mapping[str, Any]) -> Iterator[tuple[Array, np.ndarray, Callable[[Any], dict]]]:
        """Every array of a call that is no state, the parts of a tuple each; with a function that puts another in its place."""
        for array in self.inputs:
            value = call.get(array.name)
            if array.count and isinstance(value, tuple):
                for i, part in enumerate(value):

                    def put(new, name=array.name, value=value, i=i):
                        return {**call, name: _tuple_like(value, [*value[:i], new, *value[i + 1 :]])}

                    yield array.part(i), part, put
            elif value is not None:

                def replace(new, name=array.name):
                    return {**call, name: new}

                yield array, value, replace

    def sizes(self, **arguments) -> tuple[dict[str, int], tuple[int, ...]]:
        """Sizes by letter, and the batch shape, of a call's arguments."""
        seen = self._see(arguments, partial=True)
        return seen.sizes, seen.batch

    def precision(self, **arguments) -> tuple[np.dtype | None, np.dtype | None]:
        """The dtypes in which a call is computed and given back (None for object arrays)."""
        seen = self._see(arguments, partial=True)
        return seen.compute, seen.out

    def layout(self, **arguments) -> dict[str, tuple[str, ...]]:
        """The named axes of each array of a call: which of its alternative shapes it has."""
        return self._see(arguments, partial=True).layout

    def axis(self, letter: str, **arguments) -> dict[str, int]:
        """Where a letter's axis stands, counted from the end, in each array of a call that has it."""
        layout = self._see(arguments, partial=True).layout
        return {name: axes.index(letter) - len(axes) for name, axes in layout.items() if letter in axes}

    def result_axis(self, letter: str, one_head=False) -> dict[str, int]:
        """The same for the results."""
        found = {}
        for result in self.results:
            axes = [a for a in result.shapes[0].axes if not (one_head and a.endswith("?"))]
            names = [a.rstrip("?") for a in axes]
            if letter in names:
                found[result.name] = names.index(letter) - len(names)
        return found

    def named(self, result, return_state=False) -> dict[str, np.ndarray]:
        """The arrays of a result by name: ``{"y": ..., "state.h": ...}``."""
        parts = list(result) if isinstance(result, tuple) and not hasattr(result, "_fields") else [result]
        state = parts.pop() if return_state else None
        if len(parts) > len(self.results):
            raise ValueError(f"{self.name}: returned {len(parts)} results, expected at most {len(self.results)}")
        found = {array.name: part for array, part in zip(self.results, parts, strict=False)}
        if return_state:
            fields = state if isinstance(state, tuple) else (state,)
            found |= {array.name: part for array, part in zip(self.states[: self._state_size(fields)], fields, strict=True)}
        return found

    # -- going in -------------------------------------------------------------------------------------------------

    def _bind(self, signature, args, kwargs) -> dict[str, Any]:
        unknown = [k for k in kwargs if k not in signature.parameters]
        if unknown:
            raise TypeError(f"{self.name}: unknown argument {unknown[0]!r}; the arguments are {', '.join(signature.parameters)}")
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.name}: {error}; the arguments are {', '.join(signature.parameters)}") from None
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            if value is None and signature.parameters[name].default is inspect.Parameter.empty and name != "dy":
                raise TypeError(f"{self.name}: {name} must be an array, got None")
        return dict(bound.arguments)

    def _see(self, bound: dict[str, Any], partial: bool = False, half: bool = False) -> _Call:
        """A call in normal form; `partial` calls hold arrays only, so that what `check` says of options does not count."""
        arguments = {k: (v.item() if isinstance(v, np.generic) and not isinstance(v, np.longdouble) else v) for k, v in bound.items()}
        given = self._given(arguments)
        strong = [a for name, (array, a, weak) in given.items() if not weak and array.kind in ("number", "real") and array.argument != "state"]
        compute, out = common(strong)
        work = out if half and out is not None and out.name in HALF else compute
        sizes: dict[str, tuple[int, str]] = {}
        normal, batches, one_head = {}, {}, False
        layout: dict[str, tuple[str, ...]] = {}
        first_rank = None
        tuples = [a for a in self.arrays if a.count and arguments.get(a.name) is not None]
        sizes |= {a.count: (len(arguments[a.name]), a.name) for a in tuples}
        for name, (array, value, _) in given.items():
            value, shape, inserted = self._fit(array, value, sizes, first_rank, one_head)
            if first_rank is None:
                first_rank, one_head = value.ndim - len(shape.axes), inserted
            layout[name.partition("[")[0]] = tuple(a.rstrip("?") for a in shape.axes if not (inserted and a.endswith("?")))
            if shape.batched:
                batches[name] = value.shape[: value.ndim - len(shape.axes)]
            normal[name] = value if partial else cast(value, array, compute if array in self.states else work)
        batch = self._broadcast(batches)
        plain = {k: v[0] for k, v in sizes.items()}
        self._apply_rules(plain)
        for name, value in normal.items():
            if name in arguments:
                arguments[name] = value
        for array in tuples:
            arguments[array.name] = _tuple_like(arguments[array.name], [normal[p.name] for p in self._parts(array, arguments)])
        if bound.get("state") is not None and self._has_fields(bound["state"]):
            arguments["state"] = _tuple_like(bound["state"], [normal[s.name] for s in self.states])
        if self.check is not None:
            with contextlib.suppress(*((ValueError, TypeError, KeyError) if partial else ())):
                self.check(arguments, plain)
        return _Call(arguments, {n: a for n, (_, a, _) in given.items()}, plain, batch, layout, one_head, compute, out, work)

    def _given(self, arguments) -> dict[str, tuple[Array, np.ndarray, bool]]:
        """The arrays of this call, by name: contract, value, and whether it is a Python scalar."""
        given: dict[str, tuple[Array, np.ndarray, bool]] = {}
        for array in self.arrays:
            name, _, part = array.name.partition(".")
            if arguments.get(name) is None:
                continue
            value = arguments[name]
            if array.count:
                for one, v in zip(self._parts(array, arguments), value, strict=True):
                    given[one.name] = (one, self._array(one, v), isinstance(v, _PYTHON_SCALARS))
                continue
            if array in self.states and self._has_fields(value):
                value = value[self.states.index(array)]
            elif part:
                continue
            given[array.name] = (array, self._array(array, value), isinstance(value, _PYTHON_SCALARS))
        return given

    def _parts(self, array: Array, arguments) -> list[Array]:
        """The arrays of an argument that is a tuple of them; TypeError if it is none."""
        value = arguments[array.name]
        if not isinstance(value, tuple | list):
            raise TypeError(f"{self.name}: {array.name} must be a tuple of arrays {array.shapes[0]}, got {_describe(value)}")
        return [array.part(i) for i in range(len(value))]

    def _has_fields(self, state) -> bool:
        """Whether a state is given field by field; TypeError if it should be and is not, or has too few."""
        names = [s.name.partition(".")[2] or "S" for s in self.states]
        if not any("." in s.name for s in self.states) or ("." not in self.states[0].name and not isinstance(state, tuple)):
            return False
        if not isinstance(state, tuple) or len(state) != len(names):
            raise TypeError(f"{self.name}: state must be a tuple ({', '.join(names)}), got {_describe(state)}")
        return True

    def _state_size(self, fields) -> int:
        """How many arrays a state of these parts should have: a state that may be one array or a NamedTuple is both."""
        alone = len(self.states) > 1 and "." not in self.states[0].name and len(fields) == 1
        return 1 if alone else len(self.states)

    def _array(self, array: Array, value) -> np.ndarray:
        try:
            value = value if is_array(value) else np.asarray(value)
        except Exception as error:
            raise TypeError(f"{self.name}: {array.name} must be an array, got {type(value).__name__} ({error})") from None
        kind = value.dtype.kind
        numeric = kind in "biufcO" or value.dtype.name in HALF
        if array.kind == "bool" and kind not in "bO":
            raise TypeError(f"{self.name}: {array.name} must be boolean (True = allowed), got dtype {value.dtype}")
        if array.kind == "int" and kind not in "iuO":
            raise TypeError(f"{self.name}: {array.name} must be integer, got dtype {value.dtype}")
        if not numeric:
            raise TypeError(f"{self.name}: {array.name} must be numeric, got dtype {value.dtype}")
        if kind == "O" and type(value) is np.ndarray and not all(hasattr(v, "__rsub__") for v in value.flat):
            raise TypeError(f"{self.name}: {array.name} must be numeric, got objects such as {type(next(v for v in value.flat if not hasattr(v, '__rsub__'))).__name__}")
        if array.kind == "real" and kind == "c":
            raise TypeError(f"{self.name}: {array.name} must be real, got dtype {value.dtype}")
        return value

    def _fit(self, array: Array, value: np.ndarray, sizes, first_rank, one_head) -> tuple[np.ndarray, Shape, bool]:
        """Choose the alternative that fits, insert a missing head axis, record sizes."""
        reasons = []
        for shape in self._by_rank(array, value, first_rank, one_head):
            k, inserted = len(shape.axes), False
            if shape.heads is not None and (one_head or first_rank is None) and value.ndim == k - 1:
                value, inserted = np.expand_dims(value, value.ndim + 1 + shape.heads), True
            mismatch = misfit(shape, value.shape[value.ndim - k :], sizes, array.name)
            if mismatch is None:
                return value, shape, inserted
            reasons.append(mismatch)
            if inserted and shape.heads is not None:
                value = np.squeeze(value, value.ndim + shape.heads)
        why = f" ({reasons[0]})" if reasons else ""
        raise ValueError(f"{self.name}: {array.name} must have shape {' or '.join(map(str, array.shapes))}, got {value.shape}{why}")

    @staticmethod
    def _by_rank(array: Array, value: np.ndarray, first_rank, one_head) -> list[Shape]:
        """Alternatives whose rank fits; those with exactly the first argument's batch axes come before the others."""
        exact, loose = [], []
        for shape in array.shapes:
            ranks = {len(shape.axes)}
            if shape.heads is not None and (one_head or first_rank is None):
                ranks.add(len(shape.axes) - 1)
            if value.ndim in ({r + (first_rank or 0) for r in ranks} if shape.batched else ranks):
                exact.append(shape)
            elif shape.batched and value.ndim >= len(shape.axes):
                loose.append(shape)
        return exact + loose

    def _broadcast(self, batches: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        try:
            return np.broadcast_shapes(*batches.values())
        except ValueError:
            listed = ", ".join(f"{n} {b}" for n, b in batches.items())
            raise ValueError(f"{self.name}: batch axes must broadcast together, got {listed}") from None

    def _apply_rules(self, sizes):
        for rule in self.rules:
            match = re.fullmatch(r"(\w+) (divides|at most|at least) (\w+)", rule)
            if match is None:
                raise ValueError(f"contract: cannot read the rule {rule!r}")
            a, verb, b = match.groups()
            if a not in sizes or (b not in sizes and not b.isdigit()):
                continue
            x, y = sizes[a], int(b) if b.isdigit() else sizes[b]
            holds = {"divides": x != 0 and y % x == 0 if x else y == 0, "at most": x <= y, "at least": x >= y}[verb]
            if not holds:
                raise ValueError(f"{self.name}: {rule} is required, got {a} = {x}, {b} = {y}")

    # -- coming out -----------------------------------------------------------------------------------------------

    def _give(self, result, seen: _Call, has_state: bool):
        several = isinstance(result, tuple) and not hasattr(result, "_fields")
        outputs = list(result) if several else [result]
        state: Any = outputs.pop() if has_state else None
        outputs = [self._squeeze(rounded(o, seen.out), r, seen) for o, r in zip(outputs, self.results, strict=False)] + [
            rounded(o, seen.out) for o in outputs[len(self.results) :]
        ]
        if has_state:
            if hasattr(state, "_fields"):
                state = type(state)(*(self._squeeze(v, a, seen) for v, a in zip(state, self.states, strict=True)))
            elif self.states:
                state = self._squeeze(state, self.states[0], seen)
            outputs.append(state)
        outputs = [owned(o, seen.original.values()) for o in outputs]
        return tuple(outputs) if several else outputs[0]

    @staticmethod
    def _squeeze(value, array: Array, seen: _Call):
        heads = array.shapes[0].heads
        return np.squeeze(value, heads) if seen.one_head and heads is not None and is_array(value) else value

    def _cotangent(self, dy, seen: _Call):
        several = isinstance(dy, tuple)
        parts = dy if several else (dy,)
        if len(parts) > len(self.results):
            raise ValueError(f"{self.name}: dy must have at most {len(self.results)} parts, got {len(parts)} (the state's is dstate)")
        shapes = self.result_shapes(seen.sizes, seen.batch, seen.one_head)
        out = []
        for part, array, shape in zip(parts, self.results, shapes, strict=False):
            name = f"dy ({array.name})" if several else "dy"
            if part is None:
                like = np.dtype(object) if seen.compute is None else real_dtype(seen.compute)
                part = np.zeros_like(next(iter(seen.original.values())), shape=shape, dtype=like)
            part = self._array(Array(name, "number", array.shapes), part)
            if part.shape != shape:
                raise ValueError(f"{self.name}: {name} must have the result's shape {shape}, got {part.shape}")
            if seen.one_head and array.shapes[0].heads is not None:
                part = np.expand_dims(part, part.ndim + 1 + array.shapes[0].heads)
            out.append(cast(part, array, seen.work))
        return tuple(out) if several else out[0]

    def _cotangent_state(self, dstate, seen: _Call):
        if dstate is None:
            return None
        fields = dstate if isinstance(dstate, tuple) else (dstate,)
        if len(fields) != self._state_size(fields):
            raise ValueError(f"{self.name}: dstate must have the state's {len(self.states)} parts, got {len(fields)}")
        out = []
        for value, array in zip(fields, self.states, strict=False):
            shape = array.shapes[0]
            if value is None:
                like = next(iter(seen.original.values()))
                value = np.zeros_like(like, shape=lengths_of(shape, seen.sizes, seen.batch), dtype=seen.compute or object)
            else:
                value = self._array(Array(f"d{array.name}", "number", array.shapes), value)
                expected = lengths_of(shape, seen.sizes, seen.batch, drop_heads=seen.one_head)
                if value.shape != expected:
                    raise ValueError(f"{self.name}: d{array.name} must have the state's shape {expected}, got {value.shape}")
                if seen.one_head and shape.heads is not None:
                    value = np.expand_dims(value, value.ndim + 1 + shape.heads)
            out.append(cast(value, array, seen.compute))
        if not isinstance(dstate, tuple):
            return out[0]
        return type(dstate)(*out) if hasattr(dstate, "_fields") else tuple(out)

    def _give_gradients(self, gradients: dict, seen: _Call) -> dict:
        given: dict[str, Any] = {}
        for name, g in gradients.items():
            if seen.arguments.get(name) is None or g is None:
                continue
            if name == "state" and isinstance(g, tuple):
                normal, original = seen.arguments["state"], [seen.original[s.name] for s in self.states]
                given[name] = _tuple_like(normal, [like_argument(v, n, o) for v, n, o in zip(g, normal, original, strict=True)])
            elif name in seen.original:
                given[name] = like_argument(g, seen.arguments[name], seen.original[name])
            elif isinstance(seen.arguments[name], tuple):
                normal, original = seen.arguments[name], [seen.original[f"{name}[{i}]"] for i in range(len(g))]
                given[name] = _tuple_like(normal, [like_argument(v, n, o) for v, n, o in zip(g, normal, original, strict=True)])
            else:
                given[name] = g
        return given


def _tuple_like(state: tuple, parts: list) -> tuple:
    """A state of the caller's type: a NamedTuple, or a plain tuple in the same order."""
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


@functools.cache
def _tuple_type(name: str, count: int) -> type:
    return namedtuple(name, [f"{name}_{i + 1}" for i in range(count)])


def tuple_of(name: str, arrays) -> tuple:
    """A tuple of arrays as chapters draw it: a NamedTuple, which its fields tell from an option that is a tuple of numbers."""
    arrays = tuple(arrays)
    return _tuple_type(name, len(arrays))(*arrays)


def _describe(value) -> str:
    return f"shape {value.shape}" if is_array(value) else type(value).__name__
