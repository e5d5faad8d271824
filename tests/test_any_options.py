"""Whatever is given to a command: it runs, or says in words what is wrong before it begins, with exit status 2.

`DIA_EXAMPLES=300` tries more combinations than the few of every test run.
"""

import contextlib
import io
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from diffusers import DDPMScheduler
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from PIL import Image

from dia_diffusion import DIAUNet2DModel, DIAUNetPipeline
from dia_diffusion.cli import main, train_main
from dia_diffusion.options.training import OPTION_NAMES
from tiny_unets import GREY
from training_runs import TINY, fresh_state

EXAMPLES = int(os.environ.get("DIA_EXAMPLES", "8"))
TRIED = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="DIA_EXAMPLES" not in os.environ,
    database=None,
    # Shrinking would try hundreds of runs more.
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
# Not tried: the Hub, what compiles for minutes, and the folder that the test looks at.
LEFT_OUT = {"push_to_hub", "compile", "output_dir", "cache_dir"}
NUMBERS = [-1, 0, 1, 2, 3, 8, 0.5, 1.5, 1e-3, math.nan, math.inf, -math.inf]
TEXTS = ["", "foo", "yes", "no", "1e0", "~", "latest", "lstm", "se", "none", "block", "skip", "dia", "sigmoid", "bf16"]
# What reaches the rarer branches.
FITTING = {
    "block_out_channels": [[8, 16], [10, 20], [0, 8], [8], [32, 32, 32], [7, 9]],
    "unet_arguments": [
        "{norm_num_groups: 4}",
        "{norm_num_groups: 0}",
        "{attention_head_dim: 5, down_block_types: [AttnDownBlock2D, DownBlock2D]}",
        "{act_fn: foo}",
        "{time_embedding_type: learned}",
        "{time_embedding_type: fourier}",
        "{class_embed_type: timestep}",
        "{norm_eps: x}",
        "[1]",
    ],
    "lr_scheduler": ["piecewise_constant", "polynomial", "constant"],
    "dia_attention": ["eca", "srm", "cbam", "time"],
    "objective": ["edm", "flow"],
    "prediction_type": ["sample", "v_prediction"],
    "score_features": ["pixels"],
    "channels": [1, 3],
    # Which stands for the model itself.
    "guide": ["lstm"],
}


def values_of(name):
    kinds = [st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.booleans(), st.none(), st.just([1, 2])]
    return st.one_of(*([st.sampled_from(FITTING[name])] * 4 if name in FITTING else []), *kinds)


def options_of(names):
    chosen = st.lists(st.sampled_from(sorted(names)), min_size=1, max_size=3, unique=True)
    return chosen.flatmap(lambda names: st.fixed_dictionaries({name: values_of(name) for name in names}))


def as_flags(options):
    words = []
    for name, value in options.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def status_and_errors(command, arguments):
    """The exit status and what was written to stderr; anything that is raised is a traceback to a user."""
    errors = io.StringIO()
    fresh_state()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = command(arguments)
        except SystemExit as exit:  # argparse
            status = exit.code
    return status, errors.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 8), dtype=np.uint8)
    for number, image in enumerate(pixels):
        path = folder / f"class-{number % 2}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    unet = DIAUNet2DModel(**GREY, dia_hidden_size=8, num_class_embeds=3)
    DIAUNetPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    return folder


@TRIED
@given(options=options_of(OPTION_NAMES - LEFT_OUT), in_file=st.booleans())
def test_training_runs_or_says_why_not(images, options, in_file):
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        folder = Path(place) / "run"
        base = TINY | {"train_data_dir": str(images), "resolution": 8, "block_out_channels": [8, 8]}
        base |= {
            "max_train_steps": 2,
            "ddpm_num_inference_steps": 1,
            "eval_num_images": 8,
            "score_num_images": 8,
            "output_dir": str(folder),
        }
        Path("config.yaml").write_text(yaml.safe_dump(base | (options if in_file else {})))
        status, errors = status_and_errors(
            train_main, ["--config", "config.yaml", *([] if in_file else as_flags(options))]
        )
        event(f"status {status}")
        assert status in (0, 2), (options, errors)
        assert (folder / "model_index.json").exists() == (status == 0)
        if status == 2:
            assert "error: " in errors
            assert not (folder / "metrics.jsonl").exists() or "diverged" in errors, (options, errors)


COMMANDS = {
    "sample": "num_images steps scheduler seed batch_size guidance_scale guide device class_label",
    "evaluate": "num_images steps scheduler seed batch_size guidance_scale guide device metrics features dataset "
    "output report save_images image_column",
    "analyze": "num_images num_timesteps batch_size device dataset",
}


@TRIED
@given(
    drawn=st.sampled_from(sorted(COMMANDS)).flatmap(lambda c: st.tuples(st.just(c), options_of(COMMANDS[c].split())))
)
def test_dia_runs_or_says_why_not(model, images, drawn):
    command, options = drawn
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        base = {
            "sample": {"steps": 2, "num_images": 2},
            "evaluate": {"steps": 2, "num_images": 4, "features": "pixels"},
        }
        base |= {"analyze": {"num_images": 2, "num_timesteps": 2}}
        if options.get("guide") == "lstm":
            options["guide"] = str(model)
        options = base[command] | ({"dataset": images} if command != "sample" else {}) | options
        status, errors = status_and_errors(main, [command, str(model), *as_flags(options)])
        event(f"{command}: status {status}")
        assert status in (0, 2), (drawn, errors)
        if status == 2:
            assert "error: " in errors
            assert not list(Path(place).glob("**/*.png")), (options, errors)
