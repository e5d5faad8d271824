"""The output directory of a run: locked by one run at a time, protected from being overwritten, and cleaned."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import lock_folder, remove_temporaries, set_aside
from ..latents.space import VAE_FOLDER
from ..options.output import OutputOptions
from ..options.training import CONFIG
from .checkpoint import CHECKPOINTS, clean_checkpoints, list_checkpoints, set_aside_newer
from .log import METRICS_LOG

SAMPLES = "samples"
BEST = "best"
# Processes that a killed run started may hold the lock for a moment.
_PATIENCE_SECONDS = 3


@contextmanager
def lock_output_dir(folder: Path) -> Iterator[None]:
    """Make the output directory, lock it for one run, and remove what a killed run left half-written.

    The end of the process releases the lock, even if it is killed.

    Raises:
        UsageError: if another run is at work there, or the folder cannot be made or written to.
    """
    with lock_folder(folder, _PATIENCE_SECONDS):
        remove_temporaries(folder / BEST)
        clean_checkpoints(folder / CHECKPOINTS)
        yield


def check_output_dir(options: OutputOptions, checkpoint: Path | None) -> None:
    """Refuse to overwrite what another run left, unless that is asked for.

    Args:
        options (`OutputOptions`): The options that name the folder.
        checkpoint (`Path`, *optional*): The checkpoint that the run resumes.

    Raises:
        UsageError: if the folder holds files that the run would overwrite, of another run than the one it resumes.
    """
    folder = options.folder
    if (folder / options.logging_dir) in (*_traces(folder), folder / "model_index.json", folder / CONFIG):
        raise UsageError(f"--logging_dir '{options.logging_dir}' has the name of a file of the run: choose another.")
    if options.overwrite_output_dir or _resumes_there(folder, checkpoint):
        return
    found = [path for path in _valuables(folder) if path.exists()]
    # A run that was killed before its first checkpoint is no reason to stop. It has left its description; without
    # that the files are not those of a run.
    killed_early = options.resume_from_checkpoint == "latest" and (folder / CONFIG).exists()
    if checkpoint is not None or not killed_early:
        found += [path for path in _traces(folder) if path.exists()]
    if found:
        why = "this run does not resume it"
        if options.resume_from_checkpoint is not None:
            why = "it left no checkpoint to resume"
        if checkpoint is not None:
            why = f"'{checkpoint}' is a checkpoint of another"
        raise UsageError(
            f"'{folder}' already holds a run ({', '.join(path.name for path in found[:3])}), and {why}. Go on with it "
            "(--resume_from_checkpoint latest or the name of a checkpoint), start anew there "
            "(--overwrite_output_dir), or choose another --output_dir."
        )


def prepare_output_dir(options: OutputOptions, checkpoint: Path | None) -> None:
    """Check the output directory again, and remove an earlier run from it if `--overwrite_output_dir` asks for that."""
    check_output_dir(options, checkpoint)
    folder = options.folder
    if options.overwrite_output_dir and not _resumes_there(folder, checkpoint):
        for path in (folder / CHECKPOINTS, folder / VAE_FOLDER, *_valuables(folder), *_traces(folder)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _resumes_there(folder: Path, checkpoint: Path | None) -> bool:
    return checkpoint is not None and checkpoint.resolve().parent == (folder / CHECKPOINTS).resolve()


def _valuables(folder: Path) -> list[Path]:
    return [*list_checkpoints(folder / CHECKPOINTS), folder / BEST, folder / "model_index.json"]


def _traces(folder: Path) -> list[Path]:
    names = (METRICS_LOG, "metrics.json", "curves.png", SAMPLES, "samples.png", "report.html", "README.md")
    return [folder / name for name in names]


def set_aside_later_steps(folder: Path, step: int) -> None:
    """Set aside checkpoints and the best pipeline of later steps than the one that this run resumes."""
    set_aside_newer(folder / CHECKPOINTS, step)
    record = read_best(folder / BEST)
    if record is not None and record["step"] > step:
        set_aside(folder / BEST)


def read_best(best: Path) -> dict[str, Any] | None:
    """Read the record in `best/`: `step`, `fid` and `settings_hash`. Return `None` if none can be read."""
    try:
        record = json.loads((best / "metrics.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) and "step" in record else None
