"""Images a second of training with more processes: 1 and 2 on a CPU, 1 to all GPUs where there are some.

Each process takes batches of one size, so that twice as many would be twice as fast; on a CPU they share its cores.

    python benchmarks/scaling.py [--rounds N] [--output RESULT.json]
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import time

import torch
from accelerate import PartialState

from attention_cost import SIZES
from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.process.distributed import make_state
from dia_diffusion.process.startup import available_cores
from measuring import alternate, read_arguments, row, save_result, spread
from training_throughput import RESOLUTION, make_images, this_trainer

SIZE = "32x32"
_STEPS, _WARM_UP = 4, 2


def train() -> float:
    """Images a second of all processes together, in one of them."""
    state = make_state()
    if state.device.type == "cpu":
        torch.set_num_threads(max(available_cores() // state.num_processes, 1))
    unet, batch_size, _ = SIZES[SIZE]
    data = prepare_pixels(make_images(), RESOLUTION)
    loop = this_trainer(data, unet, batch_size, "no" if state.device.type == "cpu" else "bf16", "lstm", [])
    for _ in range(_WARM_UP):
        next(loop)
    start = _now(state)
    for _ in range(_STEPS):
        next(loop)
    return _STEPS * batch_size * state.num_processes / (_now(state) - start)


def _now(state: PartialState) -> float:
    """The time when all processes and devices have come so far."""
    if state.device.type == "cuda":
        torch.cuda.synchronize()
    state.wait_for_everyone()
    return time.perf_counter()


def in_processes(count: int) -> float:
    """Images a second with so many processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command = [*launcher, __file__, "--side"]
    # Without a GPU accelerate takes processes for one group only if it is told to use the CPU.
    environment = os.environ | ({} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "True"})
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ).stdout
    found, speed = json.loads(output.splitlines()[-1])
    if found != count:
        raise RuntimeError(f"{count} processes were started, and accelerate sees {found}.")
    return speed


def measure(counts: list[int], rounds: int) -> list[dict]:
    """The rows of these numbers of processes."""
    speeds: dict[int, list[float]] = {count: [] for count in counts}

    def run(count: int) -> None:
        speeds[count].append(in_processes(count))

    alternate({str(count): functools.partial(run, count) for count in counts}, rounds, warm_up=0)
    return [
        row(
            f"training, {SIZE}, processes: {count}",
            statistics.median(speeds[count]),
            "images/s",
            f"speed of {counts[0]}",
            None if count == counts[0] else spread(speeds[count], speeds[counts[0]]),
        )
        for count in counts
    ]


def main() -> int:
    if sys.argv[1:2] == ["--side"]:
        speed, state = train(), make_state()
        if state.is_main_process:
            print(json.dumps([state.num_processes, speed]), flush=True)
        return 0
    options = read_arguments(__doc__, "scaling", rounds=3)
    counts = list(range(1, torch.cuda.device_count() + 1)) or [1, 2]
    save_result(options.output, measure(counts, options.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
