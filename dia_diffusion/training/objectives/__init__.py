"""What a UNet can learn, by name. Each is a short subclass of `Objective` in a file of its own."""

from .ddpm import DDPM
from .edm import EDM
from .flow import Flow
from .objective import Lesson, Objective

OBJECTIVES: dict[str, type[Objective]] = {"ddpm": DDPM, "edm": EDM, "flow": Flow}

__all__ = ["DDPM", "EDM", "OBJECTIVES", "Flow", "Lesson", "Objective"]
