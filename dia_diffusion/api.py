"""The commands from Python: `train`, `sample`, `evaluate` and `analyze`, with their options as keyword arguments.

They are called as often as one likes in one process. An option has the name of its flag; `help(train)` lists them, and
a wrong name is answered with the nearest one. What they need is imported when they are called.
"""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from .options.commands import AnalyzeOptions, EvaluateOptions, SampleOptions
from .options.training import TrainOptions, configure_here

if TYPE_CHECKING:
    from PIL.Image import Image

    from .pipelines.pipeline_dia_unet import DIAUNetPipeline

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class TrainedModel:
    """The results of a training run.

    Attributes:
        folder (`Path`): The output directory.
        figures (`dict`): The content of its `metrics.json`: the last losses and, where asked for, the scores.
    """

    folder: Path
    figures: dict[str, Any]

    @cached_property
    def pipeline(self) -> "DIAUNetPipeline":
        """The trained pipeline, loaded when it is first asked for."""
        from .pipelines.pipeline_dia_unet import DIAUNetPipeline

        return DIAUNetPipeline.from_pretrained(self.folder)


def _takes(options: Callable[P, Any]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Give a function that takes `**given` the fields of a dataclass of options as its signature."""

    def decorate(function: Callable[..., R]) -> Callable[P, R]:
        items = fields(options)  # type: ignore[arg-type]
        required = [Parameter(item.name, Parameter.POSITIONAL_OR_KEYWORD) for item in items if item.default is MISSING]
        others = [
            Parameter(item.name, Parameter.KEYWORD_ONLY, default=item.default, annotation=item.type)
            for item in items
            if item.default is not MISSING
        ]
        function.__signature__ = Signature([*required, *others])  # type: ignore[attr-defined]
        return function

    return decorate


@_takes(TrainOptions)
def train(**given: Any) -> TrainedModel:
    """Train a diffusion UNet with shared attention, as `dia train` does.

    Args:
        given: The options of `dia train` (`dia train --help_all`), among them `recipe` and `config`.

    Returns:
        [`TrainedModel`]: its `pipeline`, `figures` and `folder`.

    Raises:
        UsageError: for options that are unknown or cannot work, data that cannot be read, or a run that diverges.
        Interrupted: after Ctrl-C, with a checkpoint written; `resume_from_checkpoint="latest"` goes on.

    Example:
        ```python
        from dia_diffusion import train

        run = train(recipe="images", train_data_dir="photos", resolution=32, output_dir="runs/photos")
        run.pipeline(batch_size=4).images[0].save("one.png")
        print(run.figures["held_out_loss"])
        ```
    """
    config = configure_here(given)
    from .training.loop import train as run

    return TrainedModel(config.output.folder, run(config))


@_takes(SampleOptions)
def sample(model: Any, **given: Any) -> "list[Image]":
    """Sample images from a saved pipeline, as `dia sample` does.

    Args:
        model (`str` or `PathLike`): Folder or Hub id of a pipeline.
        given: The options of `dia sample`. Without `output_dir` no files are written.

    Returns:
        list of `PIL.Image.Image`: the images.

    Raises:
        UsageError: for options that are unknown or do not fit the model, or a model that cannot be loaded.

    Example:
        ```python
        from dia_diffusion import sample

        images = sample("runs/digits", num_images=16, steps=10, class_label=7, scheduler="ddim")
        ```
    """
    options = SampleOptions.of("sample", {"model": model, **given})
    from .sampling.dia_sample import sample as run

    made, folder = run(options), options.output_dir
    return (
        made
        if folder is None
        else [_read(path) for path in sorted(folder.glob("*.png"), key=lambda path: int(path.stem))]
    )


def _read(path: Path) -> "Image":
    from PIL import Image

    image = Image.open(path)
    # Closes the file: a process may have about a thousand open.
    image.load()
    return image


@_takes(EvaluateOptions)
def evaluate(what: Any, **given: Any) -> dict[str, Any]:
    """Score a pipeline or a folder of images against real images, as `dia evaluate` does.

    Args:
        what (`str` or `PathLike`): Folder or Hub id of a pipeline, a folder of images, or samples (.npz, .npy).
        given: The options of `dia evaluate`; `metrics` may be a list.

    Returns:
        `dict`: the scores, with the keys of the JSON that `output` names: `fid`, `kid_mean`, `floor` and others. Empty
        on processes other than the main one.

    Raises:
        UsageError: for options that are unknown or do not fit each other or the data.

    Example:
        ```python
        from dia_diffusion import evaluate

        scores = evaluate("runs/digits", dataset="digits", num_images=1000, metrics=["fid", "recall"])
        print(scores["fid"], scores["floor"]["fid"])
        ```
    """
    options = EvaluateOptions.of("evaluate", {"what": what, **given})
    from .scoring.dia_evaluate import score

    return score(options) or {}


@_takes(AnalyzeOptions)
def analyze(model: Any, **given: Any) -> dict[str, Any]:
    """Compare the attention maps of a model's blocks, as `dia analyze` does.

    Args:
        model (`str` or `PathLike`): Folder or Hub id of a pipeline.
        given: The options of `dia analyze`. The report goes to `output_dir`, by default `analysis`.

    Returns:
        `dict`: the figures of the report: correlations and CKA between the maps.

    Raises:
        UsageError: for a model without attention maps, or options that cannot work.

    Example:
        ```python
        from dia_diffusion import analyze

        figures = analyze("runs/digits", dataset="digits", output_dir="maps")
        ```
    """
    options = AnalyzeOptions.of("analyze", {"model": model, **given})
    from .analysis.dia_analyze import analyze as run

    return run(options)
