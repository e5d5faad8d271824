"""The trackers of accelerate: started, and given pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from ..errors import UsageError


def start_trackers(accelerator: Accelerator, record: Mapping[str, Any]) -> None:
    """Starts the tracker of a run, and gives it the numbers and texts of the record.

    Raises:
        UsageError: if it does not start.
    """
    try:
        accelerator.init_trackers("training", {k: v for k, v in record.items() if isinstance(v, (int, float, str))})
    except Exception as error:  # Of several packages' kinds: a folder that refuses, no login, no connection.
        name = str(accelerator.log_with[0])
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"--logger {name} cannot start: {first_line}. Set it up as its package says, choose another --logger, or "
            "another --logging_dir."
        ) from error


def log_picture(accelerator: Accelerator, name: str, path: Path, step: int) -> None:
    """Gives a picture to the trackers."""
    for tracker in accelerator.trackers:
        if tracker.name == "trackio":
            import trackio

            # accelerate's tracker for it knows numbers only.
            tracker.log({name: trackio.Image(str(path))}, step=step)
        else:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            with Image.open(path) as picture:
                tracker.log_images({name: np.asarray(picture)[None]}, step=step, **layout)
