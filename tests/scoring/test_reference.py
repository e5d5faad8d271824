"""Statistics of the reference: cached, never stale, and those that others published."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.data.sources import load_dataset_splits, load_digits_dataset
from dia_diffusion.errors import UsageError
from dia_diffusion.files import cache_dir
from dia_diffusion.scoring import reference as reference_module
from dia_diffusion.scoring.evaluation import evaluate
from dia_diffusion.scoring.features.extractor import PixelFeatures
from dia_diffusion.scoring.features.named import get_extractor
from dia_diffusion.scoring.images import FolderImages
from dia_diffusion.scoring.reference import make_reference, read_published


class CountingPixels(PixelFeatures):
    """Counts the images that it has seen."""

    seen = 0

    def features(self, images):
        self.seen += len(images)
        return super().features(images)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(30):
        save(tmp_path / "images" / f"{number:02d}.png", number)
    return tmp_path / "images"


def save(path, seed):
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6), dtype=np.uint8)).save(path)


def pixels_of(folder, tmp_path):
    return prepare_pixels(load_dataset_splits(train_data_dir=str(folder), cache_dir=str(tmp_path / "data"))[0], 6, 1)


def test_statistics_are_computed_once(folder, tmp_path):
    data, extractor = pixels_of(folder, tmp_path), CountingPixels(6, 1)
    first = make_reference(data, extractor, with_features=True)
    second = make_reference(pixels_of(folder, tmp_path), extractor, with_features=True)
    assert extractor.seen == 30
    x = data.images_at(range(30)).flatten(1) / 255
    for reference in (first, second):
        torch.testing.assert_close(reference.features, x)
        torch.testing.assert_close(reference.gaussian.mean, x.double().mean(0))
        torch.testing.assert_close(reference.gaussian.covariance, x.double().T.cov())
        assert reference.gaussian.num_images == 30
    assert second.settings == first.settings
    # Without features there is a file of its own, a small one.
    assert make_reference(data, extractor, with_features=False).features is None
    assert extractor.seen == 60
    json.dumps(first.settings)


def test_of_many_images_a_part_of_the_features_is_kept(folder, tmp_path, monkeypatch):
    data, extractor = pixels_of(folder, tmp_path), CountingPixels(6, 1)
    whole = make_reference(data, extractor, with_features=True)
    monkeypatch.setattr(reference_module, "MOST_KEPT", 7)
    # Batches end between the images that are kept.
    monkeypatch.setattr(reference_module, "_BATCH_SIZE", 4)
    part = make_reference(data, extractor, with_features=True)
    assert torch.equal(part.features, whole.features[[0, 4, 8, 12, 17, 21, 25]])
    torch.testing.assert_close(part.gaussian.covariance, whole.gaussian.covariance)
    assert part.gaussian.num_images == 30
    assert part.settings == whole.settings | {"num_images_kept": 7}
    # Where no features are wanted there is no part of them.
    assert make_reference(data, extractor, with_features=False).settings == whole.settings


@pytest.mark.parametrize("change", ["edit", "add", "remove"])
def test_a_changed_data_set_is_not_served_a_stale_cache(folder, tmp_path, change):
    extractor = CountingPixels(6, 1)
    before = make_reference(pixels_of(folder, tmp_path), extractor, with_features=True)
    if change == "remove":
        (folder / "07.png").unlink()
    else:
        save(folder / ("07.png" if change == "edit" else "30.png"), seed=99)
    data = pixels_of(folder, tmp_path)
    after = make_reference(data, extractor, with_features=True)
    torch.testing.assert_close(after.features, data.images_at(range(len(data))).flatten(1) / 255)
    assert len(after.features) == {"edit": 30, "add": 31, "remove": 29}[change]
    assert after.settings["digest"] != before.settings["digest"]


def test_other_features_and_other_sizes_have_statistics_of_their_own(folder, tmp_path):
    raw = load_dataset_splits(train_data_dir=str(folder), cache_dir=str(tmp_path / "data"))[0]
    shapes = set()
    for resolution in (3, 6):
        for channels in (1, 3):
            extractor = PixelFeatures(resolution, channels)
            reference = make_reference(prepare_pixels(raw, resolution, channels), extractor, with_features=True)
            shapes.add(tuple(reference.features.shape))
    assert shapes == {(30, 9), (30, 27), (30, 36), (30, 108)}


@pytest.mark.parametrize("damage", [b"", b"not a safetensors file at all", None])
def test_a_broken_cache_is_made_anew(folder, tmp_path, damage):
    data, extractor = pixels_of(folder, tmp_path), CountingPixels(6, 1)
    before = make_reference(data, extractor, with_features=True)
    (path,) = (cache_dir() / "references").iterdir()
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    after = make_reference(data, extractor, with_features=True)
    assert torch.equal(after.features, before.features)
    assert extractor.seen == 60


def test_a_cache_that_cannot_be_written_ends_nothing(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIA_CACHE", str(tmp_path / "file" / "cache"))
    reference = make_reference(pixels_of(folder, tmp_path), PixelFeatures(6, 1), with_features=True)
    assert len(reference.features) == 30
    assert "not kept for the next time" in capsys.readouterr().out


@pytest.mark.parametrize("extra", [{}, {"mu_s": np.zeros(3), "sigma_s": np.eye(3)}])
def test_published_statistics_score_as_the_images_do(tmp_path, extra):
    extractor = get_extractor("digits")
    train, test = (prepare_pixels(load_digits_dataset()[split], 8) for split in ("train", "test"))
    features = extractor(train.images_at(range(len(train)))).double().numpy()
    np.savez(tmp_path / "digits.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False), **extra)
    published = read_published(tmp_path / "digits.npz", extractor)
    scores = [evaluate(FolderImages(test), reference, extractor, ["fid"]) for reference in (train, published)]
    for name in ("fid", "fid_interval", "fid_infinity"):
        assert scores[0][name] == pytest.approx(scores[1][name], rel=1e-3)
    with pytest.raises(UsageError, match="precision need the reference images"):
        evaluate(FolderImages(test), published, extractor, ["fid", "precision"])
    with pytest.raises(UsageError, match="statistics of 32 features, but 'pixels' has 64"):
        read_published(tmp_path / "digits.npz", get_extractor("pixels", 8, 1))


def test_published_statistics_are_read_without_pickle(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path / "exploded").touch, ()

    np.savez(tmp_path / "x.npz", mu=np.array([Bomb()], dtype=object), sigma=np.eye(32))
    with pytest.raises(UsageError, match="not a readable"):
        read_published(tmp_path / "x.npz", get_extractor("digits"))
    assert not (tmp_path / "exploded").exists()
    np.savez(tmp_path / "y.npz", mu=np.full(32, np.nan), sigma=np.eye(32))
    with pytest.raises(UsageError, match="not finite"):
        read_published(tmp_path / "y.npz", get_extractor("digits"))
