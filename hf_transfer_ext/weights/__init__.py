"""Weights as files and tensors, without a model class: checkpoints, LoRA factors, references, resumable work."""
