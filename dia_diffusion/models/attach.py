"""Shared attention attached to a model that has none, and taken off again."""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from os import PathLike
from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ..attention.checkpointing import CarryState
from ..attention.hooks import EndHook
from ..attention.run import Run, record_maps, run_under_way
from ..attention.sharing import SharedAttention
from ..errors import UsageError
from .branches import fuse_resnets, gate_branches
from .families import Backbone, find_backbone, named_backbone
from .resnet import FusedResnetBlock2D

_NAME = "dia"


class AttachedAttention(SharedAttention, ModelMixin, ConfigMixin):
    """Shared attention for the residual branches of one kind of model, as a model of its own: it can be saved, loaded
    and pushed to the Hub without the model that it is attached to. `attach` makes it.

    Args:
        family (`str`), names, ends (lists of `str`), widths (list of `int`), levels (list of `str`):
            What it is made for: see `Backbone` and `Branch`.
        joins (`dict[str, str]`), channel_dim (`int`), context_size (`int`, *optional*):
            See `SharedAttention`.
        attention, sharing, bridge, hidden_size, reduction, init, gate_slope: See `SharedAttention`.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        family: str,
        names: Sequence[str],
        ends: Sequence[str],
        widths: Sequence[int],
        levels: Sequence[str],
        joins: dict[str, str],
        channel_dim: int,
        context_size: int | None,
        attention: str = "lstm",
        sharing: str = "network",
        bridge: str = "carry",
        hidden_size: int = 64,
        reduction: int = 4,
        init: str = "identity",
        gate_slope: float = 1.0,
    ):
        SharedAttention.__init__(
            self,
            widths,
            attention=attention,
            sharing=sharing,
            bridge=bridge,
            hidden_size=hidden_size,
            reduction=reduction,
            init=init,
            gate_slope=gate_slope,
            context_size=context_size,
            levels=levels,
            joins=joins,
            channel_dim=channel_dim,
        )

    def record(self) -> AbstractContextManager[dict[str, Tensor]]:
        """A context that gives a dictionary, which after each forward pass of the model inside of it holds the channel
        gates `(B, C)` of the blocks by name, in order of execution."""
        return record_maps(self._hooks.chain)


class _ModelHooks:
    """What `attach` does to a model, and `detach` takes back."""

    def __init__(self, model: nn.Module, backbone: Backbone, with_context: bool, in_order: bool):
        fuse_resnets(model)
        place = backbone.context if with_context else None
        self.chain, self.handles = gate_branches(model, backbone.branches, place, in_order)
        self.ends = [handle for handle in self.handles if isinstance(handle, EndHook)]
        self.checkpointed = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        self.handles += [
            model.register_forward_pre_hook(self.begin),
            model.register_forward_hook(self.end, always_call=True),
        ]

    def begin(self, model: nn.Module, args: tuple) -> None:
        for end in self.ends:
            end.follow()
        for module in self.checkpointed:
            # Looked at each time, since it can be switched on later.
            if module.gradient_checkpointing and not isinstance(module._gradient_checkpointing_func, CarryState):
                module._gradient_checkpointing_func = CarryState(self.chain, module._gradient_checkpointing_func)
        Run(self.chain, getattr(model, _NAME)).__enter__()

    def end(self, model: nn.Module, args: tuple, output: Any) -> None:
        run = run_under_way(self.chain)
        if run is None:
            return
        run.__exit__()
        if run.state.position == 0 and output is not None:
            raise UsageError(
                f"none of the branches of {type(model).__name__} that have attention ran: its blocks were replaced "
                "since. Detach it and attach it anew."
            )
        left_out = self.chain.names[run.state.position :]
        if self.chain.in_order and left_out and output is not None:
            raise UsageError(f"the branch '{left_out[0]}' did not run in this forward pass: leave it out of branches.")

    def remove(self, model: nn.Module) -> None:
        for handle in self.handles:
            handle.remove()
        for module in self.checkpointed:
            if isinstance(getattr(module, "_gradient_checkpointing_func", None), CarryState):
                module._gradient_checkpointing_func = module._gradient_checkpointing_func.checkpoint
        for module in model.modules():
            if isinstance(module, FusedResnetBlock2D):
                module.__class__ = ResnetBlock2D
                module.__dict__.pop("gate", None)


def attach(
    model: nn.Module,
    attention: str = "lstm",
    sharing: str = "network",
    bridge: str = "carry",
    hidden_size: int = 64,
    reduction: int = 4,
    init: str = "identity",
    gate_slope: float = 1.0,
    time_conditioned: bool | None = None,
    branches: Sequence[str] | None = None,
    pretrained: str | PathLike | None = None,
) -> AttachedAttention:
    """Gates the residual branches of a model with shared attention (arXiv 2210.16101), which becomes its submodule
    `dia`. With the default `init` the model computes what it computed before, to the last bit, until `dia` is trained.

    Args:
        model (`nn.Module`):
            Any model whose blocks are those of a family in `families.py`: UNets, ControlNets and transformers of
            diffusers, ResNets, ViT and ConvNeXt of transformers, ResNets of torchvision and timm, and detectors built
            on them. Any other with `branches`.
        attention, sharing, bridge, hidden_size, reduction, init, gate_slope:
            As the `dia_*` arguments of [`DIAUNet2DModel`].
        time_conditioned (`bool`, *optional*):
            Whether the LSTM's first state is projected from the embedding of the timestep; by default where the model
            has one for all of its blocks.
        branches (`Sequence[str]`, *optional*):
            Names of the submodules whose outputs are the residual branches, in order of execution, for a model of no
            known family.
        pretrained (`str` or `PathLike`, *optional*):
            A folder or Hub id in which an attention for such a model was saved, instead of the arguments above.

    Returns:
        [`AttachedAttention`]: the submodule `dia`. `dia.save_pretrained` saves it alone, `dia.record()` looks at it.

    Raises:
        UsageError: for a model of no known family or that has an attention already, for an attention of another kind
            of model, and for arguments without a meaning.
    """
    _check_free(model)
    arguments = {
        "attention": attention,
        "sharing": sharing,
        "bridge": bridge,
        "hidden_size": hidden_size,
        "reduction": reduction,
        "init": init,
        "gate_slope": gate_slope,
    }
    if pretrained is not None:
        _check_alone(arguments | {"time_conditioned": time_conditioned}, str(pretrained))
    backbone = find_backbone(model) if branches is None else named_backbone(model, branches)
    if time_conditioned is None:
        time_conditioned = backbone.context is not None
    if time_conditioned and backbone.context is None:
        raise UsageError(
            f"{type(model).__name__} has no embedding of the timestep that all of its blocks share: leave "
            "time_conditioned out."
        )
    if pretrained is not None:
        dia = AttachedAttention.from_pretrained(pretrained)
        _check_fit(dia, model, backbone, str(pretrained))
    else:
        dia = AttachedAttention(
            **_made_for(backbone),
            context_size=backbone.context.size if time_conditioned else None,
            **arguments,
        )
    reference = next(model.parameters())
    dia.to(reference.device).train(model.training)
    dia._hooks = _ModelHooks(model, backbone, dia.config.context_size is not None, in_order=branches is not None)
    model.add_module(_NAME, dia)
    return dia


def detach(model: nn.Module) -> None:
    """Takes the attention that `attach` gave to a model off again: it is the model that it was.

    Raises:
        UsageError: if none is attached.
    """
    dia = getattr(model, _NAME, None)
    if not isinstance(dia, AttachedAttention):
        raise UsageError(f"{type(model).__name__} has no attention attached.")
    dia._hooks.remove(model)
    delattr(model, _NAME)


def _check_free(model: nn.Module) -> None:
    """Refuses a model that has attention, itself or in a part of it."""
    if isinstance(model, nn.Sequential):
        raise UsageError(
            f"{type(model).__name__} calls all of its submodules one after the other, and would call '{_NAME}' too: "
            "attach to a module that holds it."
        )
    for name, module in model.named_modules():
        if isinstance(module, AttachedAttention):
            owner = name.rpartition(".")[0]
            where = f"the part '{owner}' of {type(model).__name__}" if owner else type(model).__name__
            raise UsageError(f"{where} has attention attached already: detach it first.")
    if hasattr(model, _NAME):
        raise UsageError(
            f"{type(model).__name__} has a '{_NAME}' of its own: a DIAUNet2DModel gets its attention by its arguments "
            "(dia_attention), not by attach."
        )


def _check_alone(arguments: dict[str, Any], source: str) -> None:
    """Refuses arguments that a saved attention answers itself."""
    known = inspect.signature(attach).parameters
    given = [name for name, value in arguments.items() if value != known[name].default]
    if given:
        raise UsageError(f"the attention in '{source}' brings its own {', '.join(given)}: leave that out.")


def _made_for(backbone: Backbone) -> dict[str, Any]:
    """What a configuration says of the model, ready for JSON."""
    names, ends, widths, levels = (list(column) for column in zip(*backbone.branches, strict=True))
    return {
        "family": backbone.family,
        "names": names,
        "ends": ends,
        "widths": widths,
        "levels": levels,
        "joins": backbone.joins,
        "channel_dim": backbone.channel_dim,
    }


def _check_fit(dia: AttachedAttention, model: nn.Module, backbone: Backbone, source: str) -> None:
    """Refuses an attention that was made for another kind of model."""
    made, here = dia.config, _made_for(backbone)
    if made.family != here["family"]:
        reason = f"it was made for {made.family}, and {type(model).__name__} is of {here['family']}"
    elif len(made.ends) != len(here["ends"]):
        reason = f"it was made for {len(made.ends)} branches, and {type(model).__name__} has {len(here['ends'])}"
    else:
        pairs = zip(made.ends, made.widths, here["ends"], here["widths"], strict=True)
        other = next((pair for pair in pairs if pair[:2] != pair[2:]), None)
        size = None if backbone.context is None else backbone.context.size
        if other is not None:
            reason = f"it was made for '{other[0]}' of {other[1]} channels, here is '{other[2]}' of {other[3]}"
        elif made.context_size not in (None, size):
            reason = f"it starts from a time embedding of width {made.context_size}, here it is {size}"
        else:
            return
    raise UsageError(f"the attention in '{source}' does not fit: {reason}.")
