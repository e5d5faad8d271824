"""Data against Pillow and numpy: what a file shows is what the model sees."""

import collections
import hashlib
import os
import shutil
import time

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from dia_diffusion.data.decoding import image_to_pixels, to_unit_range
from dia_diffusion.data.pixels import EndlessShuffle
from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.data.sources import load_dataset_splits, load_digits_dataset
from dia_diffusion.errors import UsageError
from forks import start


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(size=(12, 12), channels=3, seed=0):
    shape = (size[1], size[0], channels) if channels > 1 else (size[1], size[0])
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def folder_of(path, images):
    path.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        image.save(path / name)
    return path


def test_digits_are_those_of_scikit_learn_and_the_split_is_fixed():
    from sklearn.datasets import load_digits

    source = load_digits()
    splits = load_digits_dataset()
    train = prepare_pixels(splits["train"], 8, with_labels=True)
    held_out = prepare_pixels(splits["test"], 8, with_labels=True)
    assert (len(train), len(held_out), train.channels, train.num_classes) == (1437, 360, 1, 10)
    batches = [pixels.fetch(range(len(pixels))) for pixels in (train, held_out)]
    ours = [
        (tuple(np.rint(image.flatten().numpy() / 255 * 16).astype(int)), label)
        for batch in batches
        for image, label in zip(batch["images"], batch["labels"].tolist(), strict=True)
    ]
    theirs = zip(source.data.astype(int).tolist(), source.target.tolist(), strict=True)
    assert sorted(ours) == sorted((tuple(image), label) for image, label in theirs)
    counts = collections.Counter(batches[1]["labels"].tolist())
    assert set(counts.values()) <= {35, 36, 37}
    # The same images are held out every time, whatever the global random state.
    np.random.seed(1)
    again = prepare_pixels(load_digits_dataset()["test"], 8, with_labels=True)
    assert torch.equal(again.fetch(range(360))["images"], batches[1]["images"])


def test_a_folder_with_classes(tmp_path):
    root = tmp_path / "images"
    for label, value in (("cats", 10), ("dogs", 200)):
        folder_of(root / label, {f"{i}.png": Image.new("RGB", (10, 10), (value, i, 0)) for i in range(3)})
    train, held_out = load_dataset_splits(train_data_dir=str(root))
    assert held_out is None
    pixels = prepare_pixels(train, 10, with_labels=True)
    assert (len(pixels), pixels.channels, pixels.num_classes) == (6, 3, 2)
    batch = pixels.fetch(range(6))
    assert batch["labels"].tolist() == [0, 0, 0, 1, 1, 1]
    assert batch["images"][:, 0, 0, 0].tolist() == [10, 10, 10, 200, 200, 200]


def test_channels_follow_the_data_or_the_option(tmp_path):
    grey = folder_of(tmp_path / "grey", {"a.png": Image.new("L", (9, 9), 50)})
    mixed = folder_of(tmp_path / "mixed", {"a.png": Image.new("L", (9, 9), 50), "b.jpg": Image.new("RGB", (9, 9))})
    for path, asked, channels in ((grey, None, 1), (mixed, None, 3), (grey, 3, 3), (mixed, 1, 1)):
        train, _ = load_dataset_splits(train_data_dir=str(path))
        pixels = prepare_pixels(train, 8, channels=asked)
        assert pixels.fetch([0])["images"].shape == (1, channels, 8, 8)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    deep = np.linspace(0, 65535, 144).reshape(12, 12).astype(np.uint16)
    folder_of(tmp_path / "deep", {"a.png": Image.fromarray(deep)})
    train, _ = load_dataset_splits(train_data_dir=str(tmp_path / "deep"))
    pixels = prepare_pixels(train, 12)
    assert pixels.channels == 1
    assert np.abs(pixels.fetch([0])["images"][0, 0].numpy().astype(float) - deep / 257).max() <= 0.5
    all_bits = prepare_pixels(train, 12, bits=16)
    assert np.array_equal(all_bits.fetch([0])["images"][0, 0].numpy(), deep)
    assert to_unit_range(all_bits.fetch([0])["images"]).unique().numel() > 140
    assert torch.equal(all_bits.images_at(range(1)), pixels.fetch([0])["images"])
    shallow = np.asarray(Image.fromarray(picture((8, 8), 1)))
    assert np.array_equal(image_to_pixels(Image.fromarray(shallow), 8, 1, bits=16)[0], shallow * np.uint16(257))


def test_resizing_is_pillows_and_the_first_frame_of_an_animation_counts(tmp_path):
    image = Image.fromarray(picture((40, 24)))
    expected = np.asarray(image.resize((27, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(image_to_pixels(image, 16, 3), expected)
    frames = [Image.new("L", (8, 8), value) for value in (7, 200)]
    (tmp_path / "gif").mkdir()
    frames[0].save(tmp_path / "gif" / "a.gif", save_all=True, append_images=frames[1:])
    train, _ = load_dataset_splits(train_data_dir=str(tmp_path / "gif"))
    assert (prepare_pixels(train, 8, channels=1).fetch([0])["images"] == 7).all()
    assert image_to_pixels(Image.new("RGB", (1, 1), (1, 2, 3)), 4, 3)[:, 2, 2].tolist() == [1, 2, 3]


def test_crops(tmp_path):
    image = Image.fromarray(picture((30, 10)))
    folder_of(tmp_path / "wide", {"a.png": image})
    train, _ = load_dataset_splits(train_data_dir=str(tmp_path / "wide"))
    pixels = prepare_pixels(train, 10)
    whole = np.asarray(image).transpose(2, 0, 1)
    assert np.array_equal(pixels.fetch([0])["images"][0], whole[:, :, 10:20])
    assert np.array_equal(pixels.fetch([0], lambda row: (0.0, 1.0))["images"][0], whole[:, :, 20:30])
    centred = EndlessShuffle(pixels, 0, center_crop=True).__getitems__(range(8))["images"]
    moving = EndlessShuffle(pixels, 0, center_crop=False).__getitems__(range(8))["images"]
    assert (centred == centred[0]).all()
    assert len({image.numpy().tobytes() for image in moving}) > 3


def test_a_broken_image_is_named_or_skipped(tmp_path):
    root = folder_of(tmp_path / "broken", {f"{i}.png": Image.fromarray(picture(seed=i)) for i in range(4)})
    data = (root / "1.png").read_bytes()
    (root / "1.png").write_bytes(data[: len(data) // 2])
    (root / "2.png").write_bytes(b"not an image")
    train, _ = load_dataset_splits(train_data_dir=str(root))
    with pytest.raises(UsageError, match=r"1\.png' \(number 1 of the data set\) cannot be read"):
        prepare_pixels(train, 8)
    pixels = prepare_pixels(train, 8, on_bad_image="skip")
    assert len(pixels) == 2
    assert "2 of 4 images could not be read" in pixels.left_out[0]


def test_prepared_pixels_are_found_again_and_follow_the_data(tmp_path):
    root = folder_of(tmp_path / "images", {"a.png": Image.new("L", (8, 8), 1)})

    def prepared():
        train, _ = load_dataset_splits(train_data_dir=str(root), cache_dir=str(tmp_path / "data"))
        return prepare_pixels(train, 8)

    first, again = prepared(), prepared()
    assert first.fingerprint == again.fingerprint
    assert first.rows.cache_files == again.rows.cache_files != []
    Image.new("L", (8, 8), 2).save(root / "b.png")
    moved = load_dataset_splits(train_data_dir=str(shutil.copytree(root, tmp_path / "moved")))[0]
    assert first.digest() != prepare_pixels(moved, 8).digest()
    (tmp_path / "moved" / "b.png").unlink()
    moved = load_dataset_splits(train_data_dir=str(tmp_path / "moved"))[0]
    assert first.digest() == prepare_pixels(moved, 8).digest()
    more = prepared()
    assert more.fingerprint != first.fingerprint
    assert len(more) == 2


def test_endless_shuffle_is_a_function_of_seed_and_position():
    pixels = prepare_pixels(load_digits_dataset()["test"], 8)
    shuffle = EndlessShuffle(pixels, seed=3, center_crop=True)
    size = len(pixels)
    everything = shuffle.__getitems__(range(2 * size))["images"]
    in_order = sorted(image.numpy().tobytes() for image in pixels.fetch(range(size))["images"])
    for epoch in range(2):
        images = everything[epoch * size : (epoch + 1) * size]
        assert sorted(image.numpy().tobytes() for image in images) == in_order
    assert not torch.equal(everything[:size], everything[size:])
    assert torch.equal(EndlessShuffle(pixels, 3, True).__getitems__([500, 7])["images"], everything[[500, 7]])
    assert not torch.equal(EndlessShuffle(pixels, 4, True).__getitems__(range(9))["images"], everything[:9])


def prepare(root, cache):
    train, _ = load_dataset_splits(train_data_dir=str(root), cache_dir=str(cache))
    pixels = prepare_pixels(train, 64, cache_dir=str(cache))
    digest = hashlib.sha256(pixels.images_at(range(len(pixels))).numpy().tobytes())
    print(f"\n{len(pixels)} {digest.hexdigest()} {pixels.rows.cache_files[0]['filename']}", flush=True)


def answer_of(process, log):
    process.join(120)
    assert process.exitcode == 0, log.read_text()
    return log.read_text().splitlines()[-1]


def test_two_runs_share_a_cache_and_a_killed_build_leaves_none_that_looks_finished(tmp_path):
    images = {f"{i:04d}.png": Image.fromarray(picture((96, 96), seed=i)) for i in range(600)}
    root = folder_of(tmp_path / "images", images)
    expected = np.stack([image_to_pixels(image, 64, 3) for image in images.values()]).tobytes()
    answer = f"600 {hashlib.sha256(expected).hexdigest()}"

    logs = [tmp_path / f"{name}.log" for name in ("first", "second", "killed", "again")]
    together = [start(prepare, root, tmp_path / "shared", output=log) for log in logs[:2]]
    first, second = map(answer_of, together, logs)
    assert first.startswith(answer)
    assert second == first

    killed = start(prepare, root, tmp_path / "killed", output=logs[2])
    deadline = time.monotonic() + 60
    # `datasets` writes to a file named tmp* first. os.walk, since folders come and go while it looks.
    while not any(name.startswith("tmp") for _, _, files in os.walk(tmp_path / "killed") for name in files):
        assert time.monotonic() < deadline
        assert killed.is_alive()
    killed.kill()
    killed.join()
    again = answer_of(start(prepare, root, tmp_path / "killed", output=logs[3]), logs[3])
    assert again.startswith(answer)
