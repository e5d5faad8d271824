"""Trainers of one's own: a Python file whose function takes the options of a run and returns its figures."""

import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import NotFiniteError, UsageError, first_line, nearest
from .comparison import KNOWN_SCORES, Score


class Trainer(NamedTuple):
    """The definitions in a trainer's file.

    Attributes:
        train (`Callable`): Takes the options of a run as a dictionary, with its `seed` and the folder `output_dir`, and
            returns figures as a dictionary.
        scores (`dict`): The figures that variants are compared by.
        check (`Callable`, *optional*): Takes the options and raises `UsageError` for those that cannot work.
    """

    train: Callable[[dict[str, Any]], Mapping[str, Any]]
    scores: dict[str, Score]
    check: Callable[[dict[str, Any]], Any] | None


@lru_cache
def load_trainer(file: Path) -> Trainer:
    """Load a trainer: a Python file with a function `train(options)` and `SCORES`, and perhaps `check(options)`.

    `SCORES` says of each figure that is compared whether `lower` or `higher` is better: `{"accuracy": "higher"}`. The
    folder of the file is where its imports start, as for a script.

    Raises:
        UsageError: if there is no such file, or it cannot be imported, or lacks one of them.
    """
    if not file.is_file():
        raise UsageError(f"there is no trainer '{file}': name a Python file, from the folder of the study's file.")
    spec = importlib.util.spec_from_file_location(f"trainer_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UsageError(f"the trainer '{file}' is no Python file.")
    # Workers of a data loader import it again by this name.
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"the trainer '{file}' cannot be imported: {type(error).__name__}: {first_line(error)}."
        ) from error
    train, scores = getattr(module, "train", None), getattr(module, "SCORES", None)
    if (
        not callable(train)
        or not isinstance(scores, dict)
        or not scores
        or not all(isinstance(name, str) and better in ("lower", "higher") for name, better in scores.items())
    ):
        raise UsageError(
            f"the trainer '{file}' must define train(options), which returns figures, and SCORES, which says which of "
            'them are compared and whether lower or higher is better, for example {"accuracy": "higher"}.'
        )
    known = {name: KNOWN_SCORES.get(name, Score(name.replace("_", " "))) for name in scores}
    return Trainer(
        train, {name: known[name]._replace(better=scores[name]) for name in scores}, getattr(module, "check", None)
    )


def run_trainer(file: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Train once, and return the figures.

    Raises:
        NotFiniteError: if a score is not a finite number.
        UsageError: if a score is missing, or is no number.
    """
    trainer = load_trainer(file)
    figures = trainer.train(options)
    for name in trainer.scores:
        value = figures.get(name) if isinstance(figures, Mapping) else None
        if not isinstance(value, int | float):
            found = list(figures) if isinstance(figures, Mapping) else []
            raise UsageError(f"the trainer '{file}' returned no number '{name}'.{nearest(name, found)}")
        if not math.isfinite(value):
            raise NotFiniteError(0, f"the score '{name}' is {value}", math.nan)
    return dict(figures)
