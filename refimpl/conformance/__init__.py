"""The conformance kit: tells whether an implementation is right, where it is wrong, and what the mistake is."""
