"""Processes in other environments than that of the tests."""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

import diffusers
import torch

TESTS = Path(__file__).parent
# A tiny class-conditional pipeline as version 0.1.0 saved it (tools/save_reference_pipeline.py).
REFERENCE = TESTS / "data" / "pipeline-0.1.0"
DIFFUSERS_SITE = Path(diffusers.__file__).parent.parent


def make_diffusers_only(folder):
    """A virtual environment with the diffusers of this one, and without dia_diffusion; returns its interpreter.

    A path in a .pth file makes the packages there importable, but not what their own .pth files bring: an editable
    installation of dia_diffusion is out of reach.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "diffusers.pth").write_text(f"{DIFFUSERS_SITE}\n")
    return folder / "bin" / "python"


def run_python(code, *arguments, python=sys.executable, folder=None, status=0, **environment):
    """Runs code in a new process, which can import this module; returns what it prints, or its errors if it fails."""
    process = subprocess.run(
        [str(python), "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        # The working directory is importable too, and dia_diffusion lies in that of the tests.
        cwd=folder or Path(python).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), **environment},
        timeout=120,
    )
    assert process.returncode == status, process.stderr
    return process.stdout if status == 0 else process.stderr


def without(packages):
    """Code, for the start of a process, after which these packages are not there: neither imported nor found."""
    return f"import sys\nBLOCKED = {tuple(packages)}\nsys.modules.update(dict.fromkeys(BLOCKED))\n"


def digest(pipeline, **arguments):
    """A hash of images from a pipeline: equal for images that are equal to the last bit."""
    generator = torch.Generator().manual_seed(0)
    images = pipeline(batch_size=2, num_inference_steps=3, generator=generator, output_type="np", **arguments).images
    return hashlib.sha256(images.tobytes()).hexdigest()
