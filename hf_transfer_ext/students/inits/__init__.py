"""One file for each way to initialize a student; `students/__init__.py` registers them."""
