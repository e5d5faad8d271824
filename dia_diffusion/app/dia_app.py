"""What `dia app` does: loads a model, and shows it in a browser until it is stopped."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..process.distributed import find_device, make_state
from ..sampling.loading import load_pipeline
from .making import Maker


def launch_app(model: str, device: str | None = None, **launch: Any) -> None:
    """Shows the page of a model, until it is stopped.

    Args:
        model (`str`): Folder or Hub id of a pipeline.
        device (`str`, *optional*): By default a GPU where there is one.
        launch: For Gradio's `launch`. Its `GRADIO_SERVER_NAME` and `GRADIO_SERVER_PORT` say where the page is.

    Raises:
        UsageError: without Gradio, and for a model that cannot be shown.
    """
    if find_spec("gradio") is None:
        raise UsageError("the page needs Gradio: pip install 'dia-diffusion[app]'.")
    maker = Maker(load_pipeline(model, device=find_device(device, make_state())))
    # It takes seconds to import, which a mistake should not wait for.
    import gradio as gr

    from .page import make_app

    # Fonts that are there, instead of some from elsewhere.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    app = make_app(maker, Path(model).name)
    _, url, _ = app.launch(theme=theme, footer_links=[], quiet=True, prevent_thread_lock=True, **launch)
    print(f"'{model}' can be tried at {url} (Ctrl-C ends it).", flush=True)
    app.block_thread()
