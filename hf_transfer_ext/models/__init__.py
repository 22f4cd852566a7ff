"""A loaded model from outside: loading, its output head, scoring sequences, switching adapters."""
