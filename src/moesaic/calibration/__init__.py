"""Calibration: from text to token windows to what every FFN reads, layer by layer."""
