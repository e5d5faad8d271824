"""Output of a command: streams that may close, lines of the main process, progress bars.

Whoever reads the output may go (`dia train | head -1`, a closed terminal, a full disk for a log). The work never does.
"""

import io
import os
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm.std import tqdm as text_tqdm

# Seconds between lines of a log. Work that takes less leaves no line.
INTERVAL = 10
_LINE = "{desc}: {percentage:.0f}%, {n_fmt} of {total_fmt} in {elapsed}, {remaining} to go, {rate_fmt}{postfix}"


def guard_streams() -> None:
    """Let stdout and stderr take whatever is written, also when nobody can read it. For command lines only.

    Opens /dev/null in place of a standard stream that is closed (`>&-`): otherwise the next file that is opened gets
    its number, and what libraries print ends up in that file.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number is this one.
            os.open(os.devnull, os.O_RDWR)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        # Leave a stream alone that a notebook or a test has replaced.
        if stream is None or stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _guarded(stream, descriptor))


def _guarded(stream: TextIO | None, descriptor: int) -> TextIO:
    raw = io.BufferedWriter(_Forgiving(descriptor, "wb", closefd=False))
    if not isinstance(stream, io.TextIOWrapper):
        return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True)
    return io.TextIOWrapper(
        raw,
        encoding=stream.encoding,
        # Names of files need not be text.
        errors="backslashreplace",
        # Whoever follows a log sees what the work says at once.
        line_buffering=True,
        write_through=stream.write_through,
    )


class _Forgiving(io.FileIO):
    """A file that drops what it cannot write: nobody reads the pipe any more, or the disk of the log is full."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def print_main(text: str) -> None:
    """Print a line on the main process of those that `accelerate` or `torchrun` launched."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def duration(seconds: float) -> str:
    """Return a time in words, rounded: "40 seconds", "3 minutes", "2.5 hours"."""
    if seconds < 90:
        return "1 second" if seconds < 1.5 else f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 90 * 60 else f"{seconds / 3600:.1f} hours"


def is_watched() -> bool:
    """Tell whether a bar that overwrites itself is displayed well: in a terminal and in a notebook."""
    return sys.stderr.isatty() or _in_notebook()


def _in_notebook() -> bool:
    # Libraries and tests import ipykernel outside of notebooks too.
    kernels = sys.modules.get("ipykernel.kernelapp")
    return kernels is not None and kernels.IPKernelApp.initialized()


def progress_bar(*args: Any, **kwargs: Any) -> "text_tqdm":
    """Return a tqdm bar with these arguments. Outside of terminals and notebooks it prints a line every ten seconds."""
    # Import tqdm late: it reads the defaults that `quiet_dependencies` sets when it is imported.
    from tqdm.auto import tqdm
    from tqdm.std import tqdm as text_tqdm

    if is_watched():
        return tqdm(*args, dynamic_ncols=True, **kwargs)
    lines = {"file": _Lines(sys.stderr), "bar_format": _LINE, "delay": INTERVAL, "mininterval": INTERVAL}
    return text_tqdm(*args, **kwargs | lines | {"leave": True})


class _Lines:
    """A file that turns the updates of a tqdm bar into lines."""

    def __init__(self, file: TextIO):
        self.file = file
        self.last = ""

    def write(self, text: str) -> None:
        for line in map(str.rstrip, text.replace("\r", "\n").splitlines()):
            # tqdm writes a finished bar twice.
            if line and line != self.last:
                self.file.write(f"{line}\n")
                self.last = line

    def flush(self) -> None:
        self.file.flush()
