"""What an output directory holds is never lost: one run at a time, nothing written over, nothing left half-way."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from dia_diffusion import DIAUNetPipeline
from dia_diffusion.errors import NotFiniteError, UsageError
from dia_diffusion.files import replace_files, set_aside
from dia_diffusion.training.folder import lock_output_dir, read_best
from dia_diffusion.training.state import TrainingState
from forks import start
from training_runs import assert_same_weights, fresh_state, run, weights

SAME = {"class_conditional": True, "dropout": 0.1, "random_flip": True}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate allows one configuration a process; each test here is as in a process of its own."""
    fresh_state()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}


def python(code, *arguments):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], stdout=subprocess.PIPE)


def hold(folder):
    with lock_output_dir(folder):
        child = os.fork()  # as the processes that load data
        if child:
            print(child, flush=True)
        time.sleep(60)


def test_a_second_run_in_the_same_folder_is_refused_until_the_first_is_gone(undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed[0], tmp_path / "run")
    before = contents(folder)
    log = tmp_path / "child"
    holder = start(hold, folder, output=log)
    while not (log.exists() and log.read_text().endswith("\n")):
        assert holder.is_alive()
        time.sleep(0.01)
    child = int(log.read_text())
    try:
        with pytest.raises(UsageError, match="another command is at work in"):
            run(folder, **SAME, overwrite_output_dir=True)
        assert contents(folder) == before
        holder.kill()
        holder.join()
        with lock_output_dir(folder):
            pass
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)


def test_what_a_kill_left_is_removed_and_what_is_not_of_its_kind_stays(tmp_path):
    (tmp_path / "checkpoints" / ".writing-step-00000007").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".replaced-step-00000005").mkdir()
    (tmp_path / "checkpoints" / ".removing-step-00000003").mkdir()
    (tmp_path / ".metrics.json.0123456789abcdef.tmp").touch()
    (tmp_path / ".files.0123456789abcdef.tmp" / "unet").mkdir(parents=True)
    (tmp_path / ".mine.tmp").touch()
    with lock_output_dir(tmp_path):
        pass
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} - {".lock"}
    # The kill came when the old checkpoint had made way, and the new one was not in its place.
    assert left == {"checkpoints", "checkpoints/step-00000005", ".mine.tmp"}


def test_a_mistake_leaves_no_folder(tmp_path):
    with pytest.raises(UsageError, match="there is no checkpoint 'step-00000001'"):
        run(tmp_path / "run", resume_from_checkpoint="step-00000001")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["samples/mine.png", "metrics.jsonl", "README.md", "best/mine"])
@pytest.mark.parametrize("resume", ["latest", None])
def test_files_that_are_not_of_a_run_are_not_touched(tmp_path, name, resume):
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).write_text('{"mine": 1}\n')
    with pytest.raises(UsageError, match=rf"already holds a run \({name.split('/')[0]}\)"):
        run(tmp_path / "run", resume_from_checkpoint=resume)
    assert (tmp_path / "run" / name).read_text() == '{"mine": 1}\n'


def test_a_checkpoint_of_another_run_does_not_take_the_place_of_a_run(undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed[0], tmp_path / "run")
    before = contents(folder)
    other = str(undisturbed[0] / "checkpoints" / "step-00000003")
    with pytest.raises(UsageError, match=r"already holds a run .* is a checkpoint of another"):
        run(folder, **SAME, resume_from_checkpoint=other)
    assert contents(folder) == before
    run(folder, **SAME, resume_from_checkpoint=other, overwrite_output_dir=True)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000006"]
    assert_same_weights(weights(folder), weights(undisturbed[0]))


def test_the_best_model_of_a_branch_that_was_left_is_set_aside(undisturbed, tmp_path):
    options = {**SAME, "eval_steps": 2, "score_features": "digits", "eval_num_images": 4, "score_num_images": 4}
    folder = shutil.copytree(undisturbed[0], tmp_path / "run")
    (folder / "best").mkdir()
    (folder / "best" / "metrics.json").write_text(json.dumps({"step": 4, "fid": 0.0}))
    run(folder, **options, resume_from_checkpoint="step-00000003")
    assert json.loads((folder / "set-aside-best" / "metrics.json").read_text()) == {"step": 4, "fid": 0.0}
    best = json.loads((folder / "best" / "metrics.json").read_text())
    assert best["step"] in (4, 6)
    assert best["fid"] > 0
    # One of an earlier step stays, as long as it was measured in the same way.
    (folder / "best" / "metrics.json").write_text(json.dumps(best | {"step": 2, "fid": 0.0}))
    run(folder, **options, resume_from_checkpoint="step-00000003")
    assert json.loads((folder / "best" / "metrics.json").read_text())["step"] == 2
    run(folder, **options | {"eval_num_images": 5}, resume_from_checkpoint="step-00000003")
    assert json.loads((folder / "best" / "metrics.json").read_text())["step"] in (4, 6)
    assert (folder / "set-aside-best-2").exists()


def test_nothing_is_set_aside_in_the_place_of_another(tmp_path):
    for number in (1, 2, 3):
        (tmp_path / "best").write_text(str(number))
        set_aside(tmp_path / "best")
    texts = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert texts == {"set-aside-best": "1", "set-aside-best-2": "2", "set-aside-best-3": "3"}


@pytest.mark.parametrize("option", ["save_model_epochs", "eval_steps"])
def test_a_model_that_diverged_between_two_checks_is_not_saved(tmp_path, monkeypatch, option):
    """An epoch of the embedded digits is 2 steps here, and neither a line nor a checkpoint is due before step 7."""
    options = {"train_batch_size": 719, "max_train_steps": 7, "logging_steps": 100, "checkpointing_steps": 100}
    options |= {"validation_steps": 100, "score_features": "digits", "eval_num_images": 4, "score_num_images": 4}
    update = TrainingState.update

    def poisoned(state, step):
        norm = update(state, step)
        if step == 4:
            list(state.unet.parameters())[-1].data.view(-1)[0] = float("nan")
        return norm

    monkeypatch.setattr(TrainingState, "update", poisoned)
    with pytest.raises(NotFiniteError, match="at step 4 the weights are not finite"):
        run(tmp_path / "run", **options, **{option: 1 if option == "save_model_epochs" else 2})
    folder = tmp_path / "run" / ("best" if option == "eval_steps" else "")
    saved = DIAUNetPipeline.from_pretrained(folder).unet.state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


def test_a_folder_of_files_is_as_before_or_as_after_wherever_a_kill_comes(tmp_path):
    """A kill after the n-th file that is written, or moved into place."""
    code = """
        import os, pathlib, signal, sys
        from pathlib import Path
        from dia_diffusion.files import replace_files
        folder, left = Path(sys.argv[1]), int(sys.argv[2])
        def count(function):
            def counted(*arguments, **options):
                global left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)
            return counted
        pathlib.Path.replace, pathlib.Path.write_text = count(Path.replace), count(Path.write_text)
        def write(place):
            (place / "unet").mkdir()
            for name in ("index", "unet/config", "unet/weights"):
                (place / name).write_text("after")
        replace_files(folder, write, last="index")
    """
    for existed in (True, False):
        for moment in range(7):
            folder = tmp_path / f"{existed}-{moment}"
            folder.mkdir()
            if existed:
                replace_files(folder, lambda place: (place / "index").write_text("before"), last="index")
            killed = python(code, folder, moment).wait() == -signal.SIGKILL
            assert killed == (moment < 6)
            index = folder / "index"
            assert index.exists() or not existed
            files = {path.name for path in folder.rglob("*") if path.is_file() and ".tmp" not in str(path)}
            if index.exists() and index.read_text() == "after":
                assert files == {"index", "config", "weights"}
            assert all(re.fullmatch("before|after", (folder / "unet" / n).read_text()) for n in files - {"index"})


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"step": 4}'])
def test_a_record_of_the_best_pipeline_that_cannot_be_read_is_none(tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    assert read_best(tmp_path) == ({"step": 4} if "step" in content else None)
