"""Counts that cost formulas share."""

from math import ceil, log2


def log2_ceil(n: float) -> int:
    """Levels of a binary tree over n leaves."""
    return ceil(log2(n)) if n > 1 else 0


def fft_work(n: float) -> float:
    """Operations of a real transform of length n: 5/2 n log2 n (half of the complex split-radix-like 5 n log2 n)."""
    return 2.5 * n * log2(n) if n > 1 else 0.0


def fft_depth(n: float) -> int:
    """Levels of butterflies, each a product and a sum."""
    return 2 * log2_ceil(n)


def taps(T: float, K: float) -> float:
    """Products that a causal filter of K rows forms over T steps: min(t + 1, K) at step t."""
    short = min(T, K)
    return short * T - short * (short - 1) / 2
