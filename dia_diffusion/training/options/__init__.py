"""The description of a training run, in parts, from which the flags, the YAML file and the saved record come.

Names, meanings and defaults are those of diffusers' `train_unconditional.py` wherever that script has the option.
"""

from ...options.data import DataOptions
from ...options.model import ModelOptions
from ...options.objective import ObjectiveOptions
from ...options.optimisation import OptimisationOptions
from ...options.output import OutputOptions
from ...options.training import MODEL_OPTION_NAMES, OPTION_NAMES, PARTS, TrainingConfig

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
