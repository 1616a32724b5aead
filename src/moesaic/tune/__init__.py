"""Recovery: a little training of a converted model, on its own text or towards the dense model."""
