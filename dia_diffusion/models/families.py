"""Backbones whose residual branches are known: adding one adds a line to `FAMILIES`.

A family is known by the classes of its blocks, so that every model built of these blocks belongs to it: the bare model,
the one with a head for classification, and the detector that has it as its backbone.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from ..errors import UsageError
from .branches import Branch


class ContextPlace(NamedTuple):
    """The place where the context of a forward pass is seen.

    Attributes:
        module (`str`): Name of a submodule.
        argument (`str`, *optional*): Name of that of its arguments which is the context; `None` for its output.
        element (`int`, *optional*): Number of the argument, or of the element of the output; `None` for all of it.
        size (`int`): Width of the context.
    """

    module: str
    argument: str | None
    element: int | None
    size: int

    def describe(self) -> str:
        """Return words for messages."""
        part = "the output" if self.argument is None else f"the argument '{self.argument}'"
        return f"{part} of '{self.module}'"


class Family(NamedTuple):
    """Blocks of one kind.

    Attributes:
        name (`str`): What it is called in messages and configurations.
        blocks (`dict[str, tuple[str, ...]]`):
            For each class of blocks the submodules whose outputs are residual branches, in order of execution.
            Alternatives, of different versions of a library, are divided by `|`.
        channel_dim (`int`): The dimension of the branches that holds the channels.
    """

    name: str
    blocks: Mapping[str, tuple[str, ...]]
    channel_dim: int


FAMILIES = (
    # UNet2DModel, UNet2DConditionModel, UNet3DConditionModel, ControlNetModel
    Family("diffusers UNet", {"ResnetBlock2D": ("conv2",), "ResnetBlockCondNorm2D": ("conv2",)}, 1),
    # DiTTransformer2DModel, PixArtTransformer2DModel
    Family("diffusers transformer", {"BasicTransformerBlock": ("attn1.to_out.0", "ff.net.2")}, -1),
    # Also as the backbones of DETR and RT-DETR
    Family(
        "transformers ResNet",
        {
            f"{prefix}{kind}": (f"layer.{last}.normalization",)
            for prefix in ("ResNet", "RTDetrResNet")
            for kind, last in (("BasicLayer", 1), ("BottleNeckLayer", 2))
        },
        1,
    ),
    Family("ViT", {"ViTLayer": ("attention.o_proj|attention.output.dense", "mlp.fc2|output.dense")}, -1),
    Family("ConvNeXt", {"ConvNextLayer": ("pwconv2",)}, -1),
    Family("torchvision or timm ResNet", {"BasicBlock": ("se|bn2",), "Bottleneck": ("se|bn3",)}, 1),
)
# Families of branches that no table knows: from a forward pass, and from a list of names.
FOUND, NAMED = "found branches", "named branches"
_LEVEL = re.compile(r"^(.*\.)?(down_blocks\.\d+|mid_block|up_blocks\.\d+|stages\.\d+|layer\d)(?=\.)")
_PATHS = ("down_blocks", "mid_block", "up_blocks")


class Backbone(NamedTuple):
    """The branches of a model that attention can gate, and where its context passes.

    Attributes:
        family (`str`): Name of its family.
        branches (list of `Branch`): In order of execution.
        joins (`dict[str, str]`): For a level on the way up, the one on the way down.
        context (`ContextPlace`, *optional*): Where the embedding of the timestep passes, if there is one for all.
    """

    family: str
    branches: list[Branch]
    joins: dict[str, str]
    context: ContextPlace | None


def find_backbone(model: nn.Module) -> Backbone:
    """Return the branches of a model of a known family.

    Raises:
        UsageError: if it is of none.
    """
    if hasattr(model, "temporal_transformer_blocks"):
        raise UsageError(
            f"{type(model).__name__} cannot be gated: a gate belongs to one sample, and its batch dimension holds "
            "frames in some blocks and positions in others."
        )
    for family in FAMILIES:
        branches = [branch for name, module in model.named_modules() for branch in _of_block(family, name, module)]
        if branches:
            # A UNet lists its middle last.
            branches.sort(key=lambda branch: next((i for i, path in enumerate(_PATHS) if path in branch.level), 0))
            return Backbone(family.name, branches, find_joins(branches), _find_context(model))
    known = ", ".join(family.name for family in FAMILIES)
    raise UsageError(
        f"{type(model).__name__} is not of a family whose residual branches are known by name ({known}). Give its "
        'inputs, so that one forward pass shows the branches: attach(model, inputs={"x": ...}). Or name the '
        'modules that put them out: branches=["layer1.0.bn2", ...].'
    )


def named_backbone(model: nn.Module, ends: Sequence[str], with_widths: bool = True) -> Backbone:
    """Return the branches of a model from the names of their ends; levels are by width.

    Args:
        model (`nn.Module`), ends (`Sequence[str]`): The model, and the modules that put out its branches.
        with_widths (`bool`, *optional*): Whether the modules must tell their numbers of channels.

    Raises:
        UsageError: if one is not there or is named twice, or has no known number of channels.
    """
    modules, branches = dict(model.named_modules()), []
    for end in ends:
        if end not in modules:
            raise UsageError(f"{type(model).__name__} has no module '{end}' (branches).")
        width, channel_dim = _output_of(end, modules[end]) if with_widths else (0, 1)
        branches.append(Branch(end, end, width, str(width), channel_dim))
    if len(set(ends)) < len(branches) or not branches:
        raise UsageError(f"branches must name each end of a residual branch once, but are {list(ends)}.")
    return Backbone(NAMED, branches, {}, None)


def _of_block(family: Family, name: str, module: nn.Module) -> list[Branch]:
    """Return the branches of a module, if it is a block of the family."""
    ends = next((family.blocks[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in family.blocks), ())
    inside, level = dict(module.named_modules()), _LEVEL.match(f"{name}.")
    branches = []
    for alternatives in ends:
        there = [end for end in alternatives.split("|") if end in inside]
        if not there:
            # Another library's block of the same name.
            return []
        # A module of attention behind the norm does not tell the width, and the norm does.
        width, _ = _output_of(f"{name}.{there[-1]}", inside[there[-1]])
        label = name if len(ends) == 1 else f"{name}.{there[0].split('.')[0]}"
        end = f"{name}.{there[0]}"
        branches.append(Branch(label, end, width, level.group() if level else "", family.channel_dim))
    return branches


def _output_of(name: str, module: Any) -> tuple[int, int]:
    """Return the number of channels in the output of a module, and the dimension that holds them."""
    for attribute, channel_dim in (("out_channels", 1), ("num_features", 1), ("num_channels", 1), ("out_features", -1)):
        if isinstance(getattr(module, attribute, None), int):
            return getattr(module, attribute), channel_dim
    if getattr(module, "normalized_shape", None):
        return module.normalized_shape[-1], -1
    if getattr(module, "running_mean", None) is not None:
        # A frozen batch normalisation, as detectors put it in their backbones.
        return len(module.running_mean), 1
    raise UsageError(
        f"'{name}' ({type(module).__name__}) does not say how many channels its output has: name a convolution, a "
        "linear layer or a normalisation, or give inputs, so that one forward pass shows it."
    )


def find_joins(branches: Sequence[Branch]) -> dict[str, str]:
    """Pair each level of the up path with the level at the same depth of the down path."""
    levels = list(dict.fromkeys(branch.level for branch in branches))
    down = [level for level in levels if "down_blocks" in level]
    up = [level for level in levels if "up_blocks" in level]
    return dict(zip(up, reversed(down), strict=False))


def _find_context(model: Any) -> ContextPlace | None:
    if hasattr(model, "down_blocks") and hasattr(model, "time_embedding"):
        # Class and added embeddings are in it, too: added, or joined to it (class_embeddings_concat).
        parts = 2 if getattr(model.config, "class_embeddings_concat", False) else 1
        return ContextPlace("down_blocks.0", "temb", 1, parts * model.time_embedding.linear_2.out_features)
    if hasattr(model, "adaln_single"):
        return ContextPlace("adaln_single", None, 1, model.adaln_single.linear.in_features)
    return None


def with_levels(model: nn.Module, found: Sequence[tuple[Branch, str, int]]) -> list[Branch]:
    """Give branches their levels: the container that repeats, divided where widths or numbers of tokens differ.

    Args:
        model (`nn.Module`): The model.
        found: Branches in order of execution, each with the name of its block and its number of tokens or pixels.
    """
    kinds: dict[str, list[tuple[int, int]]] = {}
    branches = []
    for branch, block, tokens in found:
        level = _level_name(model, block) or str(branch.width)
        seen = kinds.setdefault(level, [])
        if (branch.width, tokens) not in seen:
            seen.append((branch.width, tokens))
        number = seen.index((branch.width, tokens)) + 1
        branches.append(branch._replace(level=level if number == 1 else f"{level} ({number})"))
    return branches


def _level_name(model: nn.Module, block: str) -> str:
    """Return the level of a block: `down_blocks.0` for `down_blocks.0.resnets.1`, `layers` for `layers.3`."""
    known = _LEVEL.match(f"{block}.")
    if known:
        return known.group()
    parts, repeated = block.split("."), []
    for index, part in enumerate(parts):
        # A list of unlike modules is one block.
        container = model.get_submodule(".".join(parts[:index]))
        if part.isdigit() and len({type(child) for child in container.children()}) == 1:
            repeated.append(index)
    if not repeated:
        return ""
    return ".".join(parts[: repeated[-2] + 1] if len(repeated) > 1 else parts[: repeated[0]])
