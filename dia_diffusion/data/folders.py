"""A folder on this machine as a data set: of images, of Parquet or Arrow files, or saved by `datasets`.

`datasets` would guess splits from the names of files, take a path for a pattern, and trust the times of files.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from datasets import Dataset, DatasetDict
from datasets.fingerprint import Hasher
from PIL import Image

from ..errors import UsageError, first_line
from ..options.training import CONFIG
from ..process.output import print_main
from .archives import ARCHIVES, VERSION, load_archives
from .cache import cache_place, hash_files
from .columns import find_image_column, recognise_images, sort_class_names
from .decoding import LFS_POINTER, is_lfs_pointer
from .metadata import METADATA, TABLES, is_metadata, read_metadata, to_columns

TRAIN_SPLIT = "train"
_SPLITS = {
    name: split
    for split, names in {
        TRAIN_SPLIT: "train training",
        "test": "test testing eval evaluation",
        "validation": "validation val valid dev",
    }.items()
    for name in names.split()
}
_TABLES = {".parquet": "parquet", ".arrow": "arrow"}
_SHARD = re.compile(r"([a-z]+)([-_.]\d+)?(-of-\d+)?")
# Formats that Pillow knows by name only, or renders with another program.
_NOT_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
# Formats that say what they are in their first bytes, so that their names do not matter.
_RECOGNISED = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "JPEG2000", "AVIF")
# Files that often lie beside images: they are left out without a message.
_COMPANIONS = {".txt", ".md", ".json", ".jsonl", ".csv", ".yaml", ".yml", ".html", ".py"}
_DICT, _STATE = "dataset_dict.json", "state.json"


def load_folder(folder: Path, config_name: str | None = None, cache_dir: str | None = None) -> DatasetDict:
    """Load all images of a folder.

    - Saved by `datasets` (`save_to_disk`): what was saved.
    - Images, at any depth and behind links, whatever their names; hidden files do not count. Where everything lies in
      folders that are named as splits are, these are the splits. Where everything lies in folders, each is a class;
      `metadata.jsonl`, `.csv` or `.parquet` describe images instead of classes.
    - Parquet or Arrow files: splits where all of them are named as splits are.
    - Archives (tar, zip): the images in them; folders and metadata inside count as above, metadata beside a single
      archive too. Files beside an image tell its class: `.cls`, and `.json` with a value or `label`.
    - Anything else: what `datasets` makes of it.

    Args:
        folder (`Path`): The folder.
        config_name (`str`, *optional*): Configuration, of a folder that has several. Leaves everything to `datasets`.
        cache_dir (`str`, *optional*): Where `datasets` keeps what it prepares.

    Raises:
        UsageError: if there are no images, or the folder cannot be read.
    """
    folder = folder.resolve()
    if (folder / _DICT).is_file() or (folder / _STATE).is_file():
        return _load_saved(folder)
    files = sorted(_walk(folder), key=lambda path: path.as_posix())
    if config_name is None:
        images = [path for path in files if _is_image(path)]
        archives = [path for path in files if path.name.lower().endswith(ARCHIVES)]
        metadata = [path for path in files if is_metadata(path)] if images or archives else []
        tables = [path for path in files if path.suffix in _TABLES and path not in metadata]
        if images:
            _report_unused(folder, sorted(set(files) - {*images, *metadata}))
            return _load_images(folder, images, metadata)
        if tables:
            _report_unused(folder, sorted(set(files) - {*tables}))
            return _load_tables(folder, tables, cache_dir)
        if archives and (loaded := _load_archives(archives, metadata, cache_dir)):
            _report_unused(folder, sorted(set(files) - {*archives, *metadata}))
            return loaded
    content = hash_files(files)
    try:
        loaded = datasets.load_dataset(str(folder), config_name, cache_dir=_cache(cache_dir, content))
        loaded = DatasetDict({name: recognise_images(rows) for name, rows in loaded.items()})
        find_image_column(next(iter(loaded.values())))
    except Exception as error:
        raise UsageError(f"cannot load images from '{folder}': {_describe_other(files, error)}") from error
    return _follow(loaded, content)


def _cache(cache_dir: str | None, content: str) -> str:
    """Return a cache for this content: `datasets` itself knows files by their times."""
    return str(cache_place(cache_dir, "dia_folders", content))


def _follow(loaded: DatasetDict, content: str) -> DatasetDict:
    for name, rows in loaded.items():
        # What was saved to a disk has forgotten it.
        rows._split = datasets.NamedSplit(name) if len(loaded) > 1 else None
        rows._fingerprint = Hasher.hash((rows._fingerprint, content))
    return loaded


def _walk(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield all files that are not hidden, without following links to a folder above."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UsageError(f"the folder '{folder}' cannot be read: {error.strerror}.") from error
    if above and (folder / CONFIG).is_file():
        # Pictures of samples and curves are no training images.
        print_main(f"not used: '{folder}', which is the output of a run.")
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(folder / entry.name, (*above, real))
        elif entry.is_file() or entry.is_symlink():
            # Reading a pipe or a socket would wait for ever.
            yield folder / entry.name


@cache
def _image_endings() -> frozenset[str]:
    endings = Image.registered_extensions()
    return frozenset(end for end, name in endings.items() if name in Image.OPEN and name not in _NOT_IMAGES)


def _is_image(path: Path) -> bool:
    ending = path.suffix.lower()
    if ending in _image_endings():
        return True
    if ending in _COMPANIONS or ending in _TABLES or not path.is_file():
        return False
    try:
        with Image.open(path, formats=_RECOGNISED):
            return True
    except Exception:
        return False


def _report_unused(folder: Path, others: Sequence[Path]) -> None:
    tables = [path for path in others if path.suffix.lower() in TABLES]
    unused = [path for path in others if path.suffix.lower() not in _COMPANIONS | TABLES]
    if unused:
        print_main(
            f"not used in '{folder}': {_count(len(unused), 'file')} of kinds that are no images here "
            f"({_list(folder, unused)}). Unpack archives, and convert images that Pillow does not read."
        )
    if tables:
        print_main(
            f"not read in '{folder}': {_count(len(tables), 'table')} ({_list(folder, tables)}). A table with a column "
            f"file_name describes the images beside it if it is called {', '.join(sorted(METADATA))}."
        )


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def _list(folder: Path, paths: Sequence[Path]) -> str:
    return ", ".join(f"'{readable(path.relative_to(folder))}'" for path in paths[:3]) + (", ..." if paths[3:] else "")


def _describe_other(files: Sequence[Path], error: Exception) -> str:
    if not files:
        return "no images were found in that folder: it is empty."
    if isinstance(error, OSError) and not isinstance(error, datasets.exceptions.DataFilesNotFoundError):
        return f"{first_line(error)}."
    kinds = Counter(path.suffix.lower() or "no ending" for path in files).most_common(5)
    found = ", ".join(f"{count} of {kind}" for kind, count in kinds)
    return (
        f"no images were found in that folder, but {_count(len(files), 'other file')} ({found}). "
        f"Unpack archives, and convert images that Pillow does not read. ({first_line(error)})"
    )


def readable(path: Path | str) -> str:
    """Return a name of a file as text that can be printed and stored. Names of files need not be UTF-8."""
    return os.fsencode(path).decode(errors="replace")


def _cells(images: Sequence[Path]) -> list[Any]:
    """Return the cells of an image column: paths, and the contents of files whose names Arrow cannot hold."""
    if all(readable(path) == str(path) for path in images):
        return [str(path) for path in images]
    return [
        {"bytes": None, "path": str(path)}
        if readable(path) == str(path)
        else {"bytes": path.read_bytes(), "path": readable(path)}
        for path in images
    ]


def _parts(paths: Sequence[str | Path]) -> list[tuple[str, ...]]:
    """Split the paths of files below the deepest folder that holds them all."""
    places = [tuple(part for part in PurePosixPath(path).parts if part != "/") for path in paths]
    shared = PurePosixPath(os.path.commonpath([PurePosixPath("/", *place[:-1]) for place in places])).parts[1:]
    return [place[len(shared) :] for place in places]


def _load_images(folder: Path, images: list[Path], metadata: list[Path]) -> DatasetDict:
    splits, folders = _splits_and_folders(images)
    columns: dict[str, list[Any]] = {"image": _cells(images)}
    features: dict[str, Any] = {"image": datasets.Image()}
    names: list[str] = []
    if metadata:
        more, of_them = to_columns(read_metadata({path: path.read_bytes() for path in metadata}, images))
        columns, features = columns | more, features | of_them
    else:
        names = _class_names(folders, splits)
        if names:
            columns["label"] = [None if name is None else names.index(name) for name in folders]
    loaded = {}
    for split in sorted(set(splits), key=lambda name: name != TRAIN_SPLIT):
        rows = [row for row, of in enumerate(splits) if of == split]
        chosen = {name: [values[row] for row in rows] for name, values in columns.items()}
        if names and split == TRAIN_SPLIT:
            # Training knows no other classes than those of its images.
            features["label"] = datasets.ClassLabel(names=names[: max(chosen["label"]) + 1])
        elif names:
            features["label"] = datasets.ClassLabel(names=names)
        loaded[split] = Dataset.from_dict(
            chosen, datasets.Features(features), split=split if len(set(splits)) > 1 else None
        )
    return DatasetDict(loaded)


def _splits_and_folders(paths: Sequence[str | Path]) -> tuple[list[str], list[str | None]]:
    """Return the split of each image, and the folder that it lies in, which may be its class, or None."""
    places = _parts(paths)
    splits = [_SPLITS.get(place[0].lower(), "") if place[1:] else "" for place in places]
    if all(splits):
        places = [place[1:] for place in places]
    else:
        splits = [TRAIN_SPLIT] * len(places)
    return splits, [readable(place[0]) if place[1:] else None for place in places]


def _class_names(folders: list[str | None], splits: list[str]) -> list[str]:
    """Return the classes, those of training images first, or none where a training image lies in no folder."""
    training = [name for name, split in zip(folders, splits, strict=True) if split == TRAIN_SPLIT] or folders
    trained, known = ({name for name in names if name is not None} for names in (training, folders))
    if None in training or len(known) == 1:
        return []
    return sort_class_names(trained) + sort_class_names(known - trained)


def _load_archives(archives: list[Path], metadata: list[Path], cache_dir: str | None) -> DatasetDict | None:
    """Load archives. Without archives named as splits, folders inside of them are splits and classes, as elsewhere."""
    splits, loaded = _splits_of(archives), {}
    if metadata and len(archives) > 1:
        print_main(
            f"not read: '{metadata[0]}', which lies beside {len(archives)} archives. Put such a file into the archive "
            "whose images it describes."
        )
        metadata = []
    content = hash_files([*archives, *metadata], VERSION)
    for split in dict.fromkeys(splits):
        files = [path for path, of in zip(archives, splits, strict=True) if of == split]
        kept = _cache(cache_dir, hash_files(files, VERSION))
        rows = load_archives(files, metadata, _image_endings().__contains__, kept)
        if rows is None:
            continue
        paths = pc.struct_field(rows.data.column("image"), "path").to_pylist()
        inside, folders = _splits_and_folders(paths)
        if "label" not in rows.features and _class_names(folders, inside):
            rows = rows.add_column("label", folders, feature=datasets.Value("string"))
        if len(set(splits)) > 1:
            inside = [split] * len(rows)
        for name in sorted(set(inside), key=lambda name: name != TRAIN_SPLIT):
            loaded[name] = rows.select([row for row, of in enumerate(inside) if of == name])
    return _follow(DatasetDict(loaded), content) if loaded else None


def _load_tables(folder: Path, tables: list[Path], cache_dir: str | None) -> DatasetDict:
    kind = _TABLES[tables[0].suffix]
    if any(path.suffix != tables[0].suffix for path in tables):
        raise UsageError(f"'{folder}' holds Parquet files and Arrow files; leave one kind there.")
    tables = [path for path in tables if not _is_empty(path)]
    if not tables:
        raise UsageError(f"cannot load images from '{folder}': its {kind} files hold no rows.")
    splits = _splits_of(tables)
    files = {
        split: [glob.escape(str(path)) for path, of in zip(tables, splits, strict=True) if of == split]
        for split in dict.fromkeys(splits)
    }
    content = hash_files(tables)
    try:
        loaded = datasets.load_dataset(kind, data_files=files, cache_dir=_cache(cache_dir, content))
        return _follow(DatasetDict({name: recognise_images(rows) for name, rows in loaded.items()}), content)
    except Exception as error:
        reason = LFS_POINTER if any(map(is_lfs_pointer, tables)) else first_line(error.__cause__ or error)
        if isinstance(error.__cause__, datasets.table.CastError):
            reason = "their columns are not the same"
        raise UsageError(f"cannot load images from '{folder}': its {kind} files cannot be read: {reason}.") from error


def _is_empty(table: Path) -> bool:
    """Tell whether a Parquet file has no rows, which `datasets` cannot read."""
    try:
        return table.suffix == ".parquet" and pyarrow.parquet.read_metadata(table).num_rows == 0
    except (OSError, pa.ArrowException):
        return False  # Reading it will give the error.


def _splits_of(files: Sequence[Path]) -> list[str]:
    """Return the split of each file, from their names if all of them are named as splits are."""
    splits = [_split_of_name(place) for place in _parts(files)]
    return [split or TRAIN_SPLIT for split in splits] if all(splits) else [TRAIN_SPLIT] * len(files)


def _split_of_name(place: tuple[str, ...]) -> str | None:
    shard = _SHARD.fullmatch(place[-1].lower().partition(".")[0])
    return _SPLITS.get(place[0].lower()) or (_SPLITS.get(shard[1]) if shard else None)


def _load_saved(folder: Path) -> DatasetDict:
    try:
        loaded = datasets.load_from_disk(str(folder))
        if not isinstance(loaded, DatasetDict):
            loaded = DatasetDict({TRAIN_SPLIT: loaded})
        loaded = DatasetDict({name: recognise_images(rows) for name, rows in loaded.items()})
    except Exception as error:
        # `datasets` raises these for a saved data set without rows.
        reason = "it holds no rows" if isinstance(error, IndexError) else first_line(error)
        raise UsageError(f"cannot load the data set that was saved to '{folder}': {reason}.") from error
    files = [file["filename"] for rows in loaded.values() for file in rows.cache_files]
    return _follow(loaded, hash_files(files))
