"""Scores as a table, and as a page with the pictures that they stand for."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..data import PixelDataset, image_grid
from ..files import replace_text
from .extraction import Images
from .features import FeatureExtractor

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
_STYLE = """
body { font-family: sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }
td, th { padding: .2em .8em; text-align: right }
td:first-child, th:first-child { text-align: left }
img { max-width: 100%; image-rendering: pixelated }
pre { overflow: auto }
"""
_SHOWN = 64
_COMPARED = 10
_NEIGHBOURS = 4
_BATCH_SIZE = 250


def format_scores(scores: dict[str, Any]) -> str:
    """A table of the scores with the floor beside them, for the terminal and the model card (Markdown).

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
    lines = [head, ["---"] + ["---:"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figure(value: float | int | str | list[float] | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return " to ".join(f"{bound:.4f}" for bound in value)
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def nearest_images(
    generated: Images, reference: PixelDataset, extractor: FeatureExtractor
) -> tuple[Image.Image, list[float]]:
    """Each of the first generated images in a row with the real images that are nearest to it in feature space.

    A row of twins is a memorised image. Reads all of the reference once more, keeping the nearest only.

    Returns:
        The picture, and the distance of each generated image from its nearest real one.
    """
    images = generated.numbered(range(min(_COMPARED, len(generated))))
    features = extractor(images).double()
    best = torch.full((len(images), 0), 0.0, dtype=torch.double, device=features.device)
    numbers = torch.zeros(len(images), 0, dtype=torch.long, device=features.device)
    for start in range(0, len(reference), _BATCH_SIZE):
        batch = range(start, min(start + _BATCH_SIZE, len(reference)))
        distances = torch.cdist(features, extractor(reference.numbered(batch)).double())
        best = torch.cat([best, distances], dim=1)
        numbers = torch.cat([numbers, torch.tensor(batch, device=features.device).expand(len(images), -1)], dim=1)
        best, order = best.sort(dim=1, stable=True)
        best, numbers = best[:, :_NEIGHBOURS], numbers.gather(1, order)[:, :_NEIGHBOURS]
    rows = []
    for image, neighbours in zip(images, numbers.tolist(), strict=True):
        rows += [image, *(reference.numbered(range(number, number + 1))[0] for number in neighbours)]
    return image_grid(torch.stack(rows), columns=1 + len(numbers[0])), best[:, 0].tolist()


def write_report(
    path: Path, scores: dict[str, Any], generated: Images, reference: PixelDataset | None, extractor: FeatureExtractor
) -> None:
    """Writes one HTML file, pictures included, that needs nothing else: scores, settings, generated images, and beside
    some of these their nearest real ones.

    Args:
        path (`Path`): The file.
        scores (`dict`): What `evaluate` returned.
        generated (`Images`), reference (`PixelDataset`, *optional*), extractor (`FeatureExtractor`): As for `evaluate`;
            without reference images no neighbours are shown.
    """
    grid = image_grid(generated.numbered(range(min(_SHOWN, len(generated)))))
    parts = [
        "<h1>Scores</h1>",
        _table(scores),
        *(f"<p><b>Warning:</b> {html.escape(warning)}</p>" for warning in scores["warnings"]),
        "<p>Figures can be compared where their settings are the same.</p>",
        "<h2>Generated images</h2>",
        _picture(grid, "generated images"),
    ]
    if reference is not None:
        picture, distances = nearest_images(generated, reference, extractor)
        parts += [
            "<h2>Generated images and their nearest real ones</h2>",
            f"<p>Left: generated. Then the {_NEIGHBOURS} real images that are nearest in the features "
            f"<code>{html.escape(extractor.name)}</code>. Twins would be memorised images. Distance to the nearest: "
            f"{', '.join(f'{distance:.3g}' for distance in distances)}.</p>",
            _picture(picture, "generated images beside the nearest real images"),
        ]
    details = {name: value for name, value in scores.items() if isinstance(value, dict) and name != "floor"}
    parts += [
        "<h2>Settings</h2>",
        f"<p><code>{html.escape(scores.get('command', ''))}</code></p>",
        f"<pre>{html.escape(json.dumps(details, indent=2))}</pre>",
    ]
    page = f"<!doctype html>\n<meta charset='utf-8'>\n<title>Scores</title>\n<style>{_STYLE}</style>\n"
    replace_text(path, page + "\n".join(parts) + "\n")


def _table(scores: dict[str, Any]) -> str:
    head, _, *rows = [line.strip("| ").split(" | ") for line in format_scores(scores).splitlines()]
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _picture(image: Image.Image, description: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{description}' src='data:image/png;base64,{data}'>"
