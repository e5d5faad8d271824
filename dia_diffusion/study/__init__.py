"""Variants of a model, each trained from several seeds, and what their differences are worth."""

from .command import run_study

__all__ = ["run_study"]
