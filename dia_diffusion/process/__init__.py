"""The process that a command runs in: how it starts, what may interrupt it, what it shows, and others beside it."""

from ..door import open_door

__getattr__, __all__ = open_door(
    __name__,
    distributed="PATIENCE check_launcher check_processes find_device make_state say",
    interrupts="Interrupted catch_interrupts",
    progress="progress_bar",
    quiet="quiet_dependencies",
    startup="available_cores end_with_launcher end_with_parent start_missing_processes tune_process",
)
