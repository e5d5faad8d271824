"""Files that are whole or absent, that others may read, and that are valid JSON; digests of files and weights."""

import hashlib
import json
import math
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from .errors import UsageError, first_line, folders_beside, nearest

if TYPE_CHECKING:
    # Nothing here imports torch: light modules write files too.
    from torch import Tensor

_TOKEN_BYTES = 8
# The file by which a command locks the folder of its results.
LOCK = ".lock"


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and move it there when it is whole. A kill or a full disk leaves the old file.

    Args:
        path (`Path`): The file. Its folder is made where there is none. A link stays one, and what is no file, such as
            `/dev/null` or a pipe, is written to and not replaced.
        write (`Callable`): Called with the temporary path, which it must write.

    Raises:
        OSError: names the file.
    """
    in_place = path.exists() and (not path.is_file() or path.parent == Path("/dev"))
    path = path if in_place else path.resolve()
    temporary = _beside(path)
    try:
        if in_place:
            write(path)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        follow_umask(temporary)
        temporary.replace(path)
    except SafetensorError as error:
        raise OSError(f"'{path}' cannot be written: {error}") from error
    except OSError as error:
        # A full disk does not say which file there was no room for.
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a text as `replace_file` does."""
    replace_file(path, lambda place: place.write_text(text, "utf-8", "backslashreplace"))


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write valid JSON as `replace_file` does: see `to_json`."""
    replace_text(path, to_json(content, indent) + "\n")


def to_json(content: Any, indent: int | None = None) -> str:
    """Return JSON that every reader takes: NaN and infinities become `null` (RFC 8259 has no other way to say them)."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def follow_umask(path: Path) -> None:
    """Give a file, or all files of a folder, the mode that the umask asks for: safetensors writes mode 600."""
    mask = os.umask(0o022)
    os.umask(mask)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            file.chmod(0o666 & ~mask)


def find_folder(option: str, name: str) -> Path:
    """Return the folder that an option names.

    Raises:
        UsageError: if there is none, or it is a file.
    """
    folder = Path(name)
    if folder.is_file():
        raise UsageError(f"{option} '{name}' is a file: name the folder that holds the images.")
    if not folder.is_dir():
        raise UsageError(f"{option} '{name}' is not a folder.{nearest(name, folders_beside(name))}")
    return folder


def check_output_file(path: Path) -> None:
    """Check that a file can be written, before the work whose result it holds.

    Raises:
        UsageError: if the file cannot be written there.
    """
    if path.is_dir():
        raise UsageError(f"'{path}' is a folder: name the file to write.")
    if str(path) == "-":
        raise UsageError("'-' names no file: for the standard output name /dev/stdout.")
    if not path.exists() or (path.is_file() and path.parent != Path("/dev")):
        check_output_folder(path.resolve().parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise UsageError(f"the file '{path}' cannot be written: change its permissions, or name another one.")


def check_output_folder(folder: Path) -> None:
    """Check that files can be written in a folder, before the work whose results they hold. The folder is not made.

    Raises:
        UsageError: if files cannot be written there.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - a link stays one
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if there == folder:
        make_folder(folder)
        return
    # Made in a folder of its own: another process may be making the same one.
    trial = _beside(there / "trial")
    try:
        make_folder(there)
        make_folder(trial / folder.relative_to(there))
    except UsageError as error:
        raise UsageError(str(error).replace(str(trial), str(there))) from error
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Make a folder where there is none, and check that files can be written in it.

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


@contextmanager
def lock_folder(folder: Path, patience: float = 0) -> Iterator[None]:
    """Make a folder, lock it for one command, and remove the temporary files that a killed one left there.

    The end of the process releases the lock, even if it is killed.

    Args:
        folder (`Path`): The folder. If it is new and nothing was put into it, it is removed again.
        patience (`float`, *optional*, defaults to 0): Seconds to wait for the end of another command.

    Raises:
        UsageError: if another command is at work there, or files cannot be written there.
    """
    from filelock import FileLock, Timeout

    folder = folder.resolve()
    new = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    check_output_folder(folder)
    make_folder(folder)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise UsageError(
            f"another command is at work in '{folder}'. Wait for its end, stop it, or choose another folder."
        ) from None
    except OSError as error:
        # Some network file systems have no locks. Without one, whoever starts two commands has to look after them.
        print(f"the folder '{folder}' cannot be locked ({error}): start no second command there.", file=sys.stderr)
    try:
        remove_temporaries(folder)
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()
            for place in new:
                place.rmdir()
        lock.release()


def replace_files(folder: Path, write: Callable[[Path], object], last: str) -> None:
    """Let `write` fill an empty folder, and move its files into `folder` when all of them are written.

    At any moment each file in `folder` is whole: as it was before, or as it is now. Other files there stay.

    Args:
        folder (`Path`): Where the files go; made where there is none.
        write (`Callable`): Called with the empty folder.
        last (`str`): The file that is moved when all others are: where there was none, it says that they are whole.

    Raises:
        UsageError: if the disk is full or refuses.
    """
    staging = _beside(folder / "files")
    try:
        staging.mkdir(parents=True)
        write(staging)
        follow_umask(staging)
        files = [path for path in staging.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path == staging / last):
            flush(path)
            place = folder / path.relative_to(staging)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"files could not be saved in '{folder}': {first_line(error)}. Make room there.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files and folders that a killed process left in `folder`.

    Call it only when no other process writes there.
    """
    for path in folder.glob(f".*.{'[0-9a-f]' * 2 * _TOKEN_BYTES}.tmp"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename a file or folder to `set-aside-NAME`, numbered if that exists, and return the new path."""
    place, number = path.with_name(f"set-aside-{path.name}"), 1
    while place.exists():
        number += 1
        place = path.with_name(f"set-aside-{path.name}-{number}")
    return path.rename(place)


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_dir() -> Path:
    """Return the folder of results that took time: `$DIA_CACHE`, or `dia_diffusion` in the user's cache folder."""
    chosen = os.environ.get("DIA_CACHE")
    # Unlike `Path.expanduser` it has no error for a user without a home directory.
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    return Path(chosen) if chosen else Path(user) / "dia_diffusion"


def temporary_cache() -> Path:
    """Return the folder among the temporary files that takes the place of a cache that cannot be written."""
    return Path(tempfile.gettempdir()) / f"dia-diffusion-{os.getuid() if hasattr(os, 'getuid') else ''}"


def _beside(path: Path) -> Path:
    # Other processes, of other machines too, may be writing the same file, and what a kill leaves must not pass for one
    # of its kind.
    return path.with_name(f".{path.name}.{secrets.token_hex(_TOKEN_BYTES)}.tmp")


def file_digest(path: Path | str) -> str:
    """Return the SHA-256 of a file's content in hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def json_digest(content: Any) -> str:
    """Return the SHA-256 of settings: of their JSON with sorted keys, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def weights_digest(weights: "Mapping[str, Tensor]") -> str:
    """Return the SHA-256 of tensors with their names, types and shapes, in hexadecimal digits."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
