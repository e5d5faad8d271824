"""Attached attention as a model of its own: saved, loaded, and fitted to another model of the same kind."""

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..attention.forward_pass import GatedBlocks, record_maps
from ..attention.sharing import AttentionState, SharedAttention
from ..errors import UsageError, why_not_loaded
from ..options.attention import with_attention_options
from .branches import Branch, Samples
from .families import FOUND, NAMED, Backbone, ContextPlace
from .hooks import NAME


class AttachedAttention(SharedAttention, ModelMixin, ConfigMixin):
    """Shared attention for the residual branches of one kind of model, as a model of its own: it can be saved, loaded
    and pushed to the Hub without the model that it is attached to. `attach` makes it.

    Args:
        family (`str`), names, ends (lists of `str`), widths (list of `int`), levels (list of `str`):
            The model that it is made for: see `Backbone` and `Branch`.
        joins (`dict[str, str]`), channel_dim (`int` or list of `int`), context_size (`int`, *optional*):
            See `SharedAttention`.
        elements (list of `int` or `None`, *optional*): For each branch its number in the output of its module.
        context (list, *optional*): Where the context passes: module, argument and index of `ContextPlace`.
        samples (list of lists or `None`, *optional*): For each branch its `Samples`.
        attention, sharing, bridge, hidden_size, reduction, init, gate_slope: See `SharedAttention`.
    """

    config_name = "config.json"
    # The branches of the model that it is attached to.
    _blocks: GatedBlocks | None = None

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
        channel_dim: int | Sequence[int],
        context_size: int | None,
        elements: Sequence[int | None] | None = None,
        context: Sequence[Any] | None = None,
        samples: Sequence[Sequence[Any] | None] | None = None,
        **options: Any,
    ):
        if samples is not None:
            # Their gates get them with the samples first and the channels last.
            dims = itertools.repeat(channel_dim) if isinstance(channel_dim, int) else channel_dim
            channel_dim = [dim if place is None else -1 for dim, place in zip(dims, samples, strict=False)]
        place = {"context_size": context_size, "levels": levels, "joins": joins, "channel_dim": channel_dim}
        SharedAttention.__init__(self, widths, **place, **options)

    def forward(
        self, branch: Tensor, state: AttentionState | None = None, maps: dict[int, Tensor] | None = None
    ) -> tuple[Tensor, AttentionState]:
        """See `SharedAttention`."""
        if state is None:
            raise UsageError(
                f"the model calls all of its submodules, and so the attention '{NAME}' too: put it into a module of "
                "your own whose forward calls it, and attach to that."
            )
        return super().forward(branch, state, maps)

    def record(self) -> AbstractContextManager[dict[str, Tensor]]:
        """Return a context with a dictionary: after each forward pass of the model in it, the channel gates `(B, C)`
        of the branches by name, in order of execution.

        Raises:
            UsageError: if the attention is not attached to a model.
        """
        if self._blocks is None:
            raise UsageError("this attention is not attached to a model, so it has no maps: call attach first.")
        return record_maps(self._blocks)


def load_attention(source: str, given: Sequence[str]) -> AttachedAttention:
    """Load a saved attention; refuse options beside it, for it has its own."""
    if given:
        raise UsageError(f"the attention in '{source}' brings its own {', '.join(given)}: leave that out.")
    try:
        return AttachedAttention.from_pretrained(source, use_safetensors=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = why_not_loaded(source, error)
        if isinstance(error, TypeError):
            reason = "it holds another model. Give the folder that dia.save_pretrained wrote."
        raise UsageError(f"cannot load an attention from '{source}': {reason}") from error


def description_of(backbone: Backbone) -> dict[str, Any]:
    """Return the entries of a configuration that describe the model, ready for JSON."""
    columns = (list(column) for column in zip(*backbone.branches, strict=True))
    names, ends, widths, levels, dims, elements, samples = columns
    seen = backbone.family in (FOUND, NAMED)
    return {
        "family": backbone.family,
        "names": names,
        "ends": ends,
        "widths": widths,
        "levels": levels,
        "joins": backbone.joins,
        "channel_dim": dims[0] if len(set(dims)) == 1 else dims,
        "elements": elements if any(element is not None for element in elements) else None,
        "context": list(backbone.context[:3]) if seen and backbone.context is not None else None,
        "samples": [place and list(place) for place in samples] if any(samples) else None,
    }


def saved_backbone(dia: AttachedAttention) -> Backbone:
    """Return the branches that a saved attention was made for, as its configuration has them."""
    made: Any = dia.config
    count = len(made.names)
    dims = [made.channel_dim] * count if isinstance(made.channel_dim, int) else made.channel_dim
    elements = made.get("elements") or [None] * count
    samples = [place and Samples(*place) for place in made.get("samples") or [None] * count]
    columns = zip(made.names, made.ends, made.widths, made.levels, dims, elements, samples, strict=True)
    place = made.get("context")
    context = None if place is None else ContextPlace(*[*place, made.context_size])
    return Backbone(made.family, [Branch(*column) for column in columns], dict(made.joins), context)


def fit(dia: AttachedAttention, model: nn.Module, backbone: Backbone, source: str) -> Backbone:
    """Return the branches of a model with the ends of a saved attention; refuse one made for another kind of model."""
    made, here = saved_backbone(dia), backbone
    config: Any = dia.config
    context_size = config.context_size
    modules = {name for name, _ in model.named_modules()}
    pairs = list(zip(made.branches, here.branches, strict=False))
    other = next((pair for pair in pairs if pair[0].name != pair[1].name or pair[0].width != pair[1].width), None)
    absent = next((branch.end for branch in here.branches if branch.end not in modules), None)
    size = None if backbone.context is None else backbone.context.size
    if made.family != here.family:
        reason = f"it was made for {made.family}, and {type(model).__name__} is of {here.family}"
    elif len(made.branches) != len(here.branches):
        reason = f"it was made for {len(made.branches)} branches, and {type(model).__name__} has {len(here.branches)}"
    elif other is not None:
        then, now = other
        reason = f"it was made for '{then.end}' of {then.width} channels, here is '{now.end}' of {now.width}"
    elif absent is not None:
        reason = f"it was made for a branch that ends at '{absent}', and {type(model).__name__} has no such module"
    elif context_size not in (None, size):
        reason = f"it starts from a time embedding of width {context_size}, here it is {size}"
    else:
        # An earlier version may have gated another module of the same block.
        return here._replace(branches=[then if then.end in modules else now for then, now in pairs])
    raise UsageError(f"the attention in '{source}' does not fit: {reason}.")
