"""The process that a command runs in: how it starts, and what may interrupt it. Imports nothing heavy."""

from .interrupts import Interrupted, catch_interrupts
from .startup import available_cores, end_with_launcher, start_missing_processes, tune_process

__all__ = [
    "Interrupted",
    "available_cores",
    "catch_interrupts",
    "end_with_launcher",
    "start_missing_processes",
    "tune_process",
]
