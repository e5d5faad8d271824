"""Training runs, small but real: what they leave, and what is said where they cannot start."""

import base64
import json
import shutil
import sys

import pytest
import torch
import yaml

from dia_diffusion import DIAUNetPipeline
from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.data.sources import load_digits_dataset
from dia_diffusion.errors import UsageError
from dia_diffusion.options.objective import ObjectiveOptions
from dia_diffusion.options.training import as_yaml, parse_arguments
from dia_diffusion.scoring.evaluation import evaluate
from dia_diffusion.scoring.features.named import get_extractor
from dia_diffusion.scoring.images import PipelineImages, shares_of_labels
from dia_diffusion.training.loop import train
from training_runs import assert_same_weights, configure, fresh_state, losses, run, weights


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate allows one configuration a process; each test here is as in a process of its own."""
    fresh_state()


def test_a_run_leaves_what_it_promises(undisturbed):
    folder, figures, lines = undisturbed
    expected = "model_index.json unet scheduler README.md samples.png curves.png metrics.json metrics.jsonl checkpoints"
    assert set(expected.split()) <= {path.name for path in folder.iterdir()}
    page = (folder / "report.html").read_text()
    for picture in ("samples.png", "curves.png"):
        assert base64.b64encode((folder / picture).read_bytes()).decode() in page
    assert f"<td>{figures['fid']:.4f}</td>" in page
    assert "max_train_steps: 6" in page
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-00000003", "step-00000006"]
    assert json.loads((folder / "metrics.json").read_text()) == figures
    scores = {"fid", "kid_mean", "kid_std", "precision", "recall", "num_images", "features"}
    assert scores | {"floor", "step", "loss", "held_out_loss", "global_batch_size"} < set(figures)
    assert scores < set(figures["floor"])
    assert figures["num_images"] == 10
    assert [line[0] for line in lines] == [2, 3, 4, 6, 6]
    assert figures["held_out_loss"] == lines[-1][2]
    pipeline = DIAUNetPipeline.from_pretrained(folder)
    assert pipeline.null_class == 10
    assert len(pipeline(batch_size=2, num_inference_steps=2, class_labels=[1, 2]).images) == 2


def test_scores_of_a_run_can_be_compared_with_those_of_its_pipeline(undisturbed):
    folder, figures, _ = undisturbed
    # Training had the labels, and drew the classes as often as the data has them.
    pixels = prepare_pixels(load_digits_dataset()["train"], 8, with_labels=True)
    shares, steps = shares_of_labels(pixels.labels, 10), figures["settings"]["sampling"]["steps"]
    images = PipelineImages(DIAUNetPipeline.from_pretrained(folder), 10, steps, class_shares=shares)
    assert evaluate(images, pixels, get_extractor("digits"), ["fid"])["settings_hash"] == figures["settings_hash"]


def test_the_pipeline_holds_the_averaged_weights(undisturbed):
    folder, _, _ = undisturbed
    saved = weights(folder)
    unet = DIAUNetPipeline.from_pretrained(folder).unet.state_dict()
    assert all(torch.equal(unet[name], saved[f"ema.{name}"]) for name in unet)
    assert any(not torch.equal(unet[name], saved[f"unet.{name}"]) for name in unet)


def test_training_lowers_the_loss(tmp_path):
    _, lines = run(
        tmp_path / "run",
        max_train_steps=120,
        checkpointing_steps=1000,
        validation_steps=60,
        train_batch_size=32,
        logging_steps=20,
    )
    trained = [loss for _, loss, _ in lines if loss]
    held_out = [loss for _, _, loss in lines if loss]
    assert trained[-1] < 0.5 * trained[0]
    assert held_out[-1] < held_out[0] < 1


def test_the_token_is_nowhere_in_the_output(tmp_path, monkeypatch):
    config = configure(tmp_path / "run", max_train_steps=2)
    monkeypatch.setattr(sys, "argv", ["train_unet.py", "--config", str(config), "--hub_token", "hf_SECRET"])
    train(parse_arguments())
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 8
    assert not [path for path in files if b"hf_SECRET" in path.read_bytes()]


@pytest.mark.parametrize(("kind", "precision"), [("epsilon", "no"), ("sample", "bf16"), ("v_prediction", "bf16")])
def test_prediction_types_and_precisions_train_and_resume(tmp_path, kind, precision):
    options = {"prediction_type": kind, "mixed_precision": precision, "lr_scheduler": "linear", "dia_bridge": "skip"}
    run(tmp_path / "whole", **options)
    assert DIAUNetPipeline.from_pretrained(tmp_path / "whole").scheduler.config.prediction_type == kind
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    run(tmp_path / "run", **options, resume_from_checkpoint="latest")
    assert_same_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "scheduler", "settings"),
    [
        # The standard deviation of the 1,437 digits in [-1, 1].
        ({"objective": "edm"}, "EDMDPMSolverMultistepScheduler", {"sigma_data": 0.7519}),
        (
            {"objective": "edm", "sigma_data": 0.6, "p_mean": -0.8},
            "EDMDPMSolverMultistepScheduler",
            {"sigma_data": 0.6},
        ),
        ({"objective": "flow", "weighting_scheme": "none"}, "DPMSolverMultistepScheduler", {"use_flow_sigmas": True}),
    ],
    ids=str,
)
def test_other_objectives_train_resume_and_load(tmp_path, options, scheduler, settings):
    run(tmp_path / "whole", **options, class_conditional=True)
    pipeline = DIAUNetPipeline.from_pretrained(tmp_path / "whole")
    assert type(pipeline.scheduler).__name__ == scheduler
    assert {name: pipeline.scheduler.config[name] for name in settings} == settings
    record = yaml.safe_load((tmp_path / "whole" / "training_config.yaml").read_text())
    assert record["objective"] == options["objective"]
    assert record["prediction_type"] is None
    assert "Objective: " in (tmp_path / "whole" / "README.md").read_text()
    assert (tmp_path / "whole" / "samples.png").exists()
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    # From the record, in which what was measured stands.
    config = ["--config", str(tmp_path / "whole" / "training_config.yaml"), "--output_dir", str(tmp_path / "run")]
    train(parse_arguments([*config, "--resume_from_checkpoint", "latest"]))
    assert_same_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    with pytest.raises(UsageError, match="another experiment: objective is ddpm, was "):
        run(tmp_path / "run", class_conditional=True, resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"objective": "edm", "prediction_type": "epsilon"},
            "prediction_type epsilon has no meaning with --objective edm",
        ),
        ({"objective": "flow", "snr_gamma": 5.0}, "it belongs to ddpm. Leave it out"),
        ({"objective": "flow", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True has no meaning"),
        ({"objective": "flow", "sigma_data": 0.5}, "it belongs to edm"),
        ({"logit_std": 2.0}, "logit_std 2.0 has no meaning with --objective ddpm: it belongs to flow"),
        ({"objective": "edm", "sigma_data": 0}, "sigma_data must be at least 0.001, but is 0"),
        ({"objective": "edm", "p_std": float("nan")}, "p_std must be a number"),
        ({"objective": "edm", "p_mean": 50}, "p_mean must be at most 5"),
        ({"objective": "flows"}, "objective must be one of ddpm, edm, flow"),
        ({"objective": "edm", "unet_arguments": "{time_embedding_type: fourier}"}, "use a UNet with 'positional'"),
        # The first timestep is 0, whose logarithm made every loss with it in the batch NaN.
        ({"unet_arguments": "{time_embedding_type: fourier}"}, "takes the logarithm of the timestep, which can be 0"),
        (
            {"objective": "flow", "unet_arguments": "{time_embedding_type: learned, num_train_timesteps: 1000}"},
            "use a UNet with 'positional'",
        ),
    ],
    ids=str,
)
def test_options_of_another_objective_are_refused_before_the_work(tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        run(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_another_objective_takes_from_a_configuration_what_is_not_of_its_own(tmp_path, capsys):
    """The recipe for the digits says how noise is predicted, and the record of a run says all."""
    config = parse_arguments(["--objective", "flow", "--logit_std", "0.5"])
    assert config.optimisation.max_train_steps == 2500
    assert "left out: prediction_type v_prediction, ddpm_beta_schedule squaredcos_cap_v2." in capsys.readouterr().out
    (tmp_path / "flow.yaml").write_text(as_yaml(config))
    assert parse_arguments(["--config", str(tmp_path / "flow.yaml")]) == config
    again = parse_arguments(["--config", str(tmp_path / "flow.yaml"), "--objective", "edm"])
    assert again.objective == ObjectiveOptions(objective="edm")


@pytest.mark.parametrize("arguments", [{"dia_attention": "srm"}, {"dia_attention": "cbam"}, {"dia_attention": "none"}])
def test_other_attentions_train_resume_and_load(tmp_path, arguments):
    run(tmp_path / "whole", **arguments)
    saved = weights(tmp_path / "whole")
    unet = DIAUNetPipeline.from_pretrained(tmp_path / "whole").unet
    # Buffers, such as the statistics of SRM's normalisation, are not averaged.
    averaged = {name for name, _ in unet.named_parameters()}
    for name, tensor in unet.state_dict().items():
        assert torch.equal(tensor, saved[f"ema.{name}" if name in averaged else f"unet.{name}"]), name
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    run(tmp_path / "run", **arguments, resume_from_checkpoint="latest")
    assert_same_weights(weights(tmp_path / "run"), saved)


def test_training_goes_on_from_a_unet_and_may_train_dia_alone(undisturbed, tmp_path):
    folder, _, _ = undisturbed
    start = DIAUNetPipeline.from_pretrained(folder).unet
    start.to_unet().save_pretrained(tmp_path / "plain")
    options = {"class_conditional": True, "train_only": "dia", "use_ema": False}
    for source, attention in ((folder, "lstm"), (tmp_path / "plain", "se")):
        run(tmp_path / attention, init_from=str(source), dia_attention=attention, **options)
        unet = DIAUNetPipeline.from_pretrained(tmp_path / attention).unet
        assert unet.config.dia_attention == attention
        for name, tensor in unet.state_dict().items():
            if not name.startswith("dia."):
                assert torch.equal(tensor, start.state_dict()[name]), name
        assert any(
            (gate != 1).any() for gate in unet.attention_maps(torch.randn(2, 1, 8, 8), 9, torch.tensor([1, 2])).values()
        )
    # A model that goes on at another resolution is then sampled at that one.
    run(tmp_path / "larger", init_from=str(folder), resolution=16, class_conditional=True)
    assert DIAUNetPipeline.from_pretrained(tmp_path / "larger").unet.config.sample_size == 16
    with pytest.raises(UsageError, match="dia_attention se does not fit the loaded model, which has lstm"):
        run(tmp_path / "other", init_from=str(folder), dia_attention="se", class_conditional=True)
    with pytest.raises(UsageError, match="the UNet has 11 class embeddings, but the data needs None"):
        run(tmp_path / "other", init_from=str(folder))
    with pytest.raises(UsageError, match="cannot load a UNet from"):
        run(tmp_path / "other", init_from=str(tmp_path / "none"))
    with pytest.raises(UsageError, match="leaves nothing to train"):
        run(tmp_path / "other", train_only="dia", dia_attention="none")


def test_the_best_model_by_frechet_distance_is_kept(tmp_path):
    _, _ = run(tmp_path / "run", eval_steps=2, score_features="digits", eval_num_images=20, score_num_images=10)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    distances = {line["step"]: line["fid"] for line in lines if "fid" in line}
    assert list(distances) == [2, 4, 6]
    best = json.loads((tmp_path / "run" / "best" / "metrics.json").read_text())
    assert best["fid"] == min(distances.values()) == distances[best["step"]]
    DIAUNetPipeline.from_pretrained(tmp_path / "run" / "best")


@pytest.mark.slow
def test_a_compiled_model_trains_as_one_that_is_not(tmp_path):
    options = {"max_train_steps": 2, "validation_steps": 2, "block_out_channels": [32]}
    _, plain = run(tmp_path / "plain", **options)
    _, compiled = run(tmp_path / "compiled", **options, compile=True, compile_mode="reduce-overhead")
    assert [x or 0 for line in compiled for x in line] == pytest.approx(
        [x or 0 for line in plain for x in line], rel=1e-3
    )
    DIAUNetPipeline.from_pretrained(tmp_path / "compiled")


def test_gradients_are_clipped_to_a_norm_or_with_zero_not_at_all(tmp_path):
    """Adam forgets the scale of gradients, unless they are near its epsilon."""
    runs = {}
    for norm in (0, 1e9, 1e-9):
        run(tmp_path / str(norm), max_grad_norm=norm, adam_epsilon=1e-3, max_train_steps=3)
        runs[norm] = weights(tmp_path / str(norm), step=3)
    assert_same_weights(runs[0], runs[1e9])
    changed = [
        name for name in runs[0] if name.startswith("unet.") and not torch.equal(runs[0][name], runs[1e-9][name])
    ]
    assert len(changed) > 10


def test_zero_terminal_snr(tmp_path):
    run(tmp_path / "run", rescale_betas_zero_snr=True, prediction_type="v_prediction", snr_gamma=5.0)
    pipeline = DIAUNetPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.scheduler.alphas_cumprod[-1] < 1e-7
    pipeline.scheduler.set_timesteps(5)
    assert pipeline.scheduler.timesteps[0] == 999
    with pytest.raises(UsageError, match="use it with --prediction_type v_prediction"):
        run(tmp_path / "run", rescale_betas_zero_snr=True)


def test_errors_say_what_to_do(undisturbed, tmp_path):
    folder, _, _ = undisturbed
    with pytest.raises(UsageError, match="already holds a run"):
        run(folder)
    with pytest.raises(UsageError, match=r"another experiment: .*seed is 1, was 0"):
        run(folder, seed=1, class_conditional=True, dropout=0.1, random_flip=True, resume_from_checkpoint="latest")
    with pytest.raises(UsageError, match=r"there is no checkpoint '.*none'; in '.*' there are: none"):
        run(tmp_path / "run", resume_from_checkpoint=str(tmp_path / "none"))
    with pytest.raises(UsageError, match="--logger wandb needs the package"):
        run(tmp_path / "run", logger="wandb")
    fresh_state()
    with pytest.raises(UsageError, match="fp16' needs a GPU"):
        run(tmp_path / "run", mixed_precision="fp16")
    fresh_state()
    with pytest.raises(UsageError, match="no UNet can be built as asked"):
        run(tmp_path / "run", block_out_channels=[30, 60])
    with pytest.raises(UsageError, match="needs a train_batch_size of 2"):
        run(tmp_path / "run", dia_attention="srm", train_batch_size=1)
    with pytest.raises(UsageError, match="inceptoin"):
        run(tmp_path / "run", score_features="inceptoin")
    with pytest.raises(UsageError, match="xformers cannot be used here"):
        run(tmp_path / "run", enable_xformers_memory_efficient_attention=True)
    with pytest.raises(UsageError, match="eval_steps needs score_features"):
        run(tmp_path / "run", eval_steps=1)
    with pytest.raises(UsageError, match=r"ddpm_beta_schedule must be one of linear.*but is 'cosine'"):
        run(tmp_path / "run", ddpm_beta_schedule="cosine")
    with pytest.raises(UsageError, match=r"lr_scheduler must be one of linear.*but is 'steps'"):
        run(tmp_path / "run", lr_scheduler="steps")
