"""How much of a large model verification computes. No torch here, as forecasts read it."""

COMPUTED = 2**28
"""Weights of the layers whose outputs are compared. Writing a layer takes about as long as computing it twice."""
FEWEST_LAYERS = 3
