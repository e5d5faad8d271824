"""The randomness of a step, as a function of the seed and the step.

The batches of a run: which images a process takes at a step, and all that is random about them."""

import math
import signal
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.pixels import EndlessShuffle, PixelDataset
from ..latents.space import LatentDataset
from ..objectives import Objective
from ..options.data import DataOptions
from ..randomness import step_seed


class StepDraws(NamedTuple):
    """What is random about a batch of B images."""

    levels: Tensor  # how far each is noised, as its objective has it, (B,)
    noise: Tensor  # (B, C, H, W), standard normal
    flips: Tensor  # bool (B,)
    label_drops: Tensor  # uniform in [0, 1), (B,)

    def rows(self, rows: slice) -> "StepDraws":
        return StepDraws(*(values[rows] for values in self))


def draw_step(
    seed: int, step: int, shape: tuple[int, int, int, int], objective: Objective, device: torch.device | str
) -> StepDraws:
    """Draws for the whole global batch `(B, C, H, W)` of a step, of which each process takes its rows."""
    generator = torch.Generator(device).manual_seed(step_seed(seed, step))
    arguments = {"generator": generator, "device": device}
    return StepDraws(
        objective.draw_levels(shape[0], **arguments),
        torch.randn(shape, **arguments),
        torch.rand(shape[:1], **arguments) < 0.5,
        torch.rand(shape[:1], **arguments),
    )


class BatchPlan(NamedTuple):
    """How the global batch of a step is divided: into micro-batches, and each of these among the processes.

    Attributes:
        per_process (`int`): Images that a process takes at a time.
        micro_batches (`int`): Micro-batches in a step.
        processes, process (`int`): How many processes there are, and which this one is.
    """

    per_process: int
    micro_batches: int = 1
    processes: int = 1
    process: int = 0

    @property
    def images(self) -> int:
        """Images in a step."""
        return self.per_process * self.micro_batches * self.processes

    def rows(self, micro: int) -> slice:
        """The positions in the global batch that this process takes in a micro-batch."""
        first = (micro * self.processes + self.process) * self.per_process
        return slice(first, first + self.per_process)


class Batch(NamedTuple):
    """What the loss is computed from, for B images of one process, on its device."""

    images: Tensor  # in [-1, 1], or latents of about unit variance, (B, C, H, W)
    noise: Tensor  # (B, C, H, W), standard normal
    levels: Tensor  # of the noise, as the objective has it, (B,)
    labels: Tensor | None  # int64 (B,)
    seed: int  # of what is random inside of the model


def measure_std(data: PixelDataset | LatentDataset, most: int = 10_000) -> float:
    """The standard deviation of what a model sees, pixels in [-1, 1] or latents, of up to `most` images that are spread
    evenly over the data."""
    count, sums = min(len(data), most), torch.zeros(3, dtype=torch.float64)
    for start in range(0, count, 500):
        rows = [number * len(data) // count for number in range(start, min(start + 500, count))]
        seen = data.model_inputs(data.fetch(rows), draws=data.draw(0, start, len(rows))).double()
        sums += torch.stack([torch.tensor(seen.numel()), seen.sum(), seen.square().sum()])
    number, total, squares = sums.tolist()
    return math.sqrt(max(squares / number - (total / number) ** 2, 0.0))


def make_loader(
    options: DataOptions,
    data: PixelDataset | LatentDataset,
    plan: BatchPlan,
    seed: int,
    steps: range,
    device: torch.device,
) -> DataLoader:
    """The pixels (or latents) and labels of this process, micro-batch by micro-batch, for steps counted from 1."""
    rows = [plan.rows(micro) for micro in range(plan.micro_batches)]
    positions = ([(step - 1) * plan.images + row for row in range(r.start, r.stop)] for step in steps for r in rows)
    return DataLoader(
        EndlessShuffle(data, seed, options.center_crop),
        batch_sampler=positions,
        num_workers=options.dataloader_num_workers,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_signals_to_the_main_process,
        pin_memory=device.type == "cuda",
    )


def _leave_signals_to_the_main_process(worker: int) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def _as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


def prepare_batches(
    loaded: Iterator[dict[str, Tensor]],
    data: PixelDataset | LatentDataset,
    plan: BatchPlan,
    seed: int,
    steps: range,
    device: torch.device,
    objective: Objective,
    random_flip: bool = False,
    label_dropout: float = 0.0,
) -> Iterator[Batch]:
    """Makes batches of what `make_loader` loads: flipped where asked for, latents drawn from their posterior, with
    noise and its levels.

    What is random about a step is drawn for its global batch, of which each process takes its rows.
    """
    shape = (plan.images, data.channels, data.resolution, data.resolution)
    for step in steps:
        posterior = data.draw(seed, step, plan.images, device)
        whole = draw_step(seed, step, shape, objective, device)
        for rows in map(plan.rows, range(plan.micro_batches)):
            draws, batch = whole.rows(rows), next(loaded)
            batch = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
            drawn = None if posterior is None else posterior[rows]
            images = data.model_inputs(batch, draws.flips if random_flip else None, drawn)
            images = images.contiguous(memory_format=torch.channels_last)
            labels = None
            if data.num_classes is not None:
                labels = batch["labels"].masked_fill(draws.label_drops < label_dropout, data.num_classes)
            yield Batch(images, draws.noise, draws.levels, labels, step_seed(seed, step, rows.start + 1))
