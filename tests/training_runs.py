"""Small but real training runs, for the tests of training."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from dia_diffusion.options.training import parse_arguments
from dia_diffusion.training.loop import train

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


def wait_for_lines(metrics):
    """Until a run that was started in another process has trained for a few steps."""
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def fresh_state():
    """accelerate allows one configuration a process; each run here is as in a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)


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
