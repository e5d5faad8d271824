"""Files that are whole or not there."""

import os
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` write a file beside its place, and moves it there. A kill or a full disk leaves what was there.

    Raises:
        OSError: names the file.
    """
    # Other processes may be writing the same file, and what a kill leaves must not pass for one of its kind.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        # A full disk does not say which file there was no room for.
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """As `replace_file`, for a text."""
    replace_file(path, lambda place: place.write_text(text, encoding="utf-8"))
