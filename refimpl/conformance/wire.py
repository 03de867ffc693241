"""Trees of arrays as bytes, and back: what passes between the judge and a candidate in a process of its own.

A header in JSON, then the arrays' bytes. No pickle: what a candidate's process sends is data and stays data, and nothing
that it sends makes the reader fail in another way than by ValueError, wait longer than it is willing to, or take memory
without end.
"""

import json
import select
import socket
import time
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np

LONGEST = 2**31  # bytes of a message
_array = np.array  # kept, since a candidate may replace what NumPy calls by this name
_EVERY = 0.1  # seconds between two looks at a process that one waits for


def encode(tree: Any) -> bytes:
    """Bytes of a tree of dicts, lists, tuples, named tuples, arrays, numbers, strings, None."""
    buffers: list[bytes] = []

    def describe(node):
        if isinstance(node, np.ndarray | np.generic):
            array = _array(node, subok=False)
            if array.dtype.kind not in "fiubcV" or array.dtype.hasobject or array.dtype.names:
                raise TypeError(f"wire: cannot send an array of {array.dtype}")
            buffers.append(array.tobytes())
            return {"array": [array.dtype.name, list(array.shape), len(buffers[-1])]}
        if isinstance(node, tuple) and hasattr(node, "_fields"):
            return {"named": [type(node).__name__, list(node._fields), [describe(v) for v in node]]}
        if isinstance(node, tuple):
            return {"tuple": [describe(v) for v in node]}
        if isinstance(node, list):
            return {"list": [describe(v) for v in node]}
        if isinstance(node, dict):
            return {"dict": [[k, describe(v)] for k, v in node.items()]}
        if isinstance(node, complex):
            return {"complex": [node.real, node.imag]}
        if node is None or isinstance(node, bool | int | float | str):
            return {"value": node}
        raise TypeError(f"wire: cannot send {type(node).__name__}")

    header = json.dumps(describe(tree)).encode()
    return len(header).to_bytes(8, "little") + header + b"".join(buffers)


def decode(data: bytes) -> Any:
    """The tree that `encode` made bytes of.

    Raises
    ------
    ValueError
        If the bytes are not such a tree.
    """
    try:
        return _decoded(data)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise ValueError(f"wire: not a message ({error})") from None


def _decoded(data: bytes) -> Any:
    size = int.from_bytes(data[:8], "little")
    header, position = json.loads(data[8 : 8 + size]), 8 + size

    def build(node):
        nonlocal position
        ((kind, content),) = node.items()
        if kind == "array":
            name, shape, length = content
            if any(size < 0 for size in shape):
                raise ValueError(f"an array of shape {shape}")
            array = np.frombuffer(data[position : position + length], dtype=_dtype(name)).reshape(shape).copy()
            position += length
            return array
        if kind == "named":
            name, fields, values = content
            return namedtuple(name, fields)(*[build(v) for v in values])
        if kind == "tuple":
            return tuple(build(v) for v in content)
        if kind == "list":
            return [build(v) for v in content]
        if kind == "dict":
            return {k: build(v) for k, v in content}
        return complex(*content) if kind == "complex" else content

    return build(header)


class Gone(EOFError):
    """The other side has closed the connection."""


class Channel:
    """One end of a connection on which trees go to and fro, none of them waited for longer than one is willing to."""

    def __init__(self, end: socket.socket):
        end.setblocking(False)
        self._end = end

    def close(self) -> None:
        self._end.close()

    def send(self, tree: Any, seconds: float | None = None) -> None:
        """Send a tree.

        Raises
        ------
        TimeoutError, Gone
            If the other side does not take it.
        """
        data = encode(tree)
        left = memoryview(len(data).to_bytes(8, "little") + data)
        deadline = None if seconds is None else time.monotonic() + seconds
        while left:
            self._ready(deadline, None, writing=True)
            try:
                left = left[self._end.send(left[: 1 << 20]) :]
            except BlockingIOError:
                continue
            except OSError:
                raise Gone("the other side closed the connection") from None

    def receive(self, seconds: float | None = None, watch: Callable[[], None] | None = None) -> Any:
        """The next tree; `watch` is called now and then while waiting, and may raise.

        Raises
        ------
        TimeoutError, Gone
            If none comes.
        ValueError
            If what comes is none.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        count = int.from_bytes(self._exactly(8, deadline, watch), "little")
        if count > LONGEST:
            raise ValueError("wire: not a message (too long)")
        return decode(self._exactly(count, deadline, watch))

    def _exactly(self, count: int, deadline: float | None, watch: Callable[[], None] | None) -> bytes:
        data = bytearray()
        while len(data) < count:
            self._ready(deadline, watch, writing=False)
            try:
                part = self._end.recv(min(count - len(data), 1 << 20))
            except BlockingIOError:
                continue
            except OSError:
                part = b""
            if not part:
                raise Gone("the other side closed the connection")
            data += part
        return bytes(data)

    def _ready(self, deadline: float | None, watch: Callable[[], None] | None, writing: bool) -> None:
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError("no answer")
            pause = left if watch is None else _EVERY if left is None else min(left, _EVERY)
            poll = select.poll()
            poll.register(self._end, select.POLLOUT if writing else select.POLLIN)
            if poll.poll(None if pause is None else 1000 * pause):
                return
            if watch is not None:
                watch()


def _dtype(name: str) -> np.dtype:
    try:
        found = np.dtype(name)
    except TypeError:
        import ml_dtypes

        found = np.dtype(getattr(ml_dtypes, name))
    if found.hasobject:
        raise ValueError(f"an array of {name}")
    return found
