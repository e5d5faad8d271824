"""Train an image classifier with shared attention: the paper's ResNet for CIFAR, a RegNet or a small ViT.

    python examples/image_classification.py                       # ResNet-20 with DIA on the embedded digits, 30 epochs
    python examples/image_classification.py --dataset_name uoft-cs/cifar10 --depth 32 --epochs 164 --attention dia_paper
    python examples/image_classification.py --train_data_dir my_images --resolution 64 --attention se

Results in `runs/image_classification` (`--output_dir`): `result.json`, `curves.png` and the trained model. A model of
transformers is saved with its image processor, so that `dia evaluate --features` takes it. Runs of one seed start from
the same weights and see the same images, whatever their attention. `dia study` runs variants over seeds.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchmetrics import Accuracy, MeanMetric
from transformers import RegNetConfig, RegNetForImageClassification, ViTConfig, ViTForImageClassification

from dia_diffusion import attach
from dia_diffusion.data.sources import EMBEDDED, load_dataset_splits
from dia_diffusion.errors import UsageError
from dia_diffusion.files import write_json
from helpers import flags
from helpers.cifar_resnet import BasicBlock, Bottleneck, ResNet
from helpers.classification import Images, correlate_maps, save_classifier

# Arguments of `attach`: SE in each block; the paper's DIA, one cell a stage from state zero; one cell for the whole
# network, whose state is carried from stage to stage, with the paper's gates; the same with gates that start at 1. (A
# stage comes once, so that cells of its own have no state to carry.)
ATTENTIONS = {
    "none": None,
    "se": {"attention": "se", "sharing": "block", "init": "paper"},
    "dia_paper": {"sharing": "level", "bridge": "reset", "init": "paper"},
    "dia_carry": {"init": "paper"},
    "dia_network": {},
}

RESNETS = {"resnet": BasicBlock, "resnet_bottleneck": Bottleneck}


def make_model(options: argparse.Namespace, resolution: int, channels: int, classes: int) -> nn.Module:
    if options.model == "vit":
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        patches = {"image_size": resolution, "patch_size": max(resolution // 8, 2), "num_channels": channels}
        config = ViTConfig(num_hidden_layers=options.depth or 6, num_labels=classes, **sizes, **patches)
        model = ViTForImageClassification(config)
    elif options.model == "regnet":
        sizes = {"embedding_size": 64, "hidden_sizes": [64, 128, 256], "depths": [options.depth or 2] * 3}
        layers = {"groups_width": 64, "layer_type": "x", "downsample_in_first_stage": False}
        config = RegNetConfig(num_channels=channels, num_labels=classes, **sizes, **layers)
        model = RegNetForImageClassification(config)
    else:
        block = RESNETS[options.model]
        model = ResNet(block, options.depth or 20, channels, classes)
        for name, layer in model.named_modules():
            if name.endswith(f".bn{block.layers}"):
                nn.init.constant_(layer.weight, options.branch_scale)
    if ATTENTIONS[options.attention] is not None:
        attach(model, **ATTENTIONS[options.attention])
    return model.to(memory_format=torch.channels_last)


def make_optimizer(
    options: argparse.Namespace, model: nn.Module, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    settings = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
    if options.model == "vit":
        optimizer = torch.optim.AdamW(model.parameters(), **settings)
    else:
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, **settings)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def train_classifier(options: argparse.Namespace) -> dict:
    """Train and test a classifier; write and return the result."""
    if options.branch_scale != 1 and options.model not in RESNETS:
        raise UsageError(
            f"--branch_scale {options.branch_scale} is for {' and '.join(RESNETS)}, not for {options.model}."
        )
    set_seed(options.seed)
    accelerator = Accelerator()
    device, share = accelerator.device, slice(accelerator.process_index, None, accelerator.num_processes)
    splits = load_dataset_splits(options.dataset_name, train_data_dir=options.train_data_dir)
    if splits[1] is None:
        raise UsageError("the data set has no split to test on: one named test or validation.")
    train_set = Images(splits[0], options.resolution, device)
    test_set = Images(splits[1], options.resolution, device, channels=train_set.pixels.shape[1])
    std, mean = torch.std_mean(train_set.pixels.float(), (0, 2, 3), keepdim=True)

    model = make_model(options, options.resolution, train_set.pixels.shape[1], train_set.classes)
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    of_attention = sum(count for name, count in parameters.items() if name.startswith("dia."))
    size, number = options.batch_size * accelerator.num_processes, len(train_set.labels)
    # The last, smaller batch of an epoch is left out.
    used = number // size * size or number
    optimizer, schedule = make_optimizer(options, model, options.epochs * -(-used // size))
    model, optimizer = accelerator.prepare(model, optimizer)
    metrics = {"loss": MeanMetric(), "accuracy": Accuracy(task="multiclass", num_classes=train_set.classes)}

    def run(batches: Iterator[tuple[Tensor, Tensor]], training: bool) -> dict[str, float]:
        """Run an epoch or a test; return loss and accuracy."""
        model.train(training)
        for metric in metrics.values():
            metric.to(device).reset()
        for images, labels in batches:
            with torch.set_grad_enabled(training):
                outputs = model((images.float() - mean) / std)
                logits = getattr(outputs, "logits", outputs)
                loss = F.cross_entropy(logits, labels)
            if training:
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            metrics["loss"].update(loss.detach(), len(labels))
            metrics["accuracy"].update(logits.detach(), labels)
        return {name: metric.compute().item() for name, metric in metrics.items()}

    order, history, start = torch.Generator().manual_seed(options.seed), [], time.perf_counter()
    augment = options.dataset_name not in EMBEDDED if options.augment is None else options.augment
    for epoch in range(1, options.epochs + 1):
        rows = torch.randperm(number, generator=order)[:used]
        seen = run(train_set.batches(rows[share], options.batch_size, order if augment else None), training=True)
        held = run(test_set.batches(torch.arange(len(test_set.labels))[share], 500, None), training=False)
        history.append({f"train_{name}": seen[name] for name in seen} | {f"test_{name}": held[name] for name in held})
        line = ", ".join(f"{name} {value:.4f}" for name, value in history[-1].items())
        accelerator.print(f"epoch {epoch}: {line}, {time.perf_counter() - start:.0f} s", flush=True)
        if not math.isfinite(seen["loss"]):
            raise UsageError(f"training has diverged at --learning_rate {options.learning_rate}: lower it.")
    result = {
        "accuracy": held["accuracy"],
        "loss": held["loss"],
        "parameters": sum(parameters.values()),
        "attention_parameters": of_attention,
        "seconds": round(time.perf_counter() - start, 1),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "history": history,
    }
    if accelerator.is_main_process:
        leave(options, result, accelerator.unwrap_model(model).eval(), test_set, mean, std)
    return result


def leave(
    options: argparse.Namespace, result: dict, model: nn.Module, test_set: Images, mean: Tensor, std: Tensor
) -> None:
    """Write the model, a picture of its curves, and the result with the correlation of its attention maps."""
    options.output_dir.mkdir(parents=True, exist_ok=True)
    if result["attention_parameters"]:
        result["correlation"] = correlate_maps(model, test_set, mean, std)
    save_classifier(model, options.output_dir, options.resolution, mean, std)
    save_curves(result["history"], options.output_dir / "curves.png")
    write_json(options.output_dir / "result.json", result)


def save_curves(history: list[dict[str, float]], path: Path) -> None:
    """Draw loss and accuracy over the epochs."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axis, kind in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for split in ("train", "test"):
            axis.plot(range(1, len(history) + 1), [line[f"{split}_{kind}"] for line in history], label=split)
        axis.set(xlabel="epoch", ylabel=kind)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", help="digits (the default), mnist5k, a data set on the Hub, or a folder")
    parser.add_argument("--train_data_dir", type=str, help="folder of images in subfolders: train/CLASS/, test/CLASS/")
    parser.add_argument("--resolution", type=flags.count, help="8 by default for the digits, and 32 for others")
    parser.add_argument("--augment", action=argparse.BooleanOptionalAction, help="crops and flips; not for digits")
    parser.add_argument("--model", choices=("resnet", "resnet_bottleneck", "vit", "regnet"), default="resnet")
    parser.add_argument(
        "--depth", type=flags.count, help="6n + 2; 9n + 2 with bottlenecks; layers of the vit; of a stage of the regnet"
    )
    parser.add_argument("--attention", choices=ATTENTIONS, default="dia_paper")
    parser.add_argument(
        "--branch_scale",
        type=flags.natural,
        default=1.0,
        help="first weight of the last norm of each branch of a ResNet: below 1 a control for gates that start there",
    )
    parser.add_argument("--epochs", type=flags.count, default=30)
    parser.add_argument("--batch_size", type=flags.count, default=128)
    parser.add_argument("--learning_rate", type=flags.natural, help="0.1 for ResNets (SGD), 1e-3 for the vit (AdamW)")
    parser.add_argument("--weight_decay", type=flags.natural, help="1e-4 for ResNets, 0.05 for the vit")
    parser.add_argument("--seed", type=flags.seed, default=0)
    parser.add_argument("--output_dir", type=flags.folder, default=Path("runs/image_classification"))
    return parser


def complete(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in the defaults that hang on the data and the model."""
    if options.dataset_name is None and options.train_data_dir is None:
        options.dataset_name = "digits"
    options.resolution = options.resolution or (8 if options.dataset_name == "digits" else 32)
    rate, decay = (1e-3, 0.05) if options.model == "vit" else (0.1, 1e-4)
    options.learning_rate = rate if options.learning_rate is None else options.learning_rate
    options.weight_decay = decay if options.weight_decay is None else options.weight_decay
    return options


# For `dia study`: the scores of a run, and which is better.
SCORES = {"accuracy": "higher", "loss": "lower"}


def read(options: dict) -> argparse.Namespace:
    """Read options as the command line does, from a dictionary.

    Raises:
        UsageError: for options that are unknown or out of their range.
    """
    words = []
    for name, value in options.items():
        words.append(f"--{name}" if value is not False else f"--no-{name}")
        words += [] if isinstance(value, bool) else [str(value)]
    parser = make_parser()

    def refuse(message: str) -> None:
        raise UsageError(message)

    parser.error = refuse
    return complete(parser.parse_args(words))


def check(options: dict) -> None:
    """Refuse the options of a run of a study that cannot work."""
    read(options)


def train(options: dict) -> dict:
    """Train a run of a study."""
    return train_classifier(read(options))


def main(arguments: list[str] | None = None) -> int:
    try:
        train_classifier(complete(make_parser().parse_args(arguments)))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
