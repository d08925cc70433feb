"""Calibration: what a network does on inputs decides how each of its weights is rounded."""
