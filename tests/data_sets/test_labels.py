"""Classes keep their names and numbers; images without one are left out, or named."""

import datasets
import pytest
from PIL import Image

from dia_diffusion.data.columns import find_image_column
from dia_diffusion.data.loading import load_pixels
from dia_diffusion.data.pixels import describe_images
from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.errors import UsageError
from dia_diffusion.options.model import DataOptions


def rows(labels, names=None):
    kind = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    images = [Image.new("L", (4, 4), number) for number in range(len(labels))]
    features = datasets.Features(image=datasets.Image(), label=kind)
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features)


@pytest.mark.parametrize("missing", [-1, None])
def test_training_images_without_a_label_are_refused_or_left_out(missing):
    for data in (rows([0, 1, missing, 1]), rows([0, 1, missing, 1], ["a", "b"])):
        with pytest.raises(UsageError, match="1 of 4 images have no label"):
            prepare_pixels(data, 4, with_labels=True)
        pixels = prepare_pixels(data, 4, with_labels=True, on_bad_image="skip")
        assert pixels.labels.tolist() == [0, 1, 1]
        batch = pixels.fetch([0, 1, 2])
        assert (batch["labels"].tolist(), batch["images"][:, 0, 0, 0].tolist()) == ([0, 1, 1], [0, 1, 3])
        assert "1 of 4 images have no label" in describe_images(pixels, "data")


def save(folder, **splits):
    datasets.DatasetDict(splits).save_to_disk(folder)
    return DataOptions(dataset_name=str(folder), resolution=4, class_conditional=True)


@pytest.mark.parametrize("labels", [[-1] * 3, [None] * 3])
def test_a_split_without_labels_gives_way_to_one_with_them(tmp_path, capsys, labels):
    splits = {"train": rows([0, 1]), "test": rows(labels)}
    _, held_out = load_pixels(save(tmp_path / "a", **splits))
    assert held_out is None
    assert "3 images of split 'test' (held-out images need labels)" in capsys.readouterr().out
    _, held_out = load_pixels(save(tmp_path / "b", **splits, validation=rows([1])))
    assert (len(held_out), str(held_out.prepared.split)) == (1, "validation")
    # Without classes labels do not matter.
    options = save(tmp_path / "c", **splits)
    options.class_conditional = False
    assert len(load_pixels(options)[1]) == 3


def test_held_out_labels_that_training_never_saw_are_left_out(tmp_path, capsys):
    data, held_out = load_pixels(save(tmp_path / "a", train=rows([0, 1, 3]), test=rows([3, 2, 7, None, 1])))
    assert (data.class_names, held_out.labels.tolist()) == (["0", "1", "3"], [2, 1])
    assert held_out.fetch([0, 1])["images"][:, 0, 0, 0].tolist() == [0, 4]
    assert "3 of 5 images" in held_out.left_out[0]
    # Names count, and not the numbers that another split has for them.
    train, test = rows([0, 1], ["cat", "dog"]), rows([0, 1, 2], ["ant", "cat", "dog"])
    _, held_out = load_pixels(save(tmp_path / "b", train=train, test=test))
    assert (held_out.labels.tolist(), held_out.class_names) == ([0, 1], ["cat", "dog"])
    assert load_pixels(save(tmp_path / "c", train=rows([0, 1]), test=rows([5, 6])))[1] is None
    assert "No images are held out: 2 of 2 images" in capsys.readouterr().out


def test_named_classes_without_a_training_image_are_left_out_and_said(tmp_path):
    names = [f"c{number}" for number in range(10)]
    data, held_out = load_pixels(save(tmp_path / "a", train=rows([7, 3, 7], names), test=rows([3, 5, 7], names)))
    assert (data.class_names, data.labels.tolist()) == (["c3", "c7"], [1, 0, 1])
    assert (held_out.class_names, held_out.labels.tolist()) == (["c3", "c7"], [0, 1])
    assert "8 of 10 classes have no training image and are left out: c0, c1, c2, c4" in describe_images(data, "a")
    # So are numbers alone.
    data, held_out = load_pixels(save(tmp_path / "b", train=rows([10, 2, 10]), test=rows([2, 5, 10])))
    assert (data.class_names, data.labels.tolist()) == (["2", "10"], [1, 0, 1])
    assert held_out.labels.tolist() == [0, 1]
    assert "2 classes: 0 2, 1 10." in describe_images(data, "b")


def test_the_digest_follows_the_labels_and_is_what_it_was_without_them():
    data = [prepare_pixels(rows(labels), 4, with_labels=True) for labels in ([0, 1, 1], [1, 0, 1], [0, 1, 1])]
    assert data[0].digest() == data[2].digest() != data[1].digest()
    assert data[0].digest(with_labels=False) == data[1].digest(with_labels=False)
    plain = prepare_pixels(rows([0, 1, 1]), 4)
    assert plain.digest() == plain.digest(with_labels=False) == data[1].digest(with_classes=False)


def test_numbers_that_pandas_made_fractions_are_classes_and_other_fractions_are_not():
    """An empty cell makes whole numbers floats in pandas, and itself NaN."""

    def fractions(*labels):
        return rows([0] * len(labels)).remove_columns("label").add_column("label", list(labels))

    data = prepare_pixels(fractions(2.0, None, 7.0, float("nan")), 4, with_labels=True, on_bad_image="skip")
    assert (data.class_names, data.labels.tolist()) == (["2", "7"], [0, 1])
    # Text of an empty cell in a table of comma-separated values.
    data = prepare_pixels(fractions("b", "", "a", " "), 4, with_labels=True, on_bad_image="skip")
    assert (data.class_names, data.labels.tolist()) == (["a", "b"], [1, 0])
    for wrong in (0.5, float("inf")):
        with pytest.raises(UsageError, match=f"column 'label' holds no classes .* but {wrong}"):
            prepare_pixels(fractions(1.0, wrong), 4, with_labels=True)


def test_what_a_command_says_about_images():
    images = [Image.new("L", (4, 6), 1), Image.new("RGBA", (8, 4), (0, 0, 0, 0))]
    data = datasets.Dataset.from_dict({"image": images}, datasets.Features(image=datasets.Image()), split="test")
    assert describe_images(prepare_pixels(data, 4), "icons") == (
        "2 images of 'icons', split test: from 4x4 to 8x6 pixels, 1 PNG L, 1 PNG RGBA; taken as 4x4 in colour; "
        "1 of them are transparent: they lie on white."
    )


def test_a_column_that_is_not_of_images_gets_advice_that_can_be_followed():
    with pytest.raises(UsageError, match=r"picture \(Value\).*cast_column"):
        find_image_column(datasets.Dataset.from_dict({"picture": [b"bytes"]}))
