"""The one exception that means: the input was wrong, and the message says what to do about it."""


class UsageError(ValueError):
    """A mistake that the caller can correct. Command lines print its message alone and exit with status 2."""
