"""The attention's arguments, described once: names, defaults, help, and which go together.

`SharedAttention`, `attach`, `DIAUNet2DModel` (with `dia_` before them) and the flags of training take them from here.
Saved pipelines hold this module's code, so it imports `errors` alone.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import UsageError, nearest

ATTENTION_NAMES = ("lstm", "se", "eca", "srm", "cbam", "time")
SHARINGS = ("network", "level", "block")
BRIDGES = ("carry", "skip", "reset")
INITS = ("identity", "paper")


@dataclass(frozen=True)
class AttentionOptions:
    """Attention that gates residual branches; see `SharedAttention` for the meaning of each option.

    Raises:
        UsageError: for a value out of its range, and for combinations that have no meaning.
    """

    attention: str = field(
        default="lstm",
        metadata={
            "choices": ATTENTION_NAMES,
            "help": "Attention module: lstm (DIA) or another one; time is a control that sees no features.",
        },
    )
    sharing: str = field(
        default="network",
        metadata={
            "choices": SHARINGS,
            "help": "Blocks that share a module: all (network), those of one width (level), or none (block).",
        },
    )
    bridge: str = field(
        default="carry",
        metadata={
            "choices": BRIDGES,
            "help": "How the LSTM's state enters a level: carry it on, skip (join the matching down level), or reset.",
        },
    )
    hidden_size: int = field(default=64, metadata={"help": "Width of the module that the whole network shares."})
    reduction: int = field(default=4, metadata={"help": "Reduction ratio of the bottlenecks."})
    init: str = field(
        default="identity", metadata={"choices": INITS, "help": "identity: gates start at 1. paper: gates in (0, 1)."}
    )
    gate_slope: float = field(
        default=1.0, metadata={"help": "Slope of the gates with init identity: how fast they leave 1 in training."}
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            check_choice(item.name, getattr(self, item.name))
        for name in ("hidden_size", "reduction"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, but is {getattr(self, name)}.")
        if not self.gate_slope > 0:
            raise UsageError(f"gate_slope must be above 0, but is {self.gate_slope}.")
        self._check_meaning()

    def _check_meaning(self) -> None:
        if self.attention == "lstm" and self.sharing == "block":
            raise UsageError(
                "attention 'lstm' with sharing 'block' has no meaning: the LSTM's state passes between blocks that "
                "share one cell. Use sharing 'network' or 'level', or another attention."
            )
        if self.attention != "lstm" and self.bridge != "carry":
            raise UsageError(
                f"bridge '{self.bridge}' needs a state, and attention '{self.attention}' has none: leave it out."
            )
        if self.sharing == "level" and self.bridge == "skip":
            raise UsageError(
                "bridge 'skip' with sharing 'level' has no meaning: each width keeps a state of its own, which the up "
                "path takes up where the down path left it. Use bridge 'carry' or 'reset', or sharing 'network'."
            )

    def check_place(self, has_context: bool, channel_dim: int = 1) -> None:
        """Refuse an attention that the network around it cannot feed.

        Args:
            has_context (`bool`): Whether the first state starts from a context, such as the time embedding.
            channel_dim (`int`): The dimension of the branches that holds their channels; 1 where there are pixels.

        Raises:
            UsageError: for `time` without a context, and for `cbam` on tokens.
        """
        if self.attention == "time" and not has_context:
            raise UsageError("attention 'time' has no input but the time embedding: set time_conditioned to true.")
        if self.attention == "cbam" and channel_dim != 1:
            raise UsageError("attention 'cbam' convolves over pixels, and these branches hold tokens: use another.")


def check_choice(name: str, value: object) -> None:
    """Refuse a value of an option that is not among its choices.

    Raises:
        UsageError: names the choices.
    """
    choices = AttentionOptions.__dataclass_fields__[name].metadata.get("choices")
    if choices is not None and value not in choices:
        raise UsageError(f"unknown {name} '{value}'. Choose one of: {', '.join(choices)}.{nearest(value, choices)}")


ATTENTION_OPTIONS = tuple(item.name for item in fields(AttentionOptions))


def attention_parameters(prefix: str = "") -> list[inspect.Parameter]:
    """Return the options as parameters of a signature, named with a prefix."""
    return [
        inspect.Parameter(
            prefix + item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=item.type
        )
        for item in fields(AttentionOptions)
    ]


def with_attention_options(function: Callable) -> Callable:
    """Decorate a function that takes `**options`, so that its signature names the attention's options.

    They come, by name or by position, after the arguments that have no default.
    """
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [option.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for option in attention_parameters()]
    required = [p for p in own if p.default is p.empty]
    signature = inspect.Signature([*required, *options, *(p for p in own if p.default is not p.empty)])

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(**signature.bind(*args, **kwargs).arguments)

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call
