"""The mirror of `refimpl.ops.gated_rnn`."""
