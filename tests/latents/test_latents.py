"""Latents against the VAE that makes them, asked directly, and against pixels where nothing is lost."""

import itertools
import json
import resource
import time
from concurrent.futures import ThreadPoolExecutor

import datasets
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DModel
from filelock import FileLock
from safetensors.torch import load_file, save_file

from autoencoders import PatchVAE, random_tiny, random_vae
from dia_diffusion.data.decoding import to_pixels, to_unit_range
from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.data.sources import load_dataset_splits
from dia_diffusion.errors import UsageError
from dia_diffusion.latents import encoding as encoding_module
from dia_diffusion.latents.autoencoder import find_latent_shape, load_vae, vae_digest
from dia_diffusion.latents.encoding import encode_images
from dia_diffusion.latents.scaling import scale_latents, unscale_latents
from dia_diffusion.latents.space import LatentDataset
from forks import start


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    train, _ = load_dataset_splits("digits")
    return prepare_pixels(train, 8, with_labels=True, cache_dir=str(tmp_path_factory.mktemp("pixels")))


def latents_of(vae, pixels, flip=False, **arguments):
    shape = find_latent_shape(vae, pixels.resolution, pixels.channels)
    flipped = encode_images(vae, pixels, flip=True, **arguments) if flip else None
    return LatentDataset(pixels, shape, vae.config, encode_images(vae, pixels, **arguments), flipped)


def test_rows_are_what_the_vae_says_of_each_image(pixels):
    vae = random_vae(scaling_factor=0.5, shift_factor=0.25)
    data = latents_of(vae, pixels, flip=True)
    assert (len(data), data.channels, data.resolution, data.num_classes) == (1437, 2, 4, 10)
    rows = [3, 1400, 0, 700]
    batch = data.fetch(rows)
    images = to_unit_range(pixels.fetch(rows)["images"])
    assert torch.equal(batch["labels"], pixels.fetch(rows)["labels"])
    assert batch["posterior"].dtype == torch.float16
    for name, seen in (("posterior", images), ("flipped", images.flip(-1))):
        expected = vae.encode(seen).latent_dist
        close = {"atol": 1e-3, "rtol": 1e-3}
        torch.testing.assert_close(batch[name][:, 0].float(), expected.mean, **close)
        torch.testing.assert_close(batch[name][:, 1].float(), expected.std, **close)
    # What the model sees: a draw, flipped where it is to be, and scaled as diffusers' pipelines scale.
    draws, flips = torch.randn(4, 2, 4, 4), torch.tensor([True, False, False, True])
    kept = torch.where(flips.view(4, 1, 1, 1, 1), batch["flipped"], batch["posterior"]).float()
    expected = (kept[:, 0] + kept[:, 1] * draws - 0.25) * 0.5
    torch.testing.assert_close(data.model_inputs(batch, flips, draws), expected)
    torch.testing.assert_close(data.model_inputs(batch), (batch["posterior"][:, 0].float() - 0.25) * 0.5)


def test_an_autoencoder_tiny_has_one_latent_for_each_image(pixels):
    vae = random_tiny()
    data = latents_of(vae, pixels)
    batch = data.fetch([5, 6])
    expected = vae.encode(to_unit_range(pixels.fetch([5, 6])["images"])).latents
    draws = torch.randn(2, 2, 4, 4)
    torch.testing.assert_close(data.model_inputs(batch, draws=draws), expected, atol=1e-3, rtol=1e-3)


def test_scaling_goes_back_and_gives_unit_variance_for_figures_of_each_channel():
    mean, std = [1.0, -2.0], [0.5, 4.0]
    latents = torch.tensor(mean).view(1, 2, 1, 1) + torch.randn(400, 2, 8, 8) * torch.tensor(std).view(1, 2, 1, 1)
    for config in (
        {"scaling_factor": 0.18215},
        {"scaling_factor": 0.36, "shift_factor": 0.1},
        {"scaling_factor": 1.0, "shift_factor": None, "latents_mean": mean, "latents_std": std},
        {},
    ):
        torch.testing.assert_close(unscale_latents(scale_latents(latents, config), config), latents)
    scaled = scale_latents(latents, {"scaling_factor": 1.0, "latents_mean": mean, "latents_std": std})
    torch.testing.assert_close(scaled.mean((0, 2, 3)), torch.zeros(2), atol=0.02, rtol=0)
    torch.testing.assert_close(scaled.std((0, 2, 3)), torch.ones(2), atol=0.02, rtol=0)


def test_latents_of_an_orthogonal_vae_give_the_pixels_back_and_the_same_loss(pixels):
    vae = PatchVAE(scaling_factor=1.0)
    data = latents_of(vae, pixels)
    rows = range(0, len(pixels), 50)
    latents = data.model_inputs(data.fetch(rows))
    decoded = vae.decode(unscale_latents(latents, vae.config)).sample
    # All 256 levels survive half precision.
    assert torch.equal(to_pixels(decoded), pixels.fetch(rows)["images"])
    # A model that sees through the turn errs by as much in the one space as in the other.
    images = to_unit_range(pixels.fetch(rows)["images"])
    noise = torch.randn_like(images)
    in_pixels = ((0.3 * (images + noise)).sin() - images).square().mean()
    noisy = latents + vae.encode(noise).latent_dist.mean
    answer = vae.encode((0.3 * vae.decode(noisy).sample).sin()).latent_dist.mean
    torch.testing.assert_close((answer - latents).square().mean(), in_pixels, rtol=1e-3, atol=0)


def test_another_weight_or_setting_makes_another_digest_and_the_place_none(tmp_path):
    vae = random_vae()
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    vae.save_pretrained(tmp_path / "alone")
    assert {vae_digest(load_vae(str(tmp_path / name))) for name in ("pipeline", "alone")} == {vae_digest(vae)}
    other = random_vae()
    other.decoder.conv_out.bias[0] += 1e-3
    assert len({vae_digest(v) for v in (vae, other, random_vae(scaling_factor=0.5), random_tiny())}) == 4


def encoded_files(folder):
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*.arrow"))}


def test_what_is_encoded_is_kept_by_the_images_the_flip_and_the_weights(pixels, tmp_path):
    vae = random_vae()
    first = latents_of(vae, pixels, flip=True).fetch([7])
    files = encoded_files(tmp_path / "cache")
    again = latents_of(random_vae(), pixels, flip=True).fetch([7])
    assert encoded_files(tmp_path / "cache") == files
    assert all(torch.equal(first[name], again[name]) for name in ("posterior", "flipped"))
    vae.encoder.conv_in.bias[0] += 0.5
    changed = latents_of(vae, pixels).fetch([7])
    assert len(encoded_files(tmp_path / "cache")) > len(files)
    assert not torch.equal(first["posterior"], changed["posterior"])


def test_a_broken_or_missing_part_is_encoded_anew(pixels, tmp_path):
    vae = random_vae()
    expected = latents_of(vae, pixels).fetch(range(len(pixels)))["posterior"]
    parts = list(encoded_files(tmp_path / "cache"))
    # At least two parts, or there would be nothing to go on with.
    assert len(parts) > 1
    parts[0].write_bytes(parts[0].read_bytes()[:1000])
    parts[-1].unlink()
    assert torch.equal(latents_of(vae, pixels).fetch(range(len(pixels)))["posterior"], expected)


def encode_slowly(cache):
    """In a process of its own: as `encode_images`, with time to be killed."""
    encode = encoding_module._encode
    encoding_module._encode = lambda *arguments: (time.sleep(0.2), encode(*arguments))[1]
    pixels = prepare_pixels(load_dataset_splits("digits")[0], 8, with_labels=True, cache_dir=cache)
    encode_images(random_vae(), pixels, cache_dir=cache)


def test_encoding_goes_on_after_a_kill(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(encode_slowly, str(killed), ACCELERATE_USE_CPU=1)
    deadline = time.monotonic() + 120
    while len(encoded_files(killed / "dia_latents")) < 3:
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    done = encoded_files(killed / "dia_latents")
    assert len(done) < 6
    (folder,) = {path.parent for path in done}
    (folder / ".05.arrow.0123456789abcdef.tmp").write_bytes(b"what a kill left half-way")
    for cache in (killed, whole):
        pixels = prepare_pixels(load_dataset_splits("digits")[0], 8, with_labels=True, cache_dir=str(cache))
        assert len(encode_images(random_vae(), pixels, cache_dir=str(cache))) == 1437
    # What was whole was not touched, and nothing is left of what was not.
    after = encoded_files(killed / "dia_latents")
    assert {path: after[path] for path in done} == done
    assert {path.name for path in folder.iterdir()} == {".lock"} | {path.name for path in after}
    assert [path.read_bytes() for path in after] == [path.read_bytes() for path in encoded_files(whole / "dia_latents")]


def test_a_second_run_waits_for_the_first_to_encode_the_same_images(pixels, tmp_path, capfd):
    vae = random_vae()
    encode_images(vae, pixels)
    (first, *_) = encoded_files(tmp_path / "cache")
    first.unlink()
    with ThreadPoolExecutor(1) as pool:
        with FileLock(first.parent / ".lock"):
            second = pool.submit(encode_images, vae, pixels)
            deadline, printed = time.monotonic() + 60, ""
            while "waiting for it" not in printed:
                assert time.monotonic() < deadline
                printed += capfd.readouterr().out
            assert not first.exists()
        assert len(second.result()) == 1437
    assert first.exists()


def save(folder, vae, change=None):
    vae.save_pretrained(folder)
    if change is not None:
        weights = load_file(folder / "diffusion_pytorch_model.safetensors")
        change(weights)
        save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_what_is_no_vae_is_refused_in_words(tmp_path):
    unet = UNet2DModel(block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
                       up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    broken = tmp_path / "broken"
    save(broken, random_vae())
    (broken / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 100)
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    (nameless / "config.json").write_text(json.dumps([1]))
    for place, words in (
        (str(tmp_path / "nowhere"), "cannot load a VAE from .*: there is no such folder"),
        (str(tmp_path), "cannot load a VAE from .* Name a folder or a Hub id"),
        (save(tmp_path / "unet", unet), "is a UNet2DModel; a VAE is one of: AutoencoderKL or AutoencoderTiny"),
        (save(tmp_path / "less", random_vae(), lambda w: w.pop("encoder.conv_in.bias")), "lacks weights, for example"),
        (save(tmp_path / "nan", random_vae(), lambda w: w["quant_conv.bias"].fill_(torch.nan)), "not finite"),
        (str(broken), "cannot load a VAE from"),
        (save(tmp_path / "zero", random_vae(scaling_factor=0.0)), r"scaling_factor 0.0 .* must be a number above 0"),
        (save(tmp_path / "mean", random_vae(latents_mean=[0.0, 1.0])), "only one of latents_mean and latents_std"),
        (save(tmp_path / "std", random_vae(latents_mean=[0.0] * 2, latents_std=[1.0, 0.0])), "deviations above 0"),
        (save(tmp_path / "few", random_vae(latents_mean=[0.0], latents_std=[1.0])), "each of its 2 channels"),
        (str(nameless), "is a model of no class"),
        (str(nameless / "config.json"), "config.json' is a file: name the folder that holds it"),
    ):
        with pytest.raises(UsageError, match=words):
            load_vae(place)


def test_a_vae_is_loaded_in_single_precision_whatever_it_was_saved_in(tmp_path):
    place = save(tmp_path / "half", random_vae().half())
    vae = load_vae(place)
    assert {tensor.dtype for tensor in vae.state_dict().values()} == {torch.float32}
    assert not vae.training
    assert type(load_vae(save(tmp_path / "kl", random_vae()))) is AutoencoderKL
    assert type(load_vae(save(tmp_path / "tiny", random_tiny()))) is AutoencoderTiny


def test_images_that_do_not_fit_the_vae_are_refused_in_words():
    assert find_latent_shape(random_vae(), 8, 1) == (2, 4)
    assert find_latent_shape(random_tiny(3), 10, 3) == (2, 5)
    for vae, resolution, channels, words in (
        (random_vae(3), 8, 1, "takes images of 3 channels, and these have 1: add --channels 3"),
        (random_vae(1, out_channels=3), 8, 1, "1 and gives 3 channels.*choose another VAE"),
        (random_vae(), 9, 1, "resolution 9 does not fit the VAE.*a multiple of 2"),
        (random_vae(), 1, 1, "resolution 1"),
        (random_tiny(), 7, 1, "resolution 7 does not fit the VAE.*a multiple of 2"),
    ):
        with pytest.raises(UsageError, match=words):
            find_latent_shape(vae, resolution, channels)


def test_latents_too_large_for_half_precision_are_refused(pixels):
    vae = random_vae()
    vae.quant_conv.bias += 1e5
    with pytest.raises(UsageError, match=r"of images 0 to \d+ are not finite in half precision"):
        encode_images(vae, pixels)


def test_a_full_disk_is_named_with_what_to_do(pixels, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UsageError, match=r"cannot keep latents in '.*dia_latents.*--cache_dir"):
            encode_images(random_vae(), pixels, cache_dir=str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_the_parts_hold_all_images_once_whatever_their_number(tmp_path):
    for count in (1, 5, 255, 257, 60_000, 1_281_167):
        for resolution in (8, 32, 256, 1024):
            parts = list(encoding_module._divide(count, resolution, tmp_path).values())
            assert parts[0].start == 0
            assert parts[-1].stop == count
            assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
            assert len(parts) <= 64
