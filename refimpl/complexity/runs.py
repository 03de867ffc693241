"""`measure`: one run of a form on counted arrays.

The call that is measured is the plain one: the chapter's sample, required arrays only, options at their defaults; further
arrays by `give`, options and block sizes by name. Everything runs in one thread, on float64.
"""

import contextlib
import gc
import inspect
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from refimpl.catalogue import catalogue, unknown
from refimpl.complexity.arrays import Counted, adopt, buffer_of, plain
from refimpl.complexity.counter import Counts, Ledger, Uncounted, active
from refimpl.complexity.functions import Transforms
from refimpl.complexity.movement import MAKERS
from refimpl.core.parallel import one_thread
from refimpl.op import Op

_lock = threading.RLock()


def measure(
    op: str | Op, form: str | None = None, *, give: Sequence[str] = (), memory: int | None = None, seed: int = 0, **sizes
) -> Counts:
    """Count what one call of a form costs.

    Parameters
    ----------
    op : str or Op
        An operator, or its name.
    form : str, optional
        One of its forms; the definition by default. "vjp" is the gradient, with a cotangent of ones for each result.
    give : sequence of str
        Optional arrays (a mask, a state) to pass besides the required ones.
    memory : int, optional
        Bytes of a small memory, whose transfers are counted too.
    seed : int
        Of the arrays' values.
    **sizes
        Sizes by the letters of the operator's sample (``T=256``, ``batch=(2,)``), options and block sizes of the form by
        name (``causal=True``, ``chunk=16``).

    Returns
    -------
    Counts

    Raises
    ------
    ValueError
        If there is no such operator, form, size or option.
    Uncounted
        If the form uses an operation that the counter does not know.

    Notes
    -----
    Counts are integers and the same in every run and on every machine: only shapes, and where a form looks at its data
    (sorting, compaction, convergence) the values drawn from `seed`, have a say in them.

    Examples
    --------
    >>> from refimpl.complexity import measure
    >>> counts = measure("linear_recurrence", "sequential", T=100, c=3)
    >>> counts.work, counts.depth
    (600, 200)
    """
    op, form = find(op, form)
    function = function_of(op, form)
    try:
        return run(function, arguments(op, form, give=give, seed=seed, **sizes), memory)
    except ValueError:
        for name in op.hard:  # a form for special calls: the first kind that it takes
            with contextlib.suppress(ValueError):
                return run(function, arguments(op, form, give=give, seed=seed, hard=name, **sizes), memory)
        raise


GRADIENT = "vjp"


def function_of(op: Op, form: str) -> Any:
    """What is called: a form, or the gradient."""
    return op.gradient if form == GRADIENT else op.forms[form].function


def find(op: str | Op, form: str | None) -> tuple[Op, str]:
    """The operator and the form's name; ValueError if there is none."""
    if isinstance(op, str):
        if op not in catalogue():
            raise ValueError(unknown(op))
        op = catalogue()[op]
    form = next(iter(op.forms)) if form is None else form
    if form == GRADIENT and op.gradient is not None:
        return op, form
    if form not in op.forms:
        raise ValueError(f"{op.name}: there is no form {form!r}, only {', '.join(op.forms)}")
    return op, form


def letters(op: Op) -> dict[str, Any]:
    """The sizes that an operator's sample takes, with the values that they have when nothing is said."""
    return {p.name: p.default for p in inspect.signature(op.sample).parameters.values() if p.kind is p.KEYWORD_ONLY}


def arguments(op: Op, form: str, *, give: Sequence[str] = (), seed: int = 0, hard: str | None = None, **sizes) -> dict[str, Any]:
    """The plain call at given sizes, arrays and options by name: of the chapter's sample, or of one of its hard inputs."""
    taken = inspect.signature(function_of(op, form)).parameters
    known = letters(op)
    own = {k: v for k, v in sizes.items() if k in known}
    options = {k: v for k, v in sizes.items() if k not in known or (k in taken and k in op.options)}
    arrays = {a.name.partition(".")[0] for a in op.contract.arrays}
    for name in options:
        if name not in taken or name in arrays:
            raise ValueError(f"{op.name}: {form} has neither a size nor an option {name!r}; sizes are {', '.join(known)}")
    draw = op.sample if hard is None else op.hard[hard]
    sample = draw(np.random.default_rng(seed), **own)
    for name in give:
        if sample.get(name) is None:
            raise ValueError(f"{op.name}: the sample has no array {name!r}, only {', '.join(sample)}")
    required = {n for n, p in taken.items() if p.default is p.empty} - {"dy"}
    call = {n: v for n, v in sample.items() if n in required or n in give}
    call |= {n: op.options[n][0] for n in required - call.keys() if n in op.options}
    call = {n: v(**(known | own)) if callable(v) else v for n, v in (call | options).items()}
    call = call if op.arrange is None else {n: v for n, v in op.arrange(call).items() if n in call}
    if form == GRADIENT:
        result = op.definition(**call)
        call = {"dy": tuple(map(np.ones_like, result)) if isinstance(result, tuple) else np.ones_like(result), **call}
    return call


def run(function, call: dict[str, Any], memory: int | None = None) -> Counts:
    """Count what a function does with the arrays of a call."""
    return execute(function, call, memory)[1]


def execute(function, call: dict[str, Any], memory: int | None = None) -> tuple[Any, Counts]:
    """The function's result, in plain arrays, and what it cost."""
    ledger = Ledger(memory)
    given = {name: _counted(value, ledger) for name, value in call.items()}
    with _measuring(ledger):
        result = function(**given)
    for part in _parts(result):
        if isinstance(part, np.ndarray) and not isinstance(part, Counted):
            raise Uncounted("complexity: a result was made where nothing is counted")
        if ledger.cache is not None and isinstance(part, Counted):
            ledger.cache.flush(buffer_of(part))
    return plain(result), ledger.counts()


def _counted(value: Any, ledger: Ledger) -> Any:
    if isinstance(value, np.ndarray):
        return adopt(np.array(plain(value), order="C"), 0, ledger, given=True)
    if isinstance(value, tuple) and any(isinstance(v, np.ndarray) for v in value):
        parts = [_counted(v, ledger) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _parts(result: Any) -> Iterator[Any]:
    if isinstance(result, tuple | list):
        for part in result:
            yield from _parts(part)
    elif isinstance(result, dict):
        yield from _parts(list(result.values()))
    else:
        yield result


@contextlib.contextmanager
def _measuring(ledger: Ledger) -> Iterator[None]:
    """Within, what NumPy makes of nothing is counted, in this context only; nothing is freed but by going out of use."""
    import scipy.fft

    with _lock, one_thread(), scipy.fft.set_backend(Transforms):
        originals = [(module, name, getattr(module, name)) for module, name, _ in MAKERS]
        collecting = gc.isenabled()
        gc.disable()
        token = active.set(ledger)
        for module, name, maker in MAKERS:
            setattr(module, name, maker)
        try:
            yield
        finally:
            for module, name, original in originals:
                setattr(module, name, original)
            active.reset(token)
            if collecting:
                gc.enable()
