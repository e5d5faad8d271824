"""Files that are whole or not there, and the folder of those that are kept."""

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


def cache_dir() -> Path:
    """Where this package keeps what took time to compute or to fetch: `$DIA_CACHE`, or `dia_diffusion` in the user's
    cache folder (`~/.cache`)."""
    chosen = os.environ.get("DIA_CACHE")
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(chosen) if chosen else user / "dia_diffusion"
