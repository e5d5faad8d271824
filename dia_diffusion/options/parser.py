"""Parsers of command lines made from dataclasses of options, and the names under which people look for an option."""

import argparse
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from inspect import get_annotations
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import UsageError, nearest
from .fields import NAMES, TRUTH, Options, unwrap

# Other words for an option, and the options that they may stand for: the first that a command has is suggested.
_SYNONYMS = {
    "lr": "learning_rate",
    "batch bs bsz per_device_train_batch_size batch_size": "train_batch_size batch_size",
    "epochs num_train_epochs n_epochs epoch": "num_epochs",
    "steps num_steps train_steps iterations iters max_steps num_train_steps total_steps": "max_train_steps steps",
    "num_inference_steps inference_steps sampling_steps sample_steps ddim_steps num_sampling_steps": "steps "
    "ddpm_num_inference_steps",
    "timesteps num_timesteps diffusion_steps num_train_timesteps": "ddpm_num_steps num_timesteps",
    "beta_schedule noise_schedule schedule": "ddpm_beta_schedule",
    "data data_dir data_path data_root images image_dir image_folder folder real reference": "train_data_dir dataset",
    "dataset dataset_name name": "dataset_name dataset",
    "out output outdir out_dir output_folder output_path save_dir results_dir logdir": "output_dir output",
    "image_size img_size size imsize px width height": "resolution",
    "workers num_workers n_workers num_proc": "dataloader_num_workers jobs",
    "fp16 bf16 half amp precision dtype use_fp16": "mixed_precision",
    "ema": "use_ema",
    "ema_decay ema_rate": "ema_max_decay",
    "resume resume_from checkpoint ckpt": "resume_from_checkpoint",
    "overwrite force": "overwrite_output_dir overwrite",
    "weight_decay wd": "adam_weight_decay",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "eps epsilon": "adam_epsilon",
    "grad_accum accumulation_steps gradient_accumulation gradient_accumulate_every": "gradient_accumulation_steps",
    "warmup warmup_steps num_warmup_steps": "lr_warmup_steps",
    "lr_schedule scheduler_type": "lr_scheduler",
    "scheduler sampler sampling_method": "scheduler lr_scheduler",
    "grad_clip clip clip_grad gradient_clipping max_norm clip_grad_norm": "max_grad_norm",
    "flip hflip horizontal_flip": "random_flip",
    "val_split valid_split validation val held_out test_split": "validation_split",
    "conditional class_cond cond labels use_labels": "class_conditional",
    "cfg cfg_scale guidance cfg_weight w": "guidance_scale",
    "drop_prob cond_drop_prob class_dropout cfg_dropout": "label_dropout",
    "class label class_id classes": "class_label class_conditional",
    "n num num_samples n_samples samples count num_fid_samples": "num_images score_num_images",
    "gpu cuda cpu": "device",
    "prediction objective_type pred_type parameterization": "prediction_type",
    "min_snr min_snr_gamma": "snr_gamma",
    "zero_snr": "rescale_betas_zero_snr",
    "channels_mult model_channels dims": "block_out_channels",
    "num_res_blocks res_blocks": "layers_per_block",
    "scale_shift use_scale_shift_norm": "resnet_time_scale_shift",
    "attention attn": "dia_attention",
    "sharing shared share": "dia_sharing",
    "hidden hidden_size dim": "dia_hidden_size",
    "reduction ratio": "dia_reduction",
    "pretrained pretrained_model_name_or_path from_pretrained finetune": "init_from",
    "model_config unet_config": "model_config_name_or_path",
    "torch_compile": "compile",
    "fid metric": "metrics score_features",
    "features feature_extractor": "features score_features",
    "report_to tracker log_with": "logger",
    "save_every save_steps checkpoint_every save_freq": "checkpointing_steps",
    "sample_every": "save_images_epochs",
    "log_every logging_interval log_interval": "logging_steps",
    "token hf_token": "hub_token",
    "repo repo_id": "hub_model_id",
    "push upload": "push_to_hub",
    "latent autoencoder": "vae",
    "random_seed": "seed",
    "server_name": "host",
    "server_port": "port",
}
_MEANINGS = {word: meant.split() for words, meant in _SYNONYMS.items() for word in words.split()}


def suggest(name: object, known: Collection[str], prefix: str = "") -> str:
    """Suggest an option for an unknown name: ` Did you mean 'x'?`, or nothing.

    Args:
        name: As it was written, with dashes or underscores.
        known (collection of `str`): The names of the options.
        prefix (`str`): Put before the suggested name, `--` for a flag.
    """
    plain = str(name).lower().lstrip("-").replace("-", "_")
    meant = next((option for option in _MEANINGS.get(plain, ()) if option in known), None)
    if meant is None:
        return nearest(f"{prefix}{plain}", [prefix + option for option in known])
    return f" Did you mean '{prefix}{meant}'?"


def rename_aliases(
    options: Mapping[str, Any], parts: Iterable[type[Options]], message: Callable[[list[str]], str]
) -> dict[str, Any]:
    """Return options with each alias replaced by the name that it stands for.

    Args:
        options (`dict`): Options by name or alias.
        parts (iterable of classes): Those whose options are known.
        message (`Callable`): Called with the unknown names, says what is wrong.

    Raises:
        UsageError: for unknown names, and for an option that is given under two names.
    """
    names = {
        spelling: item.name
        for part in parts
        for item in fields(part)  # type: ignore[arg-type]
        for spelling in (item.name, *item.metadata["aliases"])
    }
    unknown = sorted(map(str, options.keys() - names.keys()))
    if unknown:
        raise UsageError(f"{message(unknown)}{suggest(unknown[0], names)}")
    renamed: dict[str, Any] = {}
    for spelling, value in options.items():
        if names[spelling] in renamed:
            raise UsageError(f"{spelling} and {names[spelling]} are one option: give it once.")
        renamed[names[spelling]] = value
    return renamed


class OptionParser(argparse.ArgumentParser):
    """A parser that has a flag for each option of some dataclasses, and suggests what a mistyped flag may have meant.

    Fields without a default are positional. Dashes in a flag count as underscores, a switch `x` has `--no_x` too, and
    no flag may be abbreviated: a mistyped one should not be taken for a longer one.

    Args:
        parts (sequence of classes): Dataclasses of options; each is a group of the help.
        usual (collection of `str`, *optional*): The options that `--help` shows; the others need `--help_all`.
        settings: For `ArgumentParser`.
    """

    def __init__(
        self, parts: Sequence[type[Options]] = (), usual: Collection[str] | None = None, **settings: Any
    ) -> None:
        super().__init__(
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=_HelpFormatter,
            add_help=False,
            **settings,
        )
        self._groups: dict[str, Any] = {}
        rare = []
        has_positional = any(item.default is MISSING for part in parts for item in fields(part))
        for part in parts:
            hints = get_type_hints(part, include_extras=True)
            # A command's own options stand before those that it has in common with others.
            for item in sorted(fields(part), key=lambda item: item.name not in part.__annotations__):
                action = self._add_option(part, item, hints[item.name], has_positional)
                if usual is not None and item.name not in usual:
                    rare.append(action)
        self.general = self.add_argument_group("general")
        self.add_print("-h", "--help", text="Show this help.", make=lambda: self._format_help_without(rare))
        if rare:
            self.add_print("--help_all", text=f"Show {len(rare)} more options too.", make=self.format_help)

    def _add_option(self, part: type[Options], item: Any, hint: Any, has_positional: bool) -> argparse.Action:
        owner: Any = next(base for base in part.__mro__ if item.name in get_annotations(base))
        title = item.metadata.get("group", owner.group)
        group = self._groups.get(title) or self._groups.setdefault(title, self.add_argument_group(title))
        kind, mark = unwrap(hint)
        settings: dict[str, Any] = {"help": _help(item, kind), "metavar": item.metadata.get("metavar")}
        if item.default is MISSING:
            return group.add_argument(item.name, **settings | {"metavar": item.name.upper()})
        flags = [f"--{name}" for name in (item.name, *item.metadata["aliases"])]
        if kind is bool:
            # Beside a positional argument a switch takes no value: it would take that argument.
            settings |= {"action": _Switch, "nargs": 0 if has_positional else "?", "type": _truth}
            flags.append(f"--no_{item.name}")
        elif get_origin(kind) is Literal:
            settings["choices"] = [str(choice) for choice in get_args(kind)]
        elif get_origin(kind) is list and mark != NAMES:
            settings |= {"nargs": "+", "metavar": "N"}
        elif settings["metavar"] is None:
            settings["metavar"] = {int: "N", float: "X", dict: "YAML"}.get(get_origin(kind) or kind, "TEXT")
        return group.add_argument(*flags, dest=item.name, **settings)

    def add_print(self, *flags: str, text: str, make: Callable[[], str]) -> None:
        """Add a flag that prints what `make` returns, and exits."""
        self.general.add_argument(*flags, action=_Print, make=make, help=text)

    def _format_help_without(self, rare: Sequence[argparse.Action]) -> str:
        for action in rare:
            action.help = argparse.SUPPRESS
        return self.format_help()

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        # A command reads all that stands behind it, and so refuses with its own usage what it does not know.
        args = None if args is None else [self._with_underscores(word) for word in args]
        found, unknown = super().parse_known_args(args, namespace or argparse.Namespace())
        if unknown:
            flag = next((word.partition("=")[0] for word in unknown if word.startswith("-")), None)
            known = [name.lstrip("-") for name in self._option_string_actions]
            first = [action.option_strings[0].lstrip("-") for action in self._actions if action.option_strings]
            hint = "" if flag is None else suggest(flag, first, "--") or suggest(flag, known, "--")
            self.error(f"unrecognized arguments: {' '.join(unknown)}.{hint}")
        return found, unknown

    def _with_underscores(self, word: str) -> str:
        flag, equals, value = word.partition("=")
        plain = f"--{flag[2:].replace('-', '_')}"
        return plain + equals + value if flag.startswith("--") and plain in self._option_string_actions else word

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            raise argparse.ArgumentError(action, f"{error.message}.{nearest(value, action.choices or ())}") from None


class _HelpFormatter(argparse.HelpFormatter):
    """Lists each option under its first name, with its aliases."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any) -> str:
        places = [a.metavar or a.dest.upper() for a in actions if not a.option_strings]
        words = [self._prog, *map(str, places), "[options]"]
        return f"{'usage: ' if prefix is None else prefix}{' '.join(words)}\n\n"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if not name.startswith("--no_")]
        value = "" if action.nargs == 0 or isinstance(action, _Switch) else f" {self._format_args(action, action.dest)}"
        return ", ".join(names) + value


class _Switch(argparse.Action):
    """Sets an option to true or false: `--x`, `--x false`, `--no_x`."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        value = values is not False  # Without a value: an empty list or nothing.
        setattr(namespace, self.dest, value != str(option_string).startswith("--no_"))


class _Print(argparse.Action):
    """Prints a text that is made when it is asked for, and exits."""

    def __init__(self, option_strings: Sequence[str], dest: str, make: Callable[[], str], **settings: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **settings)
        self.make = make

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        print(self.make().rstrip())
        parser.exit()


def _help(item: Any, kind: Any) -> str:
    """Return the help of an option with its default, where it has one to show."""
    text, shown = item.metadata["help"].replace("%", "%%"), item.metadata.get("shown", item.default)
    if shown is None or shown is MISSING or (kind is bool and not shown):
        return text
    return f"{text.removesuffix('.')} (default: {shown})."


def _truth(text: str) -> bool:
    if text.lower() not in TRUTH:
        raise argparse.ArgumentTypeError(f"it must be true or false, but is '{text}'")
    return TRUTH[text.lower()]
