"""Exceptions whose messages say what was wrong and what to do about it."""


class UsageError(ValueError):
    """A mistake that the caller can correct. Command lines print its message alone and exit with status 2."""
