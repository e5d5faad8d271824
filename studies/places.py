"""Where shared attention acts: the residual branch, the long skip connections, both, before the second convolution, or
behind the depthwise convolutions of another UNet.

    python studies/places.py studies/cifar10.yaml --variants plain branches skips --seeds 0 1 --steps 1000
    python studies/places.py studies/cifar10.yaml --variants depthwise depthwise-dia --seeds 0 1 --steps 1000

Trains one UNet after the other as the plain variant of that study is trained, with the gates of one LSTM that starts
from zero at the named place, and adds each held-out loss to `runs/places.json`, of which `tools/published_table.py`
makes a table. What is there is not done again. The UNets of depthwise convolutions have no attention, that of DiCo or
SE in each block, or DIA. An experiment: none of these places but the first is in the package.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from depthwise_unet import DepthwiseUNet
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from tqdm import tqdm

from dia_diffusion import attach
from dia_diffusion.data.loading import load_pixels
from dia_diffusion.data.pixels import PixelDataset
from dia_diffusion.errors import UsageError
from dia_diffusion.files import write_json
from dia_diffusion.objectives import make_objective
from dia_diffusion.options.fields import COUNT, SEED, number_type
from dia_diffusion.options.training import TrainingConfig
from dia_diffusion.study.description import Study, load_study
from dia_diffusion.training.architecture import build_unet
from dia_diffusion.training.batches import draw_step
from dia_diffusion.training.held_out import held_out_loss
from dia_diffusion.training.state import TrainingState


def resnets(unet: UNet2DModel, part: str) -> list[tuple[str, ResnetBlock2D]]:
    """The residual blocks of `down_blocks`, `mid_block` or `up_blocks`, in order of execution."""
    return [
        (name, block)
        for name, block in unet.named_modules()
        if isinstance(block, ResnetBlock2D) and name.startswith(part)
    ]


def mark_skips(unet: UNet2DModel) -> list[str]:
    """Gives each long skip connection, where the up path takes it, a module of its own; returns their names."""
    widths = [unet.conv_in.out_channels]
    for block in unet.down_blocks:
        widths += [resnet.out_channels for resnet in block.resnets]
        widths += [sampler.conv.out_channels for sampler in block.downsamplers or []]
    names = []
    for name, block in resnets(unet, "up_blocks"):
        width = widths.pop()
        # `attach` reads the number of channels there.
        block.skip = nn.Identity()
        block.skip.out_channels = width

        def through_skip(block: nn.Module, args: tuple, width: int = width) -> tuple:
            hidden, skip = args[0].split([args[0].shape[1] - width, width], dim=1)
            return torch.cat([hidden, block.skip(skip)], dim=1), *args[1:]

        block.register_forward_pre_hook(through_skip)
        names.append(f"{name}.skip")
    return names


def places(unet: UNet2DModel, variant: str) -> list[str]:
    """Names of the modules whose outputs are gated, in order of execution."""
    parts = [[name for name, _ in resnets(unet, part)] for part in ("down_blocks", "mid_block", "up_blocks")]
    before, up = [*parts[0], *parts[1]], parts[2]
    if variant == "branches":
        return [f"{name}.conv2" for name in before + up]
    if variant == "before-conv2":
        for name in before + up:
            block = unet.get_submodule(name)
            block.dropout.out_channels = block.out_channels
        return [f"{name}.dropout" for name in before + up]
    skips = mark_skips(unet)
    if variant == "skips":
        return skips
    if variant == "skips-after-down":
        # The state runs through the branches of the way down first, and decides then what crosses.
        return [*(f"{name}.conv2" for name in before), *skips]
    return [
        *(f"{name}.conv2" for name in before),
        *(end for name, skip in zip(up, skips, strict=True) for end in (skip, f"{name}.conv2")),
    ]


# The arguments of `attach` for each variant of the UNet of depthwise convolutions.
DEPTHWISE = {
    "depthwise": None,
    "depthwise-dico": None,
    "depthwise-se": {"attention": "se", "sharing": "block"},
    "depthwise-dia": {"time_conditioned": False, "hidden_size": 32},
}
VARIANTS = ("plain", "branches", "skips", "skips-after-down", "both", "before-conv2", *DEPTHWISE)


def make(variant: str, config: TrainingConfig, data: PixelDataset) -> tuple[nn.Module, int]:
    """The network of a variant, and how many of its parameters are the attention's."""
    torch.manual_seed(config.optimisation.seed)
    if variant in DEPTHWISE:
        classes = data.num_classes and data.num_classes + 1
        unet = DepthwiseUNet(data.channels, classes)
        own = unet.add_own_attention() if variant == "depthwise-dico" else []
        arguments, branches = DEPTHWISE[variant], unet.places()
    else:
        unet = build_unet(config.model, data.resolution, data.channels, data.num_classes).to_unet()
        arguments = None if variant == "plain" else {"time_conditioned": False, "hidden_size": 32}
        own, branches = [], places(unet, variant) if arguments else []
    if arguments is not None:
        own = [attach(unet, branches=branches, **arguments)]
    return unet, sum(parameter.numel() for layer in own for parameter in layer.parameters())


def train(study: Study, variant: str, seed: int, steps: int) -> dict:
    """Trains a variant; its size and its held-out loss."""
    config = study.config(study.baseline, seed, Path("runs"))
    config = replace(config, optimisation=replace(config.optimisation, max_train_steps=steps))
    optimisation = config.optimisation
    data, held_out = load_pixels(config.data)
    unet, of_attention = make(variant, config, data)
    AcceleratorState._reset_state()
    accelerator = Accelerator()
    device = accelerator.device
    training = TrainingState(optimisation, accelerator, unet, steps)
    objective, size = make_objective(config.objective), optimisation.train_batch_size
    shape = (size, data.channels, data.resolution, data.resolution)
    order = torch.Generator().manual_seed(seed)
    rows = torch.cat([torch.randperm(len(data), generator=order) for _ in range(-(-steps * size // len(data)))])
    for step in tqdm(range(1, steps + 1), desc=f"{variant}, seed {seed}", unit="step"):
        fetched = data.fetch(rows[(step - 1) * size : step * size].tolist())
        batch = {name: values.to(device) for name, values in fetched.items()}
        draws = draw_step(seed, step, shape, objective, device)
        images = batch["images"].float() / 127.5 - 1
        images = torch.where(draws.flips[:, None, None, None], images.flip(3), images)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = batch["labels"] if data.num_classes else None
        loss = objective.loss(training.model, images, draws.noise, draws.levels, labels)
        accelerator.backward(loss)
        training.update(step)
    with training.averaged() as averaged:
        loss = held_out_loss(averaged, objective, held_out, 250, len(held_out), study.loss_draws)
    return {
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "attention_parameters": of_attention,
        "held_out_loss": loss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study")
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=VARIANTS)
    parser.add_argument("--seeds", type=number_type(int, SEED), nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=number_type(int, COUNT), default=1000)
    parser.add_argument("--output", type=Path, default=Path("runs/places.json"))
    options = parser.parse_args()
    results = json.loads(options.output.read_text()) if options.output.exists() else []
    options.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        study = load_study(options.study)
        for seed in options.seeds:
            for variant in options.variants:
                wanted = {"study": Path(options.study).stem, "variant": variant, "seed": seed, "steps": options.steps}
                if not any(wanted.items() <= result.items() for result in results):
                    results.append(wanted | train(study, variant, seed, options.steps))
                    write_json(options.output, results)
    except UsageError as error:
        parser.error(str(error))
    print(f"{len(results)} runs: python tools/published_table.py {options.output}")


if __name__ == "__main__":
    main()
