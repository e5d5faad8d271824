"""Which checkpoint a run goes on from, and whether it may."""

from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..errors import UsageError
from .checkpoint import CHECKPOINTS, Checkpoint, find_latest, load_checkpoint
from .options import OutputOptions

# What a resumed run may have otherwise than the one it goes on from: its length, its output, how the global batch is
# divided, where data and model come from (what they are is compared), and what one changes after a divergence.
# Anything else makes it another experiment.
MAY_CHANGE = frozenset(
    "dataset_name dataset_config_name train_data_dir model_config_name_or_path "
    "learning_rate lr_warmup_steps mixed_precision max_grad_norm "
    "num_epochs max_train_steps train_batch_size gradient_accumulation_steps eval_batch_size ddpm_num_inference_steps "
    "cache_dir dataloader_num_workers enable_xformers_memory_efficient_attention compile init_from output_dir "
    "overwrite_output_dir save_images_epochs save_model_epochs checkpointing_steps checkpoints_total_limit "
    "resume_from_checkpoint logging_steps validation_steps eval_steps eval_num_images score_features "
    "score_num_images logger logging_dir push_to_hub hub_token hub_model_id hub_private_repo license "
    "local_rank".split()
)


def find_checkpoint_to_resume(
    options: OutputOptions, record: dict[str, Any], digest_without_labels: str | None = None
) -> Checkpoint | None:
    """The checkpoint that `--resume_from_checkpoint` names, verified and loaded; `None` to start anew.

    Args:
        options (`OutputOptions`): Name the checkpoint.
        record (`dict`): What the checkpoints of the run that is about to start will say of it.
        digest_without_labels (`str`, *optional*): What an earlier version would have said of its data.

    Raises:
        UsageError: if the checkpoint is damaged, or belongs to another experiment.
    """
    say = PartialState().print
    if options.resume_from_checkpoint is None:
        return None
    if options.resume_from_checkpoint == "latest":
        path, remarks = find_latest(options.folder / CHECKPOINTS)
        for remark in remarks:
            say(remark)
        if path is None:
            say(f"no checkpoint in '{options.output_dir}' to resume from: starting anew.")
            return None
    else:
        path = Path(options.resume_from_checkpoint)
    checkpoint = load_checkpoint(path)
    before = checkpoint.state["config"]
    if before.get("data_digest") == digest_without_labels is not None:
        before = before | {"data_digest": record.get("data_digest")}
    check_same_experiment(before, record)
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
