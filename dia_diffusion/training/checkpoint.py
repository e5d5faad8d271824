"""Checkpoints: written to a temporary folder, with digests, then renamed; never pickled."""

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UsageError
from ..files import file_digest, flush, follow_umask, set_aside, to_json

CHECKPOINTS = "checkpoints"
_MANIFEST = "manifest.json"
_STATE = "state.json"
_PARTIAL = ".writing-"
_REPLACED = ".replaced-"
_REMOVING = ".removing-"
_NAME = re.compile(r"step-(\d{8})")


class Checkpoint(NamedTuple):
    """The state of a run: named groups of tensors (`unet`, `optimizer`, ...) and JSON-ready values."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint, total_limit: int | None = None) -> Path:
    """Write `folder/step-XXXXXXXX`, whole or not at all, and then remove the oldest beyond `total_limit`.

    Raises:
        UsageError: if the disk is full or refuses; checkpoints that were there before stay as they are.
    """
    final = folder / f"step-{step:08d}"
    partial, replaced = folder / f"{_PARTIAL}{final.name}", folder / f"{_REPLACED}{final.name}"
    try:
        clean_checkpoints(folder)
        partial.mkdir(parents=True)
        for name, tensors in checkpoint.tensors.items():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial / f"{name}.safetensors")
        (partial / _STATE).write_text(to_json(checkpoint.state))
        follow_umask(partial)
        digests = {}
        for path in sorted(partial.iterdir()):
            flush(path)
            digests[path.name] = file_digest(path)
        (partial / _MANIFEST).write_text(to_json({"step": step, "sha256": digests}, indent=1))
        flush(partial / _MANIFEST)
        flush(partial)
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        flush(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UsageError(
            f"the checkpoint of step {step} could not be written to '{folder}': {error}. Earlier checkpoints are "
            "untouched; make room and resume with --resume_from_checkpoint latest."
        ) from error
    if total_limit is not None:
        older = [path for path in list_checkpoints(folder) if path.name < final.name]
        for old in older[: max(len(older) + 1 - total_limit, 0)]:
            _remove(old)
    return final


def clean_checkpoints(folder: Path) -> None:
    """Remove the remains of a checkpoint whose saving or removal was killed.

    Call it only when no other process writes there.
    """
    for replaced in folder.glob(f"{_REPLACED}*"):
        final = folder / replaced.name.removeprefix(_REPLACED)
        if not final.exists():
            # A kill came between moving the old checkpoint away and the new one into place.
            replaced.rename(final)
    for kind in (_PARTIAL, _REPLACED, _REMOVING):
        for stale in folder.glob(f"{kind}*"):
            shutil.rmtree(stale, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a kill half-way leaves no damaged one in the list."""
    try:
        shutil.rmtree(path.rename(path.with_name(f"{_REMOVING}{path.name}")))
    except OSError as error:
        # The new checkpoint is complete: an old one that cannot be removed is no reason to stop.
        warnings.warn(f"the old checkpoint '{path}' could not be removed: {error}.", stacklevel=2)


def set_aside_newer(folder: Path, step: int) -> None:
    """Set aside the checkpoints of steps after `step`, which do not belong to a run that resumes there."""
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            set_aside(path)


def step_of(path: Path) -> int:
    """Return the step of a checkpoint, from its name."""
    return int(path.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """List the finished checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def find_damage(path: Path) -> str | None:
    """Verify the digests of a checkpoint's files. Return what is wrong, or `None`."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        for name, digest in manifest["sha256"].items():
            if file_digest(path / name) != digest:
                return f"{name} does not have its digest"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    return None


def find_latest(folder: Path, last_step: int | None = None) -> tuple[Path | None, list[str]]:
    """Return the newest valid checkpoint, or `None`, and a line on each newer one that was passed over.

    Args:
        folder (`Path`): The folder of the checkpoints.
        last_step (`int`, *optional*): The end of the run: checkpoints of later steps are passed over.
    """
    passed_over: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        beyond = last_step is not None and step_of(path) > last_step
        damage = f"the run is to end at step {last_step}" if beyond else find_damage(path)
        if damage is None:
            return path, passed_over
        passed_over.append(f"passed over {path.name}: {damage}")
    return None, passed_over


def load_checkpoint(path: Path) -> Checkpoint:
    """Verify a checkpoint and read it.

    Raises:
        UsageError: if it is damaged, or no checkpoint.
    """
    damage = find_damage(path)
    if damage is not None:
        raise UsageError(f"'{path}' is not a usable checkpoint: {damage}. Resume from another one, or from 'latest'.")
    tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    return Checkpoint(tensors, json.loads((path / _STATE).read_text()))
