"""MLPMoE."""
