"""What the attention maps of a model have in common."""
