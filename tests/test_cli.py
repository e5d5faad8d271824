"""The command lines as a user meets them."""

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.cli import main, train_main
from tiny_unets import GREY

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from diffusers import DDIMScheduler

    folder = tmp_path_factory.mktemp("model")
    unet = DIAUNet2DModel(**GREY | {"block_out_channels": (32, 32), "norm_num_groups": 8}, num_class_embeds=11)
    # Makes the class matter as it does in a trained model.
    for block in [module for module in unet.modules() if hasattr(module, "time_emb_proj")]:
        torch.nn.init.normal_(block.time_emb_proj.weight)
    DIAUNetPipeline(unet, DDIMScheduler()).save_pretrained(folder)
    return str(folder)


def images_in(folder):
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]


def test_sample_writes_numbered_images_and_a_grid_beside_them(model, tmp_path):
    options = ["--steps", "2", "--num_images", "5", "--seed", "3"]
    assert main(["sample", model, *options, "--output_dir", str(tmp_path / "a")]) == 0
    assert main(["sample", model, *options, "--output_dir", str(tmp_path / "b"), "--batch_size", "2"]) == 0
    expected = ["00000.png", "00001.png", "00002.png", "00003.png", "00004.png"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == expected
    assert (tmp_path / "a.png").is_file()
    for one, other in zip(images_in(tmp_path / "a"), images_in(tmp_path / "b"), strict=True):
        assert one.shape == (8, 8)
        assert np.abs(one.astype(int) - other).max() <= 1


def test_a_full_disk_and_a_folder_that_refuses_are_named(model, tmp_path, capsys):
    arguments = ["sample", model, "--steps", "1", "--num_images", "1", "--output_dir"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    try:
        assert main([*arguments, str(tmp_path / "a")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"'{tmp_path / 'a' / '00000.png'}'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main([*arguments, "/proc/1/a"]) == 2
    assert "nothing can be written in '/proc/1'" in capsys.readouterr().err


def test_names_that_people_try_first(model, tmp_path, capsys):
    options = ["--seed", "3", "--output_dir"]
    assert main(["sample", model, "--steps", "2", "--num_images", "3", *options, str(tmp_path / "a")]) == 0
    assert main(["generate", model, "--num_inference_steps", "2", "--n", "3", *options, str(tmp_path / "b")]) == 0
    for one, other in zip(images_in(tmp_path / "a"), images_in(tmp_path / "b"), strict=True):
        assert np.array_equal(one, other)
    assert main(["eval", str(tmp_path / "a"), "--metrics", "none"]) == 2
    assert "no metric named 'none'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("dia-diffusion 0.2.0")


@pytest.mark.parametrize("command", [["-m", "dia_diffusion.train"], ["-m", "dia_diffusion.cli", "train"]])
def test_training_from_the_installed_package(command, tmp_path):
    """Not from a clone, in which train_unet.py lies: the options and the mistakes are its own."""
    options = ["--max_train_steps", "2", "--learning_rate", "-1", "--output_dir", str(tmp_path / "run")]
    ended = subprocess.run([sys.executable, *command, *options], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.endswith("error: learning_rate must be at least 0, but is -1.0.\n")


def test_sample_takes_a_class_and_a_scheduler(model, tmp_path):
    for name, options in {
        "any": [],
        "four": ["--class_label", "4"],
        "dpm": ["--scheduler", "dpm"],
        "guided": ["--class_label", "4", "--guidance_scale", "3"],
    }.items():
        options = [*options, "--steps", "3", "--num_images", "2", "--output_dir", str(tmp_path / name)]
        assert main(["sample", model, *options]) == 0
    pictures = {name: np.stack(images_in(tmp_path / name)).tobytes() for name in ("any", "four", "dpm", "guided")}
    assert len(set(pictures.values())) == 4


def test_a_folder_of_samples_holds_those_of_one_call(model, tmp_path, capsys):
    options = ["--steps", "1", "--output_dir", str(tmp_path / "out")]
    assert main(["sample", model, *options, "--num_images", "3"]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for more in ([], ["--overwrite", "--class_label", "12"], ["--overwrite", "--scheduler", "fast"]):
        assert main(["sample", model, *options, "--num_images", "2", "--seed", "1", *more]) == 2
        assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert "holds 3 samples already" in capsys.readouterr().err
    assert main(["sample", model, *options, "--num_images", "2", "--seed", "1", "--overwrite"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000.png", "00001.png"]
    (tmp_path / "out" / "thesis.txt").write_text("")
    assert main(["sample", model, *options, "--num_images", "1", "--overwrite"]) == 2
    assert "holds other files than samples (thesis.txt)" in capsys.readouterr().err
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_a_class_goes_by_its_name_or_number(model, tmp_path, capsys):
    pipeline = DIAUNetPipeline.from_pretrained(model)
    names = {number: str(10 * number) if number < 3 else f"class {number}" for number in range(10)}
    DIAUNetPipeline(pipeline.unet, pipeline.scheduler, names).save_pretrained(tmp_path / "named")
    assert DIAUNetPipeline.from_pretrained(tmp_path / "named").class_names == list(names.values())
    for label, number in (("class 4", 4), ("4", 4), ("10", 1), ("0", 0)):
        options = ["--steps", "1", "--num_images", "1", "--output_dir", str(tmp_path / "out"), "--overwrite"]
        assert main(["sample", str(tmp_path / "named"), *options, "--class_label", label]) == 0
        assert f"of class {number} ({names[number]}) from" in capsys.readouterr().out
        given = images_in(tmp_path / "out")[0]
        assert main(["sample", model, *options, "--class_label", str(number)]) == 0
        assert np.array_equal(images_in(tmp_path / "out")[0], given)
    assert main(["sample", str(tmp_path / "named"), *options, "--class_label", "cat"]) == 2
    assert "no class named 'cat'; its classes are: 0, 10, 20, class 3" in capsys.readouterr().err


def lonely(tmp_path):
    """A folder of 10x10 images, and one without any."""
    (tmp_path / "images").mkdir()
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (10, 10)).save(tmp_path / "images" / "a.png")
    return str(tmp_path / "images"), str(tmp_path / "empty")


def test_mistakes_end_with_status_2_and_a_line_that_says_what_to_do(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, empty = lonely(tmp_path)
    cases = [
        (train_main, ["--dia_attention", "sse"], "Choose one of: lstm, se"),
        (train_main, ["--dia_sharing", "block"], "Use sharing 'network' or 'level'"),
        (
            train_main,
            ["--train_data_dir", images, "--resolution", "10", "--block_out_channels", "32", "32", "32"],
            "choose a multiple of 4",
        ),
        (train_main, ["--train_data_dir", empty], "cannot load images from"),
        (train_main, ["--dataset_name", "no/such_data"], "cannot load images from 'no/such_data'"),
        (train_main, ["--train_data_dir", images, "--image_column", "photo"], "Its columns are: image (Image)"),
        (main, ["sample", empty], "has no model_index.json"),
        (main, ["sample", "no/such_model"], "cannot load a pipeline from 'no/such_model'"),
        (main, ["sample", model, "--scheduler", "fast"], "Choose one of: ddpm"),
        (main, ["sample", model, "--class_label", "12"], "must lie between 0 and 10"),
        (main, ["sample", model, "--device", "cuda:99"], "cuda:99"),
        (main, ["evaluate", model], "does not record which data it was trained on: name the data to compare with"),
        (main, ["evaluate", model, "--dataset", "digits", "--metrics", "fiddle"], "choose from: fid"),
        (main, ["evaluate", model, "--dataset", "digits", "--features", "inception9"], "'inception9' is neither"),
        (main, ["evaluate", model, "--dataset", empty], "name the features to compare in: --features digits"),
        (main, ["evaluate", model, "--dataset", empty, "--features", "pixels"], "cannot load images from"),
    ]
    for function, arguments, words in cases:
        assert function(arguments) == 2, arguments
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ") or words in line]
        assert len(errors) == 1, arguments
        assert words in errors[0]
        assert len(errors[0]) < 400


def run_and_list_imports(*arguments):
    """A real `dia` command: its process, what it wrote to stderr, and the packages that it imported."""
    command = [sys.executable, "-X", "importtime", "-m", "dia_diffusion.cli", *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    lines = run.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in lines if line.startswith("import time:")}
    return run, [line for line in lines if not line.startswith("import time:")], imported


def test_a_mistake_shows_no_traceback_and_imports_no_more_than_sampling_needs():
    run, errors, imported = run_and_list_imports("sample", "nowhere")
    assert run.returncode == 2
    assert not any("Traceback" in line for line in errors)
    assert errors[-1].startswith("error: cannot load a pipeline from 'nowhere'")
    assert {"torch", "diffusers"} <= imported
    assert not imported & {"datasets", "matplotlib", "torchmetrics", "sklearn", "tensorboard"}


REFUSED = [
    ["train", "--lable_dropout", "0.2"],
    ["train", "--train_data_dir", "tests", "--label_dropout", "0.2"],
    ["train", "--dia_attention", "sse"],
    ["train", "--objective", "edm", "--snr_gamma", "5"],
    ["train", "--ddpm_num_steps", "10"],
    ["sample", "m", "--steps", "0"],
    ["evaluate", "tests", "--seed", "1"],
    ["study", "s.yaml", "--cpus_per_run", "2"],
    ["train", "--train_data_dir", "~nobody/photos"],
    ["sample", "m", "--guide", "g"],
    ["evaluate", "m", "--metrics", "fid,kdi"],
]
HELP = [
    ["--help"],
    ["train", "--recipes"],
    *([name, "--help"] for name in "train sample evaluate analyze app study".split()),
]


@pytest.mark.parametrize("arguments", HELP + REFUSED, ids=" ".join)
def test_help_and_refusals_wait_for_no_heavy_import(arguments):
    run, errors, imported = run_and_list_imports(*arguments)
    assert run.returncode == (2 if arguments in REFUSED else 0)
    if arguments in REFUSED:
        assert "error: " in errors[-1]
    else:
        assert run.stdout
        assert (
            f"usage: dia{'' if arguments == ['--help'] else ' ' + arguments[0]} " in run.stdout
            or "--recipes" in arguments
        )
    assert "argparse" in imported
    assert not imported & {"torch", "scipy", "diffusers", "transformers", "datasets", "accelerate", "matplotlib"}


def test_the_package_lists_its_classes_before_it_imports_them():
    code = "import sys, dia_diffusion; print('DIAUNet2DModel' in dir(dia_diffusion), 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True False\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "m", "--steps", "-1"], "error: steps must be at least 1, but is -1"),
        (["sample", "m", "--num_images", "0"], "error: num_images must be at least 1"),
        (["sample", "m", "--seed", "-1"], "error: seed must be at least 0"),
        (["sample", "m", "--guidance_scale", "nan"], "error: guidance_scale must be a number, but is 'nan'"),
        (["evaluate", "m", "--batch_size", "1.5"], "error: batch_size must be a whole number, but is '1.5'"),
        (["analyze", "m", "--num_timesteps", "0"], "error: num_timesteps must be at least 1"),
        (["study", "s.yaml", "--jobs", "0"], "error: jobs must be at least 1"),
    ],
)
def test_a_number_out_of_its_range_is_refused_where_it_is_read(arguments, words, capsys):
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta"])
def test_a_device_that_does_not_compute_is_refused(device, model, tmp_path, capsys):
    for command in ("sample", "evaluate", "analyze"):
        data = [] if command == "sample" else ["--dataset", "digits"]
        assert main([command, model, *data, "--device", device]) == 2
        assert f"error: --device {device} cannot be used here" in capsys.readouterr().err
    assert main(["evaluate", lonely(tmp_path)[0], "--dataset", "digits", "--device", device]) == 2


def save_pipeline(folder, sample_size=8, out_channels=3, **scheduler):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=sample_size,
        out_channels=out_channels,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
    )
    DDPMPipeline(unet, DDPMScheduler(**scheduler)).save_pretrained(folder)
    return str(folder)


def test_a_pipeline_that_learned_its_variance_is_sampled_as_diffusers_does(tmp_path, capsys):
    model = save_pipeline(tmp_path / "m", out_channels=6, variance_type="learned_range")
    options = ["--steps", "2", "--num_images", "4"]
    assert main(["sample", model, *options, "--output_dir", str(tmp_path / "out")]) == 0
    assert [image.shape for image in images_in(tmp_path / "out")] == [(8, 8, 3)] * 4
    assert main(["evaluate", model, *options, "--dataset", "digits", "--features", "pixels", "--metrics", "fid"]) == 0
    assert main(["sample", model, *options, "--scheduler", "ddim"]) == 2
    assert "predicts the variance besides the noise, which DDIMScheduler cannot use" in capsys.readouterr().err


def test_a_pipeline_that_does_not_say_its_size_is_refused_by_all_commands(tmp_path, capsys):
    model = save_pipeline(tmp_path / "m", sample_size=None)
    for command in ("sample", "evaluate", "analyze"):
        assert main([command, model, *([] if command == "sample" else ["--dataset", "digits"])]) == 2
        assert "set sample_size in its unet/config.json" in capsys.readouterr().err


def test_the_home_of_the_user_is_found_by_the_commands(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(Path(model).parent))
    options = ["--steps", "1", "--num_images", "1", "--output_dir", "~/pictures"]
    assert main(["sample", f"~/{Path(model).name}", *options]) == 0
    assert len(images_in(Path(model).parent / "pictures")) == 1
