"""A mistake that can be seen before training is seen before it, and leaves nothing."""

from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from dia_diffusion.errors import UsageError
from dia_diffusion.training.accelerator import StopAgreement
from dia_diffusion.training.log import log_picture
from training_runs import fresh_state, run

SCORED = {"score_features": "digits", "score_num_images": 4}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate allows one configuration a process; each test here is as in a process of its own."""
    fresh_state()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**SCORED, "score_num_images": 1}, "score_num_images must be at least 2"),
        ({**SCORED, "eval_steps": 2, "eval_num_images": 1}, "eval_num_images must be at least 2"),
        (
            {"ddpm_num_steps": 20, "ddpm_num_inference_steps": 21},
            "ddpm_num_inference_steps 21 is more than ddpm_num_steps 20",
        ),
        ({"ddpm_num_steps": 1000, "ddpm_num_inference_steps": 61}, "ddpm_num_inference_steps 61 goes below"),
        ({"logging_dir": "taken"}, "--logger tensorboard cannot start"),
        ({"logging_dir": "README.md"}, "README.md. has the name of a file of the run"),
    ],
)
def test_what_cannot_work_at_the_end_is_refused_at_the_start(tmp_path, options, message):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "taken").touch()
    with pytest.raises(UsageError, match=message):
        run(tmp_path / "run", **options)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_scores_need_two_held_out_images(tmp_path):
    for split, count in (("train", 4), ("test", 1)):
        (tmp_path / "data" / split).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / split / f"{number}.png")
    with pytest.raises(UsageError, match="there is only 1 held-out image, and scores need 2"):
        run(tmp_path / "run", dataset_name=None, train_data_dir=str(tmp_path / "data"), **SCORED)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variable", "name"), [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")]
)
def test_engines_that_divide_the_model_are_refused_by_name(tmp_path, monkeypatch, variable, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(UsageError, match=f"accelerate is configured for {name}, which is not supported"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["meta", "nothing"])
def test_a_device_that_cannot_compute_is_refused(tmp_path, monkeypatch, device):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", device)
    with pytest.raises(UsageError, match=r"accelerate refuses .* its own settings"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tracker", ["trackio", "wandb"])
def test_pictures_reach_a_tracker(tmp_path, monkeypatch, tracker):
    """The real tracker, without a server; where it is not installed the test is skipped."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(tracker)
    accelerator = Accelerator(log_with=tracker, cpu=True)
    accelerator.init_trackers("training")
    Image.new("L", (8, 8), 200).save(tmp_path / "picture.png")
    log_picture(accelerator, "samples", tmp_path / "picture.png", 1)
    accelerator.end_training()
    assert [path for path in tmp_path.rglob("*.png") if path.name != "picture.png"]


@pytest.mark.parametrize("seconds", [0.001, 0.1, 3.0])
def test_processes_agree_to_stop_within_seconds_and_do_not_ask_at_each_step(monkeypatch, seconds):
    """Two processes in one: what each gives to `reduce` is added to what the other gave at the same step."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    asked: list[int] = []
    other = SimpleNamespace(wants=0.0)

    def reduce(figures, reduction):
        asked.append(step)
        figures[0] += other.wants
        return figures

    stops = StopAgreement(SimpleNamespace(num_processes=2, is_main_process=True, device="cpu", reduce=reduce))
    for step in range(1, 1000):
        now[0] += seconds
        other.wants = float(step >= 500)
        if stops.agreed(False, step):
            break
    assert step >= 500
    assert (step - 500) * seconds <= 2.5
    assert len(asked) <= step * max(seconds / 2, 0.01) * 1.3 + 3 or seconds > 2


def test_one_process_stops_at_once():
    stops = StopAgreement(SimpleNamespace(num_processes=1))
    assert [stops.agreed(here, step) for step, here in ((1, False), (2, True))] == [False, True]
