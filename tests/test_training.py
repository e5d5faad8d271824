"""Training runs, small but real: what they leave, and that nothing changes how they go on."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.checkpoint import find_latest
from dia_diffusion.config import parse_arguments
from dia_diffusion.diffusion import diffusion_loss
from dia_diffusion.errors import UsageError
from dia_diffusion.training import train
from dia_diffusion.training_state import TrainingState

ROOT = Path(__file__).parent.parent
TINY = {
    "block_out_channels": [32, 32],
    "layers_per_block": 1,
    "dia_hidden_size": 8,
    "train_batch_size": 8,
    "max_train_steps": 6,
    "lr_warmup_steps": 2,
    "eval_batch_size": 4,
    "ddpm_num_inference_steps": 3,
    "logging_steps": 2,
    "validation_steps": 3,
    "checkpointing_steps": 3,
    "score_features": None,
}


def configure(folder, **options):
    path = Path(folder).with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    recipe = {"dataset_name": "digits", "resolution": 8, "use_ema": True, "learning_rate": 1e-3}
    path.write_text(yaml.safe_dump(recipe | TINY | {"output_dir": str(folder)} | options))
    return path


def run(folder, **options):
    config = parse_arguments(["--config", str(configure(folder, **options))])
    figures = train(config)
    return figures, losses(folder)


def losses(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss"), line.get("held_out_loss")) for line in lines]


def weights(folder, step=6):
    path = Path(folder) / "checkpoints" / f"step-{step:08d}"
    return {f"{file.stem}.{k}": v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same_weights(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        if tolerance:
            torch.testing.assert_close(tensor, b[name], **tolerance, msg=name)
        else:
            assert torch.equal(tensor, b[name]), name


@pytest.fixture(autouse=True)
def fresh_accelerator():
    fresh_state()


def fresh_state():
    """accelerate allows one configuration a process; each run here is as in a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "undisturbed"
    figures, lines = run(
        folder, class_conditional=True, dropout=0.1, random_flip=True, score_features="digits", score_num_images=10
    )
    return folder, figures, lines


def test_a_run_leaves_what_it_promises(undisturbed):
    folder, figures, lines = undisturbed
    expected = "model_index.json unet scheduler README.md samples.png curves.png metrics.json metrics.jsonl checkpoints"
    assert set(expected.split()) <= {path.name for path in folder.iterdir()}
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-00000003", "step-00000006"]
    assert json.loads((folder / "metrics.json").read_text()) == figures
    scores = {"fid", "kid_mean", "kid_std", "precision", "recall", "num_images", "features"}
    assert scores | {"floor", "step", "loss", "held_out_loss", "global_batch_size"} == set(figures)
    assert scores == set(figures["floor"])
    assert figures["num_images"] == 10
    assert [line[0] for line in lines] == [2, 3, 4, 6, 6]
    assert figures["held_out_loss"] == lines[-1][2]
    pipeline = DIAUNetPipeline.from_pretrained(folder)
    assert pipeline.null_class == 10
    assert len(pipeline(batch_size=2, num_inference_steps=2, class_labels=[1, 2]).images) == 2


def test_the_pipeline_holds_the_averaged_weights(undisturbed):
    folder, _, _ = undisturbed
    saved = weights(folder)
    unet = DIAUNetPipeline.from_pretrained(folder).unet.state_dict()
    assert all(torch.equal(unet[name], saved[f"ema.{name}"]) for name in unet)
    assert any(not torch.equal(unet[name], saved[f"unet.{name}"]) for name in unet)


def test_the_model_card_can_be_read_by_the_hub(undisturbed):
    from huggingface_hub import ModelCard

    folder, figures, _ = undisturbed
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.datasets == ["digits"]
    assert {result.metric_value for result in card.data.eval_results} >= {figures["fid"]}
    assert "samples.png" in card.text


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


def test_resuming_gives_the_same_run_bit_for_bit(tmp_path):
    options = {"class_conditional": True, "dropout": 0.1, "random_flip": True}
    run(tmp_path / "run", **options, max_train_steps=4, lr_scheduler="constant_with_warmup", checkpointing_steps=4)
    constant, _ = run(tmp_path / "whole", **options, lr_scheduler="constant_with_warmup"), None
    _, resumed = run(
        tmp_path / "run",
        **options,
        lr_scheduler="constant_with_warmup",
        resume_from_checkpoint="latest",
        checkpointing_steps=4,
    )
    assert_same_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    whole = [line for line in constant[1] if line[1] is not None]
    assert [line for line in resumed if line[1] is not None] == whole


def test_resuming_is_exact_with_the_dropout_of_a_model_configuration(tmp_path):
    unet = DIAUNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        dropout=0.5,
    )
    unet.save_config(tmp_path / "model")
    options = {"model_config_name_or_path": str(tmp_path / "model"), "block_out_channels": None}
    _, whole = run(tmp_path / "whole", **options)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    _, resumed = run(tmp_path / "run", **options, resume_from_checkpoint="latest")
    assert resumed == whole
    assert_same_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_latest_never_removes_what_took_time_to_make(undisturbed, tmp_path):
    options = {"class_conditional": True, "dropout": 0.1, "random_flip": True, "resume_from_checkpoint": "latest"}
    folder = shutil.copytree(undisturbed[0], tmp_path / "finished")
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(UsageError, match=r"already holds a run \(model_index.json\)"):
        run(folder, **options)
    assert (folder / "metrics.jsonl").exists()
    folder = shutil.copytree(undisturbed[0], tmp_path / "damaged")
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "state.json").write_text("{}")
    with pytest.raises(UsageError, match=r"already holds a run \(step-00000003, step-00000006"):
        run(folder, **options)
    assert len(list((folder / "checkpoints").glob("step-*"))) == 2
    # What a run leaves that is killed before its first checkpoint is no reason to stop.
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n')
    assert run(tmp_path / "early", **options)[1][0] == undisturbed[2][0]


def test_checkpoints_of_an_abandoned_branch_are_set_aside(tmp_path):
    run(tmp_path / "run", checkpointing_steps=2)
    chosen = tmp_path / "run" / "checkpoints" / "step-00000002"
    run(tmp_path / "run", checkpointing_steps=3, resume_from_checkpoint=str(chosen), learning_rate=2e-3)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [
        "set-aside-step-00000004",
        "set-aside-step-00000006",
        "step-00000002",
        "step-00000003",
        "step-00000006",
    ]


def test_the_token_is_nowhere_in_the_output(tmp_path, monkeypatch):
    config = configure(tmp_path / "run", max_train_steps=2)
    monkeypatch.setattr(sys, "argv", ["train_unet.py", "--config", str(config), "--hub_token", "hf_SECRET"])
    train(parse_arguments())
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 8
    assert not [path for path in files if b"hf_SECRET" in path.read_bytes()]


def test_accumulation_gives_the_same_losses(tmp_path):
    _, whole = run(tmp_path / "whole", use_ema=False, class_conditional=True, random_flip=True)
    _, parts = run(
        tmp_path / "parts",
        use_ema=False,
        class_conditional=True,
        random_flip=True,
        train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    assert [a[:2] for a in parts if a[1]] == [(s, pytest.approx(loss, rel=1e-4)) for s, loss, _ in whole if loss]


def launch(config, processes, **environment):
    """Runs train_unet.py in several processes on the CPU, and returns its exit status and what it printed."""
    command = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    return subprocess.run(
        [sys.executable, *command, str(ROOT / "train_unet.py"), "--config", str(config)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=300,
    )


def test_two_processes_give_the_losses_of_one(tmp_path):
    options = {"score_features": "digits", "score_num_images": 10, "eval_steps": 3, "eval_num_images": 10}
    _, one = run(tmp_path / "one", train_batch_size=8, **options)
    config = configure(tmp_path / "two", train_batch_size=4, **options)
    process = launch(config, 2, ACCELERATE_USE_CPU="1")
    assert process.returncode == 0, process.stderr
    for (step, *figures), (expected_step, *expected) in zip(losses(tmp_path / "two"), one, strict=True):
        assert step == expected_step
        assert [x or 0 for x in figures] == pytest.approx([x or 0 for x in expected], rel=1e-4)
    assert (tmp_path / "two" / "samples.png").exists()
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["num_images"] == 10
    # A run of one process goes on with two.
    shutil.copytree(tmp_path / "one", tmp_path / "more")
    shutil.rmtree(tmp_path / "more" / "checkpoints" / "step-00000006")
    config = configure(tmp_path / "more", train_batch_size=4, **options, resume_from_checkpoint="latest")
    process = launch(config, 2, ACCELERATE_USE_CPU="1")
    assert process.returncode == 0, process.stderr
    assert "resuming with another train_batch_size: 4, before 8." in process.stdout
    for (step, *figures), (expected_step, *expected) in zip(losses(tmp_path / "more"), one, strict=True):
        assert step == expected_step
        assert [x or 0 for x in figures] == pytest.approx([x or 0 for x in expected], rel=1e-4)
    process = launch(configure(tmp_path / "apart"), 2)
    assert process.returncode != 0
    assert "2 processes were launched, but accelerate sees 1" in process.stderr


def test_a_signal_to_two_processes_leaves_a_checkpoint(tmp_path):
    config = configure(tmp_path / "run", train_batch_size=4, max_train_steps=100_000, checkpointing_steps=100_000)
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(ROOT / "train_unet.py")]
    process = subprocess.Popen(
        [sys.executable, *command, "--config", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=60) != 0
    latest, remarks = find_latest(tmp_path / "run" / "checkpoints")
    assert latest is not None
    assert remarks == []


def test_accelerate_launch_for_several_processes_on_a_cpu_says_what_to_use(tmp_path):
    """Without MPI accelerate starts one process only, and says nothing."""
    command = ["-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "2", "train_unet.py"]
    config = configure(tmp_path / "run")
    process = subprocess.run(
        [sys.executable, *command, "--config", str(config)], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode != 0
    assert "ACCELERATE_USE_CPU=1 torchrun --nproc_per_node N train_unet.py" in process.stderr


@pytest.mark.slow
def test_a_run_killed_at_twenty_moments_ends_bit_for_bit_as_if_it_had_not_been(tmp_path):
    """SIGKILL at random moments, every second time while a checkpoint is being written."""
    options = {
        "max_train_steps": 64,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 3,
        "class_conditional": True,
        "dropout": 0.1,
        "random_flip": True,
        "logging_steps": 3,
        # Larger, so that a checkpoint takes long enough to be killed in.
        "block_out_channels": [64, 128],
    }
    run(tmp_path / "undisturbed", **options)
    config = configure(tmp_path / "killed", **options, resume_from_checkpoint="latest")
    command = [sys.executable, str(ROOT / "train_unet.py"), "--config", str(config)]
    checkpoints = tmp_path / "killed" / "checkpoints"
    moment = random.Random(0)
    killed_in_a_write = 0
    for attempt in range(20):
        before = set(checkpoints.glob("step-*"))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        # One more checkpoint than before, so that the run gets to its end at last.
        while process.poll() is None and not set(checkpoints.glob("step-*")) - before:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        if attempt % 2:
            while process.poll() is None and not list(checkpoints.glob(".writing-*")):
                pass
        time.sleep(moment.uniform(0, 0.02 if attempt % 2 else 0.3))
        process.kill()
        process.wait()
        killed_in_a_write += bool(list(checkpoints.glob(".writing-*")))
    assert killed_in_a_write >= 3
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert_same_weights(weights(tmp_path / "killed", 64), weights(tmp_path / "undisturbed", 64))
    assert losses(tmp_path / "killed") == losses(tmp_path / "undisturbed")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(tmp_path, signum):
    """The signal goes to the whole group of processes, data workers included, as terminals and schedulers send it."""
    options = {"max_train_steps": 100_000, "checkpointing_steps": 100_000, "logging_steps": 1}
    config = configure(tmp_path / "run", **options, dataloader_num_workers=2)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_unet.py"), "--config", str(config)],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signum)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signum, errors
    assert "--resume_from_checkpoint latest goes on" in errors
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert len(weights(tmp_path / "run", int(checkpoint.name[5:]))) > 0


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """The loss and the gradient of step 4 are finite, but its update is not."""
    update = TrainingState.update

    def poisoned(state, step):
        norm = update(state, step)
        if step == 4:
            next(state.unet.parameters()).data.fill_(float("inf"))
        return norm

    monkeypatch.setattr(TrainingState, "update", poisoned)
    with pytest.raises(UsageError, match=r"at step 4 the weights are not finite.*checkpoint, .*step-00000003 "):
        run(tmp_path / "run", checkpointing_steps=1)
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 3
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "run", 3).values())


def test_a_nan_stops_the_run_and_the_last_checkpoint_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    options = {"max_train_steps": 12, "logging_steps": 4, "checkpointing_steps": 3}
    run(tmp_path / "whole", **options)
    calls = []

    def poisoned(*args, **kwargs):
        calls.append(None)
        return diffusion_loss(*args, **kwargs) * (float("nan") if len(calls) == 8 else 1)

    with monkeypatch.context() as patch:
        patch.setattr("dia_diffusion.training.diffusion_loss", poisoned)
        with pytest.raises(UsageError, match=r"at step 8 the loss is nan .* at learning rate"):
            run(tmp_path / "run", **options)
    # Noticed when the figures of steps 5 to 8 were read.
    assert len(calls) == 8
    fresh_state()
    run(tmp_path / "run", **options, resume_from_checkpoint="latest")
    assert_same_weights(weights(tmp_path / "run", 12), weights(tmp_path / "whole", 12))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


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
    with pytest.raises(UsageError, match="--dia_attention se does not fit the loaded model, which has lstm"):
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
    _, plain = run(tmp_path / "plain", max_train_steps=2, validation_steps=2)
    _, compiled = run(tmp_path / "compiled", max_train_steps=2, validation_steps=2, compile=True)
    assert [x or 0 for line in compiled for x in line] == pytest.approx(
        [x or 0 for line in plain for x in line], rel=1e-3
    )
    DIAUNetPipeline.from_pretrained(tmp_path / "compiled")


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
    with pytest.raises(UsageError, match="not a usable checkpoint"):
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
    with pytest.raises(UsageError, match="unknown ddpm_beta_schedule 'cosine'"):
        run(tmp_path / "run", ddpm_beta_schedule="cosine")
    with pytest.raises(UsageError, match="lr_scheduler 'steps' does not work"):
        run(tmp_path / "run", lr_scheduler="steps")
