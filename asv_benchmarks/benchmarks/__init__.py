"""Timings, as evidence; what an algorithm costs in operations is stated, and counted, elsewhere."""
