"""Stream tensors through a merge method in pieces, into a checkpoint or a LoRA."""
