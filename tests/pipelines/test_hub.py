"""Pipelines on the Hub, for which a small server on this machine stands in (`hub_server.py`)."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from dia_diffusion import DIAUNetPipeline
from dia_diffusion.errors import UsageError
from dia_diffusion.training import loop
from environments import REFERENCE, digest, run_python
from hub_server import TOKEN, serve_hub
from training_runs import configure, fresh_state, run

PUSH_AND_LOAD = """
import json, sys
from dia_diffusion import DIAUNetPipeline
from environments import digest

DIAUNetPipeline.from_pretrained(sys.argv[1]).push_to_hub("pushed")
pipeline = DIAUNetPipeline.from_pretrained("friend/pushed")
modules = [type(part).__module__ for part in (pipeline, pipeline.unet)]
print(json.dumps({"digest": digest(pipeline), "modules": modules}))
"""
LOAD_WITH_DIFFUSERS = """
import json, sys
from diffusers import DiffusionPipeline
from environments import digest

try:
    DiffusionPipeline.from_pretrained(sys.argv[1])
except ValueError as error:
    refusal = str(error)
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
print(json.dumps({"refusal": refusal, "digest": digest(pipeline), "module": type(pipeline.unet).__module__}))
"""
COMMANDS = """
import json, os, sys
from dia_diffusion.cli import main

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    status = main(json.loads(line))
    sys.stdout.flush(), sys.stderr.flush()
    print(status, file=answers, flush=True)
"""


@pytest.fixture
def hub():
    with serve_hub() as hub:
        yield hub


def test_a_pushed_pipeline_loads_by_its_id_with_dia_diffusion_and_without(hub, tmp_path, diffusers_only):
    expected = digest(DIAUNetPipeline.from_pretrained(REFERENCE))
    found = json.loads(run_python(PUSH_AND_LOAD, REFERENCE, **hub.client_environment(tmp_path / "mine")))
    assert found["digest"] == expected
    assert found["modules"] == ["dia_diffusion.pipelines.pipeline_dia_unet", "dia_diffusion.models.unet"]
    files = hub.repositories["friend/pushed"]
    assert {"model_index.json", "pipeline_dia_unet.py", "unet/dia_unet.py", "README.md"} <= files.keys()

    environment = hub.client_environment(tmp_path / "friend's")
    found = json.loads(run_python(LOAD_WITH_DIFFUSERS, "friend/pushed", python=diffusers_only, **environment))
    assert "Pass `trust_remote_code=True`" in found["refusal"]
    assert found["digest"] == expected
    assert found["module"] == "diffusers_modules.local.dia_unet"


@contextmanager
def commands(log, environment):
    """Runs commands of `dia` one after the other in a process of its own, for each of which it returns the status."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log.open("w"), "text": True}
    process = subprocess.Popen([sys.executable, "-c", COMMANDS], **pipes, env={**os.environ, **environment})

    def status(*words):
        process.stdin.write(json.dumps([str(word) for word in words]) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    try:
        yield status
    finally:
        process.kill()
        process.wait()


def test_a_training_run_is_pushed_with_its_card_and_sampled_by_id(hub, tmp_path):
    log = tmp_path / "log"
    with commands(log, hub.client_environment(tmp_path / "home")) as status:
        # A card that the Hub refuses ends the run before it starts.
        options = {"push_to_hub": True, "hub_model_id": "friend/digits", "hub_private_repo": True}
        config = configure(tmp_path / "run", **options, license="mit-license")
        assert status("train", "--config", config) == 2
        assert "refuses the metadata of the model card, see --license: " in log.read_text()
        assert "must be one of [apache-2.0, mit, ...]" in log.read_text()
        assert not (tmp_path / "run").exists()
        assert hub.repositories == {}

        config = configure(tmp_path / "run", **options)
        assert status("train", "--config", config, "--hub_token", TOKEN) == 0, log.read_text()
        check_pushed_run(hub, tmp_path / "run")

        # It is the installed code that runs.
        for name in ("pipeline_dia_unet.py", "unet/dia_unet.py"):
            hub.repositories["friend/digits"][name] = b"raise RuntimeError('the code of the repository was run')\n"
        options = ["--num_images", 2, "--steps", 2, "--output_dir", tmp_path / "out", "--device", "cpu"]
        assert status("sample", "friend/digits", *options) == 0, log.read_text()
    assert Image.open(tmp_path / "out" / "00001.png").size == (8, 8)


def check_pushed_run(hub, folder):
    files = hub.repositories["friend/digits"]
    assert hub.private == {"friend/digits"}
    pipeline = {"model_index.json", "pipeline_dia_unet.py", "scheduler/scheduler_config.json", "unet/config.json"}
    weights = {"unet/dia_unet.py", "unet/diffusion_pytorch_model.safetensors"}
    record = "README.md report.html samples.png curves.png metrics.json metrics.jsonl training_config.yaml".split()
    assert files.keys() == pipeline | weights | {*record}
    assert files["samples.png"] == (folder / "samples.png").read_bytes()
    assert not any(TOKEN.encode() in content for content in files.values())
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "diffusers"
    assert 'from_pretrained("friend/digits", trust_remote_code=True)' in card.text


def test_a_repository_that_cannot_be_used_ends_the_run_before_it_starts(tmp_path):
    # The tests themselves are offline.
    fresh_state()
    with pytest.raises(UsageError, match=r"cannot use the repository 'run' on the Hub.*--hub_token"):
        run(tmp_path / "run", push_to_hub=True)
    assert not (tmp_path / "run").exists()


def test_a_licence_that_is_no_identifier_ends_the_run_before_it_starts(tmp_path):
    with pytest.raises(UsageError, match="license 'MIT License' is not an identifier of the Hub: use for example mit"):
        run(tmp_path / "run", license="MIT License")


def test_a_push_that_fails_leaves_the_finished_run_and_says_how_to_try_again(tmp_path, monkeypatch):
    # The Hub answered at the start, and cannot be reached at the end.
    monkeypatch.setattr(loop, "make_hub_repository", lambda options: "me/run")
    fresh_state()
    with pytest.raises(UsageError, match=r"finished .* not be pushed to 'me/run'.*hf upload me/run .*--exclude"):
        run(tmp_path / "run", push_to_hub=True)
    assert (tmp_path / "run" / "README.md").is_file()
