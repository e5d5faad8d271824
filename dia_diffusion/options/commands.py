"""Options of the commands beside training: sample, evaluate, analyze, app, study, demo and cache."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Annotated, Any, ClassVar, Literal

from ..errors import UsageError, nearest
from .fields import COUNT, Count, File, Label, Location, Names, Natural, Options, Range, option
from .parser import rename_aliases
from .rules import ANALYSIS_RULES, EVALUATION_RULES, STUDY_RULES, Rule, check_effect

METRICS = ("fid", "kid", "is", "precision", "recall")
_MODEL = "Folder or Hub id of a pipeline."
_DATA_ALIASES = ("dataset_name", "train_data_dir")


@dataclass
class CommandOptions(Options):
    """Base of the options of a command.

    Attributes:
        rules (tuple of `Rule`): The cases in which an option has no effect.
    """

    rules: ClassVar[tuple[Rule, ...]] = ()

    @classmethod
    def of(cls, command: str, given: Mapping[str, Any]) -> Any:
        """Return the options that were given, on the command line or in Python, completed by the defaults.

        Args:
            command (`str`): Name of the command, for messages.
            given (`dict`): Options by name or alias.

        Raises:
            UsageError: for an unknown option, a value that cannot be, and an option without effect.
        """
        given = rename_aliases(given, [cls], lambda unknown: f"{command} has no option '{unknown[0]}'.")
        required = [item.name for item in fields(cls) if item.default is MISSING]
        if absent := [name for name in required if given.get(name) is None]:
            raise UsageError(f"{command} needs {' and '.join(absent)}.")
        options = cls(**given)
        check_effect(cls.rules, asdict(options), [name for name, value in given.items() if value is not None])
        return options


@dataclass(kw_only=True)
class DeviceOptions(CommandOptions):
    """The device that a model runs on, and its variant."""

    group = "device"

    device: str | None = option(None, "For example cpu or cuda; by default a GPU where there is one.")
    variant: str | None = option(None, "Variant of the saved weights, such as fp16; by default the only one there is.")

    def __post_init__(self) -> None:
        # From Python it may be a `torch.device`.
        self.device = None if self.device is None else str(self.device)
        super().__post_init__()


@dataclass(kw_only=True)
class SamplingOptions(DeviceOptions):
    """Sampling with a pipeline."""

    group = "sampling"

    steps: Count = option(25, "Denoising steps.", aliases=("num_inference_steps",))
    scheduler: str | None = option(
        None,
        "Sampler, such as dpm_sde or euler, by default the pipeline's own; a name that does not fit is answered with "
        "those that do.",
    )
    seed: Natural = option(0, "The same seed gives the same images.")
    batch_size: Count = option(250, "Images at a time.")
    guidance_scale: Annotated[float, Range()] = option(1.0, "Strength of guidance, by a guide or classifier-free.")
    guide: Location | None = option(
        None,
        "Folder or Hub id of a worse model of the same images (smaller, or trained for a shorter time), for "
        "autoguidance.",
    )
    compile: bool = option(False, "Compile the UNet with torch.compile, which takes a minute and pays for many images.")
    compile_mode: Literal["default", "reduce-overhead"] | None = option(
        None, "Compile it in this mode: reduce-overhead replays CUDA graphs on a GPU."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile and self.compile_mode is None:
            self.compile_mode = "default"
        if self.guide is not None and self.guidance_scale == 1:
            raise UsageError("a guide does nothing at guidance_scale 1: give a larger one, such as 1.5.")


@dataclass
class SampleOptions(SamplingOptions):
    """Options of `dia sample`."""

    model: Location = option(text=_MODEL)
    num_images: Count = option(64, "How many.", aliases=("n",))
    class_label: Label | None = option(
        None, "Name or number of the class of all images; by default all in turn, in Python also those of a list."
    )
    output_dir: File | None = option(
        None, "Folder for the images alone; in Python without it no files are written.", shown="out"
    )
    overwrite: bool = option(False, "Replace the images of an earlier call there.")


@dataclass
class EvaluateOptions(SamplingOptions):
    """Options of `dia evaluate`."""

    group = "evaluation"
    rules = EVALUATION_RULES

    what: Location = option(text="Folder or Hub id of a pipeline, a folder of images, or samples (.npz, .npy).")
    dataset: Location | None = option(
        None,
        "What to compare with: digits, mnist5k, a folder, a Hub id, or statistics or samples (.npz, .npy); by default "
        "the data that the model's run records.",
        aliases=_DATA_ALIASES,
    )
    dataset_config_name: str | None = option(None, "Configuration of a data set that has several.")
    image_column: str | None = option(None, "Column of the images, where it cannot be guessed.")
    num_images: Count = option(10000, "How many images to generate.", aliases=("n",), group="sampling")
    metrics: Names | None = option(
        None, "Comma-separated, of fid, kid, is, precision, recall; by default all but is, for statistics fid."
    )
    features: Location | None = option(
        None,
        "Features to compare in: digits (default for digits), inception, pixels, or folder or Hub id of a vision model "
        "of transformers.",
    )
    inception_path: Location | None = option(None, "TorchScript file of the Inception network.")
    output: File | None = option(None, "JSON file for the scores.")
    report: File | None = option(None, "HTML file for the scores and pictures.")
    class_proportions: Literal["reference", "even"] | None = option(
        None,
        "How often a class-conditional model draws each class: as the reference has it (default), or all alike.",
        group="sampling",
    )
    save_images: File | None = option(
        None, "Folder to write the images to; interrupted scoring goes on with them.", metavar="DIR"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metrics is not None:
            self.metrics = [name.lower() for name in self.metrics]
            check_metric_names(self.metrics)


def check_metric_names(metrics: Sequence[str]) -> None:
    """Refuse metrics that are unknown, and none at all."""
    if not metrics:
        raise UsageError(f"name at least one metric of: {', '.join(METRICS)}.")
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise UsageError(
            f"there is no metric named '{unknown[0]}'; choose from: {', '.join(METRICS)}.{nearest(unknown[0], METRICS)}"
        )


@dataclass
class AnalyzeOptions(DeviceOptions):
    """Options of `dia analyze`."""

    group = "analysis"
    rules = ANALYSIS_RULES

    model: Location = option(text=_MODEL)
    attention: Location | None = option(
        None, "Folder or Hub id of a saved attention; MODEL is then the image classifier of transformers that it fits."
    )
    dataset: Location | None = option(
        None,
        "Images to look at: digits, mnist5k, a folder or a Hub id; by default the data that the model's run records.",
        aliases=_DATA_ALIASES,
    )
    num_images: Count = option(512, "How many, held-out if there are.", aliases=("n",))
    num_timesteps: Count = option(10, "Timesteps, spread over the schedule.")
    batch_size: Count = option(64, "Images at a time.")
    output_dir: File = option("analysis", "Folder for the report.")


@dataclass
class AppOptions(DeviceOptions):
    """Options of `dia app`."""

    group = "app"

    model: Location = option(text=_MODEL)
    host: str | None = option(
        None, "Address to serve on: 0.0.0.0 for other machines; by default GRADIO_SERVER_NAME or this machine alone."
    )
    port: Annotated[int, Range(least=1, most=65535)] | None = option(
        None, "Port; by default GRADIO_SERVER_PORT or a free one from 7860."
    )
    share: bool = option(False, "Make a public link through Gradio's servers.")


@dataclass
class StudyOptions(CommandOptions):
    """Options of `dia study`."""

    group = "study"
    rules = STUDY_RULES

    config: File = option(text="YAML file: baseline, seeds, common, variants; see studies/.")
    output_dir: File | None = option(None, "Folder of the runs and the report; by default runs/NAME.")
    jobs: Count | None = option(
        None,
        "Runs side by side; by default one for each GPU, or for each core where there is none, and with --ray as many "
        "as there is room for.",
    )
    ray: str | None = option(
        None, "Do the runs on the Ray cluster at this address, or on that of this machine: auto.", metavar="ADDRESS"
    )
    cpus_per_run: Annotated[int, COUNT] | None = option(None, "With --ray: cores of a run; by default 1.")
    gpus_per_run: Annotated[float, Range(least=0, most=1)] | None = option(
        None, "With --ray: the share of a GPU that a run takes; by default 1 if the cluster has GPUs."
    )


@dataclass
class DemoOptions(CommandOptions):
    """Options of `dia demo`."""

    group = "demo"

    output_dir: File = option("runs/digits", "Folder of the run; the images go to images/ inside.")


@dataclass
class CacheOptions(CommandOptions):
    """Options of `dia cache`."""

    group = "cache"

    clean: bool = option(False, "Remove what is listed; it is made again when it is needed.")
    cache_dir: Location | None = option(
        None, "The --cache_dir of the runs, if they had one; by default the cache of `datasets`."
    )
