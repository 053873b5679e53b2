"""Fit: how much of a model's cache goes into a memory, worked out from its configuration alone."""
