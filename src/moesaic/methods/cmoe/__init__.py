"""CMoE."""
