"""Shared attention attached to a model that has none, and taken off again."""

import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.sharing import joins_somewhere
from ..errors import UsageError
from ..options.attention import with_attention_options
from .attached import AttachedAttention, description_of, fit, load_attention, saved_backbone
from .branches import Branch
from .families import FOUND, NAMED, Backbone, find_backbone, find_joins, named_backbone
from .find import FoundBranches, find_branches, find_named
from .hooks import NAME, ModelHooks, has_gates, hooks_of


@with_attention_options
def attach(
    model: nn.Module,
    time_conditioned: bool | None = None,
    branches: Sequence[str] | Sequence[Branch] | None = None,
    inputs: Mapping[str, Any] | Sequence[Any] | Tensor | None = None,
    context: str | None = None,
    pretrained: str | PathLike | None = None,
    **options: Any,
) -> AttachedAttention:
    """Gate the residual branches of a model with shared attention (arXiv 2210.16101).

    The attention becomes the model's submodule `dia`. With the default `init` the model computes what it computed
    before, to the last bit, until `dia` is trained.

    Args:
        model (`nn.Module`):
            Any model. Without further arguments its blocks must be those of a family in `families.py`: UNets,
            ControlNets and transformers of diffusers, ResNets, ViT and ConvNeXt of transformers, ResNets of
            torchvision and timm, and detectors built on them. For any other give `inputs` or `branches`.
        attention, sharing, bridge, hidden_size, reduction, init, gate_slope:
            As the `dia_*` arguments of [`DIAUNet2DModel`].
        time_conditioned (`bool`, *optional*):
            Whether the LSTM's first state is projected from the context, an embedding of the timestep; by default
            where all blocks are given one.
        branches (list of `str` or of `Branch`, *optional*):
            The result of [`find_branches`], or a part of it; or the names of the modules that put out the branches, in
            order of execution.
        inputs (`dict`, `tuple` or `Tensor`, *optional*):
            Inputs for the model's `forward`, best of two samples or more: see [`find_branches`].
        context (`str`, *optional*): The module whose output `(B, E)` is the context, with `inputs` or found branches.
        pretrained (`str` or `PathLike`, *optional*):
            A folder or Hub id in which an attention for such a model was saved, instead of the arguments above.

    Returns:
        [`AttachedAttention`]: the submodule `dia`. `dia.save_pretrained` saves it alone, `dia.record()` looks at it.

    Raises:
        UsageError: for a model without branches that can be gated, or with an attention already, for an attention of
            another kind of model, and for arguments without a meaning.
    """
    model = _uncompiled(model)
    _check_kind(model)
    _check_free(model)
    dia = None
    if pretrained is not None:
        own = {"time_conditioned": time_conditioned, "context": context}
        dia = load_attention(str(pretrained), [*options, *(name for name, value in own.items() if value is not None)])
    backbone = _choose_branches(model, branches, inputs, context, dia)
    if dia is not None:
        backbone = fit(dia, model, backbone, str(pretrained))
    else:
        dia = _make_attention(model, backbone, time_conditioned, options)
    dia.train(model.training)
    hooks = ModelHooks(model, backbone, dia.config.context_size is not None)
    dia._blocks = hooks.blocks
    model.add_module(NAME, dia.to(_home(model)))
    return dia


def detach(model: nn.Module) -> None:
    """Take the attention that `attach` gave to a model off again: it is the model that it was.

    Raises:
        UsageError: if none is attached.
    """
    model = _uncompiled(model)
    dia, hooks = getattr(model, NAME, None), hooks_of(model)
    if not isinstance(dia, AttachedAttention) or hooks is None:
        raise UsageError(f"{type(model).__name__} has no attention attached.")
    hooks.remove(model)
    delattr(model, NAME)
    dia._blocks = None


def _uncompiled(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


def _home(model: nn.Module) -> torch.device:
    """Return the device that a model computes on: offloaded weights lie elsewhere between forward passes."""
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        registry = getattr(module, "_diffusers_hook", None)
        offload = registry.get_hook("group_offloading") if registry is not None else None
        if offload is not None:
            device = offload.config.onload_device
        if device is not None:
            return torch.device(device)
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _choose_branches(
    model: nn.Module, branches: Sequence | None, inputs: Any, context: str | None, dia: AttachedAttention | None
) -> Backbone:
    """Find the branches to gate: as named, saved, of a known family, or shown by a forward pass."""
    if isinstance(branches, str):
        raise UsageError(f"branches must be a list of names, but is the text '{branches}': write [\"{branches}\"].")
    if inputs is not None and not isinstance(inputs, Mapping | Tensor | tuple | list):
        raise UsageError(f"inputs must be a dict, a tuple or a tensor, but is of {type(inputs).__name__}.")
    found = None
    args = () if isinstance(inputs, Mapping) else (inputs,) if isinstance(inputs, Tensor) else tuple(inputs or ())
    kwargs = inputs if isinstance(inputs, Mapping) else {}
    if branches is not None and not isinstance(branches, FoundBranches) and all(isinstance(b, str) for b in branches):
        backbone = named_backbone(model, branches, with_widths=inputs is None)
        if inputs is not None:
            found = find_named(model, branches, args, kwargs)
            backbone = Backbone(NAMED, found.branches, find_joins(found), found.context)
    elif branches is not None or inputs is not None:
        found = find_branches(model, *args, **kwargs) if branches is None else branches
        if len(found) == 0:
            raise UsageError(_nothing_found(model, found))
        backbone = Backbone(FOUND, list(found), find_joins(found), getattr(found, "context", None))
    elif dia is not None and dia.config.family in (FOUND, NAMED):
        backbone = saved_backbone(dia)
    else:
        backbone = find_backbone(model)
    if context is None:
        return backbone
    embeddings = getattr(found, "embeddings", {})
    if context not in embeddings:
        known = ", ".join(embeddings) or "none: give inputs, so that a forward pass shows them"
        raise UsageError(
            f"context '{context}' returns no tensor (B, E) before the first branch. Modules that do: {known}."
        )
    return backbone._replace(context=embeddings[context])


def _nothing_found(model: nn.Module, found: Sequence[Branch]) -> str:
    seen = "Its forward pass shows no sum of two tensors of one shape of which one came through more layers."
    if lines := getattr(found, "not_gated", []):
        seen = f"Residual additions that cannot be gated: {len(lines)}. The first: {lines[0]}."
    return f"no residual branches of {type(model).__name__} can be gated. {seen}"


def _make_attention(
    model: nn.Module, backbone: Backbone, time_conditioned: bool | None, options: dict[str, Any]
) -> AttachedAttention:
    """Return new attention for these branches, without a change of the random state."""
    if time_conditioned is None:
        time_conditioned = backbone.context is not None
    if time_conditioned and backbone.context is None:
        raise UsageError(
            f"{type(model).__name__} has no embedding of the timestep that all of its blocks share: leave "
            "time_conditioned out."
        )
    if options.get("bridge") == "skip" and not joins_somewhere([b.level for b in backbone.branches], backbone.joins):
        warnings.warn(
            f"bridge 'skip' joins levels on the way up with those on the way down, and {type(model).__name__} has "
            "none: it does what 'carry' does.",
            stacklevel=4,
        )
    size = backbone.context.size if time_conditioned else None
    if any(getattr(module, "is_causal", False) is True for module in model.modules()):
        warnings.warn(
            f"{type(model).__name__} is causal, and its gates are computed from the mean over all tokens: once they "
            "are trained, a token sees later ones.",
            stacklevel=3,
        )
    with torch.random.fork_rng(devices=[]), torch.device("meta" if _home(model).type == "meta" else "cpu"):
        return AttachedAttention(**description_of(backbone), context_size=size, **options)


def _check_kind(model: nn.Module) -> None:
    """Refuse non-models, and wrappers or containers that would not treat the attention as a part of the model."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"attention is attached to a torch.nn.Module, and this is of {type(model).__name__}.")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise UsageError(
            "DistributedDataParallel has listed the parameters whose gradients it averages, and the attention's would "
            "be missing: attach to the model before it is wrapped."
        )
    if isinstance(model, nn.Sequential | nn.ModuleDict | nn.ModuleList):
        raise UsageError(
            f"{type(model).__name__} is a container whose forward calls all of its submodules, and would call '{NAME}' "
            "too: attach to a module that holds it."
        )


def _check_free(model: nn.Module) -> None:
    """Refuse a model that has attention, itself or in a part of it, and one without a forward pass of the whole."""
    if callable(getattr(model, "encode", None)) and callable(getattr(model, "decode", None)):
        raise UsageError(
            f"pipelines call encode and decode of {type(model).__name__}, never its forward: attach to its encoder or "
            "its decoder."
        )
    for name, module in model.named_modules():
        if isinstance(module, AttachedAttention):
            owner = name.rpartition(".")[0]
            where = f"the part '{owner}' of {type(model).__name__}" if owner else type(model).__name__
            raise UsageError(f"{where} has attention attached already: detach it first.")
    if hasattr(model, NAME) and not isinstance(getattr(model, NAME), AttachedAttention):
        raise UsageError(
            f"{type(model).__name__} has a '{NAME}' of its own: a DIAUNet2DModel gets its attention by its arguments "
            "(dia_attention), not by attach."
        )
    if has_gates(model):
        raise UsageError(
            f"{type(model).__name__} is a part of a model that has attention, which gates its branches: detach that "
            "first, or attach to another part."
        )
