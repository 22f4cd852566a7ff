"""Building blocks of the merge methods, and their compiled versions."""
