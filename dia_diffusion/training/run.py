"""A run that is set up, and its messages: facts at its start, and commands to try at its end."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..data.loading import describe_data
from ..data.pixels import PixelDataset
from ..latents.space import LatentDataset
from ..objectives import Objective
from ..options.training import TrainingConfig
from .architecture import count_parameters
from .batches import BatchPlan
from .folder import BEST
from .results import RunResults
from .state import TrainingState, remarks_on_schedule

_PRECISIONS = {"no": "float32"}


@dataclass
class Run:
    """A run that is set up: what its parts share.

    Attributes:
        config (`TrainingConfig`): Its description, completed by what the data and the model decide.
        record (`dict`): What its checkpoints say of it; another run that resumes them must agree.
        data, held_out (`PixelDataset` or `LatentDataset`): Images as the model sees them.
        checkpoint (`Path`, *optional*): The checkpoint to resume.
        start (`int`): The step of that checkpoint, or 0.
        pending_losses (list of `float`): Losses of steps up to `start` that are not in the log yet.
        hub_id (`str`, *optional*): The repository on the Hub that the run is pushed to.
    """

    config: TrainingConfig
    record: dict[str, Any]
    accelerator: Accelerator
    data: PixelDataset | LatentDataset
    held_out: PixelDataset | LatentDataset | None
    objective: Objective
    plan: BatchPlan
    training: TrainingState
    results: RunResults
    total_steps: int
    checkpoint: Path | None
    start: int = 0
    pending_losses: list[float] = field(default_factory=list)
    hub_id: str | None = None

    @property
    def epoch_steps(self) -> int:
        """Steps in a pass over the data."""
        return -(-len(self.data) // self.plan.images)

    def facts(self) -> dict[str, str]:
        """Return facts about the run by title: model, data, training, device."""
        config, plan, unet, device = self.config, self.plan, self.training.unet, self.accelerator.device
        parameters, attention = count_parameters(unet)
        held_out = None if self.held_out is None else self.held_out.pixels
        own = f"{unet.config.dia_attention}, sharing {unet.config.dia_sharing}" if attention else "none"
        resumed = f", from step {self.start:,} on" if self.start else ""
        passes = self.total_steps / self.epoch_steps
        precision = _PRECISIONS.get(self.accelerator.mixed_precision, self.accelerator.mixed_precision)
        recipe = config.remarks[0].removeprefix("Recipe ") if config.recipe else "none (dia train --recipes)."
        return {
            **describe_data(config.data, self.data.pixels, held_out),
            "Model": f"{parameters:,} parameters, {attention:,} of them attention ({own}); sees "
            f"{self.results.space.describe(len(self.data))}.",
            "Objective": f"{self.objective.describe()}.",
            "Steps": f"{self.total_steps:,}{resumed}: {passes:,.3g} passes over the images.",
            "Batch": f"{plan.images:,} images: {plan.per_process} per process x {plan.processes} processes x "
            f"{plan.micro_batches} accumulated.",
            "Device": f"{device}, in {precision}{', compiled' if self.training.compiled else ''}.",
            "Recipe": recipe,
        }

    def explain(self) -> str:
        """Return the block for the start of the run: its facts, what it will make, and remarks on its options."""
        config, output = self.config, self.config.output
        remarks = [
            *(config.remarks[1:] if config.recipe else config.remarks),
            *self.results.space.remarks(self.data),
            *remarks_on_schedule(config, self.total_steps),
        ]
        scores = f", scores of {output.score_num_images:,} images" if output.score_features is not None else ""
        facts = self.facts() | {
            "Output": f"{output.folder}: checkpoints every {output.checkpointing_steps:,} steps; at the end pipeline, "
            f"samples{scores}."
        }
        lines = [*facts.items(), *(("Note", remark) for remark in remarks)]
        return "\n".join(f"{title + ':':<10} {text}" for title, text in lines)


def explain_end(config: TrainingConfig, figures: Mapping[str, Any]) -> str:
    """Return the lines for the end of a run: what it made, and commands that fit it.

    Args:
        config (`TrainingConfig`): The options of the run.
        figures (`dict`): The content of its metrics.json.
    """
    folder, features = config.output.folder, figures.get("features")
    # A command would take a leading dash for an option.
    model = shlex.quote(f"./{folder}" if str(folder).startswith("-") else str(folder))
    made = ["the pipeline", "its card (README.md)", "samples.png", *(["scores (metrics.json)"] if features else [])]
    if (folder / BEST / "model_index.json").exists():
        made.append(f"the best pipeline on the way ({BEST}/)")
    names = json.loads((folder / "model_index.json").read_text()).get("id2label") or {}
    label = f" --class_label {shlex.quote(str(list(names.values())[-1]))}" if names else ""
    chosen = "" if config.data.dataset_name == "digits" else f" --features {shlex.quote(features or 'inception')}"
    commands = {
        f"dia sample {model} --num_images 16{label} --output_dir out": "images as PNG files",
        f"dia evaluate {model}{chosen}": "scores against the data of this run",
    }
    if config.model.dia_attention != "none":
        commands[f"dia analyze {model}"] = "its attention maps"
    if find_spec("gradio") is not None:
        commands[f"dia app {model}"] = "try it in a browser"
    width = max(map(len, commands))
    return "\n".join(
        [
            f"Made in {folder}: {', '.join(made)}; report.html shows all in one page.",
            "Next:",
            *(f"  {command:<{width}}  {text}" for command, text in commands.items()),
        ]
    )
