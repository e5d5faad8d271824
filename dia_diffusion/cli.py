"""The command lines: `dia train`, which is also what `train_unet.py` calls, `dia sample`, `dia evaluate`,
`dia analyze`, `dia app` and `dia study`."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError

from . import __version__
from .errors import UsageError
from .options.fields import COUNT, NATURAL, Range, number_type
from .options.parser import SuggestingParser
from .process.output import guard_streams
from .process.signals import Interrupted
from .process.startup import end_with_launcher, quiet_dependencies, start_missing_processes, tune_process

Commands = argparse._SubParsersAction

# Imports of torch and diffusers stand inside the functions: `dia --help` should not wait for them.


def train_main(arguments: Sequence[str] | None = None) -> int:
    """Trains; returns the exit status: 0, 2 after a mistake, 128 plus the signal after an interruption."""
    guard_streams()
    return _run(_train, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The `dia` command; returns the exit status."""
    guard_streams()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["train"]:
        # Its options are those of the description of a run, which takes seconds to import.
        return train_main(arguments[1:])
    parser = make_parser()
    options = parser.parse_args(arguments)
    if "function" not in options:
        parser.print_help()
        return 2
    return _run(options.function, options)


def _run(function: Callable, argument: object) -> int:
    quiet_dependencies()
    try:
        end_with_launcher()
        start_missing_processes()
        tune_process()
        function(argument)
    except (UsageError, OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        from accelerate.utils.memory import should_reduce_batch_size

        if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
            raise
        print(f"error: out of memory: take fewer or smaller images at a time. {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _train(arguments: Sequence[str] | None) -> None:
    from .options.training import parse_arguments
    from .scoring.score_report import format_scores
    from .training.loop import train

    config = parse_arguments(arguments)
    try:
        figures = train(config)
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        sys.exit(128 + interruption.signum)
    if figures:
        if "features" in figures:
            print(format_scores(figures))
        folder = config.output.folder
        print(f"Made in {folder}: the pipeline, its card (README.md), pictures and scores in one page (report.html).")
        print(f"Next: dia sample {folder}, dia app {folder}, dia evaluate {folder}; each has --help.")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the `dia` command."""
    parser = SuggestingParser(prog="dia", description="Diffusion UNets with shared attention.")
    parser.add_argument("--version", action="version", version=f"dia-diffusion {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")

    commands.add_parser("train", help="train a model, as train_unet.py does; dia train --help lists its options")
    for add in (_add_sample, _add_evaluate, _add_analyze, _add_app, _add_study):
        add(commands)
    return parser


def _add_sample(commands: Commands) -> None:
    sample = commands.add_parser(
        "sample", aliases=["generate"], help="generate images", description="Generate images as PNG files."
    )
    sample.set_defaults(function=_sample)
    sample.add_argument("model", type=os.path.expanduser, help="folder or Hub id of a pipeline")
    _add_sampling_options(sample, num_images=64)
    sample.add_argument("--class_label", help="name or number of the class of all images; by default all in turn")
    sample.add_argument(
        "--output_dir", type=_path, default=Path("out"), help="folder for the images alone (default: out)"
    )
    sample.add_argument("--overwrite", action="store_true", help="replace the images of an earlier call there")


def _add_evaluate(commands: Commands) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        aliases=["eval"],
        help="score a model or a folder of images",
        description="Compare generated images with real ones. On several GPUs: accelerate launch -m dia_diffusion.cli "
        "evaluate ...",
    )
    evaluate.set_defaults(function=_evaluate)
    evaluate.add_argument(
        "what", type=os.path.expanduser, help="folder or Hub id of a pipeline, a folder of images, or samples (.npz)"
    )
    evaluate.add_argument(
        "--dataset",
        type=os.path.expanduser,
        help="what to compare with: digits, mnist5k, a folder, a Hub id, or statistics or samples (.npz); by default "
        "the data that the training run of the pipeline records",
    )
    evaluate.add_argument("--dataset_config_name", help="configuration of a data set that has several")
    evaluate.add_argument("--image_column", help="column of the images, where it cannot be guessed")
    evaluate.add_argument(
        "--metrics", help="comma-separated, of fid, kid, is, precision, recall (default: all but is; for .npz fid)"
    )
    evaluate.add_argument(
        "--features",
        type=os.path.expanduser,
        help="features to compare in: digits (default for digits), inception, pixels, or folder or Hub id of a vision "
        "model of transformers",
    )
    evaluate.add_argument("--inception_path", type=os.path.expanduser, help="TorchScript file of the Inception network")
    evaluate.add_argument("--output", type=_path, help="JSON file for the scores")
    evaluate.add_argument("--report", type=_path, help="HTML file for the scores and pictures")
    evaluate.add_argument(
        "--save_images", type=_path, metavar="DIR", help="write the images there; interrupted scoring goes on with them"
    )
    evaluate.add_argument(
        "--class_proportions",
        choices=("reference", "even"),
        help="how often a class-conditional model draws each class: as often as the reference has it (default), or all "
        "alike",
    )
    _add_sampling_options(evaluate, num_images=10000)
    # Left open: for images in files they have no meaning, and are refused where they are given.
    evaluate.set_defaults(num_images=None, steps=None, seed=None, guidance_scale=None)


def _add_analyze(commands: Commands) -> None:
    analyze = commands.add_parser(
        "analyze",
        help="look at the attention maps of a model",
        description="Correlation and CKA between the attention maps of a model's blocks, and their change with time.",
    )
    analyze.set_defaults(function=_analyze)
    analyze.add_argument("model", type=os.path.expanduser, help="folder or Hub id of a pipeline")
    analyze.add_argument(
        "--attention",
        type=os.path.expanduser,
        help="folder or Hub id of a saved attention; MODEL is then the image classifier of transformers that it fits",
    )
    analyze.add_argument(
        "--dataset",
        type=os.path.expanduser,
        help="images to look at: digits, mnist5k, a folder or a Hub id; by default the data that the training run of "
        "the model records",
    )
    analyze.add_argument(
        "--num_images", type=number_type(int, COUNT), default=512, help="how many, held-out if there are (default: 512)"
    )
    analyze.add_argument(
        "--num_timesteps", type=number_type(int, COUNT), default=10, help="spread over the schedule (default: 10)"
    )
    analyze.add_argument(
        "--batch_size", type=number_type(int, COUNT), default=64, help="images at a time (default: 64)"
    )
    analyze.add_argument("--output_dir", type=_path, default=Path("analysis"), help="where to (default: analysis)")
    analyze.add_argument("--device", help="for example cpu or cuda; by default a GPU where there is one")


def _add_app(commands: Commands) -> None:
    app = commands.add_parser(
        "app", help="try a model in a browser", description="A page to try a model (pip install 'dia-diffusion[app]')."
    )
    app.set_defaults(function=_app)
    app.add_argument("model", type=os.path.expanduser, help="folder or Hub id of a pipeline")
    app.add_argument("--device", help="for example cpu or cuda; by default a GPU where there is one")


def _add_study(commands: Commands) -> None:
    study = commands.add_parser(
        "study", help="compare variants over seeds", description="Train and score variants of a model over seeds."
    )
    study.set_defaults(function=_study)
    study.add_argument("config", type=_path, help="YAML file: baseline, seeds, common, variants; see studies/")
    study.add_argument("--output_dir", type=_path, help="folder of the runs and the report (default: runs/NAME)")
    study.add_argument(
        "--jobs",
        type=number_type(int, COUNT),
        help="runs side by side (default: one for each GPU, or for each core where there is none; with --ray as many "
        "as there is room for)",
    )
    study.add_argument(
        "--ray", metavar="ADDRESS", help="do the runs on the Ray cluster there, or on the one of this machine: auto"
    )
    study.add_argument("--cpus_per_run", type=number_type(int, COUNT), help="with --ray: cores of a run (default: 1)")
    study.add_argument(
        "--gpus_per_run",
        type=number_type(float, Range(least=0, most=1)),
        help="with --ray: the share of a GPU that a run takes (default: 1 if the cluster has GPUs)",
    )


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # noqa: PTH111 (Path's own fails for a user that there is not)


def _add_sampling_options(parser: argparse.ArgumentParser, num_images: int) -> None:
    parser.add_argument(
        "--num_images",
        "--n",
        type=number_type(int, COUNT),
        default=num_images,
        help=f"how many (default: {num_images})",
    )
    parser.add_argument(
        "--steps", "--num_inference_steps", type=number_type(int, COUNT), default=25, help="denoising (default: 25)"
    )
    parser.add_argument(
        "--scheduler",
        help="sampler, such as dpm_sde or euler, by default the pipeline's own; a name that does not fit is "
        "answered with those that do",
    )
    parser.add_argument(
        "--seed", type=number_type(int, NATURAL), default=0, help="the same seed gives the same images (default: 0)"
    )
    parser.add_argument(
        "--batch_size", type=number_type(int, COUNT), default=250, help="images at a time (default: 250)"
    )
    parser.add_argument(
        "--guidance_scale",
        type=number_type(float, Range()),
        default=1.0,
        help="strength of guidance, by a guide or classifier-free (default: 1, none)",
    )
    parser.add_argument(
        "--guide",
        type=os.path.expanduser,
        metavar="MODEL",
        help="folder or Hub id of a worse model of the same images (smaller, or trained for a shorter time), for "
        "autoguidance",
    )
    parser.add_argument("--device", help="for example cpu or cuda; by default a GPU where there is one")
    parser.add_argument(
        "--compile",
        dest="compile_mode",
        action="store_const",
        const="default",
        help="compile the UNet with torch.compile, which takes a minute and pays for many images",
    )
    parser.add_argument(
        "--compile_mode",
        choices=("default", "reduce-overhead"),
        help="compile it in this mode: reduce-overhead replays CUDA graphs on a GPU",
    )


def _sample(options: argparse.Namespace) -> None:
    from .sampling.dia_sample import sample

    sample(options)


def _evaluate(options: argparse.Namespace) -> None:
    from .scoring.dia_evaluate import score

    score(options)


def _analyze(options: argparse.Namespace) -> None:
    from .analysis.dia_analyze import analyze

    analyze(options)


def _app(options: argparse.Namespace) -> None:
    from .app.dia_app import launch_app

    launch_app(options.model, options.device)


def _study(options: argparse.Namespace) -> None:
    from .study.dia_study import Cluster, run_study

    folder, resources = (
        options.output_dir or Path("runs") / options.config.stem,
        (options.cpus_per_run, options.gpus_per_run),
    )
    if options.ray is None and resources != (None, None):
        raise UsageError(
            "--cpus_per_run and --gpus_per_run say what a run takes of a cluster: they need --ray ADDRESS."
        )
    try:
        run_study(options.config, folder, options.jobs, options.ray and Cluster(options.ray, *resources))
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        sys.exit(128 + interruption.signum)
    print((folder / "study.md").read_text())
    print(
        f"The report is {folder}/study.html; table, figures of every run and picture: study.md, study.json, study.png."
    )


if __name__ == "__main__":
    sys.exit(main())
