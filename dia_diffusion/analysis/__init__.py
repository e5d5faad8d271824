"""Similarity between the attention maps of a model's blocks."""
