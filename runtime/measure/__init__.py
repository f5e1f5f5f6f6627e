"""Measuring: how fast a checkpoint runs here, and whether it is still the same model."""
