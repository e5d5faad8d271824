"""The data that a training run records beside its model: what commands compare that model with by default."""

from dataclasses import fields, replace
from pathlib import Path

from ..errors import UsageError
from ..options.model import DataOptions
from ..options.rules import EMBEDDED_DATA, is_archive
from ..options.training import CONFIG, read_yaml


def find_recorded_data(model: str) -> DataOptions | None:
    """Return the data options that the training run of a model recorded, or None where there is no record.

    Args:
        model (`str`): Folder of the run, or anything else that names a model.
    """
    record = Path(model) / CONFIG
    options = read_yaml(record) if record.is_file() else None
    if not isinstance(options, dict):
        return None
    known = {item.name: options[item.name] for item in fields(DataOptions) if item.name in options}
    data = DataOptions(**known)
    return data if data.dataset_name or data.train_data_dir else None


def choose_data(
    model: str, dataset: str | None, config_name: str | None = None, image_column: str | None = None
) -> tuple[str, DataOptions | None]:
    """Choose the images that a command compares a model with.

    Args:
        model (`str`): The model, or the images to score.
        dataset (`str`, *optional*): Name or folder of the data; by default what the training run records.
        config_name, image_column (`str`, *optional*): Override what the run records.

    Returns:
        `tuple`: The name of the data, and the options with which the run loads it; None where the run recorded other
        data or nothing.

    Raises:
        UsageError: if no data is named and none is recorded, or if the data is not here.
    """
    if dataset is not None and Path(dataset).is_file() and not is_archive(dataset):
        raise UsageError(
            f"--dataset '{dataset}' is a file: name a folder (of archives, too), a data set, or samples or "
            "statistics (.npz, .npy)."
        )
    recorded = find_recorded_data(model)
    if recorded is not None:
        origin = recorded.dataset_name or recorded.train_data_dir or ""
        if dataset in (None, recorded.dataset_name, recorded.train_data_dir):
            if recorded.dataset_name is None and not Path(origin).is_dir():
                raise UsageError(
                    f"'{model}' was trained on the images in '{origin}', and there is no such folder here: name the "
                    "data to compare with, --dataset FOLDER."
                )
            return origin, replace(
                recorded,
                dataset_config_name=config_name or recorded.dataset_config_name,
                image_column=image_column or recorded.image_column,
            )
    if dataset is None:
        raise UsageError(
            f"'{model}' does not record which data it was trained on: name the data to compare with, for example "
            "--dataset digits or --dataset FOLDER."
        )
    return dataset, None


def check_outside(output: Path | None, dataset: str) -> None:
    """Refuse a folder for pictures among the images of a data set: the next command would take them for its images."""
    folder = Path(dataset)
    if output is None or dataset in EMBEDDED_DATA or not folder.is_dir():
        return
    folder, output = folder.resolve(), output.resolve()
    between = [place for place in (output, *output.parents) if place.is_relative_to(folder) and place != folder]
    # Pictures in the output of a run are no images of the data.
    if output.is_relative_to(folder) and not any((place / CONFIG).is_file() for place in between):
        raise UsageError(
            f"'{output}' lies in '{dataset}', the folder of the images, and pictures there would become images of the "
            "data set: choose another folder."
        )
