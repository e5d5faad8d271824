"""The process that a command runs in: how it starts, what may interrupt it, what it shows, and others beside it."""
