"""Scores as a table, and as a page with the pictures that they stand for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..data.grid import image_grid
from ..data.pixels import PixelDataset
from ..files import to_json
from ..page import definitions, folded, heading, markdown, markdown_table, picture, prose, write_page
from .archives import ArchiveImages
from .features.extractor import FeatureExtractor
from .reference import Images

_TITLES = {
    "fid": "Fréchet distance (FID)",
    "fid_interval": "95% interval",
    "fid_infinity": "for infinitely many images",
    "kid_mean": "KID",
    "kid_std": "KID, standard deviation",
    "is_mean": "Inception Score",
    "is_std": "Inception Score, standard deviation",
    "precision": "Precision",
    "recall": "Recall",
    "num_images": "images",
    "settings_hash": "settings",
}
_SHOWN = 64
_COMPARED = 10
_NEIGHBOURS = 4
_BATCH_SIZE = 250


def format_scores(scores: dict[str, Any]) -> str:
    """Return a table of the scores with the floor beside them, for the terminal and the model card (Markdown).

    Only figures in columns with the same settings, of this table or of another, can be compared.
    """
    floor = scores.get("floor")
    columns = [scores] + ([floor] if floor is not None else [])
    head = [f"features: {scores['features']}", "generated"] + (["floor (held-out images)"] if floor is not None else [])
    rows = [
        [title] + [_figure(column.get(name)) for column in columns]
        for name, title in _TITLES.items()
        if scores.get(name) is not None
    ]
    return markdown_table(head, rows)


def _figure(value: float | int | str | list[float] | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return " to ".join(f"{bound:.4f}" for bound in value)
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def nearest_images(
    generated: Images, reference: Images, extractor: FeatureExtractor
) -> tuple[Image.Image, list[float]]:
    """Draw each of the first generated images in a row with the real images that are nearest to it in feature space.

    A row of twins is a memorised image. Reads all of the reference once more, keeping the nearest only.

    Returns:
        The picture, and the distance of each generated image from its nearest real one.
    """
    images = generated.images_at(range(min(_COMPARED, len(generated))))
    features = extractor(images).double()
    best = torch.full((len(images), 0), 0.0, dtype=torch.double, device=features.device)
    numbers = torch.zeros(len(images), 0, dtype=torch.long, device=features.device)
    for start in range(0, len(reference), _BATCH_SIZE):
        batch = range(start, min(start + _BATCH_SIZE, len(reference)))
        distances = torch.cdist(features, extractor(reference.images_at(batch)).double())
        best = torch.cat([best, distances], dim=1)
        numbers = torch.cat([numbers, torch.tensor(batch, device=features.device).expand(len(images), -1)], dim=1)
        best, order = best.sort(dim=1, stable=True)
        best, numbers = best[:, :_NEIGHBOURS], numbers.gather(1, order)[:, :_NEIGHBOURS]
    rows = []
    for image, neighbours in zip(images, numbers.tolist(), strict=True):
        rows += [image, *(reference.images_at(range(number, number + 1))[0] for number in neighbours)]
    return image_grid(torch.stack(rows), columns=1 + len(numbers[0])), best[:, 0].tolist()


def write_report(
    path: Path,
    scores: dict[str, Any],
    facts: Mapping[str, str],
    generated: Images,
    reference: PixelDataset | ArchiveImages | None,
    extractor: FeatureExtractor,
    raw: Path | None = None,
) -> None:
    """Write one HTML file, pictures included, that needs nothing else: scores, settings, generated images, and beside
    some of these their nearest real ones.

    Args:
        path (`Path`): The file.
        scores (`dict`): What `evaluate` returned, with `what` was scored against which `dataset`.
        facts (`dict`): What the scores are about, by title: the model, the images, the reference, the features.
        generated (`Images`), reference (`PixelDataset`, *optional*), extractor (`FeatureExtractor`): As for `evaluate`;
            without reference images no neighbours are shown.
        raw (`Path`, *optional*): The JSON file of the scores, for a link to it.
    """
    grid = image_grid(generated.images_at(range(min(_SHOWN, len(generated)))))
    parts = [
        definitions(facts),
        heading("Scores"),
        markdown(format_scores(scores), sortable=False),
        *(prose(line) for line in explain_scores(scores)),
        *(prose(f"**Warning:** {warning}") for warning in scores["warnings"]),
        heading("Generated images"),
        picture(grid, "generated images", pixels=True),
    ]
    if reference is not None:
        neighbours, distances = nearest_images(generated, reference, extractor)
        parts += [
            heading("Generated images and their nearest real ones"),
            prose(
                f"Left: generated. Then the {_NEIGHBOURS} real images that are nearest in the features "
                f"`{extractor.name}`. Twins would be memorised images. Distance to the nearest: "
                f"{', '.join(f'{distance:.3g}' for distance in distances)}."
            ),
            picture(neighbours, "generated images beside the nearest real images", pixels=True),
        ]
    details = {name: value for name, value in scores.items() if isinstance(value, dict) and name != "floor"}
    command = [prose(f"`{scores['command']}`")] if "command" in scores else []
    parts += [heading("Settings"), *command, folded("What the figures depend on", to_json(details, indent=2))]
    write_page(path, f"Scores of {scores['what']} against {scores['dataset']}", parts, [] if raw is None else [raw])


def explain_scores(scores: dict[str, Any]) -> list[str]:
    """Explain the figures of a table, a paragraph each."""
    lines = []
    if scores["fid"] is not None:
        lines.append(
            "Lower is better for the Fréchet distance and the KID, higher for Inception Score, precision and recall. "
            "The interval covers the expected distance of as many images of this model."
        )
    floor = scores["floor"]
    if floor is not None:
        shown = f"{floor['fid']:.2f}: another" if floor["fid"] is not None else "another"
        lines.append(
            f"The floor is {shown} {floor['num_images']:,} real images, scored in the same way. A score of more images "
            "can lie below it, since distances fall with the number of images: compare the figures for infinitely many "
            "images."
        )
    return [*lines, "Figures can be compared where their settings are the same."]
