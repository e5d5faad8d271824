"""Stopping between steps when a scheduler preempts the job or someone presses Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """Training ended early on a signal, with a checkpoint written.

    Attributes:
        signum (`int`): The signal. The customary exit status is 128 plus its number.
    """

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


@contextmanager
def catch_interrupts() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in the list that it yields. A second one acts as if this were not here.

    Outside of the main thread, where Python allows no handlers, nothing is caught.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {}

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        signal.signal(signum, previous[signum])

    previous |= {signum: signal.signal(signum, note) for signum in _SIGNALS}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
