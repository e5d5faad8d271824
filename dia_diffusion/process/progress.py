"""Progress: a bar for one who watches a terminal or a notebook, a line now and then for one who reads a log."""

import sys
from typing import Any, TextIO

from tqdm.auto import tqdm
from tqdm.std import tqdm as text_tqdm

# Seconds between lines of a log; what takes less leaves none.
INTERVAL = 10
_LINE = "{desc}: {percentage:.0f}%, {n_fmt} of {total_fmt} in {elapsed}, {remaining} to go, {rate_fmt}{postfix}"


def is_watched() -> bool:
    """Whether what is written over itself is seen as it should be: in a terminal, and in a notebook."""
    return sys.stderr.isatty() or _in_notebook()


def _in_notebook() -> bool:
    """Whether a notebook's kernel runs this: that `ipykernel` was imported, by a library or a test, does not say so."""
    kernels = sys.modules.get("ipykernel.kernelapp")
    return kernels is not None and kernels.IPKernelApp.initialized()


def progress_bar(*args: Any, **kwargs: Any) -> text_tqdm:
    """tqdm, with its arguments; where nobody watches it writes whole lines, one every ten seconds."""
    if is_watched():
        return tqdm(*args, dynamic_ncols=True, **kwargs)
    lines = {"file": _Lines(sys.stderr), "bar_format": _LINE, "delay": INTERVAL, "mininterval": INTERVAL}
    return text_tqdm(*args, **kwargs | lines | {"leave": True})


class _Lines:
    """A file to which tqdm writes its bar again and again, as lines."""

    def __init__(self, file: TextIO):
        self.file = file
        self.last = ""

    def write(self, text: str) -> None:
        for line in map(str.rstrip, text.replace("\r", "\n").splitlines()):
            # At its end a bar is written once more.
            if line and line != self.last:
                self.file.write(f"{line}\n")
                self.last = line

    def flush(self) -> None:
        self.file.flush()
