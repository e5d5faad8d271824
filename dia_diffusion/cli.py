"""The command lines: `dia sample`, `dia evaluate`, `dia analyze`, `dia study`, and what `train_unet.py` calls."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from .errors import UsageError
from .process import end_with_launcher, tune_process

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Imports of torch and diffusers stand inside the functions: `dia --help` should not wait for them.


def train_main(arguments: Sequence[str] | None = None) -> int:
    """Trains; returns the exit status: 0, 2 after a mistake, 128 plus the signal after an interruption."""
    tune_process()
    end_with_launcher()
    return _run(_train, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The `dia` command; returns the exit status."""
    options = make_parser().parse_args(arguments)
    tune_process()
    return _run(options.function, options)


def _run(function: Callable, argument: object) -> int:
    try:
        function(argument)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _train(arguments: Sequence[str] | None) -> None:
    from .config import parse_arguments
    from .evaluation import format_scores
    from .interrupts import Interrupted
    from .training import train

    config = parse_arguments(arguments)
    try:
        figures = train(config)
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        sys.exit(128 + interruption.signum)
    if figures:
        if "features" in figures:
            print(format_scores(figures))
        print(f"The pipeline and its model card are in {config.output_dir}; look at samples.png and curves.png there.")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the `dia` command."""
    parser = argparse.ArgumentParser(prog="dia", description="Diffusion UNets with shared attention.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    sample = commands.add_parser("sample", help="generate images", description="Generate images as PNG files.")
    sample.set_defaults(function=_sample)
    sample.add_argument("model", help="folder or Hub id of a pipeline")
    _add_sampling_options(sample, num_images=64)
    sample.add_argument("--class_label", type=int, help="class of all images; by default all classes in turn")
    sample.add_argument("--output_dir", type=Path, default=Path("out"), help="where the images go (default: out)")

    evaluate = commands.add_parser(
        "evaluate", help="score a model", description="Compare generated images with the training images."
    )
    evaluate.set_defaults(function=_evaluate)
    evaluate.add_argument("model", help="folder or Hub id of a pipeline")
    evaluate.add_argument("--dataset", default="digits", help="what to compare with: digits, a Hub id or a folder")
    evaluate.add_argument("--metrics", default="fid,kid,precision,recall", help="comma-separated (default: all)")
    evaluate.add_argument("--features", help="features to compare in: digits (default for digits), pixels")
    evaluate.add_argument("--output", type=Path, help="JSON file for the scores")
    _add_sampling_options(evaluate, num_images=10000)

    analyze = commands.add_parser(
        "analyze",
        help="look at the attention maps of a model",
        description="Correlation and CKA between the attention maps of a model's blocks, and their change with time.",
    )
    analyze.set_defaults(function=_analyze, scheduler=None)
    analyze.add_argument("model", help="folder or Hub id of a pipeline")
    analyze.add_argument("--dataset", default="digits", help="images to look at: digits, a Hub id or a folder")
    analyze.add_argument("--num_images", type=int, default=512, help="how many, held-out if there are (default: 512)")
    analyze.add_argument("--num_timesteps", type=int, default=10, help="spread over the schedule (default: 10)")
    analyze.add_argument("--batch_size", type=int, default=64, help="images at a time (default: 64)")
    analyze.add_argument("--output_dir", type=Path, default=Path("out"), help="where to (default: out)")
    analyze.add_argument("--device", help="for example cpu or cuda; by default a GPU where there is one")

    study = commands.add_parser(
        "study", help="compare variants over seeds", description="Train and score variants of a model over seeds."
    )
    study.set_defaults(function=_study)
    study.add_argument("config", type=Path, help="YAML file: baseline, seeds, common, variants; see studies/")
    study.add_argument("--output_dir", type=Path, help="folder of the runs and the report (default: runs/NAME)")
    study.add_argument("--jobs", type=int, help="runs side by side, of one thread each (default: one for each core)")
    return parser


def _add_sampling_options(parser: argparse.ArgumentParser, num_images: int) -> None:
    parser.add_argument("--num_images", type=int, default=num_images, help=f"how many (default: {num_images})")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (default: 25)")
    parser.add_argument(
        "--scheduler", help="sampler, for example dpm_sde, dpm, ddim or ddpm; by default the pipeline's own"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same images (default: 0)")
    parser.add_argument("--batch_size", type=int, default=250, help="images at a time (default: 250)")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="classifier-free guidance (default: 1, none)")
    parser.add_argument("--device", help="for example cpu or cuda; by default a GPU where there is one")


def _sample(options: argparse.Namespace) -> None:
    import torch
    from PIL import Image

    from .plots import image_grid
    from .sampling import sample_images

    pipeline = _load_pipeline(options)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    shown = []
    batches = sample_images(
        pipeline,
        options.num_images,
        options.steps,
        options.seed,
        options.batch_size,
        options.class_label,
        options.guidance_scale,
    )
    number = 0
    for images in batches:
        for image in images:
            pixels = image.permute(1, 2, 0).squeeze(-1).numpy()
            Image.fromarray(pixels).save(options.output_dir / f"{number:05d}.png")
            number += 1
        shown.append(images[: max(0, 100 - sum(map(len, shown)))])
    image_grid(torch.cat(shown)).save(options.output_dir / "grid.png")
    print(f"{number} images and grid.png are in {options.output_dir}")


def _evaluate(options: argparse.Namespace) -> None:
    from .data import DIGITS, load_dataset_splits
    from .evaluation import evaluate, format_scores
    from .features import EXTRACTORS, get_extractor
    from .metrics import check_metrics
    from .pixels import prepare_pixels

    if options.features is None and options.dataset != DIGITS:
        raise UsageError(f"name the features to compare in: --features {', '.join(EXTRACTORS)}.")
    metrics = [name.strip() for name in options.metrics.split(",")]
    check_metrics(metrics)
    pipeline = _load_pipeline(options)
    unet = pipeline.unet.config
    folder = Path(options.dataset)
    train, held_out = (
        load_dataset_splits(train_data_dir=options.dataset) if folder.is_dir() else load_dataset_splits(options.dataset)
    )
    train = prepare_pixels(train, unet.sample_size, unet.in_channels)
    held_out = prepare_pixels(held_out, unet.sample_size, unet.in_channels) if held_out is not None else None
    scores = evaluate(
        pipeline,
        train,
        held_out,
        get_extractor(options.features or DIGITS, unet.sample_size, unet.in_channels),
        metrics,
        options.num_images,
        options.steps,
        options.seed,
        options.batch_size,
        options.guidance_scale,
    )
    print(format_scores(scores))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(scores, indent=2) + "\n")


def _analyze(options: argparse.Namespace) -> None:
    from .analysis import collect_maps
    from .analysis_report import format_analysis, report
    from .data import load_dataset_splits
    from .pixels import prepare_pixels
    from .sampling import make_scheduler

    for name in ("num_images", "num_timesteps", "batch_size"):
        if getattr(options, name) < 1:
            raise UsageError(f"{name} must be at least 1, but is {getattr(options, name)}.")
    pipeline = _load_pipeline(options)
    unet = pipeline.unet
    if getattr(unet, "dia", None) is None:
        raise UsageError(f"'{options.model}' has no attention maps: it was trained without DIA (dia_attention).")
    is_folder = Path(options.dataset).is_dir()
    splits = load_dataset_splits(**{"train_data_dir" if is_folder else "dataset_name": options.dataset})
    images = splits[0] if splits[1] is None else splits[1]
    with_labels = unet.config.num_class_embeds is not None
    pixels = prepare_pixels(images, unet.config.sample_size, unet.config.in_channels, with_labels=with_labels)
    scheduler = make_scheduler("ddpm", pipeline.scheduler.config)
    maps, timesteps = collect_maps(
        unet, scheduler, pixels, options.num_images, options.num_timesteps, options.batch_size
    )
    print(format_analysis(report(maps, timesteps, options.output_dir)))
    print(f"All figures and four pictures are in {options.output_dir}")


def _study(options: argparse.Namespace) -> None:
    from .interrupts import Interrupted
    from .study import run_study

    folder = options.output_dir or Path("runs") / options.config.stem
    try:
        run_study(options.config, folder, options.jobs)
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        sys.exit(128 + interruption.signum)
    print((folder / "study.md").read_text())
    print(f"Table, figures of every run and picture: {folder}/study.md, study.json, study.png")


def _load_pipeline(options: argparse.Namespace) -> "DiffusionPipeline":
    import torch

    from .sampling import load_pipeline, make_scheduler

    pipeline = load_pipeline(options.model)
    if options.scheduler is not None:
        pipeline.scheduler = make_scheduler(options.scheduler, pipeline.scheduler.config)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return pipeline.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error


if __name__ == "__main__":
    sys.exit(main())
