"""The arithmetic that merge methods are written in, and its compiled form."""
