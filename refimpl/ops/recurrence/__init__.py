"""Recurrences and convolutions: one line of algebra, h_t = a_t h_{t-1} + b_t, and everything that can be made of it."""
