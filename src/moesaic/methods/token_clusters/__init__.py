"""Token clusters."""
