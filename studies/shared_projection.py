"""Can residual blocks share their projection of the timestep? An experiment; nothing of it is in the package.

    python studies/shared_projection.py studies/cifar10.yaml --seeds 0 1 2

In `UNet2DModel` each residual block projects the time embedding by a linear layer of its own. Here the blocks of one
width share one matrix, and each has an offset of its own (as adaLN-single of PixArt-alpha, arXiv 2310.00426, does for
transformers), also at half and at a quarter of the rank. The UNet has no attention and is trained as the baseline of
the study. Each result is added to `runs/shared_projection.json`, of which `tools/published_table.py` makes a table.
Finished runs are not repeated.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from tqdm import tqdm

from dia_diffusion.data.loading import load_pixels
from dia_diffusion.errors import UsageError
from dia_diffusion.files import write_json
from dia_diffusion.objectives import make_objective
from dia_diffusion.options.fields import COUNT, SEED, number_type
from dia_diffusion.options.training import TrainingConfig
from dia_diffusion.study.description import load_study
from dia_diffusion.training.accelerator import open_accelerator
from dia_diffusion.training.architecture import build_unet
from dia_diffusion.training.batches import BatchPlan, make_loader, prepare_batches, running
from dia_diffusion.training.held_out import held_out_loss
from dia_diffusion.training.loop import accumulate_gradients
from dia_diffusion.training.state import TrainingState

# The share of the full rank that the shared matrix has; None: each block has a matrix of its own, as in UNet2DModel.
VARIANTS = {"own": None, "shared": 1.0, "shared-half-rank": 0.5, "shared-quarter-rank": 0.25}


class OffsetProjection(nn.Module):
    """The time projection of one block: a matrix that it shares, and an offset of its own."""

    def __init__(self, shared: nn.Module, own: nn.Linear):
        super().__init__()
        self.shared, self.bias = shared, own.bias

    def forward(self, embedding: Tensor) -> Tensor:
        return self.shared(embedding) + self.bias


def share_projections(unet: UNet2DModel, rank_share: float) -> None:
    """Let the residual blocks of each width share the matrix of the first of them, or one of a lower rank."""
    shared: dict[int, nn.Module] = {}
    for block in (module for module in unet.modules() if isinstance(module, ResnetBlock2D)):
        own = block.time_emb_proj
        width, size = own.out_features, own.in_features
        if width not in shared:
            rank = int(rank_share * min(width, size))
            full = nn.Linear(size, width, bias=False)
            factors = nn.Sequential(nn.Linear(size, rank, bias=False), nn.Linear(rank, width, bias=False))
            shared[width] = full if rank_share == 1 else factors
        block.time_emb_proj = OffsetProjection(shared[width], own)


def train(config: TrainingConfig, variant: str) -> dict[str, float]:
    """Train a variant; return its size and its held-out loss."""
    optimisation, objective = config.optimisation, make_objective(config.objective)
    steps, seed, flips = optimisation.max_train_steps, optimisation.seed, config.data.random_flip
    data, held_out = load_pixels(config.data)
    numbers, plan = range(1, steps + 1), BatchPlan(optimisation.train_batch_size)
    with open_accelerator(optimisation.mixed_precision, config.output) as accelerator:
        torch.manual_seed(seed)
        unet = build_unet(config.model, data.resolution, data.channels, data.num_classes).to_unet()
        if VARIANTS[variant] is not None:
            share_projections(unet, VARIANTS[variant])
        training = TrainingState(optimisation, accelerator, unet, steps)
        loader = make_loader(config.data, data, plan, seed, numbers, accelerator.device)
        training.unet.train()
        with running(loader) as loaded:
            batches = prepare_batches(
                loaded, data, plan, seed, numbers, accelerator.device, objective, flips, config.objective.label_dropout
            )
            for step in tqdm(numbers, desc=f"{variant}, seed {seed}", unit="step"):
                accumulate_gradients(training, objective, batches, plan.micro_batches)
                training.update(step)
        with training.averaged() as averaged:
            loss = held_out_loss(averaged, objective, held_out, 250, len(held_out), draws=4)
    return {
        "parameters": sum(p.numel() for p in unet.parameters()),
        "projection_parameters": sum(p.numel() for name, p in unet.named_parameters() if "time_emb_proj" in name),
        "held_out_loss": loss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study")
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=list(VARIANTS))
    parser.add_argument("--seeds", type=number_type(int, SEED), nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=number_type(int, COUNT), default=1200)
    parser.add_argument("--dataset_name", help="the images, by default those of the study")
    parser.add_argument("--output", type=Path, default=Path("runs/shared_projection.json"))
    options = parser.parse_args()
    results = json.loads(options.output.read_text()) if options.output.exists() else []
    options.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        study = load_study(options.study)
        for seed in options.seeds:
            config = study.config(study.baseline, seed, Path("runs"))
            data = replace(config.data, dataset_name=options.dataset_name or config.data.dataset_name)
            optimisation = replace(config.optimisation, max_train_steps=options.steps)
            config = replace(config, data=data, optimisation=optimisation)
            for variant in options.variants:
                wanted = {"study": Path(options.study).stem, "variant": variant, "seed": seed, "steps": options.steps}
                if not any(wanted.items() <= result.items() for result in results):
                    results.append(wanted | train(config, variant))
                    write_json(options.output, results)
    except UsageError as error:
        parser.error(str(error))
    print(f"{len(results)} runs: python tools/published_table.py {options.output}")


if __name__ == "__main__":
    main()
