"""Exceptions whose messages say what was wrong and what to do about it.

What is said of numbers that are not finite: of a run that diverged, and of a model that did.

What was probably meant by a name that there is not."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class UsageError(ValueError):
    """A mistake that the caller can correct. Command lines print its message alone and exit with status 2."""


class NotFiniteError(UsageError):
    """Training has diverged: a loss, a gradient or a weight is not a finite number."""

    def __init__(self, step: int, what: str, learning_rate: float):
        super().__init__(f"at step {step} {what}, at learning rate {learning_rate:.3g}: training has diverged.")
        self.step = step


class NotFiniteImagesError(UsageError):
    """A model gives values that are not finite numbers, which would become black images."""

    def __init__(self, model: str):
        super().__init__(
            f"the model '{model}' gives values that are not finite numbers. It has diverged in training, or overflows "
            "in its precision: use an earlier checkpoint, or load it in float32."
        )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without its full stop, or its type where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def nearest(name: object, known: Iterable[str]) -> str:
    """` Did you mean 'x'?`, for the end of a message, where a known name is near; else nothing.

    Capitals, and dashes for underscores, make no difference; of names that are else the same the first is named.
    """
    spelled = {_plain(one): one for one in reversed(list(known))}
    found = get_close_matches(_plain(str(name)), spelled, n=1)
    return f" Did you mean '{spelled[found[0]]}'?" if found else ""


def folders_beside(path: str) -> list[str]:
    """The folders that lie where one of this path would: candidates for what was meant, should there be none."""
    parent = Path(path).expanduser().parent
    try:
        return [str(other) for other in parent.iterdir() if other.is_dir() and not other.name.startswith(".")]
    except OSError:
        return []


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
