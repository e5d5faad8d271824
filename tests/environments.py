"""Processes in other environments than that of the tests."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import diffusers

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
    """Runs code in a new process, and returns what it printed; errors too where a failing status is expected."""
    process = subprocess.run(
        [str(python), "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **environment},
        timeout=120,
    )
    assert process.returncode == status, process.stderr
    return process.stdout if status == 0 else process.stderr
