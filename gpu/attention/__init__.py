"""The mirror of `refimpl.ops.attention`."""
