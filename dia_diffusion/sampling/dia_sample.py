"""`dia sample`: images as PNG files, and a picture of them all."""

import re
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ..data.grid import image_grid
from ..errors import UsageError
from ..files import lock_folder, replace_file
from ..options.commands import SampleOptions
from ..pipelines.inputs import NO_CLASS
from ..process.distributed import find_device, make_state
from .generation import check_sampling, describe_guidance, find_advice, find_classes, sample_images
from .loading import load_pipeline

# Files that this command writes, and `grid.png` of an earlier version.
_SAMPLES = re.compile(r"\d{5,}\.png|grid\.png")


def sample(options: SampleOptions) -> list[Image.Image]:
    """Sample images; write them as PNG files and in one picture, if the options name a folder.

    The folder holds the images of one call and nothing else; the picture of them all lies beside it.

    Returns:
        list of `Image`: the images, if the options name no folder; else nothing.

    Raises:
        UsageError: for a pipeline that cannot be loaded, or cannot do what was asked for, or a folder that is taken.
    """
    folder = None if options.output_dir is None else options.output_dir.resolve()
    if folder is not None and not make_state().is_main_process:
        # One process makes all images.
        return []
    with nullcontext() if folder is None else lock_folder(folder):
        return _sample(options, folder)


def _sample(options: SampleOptions, folder: Path | None) -> list[Image.Image]:
    grid = None if folder is None else folder.parent / f"{folder.name}.png"
    earlier = [] if folder is None or grid is None else _find_earlier(folder, grid, options.overwrite)
    device = find_device(options.device, make_state())
    pipeline = load_pipeline(
        options.model, options.scheduler, device, options.compile_mode, options.guide, options.variant
    )
    check_sampling(pipeline, options.steps)
    class_label = None if options.class_label is None else find_classes(pipeline, options.class_label)
    if isinstance(class_label, list) and len(class_label) > options.num_images:
        raise UsageError(f"class_label has {len(class_label)} classes for {options.num_images} images.")
    if advice := find_advice(pipeline, options.steps):
        print(advice, file=sys.stderr)
    print(_describe(options, pipeline, class_label), flush=True)
    shown: list[torch.Tensor] = []
    made: list[Image.Image] = []
    batches = sample_images(
        pipeline,
        options.num_images,
        options.steps,
        options.seed,
        options.batch_size,
        class_label,
        options.guidance_scale,
    )
    number = 0
    for images in batches:
        if folder is not None and number == 0:
            # Keep the old images until there is something to put in their place.
            for path in earlier:
                path.unlink()
        for image in images:
            picture = Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy())
            if folder is None:
                made.append(picture)
            else:
                replace_file(folder / f"{number:05d}.png", partial(picture.save, format="PNG"))
            number += 1
        shown.append(images[: max(0, 100 - sum(map(len, shown)))])
    if grid is not None:
        replace_file(grid, partial(image_grid(torch.cat(shown)).save, format="PNG"))
        print(f"{number} images are in {options.output_dir}, and a picture of them is {grid.name} beside it.")
    return made


def _find_earlier(folder: Path, grid: Path, overwrite: bool) -> list[Path]:
    """Return the samples of an earlier call, which may be replaced.

    Raises:
        UsageError: if there are some without `--overwrite`, or the folder holds anything else.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output_dir '{folder}' is a file; name a folder.")
    found = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.exists() else []
    others = sorted(path.name for path in found if not _SAMPLES.fullmatch(path.name))
    if others:
        raise UsageError(
            f"'{folder}' holds other files than samples ({', '.join(others[:3])}): choose another --output_dir."
        )
    earlier = found + [grid] * grid.exists()
    if earlier and not overwrite:
        what = f"'{folder}' holds {len(found)} samples" if found else f"'{grid}' is there"
        raise UsageError(f"{what} already: choose another --output_dir, or replace them with --overwrite.")
    return earlier


def _describe(options: SampleOptions, pipeline: DiffusionPipeline, class_label: int | list[int] | None) -> str:
    """Return the line that says which images are made, and how."""
    names, classes = getattr(pipeline, "class_names", None) or [], getattr(pipeline, "null_class", None)
    kind = ""
    if isinstance(class_label, int):
        named = f" ({names[class_label]})" if class_label < len(names) else ""
        kind = " of no class" if class_label == classes else f" of class {class_label}{named}"
    elif classes:
        labels = range(len(names)) if class_label is None else class_label
        chosen = [(*names, NO_CLASS)[label] if len(names) == classes else str(label) for label in labels]
        shown = ", ".join(chosen[:20]) + (", ..." if chosen[20:] else "")
        kind = f" of {'its ' + str(classes) if class_label is None else len(labels)} classes in turn"
        kind += f" ({shown})" if shown else ""
    # Schedulers of second order evaluate the model twice in each step but the last.
    evaluations = getattr(pipeline.scheduler, "order", 1) * (options.steps - 1) + 1
    twice = f" ({evaluations} evaluations of the model)" if evaluations > options.steps else ""
    guidance = describe_guidance(pipeline, options.guidance_scale)
    return (
        f"{options.num_images:,} images{kind} from '{options.model}': {options.steps} steps of "
        f"{type(pipeline.scheduler).__name__}{twice}{guidance}, seed {options.seed}. Device: {pipeline.device}"
        + (f", compiled ({options.compile_mode})." if options.compile_mode else ".")
    )
