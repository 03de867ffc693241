"""Quantisation: weights of one, two or three values, activations of eight bits."""
