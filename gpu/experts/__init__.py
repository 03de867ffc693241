"""The mirror of `refimpl.ops.experts`."""
