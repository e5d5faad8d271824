"""This trainer's step against the plain loop of diffusers' training tutorial, alternating between processes.

Same UNet, data, batch and precision; without DIA on either side, and with DIA on this one. The plain loop decodes each
image anew, keeps the default memory format, optimizer and memory allocation, and reads the loss at each step. Ratios
are of speeds, so more than 1 is faster than the plain loop. Also the share of this trainer's step that waits for data,
and the calls of operators in an update: clipping, AdamW, moving average.

    python benchmarks/training_throughput.py [--rounds N] [--processes] [--output RESULT.json]

On a GPU where there is one. `--processes` measures images a second of 1 and 2 processes on a CPU, of 1 to all GPUs
where there are some, instead. Each takes batches of one size, so that twice as many would be twice as fast; on a CPU
they share its cores.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.utils.data import DataLoader

from attention_cost import SIZES, profile_calls
from dia_diffusion import DIAUNet2DModel
from dia_diffusion.data.pixels import PixelDataset
from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.objectives import OBJECTIVES
from dia_diffusion.options.model import DataOptions
from dia_diffusion.options.objective import OptimisationOptions
from dia_diffusion.process.distributed import make_state
from dia_diffusion.process.startup import available_cores, tune_process
from dia_diffusion.training.batches import BatchPlan, make_loader, prepare_batches
from dia_diffusion.training.loop import accumulate_gradients
from dia_diffusion.training.state import TrainingState
from measuring import alternate, read_arguments, row, save_result, serve_rounds, spread, start_workers

IMAGES, STEPS_A_ROUND = 512, 2
RESOLUTION = 32
SIZE = "32x32"
# Steps of each process: the warm-up, and those that are timed.
WARM_UP, STEPS = 2, 4
PLAIN, OURS, WITH_DIA = "plain loop", "this trainer, no DIA", "this trainer, DIA"
# The attention of a side, none at all for diffusers' UNet in the plain loop, and whether it is compiled.
SIDES = {PLAIN: (None, False), OURS: ("none", False), WITH_DIA: ("lstm", False)}
COMPILED = {f"{side}, compiled": (SIDES[side][0], True) for side in (PLAIN, WITH_DIA)}


def make_images() -> datasets.Dataset:
    """Make a data set of photograph-like noise of 32x32 pixels, as PNG files."""
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (IMAGES, 8, 8, 3), dtype=np.uint8)
    images = [Image.fromarray(image).resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC) for image in small]
    return datasets.Dataset.from_dict({"image": images}, datasets.Features(image=datasets.Image()))


def plain_loop(
    dataset: datasets.Dataset, unet: dict[str, Any], batch_size: int, precision: str, compiled: bool
) -> Iterator[None]:
    """Run the loop of the tutorial: a training step each time the generator is advanced."""

    def transform(examples: dict) -> dict:
        images = []
        for image in examples["image"]:
            image = image.convert("RGB").resize((RESOLUTION, RESOLUTION))
            tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
            images.append((tensor.flip(-1) if torch.rand(()) < 0.5 else tensor) * 2 - 1)
        return {"images": images}

    loader = DataLoader(dataset.with_transform(transform), batch_size=batch_size, shuffle=True, drop_last=True)
    accelerator = Accelerator(mixed_precision=precision)
    device = accelerator.device
    model = UNet2DModel(**unet).to(device)
    call = torch.compile(model) if compiled else model
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, 500, 10_000)
    while True:
        for batch in loader:
            clean = batch["images"].to(device)
            noise = torch.randn(clean.shape, device=device)
            timesteps = torch.randint(0, 1000, (len(clean),), device=device, dtype=torch.int64)
            noisy = scheduler.add_noise(clean, noise, timesteps)
            with accelerator.autocast():
                prediction = call(noisy, timesteps, return_dict=False)[0]
            loss = F.mse_loss(prediction.float(), noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            loss.detach().item()
            yield


def this_trainer(
    data: PixelDataset,
    unet: dict[str, Any],
    batch_size: int,
    precision: str,
    attention: str,
    waiting: list[float],
    **options: Any,
) -> Iterator[None]:
    """Train with this trainer and further `options` of its optimisation; note the seconds each step waits for data."""
    accelerator = Accelerator(mixed_precision=precision)
    model = DIAUNet2DModel(**unet, dia_attention=attention)
    training = TrainingState(OptimisationOptions(**options), accelerator, model, 10_000)
    objective = OBJECTIVES["ddpm"]()
    plan = BatchPlan(batch_size, 1, accelerator.num_processes, accelerator.process_index)
    steps, device = range(1, 10_001), accelerator.device
    loader = iter(make_loader(DataOptions(), data, plan, 0, steps, device))

    def timed() -> Iterator[dict]:
        while True:
            start = time.perf_counter()
            batch = next(loader)
            waiting.append(time.perf_counter() - start)
            yield batch

    batches = prepare_batches(timed(), data, plan, 0, steps, device, objective, random_flip=True)
    for step in steps:
        accumulate_gradients(training, objective, batches, plan.micro_batches)
        training.update(step)
        yield


def update_rows() -> list[dict]:
    """Return the calls of a step outside of its forward and backward pass: clipping, optimizer and moving average."""
    unet = SIZES[SIZE][0]
    network = DIAUNet2DModel(**unet, dia_attention="none")
    training = TrainingState(OptimisationOptions(use_ema=True), Accelerator(cpu=True), network, 10_000)
    model = UNet2DModel(**unet)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, 500, 10_000)
    average = EMAModel(model.parameters())

    def plain_update(_: int) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        average.step(model.parameters())

    calls = {}
    for name, network, update in ((PLAIN, model, plain_update), (OURS, training.unet, training.update)):
        for step in (1, 2):
            for parameter in network.parameters():
                parameter.grad = torch.ones_like(parameter)
            _, calls[name] = profile_calls(partial(update, step))
    case, ratio = f"update with EMA, {SIZE}", spread([calls[OURS]], [calls[PLAIN]])
    return [
        row(f"{case}, {PLAIN}", calls[PLAIN], "calls"),
        row(f"{case}, {OURS}", calls[OURS], "calls", f"calls of the {PLAIN}", ratio),
    ]


def work(side: str, size: str, batch_size: int, precision: str) -> None:
    """Measure one side, in a process of its own."""
    unet, images = SIZES[size][0], make_images()
    attention, compiled = (SIDES | COMPILED)[side]
    waiting: list[float] = []
    if attention is None:
        loop = plain_loop(images, unet, batch_size, precision, compiled)
    else:
        tune_process()
        data = prepare_pixels(images, RESOLUTION)
        loop = this_trainer(data, unet, batch_size, precision, attention, waiting, compile=compiled)

    def run_round() -> float:
        waiting.clear()
        for _ in range(STEPS_A_ROUND):
            next(loop)
        return sum(waiting)

    serve_rounds(run_round)


def measure(
    size: str, rounds: int, batch_size: int | None = None, precision: str = "no", compiled: bool = False
) -> list[dict]:
    """Return the rows of a size of 32x32 pixels.

    Args:
        size (`str`): One of `attention_cost.SIZES`.
        rounds (`int`): Rounds of the alternation.
        batch_size (`int`, *optional*): Images in a batch, by default those of the size.
        precision (`str`, *optional*, defaults to `"no"`): Mixed precision, as accelerate names it.
        compiled (`bool`, *optional*, defaults to `False`): Whether to measure both loops compiled, too.
    """
    batch_size = batch_size or SIZES[size][1]
    waiting: dict[str, list[float]] = {side: [] for side in (*SIDES, *(COMPILED if compiled else ()))}

    sides = {side: [side, size, str(batch_size), precision] for side in waiting}
    with start_workers(__file__, sides) as rounds_of:
        runs = {side: lambda side=side, run=run: waiting[side].append(run()) for side, run in rounds_of.items()}
        times = alternate(runs, rounds)

    case = f"training, {size}, batch {batch_size}"
    rows = [row(f"{case}, {PLAIN}", 1e3 * statistics.median(times[PLAIN]) / STEPS_A_ROUND, "ms/step")]
    pairs = [(side, PLAIN) for side in times if side != PLAIN]
    if compiled:
        pairs.append(tuple(reversed(COMPILED)))
    for side, other in pairs:
        value, ratio = 1e3 * statistics.median(times[side]) / STEPS_A_ROUND, spread(times[other], times[side])
        rows.append(row(f"{case}, {side}", value, "ms/step", f"speed of the {other}", ratio))
    # The first round does not count.
    shares = [waited / seconds for waited, seconds in zip(waiting[OURS][1:], times[OURS], strict=True)]
    return [*rows, row(f"{case}, {OURS}, waiting for data", 100 * statistics.median(shares), "% of the step")]


def train_together() -> None:
    """Train in one of several processes, and print how many there are and the images a second of all together."""
    state = make_state()
    on_cpu = state.device.type == "cpu"
    if on_cpu:
        torch.set_num_threads(max(available_cores() // state.num_processes, 1))
    unet, batch_size, _ = SIZES[SIZE]
    data = prepare_pixels(make_images(), RESOLUTION)
    loop = this_trainer(data, unet, batch_size, "no" if on_cpu else "bf16", "lstm", [])
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            start = _wait(state)
        next(loop)
    speed = STEPS * batch_size * state.num_processes / (_wait(state) - start)
    if state.is_main_process:
        print(json.dumps([state.num_processes, speed]), flush=True)


def _wait(state: PartialState) -> float:
    """Wait for all processes and devices, and return the time."""
    if state.device.type == "cuda":
        torch.cuda.synchronize()
    state.wait_for_everyone()
    return time.perf_counter()


def measure_processes(rounds: int) -> list[dict]:
    """Return the rows of training with several processes."""
    counts = list(range(1, torch.cuda.device_count() + 1)) or [1, 2]
    speeds: dict[int, list[float]] = {count: [] for count in counts}
    # Without a GPU accelerate takes processes for one group only if it is told to use the CPU.
    environment = os.environ | ({} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "True"})

    def run(count: int) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        done = subprocess.run([*launcher, __file__, "--side"], check=True, text=True, env=environment, **pipes)
        found, speed = json.loads(done.stdout.splitlines()[-1])
        if found != count:
            raise RuntimeError(f"{count} processes were started, and accelerate sees {found}.")
        speeds[count].append(speed)

    alternate({str(count): partial(run, count) for count in counts}, rounds, warm_up=0)
    rows = []
    for count in counts:
        ratio = None if count == counts[0] else spread(speeds[count], speeds[counts[0]])
        case = f"training, {SIZE}, processes: {count}"
        rows.append(row(case, statistics.median(speeds[count]), "images/s", f"speed of {counts[0]}", ratio))
    return rows


def main() -> int:
    if sys.argv[1:] == ["--side"]:
        train_together()
        return 0
    if sys.argv[1:2] == ["--side"]:
        side, size, batch_size, precision = sys.argv[2:]
        work(side, size, int(batch_size), precision)
        return 0
    options = read_arguments(
        __doc__, "training_throughput", rounds=9, **{"--processes": "measure several processes instead"}
    )
    rows = measure_processes(options.rounds) if options.processes else measure(SIZE, options.rounds) + update_rows()
    save_result(options.output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
