"""This trainer's step against the plain loop of diffusers' training tutorial, alternating between two processes.

Same UNet (no DIA on either side), data, batch and precision (float32). The plain loop decodes each image anew, keeps
the default memory format, optimizer and memory allocation, and reads the loss at each step. Also prints the share of
this trainer's step that is spent waiting for data, and its speed with DIA on.

    python benchmarks/training_throughput.py [RESULT.json]

On a GPU where there is one.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dia_diffusion.config import TrainingConfig
from dia_diffusion.pixels import prepare_pixels
from dia_diffusion.presets import build_unet
from dia_diffusion.process import tune_process
from dia_diffusion.training import _make_loader, _train_step
from dia_diffusion.training_state import TrainingState

IMAGES, ROUNDS, STEPS_A_ROUND = 512, 9, 2
SIZE, BATCH = 32, 16
PLAIN = "plain loop"
UNET = {
    "sample_size": SIZE,
    "block_out_channels": (64, 128, 128),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D",) * 3,
    "up_block_types": ("UpBlock2D",) * 3,
}


def make_images() -> datasets.Dataset:
    """Photograph-like noise of 32x32 pixels, as PNG files in a data set."""
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (IMAGES, 8, 8, 3), dtype=np.uint8)
    images = [Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for image in small]
    return datasets.Dataset.from_dict({"image": images}, datasets.Features(image=datasets.Image()))


def plain_loop(dataset: datasets.Dataset) -> Iterator[None]:
    """The loop of the tutorial, a step each time it is asked for one."""

    def transform(examples: dict) -> dict:
        images = []
        for image in examples["image"]:
            image = image.convert("RGB").resize((SIZE, SIZE))
            tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
            images.append((tensor.flip(-1) if torch.rand(()) < 0.5 else tensor) * 2 - 1)
        return {"images": images}

    loader = DataLoader(dataset.with_transform(transform), batch_size=BATCH, shuffle=True, drop_last=True)
    device = Accelerator().device
    model = UNet2DModel(**UNET).to(device)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, 500, 10_000)
    while True:
        for batch in loader:
            clean = batch["images"].to(device)
            noise = torch.randn(clean.shape, device=device)
            timesteps = torch.randint(0, 1000, (len(clean),), device=device, dtype=torch.int64)
            noisy = scheduler.add_noise(clean, noise, timesteps)
            prediction = model(noisy, timesteps, return_dict=False)[0]
            loss = F.mse_loss(prediction, noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            loss.detach().item()
            yield


def this_trainer(dataset: datasets.Dataset, attention: str, waiting: list[float]) -> Iterator[None]:
    """The step of this trainer; notes the seconds that each step waits for data."""
    config = TrainingConfig(
        resolution=SIZE,
        train_batch_size=BATCH,
        random_flip=True,
        block_out_channels=list(UNET["block_out_channels"]),
        dia_attention=attention,
    )
    accelerator = Accelerator()
    data = prepare_pixels(dataset, SIZE)
    training = TrainingState(config, accelerator, build_unet(config, data.channels, None), 10_000)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    loader = iter(_make_loader(config, data, accelerator, 0, 10_000))

    def timed() -> Iterator[dict]:
        while True:
            start = time.perf_counter()
            batch = next(loader)
            waiting.append(time.perf_counter() - start)
            yield batch

    batches, step = timed(), 0
    while True:
        step += 1
        _train_step(training, scheduler, data, batches, BATCH, step)
        yield


def work(side: str) -> None:
    """One side, in a process of its own: times a round of steps for each line that it is sent."""
    waiting: list[float] = []
    if side == PLAIN:
        loop = plain_loop(make_images())
    else:
        tune_process()
        loop = this_trainer(make_images(), side, waiting)
    next(loop)
    for _ in sys.stdin:
        waiting.clear()
        start = time.perf_counter()
        for _ in range(STEPS_A_ROUND):
            next(loop)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        elapsed = (time.perf_counter() - start) / STEPS_A_ROUND
        print(json.dumps({"seconds": elapsed, "waiting": sum(waiting) / STEPS_A_ROUND}), flush=True)


def main() -> int:
    if sys.argv[1:2] == ["--side"]:
        work(sys.argv[2])
        return 0
    sides = (PLAIN, "none", "lstm")
    workers = {
        side: subprocess.Popen(
            [sys.executable, __file__, "--side", side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for side in sides
    }
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in tqdm(range(ROUNDS), desc="Rounds"):
        for side, worker in workers.items():
            worker.stdin.write("go\n")
            worker.stdin.flush()
            rounds[side].append(json.loads(worker.stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    result = {"device": device, "milliseconds": {}, "speed relative to the plain loop": {}}
    for side, figures in rounds.items():
        result["milliseconds"][side] = round(1e3 * statistics.median(f["seconds"] for f in figures), 1)
        ratios = sorted(p["seconds"] / f["seconds"] for p, f in zip(rounds[PLAIN], figures, strict=True))
        summary = {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]}
        result["speed relative to the plain loop"][side] = {key: round(value, 3) for key, value in summary.items()}
    share = statistics.median(f["waiting"] / f["seconds"] for f in rounds["none"])
    result["share of the step spent waiting for data"] = round(share, 5)
    print(json.dumps(result, indent=2))
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
