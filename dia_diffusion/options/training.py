"""A training run: its options together, the recipes and files that they may come from, and its record."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ..errors import UsageError, first_line, nearest
from ..files import find_folder
from .fields import Location, Options, option
from .model import DIA_DEFAULTS, DataOptions, ModelOptions
from .objective import OBJECTIVE_DEFAULTS, ObjectiveOptions, OptimisationOptions, options_of_other_objectives
from .output import OutputOptions
from .parser import OptionParser, rename_aliases
from .rules import DIFFUSERS_OPTIONS, TRAINING_RULES, check_effect

_SOURCES = ("dataset_name", "dataset_config_name", "train_data_dir")
# The file that holds the record of a run, in its folder.
CONFIG = "training_config.yaml"


@dataclass
class SourceOptions(Options):
    """Sources of options that are not given themselves."""

    group = "recipe"

    recipe: Location | None = option(
        None, "Settings to begin with, by name (see --recipes) or from a YAML file; digits where no data is named."
    )
    config: Location | None = option(None, "YAML file with any of these options, such as the record of a run.")


@dataclass
class TrainingConfig:
    """A training run: the parts of its description. In files and on the command line their options lie flat.

    Attributes:
        recipe (`str`, *optional*): The recipe that it was made from.
        remarks (list of `str`): Lines for the start of the run, about the recipe and about options without effect. Like
            the recipe no part of the record.
    """

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    optimisation: OptimisationOptions = field(default_factory=OptimisationOptions)
    output: OutputOptions = field(default_factory=OutputOptions)
    recipe: str | None = field(default=None, compare=False)
    remarks: list[str] = field(default_factory=list, compare=False)

    def __post_init__(self) -> None:
        if self.model.dia_attention == "srm" and self.optimisation.train_batch_size == 1:
            raise UsageError("dia_attention 'srm' normalises over the batch: it needs a train_batch_size of 2 or more.")
        if self.model.dia_attention == "none" and self.optimisation.train_only == "dia":
            raise UsageError("--train_only dia leaves nothing to train with --dia_attention none.")
        steps, most = self.output.ddpm_num_inference_steps, self.objective.ddpm_num_steps
        if most is not None and steps > most:
            raise UsageError(
                f"ddpm_num_inference_steps {steps} is more than ddpm_num_steps {most}: a sampler has no more steps "
                "than the noise schedule."
            )

    @classmethod
    def from_flat(cls, **options: Any) -> "TrainingConfig":
        """Return the run that these options describe, by their names as flags have them."""
        parts = {}
        for name, part in PARTS.items():
            names = [item.name for item in fields(part)]
            parts[name] = part(**{name: options.pop(name) for name in names if name in options})
        if options:
            raise TypeError(f"there are no options named {', '.join(options)}")
        return cls(**parts)

    def flat(self) -> dict[str, Any]:
        """Return all options by name."""
        return {name: value for part in PARTS for name, value in asdict(getattr(self, part)).items()}

    def public_dict(self) -> dict[str, Any]:
        """Return all options by name as they may be shown and saved: without the token."""
        return {name: value for name, value in self.flat().items() if name != "hub_token"}


PARTS: dict[str, Any] = {
    "data": DataOptions,
    "model": ModelOptions,
    "objective": ObjectiveOptions,
    "optimisation": OptimisationOptions,
    "output": OutputOptions,
}


@dataclass(kw_only=True)
class TrainOptions(SourceOptions, DataOptions, ModelOptions, ObjectiveOptions, OptimisationOptions, OutputOptions):
    """All options of training side by side, as `dia train` and `train` take them."""


# Options of the attention and the objectives are None until these defaults replace it.
DEFAULTS = {item.name: item.default for part in PARTS.values() for item in fields(part)} | DIA_DEFAULTS
for _defaults in OBJECTIVE_DEFAULTS.values():
    DEFAULTS |= _defaults
OPTION_NAMES = frozenset(DEFAULTS)
MODEL_OPTION_NAMES = frozenset(item.name for item in fields(ModelOptions))
# The options that `--help` shows; the others are behind `--help_all`.
_USUAL = frozenset(
    "recipe config dataset_name train_data_dir resolution validation_split class_conditional random_flip "
    "block_out_channels init_from resnet_time_scale_shift dia_attention dia_sharing objective prediction_type "
    "max_train_steps num_epochs train_batch_size learning_rate lr_warmup_steps mixed_precision use_ema seed "
    "output_dir resume_from_checkpoint overwrite_output_dir score_features push_to_hub".split()
)


def training_parser(make: Callable[..., OptionParser] = OptionParser) -> OptionParser:
    """Return the parser of `dia train` and `train_unet.py`; `make` makes it, with the arguments of `OptionParser`."""
    parser = make(
        parts=[SourceOptions, *PARTS.values()],
        usual=_USUAL,
        description="Train a diffusion UNet with shared attention; without options, on the embedded digits. "
        "Options have the names and meanings of diffusers' train_unconditional.py.",
    )
    parser.add_print("--recipes", text="List the recipes.", make=_list_recipes)
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> TrainingConfig:
    """Return the run that a command line describes, and print what `configure` remarks."""
    config = configure(vars(training_parser().parse_args(arguments)))
    for remark in config.remarks:
        print(remark)
    return config


def configure(given: Mapping[str, Any]) -> TrainingConfig:
    """Return the run that options describe, completed by a file, a recipe and the defaults.

    An option counts as given, else as in `config` (a YAML file), else as in `recipe`. Without both, and without data or
    with the digits, the recipe is `digits`. `num_epochs` overrides the `max_train_steps` of file and recipe, and
    `objective` their options of other objectives. What a recipe sets, and which options have no effect, is among the
    remarks.

    Args:
        given (`dict`): Options by name, as given on the command line or in Python.

    Raises:
        UsageError: for an unknown option, a value that cannot be, or an option without effect.
    """
    given = check_names(given, "train")
    given |= asdict(SourceOptions(given.get("recipe"), given.get("config")))
    filed = without_other_data(load_options(given["config"]) if given.get("config") is not None else {}, given)
    recipe, settings = _choose_recipe(given, filed)
    chosen, remarks = _for_objective(settings | filed, given.get("objective"))
    options = chosen | {name: value for name, value in given.items() if name in OPTION_NAMES}
    if given.get("num_epochs") is not None:
        if given.get("max_train_steps") is None:
            options["max_train_steps"] = None  # Of the file or the recipe: num_epochs counts.
        else:
            remarks.append(
                f"max_train_steps {given['max_train_steps']} counts, and not num_epochs {given['num_epochs']}."
            )
    config = TrainingConfig.from_flat(**options)
    if recipe is not None:
        left = [f"{name} {chosen[name]}" for name in settings if name in chosen.keys() - filed.keys() - given.keys()]
        remarks.insert(0, f"Recipe {recipe}: {', '.join(left) or 'the defaults'}.")
    changed = [name for name, value in chosen.items() if name not in given and value not in (None, DEFAULTS[name])]
    there = [name for name in given if given[name] is not None]
    remarks += check_effect(TRAINING_RULES, config.flat(), there, changed, DIFFUSERS_OPTIONS)
    config.recipe, config.remarks = recipe, remarks
    return config


def configure_here(given: Mapping[str, Any]) -> TrainingConfig:
    """Return what `configure` returns, for a run on this machine: its folder of images must be here."""
    config = configure(given)
    check_folder_of_images(config)
    return config


def check_folder_of_images(config: TrainingConfig) -> None:
    """Check that the images of a run lie in a folder of this machine, which is not that of its output.

    Raises:
        UsageError: if they do not.
    """
    if config.data.dataset_name is None and config.data.train_data_dir is not None:
        folder = find_folder("--train_data_dir", config.data.train_data_dir)
        if folder.resolve() == Path(config.output.output_dir).resolve():
            raise UsageError(
                f"--output_dir '{folder}' is the folder of the images: pictures of the run would become training "
                "images. Choose another --output_dir."
            )


def check_names(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return options of training with each alias replaced by its name.

    Raises:
        UsageError: for an option that does not exist.
    """
    parts = [SourceOptions, *PARTS.values()]
    return rename_aliases(options, parts, lambda unknown: f"{where} has no option '{unknown[0]}'.")


def without_other_data(options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the data that options name where `given`, which comes before them, names other data."""
    named = [name for name in ("dataset_name", "train_data_dir") if given.get(name) is not None]
    dropped = _SOURCES if any(given[name] != options.get(name) for name in named) else ()
    return {name: value for name, value in options.items() if name not in dropped}


def _for_objective(options: dict[str, Any], objective: str | None) -> tuple[dict[str, Any], list[str]]:
    """Drop the objective options of a file or recipe if another objective than theirs was given, with a remark."""
    others = [] if objective is None else [name for name in options_of_other_objectives(objective) if name in options]
    left_out = [f"{name} {options[name]}" for name in others if options[name] is not None]
    remarks = [f"Of another objective, and left out: {', '.join(left_out)}."] if left_out else []
    return {name: value for name, value in options.items() if name not in others}, remarks


def _choose_recipe(given: Mapping[str, Any], filed: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Return the name of the recipe of a run and the options that it sets, or `None` and nothing."""
    named = [name for name in _SOURCES if given.get(name, filed.get(name)) is not None]
    recipe = given.get("recipe")
    if recipe is None and (given.get("config") is not None or (named and given.get("dataset_name") != "digits")):
        return None, {}
    recipe = os.fspath(recipe or "digits")
    known = recipes()
    if recipe not in known and not (Path(recipe).suffix in (".yaml", ".yml") or Path(recipe).is_file()):
        raise UsageError(
            f"there is no recipe '{recipe}'. Choose one of: {', '.join(known)}; or name a YAML file."
            f"{nearest(recipe, known)}"
        )
    settings = load_options(known.get(recipe, recipe))
    # A recipe's options of data and model hold for its own data and model only.
    dropped = set(_SOURCES) if named else set()
    if any(given.get(name) or filed.get(name) for name in ("init_from", "model_config_name_or_path")):
        dropped |= MODEL_OPTION_NAMES
    return recipe, {name: value for name, value in settings.items() if name not in dropped}


def recipes() -> dict[str, Any]:
    """Return the path of each recipe by its name."""
    found = (path for path in (files(__package__) / "recipes").iterdir() if path.name.endswith(".yaml"))
    return {path.name.removesuffix(".yaml"): path for path in sorted(found, key=lambda path: path.name)}


def _list_recipes() -> str:
    """Return a line for each recipe: its name, and the comment on top of its file."""
    lines = {name: path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for name, path in recipes().items()}
    return "\n".join(f"{name:<10} {line}" for name, line in lines.items())


def load_options(path: Any) -> dict[str, Any]:
    """Return the options of training that a YAML file holds.

    Raises:
        UsageError: if it cannot be read, or names an option that does not exist.
    """
    options = {} if (read := read_yaml(path)) is None else read
    if not isinstance(options, dict):
        raise UsageError(f"'{path}' must hold 'option: value' lines.")

    def refuse(unknown: list[str]) -> str:
        return f"'{path}' names unknown options: {', '.join(unknown)}. See --help_all for those known."

    return rename_aliases(options, PARTS.values(), refuse)


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping that names a key twice, of which PyYAML takes the last in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' stands there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Any) -> Any:
    """Read a YAML file.

    Raises:
        UsageError: if it cannot be read or is not YAML.
    """
    try:
        text = (Path(path) if isinstance(path, str) else path).read_text(encoding="utf-8")
        return yaml.load(text, _UniqueKeys)
    except OSError as error:
        raise UsageError(f"cannot read the configuration '{path}': {error.strerror}.") from error
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UsageError(f"'{path}' is not valid YAML: {line}{error.problem}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"'{path}' is not valid YAML: {first_line(error)}.") from error


def as_yaml(config: TrainingConfig) -> str:
    """Return the record of a run: YAML that `--config` reads again."""
    return yaml.safe_dump(json.loads(json.dumps(config.public_dict())), sort_keys=False)
