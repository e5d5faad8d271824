"""Files and folders that are whole or not there, and the folder of those that are kept.

Checksums of weights."""

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

_TOKEN_BYTES = 8


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` write a file beside its place, and moves it there. A kill or a full disk leaves what was there.

    Raises:
        OSError: names the file.
    """
    temporary = _beside(path)
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


def replace_files(folder: Path, write: Callable[[Path], object], last: str) -> None:
    """Lets `write` fill an empty folder, and moves its files into `folder` when all of them are written.

    At any moment each file in `folder` is whole: as it was before, or as it is now. Other files there stay.

    Args:
        folder (`Path`): Where the files go; made where there is none.
        write (`Callable`): Called with the empty folder.
        last (`str`): The file that is moved when all others are: where there was none, it says that they are whole.
    """
    staging = _beside(folder / "files")
    try:
        staging.mkdir(parents=True)
        write(staging)
        files = [path for path in staging.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path == staging / last):
            flush(path)
            place = folder / path.relative_to(staging)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def remove_temporaries(folder: Path) -> None:
    """Removes what a kill left of files and folders that were being written in `folder`.

    For one who knows that nobody is writing there now.
    """
    for path in folder.glob(f".*.{'[0-9a-f]' * 2 * _TOKEN_BYTES}.tmp"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Renames a file or folder to `set-aside-NAME`, with a number where there is one already. Returns the new place."""
    place, number = path.with_name(f"set-aside-{path.name}"), 1
    while place.exists():
        number += 1
        place = path.with_name(f"set-aside-{path.name}-{number}")
    return path.rename(place)


def flush(path: Path) -> None:
    """Waits until a file, or the list of files of a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_dir() -> Path:
    """Where this package keeps what took time to compute or to fetch: `$DIA_CACHE`, or `dia_diffusion` in the user's
    cache folder (`~/.cache`)."""
    chosen = os.environ.get("DIA_CACHE")
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(chosen) if chosen else user / "dia_diffusion"


def _beside(path: Path) -> Path:
    # Other processes, of other machines too, may be writing the same file, and what a kill leaves must not pass for one
    # of its kind.
    return path.with_name(f".{path.name}.{secrets.token_hex(_TOKEN_BYTES)}.tmp")


def weights_checksum(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors with their names, types and shapes, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
