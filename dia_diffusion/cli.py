"""The command lines: `dia sample`, `dia evaluate`, `dia analyze`, `dia study`, and what `train_unet.py` calls."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError

from .errors import UsageError
from .process import end_with_launcher, start_missing_processes, tune_process

# Imports of torch and diffusers stand inside the functions: `dia --help` should not wait for them.


def train_main(arguments: Sequence[str] | None = None) -> int:
    """Trains; returns the exit status: 0, 2 after a mistake, 128 plus the signal after an interruption."""
    end_with_launcher()
    start_missing_processes()
    tune_process()
    return _run(_train, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The `dia` command; returns the exit status."""
    options = make_parser().parse_args(arguments)
    start_missing_processes()
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
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _train(arguments: Sequence[str] | None) -> None:
    from .config import parse_arguments
    from .interrupts import Interrupted
    from .report import format_scores
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
        "evaluate",
        help="score a model or a folder of images",
        description="Compare generated images with real ones. On several GPUs: accelerate launch -m dia_diffusion.cli "
        "evaluate ...",
    )
    evaluate.set_defaults(function=_evaluate)
    evaluate.add_argument("what", help="folder or Hub id of a pipeline, or a folder of images")
    evaluate.add_argument(
        "--dataset",
        default="digits",
        help="what to compare with: digits, mnist5k, a Hub id, a folder of images, or statistics (.npz)",
    )
    evaluate.add_argument("--dataset_config_name", help="configuration of a data set that has several")
    evaluate.add_argument("--image_column", help="column of the images, where it cannot be guessed")
    evaluate.add_argument(
        "--metrics", help="comma-separated, of fid, kid, is, precision, recall (default: all but is; for .npz fid)"
    )
    evaluate.add_argument(
        "--features",
        help="features to compare in: digits (default for digits), inception, pixels, or folder or Hub id of a vision "
        "model of transformers",
    )
    evaluate.add_argument("--inception_path", help="TorchScript file of the Inception network")
    evaluate.add_argument("--output", type=Path, help="JSON file for the scores")
    evaluate.add_argument("--report", type=Path, help="HTML file for the scores and pictures")
    evaluate.add_argument(
        "--save_images", type=Path, metavar="DIR", help="write the images there; interrupted scoring goes on with them"
    )
    _add_sampling_options(evaluate, num_images=10000)

    analyze = commands.add_parser(
        "analyze",
        help="look at the attention maps of a model",
        description="Correlation and CKA between the attention maps of a model's blocks, and their change with time.",
    )
    analyze.set_defaults(function=_analyze)
    analyze.add_argument("model", help="folder or Hub id of a pipeline")
    analyze.add_argument("--dataset", default="digits", help="images to look at: digits, mnist5k, a Hub id or a folder")
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
    from .processes import make_state
    from .sampling import load_pipeline, sample_images

    pipeline = load_pipeline(options.model, options.scheduler, options.device or make_state().device)
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
    from .scoring import score

    score(options)


def _analyze(options: argparse.Namespace) -> None:
    from .analysis import collect_maps
    from .analysis_report import format_analysis, report
    from .data import load_images
    from .pixels import prepare_pixels
    from .processes import make_state
    from .sampling import load_pipeline, make_scheduler

    for name in ("num_images", "num_timesteps", "batch_size"):
        if getattr(options, name) < 1:
            raise UsageError(f"{name} must be at least 1, but is {getattr(options, name)}.")
    pipeline = load_pipeline(options.model, device=options.device or make_state().device)
    unet = pipeline.unet
    if getattr(unet, "dia", None) is None:
        raise UsageError(f"'{options.model}' has no attention maps: it was trained without DIA (dia_attention).")
    train, held_out = load_images(options.dataset)
    images = train if held_out is None else held_out
    if not isinstance(unet.config.sample_size, int):
        raise UsageError(f"only models of square images can be analyzed, not of {unet.config.sample_size}.")
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


if __name__ == "__main__":
    sys.exit(main())
