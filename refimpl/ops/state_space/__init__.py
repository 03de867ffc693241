"""State space models: linear systems in continuous time, sampled, and what becomes of them when they may choose."""
