"""The `dia` command, and `train_main`, which `train_unet.py` calls.

A command line is parsed and checked before torch or diffusers are imported, which takes seconds: their imports stand
inside of the functions that need them.
"""

import errno
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from . import __version__
from .errors import UsageError
from .options.commands import (
    AnalyzeOptions,
    AppOptions,
    CacheOptions,
    CommandOptions,
    DemoOptions,
    EvaluateOptions,
    SampleOptions,
    StudyOptions,
)
from .options.parser import OptionParser
from .options.training import TrainingConfig, configure_here, training_parser
from .process.output import guard_streams
from .process.signals import Interrupted
from .process.startup import end_with_launcher, ensure_home, quiet_dependencies, start_missing_processes, tune_process

Given = Mapping[str, Any]


def train_main(arguments: Sequence[str] | None = None) -> int:
    """Train; return the exit status: 0, 2 after a mistake, 128 plus the signal after an interruption."""
    guard_streams()
    return _run(configure_here, _train, vars(training_parser().parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `dia` command; return the exit status."""
    guard_streams()
    parser = make_parser()
    given = vars(parser.parse_args(arguments))
    if "command" not in given:
        parser.print_help()
        return 2
    prepare, work = given.pop("command")
    return _run(prepare, work, given)


def make_parser() -> OptionParser:
    """Return the parser of the `dia` command. It puts two functions under `command`: that which makes options of what
    was given, and that which does the work."""
    parser = OptionParser(prog="dia", description="Diffusion UNets with shared attention.")
    parser.general.add_argument(
        "--version", action="version", version=f"dia-diffusion {__version__}", help="Show the version."
    )
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", prog="dia")

    def add(name: str, part: type[CommandOptions], work: Callable, text: str, about: str, *aliases: str) -> None:
        command = commands.add_parser(name, aliases=aliases, help=text, description=about, parts=[part])
        command.set_defaults(command=(lambda given: part.of(name, given), work))

    train = training_parser(lambda **settings: commands.add_parser("train", help="train a model", **settings))
    train.set_defaults(command=(configure_here, _train))
    add("sample", SampleOptions, _sample, "generate images", "Generate images as PNG files.", "generate")
    add(
        "evaluate",
        EvaluateOptions,
        _evaluate,
        "score a model or a folder of images",
        "Compare generated images with real ones. On several GPUs: accelerate launch -m dia_diffusion.cli evaluate ...",
        "eval",
    )
    add(
        "analyze",
        AnalyzeOptions,
        _analyze,
        "look at the attention maps of a model",
        "Correlation and CKA between the attention maps of a model's blocks, and their change with time.",
    )
    add("app", AppOptions, _app, "try a model in a browser", "A page to try a model: pip install 'dia-diffusion[app]'.")
    add("study", StudyOptions, _study, "compare variants over seeds", "Train and score variants of a model over seeds.")
    demo = "Train on the embedded digits for some minutes, score, and sample 100 images. The same call goes on."
    add("demo", DemoOptions, _demo, "train, score and sample handwritten digits", demo)
    cache = "List what is kept to save time: prepared images, latents, statistics and networks of scores."
    add("cache", CacheOptions, _cache, "list or remove what is cached", cache)
    return parser


def _run(prepare: Callable[[Given], Any], work: Callable[[Any], None], given: Given) -> int:
    """Run a command: check its options, and only then set up the process and do the work."""
    quiet_dependencies()
    ensure_home()
    try:
        end_with_launcher()
        options = prepare(given)
        start_missing_processes()
        tune_process()
        work(options)
    except (UsageError, OSError, SafetensorError) as error:
        # What Python says of a working directory that was removed.
        gone = isinstance(error, OSError) and error.errno == errno.ENOENT and error.filename is None
        print(f"error: {'the working directory is gone: change to another' if gone else error}", file=sys.stderr)
        return 2
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        return 128 + interruption.signum
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


def _train(config: TrainingConfig) -> None:
    from .scoring.score_report import format_scores
    from .training.loop import train
    from .training.run import explain_end

    if figures := train(config):
        scores = [format_scores(figures)] if "features" in figures else []
        print("\n".join([*scores, explain_end(config, figures)]))


def _sample(options: SampleOptions) -> None:
    from .sampling.dia_sample import sample

    options.output_dir = options.output_dir or Path("out")
    sample(options)


def _evaluate(options: EvaluateOptions) -> None:
    from .scoring.dia_evaluate import score

    score(options, shlex.join(["dia", *sys.argv[1:]]))


def _analyze(options: AnalyzeOptions) -> None:
    from .analysis.dia_analyze import analyze

    analyze(options)


def _app(options: AppOptions) -> None:
    from .app.dia_app import launch_app

    launch_app(options.model, options.device, options.host, options.port, options.share, options.variant)


def _study(options: StudyOptions) -> None:
    from .study.dia_study import Cluster, run_study

    folder = options.output_dir or Path("runs") / options.config.stem
    cluster = Cluster(options.ray, options.cpus_per_run, options.gpus_per_run) if options.ray else None
    run_study(options.config, folder, options.jobs, cluster)
    print((folder / "study.md").read_text())
    print(
        f"The report is {folder}/study.html; table, figures of every run and picture: study.md, study.json, study.png."
    )


def _demo(options: DemoOptions) -> None:
    run, images = options.output_dir, options.output_dir / "images"
    given = {"recipe": "digits", "output_dir": str(run), "resume_from_checkpoint": "latest"}
    if not (run / "metrics.json").exists():
        _train(configure_here(given))
    # The picture of all images is written last.
    if not images.with_suffix(".png").exists():
        _sample(SampleOptions(model=str(run), num_images=100, output_dir=images, overwrite=True))
    print(f"Open {run}/report.html in a browser: samples, scores, curves. The images are in {images}.")


def _cache(options: CacheOptions) -> None:
    from .data.stored import clean_caches, describe_caches

    print(describe_caches(options.cache_dir))
    if options.clean:
        print(clean_caches(options.cache_dir))


if __name__ == "__main__":
    sys.exit(main())
