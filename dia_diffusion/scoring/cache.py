"""The folder in which this package keeps what took time to compute or to fetch."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$DIA_CACHE`, or `dia_diffusion` in the user's cache folder (`~/.cache`)."""
    chosen = os.environ.get("DIA_CACHE")
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(chosen) if chosen else user / "dia_diffusion"
