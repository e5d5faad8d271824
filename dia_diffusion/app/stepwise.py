"""Images while they are denoised: a snapshot after each step, with the gates of the attention."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from queue import Queue
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..errors import UsageError
from ..models.memory_format import lay_out
from ..models.unet import DIAUNet2DModel
from ..pipelines.pipeline_dia_unet import DIAUNetPipeline
from ..sampling.generation import (
    check_inputs,
    check_pictures,
    check_sampling,
    check_scheduler,
    image_generators,
    to_uint8,
)
from ..sampling.schedulers import make_scheduler

# The angle between the noise of an image and that of its variant, as a share of a right angle.
_VARIATION = 0.4
# Seeds of the variants' own noise: far from those that people choose.
_VARIATION_SEEDS = 2**40


@dataclass(frozen=True)
class Request:
    """Images to make. With the same seed, numbers and settings they are those of `dia sample`.

    Args:
        numbers (tuple of `int`): The numbers of the images.
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
        """Return the same request with the next seed."""
        return replace(self, seed=self.seed + 1, variation=0)

    def vary(self, index: int | None = None) -> "Request":
        """Return a request for variants of the image at this index, or of each."""
        if index is None:
            return replace(self, variation=self.variation + 1)
        return replace(self, numbers=(self.numbers[index],) * len(self.numbers), variation=self.variation + 1)


@dataclass(frozen=True)
class Snapshot:
    """The state of a sampling after a step.

    Attributes:
        step, steps (`int`): Steps done, and steps in all.
        timestep (`float`): The timestep that the UNet was given.
        images (`Callable`): Returns the images as they are now: uint8 `(B, C, H, W)` on the CPU. `None` if dropped.
        gates (`dict`): For each block the mean and the standard deviation of its gates over images and channels; empty
            without attention.
        last (`bool`): Whether these are the finished images.
    """

    step: int
    steps: int
    timestep: float
    images: Callable[[], Tensor] | None
    gates: dict[str, tuple[float, float]]
    last: bool = False

    def without_images(self) -> "Snapshot":
        """Return the snapshot without its images, which hold the latents in memory."""
        return replace(self, images=None)


class StepwiseSampler:
    """Sample from a pipeline step by step, one request at a time: a new one stops the one before.

    Args:
        pipeline (`DiffusionPipeline`): A DIAUNetPipeline, or another of diffusers that has nothing but a UNet2DModel
            and a scheduler.

    Raises:
        UsageError: for other pipelines.
    """

    def __init__(self, pipeline: DiffusionPipeline):
        if not isinstance(pipeline, DIAUNetPipeline):
            check_inputs(pipeline)
            if set(pipeline.components) != {"unet", "scheduler"}:
                raise UsageError(f"a {type(pipeline).__name__} cannot be shown: choose an unconditional pipeline.")
            pipeline = DIAUNetPipeline(pipeline.unet, pipeline.scheduler).to(pipeline.device)
        check_scheduler(pipeline)
        check_pictures(pipeline)
        self.pipeline = pipeline
        self._own = pipeline.scheduler
        self._plain: DIAUNetPipeline | None = None
        self._lock = threading.Lock()
        self._at_work: tuple[threading.Event, threading.Thread] | None = None

    @property
    def has_attention(self) -> bool:
        """Return whether the UNet has shared attention."""
        return getattr(self.pipeline.unet, "dia", None) is not None

    def sample(self, request: Request) -> Iterator[Snapshot]:
        """Make the images; to stop, close the iterator.

        Raises:
            UsageError: if the pipeline refuses the request, or another request takes its place.
        """
        return self._run(self.pipeline, request)

    def sample_without_attention(self, request: Request) -> Iterator[Snapshot]:
        """Make the images with all gates at 1."""
        if not self.has_attention:
            raise UsageError("this model has no attention to turn off.")
        if self._plain is None:
            unet = lay_out(self.pipeline.unet.to_unet()).eval()
            self._plain = DIAUNetPipeline(**self.pipeline.components | {"unet": unet})
        return self._run(self._plain, request)

    def _run(self, pipeline: DIAUNetPipeline, request: Request) -> Iterator[Snapshot]:
        snapshots: Queue[Snapshot | BaseException | None] = Queue()
        stop = threading.Event()

        def work() -> None:
            try:
                self._sample(pipeline, request, snapshots.put, stop)
                snapshots.put(None)
            except BaseException as error:  # The thread that reads the snapshots raises it again.
                snapshots.put(error)

        thread = threading.Thread(target=work, daemon=True)
        with self._lock:
            # A request whose reader has left, as after a click on Stop, may still be at work.
            self._stop()
            self._at_work = stop, thread
            thread.start()
        try:
            while (snapshot := snapshots.get()) is not None:
                if isinstance(snapshot, BaseException):
                    raise snapshot
                yield snapshot
        finally:
            stop.set()
            thread.join()

    def _stop(self) -> None:
        if self._at_work is not None:
            stop, thread = self._at_work
            stop.set()
            thread.join()

    def _sample(
        self, pipeline: DIAUNetPipeline, request: Request, tell: Callable[[Snapshot], None], stop: threading.Event
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
                # With guidance the batch holds each image twice: first with its class, then without.
                gates = {name: gate[: len(latents)].float() for name, gate in maps.items()}
                spread = {name: (gate.mean().item(), gate.std(correction=0).item()) for name, gate in gates.items()}
                pipeline._interrupt = stop.is_set()
                tell(Snapshot(index + 1, steps, float(timestep), lambda: show_latents(pipeline, latents), spread))
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
            raise UsageError("a newer request has replaced this one.")
        last = to_uint8(images)
        steps = len(pipeline.scheduler.timesteps)
        tell(Snapshot(steps, steps, 0.0, lambda: last, {}, last=True))


def _class_arguments(pipeline: DIAUNetPipeline, request: Request) -> dict[str, Any]:
    classes = pipeline.null_class
    arguments = {} if request.guidance_scale == 1.0 else {"guidance_scale": request.guidance_scale}
    if request.class_label is not None:
        # A label for each image: where the model has no classes, the pipeline says so.
        return arguments | {"class_labels": [request.class_label] * len(request.numbers)}
    return arguments | ({"class_labels": [number % classes for number in request.numbers]} if classes else {})


def vary_noise(pipeline: DIAUNetPipeline, request: Request, generators: list[torch.Generator]) -> Tensor:
    """Return noise `(B, C, H, W)` near that of each image, standard normal as well: z cos(a) + z' sin(a).

    It draws from the generators as the pipeline would, so that their later numbers are the same.
    """
    shape = (1, pipeline.unet.config.in_channels, *pipeline.sample_size)
    others = image_generators(_VARIATION_SEEDS + request.variation, range(len(request.numbers)), "cpu")
    angle = _VARIATION * math.pi / 2
    noise = []
    for index, (generator, other) in enumerate(zip(generators, others, strict=True)):
        own, added = (torch.randn(shape, generator=one) for one in (generator, other))
        noise.append(own if index == 0 else math.cos(angle) * own + math.sin(angle) * added)
    return torch.cat(noise)


def show_latents(pipeline: DIAUNetPipeline, latents: Tensor) -> Tensor:
    """Return noisy latents as images: uint8 `(B, C, H, W)` on the CPU.

    Samplers that add noise to an image without shrinking it (sigma up to a hundred) are scaled to the visible range.
    """
    spread = latents.flatten(1).std(dim=1).clamp(min=1.0).view(-1, 1, 1, 1)
    with torch.no_grad():
        images = pipeline.decode(latents / spread)
    return (images.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).cpu()
