"""Samples in `.npz` files are images like any others, and broken files end in words."""

import json

import numpy as np
import pytest
from PIL import Image

from dia_diffusion.cli import main
from dia_diffusion.errors import UsageError
from dia_diffusion.scoring.archives import ArchiveImages
from dia_diffusion.scoring.features.named import get_extractor
from dia_diffusion.scoring.reference import read_published


def pictures(count=24, size=(8, 8), channels=(3,), seed=0):
    return np.random.default_rng(seed).integers(256, size=(count, *size, *channels), dtype=np.uint8)


def save_folder(folder, images):
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    return folder


def score(tmp_path, *arguments):
    output = tmp_path / "metrics.json"
    assert main(["evaluate", *map(str, arguments), "--features", "pixels", "--output", str(output)]) == 0
    return json.loads(output.read_text())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("size", "channels"), [((8, 8), (3,)), ((6, 9), (1,)), ((8, 8), ())])
def test_the_images_are_those_of_the_array(tmp_path, save, named, size, channels):
    images = pictures(size=size, channels=channels)
    if named:
        save(tmp_path / "x.npz", samples=images.transpose(0, 3, 1, 2) if channels else images, labels=np.arange(24))
    else:
        save(tmp_path / "x.npz", images, np.arange(24))
    (tmp_path / "x.npz").rename(tmp_path / "X.NPZ")
    np.save(tmp_path / "x.npy", images)
    read = ArchiveImages(tmp_path / "X.NPZ")
    left = round((size[1] - min(size)) / 2)
    expected = images.reshape(24, *size, -1)[3:9, :, left : left + min(size)].transpose(0, 3, 1, 2)
    assert np.array_equal(read.images_at(range(3, 9)).numpy(), expected)
    assert np.array_equal(ArchiveImages(tmp_path / "x.npy").images_at(range(3, 9)).numpy(), expected)
    assert isinstance(read.array, np.memmap) == (save is np.savez)


def test_samples_score_as_the_same_images_in_a_folder(tmp_path):
    mine, real = pictures(), pictures(30, seed=1)
    np.savez(tmp_path / "mine.npz", mine, np.zeros(24))
    np.savez_compressed(tmp_path / "real.npz", real)
    folders = save_folder(tmp_path / "mine", mine), save_folder(tmp_path / "real", real)
    by_folder = score(tmp_path, folders[0], "--dataset", folders[1])
    np.save(tmp_path / "mine.NPY", mine.transpose(0, 3, 1, 2))
    (tmp_path / "mine.NPY.npy").rename(tmp_path / "mine.NPY")
    (tmp_path / "real.npz").rename(tmp_path / "real.NPZ")
    for what, dataset in (
        (tmp_path / "mine.npz", tmp_path / "real.NPZ"),
        (tmp_path / "mine.NPY", tmp_path / "real.NPZ"),
    ):
        by_file = score(tmp_path, what, "--dataset", dataset, "--metrics", "fid,kid,precision,recall")
        for name in ("fid", "kid_mean", "precision", "recall", "num_images", "settings_hash"):
            assert by_file[name] == pytest.approx(by_folder[name]) or by_file[name] == by_folder[name], name


def test_a_grey_copy_of_colour_images_is_not_the_same(tmp_path, capsys):
    colour = pictures()
    grey = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in colour])
    folders = save_folder(tmp_path / "grey", grey), save_folder(tmp_path / "colour", colour)
    for one, other in (folders, folders[::-1]):
        assert score(tmp_path, one, "--dataset", other)["fid"] > 1
        assert "compared as colour images" in capsys.readouterr().out


def test_images_of_several_sizes_are_refused_whichever_comes_first(tmp_path, capsys):
    for name, sizes in (("ab", (8, 10)), ("ba", (10, 8))):
        (tmp_path / name).mkdir()
        for number, size in enumerate(sizes):
            Image.new("RGB", (size, size)).save(tmp_path / name / f"{number}.png")
        assert main(["evaluate", str(tmp_path / name), "--features", "pixels"]) == 2
        error = capsys.readouterr().err
        assert all(words in error for words in ("8 x 8", "10 x 10", "0.png", "1.png", "several sizes"))


def damaged(tmp_path):
    np.savez(tmp_path / "good.npz", pictures())
    good = (tmp_path / "good.npz").read_bytes()
    objects = tmp_path / "objects.npz"
    np.savez(objects, np.array([{}], dtype=object))
    contents = {"half": good[: len(good) // 2], "empty": b"", "text": b"no archive", "flipped": None}
    for name, content in contents.items():
        changed = bytearray(good)
        changed[len(good) // 2] ^= 255
        (tmp_path / f"{name}.npz").write_bytes(bytes(changed) if content is None else content)
        yield tmp_path / f"{name}.npz", "not a readable file of arrays"
    (tmp_path / "cut.npy").write_bytes(good[:40])
    yield tmp_path / "cut.npy", "not a readable file of arrays"
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 8, 8, 3), }".ljust(117) + b"\n"
    (tmp_path / "negative.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00" + header)
    yield tmp_path / "negative.npy", "not a readable file of arrays"
    np.save(tmp_path / "one.npy", pictures(1)[0])
    yield tmp_path / "one.npy", "must hold images, uint8 of shape (N, H, W, 1 or 3), but is uint8 of shape (8, 8, 3)"
    yield tmp_path / "nowhere.npz", "there is no such file"
    yield objects, "not a readable file of arrays: it holds Python objects"
    wrong = {"float": pictures() / 255, "wide": pictures().astype(int)}
    for name, array in {**wrong, "flat": pictures().reshape(24, -1), "none": pictures(0)}.items():
        np.savez(tmp_path / f"{name}.npz", array)
        yield tmp_path / f"{name}.npz", "must hold images, uint8 of shape"
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(192), sigma=np.eye(192))
    yield tmp_path / "statistics.npz", "holds no images ('arr_0'), only: mu, sigma"


def test_files_that_hold_no_images_are_named(tmp_path, capsys):
    for path, words in damaged(tmp_path):
        assert main(["evaluate", str(path), "--features", "pixels"]) == 2, path
        error = capsys.readouterr().err
        assert words in error
        assert str(path) in error


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.zeros(32), "sigma": -np.eye(32)}, "is no covariance"),
        ({"mu": np.zeros(32), "sigma": np.triu(np.ones((32, 32)))}, "is no covariance"),
        ({"mu": np.zeros(32), "sigma": np.ones(32)}, r"shape \(32, 32\), but is \(32,\)"),
        ({"mu": np.zeros(32)}, "holds neither statistics .* only: mu"),
        ({"mu": np.zeros((1, 32)), "sigma": np.eye(32)[None]}, None),
        ({"mu": np.zeros(32), "sigma": np.zeros((32, 32))}, None),
    ],
)
def test_statistics_that_are_none(tmp_path, arrays, words):
    np.savez(tmp_path / "x.npz", **arrays)
    if words is None:
        assert read_published(tmp_path / "x.npz", get_extractor("digits")).gaussian.covariance.shape == (32, 32)
        return
    with pytest.raises(UsageError, match=words):
        read_published(tmp_path / "x.npz", get_extractor("digits"))


@pytest.mark.parametrize("kind", [complex, str, object, np.float16, int])
def test_statistics_of_another_kind(tmp_path, kind):
    path = tmp_path / "x.npz"
    np.savez(path, mu=np.zeros(32).astype(kind), sigma=np.eye(32).astype(kind))
    if kind in (np.float16, int):
        assert read_published(path, get_extractor("digits")).gaussian.covariance.trace() == 32
        return
    with pytest.raises(UsageError, match=r"must hold real numbers|not a readable"):
        read_published(path, get_extractor("digits"))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UsageError, match="not a readable"):
        read_published(path, get_extractor("digits"))
