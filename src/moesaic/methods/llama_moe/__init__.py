"""LLaMA-MoE."""
