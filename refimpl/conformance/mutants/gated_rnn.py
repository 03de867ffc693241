"""Mistakes in gated recurrent networks: LSTM, GRU."""

import numpy as np

from refimpl.conformance.mutants import Mutant, edited
from refimpl.ops.gated_rnn import gru, lstm

_LSTM_GATES = "i, f, g, o = (x[..., t, :] @ W[gate] + h @ R[gate] + b[gate] for gate in range(4))  # (..., d)"


def _lstm_gates(new: str):
    return edited(lstm.lstm, (_LSTM_GATES, f"i, f, g, o = ({new})"))


def _decoding_from_one_state(x, W, R, b=None, *, state=None, return_state=False):
    """A path for single steps that reads the first sequence's state for all."""
    if state is not None and x.shape[-2] == 1 and state.h.ndim > 1:
        first = lstm.State(*(part.reshape(-1, part.shape[-1])[:1] for part in state))
        state = lstm.State(*(np.broadcast_to(one, part.shape) for one, part in zip(first, state, strict=True)))
    return lstm.lstm(x, W, R, b, state=state, return_state=return_state)


_LSTM = (
    Mutant(
        "lstm",
        "decoding_from_one_state",
        "a single step reads the first sequence's state for the whole batch: every sequence goes on from its own",
        lambda: _decoding_from_one_state,
    ),
    Mutant(
        "lstm",
        "gates_in_order_iofg",
        "weights are read in ONNX's order i, o, f, g; the contract's order is i, f, g, o",
        _lstm_gates("x[..., t, :] @ W[gate] + h @ R[gate] + b[gate] for gate in (0, 2, 3, 1)"),
    ),
    Mutant(
        "lstm",
        "gates_in_order_igfo",
        "weights are read in the order i, g, f, o of early TensorFlow; the contract's order is i, f, g, o",
        _lstm_gates("x[..., t, :] @ W[gate] + h @ R[gate] + b[gate] for gate in (0, 2, 1, 3)"),
    ),
    Mutant(
        "lstm",
        "R_transposed",
        "the recurrent weights are transposed: the contract's rows are multiplied from the right, h R",
        _lstm_gates("x[..., t, :] @ W[gate] + h @ R[gate].T + b[gate] for gate in range(4)"),
    ),
    Mutant(
        "lstm",
        "W_transposed",
        "the input weights are transposed (seen where c = d): the contract has x W",
        _lstm_gates("x[..., t, :] @ (W[gate].T if W.shape[1] == W.shape[2] else W[gate]) + h @ R[gate] + b[gate] for gate in range(4)"),
    ),
    Mutant(
        "lstm",
        "recurrence_reads_c",
        "the recurrence reads the cell state; the contract's gates read h",
        _lstm_gates("x[..., t, :] @ W[gate] + c @ R[gate] + b[gate] for gate in range(4)"),
    ),
    Mutant(
        "lstm",
        "bias_ignored",
        "the bias is not added",
        _lstm_gates("x[..., t, :] @ W[gate] + h @ R[gate] for gate in range(4)"),
    ),
    Mutant(
        "lstm",
        "bias_twice",
        "the bias is added twice, for the input and for the recurrence; the contract's b is the sum of both",
        _lstm_gates("x[..., t, :] @ W[gate] + h @ R[gate] + 2 * b[gate] for gate in range(4)"),
    ),
    Mutant(
        "lstm",
        "forget_bias_1",
        "1 is added to the forget gate's pre-activation, as early TensorFlow did; the contract adds b only",
        _lstm_gates("x[..., t, :] @ W[gate] + h @ R[gate] + b[gate] + (gate == 1) for gate in range(4)"),
    ),
    Mutant(
        "lstm",
        "gates_coupled",
        "the input gate is 1 - f (the coupled variant); the contract has an input gate of its own",
        edited(lstm.lstm, ("c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)", "c = sigmoid(f) * c + sigmoid(-f) * np.tanh(g)")),
    ),
    Mutant(
        "lstm",
        "tanh_of_cell_missing",
        "h = o c: the tanh of the cell is missing",
        edited(lstm.lstm, ("return sigmoid(o) * np.tanh(c), c", "return sigmoid(o) * c, c")),
    ),
    Mutant(
        "lstm",
        "cell_input_sigmoid",
        "g = σ(g̃): the cell input is a tanh in the contract",
        edited(lstm.lstm, ("sigmoid(i) * np.tanh(g)\n", "sigmoid(i) * sigmoid(g)\n")),
    ),
    Mutant(
        "lstm",
        "output_of_old_cell",
        "h_t = o tanh(c_{t-1}): the output reads the cell before it was written",
        edited(
            lstm.lstm,
            (
                "    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)\n    return sigmoid(o) * np.tanh(c), c",
                "    return sigmoid(o) * np.tanh(c), sigmoid(f) * c + sigmoid(i) * np.tanh(g)",
            ),
        ),
    ),
    Mutant(
        "lstm",
        "state_swapped",
        "the state is read and returned as (c, h); the contract's order is (h, c)",
        edited(
            lstm.lstm,
            (
                "        hs.append(h)\n    y = np.stack(hs, axis=-2) if hs else _nothing(x, h)  # (..., T, d)\n    return (y, State(h, c)) if return_state else y\n\n\ndef _cell",
                "        hs.append(h)\n    y = np.stack(hs, axis=-2) if hs else _nothing(x, h)\n    return (y, State(c, h)) if return_state else y\n\n\ndef _cell",
            ),
            (
                "    b, h, c = _prepare(x, R, b, state)\n    hs = []\n    for t in range(x.shape[-2]):\n        i, f,",
                "    b, c, h = _prepare(x, R, b, state)\n    hs = []\n    for t in range(x.shape[-2]):\n        i, f,",
            ),
        ),
    ),
    Mutant(
        "lstm",
        "grad_recurrence_cut",
        "the gradient does not go back through h R (truncated backpropagation)",
        edited(lstm.lstm_vjp, ("[..., 0, :].sum(axis=-2)  # Σ da Rᵀ", "[..., 0, :].sum(axis=-2) * 0")),
        of_gradient=True,
    ),
    Mutant(
        "lstm",
        "grad_cell_cut",
        "the gradient does not go back along the cell: f dc is missing",
        edited(lstm.lstm_vjp, ("dc, c = sigmoid(f) * dc, c_before", "dc, c = 0 * dc, c_before")),
        of_gradient=True,
    ),
    Mutant(
        "lstm",
        "grad_reads_new_h",
        "the gradient of R uses h_t; the recurrence read h_{t-1}",
        edited(
            lstm.lstm_vjp,
            ("h_before = np.stack([s.h for s in before], axis=-2)", "h_before = np.stack([s.h for s in before[1:]] + [h], axis=-2)"),
        ),
        of_gradient=True,
    ),
    Mutant(
        "lstm",
        "grad_final_cell_ignored",
        "the cotangent of the final cell state is not used",
        edited(
            lstm.lstm_vjp,
            (
                "(np.zeros_like(h), np.zeros_like(c)) if dstate is None else dstate",
                "(np.zeros_like(h) if dstate is None else dstate[0], np.zeros_like(c))",
            ),
        ),
        of_gradient=True,
    ),
)

_GRU = (
    Mutant(
        "gru",
        "reset_always_after",
        "the reset gate acts on h R_n + b'_n also with linear_before_reset=False, which asks for (r h) R_n + b'_n",
        edited(
            gru.gru,
            (
                "    hs = []\n    for t in range(x.shape[-2]):\n        h = _step",
                "    hs, linear_before_reset = [], True\n    for t in range(x.shape[-2]):\n        h = _step",
            ),
        ),
    ),
    Mutant(
        "gru",
        "reset_always_before",
        "the reset gate acts on h before R_n; with linear_before_reset (the default, as in torch) it acts on h R_n + b'_n",
        edited(
            gru.gru,
            (
                "    hs = []\n    for t in range(x.shape[-2]):\n        h = _step",
                "    hs, linear_before_reset = [], False\n    for t in range(x.shape[-2]):\n        h = _step",
            ),
        ),
    ),
    Mutant(
        "gru",
        "reset_outside_bias",
        "b'_n is added outside the reset gate: n = tanh(x W + b + r (h R) + b'); the contract has r (h R + b')",
        edited(
            gru.gru,
            ("past = h @ R[2] + b_recurrent[2] if linear_before_reset else", "past = h @ R[2] if linear_before_reset else"),
            (
                "n = x @ W[2] + b[2] + (sigmoid(r) * past if linear_before_reset else past)",
                "n = x @ W[2] + b[2] + (sigmoid(r) * past + b_recurrent[2] if linear_before_reset else past)",
            ),
        ),
    ),
    Mutant(
        "gru",
        "z_swapped",
        "h <- z n + (1 - z) h, the convention of the later literature; the contract has (1 - z) n + z h",
        edited(
            gru.gru,
            (
                "return sigmoid(-z) * np.tanh(n) + sigmoid(z) * h, (r, z, n, past)",
                "return sigmoid(z) * np.tanh(n) + sigmoid(-z) * h, (r, z, n, past)",
            ),
        ),
    ),
    Mutant(
        "gru",
        "gates_in_order_zrn",
        "weights are read in the order z, r, n of ONNX and Keras; the contract's order is r, z, n",
        edited(gru.gru, ("for gate in (0, 1))  # (..., d)", "for gate in (1, 0))")),
    ),
    Mutant(
        "gru",
        "R_transposed",
        "the recurrent weights are transposed: the contract's rows are multiplied from the right, h R",
        edited(
            gru.gru,
            (
                "+ h @ R[gate] + b_recurrent[gate] for gate in (0, 1))  # (..., d)",
                "+ h @ R[gate].T + b_recurrent[gate] for gate in (0, 1))",
            ),
            (
                "past = h @ R[2] + b_recurrent[2] if linear_before_reset else (sigmoid(r) * h) @ R[2]",
                "past = h @ R[2].T + b_recurrent[2] if linear_before_reset else (sigmoid(r) * h) @ R[2].T",
            ),
        ),
    ),
    Mutant(
        "gru",
        "recurrent_bias_ignored",
        "b_recurrent is not added",
        edited(
            gru.gru,
            (
                "    b, b_recurrent, h = _prepare(x, R, b, b_recurrent, state)\n    hs = []\n    for t in range(x.shape[-2]):\n        h = _step",
                "    b, b_recurrent, h = _prepare(x, R, b, None, state)\n    hs = []\n    for t in range(x.shape[-2]):\n        h = _step",
            ),
        ),
    ),
    Mutant(
        "gru",
        "reset_ignored",
        "the candidate reads h whole: r is computed and not used",
        edited(
            gru.gru,
            ("if linear_before_reset else (sigmoid(r) * h) @ R[2]", "if linear_before_reset else h @ R[2]"),
            ("(sigmoid(r) * past if linear_before_reset else past)", "past"),
        ),
    ),
    Mutant(
        "gru",
        "candidate_reads_input_only",
        "n = tanh(x W + b): the candidate does not read h",
        edited(gru.gru, ("n = x @ W[2] + b[2] + (sigmoid(r) * past if linear_before_reset else past)", "n = x @ W[2] + b[2]")),
    ),
    Mutant(
        "gru",
        "grad_recurrence_cut",
        "the gradient does not go back through h R (truncated backpropagation)",
        edited(gru.gru_vjp, ("dh = dh + d_r @ R[0].T + d_z @ R[1].T", "dh = dh + 0 * d_r")),
        of_gradient=True,
    ),
    Mutant(
        "gru",
        "grad_biases_equal",
        "b_recurrent is given the gradient of b; inside the reset gate it is r times that",
        edited(gru.gru_vjp, ('"b_recurrent": dp.sum(axis=-2)', '"b_recurrent": da.sum(axis=-2)')),
        of_gradient=True,
    ),
    Mutant(
        "gru",
        "grad_z_sign",
        "the gradient of z has the wrong sign: dz = dh (h - n)",
        edited(gru.gru_vjp, ("d_z = dh * (h - np.tanh(n))", "d_z = dh * (np.tanh(n) - h)")),
        of_gradient=True,
    ),
    Mutant(
        "gru",
        "grad_final_state_ignored",
        "the cotangent of the final state is not used",
        edited(gru.gru_vjp, ("dh = np.zeros_like(h) if dstate is None else dstate", "dh = np.zeros_like(h)")),
        of_gradient=True,
    ),
)

MUTANTS = (*_LSTM, *_GRU)
