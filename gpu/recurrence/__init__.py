"""The mirror of `refimpl.ops.recurrence`."""
