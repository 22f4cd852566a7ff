"""Unlearning without training: edits of a model's tensors in closed form, and forget requests one after another."""
