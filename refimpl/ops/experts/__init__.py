"""Mixtures of experts: a router chooses which few of many networks see a token."""
