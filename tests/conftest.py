import os
import signal

# Nothing on the Hub is needed for the tests, and waiting for it would take long where it cannot be reached.
os.environ["HF_HUB_OFFLINE"] = "1"
# Models this small gain nothing from threads, and threads of several processes wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A job in the background of a script ignores Ctrl-C, one under nohup a closing terminal, and so would the processes
# that the tests signal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import io
from contextlib import redirect_stdout
from pathlib import Path

import datasets
import pytest
import torch

from environments import make_diffusers_only, run_python
from training_runs import fresh_state, run


def pytest_xdist_auto_num_workers():
    """Many tests wait for processes that they started: four workers keep two cores busy."""
    return min(4, 2 * len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)


def pytest_collection_modifyitems(items):
    """The longest come first, or they would come last, on one worker while the others wait."""
    order = {"study": 0, "training": 1}
    items.sort(key=lambda item: order.get(item.path.parent.name, 2))


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Tests neither see nor fill the user's cache."""
    os.environ["DIA_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("data_sets"))
    datasets.config.HF_DATASETS_CACHE = Path(os.environ["HF_DATASETS_CACHE"])


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A finished run: its folder, its figures and its lines of metrics. Not to be changed."""
    folder = tmp_path_factory.mktemp("run") / "undisturbed"
    fresh_state()
    with redirect_stdout(io.StringIO()) as said:
        figures, lines = run(
            folder, class_conditional=True, dropout=0.1, random_flip=True, score_features="digits", score_num_images=10
        )
    folder.with_suffix(".log").write_text(said.getvalue())
    return folder, figures, lines


@pytest.fixture(scope="session")
def diffusers_only(tmp_path_factory):
    """The interpreter of an environment that has diffusers, and not dia_diffusion."""
    python = make_diffusers_only(tmp_path_factory.mktemp("environment") / "venv")
    assert "No module named 'dia_diffusion'" in run_python("import dia_diffusion", python=python, status=1)
    return python
