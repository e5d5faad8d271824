"""Three things that may improve a trained model, tried on the digits before any becomes an option.

    python studies/digits_extras.py --seeds 0 1 2 --output docs/study/digits_extras.json

- Power-function averages of the weights (Karras et al. 2024, arXiv 2312.02696), put together after training.
- Autoguidance (Karras et al. 2024, arXiv 2406.02507): the model at an earlier step as its guide.
- Augmentation that the model is told of (Karras et al. 2022, arXiv 2206.00364, section 5), and not when it samples.

Each is compared, by the Fréchet distance of the same noise, with the model of the same seed and an exponential average.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler
from torch import Tensor, nn
from tqdm import tqdm

from dia_diffusion import DIAUNetPipeline
from dia_diffusion.data.decoding import to_unit_range
from dia_diffusion.data.loading import load_pixels
from dia_diffusion.files import write_json
from dia_diffusion.objectives import make_objective
from dia_diffusion.options.fields import COUNT, SEED, number_type
from dia_diffusion.options.training import TrainingConfig
from dia_diffusion.scoring.evaluation import evaluate
from dia_diffusion.scoring.features.named import get_extractor
from dia_diffusion.scoring.images import PipelineImages
from dia_diffusion.study.comparison import compare
from dia_diffusion.training.architecture import build_unet
from dia_diffusion.training.batches import draw_step
from dia_diffusion.training.state import TrainingState

EXPONENTS = (16.97, 6.94)  # of the two averages that are followed: relative widths of 0.05 and 0.1
WIDTHS = (0.05, 0.1, 0.15)
SNAPSHOTS = 10
GUIDES, WEIGHTS = (0.2, 0.5), (1.25, 1.5)  # the shares of the steps after which the guide is taken
PROBABILITY = 0.15
# Of a shift in pixels, of the logarithm of a scale, and of an angle, where there is one.
SPREADS = (1.0, 0.2, 0.25)


class Trained(NamedTuple):
    model: nn.Module
    guides: dict[int, nn.Module]
    snapshots: list[tuple[int, list[list[Tensor]]]]


def train(config: TrainingConfig, augmented: bool = False) -> Trained:
    optimisation, steps = config.optimisation, config.optimisation.max_train_steps
    data, _ = load_pixels(config.data)
    objective, size, seed = make_objective(config.objective), optimisation.train_batch_size, optimisation.seed
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(seed)
    unet = build_unet(config.model, data.resolution, data.channels, data.num_classes, objective.num_timesteps)
    told: dict[str, Tensor] = {}
    if augmented:
        tell_of_augmentation(unet, told)
    training = TrainingState(optimisation, accelerator, unet, steps)
    order = torch.Generator().manual_seed(seed)
    rows = torch.cat([torch.randperm(len(data), generator=order) for _ in range(-(-steps * size // len(data)))])
    averages = [[parameter.detach().clone() for parameter in unet.parameters()] for _ in EXPONENTS]
    guides, snapshots = {}, []
    for step in tqdm(range(1, steps + 1), desc=f"Training, seed {seed}", unit="step", mininterval=10):
        batch = data.fetch(rows[(step - 1) * size : step * size].tolist())
        images = to_unit_range(batch["images"])
        draws = draw_step(seed, step, tuple(images.shape), objective, "cpu")
        if augmented:
            images, told["labels"] = augment(images, torch.Generator().manual_seed(10_000 * seed + step))
        images = images.contiguous(memory_format=torch.channels_last)
        accelerator.backward(objective.loss(training.model, images, draws.noise, draws.levels, batch["labels"]))
        training.update(step)
        weights = [parameter.detach() for parameter in unet.parameters()]
        for exponent, average in zip(EXPONENTS, averages, strict=True):
            # Equation 127 of arXiv 2312.02696.
            torch._foreach_lerp_(average, weights, 1 - (1 - 1 / step) ** (exponent + 1))
        if step % (steps // SNAPSHOTS) == 0:
            snapshots.append((step, copy.deepcopy(averages)))
        if step in [round(share * steps) for share in GUIDES]:
            with training.averaged() as averaged:
                guides[step] = copy.deepcopy(averaged)
    told.clear()
    with training.averaged() as averaged:
        return Trained(copy.deepcopy(averaged), guides, snapshots)


def tell_of_augmentation(unet: nn.Module, told: dict[str, Tensor]) -> None:
    """Adds what was done to the images to the embedding of the timestep. Nothing done is a vector of zeros, and adds
    nothing, so that the UNet is one like any other after training."""
    unet.augmentation = nn.Linear(5, unet.time_embedding.linear_2.out_features, bias=False)
    nn.init.normal_(unet.augmentation.weight, std=0.3)
    unet.time_embedding.register_forward_hook(
        lambda module, args, embedding: embedding + unet.augmentation(told["labels"]) if told else embedding
    )


def augment(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images `(B, C, R, R)` shifted, scaled and turned, each at random, and what was done `(B, 5)`."""
    done = (torch.rand(len(images), 3, generator=generator) < PROBABILITY).float()
    amount = torch.randn(len(images), 4, generator=generator) * done[:, [0, 0, 1, 2]]
    right, down, logarithm, angle = (amount * torch.tensor(SPREADS)[[0, 0, 1, 2]]).unbind(1)
    scale, cos, sin, pixels = 2**logarithm, angle.cos(), angle.sin(), 2 / images.shape[-1]
    affine = torch.stack([scale * cos, -scale * sin, pixels * right, scale * sin, scale * cos, pixels * down], dim=1)
    grid = F.affine_grid(affine.view(-1, 2, 3), list(images.shape), align_corners=False)
    # Black is -1.
    moved = F.grid_sample(images + 1, grid, align_corners=False) - 1
    return moved, torch.stack([right, down, 5 * logarithm, 1 - cos, sin], dim=1)


def exponent_of(width: float) -> float:
    """The exponent of the average with this relative width: equation 126, solved for it."""
    return max(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real)


def overlap(t_a: np.ndarray, g_a: np.ndarray, t_b: np.ndarray, g_b: np.ndarray) -> np.ndarray:
    """The inner product of two profiles `(g + 1) x^g / t^(g + 1)` on [0, t]."""
    earlier = np.minimum(t_a, t_b)
    return (g_a + 1) * (g_b + 1) * earlier ** (g_a + g_b + 1) / ((g_a + g_b + 1) * t_a ** (g_a + 1) * t_b ** (g_b + 1))


def reconstruct(snapshots: Sequence[tuple[int, list[list[Tensor]]]], width: float) -> list[Tensor]:
    """The weights whose profile is nearest, by least squares, to that of the average of this width at the end."""
    last = snapshots[-1][0]
    times = np.array([step / last for step, _ in snapshots for _ in EXPONENTS])
    exponents = np.array([exponent for _ in snapshots for exponent in EXPONENTS])
    products = overlap(times[:, None], exponents[:, None], times, exponents)
    shares = np.linalg.solve(products, overlap(times, exponents, np.ones(1), np.array([exponent_of(width)])))
    by_parameter = zip(*(weights for _, averages in snapshots for weights in averages), strict=True)
    return [sum(float(share) * weights for share, weights in zip(shares, each, strict=True)) for each in by_parameter]


def guided(model: nn.Module, guide: nn.Module, weight: float) -> nn.Module:
    """`guide + weight * (model - guide)`."""
    both, alone = copy.deepcopy(model), model.forward

    def forward(sample: Tensor, timestep: Tensor, labels: Tensor | None = None, **arguments: Any) -> Any:
        output, of_guide = alone(sample, timestep, labels), guide(sample, timestep, labels).sample
        output.sample = of_guide + weight * (output.sample - of_guide)
        return output

    both.forward = forward
    return both


def measure(config: TrainingConfig, images: int, sampling_steps: int) -> dict[str, float]:
    """Fréchet distances of a seed, by what was done."""
    data, _ = load_pixels(config.data)
    extractor = get_extractor("digits", data.resolution, data.channels)
    scheduler = DDIMScheduler.from_config(make_objective(config.objective).scheduler.config)

    def distance(model: nn.Module) -> float:
        made = PipelineImages(
            DIAUNetPipeline(model.eval(), scheduler), images, sampling_steps, config.optimisation.seed
        )
        return evaluate(made, data, extractor, metrics=["fid"], batch_size=500)["fid"]

    trained = train(config)
    distances = {"as it is": distance(trained.model)}
    averaged = copy.deepcopy(trained.model)
    for width in WIDTHS:
        with torch.no_grad():
            for parameter, weights in zip(averaged.parameters(), reconstruct(trained.snapshots, width), strict=True):
                parameter.copy_(weights)
        distances[f"power average of width {width}"] = distance(averaged)
    for step, guide in trained.guides.items():
        for weight in WEIGHTS:
            distances[f"guided by step {step}, {weight}"] = distance(guided(trained.model, guide.eval(), weight))
    distances["augmented"] = distance(train(config, augmented=True).model)
    return distances


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=number_type(int, SEED), nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=number_type(int, COUNT), default=1500)
    parser.add_argument("--num_images", type=number_type(int, COUNT), default=5000)
    parser.add_argument("--sampling_steps", type=number_type(int, COUNT), default=20)
    parser.add_argument("--output", type=Path, default=Path("runs/digits_extras.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    described = {name: getattr(options, name) for name in ("steps", "num_images", "sampling_steps")}
    before = json.loads(options.output.read_text()) if options.output.exists() else {"settings": described}
    if before["settings"] != described:
        parser.error(f"'{options.output}' is of other settings, {before['settings']}: choose another --output.")
    distances = before.get("distances", {})
    for seed in options.seeds:
        if str(seed) not in distances:
            config = TrainingConfig.from_flat(**RECIPE, seed=seed, max_train_steps=options.steps)
            distances[str(seed)] = measure(config, options.num_images, options.sampling_steps)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(options.output, {"settings": described, "distances": distances})
    by_name = {name: {seed: of_seed[name] for seed, of_seed in distances.items()} for name in distances[str(seed)]}
    print("| | Fréchet distance | difference | 95% interval | p |\n| --- | ---: | ---: | ---: | ---: |")
    for name, values in by_name.items():
        figures, mean = compare(values, by_name["as it is"]), statistics.mean(by_name["as it is"].values())
        row = [name, f"{figures['mean']:.4f}", f"{figures['difference'] / mean:+.1%}"]
        if figures["difference_interval"]:
            row += ["{:+.1%} to {:+.1%}".format(*(bound / mean for bound in figures["difference_interval"]))]
            row += [f"{figures['p_value']:.3f}"]
        print("| " + " | ".join(row) + " |")


RECIPE = {
    "dataset_name": "digits",
    "resolution": 8,
    "class_conditional": True,
    "dia_attention": "none",
    "train_batch_size": 64,
    "learning_rate": 2e-3,
    "lr_warmup_steps": 100,
    "adam_beta1": 0.9,
    "use_ema": True,
    "ema_max_decay": 0.995,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "resnet_time_scale_shift": "scale_shift",
    "unet_arguments": {"norm_num_groups": 8},
}

if __name__ == "__main__":
    main()
