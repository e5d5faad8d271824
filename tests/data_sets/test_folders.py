"""A folder is all of its images, named as they are, and follows its contents."""

import json
import os
import shutil
import zipfile

import datasets
import numpy as np
import pytest
from PIL import Image

from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.data.sources import load_all_images, load_dataset_splits
from dia_diffusion.errors import UsageError
from dia_diffusion.options.model import DataOptions


def make(root, *names, mode="L"):
    """Images with a grey of their own, counted up from 1."""
    for value, name in enumerate(names, 1):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (8, 8), value if mode == "L" else (value, 0, 0)).save(path)
    return root


def names_in(dataset, root):
    paths = dataset.cast_column("image", datasets.Image(decode=False))["image"]
    return sorted(os.path.relpath(cell["path"], root) for cell in paths)


@pytest.mark.parametrize(
    "names",
    [
        ["a.png", "b.png", "train.png"],
        ["train_0.png", "test_0.png", "test_1.png"],
        ["control/a.png", "test/b.png"],
        ["bus/a.png", "car/b.png", "train/c.png"],
        ["we[i]rd *?/a b.png", "we[i]rd *?/deeper/ü[1]*.JPG", "label.png", "metadata/x.bmp"],
        ["train/a.png", "test/b.png", "extra.png"],
        ["one/two/three/a.png"],
        ["test/a.png"],
    ],
)
def test_all_images_are_used(tmp_path, names):
    root = make(tmp_path / "im[a]ges *", *names, ".hidden.png", ".cache/d.png")
    train, held_out = load_dataset_splits(train_data_dir=str(root))
    assert held_out is None
    assert names_in(train, root) == sorted(names)
    assert len(prepare_pixels(train, 8)) == len(names)


@pytest.mark.parametrize(
    ("names", "classes", "labels"),
    [
        (["bus/a.png", "car/b.png", "train/c.png"], ["bus", "car", "train"], [0, 1, 2]),
        (["1/a.png", "10/b.png", "2/c.png", "2/deep/d.png"], ["1", "2", "10"], [0, 2, 1, 1]),
        (["all/cat/a.png", "all/dog/b.png"], ["cat", "dog"], [0, 1]),
        (["cat/a.png", "dog/b.png", "c.png"], None, None),
        (["cat/a.png", "cat/b.png"], None, None),
    ],
)
def test_folders_are_classes_where_everything_lies_in_one(tmp_path, names, classes, labels):
    train, _ = load_dataset_splits(train_data_dir=str(make(tmp_path / "images", *names)))
    assert ("label" in train.features) == (classes is not None)
    if classes:
        pixels = prepare_pixels(train, 8, with_labels=True)
        assert (pixels.class_names, pixels.labels.tolist()) == (classes, labels)


def test_splits_need_every_folder_to_be_one_and_have_no_made_up_labels(tmp_path):
    root = make(tmp_path / "plain", "train/a.png", "train/b.png", "val/c.png")
    train, held_out = load_dataset_splits(train_data_dir=str(root))
    assert (len(train), len(held_out), str(held_out.split)) == (2, 1, "validation")
    assert list(train.features) == ["image"]
    assert len(load_all_images(str(root))) == 3
    root = make(tmp_path / "classes", "train/cat/a.png", "train/dog/b.png", "test/dog/c.png", "test/eel/d.png")
    train, held_out = load_dataset_splits(train_data_dir=str(root))
    known = prepare_pixels(train, 8, with_labels=True)
    assert known.class_names == ["cat", "dog"]
    pixels = prepare_pixels(held_out, 8, with_labels=True, trained=(known.class_names, known.labels))
    assert pixels.labels.tolist() == [1]
    assert "1 of 2 images" in pixels.left_out[0]


def test_links_are_followed_and_circles_end(tmp_path):
    make(tmp_path / "far", "x/a.png", "y/b.png")
    root = tmp_path / "images"
    root.mkdir()
    (root / "cats").symlink_to(tmp_path / "far" / "x")
    (root / "dogs").symlink_to(tmp_path / "far" / "y")
    (tmp_path / "far" / "x" / "up").symlink_to(root)
    (tmp_path / "far" / "y" / "own.png").symlink_to(tmp_path / "far" / "x" / "a.png")
    train, _ = load_dataset_splits(train_data_dir=str(root))
    names = names_in(train, root)
    assert {"cats/a.png", "dogs/b.png", "dogs/own.png"} <= set(names)
    assert prepare_pixels(train, 8, with_labels=True).class_names == ["cats", "dogs"]


def test_what_is_not_used_is_named(tmp_path, capsys):
    root = make(tmp_path / "images", "a.png", "b.avif", mode="RGB")
    shutil.copy(root / "a.png", root / "no_ending")
    (root / "notes.txt").write_text("")
    with zipfile.ZipFile(root / "more.zip", "w") as archive:
        archive.write(root / "a.png", "c.png")
    train, _ = load_dataset_splits(train_data_dir=str(root))
    assert names_in(train, root) == ["a.png", "b.avif", "no_ending"]
    assert "1 file of kinds that are no images here ('more.zip')" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "film.mp4").write_bytes(b"0")
    with pytest.raises(UsageError, match=r"no images were found in that folder, but 1 other file \(1 of .mp4\)"):
        load_dataset_splits(train_data_dir=str(tmp_path / "other"))


def test_metadata_says_more_about_images(tmp_path, capsys):
    root = make(tmp_path / "images", "a.png", "deep/b.png", "c.png")
    lines = [
        {"file_name": "a.png", "label": "cat", "text": "A"},
        {"file_name": "deep/b.png", "label": "ant", "text": "B"},
    ]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    train, _ = load_dataset_splits(train_data_dir=str(root))
    assert (train["text"][:], train["label"][:]) == (["A", None, "B"], ["cat", None, "ant"])
    assert "1 of 3 images have no row in metadata.jsonl, such as 'c.png'" in capsys.readouterr().out
    with pytest.raises(UsageError, match="1 of 3 images have no label in column 'label'"):
        prepare_pixels(train, 8, with_labels=True)
    pixels = prepare_pixels(train, 8, with_labels=True, on_bad_image="skip")
    assert (pixels.class_names, pixels.labels.tolist(), len(pixels)) == (["ant", "cat"], [1, 0], 2)
    (root / "metadata.jsonl").unlink()
    (root / "metadata.csv").write_text("file_name,label\na.png,0\nnone.png,1\n")
    with pytest.raises(UsageError, match=r"none\.png', which is no image in that folder"):
        load_dataset_splits(train_data_dir=str(root))
    (root / "metadata.csv").write_text("name,label\na.png,0\n")
    with pytest.raises(UsageError, match="has no column 'file_name'"):
        load_dataset_splits(train_data_dir=str(root))


def rows(*values):
    images = [Image.new("L", (8, 8), value) for value in values]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["x", "y"]))
    return datasets.Dataset.from_dict({"image": images, "label": [v % 2 for v in values]}, features)


@pytest.mark.parametrize("kind", ["saved", "saved splits", "parquet", "parquet without splits"])
def test_every_command_takes_what_training_takes(tmp_path, kind):
    root = tmp_path / "data [1]"
    root.mkdir()
    if kind == "saved":
        rows(1, 2, 3).save_to_disk(root)
    elif kind == "saved splits":
        datasets.DatasetDict(train=rows(1, 2, 3), test=rows(4)).save_to_disk(root)
    else:
        rows(1, 2, 3).to_parquet(root / ("train.parquet" if kind == "parquet" else "a.parquet"))
        rows(4).to_parquet(root / "test-00000-of-00001.parquet")
    for load in (
        lambda: load_dataset_splits(str(root)),
        lambda: load_dataset_splits(train_data_dir=str(root)),
        lambda: load_dataset_splits(str(root)),
    ):
        train, held_out = load()
        pixels = prepare_pixels(train, 8, with_labels=True)
        held = 0 if held_out is None else len(held_out)
        expected = {"saved": (3, 0), "saved splits": (3, 1), "parquet": (3, 1), "parquet without splits": (4, 0)}
        assert (len(pixels), held) == expected[kind]
        assert pixels.fetch([0])["images"].unique().tolist() == [1]
        assert pixels.class_names == ["x", "y"]


@pytest.mark.parametrize("kind", ["images", "parquet", "saved"])
def test_the_cache_follows_the_contents_whatever_their_times_say(tmp_path, kind):
    root = tmp_path / "data"

    def write(value):
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        if kind == "images":
            Image.new("L", (8, 8), value).save(root / "a.bmp")
        elif kind == "parquet":
            rows(value).to_parquet(root / "a.parquet")
        else:
            rows(value).save_to_disk(root)
            state = json.loads((root / "state.json").read_text()) | {"_fingerprint": "always"}
            (root / "state.json").write_text(json.dumps(state))
        for path in root.iterdir():
            os.utime(path, (1, 1))

    def read():
        return prepare_pixels(load_dataset_splits(str(root))[0], 8).fetch([0])["images"].unique().tolist()

    seen = []
    for value in (3, 5, 3):
        write(value)
        seen += read()
    assert seen == [3, 5, 3]


def test_embedded_names_come_first_and_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "digits", "a.png")
    assert len(load_dataset_splits("digits")[0]) == 1437
    assert "the folder of that name is './digits'" in capsys.readouterr().out
    assert len(load_dataset_splits("./digits")[0]) == 1
    load_dataset_splits("digits", train_data_dir=str(tmp_path / "digits"))
    assert "--dataset_name 'digits' comes first" in capsys.readouterr().out
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_dataset_splits(DataOptions(dataset_name="~/digits").dataset_name)[0]) == 1


def test_a_grey_data_set_is_in_colour_wherever_the_colour_stands(tmp_path):
    images = [Image.new("L", (2, 2), 9)] * 1500 + [Image.new("RGB", (2, 2), (9, 0, 0))]
    late = datasets.Dataset.from_dict({"image": images}, datasets.Features(image=datasets.Image()))
    for _ in range(2):
        assert prepare_pixels(late, 2).channels == 3
    grey = late.select(range(20))
    assert [prepare_pixels(grey, 2).channels for _ in range(2)] == [1, 1]
    assert np.unique(prepare_pixels(grey, 2).fetch(range(20))["images"]).tolist() == [9]
