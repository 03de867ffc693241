"""Gated recurrent networks: recurrences whose gates decide what is kept, from the LSTM to matrix memories."""
