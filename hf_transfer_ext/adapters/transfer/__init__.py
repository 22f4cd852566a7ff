"""Carry a LoRA adapter to another base model: by a closed form (methods/, one a file), or by training (trans_lora)."""
