"""What training changes: the weights, their moving average and the optimizer; to and from checkpoints."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from ..errors import NotFiniteError, UsageError, first_line
from ..models.unet import DIAUNet2DModel
from ..options.optimisation import OptimisationOptions
from .checkpoint import Checkpoint


class TrainingState:
    """The model of a run and what updates it.

    Args:
        options (`OptimisationOptions`): How.
        accelerator (`Accelerator`): Places the model and the optimizer.
        unet (`DIAUNet2DModel`): The model to train.
        total_steps (`int`): Length of the learning-rate schedule.

    Attributes:
        model: The model as `accelerator` wraps it; what the loss calls.
        unet: The model itself.
    """

    def __init__(self, options: OptimisationOptions, accelerator: Accelerator, unet: DIAUNet2DModel, total_steps: int):
        self.options = options
        self.accelerator = accelerator
        self.unet = unet.to(accelerator.device)
        if options.train_only == "dia":
            if unet.dia is None:
                raise UsageError("--train_only dia leaves nothing to train with --dia_attention none.")
            unet.requires_grad_(False)
            unet.dia.requires_grad_(True)
        if options.enable_xformers_memory_efficient_attention:
            try:
                unet.enable_xformers_memory_efficient_attention()
            except (ImportError, ValueError) as error:
                raise UsageError(f"xformers cannot be used here: {first_line(error)}.") from error
        # Convolutions are faster in this format, on CPUs and on GPUs.
        unet.to(memory_format=torch.channels_last)
        if options.compile:
            unet.compile(mode=options.compile_mode)
        optimizer = torch.optim.AdamW(
            [parameter for parameter in unet.parameters() if parameter.requires_grad],
            lr=options.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            weight_decay=options.adam_weight_decay,
            eps=options.adam_epsilon,
            fused=True,
        )
        self._lr_factor = _lr_factor(options, optimizer, total_steps)
        self.model, self.optimizer = accelerator.prepare(unet, optimizer)
        self.ema = None
        if options.use_ema:
            self.ema = EMAModel(
                unet.parameters(),
                decay=options.ema_max_decay,
                use_ema_warmup=True,
                inv_gamma=options.ema_inv_gamma,
                power=options.ema_power,
                foreach=True,
            )

    def update(self, step: int) -> Tensor:
        """Applies the gradients of step number `step`, counted from 1. Returns their norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        norm = self.accelerator.clip_grad_norm_(self.unet.parameters(), self.options.max_grad_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.unet.parameters())
        return norm

    def learning_rate(self, step: int) -> float:
        """The learning rate of step number `step`, counted from 1."""
        return self.options.learning_rate * self._lr_factor(step - 1)

    @contextmanager
    def averaged(self) -> Iterator[DIAUNet2DModel]:
        """The model in evaluation mode, with the averaged weights where there are any; restored on leaving."""
        if self.ema is not None:
            self.ema.store(self.unet.parameters())
            self.ema.copy_to(self.unet.parameters())
        self.unet.eval()
        try:
            yield self.unet
        finally:
            self.unet.train()
            if self.ema is not None:
                self.ema.restore(self.unet.parameters())

    def check_finite(self, step: int) -> None:
        """Makes sure that nothing is saved, shown or measured of weights that are not finite. Waits for the device.

        Raises:
            NotFiniteError: if there are any after step number `step`.
        """
        shadows = [] if self.ema is None else self.ema.shadow_params
        tensors = [t for t in (*self.unet.state_dict().values(), *shadows) if t.is_floating_point()]
        if not torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all():
            raise NotFiniteError(step, "the weights are not finite", self.learning_rate(step))

    def to_checkpoint(self, state: dict[str, Any]) -> Checkpoint:
        """All that is needed to go on, together with a JSON-ready `state` of the loop."""
        scaler = self.accelerator.scaler
        extra = {
            "ema_steps": None if self.ema is None else self.ema.optimization_step,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        groups = {"unet": dict(self.unet.state_dict()), "optimizer": _optimizer_tensors(self.optimizer.optimizer)}
        if self.ema is not None:
            groups["ema"] = dict(self._named(self.ema.shadow_params))
        return Checkpoint(groups, state | extra)

    def restore(self, checkpoint: Checkpoint) -> None:
        """The inverse of `to_checkpoint`."""
        self.unet.load_state_dict(checkpoint.tensors["unet"])
        _restore_optimizer(self.optimizer.optimizer, checkpoint.tensors["optimizer"])
        if self.ema is not None:
            for name, shadow in self._named(self.ema.shadow_params):
                shadow.copy_(checkpoint.tensors["ema"][name])
            self.ema.optimization_step = checkpoint.state["ema_steps"]
        # A run of another precision had no scale for its loss: it is then found anew.
        if self.accelerator.scaler is not None and checkpoint.state["scaler"]:
            self.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])

    def _named(self, tensors: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        return zip((name for name, _ in self.unet.named_parameters()), tensors, strict=True)


def _lr_factor(
    options: OptimisationOptions, optimizer: torch.optim.Optimizer, total_steps: int
) -> Callable[[int], float]:
    """The learning rate at a step, as a share of its peak: a function, so that a resumed run needs no state of it."""
    try:
        schedule = get_scheduler(
            options.lr_scheduler,
            optimizer,
            num_warmup_steps=options.lr_warmup_steps,
            num_training_steps=total_steps,
        )
    except ValueError as error:
        raise UsageError(f"lr_scheduler '{options.lr_scheduler}' does not work here: {error}") from error
    return schedule.lr_lambdas[0]


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer as flat tensors, named `<parameter number>.<quantity>`."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, values in state.items() for name, value in values.items()}


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        # In the memory format of its parameter, without which the last bit of an update may differ.
        parameter = parameters[int(number)]
        same_shape = value.shape == parameter.shape
        value = torch.empty_like(parameter, dtype=value.dtype).copy_(value) if same_shape else value
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
