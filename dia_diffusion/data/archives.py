"""Images in archives: tar files, among them WebDataset, and zip files."""

import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pyarrow.compute as pc
from datasets import Dataset

from ..errors import UsageError, first_line
from ..process.output import print_main
from .decoding import LFS_POINTER, is_lfs_pointer

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
# Part of the name in the cache: raise it whenever the same archive would give other rows.
VERSION = "archives 3"
# The ending of files that hold the class of an image.
_CLASS = "cls"
_LABELS = "dataset.json"
_FEATURES = datasets.Features(image=datasets.Image(), label=datasets.Value("string"), unused=datasets.Value("int32"))


def load_archives(files: Sequence[Path], is_image: Callable[[str], bool], cache_dir: str) -> Dataset | None:
    """Load the images of archives, with a column `label` where a class stands beside images (`.cls`).

    Args:
        files (sequence of `Path`): The archives.
        is_image (`Callable`): Tells from the ending of a file, such as `.png`, whether it is an image.
        cache_dir (`str`): Where the images are kept.

    Returns:
        `datasets.Dataset`: the first image of each sample, with its path in the archive; None if there are none.

    Raises:
        UsageError: for an archive that cannot be read.
    """
    if next(_read_samples(files, is_image), None) is None:
        return None
    samples = partial(_read_samples, files, is_image)
    try:
        rows = Dataset.from_generator(samples, _FEATURES, cache_dir=cache_dir, fingerprint=Path(cache_dir).name)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, UsageError):
            raise error.__cause__ from None
        raise UsageError(f"the images of '{files[0].parent}' cannot be kept: {first_line(error.__cause__)}.") from error
    unused = pc.sum(rows.data.column("unused")).as_py()
    if unused:
        print_main(
            f"not used: {unused:,} images in the archives of '{files[0].parent}', because a sample has one image. "
            "Files whose names are equal up to the first dot form one sample."
        )
    labelled = rows.data.column("label").null_count < len(rows)
    return rows.select_columns(["image", "label"] if labelled else ["image"])


def _read_samples(files: Sequence[Path], is_image: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    for file in files:
        try:
            yield from _samples_of(file, is_image)
        except UsageError:
            raise
        except Exception as error:  # Of tarfile's, zipfile's and the decompressors' kinds.
            reason = LFS_POINTER if is_lfs_pointer(file) else first_line(error).rstrip(":")
            raise UsageError(f"the archive '{file}' cannot be read: {reason}.") from error


def _samples_of(file: Path, is_image: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    is_zip = file.suffix.lower() == ".zip"
    labels = _labels_of_zip(file) if is_zip else {}
    members = (member for member in (_zip_members if is_zip else _tar_members)(file) if member[0].name[0] != ".")
    for _, sample in groupby(members, key=lambda member: _name_of_sample(member[0], is_zip)):
        image, label, unused = None, None, 0
        for path, read in sample:
            if is_image(path.suffix.lower()):
                unused += image is not None
                image = image or {"bytes": read(), "path": str(path)}
                label = labels.get(str(path), label)
            elif path.suffix.lower() == f".{_CLASS}":
                label = read().decode(errors="replace").strip() or None
        if image is not None:
            yield {"image": image, "label": label, "unused": unused}


def _labels_of_zip(file: Path) -> dict[str, str]:
    """Return the class of each image that `dataset.json` names, as the data sets of StyleGAN and EDM have it."""
    with zipfile.ZipFile(file) as archive:
        listed = json.loads(archive.read(_LABELS)) if _LABELS in archive.namelist() else {}
    pairs = listed.get("labels") if isinstance(listed, dict) else None
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return {}  # A file of another kind.
    return {str(name): str(label) for name, label in pairs}


def _name_of_sample(path: PurePosixPath, is_zip: bool) -> str:
    """Return the name that the files of a sample share: in WebDataset it ends at the first dot."""
    return str(path.with_suffix("") if is_zip else path.parent / path.name.partition(".")[0])


def _tar_members(file: Path) -> Iterator[tuple[PurePosixPath, Callable[[], bytes]]]:
    with tarfile.open(file) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None:
                yield PurePosixPath(member.name.lstrip("/")), content.read
        # tarfile takes any end between two files for the end.
        stream: Any = archive.fileobj
        stream.seek(archive.offset)
        if not stream.read(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it has no end mark, so it may be cut off; fetch or pack it again")


def _zip_members(file: Path) -> Iterator[tuple[PurePosixPath, Callable[[], bytes]]]:
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if not member.is_dir():
                yield PurePosixPath(member.filename.lstrip("/")), partial(archive.read, member)
