"""The output directory of a run: claimed by one run at a time, prepared, and kept apart from what is not the run's.

Mistakes about what a run leaves, seen before it trains."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..data.pixels import PixelDataset
from ..errors import UsageError
from ..files import remove_temporaries, set_aside
from ..latents.space import VAE_FOLDER
from ..objectives import Objective
from ..options.output import OutputOptions
from ..options.training import CONFIG
from ..sampling.schedulers import make_scheduler
from ..scoring.features.named import get_extractor
from .checkpoint import CHECKPOINTS, clean_checkpoints, list_checkpoints, set_aside_newer
from .log import METRICS_LOG

SAMPLES = "samples"
BEST = "best"
LOCK = ".lock"
# Where a run keeps its VAE, and a pipeline has it too.
# Where a run was killed, what it had started may hold the lock for a moment longer.
_PATIENCE_SECONDS = 3


@contextmanager
def lock_output_dir(folder: Path) -> Iterator[None]:
    """Makes the output directory and holds it for one run; a kill lets it go. Cleans what a killed run left half-way.

    Raises:
        UsageError: if another run is at work there, or the folder cannot be made or written to.
    """
    new = not folder.exists()
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_PATIENCE_SECONDS)
        remove_temporaries(folder)
        remove_temporaries(folder / BEST)
        clean_checkpoints(folder / CHECKPOINTS)
    except Timeout:
        raise UsageError(
            f"another run is at work in '{folder}'. Wait for its end, stop it, or choose another --output_dir."
        ) from None
    except OSError as error:
        raise UsageError(f"cannot make the output directory '{folder}', or not write there: {error}.") from error
    try:
        yield
    finally:
        if new and [path.name for path in folder.iterdir()] == [LOCK]:
            # A mistake was noticed before the run began: it leaves nothing.
            with suppress(OSError):
                (folder / LOCK).unlink()
                folder.rmdir()
        lock.release()


def check_output_dir(options: OutputOptions, checkpoint: Path | None) -> None:
    """Refuses to write over what another run left, unless that is asked for.

    Args:
        options (`OutputOptions`): Name the folder.
        checkpoint (`Path`, *optional*): What the run goes on from.

    Raises:
        UsageError: if the folder holds anything that the run would write over and that it does not go on from.
    """
    folder = options.folder
    if options.overwrite_output_dir or _goes_on_there(folder, checkpoint):
        return
    found = [path for path in _valuables(folder) if path.exists()]
    # A run that was killed before its first checkpoint is no reason to stop. It has left its description; without
    # that the files are not those of a run.
    killed_early = options.resume_from_checkpoint == "latest" and (folder / CONFIG).exists()
    if checkpoint is not None or not killed_early:
        found += [path for path in _traces(folder) if path.exists()]
    if found:
        why = "there is no usable checkpoint that was asked for"
        if checkpoint is not None:
            why = f"'{checkpoint}' is a checkpoint of another"
        raise UsageError(
            f"'{folder}' already holds a run ({', '.join(path.name for path in found[:3])}), and {why}. Go on with it "
            "(--resume_from_checkpoint latest or the name of a checkpoint), start anew there "
            "(--overwrite_output_dir), or choose another --output_dir."
        )


def prepare_output_dir(options: OutputOptions, checkpoint: Path | None) -> None:
    """As `check_output_dir`, and empties the directory of an earlier run if that is asked for. Without it, nothing is
    removed."""
    check_output_dir(options, checkpoint)
    folder = options.folder
    if options.overwrite_output_dir and not _goes_on_there(folder, checkpoint):
        for path in (folder / CHECKPOINTS, folder / VAE_FOLDER, *_valuables(folder), *_traces(folder)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _goes_on_there(folder: Path, checkpoint: Path | None) -> bool:
    return checkpoint is not None and checkpoint.resolve().parent == (folder / CHECKPOINTS).resolve()


def _valuables(folder: Path) -> list[Path]:
    return [*list_checkpoints(folder / CHECKPOINTS), folder / BEST, folder / "model_index.json"]


def _traces(folder: Path) -> list[Path]:
    names = (METRICS_LOG, "metrics.json", "curves.png", SAMPLES, "samples.png", "report.html", "README.md")
    return [folder / name for name in names]


def set_aside_later_steps(folder: Path, step: int) -> None:
    """Sets aside what an earlier run left of steps after the one that this run goes on from."""
    set_aside_newer(folder / CHECKPOINTS, step)
    record = read_best(folder / BEST)
    if record is not None and record["step"] > step:
        set_aside(folder / BEST)


def read_best(best: Path) -> dict[str, float | str] | None:
    """The record in `best/`: `step`, `fid` and what it was measured with. `None` where there is none."""
    try:
        return json.loads((best / "metrics.json").read_text())
    except FileNotFoundError:
        return None


def check_results(
    options: OutputOptions, objective: Objective, data: PixelDataset, held_out: PixelDataset | None
) -> None:
    """Tries what is cheap of the samples and scores that a run is to make.

    Raises:
        UsageError: for what would fail when the run is trained.
    """
    steps, sampler = options.ddpm_num_inference_steps, make_scheduler(None, objective.scheduler.config)
    try:
        sampler.set_timesteps(steps)
    except (IndexError, ValueError) as error:
        raise UsageError(f"ddpm_num_inference_steps {steps} does not fit the noise schedule: {error}.") from error
    if objective.num_timesteps is not None and sampler.timesteps.min() < 0:
        raise UsageError(f"ddpm_num_inference_steps {steps} goes below the last timestep by rounding: take one less.")
    if options.score_features is None:
        return
    counts = {"score_num_images": options.score_num_images}
    if options.eval_steps is not None:
        counts["eval_num_images"] = options.eval_num_images
    for name, count in counts.items():
        if count < 2:
            raise UsageError(f"{name} must be at least 2, because scores compare distributions, but is {count}.")
    for kind, images in (("training", data), ("held-out", held_out)):
        if images is not None and len(images) < 2:
            raise UsageError(
                f"there is only 1 {kind} image, and scores need 2 or more: add images, or omit --score_features."
            )
    # A network that does not take such images says so.
    get_extractor(options.score_features, data.resolution, data.channels)(data.numbered(range(1)))
