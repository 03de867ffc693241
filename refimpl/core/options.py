"""Rules for options: one check and one message for each kind, so that every chapter refuses alike."""

import numpy as np


def one_of(operator: str, argument: str, value, choices):
    """Raise ValueError unless an option has one of its values."""
    if value not in choices:
        raise ValueError(f"{operator}: {argument} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def positive_int(operator: str, argument: str, value):
    """Raise ValueError unless an option (a block size, say) is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{operator}: {argument} must be an integer of at least 1, got {value!r}")


def at_least_zero(operator: str, argument: str, value):
    """Raise ValueError unless an option (an epsilon, say) is a finite real number of at least 0."""
    real = isinstance(value, int | float | np.floating | np.integer) and not isinstance(value, bool)
    if not real or not 0 <= value < np.inf:
        raise ValueError(f"{operator}: {argument} must be a finite number of at least 0, got {value!r}")
