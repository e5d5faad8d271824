"""Runs in the latent space of a VAE: what they see, what they leave, and that they go on exactly."""

import gc
import re
import shutil
from importlib import import_module
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from autoencoders import random_vae
from dia_diffusion import DIAUNetPipeline
from dia_diffusion.data.decoding import to_pixels
from dia_diffusion.errors import UsageError
from dia_diffusion.latents.autoencoder import load_vae, vae_digest
from dia_diffusion.latents.scaling import unscale_latents
from dia_diffusion.latents.space import load_data
from dia_diffusion.objectives import DDPM, EDM, Flow
from dia_diffusion.options.training import load_options, parse_arguments
from dia_diffusion.training import state as training_state
from dia_diffusion.training.batches import BatchPlan, make_loader, prepare_batches
from dia_diffusion.training.loop import train
from forks import start_together
from training_runs import ROOT, assert_same_weights, configure, fresh_state, losses, run, weights

TINY_UNET = {"block_out_channels": [8, 8], "unet_arguments": {"norm_num_groups": 4}, "dia_hidden_size": 8}

SCORES = {"score_features": "digits", "score_num_images": 10, "eval_steps": 3, "eval_num_images": 10}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    fresh_state()


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A VAE in the subfolder of a pipeline, for digits at 8x8."""
    folder = tmp_path_factory.mktemp("vae")
    random_vae(scaling_factor=0.7, shift_factor=0.2).save_pretrained(folder / "vae")
    return str(folder)


def options(vae, **more):
    return TINY_UNET | {"vae": vae, "class_conditional": True, "random_flip": True} | more


@pytest.fixture(scope="module")
def finished(vae, tmp_path_factory):
    """A finished run: its folder, its figures and its losses. Not to be changed."""
    folder = tmp_path_factory.mktemp("run") / "latents"
    fresh_state()
    figures, lines = run(folder, **options(vae, **SCORES, save_images_epochs=1, max_train_steps=6))
    return folder, figures, lines


def test_a_run_leaves_a_pipeline_with_its_vae_and_scores_of_pixels(vae, finished):
    folder, figures, _ = finished
    assert figures["settings"]["reference"]["resolution"] == 8
    assert figures["fid"] > 0
    assert figures["floor"]["fid"] > 0
    for place in (folder, folder / "best"):
        pipeline = DIAUNetPipeline.from_pretrained(place)
        assert (pipeline.unet.config.sample_size, pipeline.unet.config.in_channels) == (4, 2)
        assert vae_digest(load_vae(str(place))) == vae_digest(load_vae(vae))
        assert pipeline.scheduler.config.clip_sample is False
        assert np.asarray(pipeline(class_labels=3, num_inference_steps=2).images[0]).shape == (8, 8)
    with Image.open(folder / "samples.png") as picture:
        # Ten classes in a row, each a picture of 8 pixels at least.
        assert picture.width >= 80
    card = (folder / "README.md").read_text()
    assert "at 8x8 pixels" in card
    assert "works on latents of 2x4x4" in card
    # Nothing says where the VAE lay on this machine.
    assert vae not in (folder / "vae" / "config.json").read_text() + card


def test_a_scale_that_the_noise_is_not_made_for_is_said_with_the_right_one(tmp_path, capsys):
    def printed(name, factor):
        random_vae(scaling_factor=factor).save_pretrained(tmp_path / name)
        run(tmp_path / "runs" / name, **options(str(tmp_path / name), max_train_steps=1))
        return capsys.readouterr().out

    (factor,) = re.findall(r"The noise is made for about 1: scaling_factor (\S+) in", printed("wrong", 0.05))
    (deviation,) = re.findall(r"deviation of the latents, scaled: (\S+)\.\n", printed("right", float(factor)))
    assert float(deviation) == pytest.approx(1, 0.01)


def test_the_vae_is_not_held_while_the_unet_trains(vae, tmp_path, monkeypatch):
    held = []
    update = training_state.TrainingState.update

    def count(self, step):
        gc.collect()
        held.append(sum(isinstance(thing, AutoencoderKL) for thing in gc.get_objects()))
        return update(self, step)

    monkeypatch.setattr(training_state.TrainingState, "update", count)
    before = sum(isinstance(thing, AutoencoderKL) for thing in gc.get_objects())
    run(tmp_path / "run", **options(vae, max_train_steps=2))
    assert held == [before] * 2


def test_batches_are_draws_that_depend_on_the_seed_and_the_step_alone(vae, tmp_path):
    config = parse_arguments(["--config", str(configure(tmp_path / "run", **options(vae)))])
    data, _ = load_data(config.data)
    plan, cpu = BatchPlan(4, 2), torch.device("cpu")

    def batches(steps, seed=0, plan=plan):
        loaded = iter(make_loader(config.data, data, plan, seed, steps, cpu))
        return list(prepare_batches(loaded, data, plan, seed, steps, cpu, DDPM(), True, 0.1))

    whole = batches(range(1, 4))
    later = batches(range(3, 4))
    for a, b in zip(whole[4:], later, strict=True):
        assert torch.equal(a.images, b.images)
    # The same global batch, divided between two processes.
    parts = [batches(range(1, 2), plan=BatchPlan(4, 1, 2, process)) for process in (0, 1)]
    joined = torch.cat([part[0].images for part in parts])
    assert torch.equal(joined, torch.cat([batch.images for batch in whole[:2]]))
    # Draws differ from step to step and from seed to seed, and are no part of the noise.
    assert not torch.equal(data.draw(0, 1, 4), data.draw(0, 2, 4))
    assert not torch.equal(data.draw(0, 1, 4), data.draw(1, 1, 4))
    noise = torch.cat([batch.noise for batch in whole[:2]])
    correlation = torch.corrcoef(torch.stack([data.draw(0, 1, 8).flatten(), noise.flatten()]))
    assert correlation[0, 1].abs() < 0.2


def test_a_resumed_run_ends_as_if_it_had_not_stopped(vae, finished, tmp_path):
    folder, _, lines = finished
    shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000006")
    # The VAE lies elsewhere now.
    shutil.copytree(vae, tmp_path / "moved")
    more = SCORES | {"save_images_epochs": 1, "max_train_steps": 6, "resume_from_checkpoint": "latest"}
    _, again = run(tmp_path / "again", **options(str(tmp_path / "moved"), **more))
    assert_same_weights(weights(tmp_path / "again"), weights(folder))
    assert again == lines
    # Another VAE, or none, is another experiment.
    other = random_vae(scaling_factor=0.7, shift_factor=0.2)
    other.decoder.conv_out.bias += 0.1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match=r"the VAE is another one \(now .*other, then .*moved"):
        run(tmp_path / "again", **options(str(tmp_path / "other"), **more))


def train_as_configured(config):
    train(parse_arguments(["--config", config]))


def test_two_processes_share_the_encoding_and_give_the_losses_of_one(vae, finished, tmp_path):
    cache = tmp_path / "cache"
    _, _, lines = finished
    config = configure(tmp_path / "two", **options(vae, train_batch_size=4, cache_dir=str(cache)))
    processes = start_together(2, train_as_configured, str(config))
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    expected = [line for line in lines if line[1] or line[2]]
    for (step, *figures), (_, *ours) in zip(losses(tmp_path / "two"), expected, strict=True):
        assert [x or 0 for x in figures] == pytest.approx([x or 0 for x in ours], rel=1e-4), step
    mine = {path.read_bytes() for path in (datasets.config.HF_DATASETS_CACHE / "dia_latents").rglob("*.arrow")}
    parts = list((cache / "dia_latents").rglob("*.arrow"))
    # Of the training images, of their flips, and of the held-out ones.
    assert len({path.parent for path in parts}) == 3
    assert {path.read_bytes() for path in parts} <= mine


def test_what_has_no_meaning_in_latents_is_refused_before_the_work(vae, tmp_path):
    wide = tmp_path / "wide"
    wide.mkdir()
    for number in range(3):
        Image.new("L", (16, 8), 50 * number).save(wide / f"{number}.png")
    unlabelled = {"class_conditional": False, "random_flip": False, "train_data_dir": str(wide), "dataset_name": None}
    for more, words in (
        ({"vae": str(tmp_path / "nowhere")}, "cannot load a VAE from .*: there is no such folder"),
        ({"vae": ""}, "vae is empty"),
        ({"channels": 3}, "the VAE takes images of 1 channels, and these have 3: add --channels 1"),
        ({"resolution": 9}, r"resolution 9 does not fit the VAE.*a multiple of 2"),
        ({"resolution": 6}, r"resolution 6 does not fit a UNet whose levels halve latents of 3x3 .* a multiple of 4"),
        (unlabelled, r"not square are cropped at random.*--center_crop"),
    ):
        folder = tmp_path / "run"
        with pytest.raises(UsageError, match=words):
            run(folder, **options(vae) | more)
        assert not folder.exists()
    # A folder that is taken is noticed before anything is encoded.
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "model_index.json").write_text("{}")
    cache = tmp_path / "cache"
    with pytest.raises(UsageError, match="already holds a run"):
        run(tmp_path / "taken", **options(vae, cache_dir=str(cache)))
    assert not (cache / "dia_latents").exists()
    run(tmp_path / "run", **options(vae, max_train_steps=1, center_crop=True) | unlabelled)


def test_a_unet_of_latents_is_fine_tuned_with_its_vae_alone(vae, finished, tmp_path):
    folder, _, _ = finished
    own = dict.fromkeys(("block_out_channels", "layers_per_block", "dia_hidden_size"))
    more = own | {"init_from": str(folder), "class_conditional": True, "max_train_steps": 1}
    random_vae(latent_channels=4).save_pretrained(tmp_path / "other")
    for other, words in (
        (None, "the UNet has 2 channels, the images have 1: it was made for latents"),
        (str(tmp_path / "other"), r"the UNet has 2 channels, the latents have 4: .* another VAE"),
    ):
        with pytest.raises(UsageError, match=words):
            run(tmp_path / "run", **more, vae=other)
    run(tmp_path / "run", **more, vae=vae)


def test_a_run_in_pixels_that_replaces_one_in_latents_leaves_no_vae(vae, tmp_path):
    run(tmp_path / "run", **options(vae, max_train_steps=1))
    assert (tmp_path / "run" / "vae").is_dir()
    run(tmp_path / "run", **options(None, max_train_steps=1, overwrite_output_dir=True))
    assert not (tmp_path / "run" / "vae").exists()
    assert DIAUNetPipeline.from_pretrained(tmp_path / "run").vae is None


@pytest.mark.parametrize("objective", ["edm", "flow"])
def test_other_objectives_learn_latents_too(vae, tmp_path, objective):
    run(tmp_path / "run", **options(vae, objective=objective, max_train_steps=2, class_conditional=False))
    config = load_options(tmp_path / "run" / "training_config.yaml")
    if objective == "edm":
        # The deviation is that of what the UNet sees, and not of pixels.
        data, _ = load_data(parse_arguments(["--config", str(configure(tmp_path / "data", **options(vae)))]).data)
        seen = data.model_inputs(data.fetch(range(len(data))), draws=torch.randn(len(data), 2, 4, 4))
        assert config["sigma_data"] == pytest.approx(seen.std().item(), rel=0.02)
    pipeline = DIAUNetPipeline.from_pretrained(tmp_path / "run")
    assert np.asarray(pipeline(num_inference_steps=3).images[0]).shape == (8, 8)


def test_a_vae_that_loses_nothing_leaves_the_loss_of_pixels(tmp_path, monkeypatch):
    """Its latents are pixels with their colours turned, so that a network of one layer, turned alike, errs as much."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    with torch.no_grad():
        lossless_vae = import_module("lossless_vae").lossless_vae(3)
    lossless_vae.save_pretrained(tmp_path / "vae")
    config = {"channels": 3, "class_conditional": False}
    files = [configure(tmp_path / str(vae), **options(vae, **config)) for vae in (None, str(tmp_path / "vae"))]
    pixels, latents = (load_data(parse_arguments(["--config", str(file)]).data)[1] for file in files)
    images, seen = (data.model_inputs(data.fetch(range(len(data)))) for data in (pixels, latents))
    decoded = lossless_vae.decode(unscale_latents(seen, lossless_vae.config)).sample
    assert torch.equal(to_pixels(decoded), pixels.fetch(range(len(pixels)))["images"])
    turn = lossless_vae.encoder.conv_in.weight[:3, :, 1, 1]
    noise, places = torch.randn_like(images), torch.rand(len(images))

    def network(sample, timesteps, labels):
        return SimpleNamespace(sample=(0.7 * sample + timesteps.view(-1, 1, 1, 1) / 1000).sin())

    def turned(sample, timesteps, labels):
        return SimpleNamespace(sample=turned_by(turn, network(turned_by(turn.T, sample), timesteps, labels).sample))

    for objective in (DDPM(prediction_type="v_prediction"), EDM(sigma_data=0.5), Flow()):
        levels = objective.quantile(places)
        expected = objective.loss(network, images, noise, levels)
        found = objective.loss(turned, seen, turned_by(turn, noise), levels)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def turned_by(matrix, images):
    return torch.einsum("ij,bjhw->bihw", matrix, images)
