"""Folders for prepared data, also where the usual cache cannot be written; digests of the files it is made of."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import datasets

from ..errors import UsageError
from ..files import file_digest, make_folder, temporary_cache
from ..process.output import print_main


def find_in_cache(cache_dir: str | None, *parts: str) -> Path:
    """Return the path of a folder in the cache of `datasets`. It may be missing, or readable only.

    Args:
        cache_dir (`str`, *optional*): The cache; by default that of `datasets`, `$HF_DATASETS_CACHE`.
        parts (`str`): The folder inside.
    """
    # Unlike `Path.expanduser` it has no error for a user without a home directory.
    return Path(os.path.expanduser(cache_dir or str(datasets.config.HF_DATASETS_CACHE)), *parts)  # noqa: PTH111


def cache_place(cache_dir: str | None, *parts: str) -> Path:
    """Make a folder in the cache of `datasets` and return it.

    Where it cannot be written (a cache of several users, no home directory), a folder among the temporary files takes
    its place, and a line says so once.
    """
    place = find_in_cache(cache_dir, *parts)
    if place.parts[:1] != ("~",):
        try:
            make_folder(place)
            return place
        except UsageError:
            pass
    return _temporary(find_in_cache(cache_dir)).joinpath(*parts)


@lru_cache
def _temporary(cache: Path) -> Path:
    place = temporary_cache()
    print_main(
        f"The cache '{cache}' cannot be written; prepared data goes to '{place}'. Choose another folder with "
        "--cache_dir or HF_DATASETS_CACHE."
    )
    return place


def hash_files(paths: Sequence[Path | str], *more: str) -> str:
    """Return a digest of the names and contents of files, whatever their times say, and of `more`.

    Reading is the cost: 10,000 small files took 1.7 seconds on two busy cores, and decoding them 6.
    """
    digest = hashlib.sha256(repr(more).encode())
    with ThreadPoolExecutor(8) as pool:
        for path, content in zip(paths, pool.map(_digest, paths, chunksize=64), strict=True):
            digest.update(repr((str(path), content)).encode())
    return digest.hexdigest()[:32]


def _digest(path: Path | str) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        # Decoding the file will give the error.
        return f"not read: {error.errno}"
