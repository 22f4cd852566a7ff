"""Inputs that a model writes in the manner of a few examples, for when the real data is gone or private."""
