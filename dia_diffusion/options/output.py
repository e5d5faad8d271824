"""Options of training: what the run leaves, and when."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ..errors import UsageError
from .fields import Count, Location, Options, Range, option


@dataclass
class OutputOptions(Options):
    """The files that a run writes, and how often."""

    group = "output"

    output_dir: Location = option("dia-unet", "Folder for the pipeline and all else that the run leaves.")
    overwrite_output_dir: bool = option(False, "Start anew in a folder that already holds a run.")
    save_images_epochs: Count = option(10, "Epochs between sample grids.")
    save_model_epochs: Count = option(10, "Epochs between savings of the pipeline.")
    checkpointing_steps: Count = option(500, "Steps between checkpoints, from which a run can be resumed.")
    checkpoints_total_limit: Count | None = option(None, "How many checkpoints to keep; by default all.")
    resume_from_checkpoint: Location | None = option(None, "'latest', or the path of a checkpoint.")
    logging_steps: Count = option(10, "Steps between lines of metrics.jsonl.")
    validation_steps: Count = option(250, "Steps between measurements of the held-out loss.")
    eval_batch_size: Count = option(16, "Images in a sample grid.")
    ddpm_num_inference_steps: Count = option(25, "Denoising steps for the samples of a run.")
    eval_steps: Count | None = option(
        None, "Steps between Fréchet distances in --score_features; the best model so far is kept in best/."
    )
    eval_num_images: Annotated[int, Range(least=2)] = option(1000, "Images to generate for each of these.")
    score_features: Location | None = option(
        None, "Features for the scores at the end, as for `dia evaluate --features`; none by default."
    )
    score_num_images: Annotated[int, Range(least=2)] = option(2000, "Images to generate for the scores at the end.")
    logger: Literal["tensorboard", "wandb", "trackio"] = option("tensorboard", "Tracker, through accelerate.")
    logging_dir: Location = option("logs", "Folder of the tracker, inside of --output_dir.")
    push_to_hub: bool = option(False, "Push the pipeline to the Hub at the end.", group="Hub")
    hub_token: str | None = option(None, "Token for the Hub; by default the one you logged in with.", group="Hub")
    hub_model_id: str | None = option(None, "Repository on the Hub; by default named after --output_dir.", group="Hub")
    hub_private_repo: bool = option(False, "Make the repository private.", group="Hub")
    license: str = option(
        "apache-2.0", "Licence of the model, for its card; a licence identifier of the Hub.", group="Hub"
    )
    local_rank: Annotated[int, Range(least=-1)] = option(
        -1, "Set by launchers; accelerate reads it from the environment."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license) is None:
            raise UsageError(
                f"license '{self.license}' is not an identifier of the Hub: use for example mit, apache-2.0, cc-by-4.0 "
                "or other (the list: https://huggingface.co/docs/hub/repositories-licenses)."
            )
        if self.eval_steps is not None and self.score_features is None:
            raise UsageError("eval_steps needs score_features: the features in which distances are measured.")

    @property
    def folder(self) -> Path:
        """Return the output directory with a name of its own, after which the model is named."""
        path = Path(self.output_dir)
        return path if path.name not in ("", "..") else path.resolve()
