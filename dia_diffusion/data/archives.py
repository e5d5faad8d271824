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
import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from ..errors import UsageError, first_line
from ..process.output import print_main
from .decoding import LFS_POINTER, is_lfs_pointer
from .metadata import LABELS, METADATA, read_metadata, to_columns

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
# Part of the name in the cache: raise it whenever the same archive would give other rows.
VERSION = "archives 4"
# The endings of files that hold the class of an image, or more about it.
_CLASS, _MORE = ".cls", ".json"
_FEATURES = datasets.Features(
    image=datasets.Image(),
    # The metadata of an image, as JSON.
    about=datasets.Value("string"),
    # More images of the sample; -1 for a row that is a table of metadata.
    unused=datasets.Value("int32"),
    archive=datasets.Value("int32"),
)


def load_archives(
    files: Sequence[Path], beside: Sequence[Path], is_image: Callable[[str], bool], cache_dir: str
) -> Dataset | None:
    """Load the images of archives, with columns for what stands beside images there: classes and metadata.

    Args:
        files (sequence of `Path`): The archives.
        beside (sequence of `Path`): Tables of metadata beside a single archive.
        is_image (`Callable`): Tells from the ending of a file, such as `.png`, whether it is an image.
        cache_dir (`str`): Where the images are kept.

    Returns:
        `datasets.Dataset`: the first image of each sample, with its path in the archive; None if there are none.

    Raises:
        UsageError: for an archive that cannot be read.
    """
    if not any(sample["unused"] >= 0 for sample in _read_samples(files, is_image)):
        return None
    samples = partial(_read_samples, files, is_image)
    try:
        rows = Dataset.from_generator(samples, _FEATURES, cache_dir=cache_dir, fingerprint=Path(cache_dir).name)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, UsageError):
            raise error.__cause__ from None
        raise UsageError(f"the images of '{files[0].parent}' cannot be kept: {first_line(error.__cause__)}.") from error
    unused = rows.data.column("unused").to_numpy()
    more = unused[unused > 0].sum()
    if more:
        print_main(
            f"not used of the archives in '{files[0].parent}': {more:,} more images of samples that have several. "
            "Files whose names are equal up to the first dot are one sample."
        )
    about = _describe_rows(rows, unused < 0, files, beside)
    rows = rows.select_columns("image").select(np.flatnonzero(unused >= 0))
    if rows._indices is not None:
        # Callers read the table itself, in which rows that were not selected would still stand.
        rows = rows.flatten_indices()
    for name, (values, feature) in about.items():
        rows = rows.add_column(name, values, feature=feature)
    return rows


def _describe_rows(
    rows: Dataset, is_table: np.ndarray, files: Sequence[Path], beside: Sequence[Path]
) -> dict[str, tuple[list[Any], Any]]:
    """Return the columns for what archives say of their images, and for the tables beside a single one."""
    found = [json.loads(text) for text in rows.data.column("about").to_pylist()]
    archives, inside = rows.data.column("archive").to_numpy(), rows.data.column("image")
    paths = pc.struct_field(inside, "path").to_pylist()
    for number, file in enumerate(files):
        here = archives == number
        images, tables = np.flatnonzero(here & ~is_table), np.flatnonzero(here & is_table)
        content = {file / paths[row]: inside[row.item()].as_py()["bytes"] for row in tables}
        for place, read in ((file, content), (file.parent, {path: path.read_bytes() for path in beside})):
            described = read_metadata(read, [place / paths[row] for row in images])
            for row, values in zip(images, described, strict=True):
                found[row] |= values
    columns, features = to_columns([values for values, table in zip(found, is_table, strict=True) if not table])
    return {name: (values, features[name]) for name, values in columns.items()}


def _read_samples(files: Sequence[Path], is_image: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    for number, file in enumerate(files):
        try:
            for sample in _samples_of(file, is_image):
                yield sample | {"archive": number}
        except UsageError:
            raise
        except Exception as error:  # tarfile, zipfile and the decompressors raise errors of many kinds.
            reason = LFS_POINTER if is_lfs_pointer(file) else first_line(error).rstrip(":")
            raise UsageError(f"the archive '{file}' cannot be read: {reason}.") from error


def _samples_of(file: Path, is_image: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    is_zip = file.suffix.lower() == ".zip"
    members = (member for member in (_zip_members if is_zip else _tar_members)(file) if member[0].name[0] != ".")
    for _, sample in groupby(members, key=lambda member: _name_of_sample(member[0], is_zip)):
        image, unused = None, 0
        about: dict[str, Any] = {}
        for path, read in sample:
            ending = path.suffix.lower()
            if path.name in METADATA or path.name == LABELS:
                yield {"image": {"bytes": read(), "path": str(path)}, "about": "{}", "unused": -1}
            elif is_image(ending):
                unused += image is not None
                image = image or {"bytes": read(), "path": str(path)}
            elif ending == _CLASS:
                about |= {"label": read().decode(errors="replace").strip() or None}
            elif ending == _MORE:
                about = _scalars(read()) | about
        if image is not None:
            yield {"image": image, "about": json.dumps(about), "unused": unused}


def _scalars(content: bytes) -> dict[str, Any]:
    """Return the numbers and texts that a JSON file beside an image holds by name; a value alone is its label."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    found = found if isinstance(found, dict) else {"label": found}
    return {name: value for name, value in found.items() if isinstance(value, str | int | float)}


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
