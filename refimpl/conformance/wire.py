"""Trees of arrays as bytes, and back: what passes between the judge and a candidate in a process of its own.

A header in JSON, then the arrays' bytes. No pickle: what a candidate's process sends is data and stays data.
"""

import json
from collections import namedtuple
from typing import Any, BinaryIO

import numpy as np


def encode(tree: Any) -> bytes:
    """Bytes of a tree of dicts, lists, tuples, named tuples, arrays, numbers, strings, None."""
    buffers: list[bytes] = []

    def describe(node):
        if isinstance(node, np.ndarray | np.generic):
            array = np.ascontiguousarray(node).reshape(np.shape(node))
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
        size = int.from_bytes(data[:8], "little")
        header, position = json.loads(data[8 : 8 + size]), 8 + size
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"wire: not a message ({error})") from None

    def build(node):
        nonlocal position
        ((kind, content),) = node.items()
        if kind == "array":
            name, shape, length = content
            dtype = _dtype(name)
            array = np.frombuffer(data[position : position + length], dtype=dtype).reshape(shape).copy()
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


def send(stream: BinaryIO, tree: Any) -> None:
    data = encode(tree)
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    """The next tree.

    Raises
    ------
    EOFError
        If the other side is gone.
    """
    return decode(_exactly(stream, int.from_bytes(_exactly(stream, 8), "little")))


def _exactly(stream: BinaryIO, count: int) -> bytes:
    parts = []
    while count:
        part = stream.read(count)
        if not part:
            raise EOFError("the other side closed the connection")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _dtype(name: str) -> np.dtype:
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
