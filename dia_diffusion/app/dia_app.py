"""`dia app`: load a model, and show its page in a browser until it is stopped."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..data.recorded import find_recorded_data
from ..errors import UsageError
from ..pipelines.noise import NoiseKind, noise_kind
from ..pipelines.pipeline_dia_unet import DIAUNetPipeline
from ..process.distributed import find_device, make_state
from ..sampling.loading import load_pipeline
from .stepwise import StepwiseSampler

_PREDICTIONS = {"epsilon": "the noise", "sample": "the image", "v_prediction": "the velocity"}


def launch_app(
    model: str,
    device: str | None = None,
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    variant: str | None = None,
    **launch: Any,
) -> None:
    """Show the page of a model until it is stopped.

    Args:
        model (`str`): Folder or Hub id of a pipeline.
        device (`str`, *optional*): By default a GPU where there is one.
        host (`str`, *optional*): The address to listen on, by default `GRADIO_SERVER_NAME` or 127.0.0.1.
        port (`int`, *optional*): By default `GRADIO_SERVER_PORT`, or the first free one from 7860.
        share (`bool`, *optional*, defaults to `False`): Whether Gradio makes a public link, for a week.
        variant (`str`, *optional*): The variant of the saved weights, such as `fp16`.
        launch: Further arguments of Gradio's `launch`.

    Raises:
        UsageError: without Gradio, for a model that cannot be shown, and for an address that cannot be used.
    """
    if find_spec("gradio") is None:
        raise UsageError("the page needs Gradio: pip install 'dia-diffusion[app]'.")
    sampler = StepwiseSampler(load_pipeline(model, device=find_device(device, make_state()), variant=variant))
    # Gradio takes seconds to import, which a mistake should not wait for.
    import gradio as gr

    from .page import make_app

    # System fonts: the page loads nothing from elsewhere.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    app = make_app(sampler, Path(model).name, describe_model(sampler.pipeline, model))
    _reach_own_machine_directly(host)
    arguments = {"server_name": host, "server_port": port, "share": share, "theme": theme, "footer_links": []}
    try:
        _, url, public = app.launch(**arguments | launch, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        raise UsageError(f"the page cannot be shown at {host or '127.0.0.1'}, port {port or 7860}: {error}") from error
    print(f"'{model}' can be tried at {url}{f' and {public}' if public else ''} (Ctrl-C ends it).", flush=True)
    app.block_thread()


def describe_model(pipeline: DIAUNetPipeline, model: str) -> str:
    """Return a paragraph about a model in Markdown: data, size, parameters and objective.

    Args:
        pipeline (`DIAUNetPipeline`): The model.
        model (`str`): Its folder, in which a training run may have recorded its data.
    """
    data, unet = find_recorded_data(model), pipeline.unet
    origin = data and (data.dataset_name or Path(data.train_data_dir or "").name)
    height, width = pipeline.sample_size
    size = f"{height}x{width} {'latents of a VAE' if pipeline.vae is not None else 'pixels'}"
    classes = f", {pipeline.null_class} classes" if pipeline.null_class else ""
    parameters = unet.num_parameters()
    attention = getattr(unet, "dia", None)
    if attention is not None:
        own = sum(parameter.numel() for parameter in attention.parameters())
        kind = f" ({own:,} of them shared attention: {unet.config.dia_attention}, {unet.config.dia_sharing})"
    else:
        kind = " (no attention of this package)"
    config = pipeline.scheduler.config
    if (noise := noise_kind(config)) == NoiseKind.BETAS:
        objective = f"predicts {_PREDICTIONS[config.prediction_type]} ({config.num_train_timesteps:,} timesteps)"
    else:
        objective = f"learned by {'EDM' if noise == NoiseKind.EDM else 'flow matching'}"
    trained = f"Trained on **{origin}**. " if origin else ""
    return f"{trained}{size}{classes}; {parameters:,} parameters{kind}; {objective}."


def _reach_own_machine_directly(host: str | None) -> None:
    """Exclude this machine from the proxies of the environment: Gradio opens its own page once it serves it."""
    for name in ("NO_PROXY", "no_proxy"):
        direct = [os.environ.get(name, ""), "localhost", "127.0.0.1", host or ""]
        os.environ[name] = ",".join(filter(None, direct))
