"""The gates of all blocks over the steps of a sampling, as a heat map.

Images while they are made: each step of the sampling as it is done, with the gates of the attention."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from queue import Queue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..errors import UsageError
from ..models.unet import DIAUNet2DModel
from ..pipelines.pipeline_dia_unet import DIAUNetPipeline
from ..sampling.numbered import check_sampling, image_generators
from ..sampling.schedulers import make_scheduler

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_TICKS = 12


# Of the noise of a variant, the share (in angle) that is its own.
_VARIATION = 0.4
# Seeds of what makes variants differ: far from those that people choose.
_VARIATION_SEEDS = 2**40


@dataclass(frozen=True)
class Request:
    """What is to be made. With the same seed, numbers and settings the images are those of `dia sample`.

    Args:
        numbers (tuple of `int`): Which images of the seed.
        seed, steps (`int`), scheduler (`str`, *optional*), guidance_scale (`float`): As for `dia sample`.
        class_label (`int`, *optional*): The class of all; by default a class-conditional model takes its classes in
            turn.
        variation (`int`, *optional*, defaults to 0): A number above 0 moves the noise of each image but the first a
            little, each number in other directions.
    """

    numbers: tuple[int, ...]
    seed: int = 0
    steps: int = 25
    scheduler: str | None = None
    guidance_scale: float = 1.0
    class_label: int | None = None
    variation: int = 0

    def again(self) -> "Request":
        """The same from the next seed."""
        return replace(self, seed=self.seed + 1, variation=0)

    def vary(self, which: int | None = None) -> "Request":
        """Variants of the image at this place, or of each."""
        if which is None:
            return replace(self, variation=self.variation + 1)
        return replace(self, numbers=(self.numbers[which],) * len(self.numbers), variation=self.variation + 1)


@dataclass(frozen=True)
class Moment:
    """What there is after a step.

    Attributes:
        step, steps (`int`): How many of how many are done.
        timestep (`float`): Of the noise that the UNet was told.
        images (`Callable`): Gives them as they are now: uint8 `(B, C, H, W)` on the CPU. `None` where they were let go.
        gates (`dict`): For each block the mean gate, and their standard deviation, over images and channels; empty
            without attention.
        last (`bool`): Whether the images are those that were asked for.
    """

    step: int
    steps: int
    timestep: float
    images: Callable[[], Tensor] | None
    gates: dict[str, tuple[float, float]]
    last: bool = False

    def without_images(self) -> "Moment":
        return replace(self, images=None)


class Maker:
    """Makes images with a pipeline, one request at a time: a new one stops the one before.

    Args:
        pipeline (`DiffusionPipeline`): A DIAUNetPipeline, or another of diffusers that has nothing but a UNet2DModel
            and a scheduler.

    Raises:
        UsageError: for other pipelines.
    """

    def __init__(self, pipeline: DiffusionPipeline):
        if not isinstance(pipeline, DIAUNetPipeline):
            check_sampling(pipeline, steps=1)
            if set(pipeline.components) != {"unet", "scheduler"}:
                raise UsageError(f"{type(pipeline).__name__} makes no images step by step that could be shown here.")
            pipeline = DIAUNetPipeline(pipeline.unet, pipeline.scheduler).to(pipeline.device)
        self.pipeline = pipeline
        self._own = pipeline.scheduler
        self._plain: DIAUNetPipeline | None = None
        self._lock = threading.Lock()
        self._at_work: tuple[threading.Event, threading.Thread] | None = None

    @property
    def has_attention(self) -> bool:
        return getattr(self.pipeline.unet, "dia", None) is not None

    def make(self, request: Request) -> Iterator[Moment]:
        """Makes the images; to stop, close the iterator.

        Raises:
            UsageError: in the words of the pipeline, for what it cannot do.
        """
        return self._run(self.pipeline, request)

    def make_without_attention(self, request: Request) -> Iterator[Moment]:
        """The same with all gates at 1."""
        if not self.has_attention:
            raise UsageError("this model has no attention that could be taken off.")
        if self._plain is None:
            unet = self.pipeline.unet.to_unet().to(memory_format=torch.channels_last).eval()
            self._plain = DIAUNetPipeline(**self.pipeline.components | {"unet": unet})
        return self._run(self._plain, request)

    def _run(self, pipeline: DIAUNetPipeline, request: Request) -> Iterator[Moment]:
        moments: Queue[Moment | BaseException | None] = Queue()
        stop = threading.Event()

        def work() -> None:
            try:
                self._sample(pipeline, request, moments.put, stop)
                moments.put(None)
            except BaseException as error:  # It is raised where the moments are taken.
                moments.put(error)

        thread = threading.Thread(target=work, daemon=True)
        with self._lock:
            # What nobody listens to any more, as after a click on Stop, may still be at work.
            self._stop()
            self._at_work = stop, thread
            thread.start()
        try:
            while (moment := moments.get()) is not None:
                if isinstance(moment, BaseException):
                    raise moment
                yield moment
        finally:
            stop.set()
            thread.join()

    def _stop(self) -> None:
        if self._at_work is not None:
            stop, thread = self._at_work
            stop.set()
            thread.join()

    def _sample(
        self, pipeline: DIAUNetPipeline, request: Request, tell: Callable[[Moment], None], stop: threading.Event
    ) -> None:
        config, own = self._own.config, request.scheduler is None
        pipeline.scheduler = self._own if own else make_scheduler(request.scheduler, config)
        check_sampling(pipeline, request.steps)
        pipeline.set_progress_bar_config(disable=True)
        generators = image_generators(request.seed, request.numbers, "cpu")
        unet = pipeline.unet
        recording = unet.record_attention_maps() if isinstance(unet, DIAUNet2DModel) and unet.dia else nullcontext({})

        with recording as maps:

            def follow(_: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
                latents, steps = tensors["latents"], len(pipeline.scheduler.timesteps)
                # With guidance the batch is there twice, first with its classes.
                gates = {name: gate[: len(latents)].float() for name, gate in maps.items()}
                spread = {name: (gate.mean().item(), gate.std(correction=0).item()) for name, gate in gates.items()}
                pipeline._interrupt = stop.is_set()
                tell(Moment(index + 1, steps, float(timestep), lambda: show_latents(pipeline, latents), spread))
                return {}

            images = pipeline(
                batch_size=len(request.numbers),
                num_inference_steps=request.steps,
                generator=generators,
                latents=vary_noise(pipeline, request, generators) if request.variation else None,
                output_type="np",
                callback_on_step_end=follow,
                **_class_arguments(pipeline, request),
            ).images
        if stop.is_set():
            raise UsageError("another request has taken the place of this one.")
        last = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).mul(255).round().to(torch.uint8)
        steps = len(pipeline.scheduler.timesteps)
        tell(Moment(steps, steps, 0.0, lambda: last, {}, last=True))


def _class_arguments(pipeline: DIAUNetPipeline, request: Request) -> dict[str, Any]:
    classes = pipeline.null_class
    arguments = {} if request.guidance_scale == 1.0 else {"guidance_scale": request.guidance_scale}
    if request.class_label is not None:
        # A label for each image: where the model has no classes, the pipeline says so.
        return arguments | {"class_labels": [request.class_label] * len(request.numbers)}
    return arguments | ({"class_labels": [number % classes for number in request.numbers]} if classes else {})


def vary_noise(pipeline: DIAUNetPipeline, request: Request, generators: list[torch.Generator]) -> Tensor:
    """Noise `(B, C, H, W)` near that of each image, standard normal as well: z cos(a) + z' sin(a).

    It takes from the generators what the pipeline would have taken, so that what they give later is the same.
    """
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (1, pipeline.unet.config.in_channels, height, width)
    others = image_generators(_VARIATION_SEEDS + request.variation, range(len(request.numbers)), "cpu")
    angle = _VARIATION * math.pi / 2
    noise = []
    for place, (generator, other) in enumerate(zip(generators, others, strict=True)):
        mine, more = (torch.randn(shape, generator=one) for one in (generator, other))
        noise.append(mine if place == 0 else math.cos(angle) * mine + math.sin(angle) * more)
    return torch.cat(noise)


def show_latents(pipeline: DIAUNetPipeline, latents: Tensor) -> Tensor:
    """What noisy latents look like: uint8 `(B, C, H, W)` on the CPU.

    Some samplers count noise in units of the image's, up to a hundred of them: it is brought down to about the range
    that is seen.
    """
    spread = latents.flatten(1).std(dim=1).clamp(min=1.0).view(-1, 1, 1, 1)
    with torch.no_grad():
        images = pipeline.decode(latents / spread)
    return (images.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).cpu()


def gate_table(moments: Sequence[Moment]) -> tuple[list[str], list[float], np.ndarray]:
    """The blocks, the timesteps, and mean and standard deviation of the gates: `(2, blocks, timesteps)`."""
    seen = [moment for moment in moments if moment.gates]
    blocks = list(seen[0].gates)
    figures = np.array([[moment.gates[block] for moment in seen] for block in blocks])
    return blocks, [moment.timestep for moment in seen], figures.transpose(2, 0, 1)


def draw_gates(moments: Sequence[Moment]) -> "Figure":
    """Mean gate and its spread over images and channels: a row for each block in order of execution, a column for each
    step, from noise to image."""
    from matplotlib.figure import Figure

    blocks, timesteps, (mean, spread) = gate_table(moments)
    figure = Figure(figsize=(11, 1.6 + 0.24 * len(blocks)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    # A gate of 1 changes nothing: it has the neutral colour.
    far = max(np.abs(mean - 1).max(), 1e-3)
    ticks = range(0, len(timesteps), -(-len(timesteps) // _MOST_TICKS))
    for axis, values, title, style in (
        (left, mean, "mean gate", {"cmap": "coolwarm", "vmin": 1 - far, "vmax": 1 + far}),
        (right, spread, "spread of the gates (standard deviation)", {"cmap": "viridis", "vmin": 0}),
    ):
        shown = axis.imshow(values, aspect="auto", interpolation="nearest", **style)
        axis.set(title=title, xlabel="timestep: from noise to image")
        axis.set_xticks(list(ticks), [f"{timesteps[tick]:.4g}" for tick in ticks])
        figure.colorbar(shown, ax=axis)
    left.set_yticks(range(len(blocks)), blocks)
    return figure
