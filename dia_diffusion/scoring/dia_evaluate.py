"""What `dia evaluate` does: finds the images and the reference, scores, and writes the results."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ..data.pixels import PixelDataset, describe_images
from ..data.preparation import prepare_at_own_size, prepare_pixels
from ..data.sources import DIGITS, load_all_images, load_images
from ..errors import UsageError
from ..files import write_json
from ..process.distributed import find_device, make_state, print_main
from ..sampling.loading import check_guide, load_pipeline
from ..sampling.numbered import check_sampling, describe_guidance, sample_batch
from .evaluation import DEFAULT_METRICS, check_metrics, evaluate
from .features.extractor import FeatureExtractor
from .features.named import FEATURES, get_extractor
from .images import SAMPLES, STATISTICS, ArchiveImages, FolderImages, PipelineImages, array_names, check_one_size
from .reference import Reference, read_published
from .score_report import format_scores, write_report

ARCHIVE = ".npz"


def score(options: argparse.Namespace) -> None:
    """Runs `dia evaluate` with its parsed options.

    Raises:
        UsageError: for options that do not fit each other or the data.
    """
    reference_file = Path(options.dataset) if options.dataset.endswith(ARCHIVE) else None
    published = reference_file is not None and not _are_images(reference_file)
    metrics = _parse_metrics(options.metrics, ("fid",) if published else DEFAULT_METRICS)
    name = options.features or (DIGITS if options.dataset == DIGITS else None)
    if name is None:
        raise UsageError(f"name the features to compare in: --features {', '.join(FEATURES)}.")
    if options.batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, but is {options.batch_size}.")
    places = [path.resolve() for path in (options.output, options.report, options.save_images) if path is not None]
    if len(set(places)) < len(places):
        raise UsageError("output, report and save_images must be different places.")
    for path in (options.output, options.report):
        if path is not None:
            # Not at the end of a long run.
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise UsageError(f"'{path}' is a folder; name the file to write.")

    if options.save_images is not None and _is_images(options.what):
        raise UsageError("save_images belongs to a pipeline; these images lie in a folder already.")
    if options.compile_mode is not None and (_is_images(options.what) or options.what.endswith(ARCHIVE)):
        raise UsageError("compile belongs to a pipeline; these images are made already.")
    if options.guide is not None and (_is_images(options.what) or options.what.endswith(ARCHIVE)):
        raise UsageError("a guide belongs to a pipeline; these images are made already.")
    check_guide(options.guide, options.guidance_scale)

    state = make_state()
    device = find_device(options.device, state)
    pixels = None
    if options.what.endswith(ARCHIVE):
        pixels = ArchiveImages(Path(options.what))
    elif _is_images(options.what):
        with state.main_process_first():
            images = load_all_images(options.what)
            check_one_size(images)
            pixels = prepare_at_own_size(images)
    else:
        pipeline = load_pipeline(options.what, options.scheduler, device, options.compile_mode, options.guide)
        check_sampling(pipeline, options.steps)
    resolution, channels = (pixels.resolution, pixels.channels) if pixels is not None else _shape(pipeline)
    held_out = None
    if reference_file is None:
        with state.main_process_first():
            reference, held_out = _load_reference(options, resolution)
    elif not published:
        reference = ArchiveImages(reference_file, resolution)
    # Without colour a grey copy of a colour image would be the image itself.
    wanted = channels if published else max(channels, reference.channels)
    extractor = get_extractor(name, resolution, wanted, options.inception_path).to(device)
    if not published and reference.channels != channels and extractor.channels == 3:
        grey, other = ("images to score", "reference images")[:: 1 if channels == 1 else -1]
        print(f"The {grey} are grey and those of the {other} have colour: they are compared as colour images.")
    check_metrics(metrics, extractor)
    if published:
        reference = read_published(reference_file, extractor)
    if pixels is not None:
        generated = FolderImages(pixels)
    else:
        # The first process claims the folder, the others find it claimed.
        with state.main_process_first():
            generated = PipelineImages(
                pipeline, options.num_images, options.steps, options.seed, options.guidance_scale, options.save_images
            )
    for line in _what_is_used(options, generated, pixels, reference, held_out, name, device):
        print_main(line)
    scores = evaluate(generated, reference, extractor, metrics, held_out, options.batch_size, state)
    if scores is not None:
        _write(options, scores, generated, reference, extractor)
    state.wait_for_everyone()
    state.destroy_process_group()


def _what_is_used(
    options: argparse.Namespace,
    generated: FolderImages | PipelineImages,
    pixels: PixelDataset | ArchiveImages | None,
    reference: PixelDataset | ArchiveImages | Reference,
    held_out: PixelDataset | None,
    features: str,
    device: object,
) -> list[str]:
    """What scoring says at its start."""
    if isinstance(generated, PipelineImages):
        guidance = describe_guidance(generated.pipeline, options.guidance_scale)
        how = f"{options.steps} steps of {type(generated.pipeline.scheduler).__name__}{guidance}"
        images = f"{len(generated):,} of '{options.what}', in {how}, seed {options.seed}."
    else:
        images = _describe(pixels, options.what)
    return [
        f"Generated images: {images}",
        f"Reference: {_describe(reference, options.dataset)}",
        f"Held-out images: {'none.' if held_out is None else describe_images(held_out, options.dataset)}",
        f"Features: {features}. Device: {device}.",
    ]


def _describe(images: PixelDataset | ArchiveImages | Reference, name: str) -> str:
    if isinstance(images, PixelDataset):
        return describe_images(images, name)
    if isinstance(images, Reference):
        return f"the statistics in '{name}'."
    kind = "colour" if images.channels == 3 else "grey"
    return f"{len(images):,} samples in '{name}', {kind}, {images.resolution} pixels on the shorter side."


def _parse_metrics(text: str | None, default: Sequence[str]) -> list[str]:
    return list(default) if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _is_images(what: str) -> bool:
    folder = Path(what).expanduser()
    return what.endswith(ARCHIVE) or (folder.is_dir() and not (folder / DiffusionPipeline.config_name).is_file())


def _shape(pipeline: DiffusionPipeline) -> tuple[int, int]:
    """Resolution (the shorter side) and number of channels of the images of a pipeline."""
    if {name for name, part in pipeline.components.items() if part is not None} - {"guide"} == {"unet", "scheduler"}:
        size = pipeline.unet.config.sample_size
        return size if isinstance(size, int) else min(size), pipeline.unet.config.in_channels
    # With a decoder behind the UNet, only an image tells.
    image = sample_batch(pipeline, [0], steps=1)
    return min(image.shape[2:]), image.shape[1]


def _are_images(path: Path) -> bool:
    """Whether an `.npz` file is there for its images. Where it has statistics too, these count."""
    names = array_names(path)
    return SAMPLES in names and not set(STATISTICS) <= set(names)


def _load_reference(options: argparse.Namespace, resolution: int) -> tuple[PixelDataset, PixelDataset | None]:
    train, held_out = load_images(options.dataset, options.dataset_config_name)
    train = prepare_pixels(train, resolution, image_column=options.image_column)
    if held_out is not None:
        held_out = prepare_pixels(held_out, resolution, train.channels, options.image_column)
    return train, held_out


def _write(
    options: argparse.Namespace,
    scores: dict[str, Any],
    generated: FolderImages | PipelineImages,
    reference: PixelDataset | ArchiveImages | Reference,
    extractor: FeatureExtractor,
) -> None:
    scores = {"command": shlex.join(["dia", *sys.argv[1:]]), "what": options.what, "dataset": options.dataset} | scores
    print(format_scores(scores))
    seconds = scores["seconds"]
    outside = 1 - seconds["sampling"] / seconds["total"]
    print(
        f"{seconds['total']:.0f} s in all, {outside:.0%} of it outside sampling; features and logits kept in memory: "
        f"{scores['bytes_kept'] / 1e6:.1f} MB."
    )
    for warning in scores["warnings"]:
        print(f"warning: {warning}")
    if options.output is not None:
        write_json(options.output, scores)
    if options.report is not None:
        images = reference if not isinstance(reference, Reference) else None
        write_report(options.report, scores, generated, images, extractor, options.output)
