"""The small parts: norms, activations, gates."""
