"""Batches divided between processes and steps, and signals to them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from dia_diffusion.cli import train_main
from dia_diffusion.errors import UsageError
from dia_diffusion.training.checkpoint import find_latest
from forks import start_together
from training_runs import ROOT, configure, fresh_state, launch, losses, run, wait_for_lines, weights


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


def test_two_processes_give_the_losses_of_one_with_flow(tmp_path):
    """EDM is below, under accelerate launch."""
    _, one = run(tmp_path / "one", train_batch_size=8, objective="flow")
    config = configure(tmp_path / "two", train_batch_size=4, objective="flow")
    processes = start_together(2, train_main, ["--config", str(config)])
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for (step, *figures), (expected_step, *expected) in zip(losses(tmp_path / "two"), one, strict=True):
        assert step == expected_step
        assert [x or 0 for x in figures] == pytest.approx([x or 0 for x in expected], rel=1e-4)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
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
    wait_for_lines(tmp_path / "run" / "metrics.jsonl")
    os.killpg(process.pid, signum)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signum, errors
    assert "--resume_from_checkpoint latest goes on" in errors
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert len(weights(tmp_path / "run", int(checkpoint.name[5:]))) > 0


def test_a_signal_to_two_processes_leaves_a_checkpoint_and_one_that_nohup_ignores_does_nothing(tmp_path):
    config = configure(tmp_path / "run", train_batch_size=4, max_train_steps=100_000, checkpointing_steps=100_000)
    command = ["accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "2", str(ROOT / "train_unet.py")]
    process = subprocess.Popen(
        ["nohup", sys.executable, "-m", *command, "--config", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    log = tmp_path / "run" / "metrics.jsonl"
    wait_for_lines(log)
    processes = psutil.Process(process.pid).children(recursive=True)
    for one in (process, *processes):
        one.send_signal(signal.SIGHUP)
    before, deadline = log.stat().st_size, time.monotonic() + 60
    while log.stat().st_size == before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # Torch's launcher, which passes it on. That of accelerate waits for it.
    processes[0].send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) != 0
    latest, remarks = find_latest(tmp_path / "run" / "checkpoints")
    assert latest is not None
    assert remarks == []
    assert not psutil.wait_procs(processes, timeout=10)[1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no death signal")
def test_a_signal_to_accelerate_launch_reaches_the_training(tmp_path):
    """`accelerate launch` ends at once and leaves the process that it started alone."""
    config = configure(tmp_path / "run", max_train_steps=100_000, checkpointing_steps=100_000, logging_steps=1)
    command = ["-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1", str(ROOT / "train_unet.py")]
    launcher = subprocess.Popen(
        [sys.executable, *command, "--config", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for_lines(tmp_path / "run" / "metrics.jsonl")
    launcher.terminate()
    launcher.wait(timeout=60)
    deadline = time.monotonic() + 60
    while find_latest(tmp_path / "run" / "checkpoints")[0] is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_accelerate_launch_starts_as_many_processes_on_a_cpu_as_it_was_asked_for(tmp_path):
    """Without MPI accelerate itself starts one only. Each measures the images and takes its rows of the noise.

    Two launches at a time do not share a port.
    """
    _, one = run(tmp_path / "one", train_batch_size=8, objective="edm")
    command = ["-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "2", "train_unet.py"]
    configs = [configure(tmp_path / name, train_batch_size=4, objective="edm") for name in ("two", "again")]
    processes = [
        subprocess.Popen(
            [sys.executable, *command, "--config", str(config)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for config in configs
    ]
    for process, name in zip(processes, ("two", "again"), strict=True):
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        # With one process the batch would be half as large, and the losses others.
        assert json.loads((tmp_path / name / "metrics.json").read_text())["global_batch_size"] == 8
        for (step, *figures), (expected_step, *expected) in zip(losses(tmp_path / name), one, strict=True):
            assert step == expected_step
            assert [x or 0 for x in figures] == pytest.approx([x or 0 for x in expected], rel=1e-4)


def test_one_process_of_torchrun_trains(tmp_path):
    process = launch(configure(tmp_path / "run", max_train_steps=2), 1)
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["step"] == 2


def test_the_address_of_a_master_alone_says_nothing_of_several_processes(tmp_path, monkeypatch):
    """Clusters export it to every job."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert run(tmp_path / "run", max_train_steps=2)[0]["step"] == 2


def test_the_precision_of_accelerate_launch_counts_on_a_cluster_too(tmp_path):
    config = configure(tmp_path / "run", max_train_steps=2)
    command = ["-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "1"]
    process = subprocess.run(
        [sys.executable, *command, "--mixed_precision", "bf16", "train_unet.py", "--config", str(config)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "MASTER_ADDR": "127.0.0.1"},
    )
    assert process.returncode == 0, process.stderr
    assert "mixed_precision: bf16" in (tmp_path / "run" / "training_config.yaml").read_text()


def test_accelerate_that_divides_the_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="accelerate is configured for FSDP"):
        run(tmp_path / "run")


def test_the_backend_of_accelerate_launch_compiles(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    run(tmp_path / "run", max_train_steps=1)
    assert "compiled with EAGER, as accelerate was told." in capsys.readouterr().out


@pytest.mark.parametrize("signum", [None, signal.SIGKILL])
def test_no_worker_outlives_its_run(tmp_path, signum):
    """Neither a run that ends nor one that is killed leaves workers behind, nor does the end wait for them."""
    steps = {"max_train_steps": 4 if signum is None else 100_000, "checkpointing_steps": 100_000}
    config = configure(tmp_path / "run", **steps, dataloader_num_workers=2, logging_steps=1, use_ema=False)
    command = [sys.executable, str(ROOT / "train_unet.py"), "--config", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_lines(tmp_path / "run" / "metrics.jsonl")
    started = psutil.Process(process.pid).children(recursive=True)
    if signum is not None:
        assert len(started) >= 2
        process.send_signal(signum)
    assert process.wait(timeout=120) == (0 if signum is None else -signum)
    assert psutil.wait_procs(started, timeout=30)[1] == []
