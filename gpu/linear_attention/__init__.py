"""The mirror of `refimpl.ops.linear_attention`."""
