"""DIAUNetPipeline: images from a diffusion UNet, of pixels or of latents, unconditional or by class."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
    UNet2DModel,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..errors import NotFiniteImagesError, UsageError
from ..latents.scaling import unscale_latents
from .inputs import check_finite, check_generator, check_whole, make_labels, returned_latents
from .noise import NoiseKind, find_misfit, noise_kind
from .self_contained import SelfContained
from .timesteps import set_timesteps

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class DIAUNetPipeline(SelfContained, DiffusionPipeline):
    r"""
    Pipeline for image generation with a [`DIAUNet2DModel`] (or any [`~diffusers.UNet2DModel`]), in pixel space or in
    the latent space of a VAE.

    This model inherits from [`~diffusers.DiffusionPipeline`]; see there for loading, saving and devices. A saved one
    also holds its code, for [`~diffusers.DiffusionPipeline.from_pretrained`] with `trust_remote_code=True`.

    Parameters:
        unet ([`DIAUNet2DModel`]): Predicts noise, sample or velocity, as `scheduler.config.prediction_type` says, EDM's
            preconditioned image, or the velocity of a flow. With labels and guidance, its last class embedding stands
            for "no class".
        scheduler ([`~diffusers.SchedulerMixin`]): Any diffusers scheduler for such a prediction. It says which of these
            the UNet is: another kind of scheduler is refused later.
        id2label (`dict[int, str]` or list of `str`, *optional*): The names of the classes, as in `DiTPipeline`.
        vae ([`~diffusers.AutoencoderKL`] or [`~diffusers.AutoencoderTiny`], *optional*):
            Decodes what the UNet makes, where that is latents. `vae.enable_slicing()` and `vae.enable_tiling()` bound
            the memory that it takes.
        guide ([`~diffusers.UNet2DModel`], *optional*):
            A worse model of the same images (smaller, or trained for a shorter time), of the same kind of noise and
            prediction: `guidance_scale` then is that of autoguidance, which needs no classes.
    """

    model_cpu_offload_seq = "unet->guide->vae"
    _optional_components = ["vae", "guide"]  # noqa: RUF012
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        id2label: dict | Sequence[str] | None = None,
        vae: AutoencoderKL | AutoencoderTiny | None = None,
        guide: UNet2DModel | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae, guide=guide)
        self._guidance_scale, self._num_timesteps, self._interrupt = 1.0, 0, False
        self._trained_on = None if scheduler is None or find_misfit(scheduler) else noise_kind(scheduler.config)
        if id2label is not None:
            # JSON, in which it is saved, has no numbers for keys.
            id2label = id2label if isinstance(id2label, dict) else dict(enumerate(id2label))
            self.register_to_config(id2label={int(number): name for number, name in id2label.items()})

    @property
    def class_names(self) -> list[str] | None:
        """Return the names of the classes, in the order of their numbers, or `None` where they are not known."""
        names = self.config.get("id2label")
        return None if names is None else [names[number] for number in sorted(names)]

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "DIAUNetPipeline":
        """Make a pipeline from the parts of another, a UNet with DIA too, which diffusers leaves out by itself."""
        unets = {name: getattr(pipeline, name, None) for name in ("unet", "guide")}
        unets = {name: unet for name, unet in unets.items() if isinstance(unet, UNet2DModel)}
        return super().from_pipe(pipeline, **unets | kwargs)

    @property
    def null_class(self) -> int | None:
        """Return the label that stands for no class, the last class embedding, or `None` for an unconditional UNet."""
        embeddings = self.unet.config.num_class_embeds
        return None if embeddings is None or self.unet.config.class_embed_type is not None else embeddings - 1

    @property
    def guidance_scale(self) -> float:
        """Return the strength of guidance of the call under way; a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Return whether the next step compares with the prediction without a class."""
        return self._guidance_scale != 1.0 and self.guide is None and self.unet.class_embedding is not None

    @property
    def num_timesteps(self) -> int:
        """Return how many evaluations of the scheduler the call takes: twice the steps with Heun's method."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Return whether the call ends after this step; a callback sets `_interrupt`."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 25,
        generator: torch.Generator | list[torch.Generator] | None = None,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["DIAUNetPipeline", int, Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generate images.

        Args:
            batch_size (`int`, *optional*, defaults to 1): The number of images to generate.
            num_inference_steps (`int`, *optional*, defaults to 25): The number of denoising steps.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One generator for the batch, or one for each image; with the latter an image does not depend on the
                others in its batch.
            class_labels (`int`, `str`, sequence of them or `Tensor` of shape `(batch_size,)`, *optional*):
                The class of each image, or one for all, by number or by name. By default no class.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                How far a prediction goes on beyond that of something worse, `worse + guidance_scale * (unet - worse)`.
                1 is no guidance. Worse is the `guide`, told the same classes, where there is one (autoguidance, Karras
                et al. 2024, arXiv 2406.02507), and else the UNet without a class (classifier-free guidance, Ho and
                Salimans 2022, arXiv 2207.12598), which needs a UNet that was trained with label dropout.
            eta (`float`, *optional*, defaults to 0.0): η of DDIM (arXiv 2010.02502); other schedulers ignore it.
            latents (`Tensor` of shape `(batch_size, channels, height, width)`, *optional*):
                Standard normal noise to start from, instead of drawing it.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `pil` (`PIL.Image`), `np` (`(B, H, W, C)` in [0, 1]), `pt` (`(B, C, H, W)` in [0, 1]) or `latent`
                (`(B, C, H, W)`, the last sample as it is, about [-1, 1] in pixel space, and not decoded). Tensors have
                the UNet's type; between the steps samples are float32 at least.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an `ImagePipelineOutput`.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipeline, step_index, timestep, {"latents": ...})` after each step; what it returns
                replaces the latents. Setting `pipeline._interrupt = True` ends the sampling, and
                `pipeline._guidance_scale` changes the guidance of the steps that follow.
            callback_on_step_end_tensor_inputs (sequence of `str`, *optional*): Only `latents` exists.

        Returns:
            [`~diffusers.ImagePipelineOutput`], or a tuple with the images if `return_dict` is `False`.

        Raises:
            UsageError: for labels, guidance, shapes, steps or schedulers that do not fit this pipeline, and for images
                that are not finite, unless they are asked for as they are (`latent`).
        """
        # 0. check inputs
        check_whole("batch_size", batch_size)
        check_whole("num_inference_steps", num_inference_steps)
        check_finite("eta", eta)
        check_generator(generator, batch_size)
        self._check_inputs(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._check_scheduler()
        if self.vae is not None:
            self._check_latents()
        labels = self._prepare_labels(class_labels, batch_size)
        self._check_guidance(guidance_scale, class_labels)

        # 1. timesteps and initial noise
        height, width = self.sample_size
        shape = (self.unet.config.in_channels, height, width)
        learned_variance = self.unet.config.get("out_channels") == 2 * shape[0]
        set_timesteps(self.scheduler, num_inference_steps, shape, self._execution_device, learned_variance)
        latents = self._prepare_latents(latents, (batch_size, *shape), generator)
        step_arguments = self._step_arguments(generator, eta)

        # 2. denoise
        self._interrupt, self._guidance_scale = False, guidance_scale
        self._num_timesteps = len(self.scheduler.timesteps)
        # Check before the scheduler clips: clipped values always look finite.
        finite = torch.ones((), dtype=torch.bool, device=self._execution_device)
        for index, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            # A flow does not scale.
            scale = getattr(self.scheduler, "scale_model_input", None)
            model_input = latents if scale is None else scale(latents, timestep)
            prediction = self._predict(model_input.to(self.unet.dtype), timestep, labels).to(latents.dtype)
            finite &= prediction.isfinite().all()
            latents = self.scheduler.step(prediction, timestep, latents, **step_arguments).prev_sample

            if callback_on_step_end is not None:
                returned = callback_on_step_end(self, index, timestep, {"latents": latents})
                latents = returned_latents(returned, latents)
            if self._interrupt:
                break

        # 3. to images
        if output_type != "latent" and not (finite & latents.isfinite().all()):
            raise NotFiniteImagesError(self.name_or_path or type(self.unet).__name__)
        images = self._postprocess(latents if output_type == "latent" else self.decode(latents), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(self, model_input: Tensor, timestep: Tensor, labels: Tensor | None) -> Tensor:
        if self._guidance_scale == 1.0 or (self.guide is None and labels is None):
            return self.unet(model_input, timestep, labels).sample
        if self.guide is not None:
            prediction = self.unet(model_input, timestep, labels).sample
            worse = self.guide(model_input, timestep, labels).sample
        else:
            # Both predictions in one batch.
            both = torch.cat([labels, torch.full_like(labels, self.null_class)])
            prediction, worse = self.unet(torch.cat([model_input] * 2), timestep, both).sample.chunk(2)
        return worse + self._guidance_scale * (prediction - worse)

    def _check_inputs(self, output_type: str, callback: object, tensor_inputs: Sequence[str]) -> None:
        for name, kind in (("unet", ModelMixin), ("scheduler", SchedulerMixin)):
            part = getattr(getattr(self, name), "_orig_mod", getattr(self, name))
            if not isinstance(part, kind) or "cross_attention_dim" in part.config:
                words = f"this pipeline needs a {UNet2DModel.__name__ if name == 'unet' else 'scheduler'} as its {name}"
                raise UsageError(f"{words}, but has {getattr(part, '__name__', type(part).__name__)}: set pipe.{name}.")
        if callback is not None and not callable(callback):
            raise UsageError(f"callback_on_step_end must be a function, but is {callback!r}.")
        if output_type not in OUTPUT_TYPES:
            raise UsageError(f"unknown output_type '{output_type}'. Choose one of: {', '.join(OUTPUT_TYPES)}.")
        if output_type == "pil" and self.image_channels not in (1, 3, None):
            raise UsageError(
                f"images of {self.image_channels} channels are no pictures: pictures have 1 or 3. Take output_type "
                "'np' or 'pt'."
            )
        tensor_inputs = getattr(callback, "tensor_inputs", tensor_inputs) or ()
        tensor_inputs = [tensor_inputs] if isinstance(tensor_inputs, str) else tensor_inputs
        if set(tensor_inputs) - set(self._callback_tensor_inputs):
            raise UsageError(f"callback_on_step_end can be given only 'latents', not {list(tensor_inputs)}.")

    def _check_guidance(self, guidance_scale: float, class_labels: Any) -> None:
        check_finite("guidance_scale", guidance_scale)
        if guidance_scale == 1.0:
            return
        if self.guide is None and (class_labels is None or self.null_class is None):
            raise UsageError(
                f"guidance_scale {guidance_scale} needs class_labels and a class-conditional UNet, or a guide."
            )
        for name in ("in_channels", "out_channels", "num_class_embeds") if self.guide is not None else ():
            own, of_guide = self.unet.config.get(name), self.guide.config.get(name)
            if own != of_guide:
                raise UsageError(f"the guide has {name} {of_guide}, and the UNet {own}: it does not fit.")

    def _check_scheduler(self) -> None:
        """Refuse schedulers that cannot denoise with the predictions of such a UNet, even if they would run."""
        reason, trained = find_misfit(self.scheduler, self._trained_on), self._trained_on or NoiseKind.BETAS
        if reason is not None:
            raise UsageError(
                f"{type(self.scheduler).__name__} does not fit {trained.words}: {reason}. Use for example "
                f"{trained.value}.from_config(pipe.scheduler.config)."
            )

    def _check_latents(self) -> None:
        """Refuse a VAE of other latents, and schedulers that keep samples within the range of pixels."""
        channels, decoded = self.unet.config.out_channels, self.vae.config.latent_channels
        if channels != decoded:
            raise UsageError(f"the UNet makes {channels} channels, and the VAE decodes {decoded}: they do not fit.")
        own = inspect.signature(type(self.scheduler).__init__).parameters
        for name in ("clip_sample", "thresholding"):
            if name in own and self.scheduler.config.get(name):
                kind = type(self.scheduler).__name__
                raise UsageError(
                    f"{kind} keeps samples within the range of pixels ({name}), which latents leave. Use for example "
                    f"{kind}.from_config(pipe.scheduler.config, {name}=False)."
                )

    def _prepare_labels(self, class_labels: Any, batch_size: int) -> Tensor | None:
        if self.unet.class_embedding is None:
            if class_labels is not None:
                raise UsageError("class_labels were given, but this UNet is not class-conditional.")
            return None
        if self.null_class is None:
            if class_labels is None:
                raise UsageError("this UNet needs class_labels.")
            return torch.as_tensor(class_labels, device=self._execution_device)
        labels = self.null_class if class_labels is None else class_labels
        return make_labels(labels, batch_size, self.null_class, self.class_names).to(self._execution_device)

    @property
    def image_channels(self) -> int | None:
        """Return the number of channels of the images: the VAE's, or the UNet's."""
        return self.unet.config.in_channels if self.vae is None else self.vae.config.get("out_channels")

    @property
    def sample_size(self) -> tuple[int, int]:
        """Return height and width of the UNet's input."""
        size = self.unet.config.sample_size
        if size is None:
            raise UsageError("the UNet's configuration has no sample_size, the height and width of its images: set it.")
        return (size, size) if isinstance(size, int) else tuple(size)

    def _prepare_latents(
        self,
        latents: Tensor | None,
        shape: tuple[int, int, int, int],
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Tensor:
        # Samplers add small differences to large samples: in half precision they would be lost, or not be finite.
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=dtype)
        elif not isinstance(latents, Tensor):
            raise UsageError(f"latents must be a tensor, but are of {type(latents).__name__}: use torch.from_numpy.")
        elif latents.shape != shape:
            raise UsageError(f"latents must have the shape {shape}, but have {tuple(latents.shape)}.")
        elif not latents.isfinite().all():
            raise UsageError("latents hold values that are not finite numbers: give standard normal noise.")
        # A flow begins with the noise as it is.
        return latents.to(self._execution_device, dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _step_arguments(self, generator: torch.Generator | list[torch.Generator] | None, eta: float) -> dict[str, Any]:
        accepted = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in (("generator", generator), ("eta", eta)) if name in accepted}

    def decode(self, latents: Tensor) -> Tensor:
        """Return images in about [-1, 1] `(B, C, H, W)` from what a step gives, as a callback has it."""
        if self.vae is None:
            return latents
        dtype, latents = self.vae.dtype, unscale_latents(latents, self.vae.config)
        # Some VAEs overflow in float16, and say so.
        upcast = dtype == torch.float16 and self.vae.config.get("force_upcast", False)
        if upcast:
            self.vae.to(torch.float32)
        images = self.vae.decode(latents.to(self.vae.dtype)).sample
        if upcast:
            self.vae.to(dtype)
        if not images.isfinite().all():
            raise NotFiniteImagesError(self.name_or_path or type(self.vae).__name__)
        return images

    def _postprocess(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents.to(self.unet.dtype)
        images = (latents / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images.to(self.unet.dtype)
        images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images
