"""The ledger: what articles and papers of the field claim, each claim with the computation that decides it."""
