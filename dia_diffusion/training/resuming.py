"""Resuming a run: find the checkpoint, and check that it belongs to the same experiment."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

from ..data.pixels import PixelDataset
from ..errors import UsageError
from ..models.unet import DIAUNet2DModel
from ..options.model import DataOptions
from ..options.output import OutputOptions
from ..options.training import TrainingConfig
from ..process.output import print_main
from .checkpoint import CHECKPOINTS, Checkpoint, find_damage, find_latest, list_checkpoints, load_checkpoint

# Options that may change when a run is resumed: its length, its output, the division of the global batch, the sources
# of data and model (their contents are compared), and what is changed after a divergence. Any other makes another
# experiment.
MAY_CHANGE = frozenset(
    "dataset_name dataset_config_name train_data_dir vae model_config_name_or_path unet_arguments "
    "learning_rate lr_warmup_steps mixed_precision max_grad_norm "
    "num_epochs max_train_steps train_batch_size gradient_accumulation_steps eval_batch_size ddpm_num_inference_steps "
    "cache_dir preprocessing_num_workers dataloader_num_workers enable_xformers_memory_efficient_attention compile "
    "compile_mode "
    "init_from output_dir "
    "overwrite_output_dir save_images_epochs save_model_epochs checkpointing_steps checkpoints_total_limit "
    "resume_from_checkpoint logging_steps validation_steps eval_steps eval_num_images score_features "
    "score_num_images logger logging_dir push_to_hub hub_token hub_model_id hub_private_repo license "
    "local_rank".split()
)
_SOURCES = ("dataset_name", "dataset_config_name", "train_data_dir")
# The names of checkpoints in diffusers' scripts, and here.
_NAME = re.compile(r"(?:checkpoint|step)-(\d+)")


def find_checkpoint(options: OutputOptions, total_steps: int) -> Path | None:
    """Return the checkpoint to resume from, or `None` to start anew.

    `latest` is the newest valid checkpoint that is not beyond the last step of the run. A name without a folder
    is looked for among the checkpoints of the output directory.

    Raises:
        UsageError: if there is none of that name, or if all lie beyond the end of the run.
    """
    folder = options.folder / CHECKPOINTS
    if options.resume_from_checkpoint is None:
        return None
    names = [path.name for path in list_checkpoints(folder)]
    if not _means_latest(options):
        asked = Path(options.resume_from_checkpoint)
        match = _NAME.fullmatch(asked.name)
        inside = folder / (f"step-{int(match[1]):08d}" if match else asked.name)
        # A name alone, or in the output directory, where diffusers' scripts have them.
        named = len(asked.parts) == 1 or (asked.parent.resolve() == options.folder.resolve() and not asked.exists())
        if named and inside.exists():
            asked = inside
        if not asked.exists():
            raise UsageError(
                f"there is no checkpoint '{options.resume_from_checkpoint}'; in '{folder}' there are: "
                f"{', '.join(names) or 'none'}. Name one of these, or 'latest', or omit --resume_from_checkpoint."
            )
        if (damage := find_damage(asked)) is not None:
            raise UsageError(f"'{asked}' is not a usable checkpoint: {damage}. Resume from another, or from 'latest'.")
        return asked
    path, remarks = find_latest(folder, total_steps)
    for remark in remarks:
        print_main(remark)
    if path is not None:
        return path
    if any("is to end" in remark for remark in remarks):
        raise UsageError(
            f"no checkpoint in '{folder}' can be used for a run of {total_steps} steps ({'; '.join(remarks)}). Give "
            "a larger --max_train_steps, or start anew in another --output_dir."
        )
    print_main(f"no checkpoint in '{options.output_dir}' to resume from: starting anew.")
    return None


def _means_latest(options: OutputOptions) -> bool:
    """Tell whether the newest checkpoint is asked for: by `latest`, or by the folder of the run or its checkpoints."""
    asked = str(options.resume_from_checkpoint)
    folders = (options.folder.resolve(), (options.folder / CHECKPOINTS).resolve())
    return asked == "latest" or (Path(asked).is_dir() and Path(asked).resolve() in folders)


def load_to_resume(
    path: Path, record: dict[str, Any], total_steps: int, digest_without_labels: str | None = None
) -> Checkpoint:
    """Read the checkpoint to resume, and check that it belongs to the same experiment.

    Args:
        path (`Path`): The checkpoint.
        record (`dict`): The record of the run that is about to start.
        total_steps (`int`): The last step of the run.
        digest_without_labels (`str`, *optional*): The data digest that earlier versions would have recorded.

    Raises:
        UsageError: if the checkpoint is damaged, belongs to another experiment, or lies beyond the end of the run.
    """
    checkpoint = load_checkpoint(path)
    before, step = checkpoint.state["config"], checkpoint.state["step"]
    if before.get("data_digest") == digest_without_labels is not None:
        before = before | {"data_digest": record.get("data_digest")}
    check_same_experiment(before, record)
    if step > total_steps:
        raise UsageError(
            f"'{path}' is of step {step}, and the run is to end at step {total_steps}: give a larger "
            "--max_train_steps, or an earlier checkpoint."
        )
    end = "; nothing is left to train, its results are written anew" if step == total_steps else ""
    print_main(f"resuming from {path} at step {step}{end}.")
    return checkpoint


def check_same_experiment(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Print which options differ from those of the resumed run.

    Raises:
        UsageError: for options whose change makes another experiment.
    """
    # Compare the built model, not the flags. Options that an older version lacked count as today's defaults.
    arguments = {name: item.default for name, item in inspect.signature(DIAUNet2DModel).parameters.items()}
    defaults = TrainingConfig().public_dict() | {"vae_digest": None} | json.loads(json.dumps(arguments, default=str))
    before, now = ({**record, **record.get("unet", {}), "unet": None} for record in (before, now))
    before = _completed(before, now, defaults)
    changed = {name: (before.get(name), value) for name, value in now.items() if before.get(name) != value}
    refused = {name: change for name, change in changed.items() if name not in MAY_CHANGE}
    for name, (old, new) in changed.items():
        if name not in refused and not name.startswith("resume"):
            print_main(f"resuming with another {name}: {new}, before {old}.")
    if refused:
        lines = "; ".join(_describe(name, old, new, before, now) for name, (old, new) in refused.items())
        raise UsageError(
            f"the checkpoint belongs to another experiment: {lines}. Give the options of that run, or start anew in "
            "another --output_dir."
        )


def digest_without_labels(data: PixelDataset, options: DataOptions) -> str | None:
    """Return the data digest of versions in which labels did not count, or `None`.

    It is `None` where those versions numbered classes differently: they sorted numbered folders as text, 10 before 2.
    """
    names = data.class_names or []
    renumbered = sorted(names) != names and all(map(str.isdecimal, names))
    source = options.dataset_name or options.train_data_dir
    return None if renumbered and source is not None and Path(source).is_dir() else data.digest(with_labels=False)


def _completed(before: dict[str, Any], now: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    return {name: before.get(name, defaults.get(name, value)) for name, value in now.items()}


def _describe(name: str, old: Any, new: Any, before: dict[str, Any], now: dict[str, Any]) -> str:
    """Describe a difference that is refused."""
    if name == "data_digest":
        return f"the images are others (now from {_source(now)}, then from {_source(before)})"
    if name == "vae_digest":
        return f"the VAE is another one (now {now.get('vae') or 'none'}, then {before.get('vae') or 'none'})"
    if name == "global_batch_size":
        return (
            f"a step takes {new} images, took {old} (processes x --train_batch_size x --gradient_accumulation_steps; "
            "their product must stay the same)"
        )
    return f"{name} is {new}, was {old}"


def _source(record: dict[str, Any]) -> str:
    return " ".join(f"{name} {record[name]}" for name in _SOURCES if record.get(name)) or "the embedded digits"
