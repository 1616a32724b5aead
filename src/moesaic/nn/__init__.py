"""Feed-forward networks: the dense one as tensors, the reference MoE (the tests' oracle), and the runtime."""
