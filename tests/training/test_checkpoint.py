"""Checkpoints against truncated, changed and missing files, and against a disk that refuses."""

import json
import os
import pickle
import resource
import shutil
import signal
import sys

import pytest
import torch

from dia_diffusion.errors import UsageError
from dia_diffusion.training.checkpoint import (
    Checkpoint,
    clean_checkpoints,
    find_damage,
    find_latest,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from forks import start


def example(value=0.0):
    tensors = {"unet": {"a": torch.full((3, 4), value), "b.c": torch.arange(5)}, "ema": {"a": torch.randn(2)}}
    return Checkpoint(tensors, {"step": 7, "losses": [0.1, 1e-17], "note": None})


def test_round_trip(tmp_path):
    saved = example()
    loaded = load_checkpoint(save_checkpoint(tmp_path, 7, saved))
    assert loaded.state == saved.state
    assert loaded.tensors.keys() == saved.tensors.keys()
    for group, tensors in saved.tensors.items():
        assert loaded.tensors[group].keys() == tensors.keys()
        assert all(torch.equal(loaded.tensors[group][name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_files_have_the_mode_that_the_umask_asks_for(tmp_path, mask):
    """safetensors writes for the owner alone."""
    before = os.umask(mask)
    try:
        path = save_checkpoint(tmp_path, 7, example())
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o666 & ~mask}


def test_only_the_newest_stay(tmp_path):
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, example(), total_limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000010"]


def test_the_limit_counts_up_to_the_new_checkpoint(tmp_path):
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, example())
    save_checkpoint(tmp_path, 5, example(), total_limit=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000005", "step-00000010"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [truncate, flip, lambda path: path.unlink()])
@pytest.mark.parametrize("file", ["unet.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, harm, file):
    good = save_checkpoint(tmp_path, 1, example(1.0))
    bad = save_checkpoint(tmp_path, 2, example(2.0))
    harm(bad / file)
    latest, remarks = find_latest(tmp_path)
    assert latest == good
    assert len(remarks) == 1
    assert remarks[0].startswith("passed over step-00000002: ")
    with pytest.raises(UsageError, match="not a usable checkpoint"):
        load_checkpoint(bad)


def test_an_unfinished_checkpoint_does_not_count(tmp_path):
    save_checkpoint(tmp_path, 1, example())
    (tmp_path / ".writing-step-00000002").mkdir()
    assert find_latest(tmp_path)[0].name == "step-00000001"
    save_checkpoint(tmp_path, 2, example())
    assert find_latest(tmp_path)[0].name == "step-00000002"


def save_on_a_small_disk(folder):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save_checkpoint(folder, 1, Checkpoint({"unet": {"a": torch.ones(10)}}, {}), total_limit=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        save_checkpoint(folder, 2, Checkpoint({"unet": {"a": torch.ones(100_000)}}, {}), total_limit=1)
    except UsageError as error:
        print(error)


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """A limit on the size of files stands for a full disk: the write of the larger checkpoint fails half-way."""
    folder, log = tmp_path / "checkpoints", tmp_path / "log"
    process = start(save_on_a_small_disk, folder, output=log)
    process.join()
    assert process.exitcode == 0
    assert "step 2 could not be written" in log.read_text()
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    assert find_damage(folder / "step-00000001") is None


def test_pickles_are_not_read(tmp_path):
    """A folder from elsewhere may hold anything; nothing in it is executed."""
    path = save_checkpoint(tmp_path, 1, example())
    trap = tmp_path / "executed"

    class Trap:
        def __reduce__(self):
            return trap.touch, ()

    for name in ("unet.bin", "optimizer.pt", "random_states_0.pkl"):
        (path / name).write_bytes(pickle.dumps(Trap()))
    load_checkpoint(path)
    (path / "unet.safetensors").write_bytes(pickle.dumps(Trap()))
    manifest = json.loads((path / "manifest.json").read_text())
    import hashlib

    manifest["sha256"]["unet.safetensors"] = hashlib.sha256((path / "unet.safetensors").read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Exception, match=r"(?i)header"):
        load_checkpoint(path)
    assert not trap.exists()


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch):
    """As on a network file system, where a file that someone reads cannot go."""
    save_checkpoint(tmp_path, 1, example())

    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(16, "Device or resource busy", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        with pytest.warns(UserWarning, match="step-00000001' could not be removed"):
            saved = save_checkpoint(tmp_path, 2, example(), total_limit=1)
    # What is left of it does not pass for a checkpoint, and goes as soon as it can.
    assert list_checkpoints(tmp_path) == [saved]
    assert [path.name for path in save_checkpoint(tmp_path, 3, example()).parent.iterdir() if "0001" in path.name] == []


def save_and_die(folder, moment):
    """Saves two checkpoints; SIGKILL at the operation on files of this number in the second."""
    save_checkpoint(folder, 1, Checkpoint({"unet": {"a": torch.ones(10)}}, {"step": 1}))

    def watch(event, arguments):
        nonlocal moment
        if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove") and str(folder) in str(arguments[0]):
            moment -= 1
            if moment < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    save_checkpoint(folder, 2, Checkpoint({"unet": {"a": torch.ones(10)}}, {"step": 2}), total_limit=1)


@pytest.mark.parametrize("moment", range(12))
def test_a_kill_in_the_middle_of_saving_leaves_the_checkpoint_before(tmp_path, moment):
    """SIGKILL at each of the operations on files, with one checkpoint to keep."""
    process = start(save_and_die, tmp_path, moment)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    clean_checkpoints(tmp_path)
    latest, remarks = find_latest(tmp_path)
    assert remarks == []
    assert load_checkpoint(latest).state["step"] in (1, 2)
    assert all(path.name.startswith("step-") for path in tmp_path.iterdir())
