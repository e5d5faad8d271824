"""The weights of a run, their moving average and the optimizer: their update, and their way to and from checkpoints."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from ..errors import NotFiniteError, UsageError, first_line
from ..models.memory_format import lay_out
from ..models.unet import DIAUNet2DModel
from ..options.objective import OptimisationOptions
from ..options.training import TrainingConfig
from .checkpoint import Checkpoint

# The compiler behind --compile, as `torch.compile` names it. Tests without a C++ compiler set another.
BACKEND = "inductor"


class MovingAverage:
    """An exponential moving average of weights, with the warm-up of its decay.

    The numbers are those of diffusers' `EMAModel`, to the last bit. A step is two operations on all weights at once.

    Args:
        parameters (sequence of `nn.Parameter`): The weights.
        options (`OptimisationOptions`): Its `ema_inv_gamma`, `ema_power` and `ema_max_decay` count.

    Attributes:
        shadows (list of `Tensor`): The averages, in the order of the weights.
        steps (`int`): Steps so far.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], options: OptimisationOptions):
        self.options = options
        self.steps = 0
        self._parameters = [parameter.detach() for parameter in parameters]
        self.shadows = [parameter.clone() for parameter in self._parameters]

    @property
    def decay(self) -> float:
        """The decay of the last step: `1 - (1 + step / inv_gamma) ** -power`, at most `max_decay`; 0 in the first."""
        step, options = self.steps - 1, self.options
        if step <= 0:
            return 0.0
        return max(min(1 - (1 + step / options.ema_inv_gamma) ** -options.ema_power, options.ema_max_decay), 0.0)

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights."""
        self.steps += 1
        difference = torch._foreach_sub(self.shadows, self._parameters)
        torch._foreach_sub_(self.shadows, difference, alpha=1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages in the place of the weights, until the context ends."""
        kept = [parameter.clone() for parameter in self._parameters]
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, self.shadows)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, kept)


class TrainingState:
    """The model of a run, its optimizer and its moving average.

    Args:
        options (`OptimisationOptions`): How the model is trained.
        accelerator (`Accelerator`): Places the model and the optimizer.
        unet (`DIAUNet2DModel`): The model to train.
        total_steps (`int`): Length of the learning-rate schedule.

    Attributes:
        model: The model as `accelerator` wraps it, for the loss.
        unet: The model itself.
        ema (`MovingAverage`, *optional*): The averaged weights.
        compiled (`bool`): Whether a compiler is at work in `model`.
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
        lay_out(unet)
        self.compiled = options.compile or accelerator.state.dynamo_plugin.backend is not DynamoBackend.NO
        if options.compile:
            unet.compile(backend=BACKEND, mode=options.compile_mode, dynamic=False)
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
        # Listed once: to find them takes a walk through all modules.
        self._parameters = list(unet.parameters())
        self.ema = MovingAverage(self._parameters, options) if options.use_ema else None

    def update(self, step: int) -> Tensor:
        """Apply the gradients of a step, counted from 1. Return their norm before clipping, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        norm = self.accelerator.clip_grad_norm_(self._parameters, self.options.max_grad_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update()
        return norm

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1."""
        return self.options.learning_rate * self._lr_factor(step - 1)

    @contextmanager
    def averaged(self) -> Iterator[DIAUNet2DModel]:
        """Give the model in evaluation mode with the averaged weights, if there are any, and restore it on leaving.

        It runs without the compiler: each batch size and mode of evaluation would be compiled once more.
        """
        eager = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
        self.unet.eval()
        try:
            with eager, nullcontext() if self.ema is None else self.ema.applied():
                yield self.unet
        finally:
            self.unet.train()

    @contextmanager
    def compiling(self, first: bool) -> Iterator[None]:
        """Say around the first step that the model is compiled there, and how long it took."""
        if not (first and self.compiled):
            yield
            return
        self.accelerator.print("Compiling the model in the first step; this may take minutes.")
        start = time.monotonic()
        yield
        self.accelerator.print(f"Compiled: the first step took {time.monotonic() - start:.0f} seconds.")

    def check_finite(self, step: int) -> None:
        """Check that all weights are finite, before they are saved, sampled from or measured. Waits for the device.

        Raises:
            NotFiniteError: if any is not, after step number `step`.
        """
        shadows = [] if self.ema is None else self.ema.shadows
        tensors = [t for t in (*self.unet.state_dict().values(), *shadows) if t.is_floating_point()]
        if not torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all():
            raise NotFiniteError(step, "the weights are not finite", self.learning_rate(step))

    def to_checkpoint(self, state: dict[str, Any]) -> Checkpoint:
        """Return everything that is needed to resume, together with a JSON-ready `state` of the loop."""
        scaler = self.accelerator.scaler
        extra = {
            "ema_steps": None if self.ema is None else self.ema.steps,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        groups = {"unet": dict(self.unet.state_dict()), "optimizer": _optimizer_tensors(self.optimizer.optimizer)}
        if self.ema is not None:
            groups["ema"] = dict(self._named(self.ema.shadows))
        return Checkpoint(groups, state | extra)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load what `to_checkpoint` returned."""
        self.unet.load_state_dict(checkpoint.tensors["unet"])
        _restore_optimizer(self.optimizer.optimizer, checkpoint.tensors["optimizer"])
        if self.ema is not None:
            for name, shadow in self._named(self.ema.shadows):
                shadow.copy_(checkpoint.tensors["ema"][name])
            self.ema.steps = checkpoint.state["ema_steps"]
        # A run of another precision had no scale for its loss: it is then found anew.
        if self.accelerator.scaler is not None and checkpoint.state["scaler"]:
            self.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])

    def _named(self, tensors: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        return zip((name for name, _ in self.unet.named_parameters()), tensors, strict=True)


def _lr_factor(
    options: OptimisationOptions, optimizer: torch.optim.Optimizer, total_steps: int
) -> Callable[[int], float]:
    """Return the learning rate as a share of its peak, as a function of the step: a resumed run needs no state of it.

    Steps are counted from 0 here, as diffusers counts them.
    """
    try:
        schedule = get_scheduler(
            options.lr_scheduler,
            optimizer,
            num_warmup_steps=options.lr_warmup_steps,
            num_training_steps=total_steps,
            num_cycles=options.lr_num_cycles,
            power=options.lr_power,
        )
    except ValueError as error:
        raise UsageError(f"lr_scheduler '{options.lr_scheduler}' does not work here: {error}") from error
    return schedule.lr_lambdas[0]


def remarks_on_schedule(config: TrainingConfig, total_steps: int) -> list[str]:
    """Return warnings about learning-rate options that do not do what their names promise."""
    options, remarks = config.optimisation, []
    if options.lr_scheduler != "constant" and options.lr_warmup_steps >= total_steps:
        remarks.append(
            f"The run ends before the learning rate is warmed up: lr_warmup_steps {options.lr_warmup_steps}, but only "
            f"{total_steps} steps."
        )
    if options.lr_scheduler == "cosine_with_restarts" and options.lr_num_cycles == 1:
        remarks.append("cosine_with_restarts restarts only with --lr_num_cycles 2 or more: this is plain cosine.")
    if options.lr_scheduler == "polynomial" and options.lr_power == 1:
        remarks.append("polynomial with --lr_power 1 is linear.")
    return remarks


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of an optimizer as flat tensors, named `<parameter number>.<quantity>`."""
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
