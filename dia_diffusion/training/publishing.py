"""The repository on the Hub that a run is pushed to."""

from huggingface_hub import create_repo, upload_folder

from ..errors import UsageError
from .checkpoint import CHECKPOINTS
from .folder import BEST, LOCK, SAMPLES
from .options import OutputOptions


def make_hub_repository(options: OutputOptions) -> str | None:
    """The full id of the repository that the run is pushed to, made where there is none; `None` for no repository.

    Raises:
        UsageError: if the Hub refuses, or cannot be reached.
    """
    if not options.push_to_hub:
        return None
    name = options.hub_model_id or options.folder.name
    try:
        return create_repo(name, token=options.hub_token, private=options.hub_private_repo, exist_ok=True).repo_id
    except Exception as error:  # Of several libraries' kinds: no connection, no token, a bad name.
        raise UsageError(
            f"cannot use the repository '{name}' on the Hub: {_first_line(error)} Log in with "
            "`hf auth login` or give --hub_token, check --hub_model_id, or omit --push_to_hub."
        ) from error


def push_run(options: OutputOptions, hub_id: str) -> None:
    """Pushes the pipeline of a finished run, its card and what the card shows.

    Raises:
        UsageError: if the Hub refuses, or cannot be reached.
    """
    rest = [f"{name}/*" for name in (CHECKPOINTS, options.logging_dir, SAMPLES, BEST)] + ["set-aside-*", LOCK]
    try:
        upload_folder(repo_id=hub_id, folder_path=options.folder, token=options.hub_token, ignore_patterns=rest)
    except Exception as error:
        excluded = " ".join(f'--exclude "{pattern}"' for pattern in rest)
        raise UsageError(
            f"the run is finished and saved in '{options.folder}', but could not be pushed to '{hub_id}': "
            f"{_first_line(error)} To try again: hf upload {hub_id} {options.folder} {excluded}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
