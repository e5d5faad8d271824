"""Images in tar archives: WebDataset, whose samples are files that share a name and differ in their endings."""

import tarfile
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
from datasets import Dataset

ARCHIVES = (".tar", ".tar.gz", ".tgz")
# The ending of files that hold the number of a class.
_CLASS = "cls"


def load_archives(
    files: Sequence[Path], is_image: Callable[[str], bool], split: str | None, cache_dir: str
) -> Dataset | None:
    """Load the images of archives, with a column `label` where samples hold a class (`.cls`).

    Args:
        files (sequence of `Path`): The archives.
        is_image (`Callable`): Tells from the ending of a file, such as `.png`, whether it is an image.
        split (`str`, *optional*): The name of the split.
        cache_dir (`str`): Where the images are kept.

    Returns:
        `datasets.Dataset`: the first image of each sample, or None if there are none.

    Raises:
        OSError, tarfile.TarError: for an archive that cannot be read.
    """
    first = next(_read_samples(files, is_image), None)
    if first is None:
        return None
    features = datasets.Features(image=datasets.Image())
    if first["label"] is not None:
        features["label"] = datasets.Value("int64")

    def rows() -> Iterator[dict[str, Any]]:
        for sample in _read_samples(files, is_image):
            yield {name: sample[name] for name in features}

    named = datasets.NamedSplit(split or "train")
    return Dataset.from_generator(rows, features, cache_dir=cache_dir, fingerprint=Path(cache_dir).name, split=named)


def _read_samples(files: Sequence[Path], is_image: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    for file in files:
        with tarfile.open(file) as archive:
            members = chain.from_iterable(_split_name(member) for member in archive if member.isfile())
            for _, sample in groupby(members, key=lambda part: part[0]):
                image = label = None
                for _, ending, member in sample:
                    if image is None and is_image(PurePosixPath(member.name).suffix.lower()):
                        image = {"bytes": _content(archive, member), "path": member.name}
                    elif ending == _CLASS:
                        label = int(_content(archive, member))
                if image is not None:
                    yield {"image": image, "label": label}


def _split_name(member: tarfile.TarInfo) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield the name of the sample, the ending, and the member, unless it is hidden."""
    path = PurePosixPath(member.name)
    name, _, ending = path.name.partition(".")
    if name:
        yield str(path.parent / name), ending.lower(), member


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return b"" if file is None else file.read()
