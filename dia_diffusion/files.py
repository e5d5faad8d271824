"""Files and folders that are whole or not there, and the folder of those that are kept.

Checksums of weights."""

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UsageError

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


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write valid JSON; numbers that are not finite, which JSON does not know, become `null`."""
    replace_text(path, to_json(content, indent) + "\n")


def to_json(content: Any, indent: int | None = None) -> str:
    """Return valid JSON; numbers that are not finite become `null`."""
    return json.dumps(_without_non_finite(content), indent=indent, allow_nan=False)


def _without_non_finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {name: _without_non_finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_non_finite(value) for value in content]
    return content


def check_output_file(path: Path) -> None:
    """Make the folder of a file that will be written, before the work whose result it holds.

    Raises:
        UsageError: if the file cannot be written there.
    """
    if path.is_dir():
        raise UsageError(f"'{path}' is a folder: name the file to write.")
    check_output_folder(path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise UsageError(f"the file '{path}' cannot be written: change its permissions, or name another one.")


def check_output_folder(folder: Path) -> None:
    """Make a folder for files that will be written, before the work whose results they hold.

    Raises:
        UsageError: if files cannot be written there.
    """
    probe = _beside(folder / "probe")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except FileExistsError as error:
        raise UsageError(f"'{folder}' is a file, and a folder is needed: name another place.") from error
    except OSError as error:
        raise UsageError(f"nothing can be written in '{folder}': {error.strerror}. Name another place.") from error


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
