"""Flags, YAML and the saved record are one and the same."""

import re
from pathlib import Path

import pytest
import yaml

from dia_diffusion.errors import UsageError
from dia_diffusion.options.model import ModelOptions
from dia_diffusion.options.training import (
    OPTION_NAMES,
    TrainingConfig,
    as_yaml,
    configure,
    load_options,
    parse_arguments,
    recipes,
)
from dia_diffusion.training.architecture import build_unet

# The options of diffusers' examples/unconditional_image_generation/train_unconditional.py, each with a value.
DIFFUSERS_COMMAND_LINE = """
    --dataset_name=huggan/flowers-102-categories --dataset_config_name=default --train_data_dir=images
    --model_config_name_or_path=model --output_dir=out --overwrite_output_dir --cache_dir=cache --resolution=64
    --center_crop --random_flip --train_batch_size=16 --eval_batch_size=8 --dataloader_num_workers=2 --num_epochs=100
    --save_images_epochs=5 --save_model_epochs=6 --gradient_accumulation_steps=2 --learning_rate=1e-4
    --lr_scheduler=linear --lr_warmup_steps=500 --adam_beta1=0.9 --adam_beta2=0.99 --adam_weight_decay=1e-5
    --adam_epsilon=1e-7 --use_ema --ema_inv_gamma=2.0 --ema_power=0.6 --ema_max_decay=0.999 --push_to_hub
    --hub_token=secret --hub_model_id=me/model --hub_private_repo --logger=wandb --logging_dir=tracks --local_rank=0
    --mixed_precision=bf16 --prediction_type=sample --ddpm_num_steps=500 --ddpm_num_inference_steps=100
    --ddpm_beta_schedule=scaled_linear --checkpointing_steps=50 --checkpoints_total_limit=3
    --resume_from_checkpoint=latest --preserve_input_precision --enable_xformers_memory_efficient_attention
""".split()


def test_a_command_line_of_diffusers_is_understood():
    config = parse_arguments(DIFFUSERS_COMMAND_LINE)
    options = config.public_dict() | {"hub_token": config.output.hub_token}
    for argument in DIFFUSERS_COMMAND_LINE:
        name, _, value = argument.removeprefix("--").partition("=")
        actual = options[name]
        assert actual == (type(actual)(value) if value else True), name


def test_defaults_are_those_of_diffusers():
    options = parse_arguments(["--train_data_dir", "images"]).public_dict()
    expected = {
        "resolution": 64,
        "train_batch_size": 16,
        "num_epochs": 100,
        "learning_rate": 1e-4,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 500,
        "adam_beta1": 0.95,
        "adam_weight_decay": 1e-6,
        "ema_power": 0.75,
        "use_ema": False,
        "checkpointing_steps": 500,
        "ddpm_num_steps": 1000,
    }
    assert {name: options[name] for name in expected} == expected


def test_without_data_the_recipe_for_digits_gives_the_defaults():
    recipe = load_options(recipes()["digits"])
    for arguments in ([], ["--dataset_name", "digits"]):
        config = parse_arguments([*arguments, "--learning_rate", "0.5", "--use_ema", "False"])
        assert config == TrainingConfig.from_flat(**recipe | {"learning_rate": 0.5, "use_ema": False})


def test_the_saved_record_is_a_configuration_without_the_token(tmp_path):
    config = parse_arguments(["--hub_token", "secret", "--block_out_channels", "32", "32", "64"])
    (tmp_path / "run.yaml").write_text(as_yaml(config))
    assert "secret" not in (tmp_path / "run.yaml").read_text()
    again = parse_arguments(["--config", str(tmp_path / "run.yaml"), "--hub_token", "secret"])
    assert again == config


def test_errors_say_what_to_do(tmp_path):
    for text, words in (
        ("learning_rat: 1", "unknown options: learning_rat"),
        ("- 1", "must hold 'option: value' lines"),
        ("a: [", "not valid YAML: line 1: expected the node content"),
        ("seed: 1\nseed: 2", "not valid YAML: line 2: 'seed' stands there twice"),
        ("? [1]\n: 2", "not valid YAML"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UsageError, match=words):
            parse_arguments(["--config", str(tmp_path / "bad.yaml")])
    with pytest.raises(UsageError, match="config must be text"):
        configure({"config": {"seed": 1}})
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(["--learning_rat", "1"])
    with pytest.raises(UsageError, match="cannot read the configuration"):
        parse_arguments(["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(UsageError, match="seed must be at least 0, but is -1"):
        parse_arguments(["--seed", "-1"])
    with pytest.raises(UsageError, match="train_batch_size must be at least 1, but is 0"):
        parse_arguments(["--train_batch_size", "0"])
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({"mixed_precision": "fp8"}))
    with pytest.raises(UsageError, match="mixed_precision must be one of no, fp16, bf16"):
        parse_arguments(["--config", str(tmp_path / "bad.yaml")])


@pytest.mark.parametrize(("resolution", "parameters"), [(8, 1.0e6), (32, 36e6), (64, 114e6)])
def test_default_unets_fit_their_resolution(resolution, parameters):
    unet = build_unet(ModelOptions(), resolution, channels=3, num_classes=None)
    assert resolution % unet.downsampling_factor == 0
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(parameters, rel=0.05)


def test_a_model_configuration_becomes_the_same_unet_with_dia(tmp_path):
    from diffusers import UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=7,
    )
    unet.save_pretrained(tmp_path / "unet")
    for path in (tmp_path, tmp_path / "unet", tmp_path / "unet" / "config.json"):
        options = ModelOptions(model_config_name_or_path=str(path), dia_attention="se", layers_per_block=1)
        built = build_unet(options, 16, channels=1, num_classes=3)
        assert built.config.down_block_types == ["DownBlock2D", "AttnDownBlock2D"]
        given = ("sample_size", "in_channels", "num_class_embeds", "dia_attention", "layers_per_block")
        assert [built.config[name] for name in given] == [16, 1, 4, "se", 1]
    with pytest.raises(UsageError, match="cannot read a UNet configuration"):
        build_unet(ModelOptions(model_config_name_or_path=str(tmp_path / "none")), 64, 3, None)
    with pytest.raises(UsageError, match="resolution 10 does not fit"):
        build_unet(ModelOptions(block_out_channels=[32, 32, 32]), 10, 3, None)


def test_any_argument_of_unet2dmodel_can_be_given(tmp_path):
    text = "{norm_num_groups: 4, down_block_types: [AttnDownBlock2D, DownBlock2D]}"
    config = parse_arguments(["--unet_arguments", text, "--block_out_channels", "8", "16"])
    unet = build_unet(config.model, 64, 1, None)
    assert unet.conv_norm_out.num_groups == 4
    assert unet.config.down_block_types == ["AttnDownBlock2D", "DownBlock2D"]
    (tmp_path / "run.yaml").write_text(as_yaml(config))
    assert parse_arguments(["--config", str(tmp_path / "run.yaml")]) == config
    for text, words in (
        ("[1", "unet_arguments must be a mapping"),
        ("7", "unet_arguments must be a mapping"),
        ("{norm_groups: 4}", "UNet2DModel has no argument 'norm_groups'.*norm_num_groups"),
        ("{dropout: 0.1}", "may not hold 'dropout': it has a flag of its own"),
        ("{in_channels: 3}", "may not hold 'in_channels'"),
    ):
        with pytest.raises(UsageError, match=words):
            build_unet(parse_arguments(["--unet_arguments", text]).model, 8, 1, None)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("learning_rate", -1, "at least 0"),
        ("learning_rate", "nan", "a number, but is 'nan'"),
        ("learning_rate", True, "a number, but is 'True'"),
        ("learning_rate", None, "has no value"),
        ("adam_beta1", 1, "below 1"),
        ("adam_beta2", -0.1, "at least 0"),
        ("adam_weight_decay", -1, "at least 0"),
        ("adam_epsilon", -1, "above 0"),
        ("dataloader_num_workers", -1, "at least 0"),
        ("layers_per_block", 0, "at least 1"),
        ("block_out_channels", [0, 8], "at least 1, but is 0"),
        ("block_out_channels", 8, "a list"),
        ("lr_scheduler", "piecewise_constant", "one of linear, cosine"),
        ("snr_gamma", 0, "above 0"),
        ("snr_gamma", float("inf"), "a number, but is 'inf'"),
        ("dropout", 1.5, "below 1"),
        ("label_dropout", 2, "at most 1"),
        ("ema_max_decay", 2, "at most 1"),
        ("lr_warmup_steps", -1, "at least 0"),
        ("ddpm_num_steps", 1, "at least 2"),
        ("score_num_images", 1, "at least 2"),
        ("seed", 2**64, "at most 18446744073709551615"),
        ("max_train_steps", 1.5, "a whole number, but is '1.5'"),
        ("max_train_steps", [100], "a whole number"),
        ("use_ema", "perhaps", "true or false"),
        ("train_data_dir", "", "is empty: give a value, or leave the option out"),
        ("output_dir", 2024, "text"),
        ("channels", 2, "one of 1, 3"),
    ],
)
def test_a_value_out_of_its_range_or_type_is_refused(name, value, words):
    with pytest.raises(UsageError, match=f"{name} .*{words}"):
        TrainingConfig.from_flat(**{name: value})


def test_every_number_has_its_range():
    from typing import get_type_hints

    from dia_diffusion.options.training import PARTS

    hints = {name: hint for part in PARTS.values() for name, hint in get_type_hints(part, include_extras=True).items()}
    numbers = [name for name, hint in hints.items() if {"int", "float"} & set(re.findall(r"\w+", str(hint)))]
    assert len(numbers) > 35
    assert [name for name in numbers if "Range(" not in str(hints[name])] == []


def test_numbers_of_yaml_that_look_like_text_or_fractions_are_numbers(tmp_path):
    text = "max_train_steps: 1.0e+4\nlearning_rate: 1e-3\nlr_warmup_steps: 1e2\nmixed_precision: no\noutput_dir: ~/x\n"
    text += "use_ema: 'yes'\n"
    (tmp_path / "run.yaml").write_text(text)
    options = parse_arguments(["--config", str(tmp_path / "run.yaml")]).public_dict()
    names = ("max_train_steps", "learning_rate", "lr_warmup_steps", "mixed_precision", "output_dir", "use_ema")
    assert [options[name] for name in names] == [10_000, 1e-3, 100, "no", str(Path.home() / "x"), True]
    assert type(options["max_train_steps"]) is int


@pytest.mark.parametrize(
    ("arguments", "steps", "epochs"),
    [
        ([], 2500, 100),
        (["--num_epochs", "5"], None, 5),
        # Equal to the default, and given nevertheless.
        (["--num_epochs", "100"], None, 100),
        (["--num_epochs", "5", "--max_train_steps", "7"], 7, 5),
    ],
)
def test_epochs_that_were_given_count_more_than_the_steps_of_the_recipe(arguments, steps, epochs, capsys):
    options = parse_arguments(arguments).optimisation
    assert (options.max_train_steps, options.num_epochs) == (steps, epochs)
    assert ("max_train_steps 7 counts, and not num_epochs 5" in capsys.readouterr().out) == (steps == 7)


def test_the_choice_of_the_launcher_counts_unless_the_flag_is_given(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    options = parse_arguments([]).optimisation
    assert (options.mixed_precision, options.gradient_accumulation_steps) == ("bf16", 4)
    options = parse_arguments(["--mixed_precision", "no", "--gradient_accumulation_steps", "1"]).optimisation
    assert (options.mixed_precision, options.gradient_accumulation_steps) == ("no", 1)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UsageError, match="mixed_precision must be one of no, fp16, bf16, but is 'fp8'"):
        parse_arguments([])


def test_the_timestep_condition_is_switched_as_before():
    for words, value in (
        ([], True),
        (["--dia_time_conditioned"], True),
        (["--dia_time_conditioned", "false"], False),
        (["--no_dia_time_conditioned"], False),
        (["--no-dia-time-conditioned"], False),
    ):
        assert parse_arguments(words).model.dia_time_conditioned is value


def test_the_home_of_the_user_is_found_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    names = (
        "dataset_name train_data_dir cache_dir model_config_name_or_path init_from output_dir resume_from_checkpoint "
        "score_features"
    ).split()
    options = parse_arguments([word for name in names for word in (f"--{name}", "~/place")]).public_dict()
    assert {name: options[name] for name in names} == dict.fromkeys(names, "/home/someone/place")


def test_the_present_folder_has_a_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert parse_arguments(["--output_dir", "."]).output.folder.name == tmp_path.name


def test_a_way_to_compile_without_compiling_is_refused():
    with pytest.raises(UsageError, match="compile_mode reduce-overhead has no effect without --compile: add it"):
        TrainingConfig.from_flat(compile_mode="reduce-overhead")


DATA = ["--train_data_dir", "images"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--label_dropout 0.2", "label_dropout has no effect without --class_conditional"),
        ("--label_column kind", "label_column has no effect without --class_conditional"),
        ("--score_num_images 9", "without --score_features: leave it out, or add --score_features"),
        ("--eval_num_images 9 --score_features pixels", "eval_num_images has no effect without --eval_steps"),
        ("--compile_mode default", "without --compile"),
        ("--lr_num_cycles 2", "without --lr_scheduler cosine_with_restarts"),
        ("--lr_power 2 --lr_scheduler cosine", "without --lr_scheduler polynomial"),
        ("--objective flow --weighting_scheme none --logit_std 2", "with --weighting_scheme none"),
        ("--dia_attention none --dia_hidden_size 8 --dia_init paper", "dia_hidden_size and dia_init have no effect"),
        ("--dia_attention se --dia_sharing block --dia_hidden_size 8", "without --dia_sharing network"),
        ("--dia_attention eca --dia_reduction 2", "on an attention without bottlenecks"),
        ("--dia_init paper --dia_gate_slope 2", "with --dia_init paper"),
        ("--dia_attention se --dia_time_conditioned", "without --dia_attention lstm or time"),
    ],
)
def test_an_option_without_effect_is_refused(given, words):
    with pytest.raises(UsageError) as raised:
        parse_arguments([*DATA, *given.split()])
    assert words in str(raised.value)


def test_options_of_diffusers_and_of_files_without_effect_are_mentioned(tmp_path, capsys):
    config = parse_arguments([*DATA, "--ema_power", "0.5", "--hub_model_id", "me/x", "--lr_scheduler", "constant"])
    assert config.remarks == [
        "ema_power: no effect without --use_ema.",
        "hub_model_id: no effect without --push_to_hub.",
    ]
    assert capsys.readouterr().out.splitlines() == config.remarks
    (tmp_path / "run.yaml").write_text("train_data_dir: images\nscore_num_images: 9\nlabel_dropout: 0.1\n")
    config = parse_arguments(["--config", str(tmp_path / "run.yaml")])
    assert config.remarks == ["score_num_images: no effect without --score_features."]


def test_the_record_of_a_run_brings_no_remarks(tmp_path):
    for arguments in (
        [],
        DATA,
        [*DATA, "--dia_attention", "none"],
        ["--objective", "edm"],
        ["--recipe", "images", *DATA],
    ):
        (tmp_path / "run.yaml").write_text(as_yaml(config := parse_arguments(arguments)))
        again = parse_arguments(["--config", str(tmp_path / "run.yaml")])
        assert (again, again.remarks) == (config, [])


def test_a_recipe_sets_what_is_not_given_and_says_so(tmp_path):
    config = parse_arguments(["--recipe", "images", *DATA, "--learning_rate", "1e-4", "--no_random_flip"])
    options = config.flat()
    assert (options["learning_rate"], options["random_flip"], options["use_ema"]) == (1e-4, False, True)
    assert options["validation_split"] == 0.1
    assert options["resnet_time_scale_shift"] == "scale_shift"
    assert (options["prediction_type"], options["ddpm_beta_schedule"]) == ("v_prediction", "squaredcos_cap_v2")
    line = config.remarks[0]
    assert line.startswith("Recipe images: validation_split 0.1, ")
    assert "learning_rate" not in line
    assert "random_flip" not in line
    assert config.recipe == "images"
    # Of another objective, of a model that is named, of data that are named.
    edm = parse_arguments(["--recipe", "images", *DATA, "--objective", "edm"])
    assert edm.flat()["use_ema"]
    assert any("left out: prediction_type v_prediction" in remark for remark in edm.remarks)
    assert parse_arguments(["--recipe", "images", *DATA, "--init_from", "m"]).model.resnet_time_scale_shift is None
    assert parse_arguments(["--recipe", "digits", *DATA]).data.dataset_name is None
    # A file; one that is not there.
    (tmp_path / "mine.yaml").write_text("learning_rate: 3e-3")
    assert parse_arguments(["--recipe", str(tmp_path / "mine.yaml"), *DATA]).optimisation.learning_rate == 3e-3
    with pytest.raises(UsageError, match=r"no recipe 'image'\. Choose one of: diffusers, digits, images"):
        parse_arguments(["--recipe", "image", *DATA])


def test_the_recipe_of_diffusers_is_what_one_gets_without_any():
    assert parse_arguments(["--recipe", "diffusers", *DATA]) == parse_arguments(DATA)
    assert parse_arguments(["--recipe", "diffusers", "--dataset", "digits"]).data.resolution == 64


def test_a_file_counts_more_than_a_recipe_and_a_flag_more_than_a_file(tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rate: 1e-2\nadam_beta1: 0.5\ndataset: mnist5k")
    arguments = ["--config", str(tmp_path / "run.yaml"), "--recipe", "images", "--adam_beta1", "0.6"]
    config = parse_arguments(arguments)
    assert (config.optimisation.learning_rate, config.optimisation.adam_beta1) == (1e-2, 0.6)
    assert config.optimisation.use_ema
    assert config.data.dataset_name == "mnist5k"
    data = parse_arguments([*arguments, "--train_data_dir", "x"]).data
    assert (data.dataset_name, data.train_data_dir) == (None, "x")


def test_names_of_the_data_and_ways_to_write_a_flag():
    for words in (["--dataset_name", "x"], ["--dataset", "x"], ["--dataset-name=x"]):
        assert parse_arguments(words).data.dataset_name == "x"
    for words, value in (
        (["--use_ema"], True),
        (["--use-ema", "yes"], True),
        (["--use_ema=0"], False),
        (["--no_use_ema"], False),
        (["--use_ema", "--no-use-ema"], False),
    ):
        assert parse_arguments([*DATA, *words]).optimisation.use_ema is value


def test_help_shows_the_usual_options_in_groups_and_the_rest_behind_help_all(capsys):
    pages = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit, match="0"):
            parse_arguments([flag])
        pages[flag] = capsys.readouterr().out
    listed = {flag: set(re.findall(r"^  --(\w+)", page, re.M)) for flag, page in pages.items()}
    assert listed["--help_all"] - {"help_all", "recipes"} == OPTION_NAMES | {"recipe", "config"}
    assert {"learning_rate", "train_data_dir", "dia_attention"} <= listed["--help"]
    assert not listed["--help"] & {"adam_epsilon", "local_rank", "hub_token"}
    groups = re.findall(r"^(\w+):$", pages["--help_all"], re.M)
    assert groups == "recipe data model attention objective optimisation output Hub general".split()
    for line in ("(default: 0.0001)", "(default: lstm)", "(default: epsilon)", "(default: 64)"):
        assert line in re.sub(r"\s+", " ", pages["--help"])
