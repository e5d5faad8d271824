"""The process that a command runs in: how it starts, and what may interrupt it. Imports nothing heavy."""

from ..door import open_door

__getattr__, __all__ = open_door(
    __name__,
    interrupts="Interrupted catch_interrupts",
    quiet="quiet_dependencies",
    startup="available_cores end_with_launcher end_with_parent start_missing_processes tune_process",
)
