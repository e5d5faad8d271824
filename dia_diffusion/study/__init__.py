"""Variants of a model, each trained from several seeds, and what their differences are worth."""
