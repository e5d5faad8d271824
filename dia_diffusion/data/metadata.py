"""Tables beside images: `metadata.jsonl`, `.csv` or `.parquet`, as `datasets` has them."""

from collections.abc import Sequence
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
_READERS = {".jsonl": pyarrow.json.read_json, ".csv": pyarrow.csv.read_csv, ".parquet": pyarrow.parquet.read_table}
# Endings of tables that describe images, whatever they are called.
TABLES = {".jsonl", ".csv", ".tsv", ".parquet", ".json", ".xlsx"}
_NAME = "file_name"


def read_metadata(files: Sequence[Path], images: Sequence[Path]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Read the columns of tables beside images.

    Args:
        files (sequence of `Path`): The tables.
        images (sequence of `Path`): The images.

    Returns:
        `tuple`: columns with a value for each image, `None` for one that no row names, and the types of the columns.

    Raises:
        UsageError: for a file that cannot be read, or names an image that is not there.
    """
    rows: dict[str, dict[str, Any]] = {}
    known = {normpath(path) for path in images}
    for file in files:
        for row in _read(file):
            name = str(row.pop(_NAME))
            place = normpath(file.parent / name)
            if place not in known:
                # Written on Windows.
                place = normpath(file.parent / name.replace("\\", "/"))
            if place not in known:
                raise UsageError(f"'{file}' names '{place}', which is no image in that folder: correct or remove it.")
            before = rows.get(place, {})
            if any(before.get(column, value) != value for column, value in row.items()):
                raise UsageError(f"'{file}' describes '{name}' again and differently: {before} and {row}. Remove one.")
            rows[place] = before | row
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
            features[name] = datasets.features.features.generate_from_arrow_type(pa.array(values).type)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise UsageError(f"column '{name}' of {files[0].name} has values of several types: {error}") from error
    return columns, features


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        table = _READERS[file.suffix](file)
        if file.suffix == ".csv" and len(table.column_names) == 1:
            # As spreadsheets write it in many countries.
            table = pyarrow.csv.read_csv(file, parse_options=pyarrow.csv.ParseOptions(delimiter=";"))
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
