"""What was probably meant."""

from dataclasses import fields

import pytest
import yaml

from dia_diffusion.cli import main, train_main
from dia_diffusion.errors import UsageError, nearest
from dia_diffusion.options import parser
from dia_diffusion.options.commands import AnalyzeOptions, AppOptions, EvaluateOptions, SampleOptions, StudyOptions
from dia_diffusion.options.training import OPTION_NAMES, parse_arguments

COMMANDS = (SampleOptions, EvaluateOptions, AnalyzeOptions, AppOptions, StudyOptions)


def test_the_nearest_is_named_where_one_is_near():
    known = ["ddim", "dpm_sde", "euler"]
    assert nearest("DDIN", known) == " Did you mean 'ddim'?"
    assert nearest("dpm-sde", known) == " Did you mean 'dpm_sde'?"
    assert nearest("unipc", known) == ""
    assert nearest(7, []) == ""


@pytest.mark.parametrize(
    ("arguments", "usage", "meant"),
    [
        (["smaple", "m"], "dia", "sample"),
        (["--verison"], "dia", "--version"),
        (["sample", "m", "--stepz", "5"], "dia sample", "--steps"),
        (["generate", "m", "--num-inference-step=5"], "dia sample", "--num_inference_steps"),
        (["evaluate", "m", "--metric-s", "fid"], "dia evaluate", "--metrics"),
        (["analyze", "m", "--num_timestep_s", "5"], "dia analyze", "--num_timesteps"),
        (["study", "s.yaml", "--jobz", "3"], "dia study", "--jobs"),
        (["train", "--learning_rat", "3"], "dia train", "--learning_rate"),
        (["train", "--prediction_type", "epsilom"], "dia train", "epsilon"),
        (["train", "--lr", "1"], "dia train", "--learning_rate"),
        (["train", "--batch_size", "8"], "dia train", "--train_batch_size"),
        (["train", "--batch-size=8"], "dia train", "--train_batch_size"),
        (["train", "--epochs", "8"], "dia train", "--num_epochs"),
        (["train", "--image-size", "8"], "dia train", "--resolution"),
        (["sample", "m", "--num_samples", "8"], "dia sample", "--num_images"),
        (["sample", "m", "--sampler", "ddim"], "dia sample", "--scheduler"),
        (["evaluate", "m", "--reference", "x"], "dia evaluate", "--dataset"),
    ],
)
def test_a_mistyped_option_command_or_choice_names_the_nearest(arguments, usage, meant, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].endswith(f"Did you mean '{meant}'?")
    assert lines[0].startswith(f"usage: {usage}")


def test_what_stands_too_much_is_refused_and_no_command_shows_the_help(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["sample", "a", "b"])
    assert capsys.readouterr().err.endswith("unrecognized arguments: b.\n")
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("function", "arguments", "meant"),
    [
        (train_main, ["--dataset_name", "digts", "--max_train_steps", "1"], "digits"),
        (train_main, ["--train_data_dir", "./picturs"], "pictures"),
        (train_main, ["--unet_arguments", "{norm_num_group: 8}", "--max_train_steps", "1"], "norm_num_groups"),
        (main, ["sample", "pictuers"], "pictures"),
        (main, ["evaluate", "pictures", "--metrics", "fib"], "fid"),
        (main, ["evaluate", "pictures", "--dataset", "pictures", "--features", "inceptoin"], "inception"),
    ],
)
def test_a_mistyped_name_in_a_command_names_the_nearest(function, arguments, meant, tmp_path, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "pictures" / "a.png")
    assert function(arguments) == 2
    assert capsys.readouterr().err.endswith(f"Did you mean '{meant}'?\n")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ({"learning_rat": 1}, "learning_rate"),
        ({"train_data_dri": "x"}, "train_data_dir"),
        ({"prediction_type": "epsilom"}, "epsilon"),
        ({"lr": 1}, "learning_rate"),
    ],
)
def test_a_mistyped_line_of_a_configuration_names_the_nearest(text, meant, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(text))
    with pytest.raises(UsageError, match=f"Did you mean '{meant}'"):
        parse_arguments(["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize(
    ("changed", "meant"), [({"sedes": [1]}, "seeds"), ({"variants": {"a": {"learning_rat": 1}}}, "learning_rate")]
)
def test_a_mistyped_line_of_a_study_names_the_nearest(changed, meant, tmp_path, capsys):
    study = {"baseline": "a", "seeds": [0], "variants": {"a": {}}, "common": {"max_train_steps": 1}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study | changed))
    assert main(["study", str(tmp_path / "study.yaml"), "--output_dir", str(tmp_path / "out")]) == 2
    assert f"Did you mean '{meant}'?" in capsys.readouterr().err


def test_synonyms_stand_for_options_that_there_are():
    known = OPTION_NAMES | {item.name for part in COMMANDS for item in fields(part)}
    assert {option for meant in parser._MEANINGS.values() for option in meant} <= known
