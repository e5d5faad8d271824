"""The description of a training run, of all its parts."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ...errors import UsageError
from .data import DataOptions
from .model import ModelOptions
from .objective import ObjectiveOptions
from .optimisation import OptimisationOptions
from .output import OutputOptions


@dataclass
class TrainingConfig:
    """A training run: the parts of its description. In files and on the command line their options lie flat."""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    optimisation: OptimisationOptions = field(default_factory=OptimisationOptions)
    output: OutputOptions = field(default_factory=OutputOptions)

    def __post_init__(self) -> None:
        if self.model.dia_attention == "srm" and self.optimisation.train_batch_size == 1:
            raise UsageError("dia_attention 'srm' normalises over the batch: it needs a train_batch_size of 2 or more.")
        steps, most = self.output.ddpm_num_inference_steps, self.objective.make().num_timesteps
        if most is not None and steps > most:
            raise UsageError(
                f"ddpm_num_inference_steps {steps} is more than ddpm_num_steps {most}: a sampler has no more steps "
                "than the noise schedule."
            )

    @classmethod
    def from_flat(cls, **options: Any) -> "TrainingConfig":
        """The parts, each with those of the options that are its own."""
        parts = {}
        for part in fields(cls):
            names = [item.name for item in fields(part.type)]
            parts[part.name] = part.type(**{name: options.pop(name) for name in names if name in options})
        if options:
            raise TypeError(f"there are no options named {', '.join(options)}")
        return cls(**parts)

    def public_dict(self) -> dict[str, Any]:
        """All options as they may be shown and saved: flat, and without the token."""
        options = {name: value for part in asdict(self).values() for name, value in part.items()}
        del options["hub_token"]
        return options


PARTS = tuple(part.type for part in fields(TrainingConfig))
OPTION_NAMES = frozenset(item.name for part in PARTS for item in fields(part))
MODEL_OPTION_NAMES = frozenset(item.name for item in fields(ModelOptions))
