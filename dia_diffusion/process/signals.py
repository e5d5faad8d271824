"""Signals: stop between steps when a scheduler or a user asks for it, and leave no process behind."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Ctrl-C, `kill` and most schedulers, a closed terminal, SLURM's `--signal=USR1`. Windows lacks the last two.
STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
# Option of prctl(2).
_PR_SET_PDEATHSIG = 1


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
    """Collect signals that ask to stop in the list that it yields. A second one of the same kind acts as usual.

    SIGHUP and SIGUSR1 stay ignored where the caller ignores them (`nohup`). Python allows handlers in the main thread
    only; in other threads nothing is caught.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous: dict[int, Any] = {}

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        signal.signal(signum, previous[signum])

    for signum in STOPS:
        if signum in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(signum) != signal.SIG_IGN:
            previous[signum] = signal.signal(signum, note)
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def ignore_stops() -> None:
    """Leave signals that ask to stop to the parent, which gets them too. For workers."""
    for signum in STOPS:
        signal.signal(signum, signal.SIG_IGN)


def end_with_parent(signum: int = signal.SIGKILL) -> None:
    """Make the kernel send `signum` to this process when its parent ends, however that ends (Linux)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signum))


def watch_parent() -> None:
    """End this process when the one that started it through `multiprocessing` ends, in whatever way it was started.

    Between them may be a fork server, which lives as long as the processes that it forked.
    """

    def watch() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Forks:
    """Settings for the processes that this one forks.

    Attributes:
        parent (`int` or `None`): The process that they end with, while `forks_end_with_parent` is active in it.
        thread (`int` or `None`): The thread in which it is active.
    """

    parent: int | None = None
    thread: int | None = None


@contextmanager
def forks_end_with_parent() -> Iterator[None]:
    """End processes that are forked inside together with this one: pools, and the helpers that libraries start."""
    before, _Forks.parent, _Forks.thread = (_Forks.parent, _Forks.thread), os.getpid(), threading.get_ident()
    try:
        yield
    finally:
        _Forks.parent, _Forks.thread = before


def _follow_parent() -> None:
    parent, _Forks.parent = _Forks.parent, None
    # The kernel sends the signal when the thread that forked ends. A pool replaces killed workers from a thread. At its
    # end the new worker would be killed with a lock in its hands, and the pool would wait for ever.
    if parent is not None and threading.get_ident() == _Forks.thread:
        end_with_parent()
        if os.getppid() != parent:
            # The parent ended before prctl was called.
            os._exit(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_follow_parent)
