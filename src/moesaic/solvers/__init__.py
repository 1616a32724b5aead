"""Mathematics that methods share: pure functions on tensors and ``FFNWeights``, nothing that knows models or files."""
