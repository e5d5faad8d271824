"""Diffusion UNets with Dense-and-Implicit Attention."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .models.attach import attach, detach
    from .models.unet import DIAUNet2DModel
    from .pipelines.pipeline_dia_unet import DIAUNetPipeline

__version__ = "0.2.0"
_EXPORTS = {
    "DIAUNet2DModel": "models.unet",
    "DIAUNetPipeline": "pipelines.pipeline_dia_unet",
    "attach": "models.attach",
    "detach": "models.attach",
}
__all__ = ["DIAUNet2DModel", "DIAUNetPipeline", "__version__", "attach", "detach"]


def __getattr__(name: str) -> Any:
    # torch and diffusers take seconds to import, and most of the command line does not need them.
    if name in _EXPORTS:
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
