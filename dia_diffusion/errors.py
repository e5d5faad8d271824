"""Errors for people: each message says what was wrong and what to do about it."""

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

# NAMESPACE/NAME or NAME, as huggingface_hub accepts them.
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class UsageError(ValueError):
    """A mistake that the caller can correct. Command lines print its message alone and exit with status 2."""


class NotFiniteError(UsageError):
    """Training has diverged: a loss, a gradient or a weight is not a finite number."""

    def __init__(self, step: int, what: str, learning_rate: float):
        super().__init__(f"at step {step} {what}, at learning rate {learning_rate:.3g}: training has diverged.")
        self.step = step


class NotFiniteImagesError(UsageError):
    """A model gives NaN or infinite values, which would become black images."""

    def __init__(self, model: str):
        super().__init__(
            f"the model '{model}' gives values that are not finite numbers. It has diverged in training, or overflows "
            "in its precision: use an earlier checkpoint, or load it in float32."
        )


def first_line(error: object) -> str:
    """Return the first line of an error's message without its full stop, or the name of its class if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


def nearest(name: object, known: Iterable[str]) -> str:
    """Suggest the closest known name for a misspelled one: ` Did you mean 'x'?`, or nothing.

    Ignores case, and dashes count as underscores. Among names that are then equal the first wins.
    """
    spelled = {_plain(one): one for one in reversed(list(known))}
    found = get_close_matches(_plain(str(name)), spelled, n=1)
    return f" Did you mean '{spelled[found[0]]}'?" if found else ""


def folders_beside(path: str) -> list[str]:
    """List the folders in the parent of a path: candidates for a misspelled folder."""
    parent = Path(path).parent
    try:
        return [str(other) for other in parent.iterdir() if other.is_dir() and not other.name.startswith(".")]
    except OSError:
        return []


def why_not_loaded(name_or_path: str, error: Exception) -> str:
    """Explain in a sentence why `from_pretrained` failed: not here, not on the Hub, or the error's own words."""
    if Path(name_or_path).exists() or isinstance(error, UsageError):
        return f"{first_line(error)}."
    reason, hint = "there is no such folder", nearest(name_or_path, folders_beside(name_or_path))
    if _HUB_ID.fullmatch(name_or_path):
        said = first_line(error)
        if "does not appear to have a file" in said:
            # What libraries say offline, of private repositories and of names that do not exist.
            offline = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "is there a connection?"
            said = f"the name may be wrong, the repository private (hf auth login) or the Hub out of reach: {offline}"
        reason += f", and the Hub gave none ({said})"
    if "://" in name_or_path:
        reason += ", and a model on the Hub is named NAMESPACE/NAME, without an address"
    return f"{reason}.{hint}"


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
