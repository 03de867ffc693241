"""From a call by the contract's names to a call as the candidate wants it, and its answer back into the contract's form."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.conformance.cases import Support, parameters
from refimpl.conformance.frameworks import framework as make_framework
from refimpl.conformance.invoke import Answer, Invoker, Request
from refimpl.conformance.worker import Child, keywords, load, source
from refimpl.op import Op

_MISSING = re.compile(r"missing \d+ required (positional|keyword-only) argument")


class Candidate:
    """An implementation under test.

    Parameters
    ----------
    op : Op
    function : callable or str
        The implementation, or where to find it (``file.py:name``).
    framework, device, vjp, layout, timeout
        As in `check`.
    fixed : dict
        Options that the domain fixes to one value.
    isolate : bool
        Run it in a process of its own; then nothing of it is imported here.
    memory : float, optional
        GiB that this process may take.
    """

    def __init__(self, op: Op, function: Callable | str, *, framework="numpy", device=None, vjp=None, layout=None, timeout=60.0, fixed=None, isolate=False, memory=None):
        self.framework = framework
        self.op, self.layout = op, Layout(op, layout) if layout else None
        self.fixed = fixed or {}
        self._demanded: dict[str, Any] = {}  # options without a default in its signature, with the contract's
        self.can_differentiate = vjp is not None or framework != "numpy"
        self.vjp = plain_name(vjp) if vjp is not None else ""
        if isolate:
            self._invoke: Any = Child(function, framework, device, vjp, timeout, memory)
            names, self.source = self._invoke.keywords, self._invoke.source
        else:
            function = load(function) if isinstance(function, str) else function
            vjp = load(vjp) if isinstance(vjp, str) else vjp
            self._invoke = Invoker(function, make_framework(framework, device), vjp, timeout)
            names, self.source = keywords(function), source(function)
        self.support = Support(None if names is None else frozenset(names))

    @property
    def mutable(self) -> bool:
        """Whether its framework's arrays can be overwritten, so that other values can stand in the same memory."""
        return self.framework != "jax"

    @property
    def isolated(self) -> bool:
        """Whether it runs in a process of its own."""
        return isinstance(self._invoke, Child)

    def close(self) -> None:
        if isinstance(self._invoke, Child):
            self._invoke.close()

    @property
    def hopeless(self) -> bool:
        """Whether its process was lost so often in a row that there is no point in asking on."""
        return isinstance(self._invoke, Child) and self._invoke.hopeless

    def hope(self) -> None:
        """Ask on nevertheless: in another precision it may do better."""
        if isinstance(self._invoke, Child):
            self._invoke.lost = 0

    def passed(self, call: dict) -> list[str]:
        """The arguments of a call that go by keyword: not those that the domain fixes and the function does not have."""
        required, _, _ = parameters(self.op)
        return [n for n in call if n not in required and (n not in self.fixed or n in (self.support.keywords or ()))]

    def finish(self) -> Answer:
        """Whether results that were returned long ago still are what they were."""
        return self._invoke(Request([], {}, [], finish=True))

    def call(self, call: dict, *, view="contiguous", repeat=1, poison=(), second: dict | None = None, manner="") -> Answer:
        """Results in the contract's form: one array, or a tuple, the state last.

        With `second`, other values for the same arguments, `again` ends with the results for those and for the first
        ones once more, computed in the same buffers.
        """
        request = self._request(call, view=view, repeat=repeat, poison=tuple(poison), manner=manner)
        if second is not None:
            other = self._request(second)
            request.second = dict(zip(other.names, other.positional, strict=True)) | other.keywords
        answer = self._ask(request)
        nested = not call.get("return_state")
        answer.result = self._back(answer.result, nested)
        answer.again = [self._back(r, nested) for r in answer.again]
        return answer

    def gradient(self, call: dict, dy, dstate, *, view="contiguous", manner="") -> Answer:
        """Gradients by argument name; `manner` is one of `invoke`'s, for a framework that differentiates by itself."""
        dy = self.layout.results_in(dy) if self.layout else dy
        request = self._request(call, view=view, manner=manner)
        request.cotangents = (dy, dstate)
        answer = self._ask(request)
        if isinstance(answer.result, dict) and self.layout:
            answer.result = {n: self.layout.argument_back(n, g) for n, g in answer.result.items()}
        return answer

    def _ask(self, request: Request) -> Answer:
        """The answer; a function that takes any keyword refuses one by saying that it does not expect it."""
        answer = self._invoke(request)
        answer.message = printable(answer.message)
        if answer.status == "ERROR" and self.support.keywords is None and "unexpected keyword argument" in answer.message:
            return Answer(status="NOT_APPLICABLE", message=answer.message)
        missing = set(re.findall(r"'(\w+)'", answer.message)) if answer.status == "ERROR" and _MISSING.search(answer.message) else set()
        if missing and not missing & (request.keywords.keys() | set(request.names)):
            return self._without(request, answer, missing)
        return answer

    def _without(self, request: Request, answer: Answer, missing: set[str]) -> Answer:
        """What a signature demands and the contract does not: options get their defaults, an array that is not given is a refusal."""
        _, optional, options = parameters(self.op)
        known = {n: v for n, v in options.items() if v is not inspect.Parameter.empty} | ({"return_state": False} if self.op.stateful else {})
        if missing <= known.keys():
            self._demanded |= {n: known[n] for n in missing}
            request.keywords = self._demanded | request.keywords
            return self._ask(request)
        return Answer(status="NOT_APPLICABLE", message=answer.message) if missing <= {*optional, *known, "state"} else answer

    def _request(self, call: dict, **more) -> Request:
        required, _, _ = parameters(self.op)
        arrays = {a.name for a in self.op.contract.arrays}
        call = {n: np.asarray(v) if n in arrays and isinstance(v, np.generic) else v for n, v in call.items()}  # 0-d arithmetic gives scalars
        if self.layout:
            call = {n: self.layout.argument_in(n, v, call) for n, v in call.items()}
        return Request([call[n] for n in required], self._demanded | {n: call[n] for n in self.passed(call)}, required, **more)

    def _back(self, result, nested: bool):
        """A result in the contract's form; without a state, (y, (a, b)) is taken for (y, a, b)."""
        if nested and type(result) is tuple:
            result = tuple(part for parts in result for part in (parts if type(parts) is tuple else (parts,)))
        return self.layout.results_back(result) if self.layout and result is not None else result


def plain_name(function: Callable | str) -> str:
    """What a function is called where it is defined."""
    name = function if isinstance(function, str) else getattr(function, "__qualname__", type(function).__name__)
    return name.rpartition(":")[2].rpartition(".")[2]


def given(operator: str, call: dict, *, framework: str = "numpy", device: str | None = None, view: str = "contiguous", layout: str | None = None) -> dict:
    """A call as a candidate is given it: in a framework's arrays, with a memory layout and an order of axes."""
    from refimpl.catalogue import operator as find

    arrays, moved = make_framework(framework, device), Layout(find(operator), layout) if layout else None

    def put(x):
        if isinstance(x, tuple) and any(isinstance(v, np.ndarray) for v in x):
            return type(x)(*map(put, x)) if hasattr(x, "_fields") else tuple(map(put, x))
        return arrays.array(x, view) if isinstance(x, np.ndarray) else x

    return {n: put(moved.argument_in(n, v, call) if moved else v) for n, v in call.items()}


def gradient_of(operator: str, function: Callable, call: dict, dy, dstate=None, *, framework="numpy", device=None, layout=None, vjp=None, view="contiguous", manner="") -> dict:
    """A candidate's gradients by argument, as arrays of NumPy: its framework's, or those that `vjp` returns."""
    from refimpl.catalogue import operator as find

    subject = Candidate(find(operator), function, framework=framework, device=device, layout=layout, vjp=vjp)
    subject.fixed = {n: v for n, v in call.items() if not subject.support.takes(n)}
    answer = subject.gradient(call, dy, dstate, view=view, manner=manner)
    if answer.status != "OK":
        raise RuntimeError(f"{answer.status}: {answer.message}")
    return answer.result


def printable(text: str) -> str:
    """One line that can be shown anywhere: what a candidate says must not look like what the kit says."""
    return "".join(ch if ch.isprintable() else " " if ch.isspace() else "�" for ch in text[:1000])


class Layout:
    """Another order of axes, as a string of roles: b batch, h heads, t time, d (or c) features: "bthd", "bdt".

    Arrays that lack a role (a per-step scalar has no features) keep the order of the rest; arrays without time stay as
    they are.

    Raises
    ------
    ValueError
        If the string is not such an order.
    """

    def __init__(self, op: Op, order: str):
        self.order = order.replace("c", "d")
        if sorted(self.order) not in (sorted("bhtd"), sorted("btd"), sorted("bht"), sorted("bt")):
            raise ValueError(f"check: layout must be an order of the letters b, h, t and d such as 'bthd' or 'bdt', got {order!r}")
        self.op = op
        self.arrays = {a.name: a for a in op.contract.arrays if not a.name.startswith("state")}

    def _roles(self, shape) -> str | None:
        roles = ""
        for axis in shape.axes:
            letter = axis.rstrip("?")
            roles += "h" if letter.startswith("H") or letter == "G" else "t" if letter in self.op.lengths else "d"
        return roles if "t" in roles and roles.count("d") <= 1 and roles.count("t") == 1 else None

    def _permutation(self, array, ndim: int) -> list[int] | None:
        for shape in array.shapes:
            roles = self._roles(shape)
            if roles is not None and shape.batched and ndim == len(roles) + 1:
                here = "b" + roles
                order = self.order if "h" in self.order else self.order.replace("b", "bh")  # groups stand beside the batch
                return [here.index(r) for r in order if r in here]
        return None

    def argument_in(self, name: str, value, call: dict):
        return self._move(self.arrays.get(name), value, back=False)

    def argument_back(self, name: str, value):
        return self._move(self.arrays.get(name), value, back=True)

    def results_in(self, dy):
        parts = dy if isinstance(dy, tuple) else (dy,)
        moved = tuple(self._move(a, v, back=False) for a, v in zip(self.op.contract.results, parts, strict=False))
        return moved if isinstance(dy, tuple) else moved[0]

    def results_back(self, result):
        several = isinstance(result, tuple)
        parts = list(result) if several else [result]
        count = len(self.op.contract.results)
        moved = [self._move(a, v, back=True) for a, v in zip(self.op.contract.results, parts, strict=False)] + parts[count:]
        return tuple(moved) if several else moved[0]

    def _move(self, array, value, back: bool):
        if array is not None and array.count and isinstance(value, tuple):
            moved = [self._move(array.part(i), v, back) for i, v in enumerate(value)]
            return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
        if array is None or not isinstance(value, np.ndarray):
            return value
        order = self._permutation(array, value.ndim)
        if order is None:
            return value
        return np.transpose(value, np.argsort(order) if back else order)
