"""What an example cannot do is refused in words, before the work begins."""

import pytest

CLASSIFY = "image_classification"


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        *((CLASSIFY, [flag, "0"], f"argument {flag}: it must be at least 1, but is 0.") for flag in
          ("--resolution", "--depth", "--epochs", "--batch_size")),
        (CLASSIFY, ["--learning_rate", "-1"], "argument --learning_rate: it must be at least 0, but is -1."),
        (CLASSIFY, ["--weight_decay", "-1"], "argument --weight_decay: it must be at least 0, but is -1."),
        (CLASSIFY, ["--branch_scale", "nan"], "argument --branch_scale: it must be a number, but is 'nan'."),
        (CLASSIFY, ["--seed", str(2**32)], f"argument --seed: it must be at most {2**32 - 1}, but is {2**32}."),
        ("object_detection", ["--steps", "0"], "argument --steps: it must be at least 1, but is 0."),
        ("object_detection", ["--test_pictures", "1e9.5"], "it must be a whole number, but is '1e9.5'."),
        ("text_to_image", ["--steps", "-1"], "it must be at least 0, but is -1."),
        ("text_to_image", ["--sampling_steps", "-3"], "it must be at least 1, but is -3."),
    ],
)  # fmt: skip
def test_numbers(example, capsys, script, arguments, words):
    with pytest.raises(SystemExit) as refusal:
        example(script).main(arguments)
    assert refusal.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("script", [CLASSIFY, "object_detection", "text_to_image"])
def test_a_folder_that_cannot_be_made(example, capsys, tmp_path, script):
    (tmp_path / "file").write_text("kept")
    for place in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(SystemExit) as refusal:
            example(script).main(["--output_dir", str(place)])
        assert refusal.value.code == 2
        assert f"'{tmp_path / 'file'}' is a file, and a folder is needed there" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "kept"


def test_a_pipeline_that_cannot_be_loaded(example, capsys, tmp_path):
    arguments = ["--model", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "runs")]
    assert example("text_to_image").main(arguments) == 2
    assert f"--model '{tmp_path / 'nowhere'}' cannot be loaded as a pipeline" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
