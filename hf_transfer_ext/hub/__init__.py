"""What is published: the run record (`record.py`), the model card (`card.py`), save, push and pull (`publish.py`)."""
