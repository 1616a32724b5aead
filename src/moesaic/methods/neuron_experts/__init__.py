"""Neuron experts."""
