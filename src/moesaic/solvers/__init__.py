"""Mathematics that methods share: pure functions on tensors and :class:`moesaic.nn.ffn.FFNWeights`, nothing that knows models or files."""
