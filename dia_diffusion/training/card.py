"""The README.md that stands beside a trained pipeline, with the metadata that the Hub reads.

The repository on the Hub that a run is pushed to."""

import shlex
import sys
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel
from huggingface_hub import EvalResult, ModelCard, ModelCardData, create_repo, upload_folder

from ..data.sources import EMBEDDED
from ..errors import UsageError, first_line
from ..options.data import DataOptions
from ..options.output import OutputOptions
from ..scoring.score_report import format_scores
from .checkpoint import CHECKPOINTS
from .folder import BEST, LOCK, SAMPLES

_MOST_CLASSES = 100
_SCORE_NAMES = {"fid": "Frechet distance", "kid_mean": "KID", "precision": "Precision", "recall": "Recall"}


def write_model_card(
    folder: Path,
    unet: UNet2DModel,
    figures: dict[str, Any],
    command: str,
    options: DataOptions,
    init_from: str | None = None,
    license: str | None = None,
    hub_id: str | None = None,
    class_names: list[str] | None = None,
    objective: str = "denoising diffusion",
) -> None:
    """Writes `folder/README.md` of a finished run.

    Args:
        folder (`Path`), unet (`UNet2DModel`), figures (`dict`): The run, its model, and what is in its metrics.json.
        command (`str`): The command line that trained it.
        options (`DataOptions`): The images that it was trained on.
        init_from (`str`, *optional*): The model that it started from.
        license (`str`, *optional*): An identifier of the Hub.
        hub_id (`str`, *optional*): The repository on the Hub that the folder is for.
        class_names (`list[str]`, *optional*): The classes that the model knows, in the order of their numbers.
        objective (`str`, *optional*): What it learned.
    """
    data, on_hub = _data_name(options)
    scores = figures.get("features") is not None
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    attention = sum(p.numel() for name, p in unet.named_parameters() if name.startswith("dia."))
    losses = [f"- {key.replace('_', ' ')}: {figures[key]:.5f}" for key in ("loss", "held_out_loss") if key in figures]
    text = f"""
# {folder.name}

A diffusion UNet with shared attention (DIA, [arXiv 2210.16101](https://arxiv.org/abs/2210.16101)), trained on
`{data}` at {options.resolution}x{options.resolution} pixels for {figures["step"]:,} steps of
{figures["global_batch_size"]} images. {parameters:,} parameters, of which attention {attention:,}
(`{unet.config.dia_attention}`, sharing `{unet.config.dia_sharing}`). Objective: {objective}.
{_latents(options.vae, unet)}{_classes(class_names)}
![samples](samples.png)

## Use

With dia-diffusion:

```python
from dia_diffusion import DIAUNetPipeline

pipeline = DIAUNetPipeline.from_pretrained("{hub_id or folder.name}")
images = pipeline(batch_size=4).images
```

With diffusers alone. This runs the code in `pipeline_dia_unet.py` and `unet/dia_unet.py`; read it if you do not trust
who published it.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{hub_id or folder.name}", trust_remote_code=True)
images = pipeline(batch_size=4).images
```

## Figures

{format_scores(figures) if scores else "No scores were computed in this run."}

{chr(10).join(losses)}

![training curves](curves.png)

## Training

```bash
{command}
```

All options are in `training_config.yaml`, which `train_unet.py --config` reads.
"""
    metadata = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["dia-diffusion", "diffusion", "shared-attention", "arxiv:2210.16101"],
        license=license,
        datasets=[data] if on_hub else None,
        base_model=init_from if init_from and not Path(init_from).exists() else None,
        model_name=folder.name,
        eval_results=_eval_results(data, figures),
    ).to_yaml()
    ModelCard(f"---\n{metadata}\n---\n{text}").save(folder / "README.md")


def launch_command(secret: str | None = None) -> str:
    """The command line of this process, without what is secret in it."""
    command = shlex.join(["accelerate", "launch", *sys.argv])
    return command if secret is None else command.replace(secret, "TOKEN")


def _latents(vae: str | None, unet: UNet2DModel) -> str:
    if vae is None:
        return ""
    name, config = Path(vae).resolve().name if Path(vae).exists() else vae, unet.config
    size = f"{config.in_channels}x{config.sample_size}x{config.sample_size}"
    return f"\nIt works on latents of {size}, which the pipeline's `vae` (`{name}`) decodes.\n"


def _classes(names: list[str] | None) -> str:
    if names is None:
        return ""
    shown = ", ".join(f"{number} {name}" for number, name in enumerate(names[:_MOST_CLASSES]))
    more = "; the others are in `model_index.json`" if names[_MOST_CLASSES:] else ""
    return f"\nClass-conditional, with {len(names)} classes (`pipeline.class_names`): {shown}{more}.\n"


def _data_name(options: DataOptions) -> tuple[str, bool]:
    """The name of the data, and whether the Hub has it. Of a folder on this machine only the last part is shown."""
    if options.dataset_name is None or Path(options.dataset_name).exists():
        return Path(options.dataset_name or options.train_data_dir).resolve().name, False
    return options.dataset_name, options.dataset_name not in EMBEDDED


def _eval_results(data: str, figures: dict[str, Any]) -> list[EvalResult]:
    scored = figures.get("features") is not None
    details = f" ({figures['features']} features, {figures['num_images']} images)" if scored else ""
    return [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=data,
            dataset_name=data,
            metric_type=key,
            metric_name=title + details,
            metric_value=figures[key],
        )
        for key, title in (_SCORE_NAMES if scored else {"held_out_loss": "Held-out loss"}).items()
        if figures.get(key) is not None
    ]


def make_hub_repository(options: OutputOptions) -> str | None:
    """The full id of the repository that the run is pushed to, made where there is none; `None` for no repository.

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
            f"cannot use the repository '{name}' on the Hub: {first_line(error)} Log in with "
            "`hf auth login` or give --hub_token, check --hub_model_id, or omit --push_to_hub."
        ) from error


def push_run(options: OutputOptions, hub_id: str) -> None:
    """Pushes the pipeline of a finished run, its card and what the card shows.

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
            f"{first_line(error)}. To try again: hf upload {hub_id} {options.folder} {excluded}"
        ) from error
