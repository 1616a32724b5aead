"""Secret MoE."""
