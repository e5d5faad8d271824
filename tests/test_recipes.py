"""The recipes of the documentation run as they stand, one after the other, beside a stand-in for the Hub."""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import numpy as np
from diffusers import DDPMScheduler, UNet2DModel
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load

from environments import REFERENCE, run_python
from hub_server import serve_hub
from training_runs import ROOT

# The configuration of google/ddpm-cifar10-32 (width 128 there).
DDPM_CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": (8, 16, 16, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 8,
    "attention_head_dim": None,
}


def recipes(page):
    """The fenced blocks in order: language and code. Those that follow each other in one language are joined."""
    blocks = re.findall(r"^```(\w[^\n]*)\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.M | re.S)
    return [(kind, "\n".join(code for _, code in group)) for kind, group in groupby(blocks, key=lambda block: block[0])]


def as_the_oldest_on_the_hub(folder):
    """The files of a repository as google/ddpm-cifar10-32 has them: all on top."""
    UNet2DModel(**DDPM_CIFAR10).save_pretrained(folder)
    DDPMScheduler().save_pretrained(folder)
    index = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.1.1"}
    index |= {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_recipes_for_diffusers(tmp_path, diffusers_only):
    folder = tmp_path / "work"
    shutil.copytree(REFERENCE, folder / "runs" / "digits")
    shutil.copy(ROOT / "train_unet.py", folder)
    (folder / "my_images").mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "my_images" / f"{number}.png")

    kinds = []
    with serve_hub() as hub:
        hub.repositories["google/ddpm-cifar10-32"] = as_the_oldest_on_the_hub(tmp_path / "ddpm")
        mine, friends = (hub.client_environment(tmp_path / name) for name in ("mine", "a friend's"))
        for kind, code in recipes("diffusers.md"):
            kinds.append(kind)
            if kind == "python":
                run_python(code, folder=folder, **mine)
            elif kind == "python no-dia":
                run_python(code, python=diffusers_only, folder=folder, **friends)
            else:
                run_shell(code, folder, **mine)
    assert kinds == ["python", "python no-dia", "bash"]
    assert Image.open(folder / "one.png").size == (8, 8)
    assert "unet/dia_unet.py" in hub.repositories["me/cifar10-dia"]
    assert (folder / "a copy" / "unet" / "dia_unet.py").is_file()
    plain = load(hub.repositories["google/ddpm-cifar10-32"]["diffusion_pytorch_model.safetensors"])
    tuned = load((folder / "runs" / "finetuned" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    assert all(tuned[name].equal(plain[name]) for name in plain)
    assert any(tensor.any() for name, tensor in tuned.items() if name.startswith("dia.decoders"))
    assert ModelCard.load(folder / "runs" / "finetuned" / "README.md").data.base_model == "google/ddpm-cifar10-32"


def test_recipes_for_backbones(tmp_path):
    ((kind, code),) = recipes("backbones.md")
    assert kind == "python"
    assert code.count("attach(") == 4
    with serve_hub() as hub:
        printed = run_python(code, folder=tmp_path, **hub.client_environment(tmp_path / "mine"))
        pushed = hub.repositories["me/resnet-dia"]
    lines = dict(line.split() for line in printed.splitlines() if line.startswith("resnet."))
    stages = [f"resnet.encoder.stages.{stage}.layers.{block}" for stage in (0, 1) for block in (0, 1)]
    assert list(lines) == stages
    # The step of the first recipe has moved the gates from 1.
    assert all(0 < abs(float(mean) - 1) < 0.1 for mean in lines.values())
    saved = load(pushed["diffusion_pytorch_model.safetensors"])
    assert json.loads(pushed["config.json"])["family"] == "transformers ResNet"
    assert any(value.any() for name, value in saved.items() if name.startswith("decoders"))
    assert not any("resnet" in name for name in saved)


def run_shell(code, folder, **environment):
    scripts = str(Path(sys.executable).parent)
    # Training takes all cores under accelerate launch; its threads should not spin while they wait for each other.
    settings = {"PATH": f"{scripts}:{os.environ['PATH']}", "ACCELERATE_USE_CPU": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment = {**os.environ, **settings, **environment}
    process = subprocess.run(["bash", "-ec", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
