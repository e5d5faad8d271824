"""Checkpoints that can be trusted: written beside their place, verified, then renamed; never pickled."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UsageError

CHECKPOINTS = "checkpoints"
_MANIFEST = "manifest.json"
_STATE = "state.json"
_PARTIAL = ".writing-"
_REPLACED = ".replaced-"
_NAME = re.compile(r"step-(\d{8})")


class Checkpoint(NamedTuple):
    """What a run needs to go on: named groups of tensors (`unet`, `optimizer`, ...) and a JSON-ready state."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint, total_limit: int | None = None) -> Path:
    """Writes `folder/step-XXXXXXXX`, whole or not at all, and then removes the oldest beyond `total_limit`.

    Raises:
        UsageError: if the disk is full or refuses; checkpoints that were there before stay as they are.
    """
    final = folder / f"step-{step:08d}"
    partial, replaced = folder / f"{_PARTIAL}{final.name}", folder / f"{_REPLACED}{final.name}"
    try:
        # What a run that was killed in the middle of this left behind.
        for stale in (*folder.glob(f"{_PARTIAL}*"), *folder.glob(f"{_REPLACED}*")):
            shutil.rmtree(stale)
        partial.mkdir(parents=True)
        for name, tensors in checkpoint.tensors.items():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial / f"{name}.safetensors")
        (partial / _STATE).write_text(json.dumps(checkpoint.state))
        digests = {}
        for path in sorted(partial.iterdir()):
            _flush(path)
            digests[path.name] = _digest(path)
        (partial / _MANIFEST).write_text(json.dumps({"step": step, "sha256": digests}, indent=1))
        _flush(partial / _MANIFEST)
        _flush(partial)
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        _flush(folder)
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
            shutil.rmtree(old)
    return final


def set_aside_newer(folder: Path, step: int) -> None:
    """Renames checkpoints of later steps than the one that a run goes on from, so that it is not mixed with them."""
    for path in list_checkpoints(folder):
        if int(path.name.removeprefix("step-")) > step:
            aside = path.with_name(f"set-aside-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder, oldest first. Unfinished ones do not count."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or `None` if all of its files are there and have their checksums."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        for name, digest in manifest["sha256"].items():
            if _digest(path / name) != digest:
                return f"{name} does not have its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    return None


def find_latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line on each newer one that was passed over."""
    passed_over = []
    for path in reversed(list_checkpoints(folder)):
        damage = find_damage(path)
        if damage is None:
            return path, passed_over
        passed_over.append(f"passed over {path.name}: {damage}")
    return None, passed_over


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint after verifying it.

    Raises:
        UsageError: if it is none, or damaged.
    """
    damage = find_damage(path)
    if damage is not None:
        raise UsageError(f"'{path}' is not a usable checkpoint: {damage}. Resume from another one, or from 'latest'.")
    tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    return Checkpoint(tensors, json.loads((path / _STATE).read_text()))


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
