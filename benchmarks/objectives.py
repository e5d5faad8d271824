"""Fréchet distance against the number of model evaluations, for each objective with its samplers.

    python benchmarks/objectives.py              the best network there can be, in closed form: what the samplers lose
    python benchmarks/objectives.py STUDY        networks that were trained: what is gained by each objective
    python benchmarks/objectives.py MODEL        one pipeline of digits, such as the demo's: which sampler to take

STUDY is the folder that `dia study studies/objectives.yaml` leaves; a variant there is named after its objective, and
what follows a hyphen. The distance is that of `dia evaluate`, in the features of the digits, to the training images.
All samplers are compared at equal evaluations of the model: Heun's method takes half as many steps.

    [--num_images N] [--output RESULT.json] [--picture PICTURE.png]
"""

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter
from torch import Tensor

from dia_diffusion import DIAUNetPipeline
from dia_diffusion.data.decoding import to_unit_range
from dia_diffusion.data.pixels import PixelDataset
from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.data.sources import load_dataset_splits
from dia_diffusion.errors import UsageError
from dia_diffusion.files import find_folder
from dia_diffusion.objectives import OBJECTIVES
from dia_diffusion.pipelines.noise import NoiseKind, noise_kind
from dia_diffusion.process.startup import tune_process
from dia_diffusion.sampling.loading import load_pipeline
from dia_diffusion.sampling.schedulers import make_scheduler
from dia_diffusion.scoring.evaluation import evaluate
from dia_diffusion.scoring.features.named import get_extractor
from dia_diffusion.scoring.images import PipelineImages
from dia_diffusion.study.comparison import compare
from measuring import RESULTS, count, read_arguments, row, save_result

DATA = "digits"
SAMPLERS = {
    "ddpm": ["ddim", "dpm", "dpm_sde"],
    "edm": ["euler", "dpm", "dpm_sde"],
    "flow": ["euler", "heun", "dpm", "dpm_sde", "unipc"],
}
KINDS = {NoiseKind.BETAS: "ddpm", NoiseKind.EDM: "edm", NoiseKind.FLOW: "flow"}
# Odd, because Heun's method takes two for each step but the last.
EVALUATIONS = (5, 9, 15, 25, 49)
BATCH = 250
# For each variant the samplers, and for each of them what its seeds gave at each number of evaluations.
Curves = dict[str, dict[str, list[list[Any]]]]
# The level of a timestep, for each objective.
LEVELS: dict[str, Callable[[Tensor], Tensor]] = {
    "ddpm": lambda timestep: timestep.long(),
    "edm": lambda timestep: (4 * timestep).exp(),
    # Some samplers round timesteps down, to 0 at last.
    "flow": lambda timestep: (timestep / 1000).clamp(min=1e-4),
}
# The settings of the demo; edm and flow have only defaults.
OPTIONS = {
    "ddpm": {"prediction_type": "v_prediction", "ddpm_beta_schedule": "squaredcos_cap_v2"},
    "edm": {},
    "flow": {},
}


class BestNetwork(ModelMixin, ConfigMixin):
    """The optimal denoiser of a data set, in closed form: the posterior mean over its images.

    At `x = a y + b n` the mean of the image y is that of all images, weighted by `exp(-|x - a y|² / 2 b²)`. The mean of
    what is predicted, which is linear in y and n, follows.
    """

    @register_to_config
    def __init__(self, sample_size: int, in_channels: int, num_class_embeds: int | None = None):
        super().__init__()
        self.class_embedding = None
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def of(self, name: str, images: Tensor) -> "BestNetwork":
        """Set the objective, and the images `(N, C, H, W)` in [-1, 1]."""
        self.level, self.images = LEVELS[name], images.flatten(1).double()
        self.objective = OBJECTIVES[name](**OPTIONS[name]).fitted(lambda: images.std().item())
        return self

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> UNet2DOutput:
        level = self.level(timestep.double()).view(1)
        # The objective is linear: what it makes of an image of 1 without noise, and of noise of 1 without an image.
        one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        of_image, of_noise = (
            self.objective.noised_batch(one, zero, level),
            self.objective.noised_batch(zero, one, level),
        )
        a, b = of_image.sample.view(()), of_noise.sample.view(())
        noisy = sample.flatten(1).double()
        image = (-torch.cdist(noisy, a * self.images).square() / (2 * b**2)).softmax(1) @ self.images
        answer = of_image.target.view(()) * image + of_noise.target.view(()) * (noisy - a * image) / b
        return UNet2DOutput(sample=answer.view_as(sample).to(sample.dtype))


def best_pipelines(images: PixelDataset) -> Iterator[tuple[str, DIAUNetPipeline]]:
    pixels = to_unit_range(images.fetch(range(len(images)))["images"])
    for name in OBJECTIVES:
        network = BestNetwork(images.resolution, images.channels).of(name, pixels)
        yield name, DIAUNetPipeline(network, make_scheduler(None, network.objective.scheduler.config))


def trained_pipelines(name: str) -> Iterator[tuple[str, DIAUNetPipeline]]:
    study = find_folder("STUDY", name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (study / "model_index.json").exists():
        pipeline = load_pipeline(str(study), device=device)
        yield KINDS[noise_kind(pipeline.scheduler.config)], pipeline
        return
    for variant in sorted(path for path in study.iterdir() if path.is_dir()):
        for folder in sorted(variant.glob("seed-*")):
            # Only finished runs have a pipeline.
            if (folder / "result.json").exists():
                yield variant.name, load_pipeline(str(folder), device=device)


def measure(
    pipelines: Iterator[tuple[str, DIAUNetPipeline]],
    train: PixelDataset,
    held_out: PixelDataset,
    num_images: int,
    evaluations: Sequence[int],
) -> tuple[Curves, Curves, float]:
    """Return the distances of each pipeline with each sampler, their intervals, and that of held-out images."""
    floor = 0.0
    curves: Curves = {}
    intervals: Curves = {}
    extractor = get_extractor(DATA)
    for seed, (name, pipeline) in enumerate(pipelines):
        config = pipeline.scheduler.config
        for sampler in SAMPLERS[name.partition("-")[0]]:
            points, bounds = (
                found.setdefault(name, {}).setdefault(sampler, [[] for _ in evaluations])
                for found in (curves, intervals)
            )
            for number, point, bound in zip(evaluations, points, bounds, strict=True):
                pipeline.scheduler = make_scheduler(sampler, config)
                steps = (number + 1) // pipeline.scheduler.order
                images = PipelineImages(pipeline, num_images, steps - (pipeline.scheduler.order == 1), seed)
                scores = evaluate(images, train, extractor.to(pipeline.device), ("fid",), held_out, BATCH)
                point.append(scores["fid"])
                bound.append(scores["fid_interval"])
                floor = scores["floor"]["fid"]
    return curves, intervals, floor


def compare_best(curves: Curves, evaluations: Sequence[int]) -> Iterator[str]:
    """Yield a line for each variant and number of evaluations: its best sampler, against the best of the first."""
    for place, number in enumerate(evaluations):
        best = {
            name: min(samplers, key=lambda s: statistics.mean(samplers[s][place])) for name, samplers in curves.items()
        }
        points = {name: dict(enumerate(curves[name][sampler][place])) for name, sampler in best.items()}
        first = next(iter(curves))
        for name, values in points.items():
            figures = compare(values, points[first] if name != first else {})
            line = f"{number} evaluations: {name}, {best[name]}: {figures['mean']:.3f}"
            if figures["difference_interval"]:
                low, high = figures["difference_interval"]
                line += f", {figures['difference']:+.3f} [{low:+.3f}, {high:+.3f}], p {figures['p_value']:.3f}"
            yield line


def draw(curves: Curves, intervals: Curves, evaluations: Sequence[int], floor: float, path: Path) -> None:
    """Draw a panel for each objective: mean, smallest and largest of the seeds; of one seed its 95% interval."""
    figure = Figure(figsize=(4 * len(curves), 4.2), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, (name, samplers) in zip(panels, curves.items(), strict=True):
        for (sampler, points), marker in zip(samplers.items(), "osD^v", strict=False):
            means = [statistics.mean(point) for point in points]
            ranges = [
                bound[0] if len(bound) == 1 and bound[0] else (min(point), max(point))
                for point, bound in zip(points, intervals[name][sampler], strict=True)
            ]
            # A distance is not below zero, but the interval of one near zero can be.
            spread = [
                [max(min(m - low, 0.9 * m), 0.0) for m, (low, _) in zip(means, ranges, strict=True)],
                [max(high - m, 0.0) for m, (_, high) in zip(means, ranges, strict=True)],
            ]
            axes.errorbar(evaluations, means, yerr=spread, label=sampler, marker=marker, markersize=5, capsize=2)
        axes.axhline(floor, color="tab:gray", linestyle=":", label="held-out images")
        axes.set(title=name, xlabel="model evaluations", xscale="log", yscale="log")
        axes.set_xticks(evaluations)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    panels[0].set_ylabel("Fréchet distance")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> int:
    options = read_arguments(
        __doc__,
        "objectives",
        study={"nargs": "?", "help": "folder of a study, or of one pipeline"},
        **{
            "--num_images": {"type": count, "default": 1000, "help": "for each point of the curves (default: 1000)"},
            "--evaluations": {"type": count, "nargs": "+", "default": EVALUATIONS, "help": "odd numbers"},
            "--picture": {"type": Path, "default": RESULTS / "objectives.png", "help": "where the picture goes"},
        },
    )
    tune_process()
    train, held_out = (prepare_pixels(split, 8, 1) for split in load_dataset_splits(DATA))
    pipelines = best_pipelines(train) if options.study is None else trained_pipelines(options.study)
    try:
        curves, intervals, floor = measure(pipelines, train, held_out, options.num_images, options.evaluations)
        if not curves:
            raise UsageError(f"no run in '{options.study}' is finished: dia study studies/objectives.yaml.")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [
        row(f"{name}, {sampler}, {number} evaluations", statistics.mean(point), "Fréchet distance")
        for name, samplers in curves.items()
        for sampler, points in samplers.items()
        for number, point in zip(options.evaluations, points, strict=True)
    ]
    more = {"num_images": options.num_images, "evaluations": list(options.evaluations)}
    print("The best sampler of each, and its difference to that of the first, paired by seed:")
    print(*compare_best(curves, options.evaluations), sep="\n")
    save_result(options.output, rows, curves=curves, intervals=intervals, floor=floor, **more)
    draw(curves, intervals, options.evaluations, floor, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
