"""Variants of a model, each trained from several seeds, and the significance of their differences."""
