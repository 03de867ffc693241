"""Linear attention: attention without the softmax, and so with a state of fixed size."""
