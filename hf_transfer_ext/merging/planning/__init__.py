"""The YAML of a merge and what follows from it: which tensor is made of which, which tokenizer, which template."""
