"""Scores of generated images: the Fréchet distance and others, their features, and reports."""
