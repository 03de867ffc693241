"""The other shapes that a call's arrays may have: alternatives that the contract names, and batch axes that broadcast.

A sample has one shape for each argument, and the batch axes of the call on all of them. Code that was only ever run like
that reads the wrong element when a mask is shared by all heads, or when one key serves the whole batch; and its gradient
forgets to sum.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from refimpl.core.shapes import Array, Shape
from refimpl.op import Op


def reshaped(op: Op, call: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Calls in which one array has another shape: its name, the shape in words, the call.

    Only shapes that are cut out of the given ones are made: a mask for each head gives one for all heads, not the other
    way round.
    """
    arrays = _inputs(op, call)
    layout = op.contract.layout(**arrays, **({"state": call["state"]} if call.get("state") is not None else {}))
    _, batch = op.contract.sizes(**arrays)
    entries = [(a, v, put) for a, v, put in op.contract.entries(call) if isinstance(v, np.ndarray)]
    for array, value, put in entries:
        for shape in array.shapes:
            cut = _cut(value, layout[array.argument], shape)
            if cut is not None:
                yield array.argument, f"{array.name} of shape {shape}", put(cut)
    if 1 in batch or not batch:
        return
    for array, value, put in entries:
        if _own_batch(array, value, layout[array.argument]) == batch:
            one = put(value[(slice(0, 1),) * len(batch)])
            if shared(op, one):
                yield array.argument, f"one {array.name} for the whole batch", one
            if len(batch) > 1:
                yield array.argument, f"one {array.name} for a batch axis", put(value[:1])
        if not layout[array.argument] and value.ndim and shared(op, fewer := put(value[0])):
            yield array.argument, f"{array.name} with an axis fewer", fewer
    state = call.get("state")
    if state is not None and all(own == batch for own in _batches_of_state(op, call)):
        parts = [v[(slice(0, 1),) * len(batch)] for v in (state if isinstance(state, tuple) else (state,))]
        one = {**call, "state": _like(state, parts)}
        if shared(op, one):
            yield "state", "one state for the whole batch", one


def shared(op: Op, call: dict[str, Any]) -> list[str]:
    """The arrays of a call that have fewer batch entries than the others, and serve several, in words."""
    arrays = _inputs(op, call)
    layout = op.contract.layout(**arrays)
    _, batch = op.contract.sizes(**arrays)
    entries = [(a, v) for a, v, _ in op.contract.entries(call) if isinstance(v, np.ndarray)]
    found = [(a.name, own) for a, v in entries if (own := _own_batch(a, v, layout[a.argument])) is not None and own != batch]
    found += [("state", own) for own in _batches_of_state(op, call) if own != batch][:1]
    return [_sharing(name, own, batch) for name, own in found]


def _sharing(name: str, own: tuple[int, ...], batch: tuple[int, ...]) -> str:
    if len(own) < len(batch):
        return f"{name} with an axis fewer"
    return f"one {name} for the whole batch" if max(own, default=1) == 1 else f"one {name} for a batch axis"


def _batches_of_state(op: Op, call: dict[str, Any]) -> list[tuple[int, ...]]:
    """The batch axes of every part of the state that a call is given."""
    state = call.get("state")
    if state is None:
        return []
    layout = op.contract.layout(**_inputs(op, call), state=state)
    parts = state if isinstance(state, tuple) else (state,)
    axes = [layout[s.name] for s in op.contract.states if s.name in layout]
    return [v.shape[: v.ndim - len(a)] for v, a in zip(parts, axes, strict=False)]


def _like(state, parts: list[np.ndarray]):
    if not isinstance(state, tuple):
        return parts[0]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def _inputs(op: Op, call: dict[str, Any]) -> dict[str, Any]:
    return {a.name: call[a.name] for a in op.contract.inputs if call.get(a.name) is not None}


def _own_batch(array: Array, value: np.ndarray, axes: tuple[str, ...]) -> tuple[int, ...] | None:
    """The batch axes of one array that has these other axes; None if its shape has none."""
    fitting = [s for s in array.shapes if axes in (_names(s), _names(s, drop_heads=True))]
    if not any(s.batched for s in fitting) or (value.ndim == len(axes) and not all(s.batched for s in fitting)):
        return None
    return value.shape[: value.ndim - len(axes)]


def _names(shape: Shape, drop_heads: bool = False) -> tuple[str, ...]:
    return tuple(a.rstrip("?") for a in shape.axes if not (drop_heads and a.endswith("?")))


def _cut(value: np.ndarray, axes: tuple[str, ...], shape: Shape) -> np.ndarray | None:
    """The first entries of an array along the axes that another shape lacks or has as 1; None if it has axes of its own."""
    wanted = list(_names(shape))
    if tuple(wanted) == axes:
        return None
    index: list[Any] = []
    for axis in reversed(axes):
        if wanted and wanted[-1] == axis:
            index.append(slice(None))
            wanted.pop()
        elif wanted and wanted[-1] == "1" and len(wanted) >= len(axes) - len(index):
            index.append(slice(0, 1))
            wanted.pop()
        else:
            index.append(0)
    if wanted:
        return None
    batch = value.ndim - len(axes)
    return np.array(value[(*((slice(None) if shape.batched else 0,) * batch), *reversed(index))])
