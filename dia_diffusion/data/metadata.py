"""Tables beside images: `metadata.jsonl`, `.csv` or `.parquet`, as `datasets` has them."""

import io
import json
from collections.abc import Mapping, Sequence
from os.path import normpath
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from ..errors import UsageError, first_line
from ..process.output import print_main

METADATA = {"metadata.jsonl", "metadata.csv", "metadata.parquet"}
# The classes of images, as the data sets of StyleGAN and EDM have them.
LABELS = "dataset.json"
_READERS = {".jsonl": pyarrow.json.read_json, ".csv": pyarrow.csv.read_csv, ".parquet": pyarrow.parquet.read_table}
# Endings of tables that describe images, whatever they are called.
TABLES = {".jsonl", ".csv", ".tsv", ".parquet", ".json", ".xlsx"}
_NAME = "file_name"


def is_metadata(path: Path) -> bool:
    """Tell from its name, and of `dataset.json` from its content, whether a file describes the images beside it."""
    return path.name in METADATA or (path.name == LABELS and bool(read_label_pairs(path.read_bytes())))


def read_label_pairs(content: bytes) -> list[dict[str, Any]]:
    """Return the rows of a `dataset.json`, `file_name` and `label`, or none where it is a file of another kind."""
    try:
        listed = json.loads(content)
    except ValueError:
        return []
    pairs = listed.get("labels") if isinstance(listed, dict) else None
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return []
    return [{_NAME: name, "label": str(label)} for name, label in pairs]


def read_metadata(files: Mapping[Path, bytes], images: Sequence[Path]) -> list[dict[str, Any]]:
    """Read the rows of tables beside images.

    Args:
        files (`dict`): The content of each table by its path.
        images (sequence of `Path`): The images.

    Returns:
        list of `dict`: for each image its values by column, none for one that no row names.

    Raises:
        UsageError: for a file that cannot be read, or names an image that is not there.
    """
    rows: dict[str, dict[str, Any]] = {}
    known = {normpath(path) for path in images}
    for file, content in files.items():
        for row in _read(file, content):
            name = str(row.pop(_NAME))
            place = normpath(file.parent / name)
            if place not in known:
                # A path that was written on Windows.
                place = normpath(file.parent / name.replace("\\", "/"))
            if place not in known:
                raise UsageError(f"'{file}' names '{place}', which is no image in that folder: correct or remove it.")
            before = rows.get(place, {})
            if any(before.get(column, value) != value for column, value in row.items()):
                raise UsageError(f"'{file}' describes '{name}' again and differently: {before} and {row}. Remove one.")
            rows[place] = before | row
    unnamed = [path for path in images if normpath(path) not in rows]
    if unnamed and files:
        table = next(iter(files)).name
        print_main(f"{len(unnamed)} of {len(images)} images have no row in {table}, such as '{unnamed[0].name}'.")
    return [rows.get(normpath(path), {}) for path in images]


def to_columns(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Return the columns of rows, `None` where a row lacks one, and their types: text where values have several."""
    names = dict.fromkeys(name for row in rows for name in row if name != "image")
    columns = {name: [row.get(name) for row in rows] for name in names}
    features = {}
    for name, values in columns.items():
        try:
            kind = pa.array(values).type
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
            columns[name] = [
                None if value is None else str(value).encode(errors="replace").decode() for value in values
            ]
            kind = pa.string()
        features[name] = datasets.features.features.generate_from_arrow_type(kind)
    return columns, features


def _read(file: Path, content: bytes) -> list[dict[str, Any]]:
    if file.name == LABELS:
        return read_label_pairs(content)
    try:
        table = _READERS[file.suffix](io.BytesIO(content))
        if file.suffix == ".csv" and len(table.column_names) == 1:
            # Spreadsheets in many countries separate cells with semicolons.
            table = pyarrow.csv.read_csv(io.BytesIO(content), parse_options=pyarrow.csv.ParseOptions(delimiter=";"))
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"'{file}' cannot be read: {first_line(error)}.") from error
    broken = [field.name for field in table.schema if file.suffix == ".csv" and pa.types.is_binary(field.type)]
    if broken:
        raise UsageError(f"'{file}' is not UTF-8 (column '{broken[0]}'): save it in that encoding.")
    if _NAME not in table.column_names:
        raise UsageError(
            f"'{file}' has no column '{_NAME}' that says which image a row is about, only: "
            f"{', '.join(table.column_names)}. Add it, or give the file another name."
        )
    return table.to_pylist()
