"""Mistakes in linear recurrences: which decay meets which step, where the state enters, what chunks and trees lose."""

import ml_dtypes
import numpy as np

from refimpl.conformance.mutants import Mutant, edited
from refimpl.ops.recurrence import linear_recurrence as lr

_STEP = "h = a[..., t, :] * h + b[..., t, :]  # (..., c)"


def _tail_starts_afresh(a, b, *, state=None, reverse=False, return_state=False):
    """A tree over the largest power of two that fits; what is left over is scanned by itself."""
    T, options = b.shape[-2], {"reverse": reverse, "return_state": True}
    whole = 1 << (T.bit_length() - 1) if T else 0
    if reverse or whole == T or a.ndim == 1 or a.shape[-2] != T:
        return lr.linear_recurrence(a, b, state=state, reverse=reverse, return_state=return_state)
    head, _ = lr.linear_recurrence(a[..., :whole, :], b[..., :whole, :], state=state, **options)
    tail, last = lr.linear_recurrence(a[..., whole:, :], b[..., whole:, :], **options)
    h = np.concatenate([head, np.broadcast_to(tail, (*head.shape[:-2], *tail.shape[-2:]))], axis=-2)
    return (h, np.broadcast_to(last, (*head.shape[:-2], head.shape[-1]))) if return_state else h


def _state_at_the_beginning(a, b, *, state=None, reverse=False, return_state=False):
    """Backwards, but with the state where a forward run has it: on the last step done, h_0."""
    h, last = lr.linear_recurrence(a, b, state=None if reverse else state, reverse=reverse, return_state=True)
    if reverse and state is not None and b.shape[-2]:
        h = h.copy()
        last = last + (a if a.ndim == 1 else a[..., 0, :]) * state
        h[..., 0, :] = last.astype(h.dtype)
    return (h, last) if return_state else h


def _wraps_around(a, b, *, state=None, reverse=False, return_state=False):
    """A transform as long as the sequence, where the decay is constant."""
    if reverse or not b.shape[-2] or not (a.ndim == 1 or np.all(a == a[..., :1, :])):
        return lr.linear_recurrence(a, b, state=state, reverse=reverse, return_state=return_state)
    _, at_end = lr.linear_recurrence(a, b, state=None, return_state=True)
    h, last = lr.linear_recurrence(a, b, state=at_end if state is None else at_end + state, return_state=True)
    return (h, last) if return_state else h


def _rounded_state(a, b, *, state=None, reverse=False, return_state=False):
    """The state kept in bfloat16 from step to step."""

    def kept(x):
        if x.dtype.kind == "c":
            return (kept(x.real) + 1j * kept(x.imag)).astype(x.dtype)
        return x.astype(ml_dtypes.bfloat16).astype(x.dtype)

    T = b.shape[-2]
    h, rows = state, []
    for t in reversed(range(T)) if reverse else range(T):
        decay = a if a.ndim == 1 else a[..., min(t, a.shape[-2] - 1), :][..., None, :]
        _, h = lr.linear_recurrence(decay, b[..., t : t + 1, :], state=h, return_state=True)
        h = kept(h)
        rows.append(h)
    empty, initial = lr.linear_recurrence(a, b, state=state, reverse=reverse, return_state=True)
    y = np.stack(rows[::-1] if reverse else rows, axis=-2).astype(empty.dtype) if rows else empty
    return (y, h if rows else initial) if return_state else y


MUTANTS = (
    Mutant(
        "linear_recurrence",
        "compose_swapped",
        "the associative operator's arguments are swapped: (a2, b2)∘(a1, b1) = (a2 a1, a2 b1 + b2), the later step multiplies",
        edited(lr.linear_recurrence_blelloch, ("return a2 * a1, a2 * b1 + b2", "return a2 * a1, a1 * b2 + b1")),
    ),
    Mutant(
        "linear_recurrence",
        "decays_not_composed",
        "the scan carries b but not the product of decays: composing two steps multiplies their decays, a2 a1",
        edited(lr.linear_recurrence_hillis_steele, ("return a2 * a1, a2 * b1 + b2", "return a2, a2 * b1 + b2")),
    ),
    Mutant(
        "linear_recurrence",
        "state_reset_at_chunks",
        "the state starts from zero at every chunk: the carry is lost at chunk boundaries",
        edited(
            lr.linear_recurrence_chunked,
            ("entering = np.stack(carries[:-1], axis=-2)", "entering = np.stack([h] + [0 * carry for carry in carries[1:-1]], axis=-2)"),
        ),
    ),
    Mutant(
        "linear_recurrence",
        "carry_not_carried_on",
        "a chunk is handed only what the chunk before it made itself: the carry must pass through every chunk's decay, not end after one",
        edited(
            lr.linear_recurrence_chunked,
            ("carries.append(decay[-1][..., j, :] * carries[-1] + local", "carries.append(0 * decay[-1][..., j, :] * carries[-1] + local"),
        ),
    ),
    Mutant(
        "linear_recurrence",
        "padding_enters_state",
        "the last chunk is padded with decays of 0, and the final state is read behind the padding: pad with the identity step (1, 0)",
        edited(
            lr.linear_recurrence_chunked,
            ("_pad_time(a, pad, 1)", "_pad_time(a, pad, 0)"),
            (
                "    return _finish(y.reshape(*y.shape[:-3], T + pad, c)[..., :T, :], h, reverse, return_state)",
                "    y = _finish(y.reshape(*y.shape[:-3], T + pad, c)[..., :T, :], h, reverse, False)\n    return (y, carries[-1]) if return_state else y",
            ),
        ),
    ),
    Mutant(
        "linear_recurrence",
        "tail_starts_afresh",
        "steps beyond the largest power of two start from zero: the tree does not cover a T that is not a power of two",
        lambda: _tail_starts_afresh,
    ),
    Mutant(
        "linear_recurrence",
        "state_ignored",
        "the initial state is ignored: h_0 = a_0·state + b_0",
        edited(lr.linear_recurrence, ("return a, b, zero if state is None else zero + state", "return a, b, zero")),
    ),
    Mutant(
        "linear_recurrence",
        "state_not_decayed",
        "the initial state is added without its decay: h_0 = a_0·state + b_0",
        edited(
            lr.linear_recurrence_hillis_steele,
            ("first = b[..., :1, :] + a[..., :1, :] * h[..., None, :]", "first = b[..., :1, :] + h[..., None, :]"),
        ),
    ),
    Mutant(
        "linear_recurrence",
        "previous_decay",
        "step t uses a_{t-1}, the decay of the step before: h_t = a_t h_{t-1} + b_t",
        edited(lr.linear_recurrence, (_STEP, "h = a[..., max(t - 1, 0), :] * h + b[..., t, :]")),
    ),
    Mutant(
        "linear_recurrence",
        "input_decayed_too",
        "the decay is applied after the update: h_t = a_t (h_{t-1} + b_t), where the input of a step is not yet decayed by it",
        edited(lr.linear_recurrence, (_STEP, "h = a[..., t, :] * (h + b[..., t, :])")),
    ),
    Mutant(
        "linear_recurrence",
        "moving_average",
        "the input is weighted with 1 - a_t, as in a moving average: it enters as it is",
        edited(lr.linear_recurrence, (_STEP, "h = a[..., t, :] * h + (1 - a[..., t, :]) * b[..., t, :]")),
    ),
    Mutant(
        "linear_recurrence",
        "one_step_late",
        "row t holds h_{t-1} (an exclusive scan): the result at t includes step t's own input",
        edited(lr.linear_recurrence, (f"        {_STEP}\n        hs[t] = h\n", f"        hs[t] = h\n        {_STEP}\n")),
    ),
    Mutant(
        "linear_recurrence",
        "decay_made_positive",
        "decays go through log|a|, which forgets their sign or phase: a may be negative or complex",
        edited(
            lr.linear_recurrence_blelloch, ("    a = a[None, :] if a.ndim == 1 else a\n", "    a = abs(a[None, :] if a.ndim == 1 else a)\n")
        ),
    ),
    Mutant(
        "linear_recurrence",
        "wraps_around",
        "for constant decays, the transform is as long as the sequence, so that the end wraps onto the beginning: pad to 2T",
        lambda: _wraps_around,
    ),
    Mutant(
        "linear_recurrence",
        "reverse_ignored",
        "`reverse` is ignored: h_t = a_t h_{t+1} + b_t",
        edited(lr.linear_recurrence, ("for t in reversed(range(T)) if reverse else range(T):", "for t in range(T):")),
    ),
    Mutant(
        "linear_recurrence",
        "reverse_shifts_decay",
        "backwards, the decay of the later step is used: h_t = a_t h_{t+1} + b_t reads a_t, as forwards (the adjoint recurrence is the one that reads a_{t+1})",
        edited(lr.linear_recurrence, (_STEP, "h = a[..., min(t + 1, T - 1) if reverse else t, :] * h + b[..., t, :]")),
    ),
    Mutant(
        "linear_recurrence",
        "reverse_final_state_at_the_end",
        "backwards, the state returned is the last row: the recurrence ends at t = 0, and h_0 is its final state",
        edited(
            lr.linear_recurrence_blelloch,
            (
                "    last = y[..., -1, :] if y.shape[-2] else h\n    y = y[..., ::-1, :] if reverse else y\n",
                "    y = y[..., ::-1, :] if reverse else y\n    last = y[..., -1, :] if y.shape[-2] else h\n",
            ),
        ),
    ),
    Mutant(
        "linear_recurrence",
        "reverse_state_at_the_beginning",
        "backwards, the initial state enters at t = 0: it stands for h_T, and enters at the last step",
        lambda: _state_at_the_beginning,
    ),
    Mutant(
        "linear_recurrence",
        "state_in_bfloat16",
        "the state is rounded to bfloat16 at every step: it is kept in float32 at least, and results are rounded once, at the end",
        lambda: _rounded_state,
    ),
    Mutant(
        "linear_recurrence",
        "conj_forgotten",
        "the gradient of complex decays lacks the conjugates: g_t = dy_t + conj(a_{t+1}) g_{t+1}, da_t = conj(h_{t-1}) g_t (JAX's convention returns conj(g))",
        edited(
            lr.linear_recurrence_vjp,
            ("linear_recurrence(np.conj(later), dy", "linear_recurrence(later, dy"),
            ('"a": np.conj(before) * g', '"a": before * g'),
            ("at_start = np.conj(a[..., 0, :])", "at_start = a[..., 0, :]"),
        ),
        of_gradient=True,
    ),
    Mutant(
        "linear_recurrence",
        "gradient_of_decay_off_by_one",
        "the gradient of a_t uses h_t: da_t = conj(h_{t-1}) g_t, with the initial state for t = 0",
        edited(lr.linear_recurrence_vjp, ("axis=-2)[..., :-1, :]  # h_{t-1}", "axis=-2)[..., 1:, :]  # h_{t-1}")),
        of_gradient=True,
    ),
    Mutant(
        "linear_recurrence",
        "gradient_own_decay",
        "the adjoint recurrence decays with a_t: it must use a_{t+1}, the decay that h_t meets",
        edited(lr.linear_recurrence_vjp, ("linear_recurrence(np.conj(later), dy", "linear_recurrence(np.conj(a), dy")),
        of_gradient=True,
    ),
    Mutant(
        "linear_recurrence",
        "dstate_ignored",
        "the cotangent of the final state is ignored: the adjoint recurrence starts from it",
        edited(lr.linear_recurrence_vjp, ("last = np.zeros_like(first) if dstate is None else dstate", "last = np.zeros_like(first)")),
        of_gradient=True,
    ),
    Mutant(
        "linear_recurrence",
        "gradient_of_state_not_decayed",
        "the gradient of the initial state lacks the first decay: it is conj(a_0) g_0",
        edited(lr.linear_recurrence_vjp, ("at_start = np.conj(a[..., 0, :]) * g[..., 0, :]", "at_start = g[..., 0, :]")),
        of_gradient=True,
    ),
    Mutant(
        "linear_recurrence",
        "gradient_does_not_reach_the_state",
        "no gradient reaches the initial state from more than 256 steps on: it goes back through every step",
        edited(lr.linear_recurrence_vjp, ("g[..., 0, :] if b.shape[-2] else last", "g[..., 0, :] * (b.shape[-2] <= 256) if b.shape[-2] else last")),
        of_gradient=True,
    ),
    Mutant(
        "linear_recurrence",
        "initial_state_left_out_of_gradient",
        "the gradient of a_0 takes the initial state to be zero: da_0 = conj(state) g_0",
        edited(lr.linear_recurrence_vjp, ("np.concatenate([first[..., None, :], h]", "np.concatenate([0 * first[..., None, :], h]")),
        of_gradient=True,
    ),
)
