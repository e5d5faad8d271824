"""What dependencies print that is of no use to a user."""

import os
import sys
import warnings

_INTERVAL = "10"


def quiet_dependencies() -> None:
    """For command lines only, and before anything is imported: leaves out what is meant for the developers of other
    packages, and in a log the bars of what is quick.

    Warnings that were asked for (`python -W`, `PYTHONWARNINGS`) stay.
    """
    if not sys.warnoptions:
        for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        # diffusers passes on to huggingface_hub an argument that no longer does anything.
        warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument is deprecated", UserWarning)
    if not sys.stderr.isatty():
        # The defaults of tqdm.
        for name in ("TQDM_DELAY", "TQDM_MININTERVAL"):
            os.environ.setdefault(name, _INTERVAL)
