"""Rules between options: which ones have no effect beside others, in training and in the other commands.

An option of this project that was given and has no effect is refused. One of diffusers' `train_unconditional.py`, whose
examples set many, and a line of a recipe or a file are only mentioned.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UsageError

# The options of diffusers' examples/unconditional_image_generation/train_unconditional.py.
DIFFUSERS_OPTIONS = frozenset(
    "dataset_name dataset_config_name model_config_name_or_path train_data_dir output_dir cache_dir resolution "
    "center_crop random_flip train_batch_size eval_batch_size dataloader_num_workers num_epochs "
    "save_images_epochs save_model_epochs gradient_accumulation_steps learning_rate lr_scheduler lr_warmup_steps "
    "adam_beta1 adam_beta2 adam_weight_decay adam_epsilon use_ema ema_inv_gamma ema_power ema_max_decay "
    "push_to_hub hub_token hub_model_id hub_private_repo logger logging_dir local_rank mixed_precision "
    "prediction_type ddpm_num_steps ddpm_num_inference_steps ddpm_beta_schedule checkpointing_steps "
    "checkpoints_total_limit resume_from_checkpoint overwrite_output_dir preserve_input_precision "
    "enable_xformers_memory_efficient_attention".split()
)
EMBEDDED_DATA = ("digits", "mnist5k")
# A pipeline's own file, and the endings of files of numpy with images or statistics.
PIPELINE_INDEX, ARCHIVES = "model_index.json", (".npz", ".npy")


class Rule(NamedTuple):
    """Options that have no effect in a certain case.

    Attributes:
        names (`str`): The options, separated by spaces.
        idle (`Callable`): Whether they have no effect, given all options by name.
        reason (`str`): The end of the sentence "X has no effect ...".
    """

    names: str
    idle: Callable[[Mapping[str, Any]], bool]
    reason: str


def _without(name: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda options: not options[name]


def _with(name: str, *values: object) -> Callable[[Mapping[str, Any]], bool]:
    return lambda options: options[name] in values


def _not_with(name: str, *values: object) -> Callable[[Mapping[str, Any]], bool]:
    # Values that the named model decides are not checked here.
    return lambda options: options[name] is not None and options[name] not in values


TRAINING_RULES = (
    Rule("label_dropout label_column", _without("class_conditional"), "without --class_conditional"),
    Rule("ema_inv_gamma ema_power ema_max_decay", _without("use_ema"), "without --use_ema"),
    Rule("score_num_images", _without("score_features"), "without --score_features"),
    Rule("eval_num_images", _without("eval_steps"), "without --eval_steps"),
    Rule("hub_token hub_model_id hub_private_repo", _without("push_to_hub"), "without --push_to_hub"),
    Rule("compile_mode", _without("compile"), "without --compile"),
    Rule("model_config_name_or_path", lambda options: bool(options["init_from"]), "with --init_from, a whole model"),
    Rule("dataset_config_name", _with("dataset_name", *EMBEDDED_DATA), "on an embedded data set"),
    Rule("lr_warmup_steps", _with("lr_scheduler", "constant"), "with --lr_scheduler constant"),
    Rule(
        "lr_num_cycles",
        _not_with("lr_scheduler", "cosine_with_restarts"),
        "without --lr_scheduler cosine_with_restarts",
    ),
    Rule("lr_power", _not_with("lr_scheduler", "polynomial"), "without --lr_scheduler polynomial"),
    Rule("logit_mean logit_std", _with("weighting_scheme", "none"), "with --weighting_scheme none"),
    Rule(
        "dia_sharing dia_bridge dia_hidden_size dia_reduction dia_gate_slope dia_time_conditioned dia_init",
        _with("dia_attention", "none"),
        "with --dia_attention none",
    ),
    Rule("dia_hidden_size", _not_with("dia_sharing", "network"), "without --dia_sharing network"),
    Rule("dia_reduction", _with("dia_attention", "eca", "srm"), "on an attention without bottlenecks"),
    Rule("dia_gate_slope", _with("dia_init", "paper"), "with --dia_init paper"),
    Rule("dia_time_conditioned", _not_with("dia_attention", "lstm", "time"), "without --dia_attention lstm or time"),
)


def is_archive(what: str) -> bool:
    """Return whether a name is that of samples or statistics in one file."""
    return what.lower().endswith(ARCHIVES) and not Path(what).is_dir()


def is_images(what: str) -> bool:
    """Return whether a name is that of images made already: an archive, or a folder that is no pipeline.

    Raises:
        UsageError: if it is another file.
    """
    path = Path(what)
    if path.is_file() and not is_archive(what):
        raise UsageError(
            f"'{what}' is a file: name a pipeline, a folder of images (or of archives of them), or samples "
            "(.npz, .npy)."
        )
    return is_archive(what) or (path.is_dir() and not (path / PIPELINE_INDEX).is_file())


EVALUATION_RULES = (
    Rule(
        "num_images steps scheduler seed guidance_scale guide compile compile_mode save_images class_proportions "
        "variant",
        lambda options: is_images(options["what"]),
        "on images that are made already",
    ),
    Rule("inception_path", lambda options: options["features"] != "inception", "without --features inception"),
    Rule(
        "dataset_config_name image_column",
        lambda options: options["dataset"] in EMBEDDED_DATA or is_archive(options["dataset"] or ""),
        "on an embedded data set or an archive",
    ),
)


def _with_attention(options: Mapping[str, Any]) -> bool:
    return options["attention"] is not None


ANALYSIS_RULES = (
    Rule("num_timesteps", _with_attention, "on a classifier, which has no timesteps"),
    Rule("variant", _with_attention, "on a classifier"),
)
STUDY_RULES = (Rule("cpus_per_run gpus_per_run", _without("ray"), "without --ray ADDRESS"),)


def check_effect(
    rules: Iterable[Rule],
    options: Mapping[str, Any],
    given: Iterable[str],
    other: Iterable[str] = (),
    tolerated: frozenset[str] = frozenset(),
) -> list[str]:
    """Refuse options that were given and have no effect.

    Args:
        rules (iterable of `Rule`): Those of the command.
        options (`dict`): All options of the command by name.
        given (iterable of `str`): The options that were given on the command line or in Python.
        other (iterable of `str`): Those that a recipe or a file sets to something else than the default.
        tolerated (set of `str`): Those that are only mentioned where they were given.

    Returns:
        list of `str`: a sentence about each that is only mentioned.

    Raises:
        UsageError: names an option that has no effect, its value and the reason.
    """
    remarks = []
    given, other = set(given), set(other)
    for rule in rules:
        names = [name for name in rule.names.split() if name in given | other]
        if not names or not rule.idle(options):
            continue
        if refused := [name for name in names if name in given - tolerated]:
            one = len(refused) == 1
            advice = f", or add {rule.reason.removeprefix('without ')}" if rule.reason.startswith("without --") else ""
            raise UsageError(
                f"{' and '.join(refused)} {'has' if one else 'have'} no effect {rule.reason}: leave "
                f"{'it' if one else 'them'} out{advice}."
            )
        remarks.append(f"{', '.join(names)}: no effect {rule.reason}.")
    return remarks
