"""Training of small parts on top of a frozen model: data, loop, losses, curves. Knows nothing of methods."""
