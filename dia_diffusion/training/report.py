"""What came out of a run, as a page."""

from pathlib import Path
from typing import Any

from ..page import folded, heading, markdown, picture, write_page
from ..scoring import format_scores
from .log import METRICS_LOG
from .parsing import CONFIG

REPORT = "report.html"
_LOSSES = {"loss": "Training loss", "held_out_loss": "Held-out loss"}


def write_run_report(folder: Path, figures: dict[str, Any]) -> None:
    """Writes `report.html` of a finished run, from `figures` (what is in its metrics.json) and what lies there."""
    losses = [f"{name}: {figures[key]:.5f}. " for key, name in _LOSSES.items() if key in figures]
    steps = f"{figures['step']:,} steps of {figures['global_batch_size']:,} images. {''.join(losses)}"
    parts = [markdown(steps), heading("Samples"), picture(folder / "samples.png", "samples of the model", pixels=True)]
    if "features" in figures:
        parts += [heading("Scores"), markdown(format_scores(figures), sortable=False)]
    parts += [heading("Training"), picture(folder / "curves.png", "losses and learning rate over the steps")]
    if (folder / CONFIG).exists():
        parts.append(folded("Options of the run", (folder / CONFIG).read_text()))
    write_page(folder / REPORT, folder.name, parts, [folder / "metrics.json", folder / METRICS_LOG])
