"""The description of a training run, of all its parts.

The description of a run from the command line and from YAML files, and its record."""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError, first_line, nearest
from .data import DataOptions
from .model import ModelOptions
from .objective import ObjectiveOptions, options_of_other_objectives
from .optimisation import OptimisationOptions
from .output import OutputOptions
from .parser import SuggestingParser


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
        steps, most = self.output.ddpm_num_inference_steps, self.objective.ddpm_num_steps
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


RECIPES = files(__package__) / "recipes"
CONFIG = "training_config.yaml"


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds."""
    try:
        return yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UsageError(f"cannot read the configuration '{path}': {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' is not valid YAML: {first_line(error)}.") from error


def load_recipe(path: str | Path) -> dict[str, Any]:
    """Options from a YAML file, checked against those there are."""
    options = read_yaml(path)
    if not isinstance(options, dict):
        raise UsageError(f"'{path}' must hold 'option: value' lines.")
    unknown = sorted(map(str, options.keys() - OPTION_NAMES))
    if unknown:
        raise UsageError(
            f"'{path}' names unknown options: {', '.join(unknown)}. See --help for those known."
            f"{nearest(unknown[0], OPTION_NAMES)}"
        )
    return options


def parse_arguments(arguments: Sequence[str] | None = None) -> TrainingConfig:
    """Reads the command line. `--config FILE` gives options, which flags override; `--num_epochs` overrides the
    `max_train_steps` of a file too, and `--objective` its options of other objectives.

    Without a configuration, and without data or with `--dataset_name digits`, the recipe for the embedded digits
    gives the defaults.
    """
    from transformers import HfArgumentParser

    class _Parser(SuggestingParser, HfArgumentParser):
        """As transformers makes it from the parts."""

    parser = _Parser(
        PARTS,
        # A mistyped option should not be taken for a longer one.
        allow_abbrev=False,
        description="Train a diffusion UNet with shared attention. Without arguments: on the embedded digits.",
    )
    parser.add_argument("--config", type=os.path.expanduser, help="YAML file with any of these options.")
    parser.add_argument(
        "--no_dia_time_conditioned", "--no-dia-time-conditioned", dest="dia_time_conditioned", action="store_false"
    )
    # What stays as it is here was not given.
    nothing = argparse.Namespace(**dict.fromkeys([*OPTION_NAMES, "config"], MISSING))
    parsed = vars(parser.parse_args(arguments, nothing))
    given = {name: value for name, value in parsed.items() if value is not MISSING}
    options = _for_objective(_defaults(given), given.get("objective")) | given
    options.pop("config", None)
    if "num_epochs" in given and "max_train_steps" in given:
        print(f"max_train_steps {given['max_train_steps']} counts, and not num_epochs {given['num_epochs']}.")
    elif "num_epochs" in given:
        options["max_train_steps"] = None  # Of the configuration.
    return TrainingConfig.from_flat(**options)


def _for_objective(options: dict[str, Any], objective: str | None) -> dict[str, Any]:
    """What a configuration says of its own objective was not said of another that is named instead."""
    if objective is None:
        return options
    of_others = options_of_other_objectives(objective)
    left_out = [f"{name} {options[name]}" for name in of_others if options.get(name) is not None]
    if left_out:
        print(f"Of another objective, and left out: {', '.join(left_out)}.")
    return {name: value for name, value in options.items() if name not in of_others}


def _defaults(given: dict[str, Any]) -> dict[str, Any]:
    """The options that the configuration holds, or the recipe for the digits."""
    if "config" in given:
        return load_recipe(given["config"])
    no_data = "dataset_name" not in given and "train_data_dir" not in given
    if not no_data and given.get("dataset_name") != "digits":
        return {}
    recipe = load_recipe(RECIPES / "digits.yaml")
    if given.keys() & {"init_from", "model_config_name_or_path"}:
        # What the recipe says of a model was not said of that one.
        return {name: value for name, value in recipe.items() if name not in MODEL_OPTION_NAMES}
    return recipe


def as_yaml(config: TrainingConfig) -> str:
    """Return the record of a run: YAML that `--config` reads again."""
    return yaml.safe_dump(json.loads(json.dumps(config.public_dict())), sort_keys=False)
