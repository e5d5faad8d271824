"""The description of a run from the command line and from YAML files, and its record."""

import json
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ..data import DIGITS
from ..errors import UsageError
from ..files import replace_text
from .options import OPTION_NAMES, PARTS, TrainingConfig

RECIPES = files(__package__) / "recipes"
CONFIG = "training_config.yaml"


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds."""
    try:
        return yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UsageError(f"cannot read the configuration '{path}': {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"'{path}' is not valid YAML: {str(error).splitlines()[0]}.") from error


def load_recipe(path: str | Path) -> dict[str, Any]:
    """Options from a YAML file, checked against those there are."""
    options = read_yaml(path)
    if not isinstance(options, dict):
        raise UsageError(f"'{path}' must hold 'option: value' lines.")
    unknown = options.keys() - OPTION_NAMES
    if unknown:
        raise UsageError(f"'{path}' names unknown options: {', '.join(sorted(unknown))}. See --help for those known.")
    return options


def parse_arguments(arguments: Sequence[str] | None = None) -> TrainingConfig:
    """Reads the command line. `--config FILE` gives defaults, which flags override.

    Without a configuration, and without data or with `--dataset_name digits`, the recipe for the embedded digits
    gives the defaults.
    """
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        PARTS,
        # A mistyped option should not be taken for a longer one.
        allow_abbrev=False,
        description="Train a diffusion UNet with shared attention. Without arguments: on the embedded digits.",
    )
    parser.add_argument("--config", help="YAML file with any of these options.")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    given, _ = parser.parse_known_args(arguments)
    no_data = given.dataset_name is None and given.train_data_dir is None
    if given.config is not None:
        parser.set_defaults(**load_recipe(given.config))
    elif no_data or given.dataset_name == DIGITS:
        parser.set_defaults(**load_recipe(RECIPES / "digits.yaml"))
    options = vars(parser.parse_args(arguments))
    options.pop("config")
    return TrainingConfig.from_flat(**options)


def save_config(config: TrainingConfig, path: Path) -> None:
    """Writes the record of a run: YAML that `--config` reads again."""
    replace_text(path, yaml.safe_dump(json.loads(json.dumps(config.public_dict())), sort_keys=False))
