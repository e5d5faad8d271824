"""A training run: its description, its loop, what goes on from a checkpoint, and what it leaves."""
