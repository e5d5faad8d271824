"""Whatever ends a run, it goes on as if it had not ended."""

import os
import random
import shutil
import signal
import sys
import time

import pytest
import torch
from accelerate import Accelerator

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.cli import train_main
from dia_diffusion.errors import UsageError
from dia_diffusion.objectives import DDPM
from dia_diffusion.options.output import OutputOptions
from dia_diffusion.options.training import parse_arguments
from dia_diffusion.training.architecture import build_unet
from dia_diffusion.training.checkpoint import find_latest, load_checkpoint
from dia_diffusion.training.resuming import check_same_experiment, find_checkpoint
from dia_diffusion.training.state import TrainingState
from forks import start
from training_runs import assert_same_weights, configure, fresh_state, losses, run, weights


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate allows one configuration a process; each test here is as in a process of its own."""
    fresh_state()


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


def test_another_batch_is_refused_by_the_flags_that_make_it():
    with pytest.raises(UsageError, match=r"a step takes 16 images, took 8 \(processes x --train_batch_size x"):
        check_same_experiment({"global_batch_size": 8}, {"global_batch_size": 16})


def test_latest_never_removes_what_took_time_to_make(undisturbed, tmp_path):
    options = {"class_conditional": True, "dropout": 0.1, "random_flip": True, "resume_from_checkpoint": "latest"}
    folder = shutil.copytree(undisturbed[0], tmp_path / "finished")
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(UsageError, match=r"a run \(model_index.json\), and it left no checkpoint to resume"):
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
    shutil.copy(undisturbed[0] / "training_config.yaml", tmp_path / "early")
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


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "kills"), [("ddpm", 5), ("edm", 2), ("flow", 2)])
def test_a_run_killed_at_random_moments_ends_bit_for_bit_as_if_it_had_not_been(tmp_path, objective, kills):
    """Every second SIGKILL comes while a checkpoint is being written."""
    options = {
        "objective": objective,
        "max_train_steps": 3 * kills + 1,
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
    arguments = ["--config", str(configure(tmp_path / "killed", **options, resume_from_checkpoint="latest"))]
    checkpoints = tmp_path / "killed" / "checkpoints"
    moment = random.Random(objective)
    killed_in_a_write = 0
    for attempt in range(kills):
        before = set(checkpoints.glob("step-*"))
        process = start(train_main, arguments)
        deadline = time.monotonic() + 120
        # One more checkpoint than before, so that the run gets to its end at last.
        while process.is_alive() and not set(checkpoints.glob("step-*")) - before:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        if attempt % 2:
            while process.is_alive() and not list(checkpoints.glob(".writing-*")):
                pass
        time.sleep(moment.uniform(0, 0.02 if attempt % 2 else 0.3))
        process.kill()
        process.join()
        killed_in_a_write += bool(list(checkpoints.glob(".writing-*")))
    # A write may end before the signal comes, so that of two kills perhaps none falls into one.
    assert killed_in_a_write >= 1 or kills < 5
    process = start(train_main, arguments)
    process.join()
    assert process.exitcode == 0
    assert_same_weights(*(weights(tmp_path / name, 3 * kills + 1) for name in ("killed", "undisturbed")))
    assert losses(tmp_path / "killed") == losses(tmp_path / "undisturbed")


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
    calls, loss = [], DDPM.loss

    def poisoned(*args, **kwargs):
        # The held-out loss is computed without gradients.
        calls.extend([None] * torch.is_grad_enabled())
        poison = torch.is_grad_enabled() and len(calls) == 8
        return loss(*args, **kwargs) * (float("nan") if poison else 1)

    with monkeypatch.context() as patch:
        patch.setattr(DDPM, "loss", poisoned)
        with pytest.raises(UsageError, match=r"at step 8 the loss is nan .* at learning rate"):
            run(tmp_path / "run", **options)
    # Noticed when the figures of steps 5 to 8 were read.
    assert len(calls) == 8
    fresh_state()
    run(tmp_path / "run", **options, resume_from_checkpoint="latest")
    assert_same_weights(weights(tmp_path / "run", 12), weights(tmp_path / "whole", 12))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


SAME = {"class_conditional": True, "dropout": 0.1, "random_flip": True}


@pytest.mark.parametrize("name", ["checkpoint-3", "step-00000003", "{folder}/checkpoint-3"])
def test_a_checkpoint_is_found_by_its_name(undisturbed, tmp_path, name):
    folder = shutil.copytree(undisturbed[0], tmp_path / "run")
    with pytest.raises(UsageError, match="there is no checkpoint 'elsewhere/checkpoint-3'"):
        run(folder, **SAME, resume_from_checkpoint="elsewhere/checkpoint-3")
    _, lines = run(folder, **SAME, resume_from_checkpoint=name.format(folder=folder))
    assert (folder / "checkpoints" / "set-aside-step-00000006").exists()
    assert lines == undisturbed[2]
    assert_same_weights(weights(folder), weights(undisturbed[0]))


def test_a_name_that_is_not_there_is_answered_with_those_that_are(undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed[0], tmp_path / "run")
    with pytest.raises(UsageError, match=r"no checkpoint 'checkpoint-4'; .* there are: step-00000003, step-00000006\."):
        run(folder, **SAME, resume_from_checkpoint="checkpoint-4")
    with pytest.raises(UsageError, match=r"metrics.json' is not a usable checkpoint"):
        run(folder, **SAME, resume_from_checkpoint=str(folder / "metrics.json"))


@pytest.mark.parametrize("place", ["", "checkpoints"])
def test_the_folder_of_a_run_stands_for_its_newest_checkpoint(undisturbed, place):
    folder = undisturbed[0]
    options = OutputOptions(output_dir=str(folder), resume_from_checkpoint=str(folder / place))
    assert find_checkpoint(options, 6) == folder / "checkpoints" / "step-00000006"


def test_a_run_that_is_made_shorter_is_shorter(undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed[0], tmp_path / "run")
    figures, lines = run(folder, **SAME, resume_from_checkpoint="latest", max_train_steps=4)
    assert figures["step"] == 4
    assert max(step for step, *_ in lines) == 4
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "set-aside-step-00000006",
        "step-00000003",
        "step-00000004",
    ]
    # The pipeline is of step 4, not of step 6.
    saved = weights(folder, 4)
    unet = DIAUNetPipeline.from_pretrained(folder).unet.state_dict()
    assert all(torch.equal(tensor, saved[f"ema.{name}"]) for name, tensor in unet.items())


def test_a_run_that_would_end_before_its_checkpoints_is_refused(undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed[0], tmp_path / "run")
    with pytest.raises(UsageError, match="can be used for a run of 2 steps"):
        run(folder, **SAME, resume_from_checkpoint="latest", max_train_steps=2)
    with pytest.raises(UsageError, match="is of step 6, and the run is to end at step 5"):
        run(folder, **SAME, resume_from_checkpoint="step-00000006", max_train_steps=5)
    assert (folder / "checkpoints" / "step-00000006").exists()


def test_an_option_of_a_later_version_is_no_other_experiment_unless_it_is_used(undisturbed):
    now = load_checkpoint(undisturbed[0] / "checkpoints" / "step-00000003").state["config"]
    then = {name: value for name, value in now.items() if name not in ("snr_gamma", "ema_power", "data_digest")}
    then["unet"] = {name: value for name, value in now["unet"].items() if name != "dia_gate_slope"}
    check_same_experiment(then, now)
    with pytest.raises(UsageError, match=r"experiment: snr_gamma is 5\.0, was None"):
        check_same_experiment(then, now | {"snr_gamma": 5.0})
    with pytest.raises(UsageError, match=r"dia_gate_slope is 3\.0, was 1\.0"):
        check_same_experiment(then, now | {"unet": now["unet"] | {"dia_gate_slope": 3.0}})


def test_other_images_are_called_by_that_name(undisturbed):
    then = load_checkpoint(undisturbed[0] / "checkpoints" / "step-00000003").state["config"]
    now = then | {"data_digest": "0" * 64, "dataset_name": None, "train_data_dir": "/pictures"}
    with pytest.raises(UsageError, match=r"the images are others \(now from train_data_dir /pictures, then"):
        check_same_experiment(then, now)


def test_precision_may_change_to_fp16_and_back(tmp_path):
    """fp16 needs a GPU to run, but its scale is kept in the checkpoint the same way on a CPU."""
    run(tmp_path / "run", max_train_steps=3)
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000003")
    fresh_state()
    config = parse_arguments(["--config", str(configure(tmp_path / "other"))])
    accelerator = Accelerator(cpu=True)
    training = TrainingState(config.optimisation, accelerator, build_unet(config.model, 8, 1, None), 6)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    training.restore(checkpoint)
    assert accelerator.scaler.state_dict()["scale"] == 64.0
    with_scale = training.to_checkpoint({})
    accelerator.scaler = torch.amp.GradScaler("cpu")
    training.restore(with_scale)
    assert accelerator.scaler.state_dict()["scale"] == 64.0
    accelerator.scaler = None
    training.restore(with_scale)
    assert torch.equal(training.unet.state_dict()["conv_in.weight"], checkpoint.tensors["unet"]["conv_in.weight"])


def train_and_die(config, checkpoint, word, moment):
    """SIGKILL once this checkpoint is there, at the operation of this number on files with this word in their path."""

    def watch(event, arguments):
        nonlocal moment
        if event in ("open", "os.rename", "os.mkdir") and word in str(arguments[0]) and checkpoint.exists():
            moment -= 1
            if moment < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    train_main(["--config", str(config)])


def test_a_run_killed_in_the_middle_of_saving_goes_on_bit_for_bit(tmp_path):
    """SIGKILL at random operations on the files of a checkpoint, and then of the pipeline, which is there already."""
    options = {"train_batch_size": 719, "max_train_steps": 4, "save_model_epochs": 1, "checkpointing_steps": 1}
    run(tmp_path / "whole", **options)
    folder = tmp_path / "killed"
    config = configure(folder, **options, resume_from_checkpoint="latest")
    moment = random.Random(0)
    for step, word, latest in ((2, ".writing-step", 2), (3, f"{folder.name}/.files.", 4)):
        trigger = folder / "checkpoints" / f"step-{step:08d}"
        process = start(train_and_die, config, trigger, word, moment.randrange(9))
        process.join()
        assert process.exitcode == -signal.SIGKILL
        # The pipeline of step 2 was saved before the first kill, and is whole after each.
        DIAUNetPipeline.from_pretrained(folder)
        assert find_latest(folder / "checkpoints")[0].name == f"step-{latest:08d}"
    run(folder, **options, resume_from_checkpoint="latest")
    assert_same_weights(weights(folder, 4), weights(tmp_path / "whole", 4))
    assert losses(folder) == losses(tmp_path / "whole")
    saved, expected = (DIAUNetPipeline.from_pretrained(tmp_path / n).unet.state_dict() for n in ("killed", "whole"))
    assert_same_weights(saved, expected)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".files")]
