"""Cores and threads that a user, a cluster or a container allows."""

import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from dia_diffusion.process import startup
from environments import REFERENCE


def make_groups(root, own, **files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(own)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_max", ".max").replace("cpu_cfs", "cpu.cfs")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        # Version 2: in a container, whose own group is mounted on top, and in nested groups of a machine.
        ("0::/\n", {"cpu_max": "150000 100000\n"}, 2),
        ("0::/docker/abc\n", {"cpu_max": "50000 100000\n"}, 1),
        ("0::/jobs/a\n", {"jobs__cpu_max": "300000 100000\n", "jobs__a__cpu_max": "max 100000\n"}, 3),
        ("0::/\n", {"cpu_max": "max 100000\n"}, None),
        # Version 1.
        (
            "7:memory:/x\n4:cpu,cpuacct:/x\n0::/x\n",
            {"cpu__x__cpu_cfs_quota_us": "400000\n", "cpu__x__cpu_cfs_period_us": "100000\n"},
            4,
        ),
        ("4:cpu:/\n", {"cpu__cpu_cfs_quota_us": "-1\n", "cpu__cpu_cfs_period_us": "100000\n"}, None),
        ("", {}, None),
    ],
)
def test_the_quota_of_a_container_counts(tmp_path, monkeypatch, own, files, cores):
    assert startup.cpu_quota(make_groups(tmp_path, own, **files)) == cores
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3), raising=False)
    monkeypatch.setattr(startup, "cpu_quota", lambda: cores)
    assert startup.available_cores() == min(cores or 3, 3)


NOBODY = """
import pwd
import sys

def find_nobody(number):
    raise KeyError(number)

pwd.getpwuid = find_nobody
from dia_diffusion.cli import main
raise SystemExit(main(sys.argv[1:]))
"""


def test_a_user_without_a_home_has_one(tmp_path):
    """A number without an account, as containers are started with."""
    arguments = ["sample", str(REFERENCE), "--num_images", "1", "--steps", "1", "--output_dir", str(tmp_path / "out")]
    process = subprocess.run(
        [sys.executable, "-c", NOBODY, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
    )
    assert process.returncode == 0, process.stderr
    assert f"there is no home directory: caches are kept in '{tmp_path}" in process.stderr
    assert not (tmp_path / "~").exists()


@pytest.mark.skipif(startup.available_cores() < 2, reason="one core")
def test_accelerate_launch_gives_all_cores(tmp_path):
    """accelerate itself sets one thread where nobody asked."""
    (tmp_path / "threads.py").write_text(
        "from dia_diffusion.process.startup import tune_process; tune_process()\n"
        "import torch; print(torch.get_num_threads())"
    )
    command = ["-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1", str(tmp_path / "threads.py")]
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    process = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=clean)
    assert process.stdout.strip() == str(startup.available_cores()), process.stderr


@pytest.mark.parametrize(
    ("words", "environment", "chosen"),
    [
        ([], {}, [startup.available_cores()]),
        ([], {"OMP_NUM_THREADS": "1"}, []),
        (["--num_cpu_threads_per_process", "1"], {}, []),
    ],
)
def test_a_number_of_threads_that_was_asked_for_counts_under_accelerate_launch(monkeypatch, words, environment, chosen):
    """The launcher, as this process finds it: its command line, and its environment when it started."""
    command = ["python", "-m", "accelerate.commands.launch", "--num_processes", "1", *words, "train_unet.py"]
    launcher = SimpleNamespace(cmdline=lambda: command, environ=lambda: environment)
    monkeypatch.setattr(psutil, "Process", lambda number: launcher)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    startup.tune_process()
    assert set_to == chosen
