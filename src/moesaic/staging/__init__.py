"""How an output appears: staged, resumable, absent or complete."""
