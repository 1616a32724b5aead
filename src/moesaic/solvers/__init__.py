"""Mathematics that methods share: pure functions on tensors, nothing of ours imported."""
