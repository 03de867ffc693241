"""Where the wrong elements are, in words: "only t >= 64", "last 17 columns of every row", "batch 1 only"."""

import numpy as np


def describe(bad: np.ndarray, axes: tuple[str, ...]) -> str:
    """Words for the places where `bad` is true; `axes` names the last axes, the others are batch axes."""
    if bad.ndim == 0 or not bad.any():
        return "the only element" if bad.ndim == 0 else "nowhere"
    names = axes_of(bad.ndim, axes)
    if bad.all():
        return "every element"
    parts = []
    for axis, name in enumerate(names):
        others = tuple(i for i in range(bad.ndim) if i != axis)
        touched = np.flatnonzero(bad.any(axis=others))
        words = _run(touched, bad.shape[axis], name)
        if words:
            parts.append(words)
    share = bad.mean()
    if not parts:
        return f"{share:.2%} of the elements, scattered over every axis" if share < 0.9 else f"{share:.1%} of the elements"
    inside = bad[np.ix_(*[np.flatnonzero(bad.any(axis=tuple(i for i in range(bad.ndim) if i != a))) for a in range(bad.ndim)])]
    tail = "" if inside.mean() > 0.5 else f" ({share:.2%} of the elements)"
    return "only " + ", ".join(parts) + tail


def axes_of(ndim: int, axes: tuple[str, ...]) -> tuple[str, ...]:
    """A name for every axis, the last of which have these."""
    batch = ndim - len(axes)
    return tuple(f"batch axis {i}" if batch > 1 else "batch" for i in range(batch)) + tuple(axes[-ndim:] if axes else ())


def _run(touched: np.ndarray, size: int, name: str) -> str:
    """Words for the indices touched along one axis; empty where that is all of them, or nearly."""
    count = len(touched)
    if count == size or size == 1:
        return ""
    first, last = int(touched[0]), int(touched[-1])
    if count == 1:
        return f"{name} = {first}" + (" (the last)" if first == size - 1 and size > 2 else "")
    if last - first + 1 == count:
        if last == size - 1:
            return f"{name} >= {first}" + (f" (the last {count} of {size})" if count < 33 else "")
        return f"{name} <= {last}" if first == 0 else f"{first} <= {name} <= {last}"
    steps = np.diff(touched)
    if np.all(steps == steps[0]):
        return f"{name} = {first}, {first + steps[0]}, {first + 2 * steps[0]} ..." if count > 2 else f"{name} = {first}, {last}"
    for tile in (256, 128, 64, 32, 16):
        if first == tile and np.all(touched >= tile) and count > 0.5 * (size - tile):
            return f"{name} >= {tile}"
        if count > 2 and np.all(touched % tile == touched[0] % tile):
            return f"{name} = {first % tile} modulo {tile}"
    if first > 0 and count > 0.7 * (size - first):
        return f"{name} >= {first}"
    if last < size - 1 and count > 0.7 * (last + 1):
        return f"{name} <= {last}"
    return f"{count} of {size} values of {name}" if count < 0.5 * size else ""
