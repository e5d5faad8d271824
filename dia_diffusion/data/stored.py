"""The caches of this package on this machine: listed and removed by `dia cache`. Needs neither torch nor datasets."""

import os
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from ..files import cache_dir, temporary_cache

# Folders in the cache of `datasets`, and names in the cache of this package. Nothing else is removed.
_OF_DATA = {"dia_pixels": "prepared images", "dia_latents": "latents", "dia_folders": "tables of image folders"}
_OF_SCORES = {"references": "statistics of real images", "inception-*.pt": "networks of scores"}


class Cache(NamedTuple):
    """A cache: its kind, its place, its number of files, their size in bytes, and their last use or `None`."""

    kind: str
    place: Path
    files: int
    size: int
    used: datetime | None


def find_caches(data_cache: str | None = None) -> list[Cache]:
    """Find the caches that hold anything.

    Args:
        data_cache (`str`, *optional*): The `--cache_dir` of training; by default the cache of `datasets`.
    """
    return [_measure(kind, place) for kind, place in _places(data_cache) if place.exists() and not place.is_symlink()]


def describe_caches(data_cache: str | None = None) -> str:
    """Return a line for each cache: its kind, size, number of files, last use and place."""
    lines = [
        f"{cache.kind:<26} {cache.size / 1e6:>10,.1f} MB  {cache.files:>6,} files  "
        f"last used {f'{cache.used:%Y-%m-%d}' if cache.used else 'never'}  {cache.place}"
        for cache in find_caches(data_cache)
    ]
    return "\n".join(lines) or "Nothing is cached."


def clean_caches(data_cache: str | None = None) -> str:
    """Remove the caches. Return what was removed, in words."""
    found = find_caches(data_cache)
    for cache in found:
        shutil.rmtree(cache.place) if cache.place.is_dir() else cache.place.unlink()
    return f"Removed {sum(cache.files for cache in found):,} files, {sum(cache.size for cache in found) / 1e6:,.1f} MB."


def _places(data_cache: str | None) -> Iterator[tuple[str, Path]]:
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hub = os.environ.get("HF_HOME") or f"{user}/huggingface"
    # Unlike `Path.expanduser` it has no error for a user without a home directory.
    data = Path(os.path.expanduser(data_cache or os.environ.get("HF_DATASETS_CACHE") or f"{hub}/datasets"))  # noqa: PTH111
    for name, kind in _OF_DATA.items():
        # The second takes the place of a cache that cannot be written.
        yield from ((kind, folder / name) for folder in (data, temporary_cache()))
    for pattern, kind in _OF_SCORES.items():
        for place in sorted(cache_dir().glob(pattern)):
            yield kind, place


def _measure(kind: str, place: Path) -> Cache:
    files = [path for path in (place.rglob("*") if place.is_dir() else [place]) if path.is_file()]
    stats = [path.lstat() for path in files]
    used = max((max(stat.st_atime, stat.st_mtime) for stat in stats), default=None)
    size = sum(stat.st_size for stat in stats)
    return Cache(kind, place, len(files), size, None if used is None else datetime.fromtimestamp(used))
