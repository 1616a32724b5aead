"""How a plan becomes tensors and modules."""
