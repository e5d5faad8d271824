"""The description of a training run, in parts, from which the flags, the YAML file and the saved record come.

Names, meanings and defaults are those of diffusers' `train_unconditional.py` wherever that script has the option.
"""

from .config import MODEL_OPTION_NAMES, OPTION_NAMES, PARTS, TrainingConfig
from .data import DataOptions
from .model import ModelOptions
from .objective import ObjectiveOptions
from .optimisation import OptimisationOptions
from .output import OutputOptions

__all__ = [
    "MODEL_OPTION_NAMES",
    "OPTION_NAMES",
    "PARTS",
    "DataOptions",
    "ModelOptions",
    "ObjectiveOptions",
    "OptimisationOptions",
    "OutputOptions",
    "TrainingConfig",
]
