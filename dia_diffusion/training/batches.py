"""The batches of a run: which images a process takes at a step, and the random numbers of a step.

Everything here is a function of the seed, the step and the position in the global batch, so that a run can be resumed
at any step and divided among any number of processes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.pixels import EndlessShuffle, PixelDataset
from ..latents.space import LatentDataset
from ..models.memory_format import lay_out
from ..objectives import Objective
from ..options.model import DataOptions
from ..process.signals import forks_end_with_parent, ignore_stops, watch_parent
from ..randomness import step_seed


class StepDraws(NamedTuple):
    """The random numbers of a batch of B images.

    Attributes:
        levels (`Tensor` of shape `(B,)`): Noise levels, in the measure of the objective.
        noise (`Tensor` of shape `(B, C, H, W)`): Standard normal.
        flips (bool `Tensor` of shape `(B,)`): Marks the images to flip, each with probability 0.5.
        label_drops (`Tensor` of shape `(B,)`): Uniform in [0, 1): a label below the dropout rate is dropped.
    """

    levels: Tensor
    noise: Tensor
    flips: Tensor
    label_drops: Tensor

    def rows(self, rows: slice) -> "StepDraws":
        return StepDraws(*(values[rows] for values in self))


def draw_step(
    seed: int, step: int, shape: tuple[int, int, int, int], objective: Objective, device: torch.device | str
) -> StepDraws:
    """Draw the random numbers for the whole global batch `(B, C, H, W)` of a step; each process takes its rows."""
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(step_seed(seed, step))
    return StepDraws(
        objective.draw_levels(shape[0], generator, device),
        torch.randn(shape, generator=generator, device=device),
        torch.rand(shape[:1], generator=generator, device=device) < 0.5,
        torch.rand(shape[:1], generator=generator, device=device),
    )


class BatchPlan(NamedTuple):
    """The division of a step's global batch into micro-batches, and of each micro-batch among the processes.

    Attributes:
        per_process (`int`): Images of a micro-batch on each process.
        micro_batches (`int`): Micro-batches in a step.
        processes, process (`int`): Number of processes, and index of this one.
    """

    per_process: int
    micro_batches: int = 1
    processes: int = 1
    process: int = 0

    @property
    def images(self) -> int:
        """Images in a step: the size of the global batch."""
        return self.per_process * self.micro_batches * self.processes

    def rows(self, micro_batch: int) -> slice:
        """Return the rows of the global batch that this process takes in a micro-batch."""
        first = (micro_batch * self.processes + self.process) * self.per_process
        return slice(first, first + self.per_process)


class Batch(NamedTuple):
    """The arguments of the loss for B images of one process, on its device.

    Attributes:
        images (`Tensor` of shape `(B, C, H, W)`): Pixels in [-1, 1], or latents of about unit variance.
        noise (`Tensor` of shape `(B, C, H, W)`): Standard normal.
        levels (`Tensor` of shape `(B,)`): Noise levels, in the measure of the objective.
        labels (int64 `Tensor` of shape `(B,)`, *optional*): Classes.
        seed (`int`): Seed of the dropout inside of the model.
    """

    images: Tensor
    noise: Tensor
    levels: Tensor
    labels: Tensor | None
    seed: int


def make_loader(
    options: DataOptions,
    data: PixelDataset | LatentDataset,
    plan: BatchPlan,
    seed: int,
    steps: range,
    device: torch.device,
) -> DataLoader:
    """Return a loader of this process's pixels (or latents) and labels, one micro-batch at a time.

    Args:
        steps (`range`): Steps to load for, counted from 1.
        device (`torch.device`): Memory is pinned if it is a GPU.
    """
    rows = [plan.rows(micro_batch) for micro_batch in range(plan.micro_batches)]
    positions = ([(step - 1) * plan.images + row for row in range(r.start, r.stop)] for step in steps for r in rows)
    return DataLoader(
        EndlessShuffle(data, seed, options.center_crop),
        batch_sampler=positions,
        num_workers=options.dataloader_num_workers,
        collate_fn=_keep,  # type: ignore[arg-type]
        worker_init_fn=_prepare_worker,
        pin_memory=device.type == "cuda",
    )


@contextmanager
def running(loader: DataLoader) -> Iterator[Iterator[dict[str, Tensor]]]:
    """Iterate over a loader and end its workers on leaving.

    Without it the workers live until the iterator is collected. If that happens when the interpreter exits, the exit
    waits for them forever.
    """
    with forks_end_with_parent():
        loaded = iter(loader)
    try:
        yield loaded
    finally:
        # The method of torch's iterator with workers; the one without has none.
        getattr(loaded, "_shutdown_workers", lambda: None)()


def _prepare_worker(worker: int) -> None:
    # The main process gets these signals too, and needs the workers to finish its step.
    ignore_stops()
    watch_parent()


def _keep(batch: dict[str, Tensor]) -> dict[str, Tensor]:
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
    """Turn loaded micro-batches into batches for the loss: flip images, draw latents, noise, noise levels and labels.

    The random numbers of a step are drawn for its global batch; each process takes its rows.

    Args:
        loaded (iterator of `dict`): The micro-batches that `make_loader` loads.
        random_flip (`bool`, *optional*, defaults to `False`): Whether half of the images are flipped.
        label_dropout (`float`, *optional*, defaults to 0): Share of labels replaced by "no class".
    """
    shape = (plan.images, data.channels, data.resolution, data.resolution)
    for step in steps:
        posterior = data.draw(seed, step, plan.images, device)
        whole = draw_step(seed, step, shape, objective, device)
        for rows in map(plan.rows, range(plan.micro_batches)):
            draws, batch = whole.rows(rows), next(loaded)
            batch = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
            drawn = None if posterior is None else posterior[rows]
            images = lay_out(data.model_inputs(batch, draws.flips if random_flip else None, drawn))
            labels = None
            if data.num_classes is not None:
                labels = batch["labels"].masked_fill(draws.label_drops < label_dropout, data.num_classes)
            yield Batch(images, draws.noise, draws.levels, labels, step_seed(seed, step, rows.start + 1))
