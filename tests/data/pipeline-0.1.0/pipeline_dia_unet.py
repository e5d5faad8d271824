"""Code that diffusers runs to load this pipeline, if it is asked to with `trust_remote_code=True`.

dia-diffusion 0.1.0 wrote it when the pipeline was saved. It holds these of its modules:
errors, self_contained, pipeline_dia_unet.
Where dia-diffusion is installed, `dia_diffusion.DIAUNetPipeline.from_pretrained` loads the pipeline without it.
Apache-2.0.
"""

import ast
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from importlib.util import resolve_name
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


####################################################################################################
# errors: Exceptions whose messages say what was wrong and what to do about it.
####################################################################################################


class UsageError(ValueError):
    """A mistake that the caller can correct. Command lines print its message alone and exit with status 2."""


class NotFiniteError(UsageError):
    """Training has diverged: a loss, a gradient or a weight is not a finite number."""

    def __init__(self, step: int, what: str, learning_rate: float):
        super().__init__(f"at step {step} {what}, at learning rate {learning_rate:.3g}: training has diverged.")


####################################################################################################
# self_contained: Pipelines that bring their own code, so that a folder they save runs where only diffusers is installed.
#
# diffusers runs code of a saved pipeline, with `trust_remote_code=True`, if `model_index.json` names a file and a class
# as the pipeline's class, or a file `<component>/<library>.py` as the library of a component. From the Hub it fetches
# only the files so named: hence one file for the pipeline and one for the UNet.
####################################################################################################


# Module of a class in this package, and the name of the file that holds its code in a saved pipeline.
_FILES = {"dia_diffusion.unet": "dia_unet", "dia_diffusion.pipelines.pipeline_dia_unet": "pipeline_dia_unet"}

_HEADER = '''"""Code that diffusers runs to load this pipeline, if it is asked to with `trust_remote_code=True`.

{package} {version} wrote it when the pipeline was saved. It holds these of its modules:
{modules}.
Where dia-diffusion is installed, `dia_diffusion.DIAUNetPipeline.from_pretrained` loads the pipeline without it.
Apache-2.0.
"""
'''


class SelfContained:
    """A mixin for a `DiffusionPipeline`: saves code beside the weights, and does not need it where it is installed."""

    def save_config(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves `model_index.json`, and the code of the pipeline and its components. All ways to save come here."""
        for name, library in self._libraries().items():
            folder = Path(save_directory, "" if name == "_class_name" else name)
            folder.mkdir(parents=True, exist_ok=True)
            source = single_file_source(sys.modules[library])
            (folder / f"{_file_name(library)}.py").write_text(source, encoding="utf-8")
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """The text of `model_index.json`; it names the files of the code."""
        index = json.loads(super().to_json_string())
        for name, library in self._libraries().items():
            class_name = type(self).__name__ if name == "_class_name" else index[name][1]
            index[name] = [_file_name(library), class_name]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def _libraries(self) -> dict[str, str]:
        """The module of the pipeline's class and of its components' classes, as far as they come from this package."""
        modules = {name: value[0] for name, value in self.config.items() if isinstance(value, list | tuple)}
        modules["_class_name"] = type(self).__module__
        return {name: module for name, module in modules.items() if module and _package(module) == _package(__name__)}

    @classmethod
    def _dict_from_json_file(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # The class that was asked for is at hand: diffusers need not look for the one in the folder.
        return super()._dict_from_json_file(*args, **kwargs) | {"_class_name": cls.__name__}

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As [`~diffusers.ConfigMixin.load_config`], with the installed classes in place of the folder's code."""
        loaded = super().load_config(*args, **kwargs)
        installed = {file: module for module, file in _FILES.items() if module in sys.modules}
        for component in (loaded[0] if isinstance(loaded, tuple) else loaded).values():
            if isinstance(component, list) and component[0] in installed:
                component[0] = installed[component[0]]
        return loaded


def single_file_source(module: ModuleType) -> str:
    """The source of a module and of all that it imports from its own package, as one file that needs no other.

    The text stays as it is written, comments and all; only the imports are gathered at the top. A module that imports
    nothing from its package is returned unchanged. Imports must stand before everything but the docstring.
    """
    parts = _with_own_imports(module)
    if len(parts) == 1:
        return inspect.getsource(module)
    package = _package(module.__name__)
    header = _HEADER.format(
        package=package.replace("_", "-"),
        version=sys.modules[package].__version__,
        modules=", ".join(part.__name__.rpartition(".")[2] for part in parts),
    )
    return "\n".join([header, _imports_of_others(parts), *map(_section, parts)])


def _imports_of_others(modules: list[ModuleType]) -> str:
    """One statement for each module that these import from outside of their package; those of Python itself first."""
    plain, members = set(), {}
    for module in modules:
        for node in _imports(module):
            if isinstance(node, ast.Import):
                plain.add(ast.unparse(node))
            elif _package(_absolute_name(node, module)) != _package(module.__name__):
                members.setdefault(node.module, set()).update(map(ast.unparse, node.names))
    lines = sorted(plain) + [f"from {name} import {', '.join(sorted(members[name]))}" for name in sorted(members)]
    standard = [line for line in lines if _package(line.split()[1]) in sys.stdlib_module_names]
    return "\n".join([*standard, "", *(line for line in lines if line not in standard)]) + "\n"


def _section(module: ModuleType) -> str:
    """What follows the imports of a module, under its name and docstring."""
    source = inspect.getsource(module)
    start = max((node.end_lineno for node in _imports(module)), default=ast.parse(source).body[0].end_lineno)
    title = f"{module.__name__.rpartition('.')[2]}: {inspect.getdoc(module)}"
    heading = "\n".join(f"# {line}".rstrip() for line in title.splitlines())
    return f"\n{'#' * 100}\n{heading}\n{'#' * 100}\n\n\n" + "\n".join(source.splitlines()[start:]).strip("\n") + "\n"


def _with_own_imports(module: ModuleType) -> list[ModuleType]:
    """The module, after all modules of its package that it imports, each once."""
    parts = {}
    for node in _imports(module):
        if isinstance(node, ast.ImportFrom) and _package(_absolute_name(node, module)) == _package(module.__name__):
            imported = importlib.import_module(_absolute_name(node, module))
            parts |= dict.fromkeys(_with_own_imports(imported))
    return [*parts, module]


def _imports(module: ModuleType) -> list[ast.Import | ast.ImportFrom]:
    nodes = ast.parse(inspect.getsource(module)).body
    return [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]


def _absolute_name(node: ast.ImportFrom, module: ModuleType) -> str:
    return resolve_name("." * node.level + node.module, module.__package__)


def _package(module_name: str) -> str:
    return module_name.split(".")[0]


def _file_name(library: str) -> str:
    # Where the code came with a pipeline, its module is already named after the file.
    return _FILES.get(library, library.rpartition(".")[2])


####################################################################################################
# pipeline_dia_unet: DIAUNetPipeline: images from a pixel-space diffusion UNet, unconditional or by class.
####################################################################################################


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class DIAUNetPipeline(SelfContained, DiffusionPipeline):
    r"""
    Pipeline for image generation with a [`DIAUNet2DModel`] (or any [`~diffusers.UNet2DModel`]) in pixel space.

    This model inherits from [`~diffusers.DiffusionPipeline`]; see there for loading, saving and devices. A saved one
    also holds its code, for [`~diffusers.DiffusionPipeline.from_pretrained`] with `trust_remote_code=True`.

    Parameters:
        unet ([`DIAUNet2DModel`]): Predicts noise, sample or velocity, as `scheduler.config.prediction_type` says. With
            labels and guidance, its last class embedding stands for "no class".
        scheduler ([`~diffusers.SchedulerMixin`]): Any diffusers scheduler for such a prediction.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ("latents",)

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @property
    def null_class(self) -> int | None:
        """The label that stands for "no class": the last class embedding. `None` for an unconditional UNet."""
        embeddings = self.unet.config.num_class_embeds
        return None if embeddings is None or self.unet.config.class_embed_type is not None else embeddings - 1

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 25,
        generator: torch.Generator | list[torch.Generator] | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["DIAUNetPipeline", int, Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        r"""
        The call function to the pipeline for generation.

        Args:
            batch_size (`int`, *optional*, defaults to 1): The number of images to generate.
            num_inference_steps (`int`, *optional*, defaults to 25): The number of denoising steps.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One generator for the batch, or one for each image; with the latter an image does not depend on the
                others in its batch.
            class_labels (`int`, sequence of `int` or `Tensor` of shape `(batch_size,)`, *optional*):
                The class of each image, or one for all. By default no class.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                Classifier-free guidance (arXiv 2207.12598): `none + guidance_scale * (class - none)`. 1 is no
                guidance. Needs a UNet that was trained with label dropout.
            eta (`float`, *optional*, defaults to 0.0): η of DDIM (arXiv 2010.02502); other schedulers ignore it.
            latents (`Tensor` of shape `(batch_size, channels, height, width)`, *optional*):
                Standard normal noise to start from, instead of drawing it.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `pil` (`PIL.Image`), `np` (`(B, H, W, C)` in [0, 1]), `pt` (`(B, C, H, W)` in [0, 1]) or `latent`
                (`(B, C, H, W)`, the last sample as it is, about [-1, 1]).
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an `ImagePipelineOutput`.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipeline, step_index, timestep, {"latents": ...})` after each step; what it returns
                replaces the latents. Setting `pipeline._interrupt = True` ends the sampling.
            callback_on_step_end_tensor_inputs (sequence of `str`, *optional*): Only `latents` exists.

        Returns:
            [`~diffusers.ImagePipelineOutput`], or a tuple with the images if `return_dict` is `False`.

        Raises:
            UsageError: for labels, guidance, shapes or schedulers that do not fit this pipeline.
        """
        # 0. check inputs
        self._check_inputs(output_type, callback_on_step_end_tensor_inputs, generator, batch_size)
        labels = self._prepare_labels(class_labels, batch_size)
        guide = guidance_scale != 1.0
        if guide and (class_labels is None or self.null_class is None):
            raise UsageError(f"guidance_scale {guidance_scale} needs class_labels and a class-conditional UNet.")

        # 1. timesteps and initial noise
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        latents = self._prepare_latents(latents, batch_size, generator)
        step_arguments = self._step_arguments(generator, eta)

        # 2. denoise
        self._interrupt = False
        for index, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            model_input = self.scheduler.scale_model_input(latents, timestep)
            if guide:
                # Both predictions of the guidance in one batch.
                both = torch.cat([labels, torch.full_like(labels, self.null_class)])
                with_class, without = self.unet(torch.cat([model_input] * 2), timestep, both).sample.chunk(2)
                prediction = without + guidance_scale * (with_class - without)
            else:
                prediction = self.unet(model_input, timestep, labels).sample
            latents = self.scheduler.step(prediction, timestep, latents, **step_arguments).prev_sample

            if callback_on_step_end is not None:
                returned = callback_on_step_end(self, index, timestep, {"latents": latents})
                latents = (returned or {}).get("latents", latents)
            if self._interrupt:
                break

        # 3. to images
        images = self._postprocess(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_inputs(
        self,
        output_type: str,
        tensor_inputs: Sequence[str],
        generator: torch.Generator | list[torch.Generator] | None,
        batch_size: int,
    ) -> None:
        if output_type not in OUTPUT_TYPES:
            raise UsageError(f"unknown output_type '{output_type}'. Choose one of: {', '.join(OUTPUT_TYPES)}.")
        if set(tensor_inputs) - set(self._callback_tensor_inputs):
            raise UsageError(f"callback_on_step_end can be given only 'latents', not {list(tensor_inputs)}.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise UsageError(f"{len(generator)} generators were given for a batch of {batch_size} images.")
        if not hasattr(self.scheduler.config, "prediction_type"):
            raise UsageError(
                f"{type(self.scheduler).__name__} does not fit a UNet that predicts noise, sample or velocity: it has "
                "no prediction_type. Use for example DDIMScheduler.from_config(pipe.scheduler.config)."
            )

    def _prepare_labels(self, class_labels: int | Sequence[int] | Tensor | None, batch_size: int) -> Tensor | None:
        if self.unet.class_embedding is None:
            if class_labels is not None:
                raise UsageError("class_labels were given, but this UNet is not class-conditional.")
            return None
        if self.null_class is None:
            if class_labels is None:
                raise UsageError("this UNet needs class_labels.")
            return torch.as_tensor(class_labels, device=self._execution_device)
        labels = torch.as_tensor(self.null_class if class_labels is None else class_labels)
        labels = labels.to(self._execution_device).expand(batch_size) if labels.ndim == 0 else labels.long()
        if labels.shape != (batch_size,):
            raise UsageError(f"{len(labels)} class_labels were given for a batch of {batch_size} images.")
        if labels.min() < 0 or labels.max() > self.null_class:
            raise UsageError(f"class_labels must lie between 0 and {self.null_class}, but are {labels.tolist()}.")
        return labels.to(self._execution_device)

    def _prepare_latents(
        self, latents: Tensor | None, batch_size: int, generator: torch.Generator | list[torch.Generator] | None
    ) -> Tensor:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, self.unet.config.in_channels, height, width)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
        elif latents.shape != shape:
            raise UsageError(f"latents must have the shape {shape}, but have {tuple(latents.shape)}.")
        return latents.to(device=self._execution_device, dtype=self.unet.dtype) * self.scheduler.init_noise_sigma

    def _step_arguments(self, generator: torch.Generator | list[torch.Generator] | None, eta: float) -> dict[str, Any]:
        accepted = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in (("generator", generator), ("eta", eta)) if name in accepted}

    def _postprocess(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        images = (latents / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images
