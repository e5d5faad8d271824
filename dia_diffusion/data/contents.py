"""What files hold, whatever their times say."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def hash_files(paths: Sequence[Path | str], *more: str) -> str:
    """Of the names and the contents of files, and of what else it should change with.

    Reading is what it costs: 10,000 small files took 1.7 seconds on two busy cores, where decoding took 6.
    """
    digest = hashlib.sha256(repr(more).encode())
    with ThreadPoolExecutor(8) as pool:
        for path, content in zip(paths, pool.map(_hash, paths, chunksize=64), strict=True):
            digest.update(repr((str(path), content)).encode())
    return digest.hexdigest()[:32]


def _hash(path: Path | str) -> str:
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    except OSError as error:
        # Decoding will say so.
        return f"not read: {error.errno}"
    return digest.hexdigest()
