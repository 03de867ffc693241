"""Attention: every output is a weighted mean of values, the weights a softmax of scores."""
