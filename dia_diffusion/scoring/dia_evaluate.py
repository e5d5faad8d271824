"""Run `dia evaluate`: find the images and the reference, score, and write the results."""

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from diffusers import DiffusionPipeline
from torch import nn

from ..data.loading import load_pixels
from ..data.pixels import PixelDataset, describe_images
from ..data.preparation import prepare_at_own_size, prepare_pixels
from ..data.recorded import check_outside, choose_data
from ..data.sources import DIGITS, load_all_images, load_dataset_splits
from ..errors import UsageError
from ..files import check_output_file, lock_folder, write_json
from ..options.commands import EvaluateOptions
from ..options.model import DataOptions
from ..options.rules import EMBEDDED_DATA, is_archive, is_images
from ..process.distributed import find_device, make_state
from ..process.output import print_main
from ..sampling.generation import check_sampling, describe_guidance, find_advice, sample_batch
from ..sampling.loading import load_pipeline
from .archives import STATISTICS, ArchiveImages, array_shapes, samples_name
from .evaluation import DEFAULT_METRICS, check_metrics, evaluate
from .features.extractor import FeatureExtractor
from .features.named import FEATURES, get_extractor
from .images import FolderImages, PipelineImages, check_one_size, shares_in_dataset, shares_of_labels
from .reference import Reference, read_published
from .score_report import format_scores, write_report


class RealImages(NamedTuple):
    """The real images that generated ones are compared with.

    Attributes:
        images (`PixelDataset` or `ArchiveImages`): The reference.
        held_out (`PixelDataset`, *optional*): Images that are not among them, for the floor.
        class_shares (list of `float`, *optional*): How often the reference has each class of the model, where it says.
    """

    images: PixelDataset | ArchiveImages
    held_out: PixelDataset | None = None
    class_shares: list[float] | None = None


def score(options: EvaluateOptions, command: str | None = None) -> dict[str, Any] | None:
    """Score what the options of `dia evaluate` name.

    Returns:
        `dict`: The scores, as `evaluate` returns them; None on processes other than the main one.

    Raises:
        UsageError: for options that do not fit each other or the data.
    """
    _check_outputs(options)
    state = make_state()
    with (
        nullcontext() if options.save_images is None or not state.is_main_process else lock_folder(options.save_images)
    ):
        return _score(options, command, state)


def _score(options: EvaluateOptions, command: str | None, state: PartialState) -> dict[str, Any] | None:
    device = find_device(options.device, state)
    pixels = _load_scored(options.what, state)
    pipeline = None
    if pixels is None:
        pipeline = load_pipeline(
            options.what, options.scheduler, device, options.compile_mode, options.guide, options.variant
        )
        check_sampling(pipeline, options.steps)
        if state.is_main_process and (advice := find_advice(pipeline, options.steps)):
            print(advice, file=sys.stderr)
    dataset, recorded = choose_data(options.what, options.dataset, options.dataset_config_name, options.image_column)
    check_outside(options.save_images, dataset)
    if dataset in EMBEDDED_DATA and (given := options.dataset_config_name or options.image_column):
        raise UsageError(
            f"'{dataset}' is an embedded data set, in which there is no '{given}' to choose: leave it out."
        )
    archive = Path(dataset) if is_archive(dataset) else None
    published = archive if archive is not None and not _holds_images(archive) else None
    metrics = options.metrics or list(DEFAULT_METRICS if published is None else ("fid",))
    name = DIGITS if options.features is None and dataset == DIGITS else options.features
    if name is None:
        raise UsageError(f"name the features to compare in: --features {', '.join(FEATURES)}.")
    resolution, channels = _shape(pipeline) if pixels is None else (pixels.resolution, pixels.channels)
    real = None
    if published is None:
        with state.main_process_first():
            real = _load_real(options, dataset, recorded, resolution, pipeline)
    extractor = _make_extractor(name, options.inception_path, resolution, channels, real).to(device)
    check_metrics(metrics, extractor)
    reference = read_published(published, extractor) if real is None else real.images
    held_out = None if real is None else real.held_out
    # The first process adopts the folder of images, the others find it adopted.
    with state.main_process_first():
        generated = FolderImages(pixels) if pixels is not None else _make_images(options, pipeline, real)
    facts = {
        "Generated images": _describe_generated(generated, options),
        "Reference": _describe(reference, dataset),
        "Held-out images": "none." if held_out is None else describe_images(held_out, dataset),
        "Features": f"{name}. Device: {device}.",
    }
    if pipeline is not None:
        facts = {"Model": _describe_model(pipeline)} | facts
    for title, text in facts.items():
        print_main(f"{title}: {text}")
    scores = evaluate(generated, reference, extractor, metrics, held_out, options.batch_size, state)
    if scores is not None:
        about = {"what": options.what, "dataset": dataset}
        scores = ({} if command is None else {"command": command}) | about | scores
        _write(options, scores, facts, generated, reference, extractor)
    state.wait_for_everyone()
    state.destroy_process_group()
    return scores


def _check_outputs(options: EvaluateOptions) -> None:
    """Refuse, before a long run, outputs that could not be written after it."""
    places = [path.resolve() for path in (options.output, options.report, options.save_images) if path is not None]
    if len(set(places)) < len(places):
        raise UsageError("output, report and save_images must be different places.")
    for path in (options.output, options.report):
        if path is not None:
            check_output_file(path)


def _load_scored(what: str, state: PartialState) -> PixelDataset | ArchiveImages | None:
    """Return the images to score that lie in files; None for a pipeline."""
    if not is_images(what):
        return None
    if is_archive(what):
        return ArchiveImages(Path(what))
    with state.main_process_first():
        images = load_all_images(what)
        check_one_size(images)
        return prepare_at_own_size(images)


def _load_real(
    options: EvaluateOptions,
    dataset: str,
    recorded: DataOptions | None,
    resolution: int,
    pipeline: DiffusionPipeline | None,
) -> RealImages:
    """Load the images to compare with: as the training run loads them where it recorded these, else as they are."""
    if recorded is not None:
        train, held_out = load_pixels(replace(recorded, resolution=resolution))
        return RealImages(train, held_out, shares_of_labels(train.labels, train.num_classes))
    if is_archive(dataset):
        return RealImages(ArchiveImages(Path(dataset), resolution))
    rows, held_out_rows = load_dataset_splits(dataset, options.dataset_config_name)
    reference, held_out = prepare_pixels(rows, resolution, image_column=options.image_column), None
    if held_out_rows is not None:
        held_out = prepare_pixels(held_out_rows, resolution, reference.channels, options.image_column)
    classes = getattr(pipeline, "null_class", None)
    shares = shares_in_dataset(rows, pipeline.class_names, classes) if pipeline is not None and classes else None
    return RealImages(reference, held_out, shares)


def _make_extractor(
    name: str, inception_path: str | None, resolution: int, channels: int, real: RealImages | None
) -> FeatureExtractor:
    # Without colour a grey copy of a colour image would be the image itself.
    wanted = channels if real is None else max(channels, real.images.channels)
    extractor = get_extractor(name, resolution, wanted, inception_path)
    if real is not None and real.images.channels != channels and extractor.channels == 3:
        grey, other = ("images to score", "reference images")[:: 1 if channels == 1 else -1]
        print_main(f"The {grey} are grey and those of the {other} have colour: they are compared as colour images.")
    return extractor


def _make_images(options: EvaluateOptions, pipeline: DiffusionPipeline, real: RealImages | None) -> PipelineImages:
    """Return the images of a pipeline, and say how often each class is drawn."""
    shares, even = None, options.class_proportions == "even"
    if not getattr(pipeline, "null_class", None):
        if options.class_proportions is not None:
            raise UsageError("--class_proportions needs a class-conditional pipeline, which this is not.")
    else:
        # The classes of other data say nothing about the model's.
        known = real is not None and real.class_shares is not None and len(real.class_shares) == pipeline.null_class
        shares = real.class_shares if real is not None and known and not even else None
        unknown = "" if even or known else ", since the reference does not say how often it has each of them"
        if shares is None or len(set(shares)) == 1:
            print_main(f"Classes: all are drawn alike{unknown}.")
        else:
            names = pipeline.class_names or range(len(shares))
            shown = [f"{name} {share:.1%}" for name, share in zip(names, shares, strict=True)]
            few = ", ".join(shown[:10]) + (", ..." if shown[10:] else "")
            print_main(
                f"Classes: drawn as often as the reference has them ({few}); --class_proportions even draws all alike."
            )
    return PipelineImages(
        pipeline, options.num_images, options.steps, options.seed, options.guidance_scale, options.save_images, shares
    )


def _describe_model(pipeline: DiffusionPipeline) -> str:
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    sizes = {name: sum(weights.numel() for weights in part.parameters()) for name, part in networks.items()}
    attention = sum(
        weights.numel()
        for name, weights in networks.get("unet", nn.Module()).named_parameters()
        if name.startswith("dia.")
    )
    of_attention = f" ({attention:,} of its attention)" if attention else ""
    parts = [f"{size:,} parameters in '{name}'{of_attention if name == 'unet' else ''}" for name, size in sizes.items()]
    return f"{type(pipeline).__name__}, {', '.join(parts)}."


def _describe_generated(generated: FolderImages | PipelineImages, options: EvaluateOptions) -> str:
    if isinstance(generated, FolderImages):
        return _describe(generated.pixels, options.what)
    guidance = describe_guidance(generated.pipeline, options.guidance_scale)
    how = f"{options.steps} steps of {type(generated.pipeline.scheduler).__name__}{guidance}"
    return f"{len(generated):,} of '{options.what}', in {how}, seed {options.seed}."


def _describe(images: PixelDataset | ArchiveImages | Reference, name: str) -> str:
    if isinstance(images, PixelDataset):
        return describe_images(images, name)
    if isinstance(images, Reference):
        return f"the statistics in '{name}'."
    kind = "colour" if images.channels == 3 else "grey"
    return f"{len(images):,} samples in '{name}', {kind}, {images.resolution} pixels on the shorter side."


def _shape(pipeline: DiffusionPipeline) -> tuple[int, int]:
    """Return the resolution (the shorter side) and the number of channels of the images of a pipeline."""
    if {name for name, part in pipeline.components.items() if part is not None} - {"guide"} == {"unet", "scheduler"}:
        size = pipeline.unet.config.sample_size
        return size if isinstance(size, int) else min(size), pipeline.unet.config.in_channels
    # With a VAE, only a decoded image shows the size and the channels.
    image = sample_batch(pipeline, [0], steps=1)
    return min(image.shape[2:]), image.shape[1]


def _holds_images(path: Path) -> bool:
    """Return whether a file of arrays holds images and no statistics, which would take precedence."""
    shapes = array_shapes(path)
    return samples_name(shapes) is not None and not set(STATISTICS) <= set(shapes)


def _write(
    options: EvaluateOptions,
    scores: dict[str, Any],
    facts: dict[str, str],
    generated: FolderImages | PipelineImages,
    reference: PixelDataset | ArchiveImages | Reference,
    extractor: FeatureExtractor,
) -> None:
    """Write the files, and then print the scores: where nobody reads what is printed, no figure is lost."""
    if options.output is not None:
        write_json(options.output, scores)
    if options.report is not None:
        images = reference if not isinstance(reference, Reference) else None
        write_report(options.report, scores, facts, generated, images, extractor, options.output)
    seconds = scores["seconds"]
    outside = 1 - seconds["sampling"] / seconds["total"]
    print_main(format_scores(scores))
    print_main(
        f"{seconds['total']:.0f} s in all, {outside:.0%} of it outside sampling; features and logits kept in memory: "
        f"{scores['bytes_kept'] / 1e6:.1f} MB."
    )
    for warning in scores["warnings"]:
        print_main(f"warning: {warning}")
