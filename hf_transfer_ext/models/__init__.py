"""Utilities for models: loading, the output head, scoring sequences, switching adapters."""
