"""The mirror of `refimpl.ops.state_space`."""
