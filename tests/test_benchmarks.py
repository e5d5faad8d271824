"""What the figures of the benchmarks rest on, and that those that are quick run."""

import importlib
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dia_diffusion import attach
from dia_diffusion.data.preparation import prepare_pixels
from dia_diffusion.data.sources import load_digits_dataset
from dia_diffusion.models.families import FAMILIES
from dia_diffusion.sampling.schedulers import make_scheduler

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_sides_take_turns_and_each_time_is_that_of_its_side(benchmark, monkeypatch):
    measuring = benchmark("measuring")
    clock, turns = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def side(name, seconds):
        def run():
            turns.append(name)
            clock[0] += seconds * len(turns)

        return run

    times = measuring.alternate({"a": side("a", 1), "b": side("b", 10)}, rounds=2)
    assert turns == ["a", "b", "b", "a", "a", "b"]
    assert times == {"a": [4, 5], "b": [30, 60]}
    # 30 / 4 and 60 / 5.
    assert measuring.spread(times["b"], times["a"]) == {"median": 9.75, "min": 7.5, "max": 12}


def test_the_table_has_a_line_for_each_row_of_each_result(benchmark, tmp_path, capsys):
    measuring = benchmark("measuring")
    ratio = {"median": 1.02345, "min": 1.0, "max": 1.25}
    measuring.save_result(tmp_path / "speed.json", [measuring.row("step", 12.3456, "ms", "time of plain", ratio)])
    measuring.save_result(tmp_path / "size.json", [measuring.row("plain", 7, "MiB")])
    assert json.loads((tmp_path / "speed.json").read_text())["rows"][0]["ratio"] == {"median": 1.023} | {
        "min": 1.0,
        "max": 1.25,
    }
    capsys.readouterr()
    lines = measuring.make_table(tmp_path).splitlines()
    assert [line.split(" (")[0] for line in lines if line.startswith("**")] == ["**size**", "**speed**"]
    assert "| plain | 7 MiB |  |  |" in lines
    assert "| step | 12.35 ms | time of plain | 1.023 (1.000 to 1.250) |" in lines


def test_the_published_figures_of_a_gpu_are_those_of_the_file_beside_them():
    docs = BENCHMARKS.parent / "docs"
    measured = [
        (row["value"], [row["ratio"][name] for name in ("median", "min", "max")] if "ratio" in row else [])
        for row in json.loads((docs / "speed" / "gpu.json").read_text())["rows"]
    ]
    published = re.findall(r"^\| .* \| ([\d.,]+) \S+ \|(.*)\|$", (docs / "speed.md").read_text(), re.MULTILINE)
    assert len(published) == 13
    for figure, ratio in published:
        value, places = float(figure.replace(",", "")), len(figure.partition(".")[2])
        shown = [float(number) for number in re.findall(r"[\d.]+", ratio)]
        assert any(
            round(row_value, places) == value and ratios[: len(shown)] == pytest.approx(shown, abs=0.00501)
            for row_value, ratios in measured
        ), (figure, ratio)


def test_checkpointing_needs_less_memory(benchmark):
    memory = benchmark("memory")
    peaks = [memory.peak_of_step("digits", "DIA", checkpointing, "cpu") for checkpointing in (False, True)]
    assert peaks[1] < 0.9 * peaks[0]


def test_models_that_are_compared_start_from_the_same_weights(benchmark):
    cost = benchmark("attention_cost")
    models = cost.make_models(cost.SIZES["digits"][0], "cpu")
    plain = models[cost.PLAIN].state_dict()
    assert set(models) == set(cost.SIDES)
    for model in models.values():
        weights = model.state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in plain.items())


def test_flops_of_a_step_are_three_times_those_of_a_forward_pass(benchmark):
    gpu = benchmark("gpu")
    (model,) = gpu.make_models(gpu.SIZES["digits"][0], "cpu", (gpu.NONE,)).values()
    passes = gpu.make_passes(model, model, batch=2)
    # The backward pass has two products for each of the forward pass, and none for the gradient of the images.
    assert 2.7 < gpu.count_flops(passes["step"]) / gpu.count_flops(passes["forward"]) < 3.0


def test_kernels_are_a_part_of_the_step(benchmark):
    gpu = benchmark("gpu")
    rows, table = gpu.measure_kernels("cpu", "digits", 2)
    assert [row["case"].split("alone, ")[-1] for row in rows] == [gpu.NONE, gpu.CONTIGUOUS, gpu.DIA]
    assert rows[2]["ratio"]["median"] == pytest.approx(rows[2]["value"] / rows[0]["value"], rel=0.01)
    assert "aten::" in table


def test_a_first_step_is_compiled_for_the_first_time_and_again(benchmark):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    step = torch.compile(lambda: torch.ones(2) + 1, backend=backend)
    first, again = benchmark("gpu").compiling_rows("first step", {"DIA": {"step": step}})
    assert len(compiled) == 2
    assert [row["case"] for row in (first, again)] == ["first step, DIA", "first step, from the compiler's cache, DIA"]


def test_an_update_takes_fewer_calls_than_the_tutorials(benchmark):
    plain, ours = benchmark("training_throughput").update_rows()
    assert ours["value"] < 0.5 * plain["value"]


def test_the_rate_of_a_gpu_is_found_by_its_name_or_unknown(benchmark):
    gpu = benchmark("gpu")
    assert gpu.peak_rate("NVIDIA H100 80GB HBM3") == 989e12
    assert gpu.peak_rate("NVIDIA H100 PCIe") == 756e12
    assert gpu.peak_rate("NVIDIA GeForce GTX 1080") is None


def test_the_cost_of_attention_has_a_row_for_each_comparison(benchmark):
    rows = benchmark("attention_cost").measure("digits", 1, "cpu")
    assert sum("ratio" not in row for row in rows) == 2, "step and forward pass of the plain UNet"
    others = {"UNet2DModel", "no attention", "DIA by hooks", "SE in each block"}
    assert {row["against"] for row in rows if "ratio" in row} == {f"time of {other}" for other in others}
    assert all(row["value"] > 0 for row in rows)


def test_the_calls_of_a_gate(benchmark):
    cost = benchmark("attention_cost")
    calls = {row["case"]: row["value"] for row in cost.call_rows()}
    assert set(calls) == {f"{what}, {kind}" for what in ("a gate", "once a pass") for kind in ("forward", "backward")}
    # Views and all, on a CPU. A gate that takes more has become slower to start on a GPU.
    assert 20 < calls["a gate, forward"] <= 51
    assert 40 < calls["a gate, backward"] <= 134


def test_the_cost_of_attention_has_a_row_for_each_family(benchmark):
    cost = benchmark("attention_cost")
    quick = ("ResNetForImageClassification (basic)", "DiTTransformer2DModel")
    rows = cost.measure_families(1, "cpu", quick)
    assert [row["case"] for row in rows] == [f"step, {name}" for name in quick]
    assert all(row["ratio"]["median"] > 0 for row in rows)
    # Each family has a model, but for those that need an environment of their own.
    backbones = benchmark("backbones").make_backbones().values()
    known = {attach(backbone.make()).config.family for backbone in backbones if backbone.ends is None}
    assert known == {family.name for family in FAMILIES} - {"torchvision or timm ResNet"}


def test_gates_by_hooks_compute_what_the_fused_block_computes(benchmark):
    cost = benchmark("attention_cost")
    models = cost.make_models(cost.SIZES["digits"][0], "cpu", (cost.DIA, cost.HOOKS))
    for model in models.values():
        torch.manual_seed(0)
        for parameter in model.dia.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    sample = torch.randn(2, 1, 8, 8)
    outputs = [model(sample, 10).sample for model in models.values()]
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(outputs[0], models[cost.DIA].to_unet()(sample, 10).sample)


def test_sides_of_the_sampling_benchmark_draw_the_same_images(benchmark):
    sampling = benchmark("sampling")
    images = {}
    for side in (sampling.THEIRS, sampling.OURS, sampling.COMMAND):
        pipeline = sampling.make_pipeline(side, "digits", "DDPM")
        generator = torch.Generator().manual_seed(0)
        images[side] = pipeline(batch_size=2, generator=generator, num_inference_steps=2, output_type="np").images
    assert np.array_equal(images[sampling.OURS], images[sampling.THEIRS])
    np.testing.assert_allclose(images[sampling.COMMAND], images[sampling.THEIRS], atol=1e-4)


def test_workers_answer_each_round(benchmark, tmp_path):
    measuring = benchmark("measuring")
    script = tmp_path / "worker.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "from measuring import serve_rounds\n"
        "answers = iter(range(10))\n"
        "serve_rounds(lambda: [*sys.argv[1:], next(answers)])\n"
    )
    with measuring.start_workers(str(script), {"a": ["x"], "b": ["y"]}) as runs:
        assert [runs["a"](), runs["b"](), runs["a"]()] == [["--side", "x", 0], ["--side", "y", 0], ["--side", "x", 1]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_the_gpu_benchmark_ends_well_without_a_gpu(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path / "gpu.json")])
    assert benchmark("gpu").main() == 0
    assert "no GPU" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_best_network_of_every_objective_ends_at_images_of_the_data(benchmark):
    """With each sampler: 25 evaluations or more take noise to images that the network knows."""
    objectives = benchmark("objectives")
    digits = prepare_pixels(load_digits_dataset()["test"], 8)
    known = digits.fetch(range(len(digits)))["images"].flatten(1).float() / 127.5 - 1
    for name, pipeline in objectives.best_pipelines(digits):
        pipeline.set_progress_bar_config(disable=True)
        config = pipeline.scheduler.config
        for sampler in objectives.SAMPLERS[name]:
            pipeline.scheduler = make_scheduler(sampler, config)
            images = pipeline(8, 25, torch.Generator().manual_seed(0), output_type="latent").images
            nearest = torch.cdist(images.flatten(1), known).min(1)
            assert nearest.values.max() < 0.5, (name, sampler)
            assert len(nearest.indices.unique()) > 4


def test_latents_cost_less_than_pixels_and_encoding_is_measured(benchmark):
    latents = benchmark("latents")
    rows = {row["case"]: row["value"] for row in latents.measure_encoding("digits", 8) + latents.count_operations()}
    assert next(iter(rows)) == "encoding 1,797 images of 8x8"
    # A mean and a deviation of two bytes each, for four channels of 2x2.
    assert rows["the same, disk"] * 2**20 > 1797 * 4 * 4 * 4
    step, step_in_latents = (rows[case] for case in rows if case.startswith("training step"))
    assert step > 10 * step_in_latents


def test_the_objectives_are_drawn_with_all_their_samplers(benchmark, tmp_path, monkeypatch):
    objectives = benchmark("objectives")
    result, picture = tmp_path / "result.json", tmp_path / "picture.png"
    options = ["--num_images", "4", "--evaluations", "3", "--output", str(result), "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", ["objectives.py", *options])
    assert objectives.main() == 0
    figures = json.loads(result.read_text())
    assert {name: list(samplers) for name, samplers in figures["curves"].items()} == objectives.SAMPLERS
    assert figures["floor"] > 0
    assert picture.exists()
    monkeypatch.setattr(sys, "argv", ["objectives.py", str(tmp_path), *options])
    assert objectives.main() == 2


def test_synthetic_images_are_prepared_as_a_run_prepares_them(benchmark, tmp_path):
    scale = benchmark("data_scale")
    scale.write_images(tmp_path / "images", 30)
    figures = scale.start_run(str(tmp_path / "images"), tmp_path / "cache", 1)
    assert figures["images"] == 30
    assert figures["seconds"] > 0
    data = scale.load(str(tmp_path / "images"), tmp_path / "cache", 1)
    assert (data.channels, data.resolution) == (3, scale.RESOLUTION)
