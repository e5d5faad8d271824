"""How long the command line takes to start, beside the imports that it cannot do without.

Each in a process of its own, in turn; sampling with a UNet of the digits' size and one denoising step.

    python benchmarks/startup.py [--rounds N] [--output RESULT.json]
"""

import functools
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from diffusers import DDIMScheduler

from attention_cost import SIZES
from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from measuring import alternate, read_arguments, row, save_result, spread

TORCH = "import torch"
DIA_COMMAND = [sys.executable, "-m", "dia_diffusion.cli"]


def make_commands(folder: Path) -> dict[str, list[str]]:
    """What is timed, by name; makes the pipeline to sample from."""
    model = folder / "model"
    DIAUNetPipeline(DIAUNet2DModel(**SIZES["digits"][0]), DDIMScheduler()).save_pretrained(model)
    imports = (TORCH, "from diffusers import DDIMPipeline", "import dia_diffusion")
    sample = [
        "sample",
        str(model),
        "--num_images",
        "1",
        "--steps",
        "1",
        "--output_dir",
        str(folder / "out"),
        "--overwrite",
    ]
    return {name: [sys.executable, "-c", name] for name in imports} | {
        "dia --help": [*DIA_COMMAND, "--help"],
        "dia sample, one image": DIA_COMMAND + sample,
    }


def main() -> int:
    options = read_arguments(__doc__, "startup", rounds=7)
    run = functools.partial(subprocess.run, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as folder:
        commands = make_commands(Path(folder))
        times = alternate({name: functools.partial(run, command) for name, command in commands.items()}, options.rounds)
    rows = [
        row(
            f"start, {name}",
            statistics.median(seconds),
            "s",
            f"time of {TORCH}",
            None if name == TORCH else spread(seconds, times[TORCH]),
        )
        for name, seconds in times.items()
    ]
    save_result(options.output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
