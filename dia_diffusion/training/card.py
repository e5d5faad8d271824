"""The model card (README.md) of a trained pipeline, and the repository on the Hub that a run is pushed to."""

import html
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel
from huggingface_hub import EvalResult, ModelCard, ModelCardData, create_repo, upload_folder

from ..data.sources import EMBEDDED
from ..errors import UsageError, first_line
from ..files import LOCK, replace_text
from ..options.model import DataOptions
from ..options.output import OutputOptions
from ..options.training import CONFIG, TrainingConfig, load_options, recipes
from ..scoring.score_report import format_scores
from .architecture import count_parameters
from .checkpoint import CHECKPOINTS
from .folder import BEST, SAMPLES

_MOST_CLASSES = 100
_SCORE_NAMES = {"fid": "Frechet distance", "kid_mean": "KID", "precision": "Precision", "recall": "Recall"}
# Options that belong to a machine, an account or a resumption, and make no difference to the model.
_NOT_REPEATED = frozenset(
    "cache_dir preprocessing_num_workers dataloader_num_workers logging_dir local_rank resume_from_checkpoint "
    "overwrite_output_dir push_to_hub hub_token hub_model_id hub_private_repo".split()
)


def write_model_card(
    config: TrainingConfig,
    unet: UNet2DModel,
    figures: dict[str, Any],
    objective: str,
    class_names: list[str] | None = None,
    hub_id: str | None = None,
    num_processes: int = 1,
) -> None:
    """Write the README.md of a finished run into its output directory.

    Args:
        config (`TrainingConfig`): The record of the run.
        unet (`UNet2DModel`): Its model.
        figures (`dict`): The content of its metrics.json.
        objective (`str`): What the model learned, in words.
        class_names (`list[str]`, *optional*): The classes of the model, in the order of their numbers.
        hub_id (`str`, *optional*): The repository on the Hub that the folder is for.
        num_processes (`int`, *optional*, defaults to 1): Processes that trained together.
    """
    folder, options = config.output.folder, config.data
    data, _ = _data_name(options)
    parameters, attention = count_parameters(unet)
    losses = [f"- {key.replace('_', ' ')}: {figures[key]:.5f}" for key in ("loss", "held_out_loss") if key in figures]
    name = json.dumps(hub_id or folder.name, ensure_ascii=False)
    text = f"""
# {_as_text(folder.name)}

A diffusion UNet with shared attention (DIA, [arXiv 2210.16101](https://arxiv.org/abs/2210.16101)), trained on
{_as_text(data)} at {options.resolution}x{options.resolution} pixels for {figures["step"]:,} steps of
{figures["global_batch_size"]} images. {parameters:,} parameters, of which attention {attention:,}
(`{unet.config.dia_attention}`, sharing `{unet.config.dia_sharing}`). Objective: {objective}.
{_latents(options.vae, unet)}{_classes(class_names)}
![samples](samples.png)

## Use

With dia-diffusion:

```python
from dia_diffusion import DIAUNetPipeline

pipeline = DIAUNetPipeline.from_pretrained({name})
images = pipeline(batch_size=4).images
```

With diffusers alone. This runs the code in `pipeline_dia_unet.py` and `unet/dia_unet.py`; read it if you do not trust
who published it.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({name}, trust_remote_code=True)
images = pipeline(batch_size=4).images
```

## Figures

{format_scores(figures) if figures.get("features") else "No scores were computed in this run."}

{chr(10).join(losses)}

![training curves](curves.png)

## Training

```bash
{training_command(config, num_processes)}
```

All options are in `{CONFIG}`, which `dia train --config` reads.
"""
    replace_text(folder / "README.md", str(ModelCard(f"---\n{_metadata(config, figures)}\n---\n{text}")))


def training_command(config: TrainingConfig, num_processes: int = 1) -> str:
    """Return the command that trains the model again: the options that differ from what they are by default.

    Of folders on this machine only the name is kept.
    """
    given = config.public_dict()
    recipe = load_options(recipes()["digits"]) if given["dataset_name"] == "digits" else {}
    start = {name: recipe[name] for name in recipe.keys() - vars(config.objective).keys()}
    usual = TrainingConfig.from_flat(**start, objective=given["objective"]).public_dict()
    # The recipe's objective options count where its objective is used.
    usual |= {name: recipe[name] for name in recipe.keys() & vars(config.objective).keys() if given[name] is not None}
    usual |= {"dataset_name": None, "objective": TrainingConfig().objective.objective}
    changed = {name: value for name, value in given.items() if value != usual[name] and name not in _NOT_REPEATED}
    if changed.get("max_train_steps", 0) is None:
        del changed["max_train_steps"]
        changed["num_epochs"] = given["num_epochs"]
    elif given["max_train_steps"] is not None:
        changed.pop("num_epochs", None)
    if None in changed.values():
        # A flag cannot take back what the recipe of the digits says; a file can.
        changed = {"config": CONFIG}
    words = ["dia", "train"]
    if num_processes > 1:
        words = ["accelerate", "launch", "--num_processes", str(num_processes), "-m", "dia_diffusion.train"]
    for name, value in changed.items():
        words += [f"--{name}", *_flag_values(value)]
    return shlex.join(words)


def _flag_values(value: Any) -> list[str]:
    if isinstance(value, bool):
        return [] if value else ["False"]
    if isinstance(value, dict):
        return [json.dumps(value)]
    if isinstance(value, list | tuple):
        return [str(item) for item in value]
    local = isinstance(value, str) and value != "" and Path(value).exists()
    return [Path(value).resolve().name if local else str(value)]


def check_card(config: TrainingConfig) -> None:
    """Let the Hub check the metadata of the card of a run that will be pushed, before the run and not after it.

    Raises:
        UsageError: if the Hub would refuse the card.
    """
    if not config.output.push_to_hub:
        return
    try:
        ModelCard(f"---\n{_metadata(config, {})}\n---\n").validate()
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"the Hub refuses the metadata of the model card, see --license: {reason}") from error
    except Exception:  # Several libraries raise errors of their own here.
        # No connection, which the next call to the Hub reports, or a Hub without this check.
        return


def _metadata(config: TrainingConfig, figures: dict[str, Any]) -> str:
    (data, on_hub), start = _data_name(config.data), config.model.init_from
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["dia-diffusion", "diffusion", "shared-attention", "arxiv:2210.16101"],
        license=config.output.license,
        datasets=[data] if on_hub else None,
        base_model=start if start and not Path(start).exists() else None,
        model_name=config.output.folder.name,
        eval_results=_eval_results(data, figures),
    ).to_yaml()


def _eval_results(data: str, figures: dict[str, Any]) -> list[EvalResult]:
    features = figures.get("features")
    details = f" ({features} features, {figures['num_images']} images)" if features else ""
    results = []
    for key, title in (_SCORE_NAMES if features else {"held_out_loss": "Held-out loss"}).items():
        value = figures.get(key)
        if value is not None and math.isfinite(value):
            # Only the distance in features of Inception is the FID; others must not stand beside it in a ranking.
            other = features not in (None, "inception")
            kind = f"{'frechet_distance' if key == 'fid' else key}_{Path(str(features)).name}" if other else key
            results.append(
                EvalResult(
                    task_type="unconditional-image-generation",
                    dataset_type=data,
                    dataset_name=data,
                    metric_type=kind,
                    metric_name=title + details,
                    metric_value=value,
                )
            )
    return results


def _data_name(options: DataOptions) -> tuple[str, bool]:
    """Return the name of the data, and whether it is on the Hub. A local folder is reduced to its name."""
    if options.dataset_name is None or Path(options.dataset_name).exists():
        return Path(options.dataset_name or options.train_data_dir or "").resolve().name, False
    return options.dataset_name, options.dataset_name not in EMBEDDED


def _latents(vae: str | None, unet: UNet2DModel) -> str:
    if vae is None:
        return ""
    name, config = Path(vae).resolve().name if Path(vae).exists() else vae, unet.config
    size = f"{config.in_channels}x{config.sample_size}x{config.sample_size}"
    return f"\nIt works on latents of {size}, which the pipeline's `vae` ({_as_text(name)}) decodes.\n"


def _classes(names: list[str] | None) -> str:
    if names is None:
        return ""
    shown = ", ".join(f"{number} {_as_text(name)}" for number, name in enumerate(names[:_MOST_CLASSES]))
    more = "; the others are in `model_index.json`" if names[_MOST_CLASSES:] else ""
    return f"\nClass-conditional, with {len(names)} classes (`pipeline.class_names`): {shown}{more}.\n"


def _as_text(name: str) -> str:
    """Return a name for Markdown that shows as it is: on one line, without markup or HTML."""
    return re.sub(r"([\\`*_{}\[\]#|~!$])", r"\\\1", html.escape(" ".join(name.split()), quote=False))


def make_hub_repository(options: OutputOptions) -> str | None:
    """Make the repository that the run is pushed to, and return its full id; `None` without `--push_to_hub`.

    Raises:
        UsageError: if the Hub refuses, or cannot be reached.
    """
    if not options.push_to_hub:
        return None
    name = options.hub_model_id or options.folder.name
    try:
        return create_repo(name, token=options.hub_token, private=options.hub_private_repo, exist_ok=True).repo_id
    except Exception as error:  # Of several libraries' kinds: no connection, no token, a bad name.
        raise UsageError(
            f"cannot use the repository '{name}' on the Hub: {first_line(error)}. Log in with "
            "`hf auth login` or give --hub_token, check --hub_model_id, or omit --push_to_hub."
        ) from error


def push_run(options: OutputOptions, hub_id: str) -> None:
    """Push the pipeline of a finished run, its card and what the card shows.

    Raises:
        UsageError: if the Hub refuses, or cannot be reached.
    """
    rest = [f"{name}/*" for name in (CHECKPOINTS, options.logging_dir, SAMPLES, BEST)] + ["set-aside-*", LOCK]
    try:
        upload_folder(repo_id=hub_id, folder_path=options.folder, token=options.hub_token, ignore_patterns=rest)
    except Exception as error:
        excluded = " ".join(f'--exclude "{pattern}"' for pattern in rest)
        raise UsageError(
            f"the run is finished and saved in '{options.folder}', but could not be pushed to '{hub_id}': "
            f"{first_line(error)}. To try again: hf upload {hub_id} {shlex.quote(str(options.folder))} {excluded}"
        ) from error
