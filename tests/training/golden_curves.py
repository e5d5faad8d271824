"""The losses of the first hundred steps of four small runs, which no change may move unnoticed.

    python tests/training/golden_curves.py

writes them to tests/data/golden_curves.json, with what they were computed on. Do that only for a change that is meant
to move them, and say in its commit why.
"""

import json
import platform
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from training_runs import configure, fresh_state, launch, losses, run

FILE = Path(__file__).parents[1] / "data" / "golden_curves.json"
STEPS = 100
# Of options that a loss depends on, each is in one of them at least.
RUNS = {
    "ddpm with DIA": {"class_conditional": True, "label_dropout": 0.1, "random_flip": True},
    "ddpm without attention, two processes": {
        "dia_attention": "none",
        "prediction_type": "v_prediction",
        "snr_gamma": 5.0,
        "processes": 2,
    },
    "edm with DIA by level": {"objective": "edm", "dia_sharing": "level"},
    "flow without attention": {"objective": "flow", "dia_attention": "none", "gradient_accumulation_steps": 2},
}


def curve(name: str, folder: Path) -> list[float]:
    """The losses of a run, as they are computed on one thread a process."""
    options = dict(RUNS[name])
    options |= {
        "max_train_steps": STEPS,
        "logging_steps": 1,
        "validation_steps": STEPS,
        "checkpointing_steps": STEPS,
        "train_batch_size": 8,
        "seed": 5,
    }
    processes = options.pop("processes", 1)
    if processes == 1:
        fresh_state()
        with one_thread():
            run(folder, **options)
    else:
        ended = launch(configure(folder, **options), processes, ACCELERATE_USE_CPU="true")
        assert ended.returncode == 0, ended.stderr
    return [loss for _, loss, _ in losses(folder) if loss is not None]


def computed_on() -> dict[str, str]:
    """Where the same additions are made in the same order: blocks of a matrix follow the caches, too."""
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.exists() else []
    found = dict(line.replace("\t", "").split(":", 1) for line in reversed(lines) if ":" in line)
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    } | {name: found.get(name, "").strip() for name in ("model name", "cpu family", "model", "cache size")}


@contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        curves = {name: curve(name, Path(folder) / str(number)) for number, name in enumerate(RUNS)}
    FILE.write_text(json.dumps({"computed_on": computed_on(), "losses": curves}, indent=1) + "\n")
