"""Shared attention attached to a model that has none, and taken off again."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from os import PathLike
from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..attention.forward_pass import record_maps
from ..attention.sharing import SharedAttention
from ..errors import UsageError
from ..options.attention import with_attention_options
from .families import Backbone, find_backbone, named_backbone
from .hooks import NAME, ModelHooks


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
    @with_attention_options
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
        **options: Any,
    ):
        place = {"context_size": context_size, "levels": levels, "joins": joins, "channel_dim": channel_dim}
        SharedAttention.__init__(self, widths, **place, **options)

    def record(self) -> AbstractContextManager[dict[str, Tensor]]:
        """A context that gives a dictionary, which after each forward pass of the model inside of it holds the channel
        gates `(B, C)` of the blocks by name, in order of execution."""
        return record_maps(self._hooks.blocks)


@with_attention_options
def attach(
    model: nn.Module,
    time_conditioned: bool | None = None,
    branches: Sequence[str] | None = None,
    pretrained: str | PathLike | None = None,
    **options: Any,
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
    if pretrained is not None:
        own = {} if time_conditioned is None else {"time_conditioned": time_conditioned}
        _check_alone(options | own, str(pretrained))
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
            **options,
        )
    reference = next(model.parameters())
    dia.to(reference.device).train(model.training)
    dia._hooks = ModelHooks(model, backbone, dia.config.context_size is not None, in_order=branches is not None)
    model.add_module(NAME, dia)
    return dia


def detach(model: nn.Module) -> None:
    """Takes the attention that `attach` gave to a model off again: it is the model that it was.

    Raises:
        UsageError: if none is attached.
    """
    dia = getattr(model, NAME, None)
    if not isinstance(dia, AttachedAttention):
        raise UsageError(f"{type(model).__name__} has no attention attached.")
    dia._hooks.remove(model)
    delattr(model, NAME)


def _check_free(model: nn.Module) -> None:
    """Refuses a model that has attention, itself or in a part of it."""
    if isinstance(model, nn.Sequential):
        raise UsageError(
            f"{type(model).__name__} calls all of its submodules one after the other, and would call '{NAME}' too: "
            "attach to a module that holds it."
        )
    if callable(getattr(model, "encode", None)) and callable(getattr(model, "decode", None)):
        raise UsageError(
            f"{type(model).__name__} is used by its encode and decode, which are no forward pass of the whole: attach "
            "to its encoder or its decoder."
        )
    for name, module in model.named_modules():
        if isinstance(module, AttachedAttention):
            owner = name.rpartition(".")[0]
            where = f"the part '{owner}' of {type(model).__name__}" if owner else type(model).__name__
            raise UsageError(f"{where} has attention attached already: detach it first.")
    if hasattr(model, NAME):
        raise UsageError(
            f"{type(model).__name__} has a '{NAME}' of its own: a DIAUNet2DModel gets its attention by its arguments "
            "(dia_attention), not by attach."
        )


def _check_alone(options: dict[str, Any], source: str) -> None:
    """Refuse options beside a saved attention, which has its own."""
    if options:
        raise UsageError(f"the attention in '{source}' brings its own {', '.join(options)}: leave that out.")


def _made_for(backbone: Backbone) -> dict[str, Any]:
    """What a configuration says of the model, ready for JSON."""
    names, ends, widths, levels = (list(column) for column in zip(*(branch[:4] for branch in backbone.branches), strict=True))
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
