"""Which checkpoint a run goes on from, and whether it may."""

from pathlib import Path
from typing import Any

from accelerate import PartialState

from .checkpoint import Checkpoint, find_latest, load_checkpoint
from .config import MAY_CHANGE, TrainingConfig
from .errors import UsageError
from .results import CHECKPOINTS


def find_checkpoint_to_resume(config: TrainingConfig, record: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint that `--resume_from_checkpoint` names, verified and loaded; `None` to start anew.

    Args:
        config (`TrainingConfig`): The run that is about to start.
        record (`dict`): What its checkpoints will say of it.

    Raises:
        UsageError: if the checkpoint is damaged, or belongs to another experiment.
    """
    say = PartialState().print
    if config.resume_from_checkpoint is None:
        return None
    if config.resume_from_checkpoint == "latest":
        path, remarks = find_latest(Path(config.output_dir) / CHECKPOINTS)
        for remark in remarks:
            say(remark)
        if path is None:
            say(f"no checkpoint in '{config.output_dir}' to resume from: starting anew.")
            return None
    else:
        path = Path(config.resume_from_checkpoint)
    checkpoint = load_checkpoint(path)
    check_same_experiment(checkpoint.state["config"], record)
    say(f"resuming from {path} at step {checkpoint.state['step']}.")
    return checkpoint


def check_same_experiment(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Says which options differ from those of the run that is resumed.

    Raises:
        UsageError: for options whose change would make it another experiment.
    """
    changed = {name: (before.get(name), value) for name, value in now.items() if before.get(name) != value}
    refused = {name: change for name, change in changed.items() if name not in MAY_CHANGE}
    for name, (old, new) in changed.items():
        if name not in refused and not name.startswith("resume"):
            PartialState().print(f"resuming with another {name}: {new}, before {old}.")
    if refused:
        lines = "; ".join(f"{name} is {new}, was {old}" for name, (old, new) in refused.items())
        raise UsageError(
            f"the checkpoint belongs to another experiment: {lines}. Give the options of that run, or start anew in "
            "another --output_dir."
        )
