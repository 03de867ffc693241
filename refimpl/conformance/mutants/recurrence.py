"""Mistakes in linear recurrences and convolutions."""

from refimpl.conformance.mutants import Mutant, edited
from refimpl.ops.recurrence import linear_recurrence as lr

MUTANTS = (
    Mutant(
        "linear_recurrence",
        "compose_swapped",
        "the associative operator's arguments are swapped: (a2, b2)∘(a1, b1) = (a2 a1, a2 b1 + b2), the later step multiplies",
        edited(lr.linear_recurrence_blelloch, ("return a2 * a1, a2 * b1 + b2", "return a2 * a1, a1 * b2 + b1")),
    ),
    Mutant(
        "linear_recurrence",
        "state_reset_at_chunks",
        "the state starts from zero at every chunk: the carry is lost at chunk boundaries",
        edited(lr.linear_recurrence_chunked, ("entering = np.stack(carries[:-1], axis=-2)[..., None, :]", "entering = np.stack([h] + [0 * c for c in carries[1:-1]], axis=-2)[..., None, :]")),
    ),
)
