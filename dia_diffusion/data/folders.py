"""What files hold, whatever their times say.

What `metadata.jsonl`, `.csv` or `.parquet` says about the images beside and below it, as `datasets` has it.

A folder on this machine as a data set: of images, of Parquet or Arrow files, or saved by `datasets`.

`datasets` would guess splits from the names of files, take a path for a pattern, and trust the times of files.
"""

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from os.path import normpath
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from datasets import Dataset, DatasetDict
from datasets.fingerprint import Hasher
from PIL import Image

from ..errors import UsageError, first_line
from ..process.output import print_main
from .columns import find_image_column


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


METADATA = {"metadata.jsonl", "metadata.csv", "metadata.parquet"}
_READERS = {".jsonl": pyarrow.json.read_json, ".csv": pyarrow.csv.read_csv, ".parquet": pyarrow.parquet.read_table}
_NAME = "file_name"


def read_metadata(files: Sequence[Path], images: Sequence[Path]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Columns beside that of the images, a value for each image (`None` for one that no row names), and their types.

    Text in a column `label` is the names of classes.

    Raises:
        UsageError: for a file that cannot be read, or names an image that is not there.
    """
    rows: dict[str, dict[str, Any]] = {}
    known = {normpath(path) for path in images}
    for file in files:
        for row in _read(file):
            place = normpath(file.parent / str(row.pop(_NAME)))
            if place not in known:
                raise UsageError(f"'{file}' names '{place}', which is not there or not an image: correct or remove it.")
            rows[place] = row
    unnamed = [path for path in images if normpath(path) not in rows]
    if unnamed:
        print_main(
            f"{len(unnamed)} of {len(images)} images have no row in {files[0].name}, such as '{unnamed[0].name}'."
        )
    names = dict.fromkeys(name for row in rows.values() for name in row if name != "image")
    columns = {name: [rows.get(normpath(path), {}).get(name) for path in images] for name in names}
    features = {}
    for name, values in columns.items():
        try:
            kind = pa.array(values).type
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise UsageError(f"column '{name}' of {files[0].name} has values of several types: {error}") from error
        if name == "label" and pa.types.is_string(kind):
            classes = datasets.ClassLabel(names=sorted({value for value in values if value is not None}))
            columns[name] = [None if value is None else classes.str2int(value) for value in values]
            features[name] = classes
        else:
            features[name] = datasets.features.features.generate_from_arrow_type(kind)
    return columns, features


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        table = _READERS[file.suffix](file)
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"'{file}' cannot be read: {first_line(error)}.") from error
    if _NAME not in table.column_names:
        raise UsageError(
            f"'{file}' has no column '{_NAME}' that says which image a row is about, only: "
            f"{', '.join(table.column_names)}. Add it, or give the file another name."
        )
    return table.to_pylist()


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
# Files that come with images and are none.
_COMPANIONS = {".txt", ".md", ".json", ".jsonl", ".csv", ".yaml", ".yml", ".html", ".py"}
_DICT, _STATE = "dataset_dict.json", "state.json"


def load_folder(folder: Path, config_name: str | None = None, cache_dir: str | None = None) -> DatasetDict:
    """Loads a folder: all of it.

    - Saved by `datasets` (`save_to_disk`): what was saved.
    - Images, at any depth and behind links, named as they like; hidden files do not count. Where everything lies in
      folders that are named as splits are, these are the splits. Where everything lies in folders, each is a class;
      `metadata.jsonl`, `.csv` or `.parquet` say more about images in place of classes.
    - Parquet or Arrow files: splits where all of them are named as splits are.
    - Anything else: what `datasets` makes of it.

    Raises:
        UsageError: if there are no images, or the folder cannot be read.
    """
    folder = folder.resolve()
    if (folder / _DICT).is_file() or (folder / _STATE).is_file():
        return _load_saved(folder)
    files = sorted(_walk(folder), key=lambda path: path.as_posix())
    if config_name is None:
        images = [path for path in files if _is_image(path)]
        if images:
            _say_what_is_not_used(folder, set(files) - set(images))
            return _load_images(folder, images, [path for path in files if path.name in METADATA])
        tables = [path for path in files if path.suffix in _TABLES]
        if tables:
            return _load_tables(folder, tables, cache_dir)
    content = hash_files(files)
    try:
        loaded = datasets.load_dataset(str(folder), config_name, cache_dir=_cache(cache_dir, content))
        find_image_column(next(iter(loaded.values())))
    except Exception as error:
        raise UsageError(f"cannot load images from '{folder}': {_what_is_there(files, error)}") from error
    return _follow(loaded, content)


def _cache(cache_dir: str | None, content: str) -> str:
    """`datasets` knows files by their times; here it has a place for each content."""
    return str(Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / "dia_folders" / content)


def _follow(loaded: DatasetDict, content: str) -> DatasetDict:
    for name, rows in loaded.items():
        # What was saved to a disk has forgotten it.
        rows._split = datasets.NamedSplit(name) if len(loaded) > 1 else None
        rows._fingerprint = Hasher.hash((rows._fingerprint, content))
    return loaded


def _walk(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """All files that are not hidden. A link to a folder that holds it leads nowhere."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UsageError(f"the folder '{folder}' cannot be read: {error.strerror}.") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(folder / entry.name, (*above, real))
        else:
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


def _say_what_is_not_used(folder: Path, others: set[Path]) -> None:
    unused = sorted(path for path in others if path.suffix.lower() not in _COMPANIONS and path.name not in METADATA)
    if unused:
        names = ", ".join(f"'{path.relative_to(folder)}'" for path in unused[:3]) + (", ..." if unused[3:] else "")
        print_main(
            f"not used in '{folder}': {len(unused)} file{'s' if unused[1:] else ''} of kinds that are no images here "
            f"({names}). Unpack archives, and convert images that Pillow does not read."
        )


def _what_is_there(files: Sequence[Path], error: Exception) -> str:
    if not files:
        return "no images were found in that folder: it is empty."
    kinds = Counter(path.suffix.lower() or "no ending" for path in files).most_common(5)
    found = ", ".join(f"{count} of {kind}" for kind, count in kinds)
    return (
        f"no images were found in that folder, but {len(files)} other file{'s' if files[1:] else ''} ({found}). "
        f"Unpack archives, and convert images that Pillow does not read. ({first_line(error)})"
    )


def _parts(folder: Path, files: Sequence[Path]) -> list[tuple[str, ...]]:
    """Where files lie below the deepest folder that holds them all: the folders on the way, and the name."""
    places = [PurePosixPath(path.relative_to(folder).as_posix()).parts for path in files]
    shared = PurePosixPath(os.path.commonpath([PurePosixPath("/", *place[:-1]) for place in places])).parts[1:]
    return [place[len(shared) :] for place in places]


def _load_images(folder: Path, images: list[Path], metadata: list[Path]) -> DatasetDict:
    places = _parts(folder, images)
    splits = [_SPLITS.get(place[0].lower()) if place[1:] else None for place in places]
    if all(splits):
        places = [place[1:] for place in places]
    else:
        splits = [TRAIN_SPLIT] * len(images)
    columns: dict[str, list[Any]] = {"image": [str(path) for path in images]}
    features = {"image": datasets.Image()}
    names, several = [], len(set(splits)) > 1
    if metadata:
        more, of_them = read_metadata(metadata, images)
        columns, features = columns | more, features | of_them
    else:
        folders = [place[0] if place[1:] else None for place in places]
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
        loaded[split] = Dataset.from_dict(chosen, datasets.Features(features), split=split if several else None)
    return DatasetDict(loaded)


def _class_names(folders: list[str | None], splits: list[str]) -> list[str]:
    """The classes, those of the training images first, where each of these lies in the folder of one."""
    trained = {name for name, split in zip(folders, splits, strict=True) if split == TRAIN_SPLIT}
    trained = trained or set(folders)
    if None in trained or len({*folders} - {None}) == 1:
        return []
    return sort_class_names(trained) + sort_class_names(set(folders) - trained - {None})


def sort_class_names(names: set[str]) -> list[str]:
    """As text, or as numbers where all of them are."""
    return sorted(names, key=lambda name: (int(name), name)) if all(map(str.isdecimal, names)) else sorted(names)


def _load_tables(folder: Path, tables: list[Path], cache_dir: str | None) -> DatasetDict:
    kind = _TABLES[tables[0].suffix]
    if any(path.suffix != tables[0].suffix for path in tables):
        raise UsageError(f"'{folder}' holds Parquet files and Arrow files; leave one kind there.")
    places = _parts(folder, tables)
    splits = [_split_of_table(place) for place in places]
    if not all(splits):
        splits = [TRAIN_SPLIT] * len(tables)
    files = {
        split: [glob.escape(str(path)) for path, of in zip(tables, splits, strict=True) if of == split]
        for split in dict.fromkeys(splits)
    }
    content = hash_files(tables)
    try:
        return _follow(datasets.load_dataset(kind, data_files=files, cache_dir=_cache(cache_dir, content)), content)
    except Exception as error:
        raise UsageError(
            f"cannot load images from '{folder}': its {kind} files cannot be read: "
            f"{first_line(error.__cause__ or error)}."
        ) from error


def _split_of_table(place: tuple[str, ...]) -> str | None:
    shard = _SHARD.fullmatch(place[-1].lower().rsplit(".", 1)[0])
    return _SPLITS.get(place[0].lower()) or (_SPLITS.get(shard[1]) if shard else None)


def _load_saved(folder: Path) -> DatasetDict:
    try:
        loaded = datasets.load_from_disk(str(folder))
        if not isinstance(loaded, DatasetDict):
            loaded = DatasetDict({TRAIN_SPLIT: loaded})
    except Exception as error:
        raise UsageError(f"cannot load the data set that was saved to '{folder}': {first_line(error)}.") from error
    files = [file["filename"] for rows in loaded.values() for file in rows.cache_files]
    return _follow(loaded, hash_files(files))
