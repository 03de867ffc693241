"""Which method computes a matrix memory where the caller leaves it open: the one place, and data.

Of one H100 (`asv_benchmarks/results/device/2026-11-22-chunkwise*.json`, `-channels.json`): where a kernel on tensor cores can be taken, it
is faster than both others, at any length and for few memories too, but for a decay of each head and sequences of 16384 steps and more
of fewer than 16 memories, where chunks of cuBLAS's keep the device busier (and the host: the call takes longer by the clock).
Elsewhere, with a decay of each head, chunks are 3 to 4 times as fast as the fused recurrence, and 5 to 7 times in the gradient; with
decays of each channel only the gradient is faster, in chunks of 64; with the delta rule nothing is. A call in chunks is 20 launches,
its gradient 40: where the recurrence takes no longer than those, it stays.
"""

import math
from typing import NamedTuple

from refimpl.core.options import one_of, positive_int


class Choice(NamedTuple):
    """A method, and steps of a chunk, None for what `chunkwise.length` says."""

    method: str
    chunk: int | None = None


METHODS = ("fused", "chunkwise", "tensor")
CHUNKED = {  # by what decays, and whether it is the gradient: what is faster than the fused recurrence at all
    ("head", False): Choice("chunkwise", 128),
    ("head", True): Choice("chunkwise", 128),
    ("channel", True): Choice("chunkwise", 64),
}
LEAST = {False: 250_000_000, True: 100_000_000}  # numbers of all states, times steps, from which launches no longer dominate
LEAST_TENSOR = {False: 0, True: 20_000_000}  # the same for the kernel on tensor cores, which is one launch, its gradient five
LONGEST = 128  # steps of a chunk
WIDEST = 128  # features of a key that the kernel on tensor cores holds
NEVER = ("float64",)  # not timed in chunks


def chosen(
    operator: str,
    method: str | None,
    chunk: int | None,
    *,
    kind: str,
    gradient: bool,
    heads: tuple[int, ...],
    T: int,
    d: int,
    e: int,
    dtype,
    adjoint: bool = True,
    normalised: bool = False,
) -> Choice:
    """The method of a call: what is asked for, or with None what the table says.

    Parameters
    ----------
    kind : {"head", "channel", "delta"}
        Decays of each head, of each channel, or the delta rule.
    heads : tuple of int
        Batch axes and heads: how many memories are computed.
    T, d, e : int
        Steps, features of a key, of a value.
    adjoint : bool
        Whether the gradient can be that of the kernel on tensor cores.
    normalised : bool
        Whether results are divided by q·n, which the kernel for decays of each channel does not do.

    Raises
    ------
    ValueError
        If the method is unknown, or a length of chunks is given for one that has none, or is too large.
    """
    if method is not None:
        one_of(operator, "method", method, METHODS)
    if chunk is not None:
        if method != "chunkwise":
            raise ValueError(f"{operator}: chunk_length is for method='chunkwise', got {chunk!r} with method={method!r}")
        positive_int(operator, "chunk_length", chunk)
        if chunk > LONGEST:
            raise ValueError(f"{operator}: chunk_length must be at most {LONGEST}, got {chunk}")
    channels = not normalised and (not gradient or (adjoint and e <= WIDEST))
    takes = {"head": not gradient or adjoint, "channel": channels, "delta": False}[kind]
    tensor = takes and dtype.name == "bfloat16" and 0 < d <= WIDEST and e > 0
    if method == "tensor" and not tensor:
        return Choice("chunkwise")
    if method is not None:
        return Choice(method, chunk)
    work = math.prod(heads) * T * d * e
    if tensor and work >= LEAST_TENSOR[gradient]:
        return Choice("tensor")
    if work < LEAST[gradient] or dtype.name in NEVER:
        return Choice("fused")
    return CHUNKED.get((kind, gradient), Choice("fused"))
