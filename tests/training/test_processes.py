"""Batches divided between processes and steps, and signals to them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
import torch

from dia_diffusion.cli import train_main
from dia_diffusion.errors import UsageError
from dia_diffusion.training.checkpoint import find_latest
from forks import start, start_together
from training_runs import ROOT, configure, fresh_state, losses, run, wait_for_lines, weights


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate allows one configuration a process; each test here is as in a process of its own."""
    fresh_state()


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


def train_on_two(folder, **options):
    """Trains with half of the batch in each of two processes, and returns what they printed."""
    config, log = configure(folder, train_batch_size=4, **options), folder.with_suffix(".log")
    processes = start_together(2, train_main, ["--config", str(config)], output=log)
    for process in processes:
        process.join()
        assert process.exitcode == 0, log.read_text()
    return log.read_text()


def assert_same_losses(lines, whole):
    for (step, *figures), (expected_step, *expected) in zip(lines, whole, strict=True):
        assert step == expected_step
        assert [x or 0 for x in figures] == pytest.approx([x or 0 for x in expected], rel=1e-4)


def test_two_processes_give_the_losses_of_one(tmp_path):
    options = {"score_features": "digits", "score_num_images": 10, "eval_steps": 3, "eval_num_images": 10}
    _, one = run(tmp_path / "one", train_batch_size=8, **options)
    train_on_two(tmp_path / "two", **options)
    assert_same_losses(losses(tmp_path / "two"), one)
    assert (tmp_path / "two" / "samples.png").exists()
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["num_images"] == 10
    # A run of one process goes on with two.
    shutil.copytree(tmp_path / "one", tmp_path / "more")
    shutil.rmtree(tmp_path / "more" / "checkpoints" / "step-00000006")
    said = train_on_two(tmp_path / "more", **options, resume_from_checkpoint="latest")
    assert "resuming with another train_batch_size: 4, before 8." in said
    assert_same_losses(losses(tmp_path / "more"), one)


def test_two_processes_give_the_losses_of_one_with_flow(tmp_path):
    """EDM is below, under accelerate launch."""
    _, one = run(tmp_path / "one", train_batch_size=8, objective="flow")
    train_on_two(tmp_path / "two", objective="flow")
    assert_same_losses(losses(tmp_path / "two"), one)


def start_training(config, train=train_main):
    return start(train, ["--config", str(config)], output=config.with_suffix(".log"))


def train_in_own_group(arguments):
    """Trains in a group of processes, which can get a signal as terminals and schedulers send it."""
    os.setpgid(0, 0)
    return train_main(arguments)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(tmp_path, signum):
    """The signal goes to the whole group of processes, data workers included, as terminals and schedulers send it."""
    options = {"max_train_steps": 100_000, "checkpointing_steps": 100_000, "logging_steps": 1}
    config = configure(tmp_path / "run", **options, dataloader_num_workers=2)
    process = start_training(config, train_in_own_group)
    wait_for_lines(tmp_path / "run" / "metrics.jsonl")
    os.killpg(process.pid, signum)
    process.join(120)
    said = config.with_suffix(".log").read_text()
    assert process.exitcode == 128 + signum, said
    assert "--resume_from_checkpoint latest goes on" in said
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert len(weights(tmp_path / "run", int(checkpoint.name[5:]))) > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no death signal")
def test_a_signal_to_accelerate_launch_reaches_the_training(tmp_path):
    """`accelerate launch` ends at once and leaves the process that it started alone. Its precision counts.

    Clusters export the address of a master to every job, which alone says nothing of several processes.
    """
    config = configure(tmp_path / "run", max_train_steps=100_000, checkpointing_steps=100_000, logging_steps=1)
    launcher = launch_on_cpu(1, config, "--mixed_precision", "bf16", MASTER_ADDR="127.0.0.1")
    wait_for_lines(tmp_path / "run" / "metrics.jsonl")
    launcher.terminate()
    launcher.wait(timeout=60)
    deadline = time.monotonic() + 60
    while find_latest(tmp_path / "run" / "checkpoints")[0] is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "mixed_precision: bf16" in (tmp_path / "run" / "training_config.yaml").read_text()


def launch_on_cpu(processes, config, *options, before=(), **environment):
    command = [*before, sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu"]
    command += ["--num_processes", str(processes), *options, str(ROOT / "train_unet.py"), "--config", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with config.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def test_accelerate_launch_starts_as_many_processes_on_a_cpu_as_it_was_asked_for(tmp_path):
    """Without MPI accelerate itself starts one only. Each measures the images and takes its rows of the noise.

    Two launches at a time do not share a port. A signal leaves a checkpoint, and one that nohup ignores does nothing.
    """
    options = {"objective": "edm", "lr_scheduler": "constant_with_warmup"}
    endless = {"train_batch_size": 4, "max_train_steps": 10**5, "checkpointing_steps": 10**5}
    config, log = configure(tmp_path / "two", **options, **endless), tmp_path / "two" / "metrics.jsonl"
    with socket.socket() as other, suppress(OSError):
        other.bind(("", 29500))  # torch's default port, unless another launch has it already.
        other.listen()
        process = launch_on_cpu(2, config, before=["nohup"])
        wait_for_lines(log)
    processes = psutil.Process(process.pid).children(recursive=True)
    for one in (process, *processes):
        one.send_signal(signal.SIGHUP)
    before, deadline = log.stat().st_size, time.monotonic() + 60
    while log.stat().st_size == before or losses(tmp_path / "two")[-1][0] < 7:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # Torch's launcher, which passes it on. That of accelerate waits for it.
    processes[0].send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) != 0
    latest, remarks = find_latest(tmp_path / "two" / "checkpoints")
    assert latest is not None
    assert remarks == []
    assert not psutil.wait_procs(processes, timeout=10)[1]
    # With one process the batch would be half as large, and the losses others.
    _, one = run(tmp_path / "one", train_batch_size=8, **options)
    assert_same_losses(losses(tmp_path / "two")[: len(one)], one)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs processes know of each other")
@pytest.mark.parametrize("processes", [1, 2])
def test_torchrun_trains_in_one_process_and_in_several_that_know_of_each_other(tmp_path, processes):
    config, log = configure(tmp_path / "run", max_train_steps=2), tmp_path / "run.log"
    for process in start_together(processes, train_main, ["--config", str(config)], output=log, ACCELERATE_USE_CPU=0):
        process.join(120)
        assert process.exitcode == (0 if processes == 1 else 2), log.read_text()
    assert ("2 processes were launched, but accelerate sees 1" in log.read_text()) == (processes == 2)
    assert (tmp_path / "run" / "metrics.json").exists() == (processes == 1)


def test_accelerate_that_divides_the_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="accelerate is configured for FSDP"):
        run(tmp_path / "run")


def test_the_backend_of_accelerate_launch_compiles(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    run(tmp_path / "run", max_train_steps=1)
    assert "compiled with EAGER, as accelerate was told." in capsys.readouterr().out


WORKERS = {"checkpointing_steps": 100_000, "dataloader_num_workers": 2, "logging_steps": 1, "use_ema": False}


def test_no_worker_outlives_a_run_that_ends(tmp_path):
    """Nor does the end wait for them."""
    process = start_training(configure(tmp_path / "run", **WORKERS, max_train_steps=4))
    wait_for_lines(tmp_path / "run" / "metrics.jsonl")
    started = psutil.Process(process.pid).children(recursive=True)
    process.join(120)
    assert process.exitcode == 0
    assert psutil.wait_procs(started, timeout=30)[1] == []


def test_no_worker_outlives_a_run_that_is_killed(tmp_path):
    config = configure(tmp_path / "run", **WORKERS, max_train_steps=100_000)
    # Not forked: workers of a fork share the server of the tests.
    command = [sys.executable, str(ROOT / "train_unet.py"), "--config", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_lines(tmp_path / "run" / "metrics.jsonl")
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) >= 2
    process.kill()
    assert process.wait(timeout=120) == -signal.SIGKILL
    assert psutil.wait_procs(started, timeout=30)[1] == []
