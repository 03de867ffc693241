"""Arithmetic that chapters share: contracts of shape and precision, stable elementary functions, the associative scan."""
