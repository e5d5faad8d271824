"""A study: variants of a model, each trained from several seeds at equal steps and scored alike.

Within a seed all variants see the same images, noise and noise levels in the same order (`draw_step`), and those whose
backbones have the same layers start from the same weights, so that their differences are paired.
"""

import inspect
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import UNet2DModel

from ..errors import UsageError, first_line, nearest
from ..options.fields import COUNT, NATURAL, SEED, convert_mapping, to_number
from ..options.rules import TRAINING_RULES, check_effect
from ..options.training import CONFIG, OPTION_NAMES, TrainingConfig, load_options, read_yaml, without_other_data
from .comparison import KNOWN_SCORES, Score
from .trainers import load_trainer

# Options that a study sets itself, and what to use instead.
_RESERVED = {
    "seed": "list 'seeds'",
    "output_dir": "use --output_dir",
    "overwrite_output_dir": "remove the folder of the study, or choose another --output_dir",
    "resume_from_checkpoint": "a study always goes on where it stopped",
    "score_features": "set 'features' of the study",
    "score_num_images": "set 'num_images' of the study",
    **dict.fromkeys(
        ("push_to_hub", "hub_token", "hub_model_id", "hub_private_repo"), "the runs of a study are not published"
    ),
}
# Pictures and pipelines on the way cost time and are not looked at; a finished run needs no checkpoint.
_NEVER = 10**9
_DEFAULTS = {"save_images_epochs": _NEVER, "save_model_epochs": _NEVER, "checkpoints_total_limit": 1}


class Scoring(NamedTuple):
    """Settings for scoring a trained model.

    Attributes:
        loss_draws (`int`): Draws of noise and timestep for each held-out image.
        num_images (`int`): Images generated for the Fréchet distance; 0 leaves it out.
        features (`str`): Features in which it is measured.
    """

    loss_draws: int
    num_images: int
    features: str


@dataclass(frozen=True)
class StudyRun:
    """One variant from one seed.

    Args:
        variant (`str`), seed (`int`): Which.
        folder (`Path`): Where it leaves its files.
        options (`dict`): Its options, without seed and folder.
        scoring (`Scoring`): How a trained UNet is scored.
        trainer (`Path`, *optional*): The Python file that trains; by default a UNet is trained.
    """

    variant: str
    seed: int
    folder: Path
    options: dict[str, Any]
    scoring: Scoring
    trainer: Path | None = None

    @property
    def config(self) -> TrainingConfig:
        """The training run of a UNet."""
        place = {"seed": self.seed, "output_dir": str(self.folder), "resume_from_checkpoint": "latest"}
        return TrainingConfig.from_flat(**self.options | place)

    @property
    def name(self) -> str:
        return f"{self.variant}/{self.folder.name}"

    @property
    def steps(self) -> int:
        """The amount of work, for progress: training steps, or 1 for a trainer of one's own."""
        return self.options["max_train_steps"] if self.trainer is None else 1


@dataclass(frozen=True)
class Study:
    """A grid of runs, as a YAML file describes it.

    Args:
        baseline (`str`): The variant that the others are compared with.
        variants (`dict`): For each name the options in which it differs: any option of training, any argument of
            `UNet2DModel`, or any option of the trainer.
        seeds (list of `int`): Each variant is trained once from each.
        common (`dict`): Options of all variants, among them `max_train_steps`.
        loss_draws (`int`, *optional*, defaults to 16): See `Scoring`.
        num_images (`int`, *optional*, defaults to 10000): See `Scoring`.
        features (`str`, *optional*, defaults to `"digits"`): See `Scoring`.
        timing_rounds (`int`, *optional*, defaults to 5):
            Rounds in which the step of each variant is timed against that of the baseline; 0 leaves it out.
        trainer (`str`, *optional*): A Python file that trains something else than a UNet; see `load_trainer`.
        directory (`Path`, *optional*): Where the file of the study lies, from which `trainer` is named.

    Raises:
        UsageError: for options that are unknown, that a study sets itself, or that cannot work.
    """

    baseline: str
    variants: dict[str, dict[str, Any]]
    seeds: list[int]
    common: dict[str, Any] = field(default_factory=dict)
    loss_draws: int = 16
    num_images: int = 10000
    features: str = "digits"
    timing_rounds: int = 5
    trainer: str | None = None
    directory: Path = Path()

    def __post_init__(self) -> None:
        if not isinstance(self.variants, dict) or self.baseline not in list(self.variants):
            raise UsageError(f"the baseline '{self.baseline}' must be one of the study's variants.")
        _check_names(self.variants)
        if not isinstance(self.trainer, str | None):
            raise UsageError(f"trainer must be the name of a Python file, but is {self.trainer}.")
        for name, options in {"common": self.common, **self.variants}.items():
            if not isinstance(options, dict | None):
                raise UsageError(f"'{name}' must list options, each with its value, but is {options}.")
        if not isinstance(self.seeds, list) or not self.seeds:
            raise UsageError(f"seeds must be a list of numbers from 0, for example [0, 1, 2], but is {self.seeds}.")
        set_value = partial(object.__setattr__, self)
        set_value("seeds", [to_number("each of the seeds", seed, int, SEED) for seed in self.seeds])
        if len(set(self.seeds)) < len(self.seeds):
            raise UsageError(f"seeds must be a list of different numbers, for example [0, 1, 2], but is {self.seeds}.")
        for name, within in (("loss_draws", COUNT), ("num_images", NATURAL), ("timing_rounds", NATURAL)):
            set_value(name, to_number(name, getattr(self, name), int, within))
        if self.num_images == 1:
            raise UsageError("num_images is 1, and a distance needs 2 or more: give more, or 0 for none.")
        set_value("features", os.path.expanduser(str(self.features)))  # noqa: PTH111 (Path would change Hub ids)
        in_variants = any("max_train_steps" in (options or {}) for options in self.variants.values())
        if self.trainer is None and (in_variants or not (self.common or {}).get("max_train_steps")):
            raise UsageError("a study compares at equal steps: set max_train_steps in 'common', and in no variant.")
        for variant in self.variants:
            options = self.options(variant)
            try:
                if self.trainer_file is None:
                    config, own = self.config(variant, self.seeds[0], Path()), self.variants[variant] or {}
                    own = {name: value for name, value in own.items() if value is not None}
                    check_effect(TRAINING_RULES, config.flat(), own)
                elif check := load_trainer(self.trainer_file).check:
                    check(options | {"seed": self.seeds[0], "output_dir": "run"})
            except UsageError as error:
                raise UsageError(f"variant '{variant}': {error}") from error
            except Exception as error:  # The options of a user's own trainer.
                raise UsageError(
                    f"variant '{variant}': check() of the trainer fails: {type(error).__name__}: {first_line(error)}."
                ) from error

    @property
    def trainer_file(self) -> Path | None:
        return None if self.trainer is None else (self.directory / self.trainer).resolve()

    @property
    def scores(self) -> dict[str, Score]:
        """The figures that variants are compared by."""
        file = self.trainer_file
        return {name: KNOWN_SCORES[name] for name in _UNET_SCORES} if file is None else load_trainer(file).scores

    def description(self) -> dict[str, Any]:
        """Return the study as its YAML file has it."""
        description = asdict(self)
        del description["directory"]
        for name in ("trainer",) if self.trainer is None else _OF_UNETS:
            del description[name]
        return description

    def options(self, variant: str) -> dict[str, Any]:
        """Return the options of a variant, those that all have included."""
        options: dict[str, Any] = {} if self.trainer is not None else {"unet_arguments": {}, **_DEFAULTS}
        for given in (self.common or {}, self.variants[variant] or {}):
            options = without_other_data(options, given) if self.trainer is None else options
            for name, value in given.items():
                if name in _RESERVED and (self.trainer is None or name in ("seed", "output_dir")):
                    raise UsageError(f"'{name}' cannot be set for the runs of a study: {_RESERVED[name]}.")
                if self.trainer is not None or name in OPTION_NAMES - {"unet_arguments"}:
                    options[name] = value
                elif name == "unet_arguments":
                    options[name] = options[name] | ({} if value is None else convert_mapping(name, value))
                elif name in _UNET_ARGUMENTS:
                    options["unet_arguments"] = options["unet_arguments"] | {name: value}
                else:
                    raise UsageError(
                        f"variant '{variant}': '{name}' is neither an option of training (train_unet.py --help) nor an "
                        f"argument of UNet2DModel.{nearest(name, OPTION_NAMES | _UNET_ARGUMENTS)}"
                    )
        return options

    def run(self, variant: str, seed: int, folder: Path) -> StudyRun:
        """Return the run of a variant from a seed, in a folder of the study."""
        scoring = Scoring(self.loss_draws, self.num_images, self.features)
        place = folder / variant / f"seed-{seed}"
        return StudyRun(variant, seed, place, self.options(variant), scoring, self.trainer_file)

    def config(self, variant: str, seed: int, folder: Path) -> TrainingConfig:
        """Return the training run of a variant from a seed, in a folder of the study."""
        return self.run(variant, seed, folder).config

    def runs(self, folder: Path) -> list[StudyRun]:
        """Return all runs, seed by seed, so that each finished seed is a comparison of all variants.

        Raises:
            UsageError: if a run in the folder was begun with other options.
        """
        runs = [self.run(variant, seed, folder) for seed in self.seeds for variant in self.variants]
        for run in runs:
            if run.trainer is None:
                _check_unchanged(run)
        return runs


_UNET_ARGUMENTS = inspect.signature(UNet2DModel.__init__).parameters.keys() - {"self"}
_UNET_SCORES = ("held_out_loss", "fid")
# What says how UNets are scored and timed; a trainer of one's own does it by itself.
_OF_UNETS = ("loss_draws", "num_images", "features", "timing_rounds")
_LONGEST_NAME = 100
# Names that Windows takes for devices.
_DEVICES = {"con", "prn", "aux", "nul", *(f"{kind}{number}" for kind in ("com", "lpt") for number in range(1, 10))}


def _check_names(variants: Iterable[str]) -> None:
    """Refuse names of variants that cannot be folders of a study, on any system."""
    seen: dict[str, str] = {}
    for name in variants:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+", name):
            raise UsageError(f"variant '{name}': its name may have letters, digits and . + - _ only (quote a number).")
        plain = name.lower()
        if name[0] == "." or name[-1] == "." or plain.partition(".")[0] in _DEVICES or len(name) > _LONGEST_NAME:
            raise UsageError(
                f"variant '{name}': a name is also a folder's: it may not begin or end with a dot, be the name of a "
                f"device, or have more than {_LONGEST_NAME} letters."
            )
        if plain in ("study.json", "study.md", "study.html", "study.png"):
            raise UsageError(f"variant '{name}': that file holds the report of the study; choose another name.")
        if plain in seen:
            raise UsageError(f"variants '{seen[plain]}' and '{name}' would have one folder where case does not count.")
        seen[plain] = name


def load_study(path: str | Path) -> Study:
    """Read the description of a study.

    Raises:
        UsageError: if it cannot be read or does not describe a study.
    """
    content = read_yaml(path)
    keys = [item.name for item in fields(Study) if item.name != "directory"]
    required = {"baseline", "variants", "seeds"}
    if not isinstance(content, dict) or content.keys() - set(keys) or required - content.keys():
        found, hint = "", ""
        if isinstance(content, dict):
            found = f"; it has {', '.join(map(str, content))}"
            hint = "".join(nearest(key, keys) for key in content if key not in keys)
        raise UsageError(
            f"'{path}' must have the keys {', '.join(sorted(required))}, and may have "
            f"{', '.join(key for key in keys if key not in required)}{found}.{hint}"
        )
    useless = [name for name in _OF_UNETS if name in content and content.get("trainer") is not None]
    if useless:
        raise UsageError(f"'{path}': {', '.join(useless)} has no effect with a trainer, which scores its runs itself.")
    return Study(**content, directory=Path(path).parent)


def _check_unchanged(run: StudyRun) -> None:
    """Refuse a folder whose UNet was trained with other options than this run."""
    record = run.folder / CONFIG
    if not record.exists():
        return
    before, now = load_options(record), run.config.public_dict()
    elsewhere = {"output_dir", "cache_dir", "resume_from_checkpoint"}
    if now["init_from"] is not None or now["model_config_name_or_path"] is not None:
        # The record says what that model is, where the study leaves it open.
        elsewhere |= {name for name in now if name.startswith("dia_") and now[name] is None}
    # Where it is left open, the data decide.
    elsewhere |= {"sigma_data"} if now["sigma_data"] is None else set()
    changed = [name for name in before if name not in elsewhere and before[name] != now[name]]
    if changed:
        lines = "; ".join(f"{name} is {now[name]}, was {before[name]}" for name in changed)
        raise UsageError(
            f"'{run.folder}' was trained with other options: {lines}. Remove that folder, or choose another "
            "--output_dir."
        )
