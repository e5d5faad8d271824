"""The update of the weights: schedules of the learning rate, the moving average, and the compiler."""

import math

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch._dynamo.utils import counters

from autoencoders import random_vae
from dia_diffusion import DIAUNet2DModel
from dia_diffusion.options.objective import OptimisationOptions
from dia_diffusion.options.training import TrainingConfig
from dia_diffusion.training import loop, state
from dia_diffusion.training.state import MovingAverage, TrainingState, remarks_on_schedule
from tiny_unets import GREY
from training_runs import assert_same_weights, fresh_state, run, weights


@pytest.fixture(autouse=True)
def fresh_accelerator():
    fresh_state()


def rates(steps, **options):
    options = OptimisationOptions(learning_rate=1.0, **options)
    training = TrainingState(options, Accelerator(cpu=True), DIAUNet2DModel(**GREY), steps)
    return [training.learning_rate(step) for step in range(1, steps + 1)]


def test_schedules_restart_and_have_powers():
    """The formulas, with step k counted from 0 and a warm-up of w steps of n."""
    warm, total = 10, 100
    shares = [(k - warm) / (total - warm) for k in range(warm, total)]
    cosine = rates(total, lr_scheduler="cosine_with_restarts", lr_num_cycles=3, lr_warmup_steps=warm)
    assert cosine[:warm] == pytest.approx([k / warm for k in range(warm)])
    assert cosine[warm:] == pytest.approx([(1 + math.cos(math.pi * (3 * share % 1))) / 2 for share in shares])
    power = rates(total, lr_scheduler="polynomial", lr_power=2.0, lr_warmup_steps=warm)
    assert power[warm:] == pytest.approx([1e-7 + (1 - 1e-7) * (1 - share) ** 2 for share in shares])


def test_what_a_schedule_does_not_do_is_said():
    def said(steps, **options):
        return " ".join(remarks_on_schedule(TrainingConfig.from_flat(**options), steps))

    assert "lr_warmup_steps 500, but only 500 steps" in said(500)
    assert said(501) == ""
    assert said(9, lr_scheduler="constant") == ""
    assert "restarts only with --lr_num_cycles 2" in said(999, lr_scheduler="cosine_with_restarts")
    assert said(999, lr_scheduler="cosine_with_restarts", lr_num_cycles=2) == ""
    assert "is linear" in said(999, lr_scheduler="polynomial")


def test_the_moving_average_is_that_of_diffusers_to_the_last_bit():
    options = OptimisationOptions(ema_inv_gamma=2.0, ema_power=0.7, ema_max_decay=0.8)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,), (2, 3, 3, 3))]
    parameters[1].requires_grad_(False)
    ours = MovingAverage(parameters, options)
    settings = {"use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.7, "foreach": True}
    theirs = EMAModel(parameters, decay=0.8, **settings)
    for _ in range(20):
        with torch.no_grad():
            for parameter in parameters:
                if parameter.requires_grad:
                    parameter += torch.randn_like(parameter)
        ours.update()
        theirs.step(parameters)
        assert all(map(torch.equal, ours.shadows, theirs.shadow_params))
    before = [parameter.detach().clone() for parameter in parameters]
    with ours.applied():
        assert all(map(torch.equal, ours.shadows, parameters))
    assert all(map(torch.equal, before, parameters))


def test_accumulation_from_the_environment_is_that_of_the_flag(tmp_path, monkeypatch):
    """accelerate reads the variable too, and would divide the gradient once more."""
    options = {"train_batch_size": 2, "max_train_steps": 2, "checkpointing_steps": 2, "use_ema": False}
    run(tmp_path / "flag", gradient_accumulation_steps=4, **options)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    run(tmp_path / "environment", **options)
    # With the moments of the gradients: the weights alone say little, for Adam forgets their scale.
    assert_same_weights(weights(tmp_path / "environment", 2), weights(tmp_path / "flag", 2))


def test_runs_of_one_process_have_precisions_of_their_own(tmp_path):
    mine = Accelerator(cpu=True, mixed_precision="bf16")
    options = {"max_train_steps": 1, "use_ema": False}
    first = run(tmp_path / "1", **options, mixed_precision="no")[0]["held_out_loss"]
    half = run(tmp_path / "2", **options, mixed_precision="bf16")[0]["held_out_loss"]
    again = run(tmp_path / "3", **options, mixed_precision="no")[0]["held_out_loss"]
    assert first == again != half
    assert mine.mixed_precision == Accelerator(cpu=True).mixed_precision == "bf16"


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "edm", "gradient_accumulation_steps": 2, "train_batch_size": 4},
        {"vae": "vae", "class_conditional": True},
    ],
    ids=["edm, accumulation, EMA", "latents, classes, EMA"],
)
def test_a_compiled_run_compiles_in_its_first_step_only(options, tmp_path, monkeypatch, capsys):
    """Neither the last batch of a measurement nor the samples, of other sizes, are compiled once more."""
    random_vae(scaling_factor=0.7).save_pretrained(tmp_path / "vae")
    small = {"block_out_channels": [8], "unet_arguments": {"norm_num_groups": 4}, "max_train_steps": 4}
    options |= small | {"save_images_epochs": 1, "validation_steps": 2, "eval_batch_size": 3}
    options |= {"vae": str(tmp_path / "vae")} if "vae" in options else {}
    _, plain = run(tmp_path / "plain", **options)
    # The steps alone are of interest here, and not the code that the compiler makes of them.
    monkeypatch.setattr(state, "BACKEND", "aot_eager")
    graphs, accumulate_gradients = [], loop.accumulate_gradients

    def counted(*arguments):
        graphs.append(counters["stats"]["unique_graphs"])
        return accumulate_gradients(*arguments)

    monkeypatch.setattr(loop, "accumulate_gradients", counted)
    torch._dynamo.reset()
    counters.clear()
    _, compiled = run(tmp_path / "compiled", **options, compile=True)
    assert graphs[0] == 0 < graphs[1]
    assert {*graphs[1:], counters["stats"]["unique_graphs"]} == {graphs[1]}
    assert [x or 0 for line in compiled for x in line] == pytest.approx([x or 0 for line in plain for x in line], 1e-3)
    assert "Compiled: the first step took" in capsys.readouterr().out
