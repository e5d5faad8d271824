"""Diffusion UNets with Dense-and-Implicit Attention."""

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import analyze, evaluate, sample, train
    from .models.attach import attach, detach
    from .models.find import find_branches
    from .models.unet import DIAUNet2DModel
    from .pipelines.pipeline_dia_unet import DIAUNetPipeline

__version__ = "0.2.0"
_EXPORTS = {
    "train": "api",
    "sample": "api",
    "evaluate": "api",
    "analyze": "api",
    "DIAUNet2DModel": "models.unet",
    "DIAUNetPipeline": "pipelines.pipeline_dia_unet",
    "attach": "models.attach",
    "detach": "models.attach",
    "find_branches": "models.find",
}
__all__ = [
    "DIAUNet2DModel",
    "DIAUNetPipeline",
    "__version__",
    "analyze",
    "attach",
    "detach",
    "evaluate",
    "find_branches",
    "sample",
    "train",
]


def __getattr__(name: str) -> Any:
    # torch and diffusers take seconds to import, and most of the command line does not need them.
    if name in _EXPORTS:
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)


class _UnusedModule(ModuleType):
    """A module in `sys.modules` that is executed when one of its names is first asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        spec: Any = self.__spec__
        self.__class__ = ModuleType  # type: ignore[assignment]
        spec.loader.exec_module(self)
        return getattr(self, name)


# A pipeline of diffusers that holds a DIAUNet2DModel names its module, which diffusers does not import by itself.
_spec: Any = find_spec(f"{__name__}.models.unet")
_unet = sys.modules[_spec.name] = module_from_spec(_spec)
_unet.__class__ = _UnusedModule
