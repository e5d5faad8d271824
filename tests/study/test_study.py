"""A study is the same study whatever happens to it, its comparisons are paired, and its statistics are right."""

import base64
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
import yaml
from filelock import FileLock
from scipy import stats

from dia_diffusion import DIAUNetPipeline
from dia_diffusion.cli import main
from dia_diffusion.errors import UsageError
from dia_diffusion.objectives import Objective
from dia_diffusion.study.comparison import compare
from dia_diffusion.study.description import load_study
from dia_diffusion.study.dia_study import run_study
from dia_diffusion.study.single_run import complete, count_spikes, make_step, read_result, read_timing, time_step
from dia_diffusion.study.study_report import format_table, save_figure, summarise
from dia_diffusion.training.loop import train
from forks import start
from small_studies import VARIANTS, runs_of, write_study
from training_runs import fresh_state


@pytest.fixture(autouse=True)
def fresh_accelerator():
    fresh_state()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A study that was let finish: its description, its folder and its figures."""
    root = tmp_path_factory.mktemp("study")
    path, folder = write_study(root / "study.yaml", num_images=20, timing_rounds=1), root / "undisturbed"
    assert main(["study", str(path), "--output_dir", str(folder), "--jobs", "2"]) == 0
    return path, folder, json.loads((folder / "study.json").read_text())


def test_the_report_holds_what_was_asked_for(undisturbed):
    path, folder, summary = undisturbed
    assert summary["study"] == yaml.safe_load(path.read_text()) | {"features": "digits"}
    plain, dia = summary["variants"]["plain"], summary["variants"]["dia"]
    assert (plain["attention_parameters"], plain["step_time_ratio"]) == (0, 1.0)
    assert dia["parameters"] == plain["parameters"] + dia["attention_parameters"]
    assert dia["step_time_ratio"] > 0
    for name, variant in summary["variants"].items():
        assert (variant["finished"], variant["diverged"], variant["loss_spikes"]) == (2, 0, 0)
        for score in ("held_out_loss", "fid"):
            values = [run[score] for run in summary["runs"] if run["variant"] == name]
            assert variant[score]["mean"] == pytest.approx(np.mean(values))
            assert len(set(values)) == 2
    table = (folder / "study.md").read_text().splitlines()
    assert [line.split()[1] for line in table[:4]] == ["variant", "---", "plain", "dia"]
    assert f"{dia['held_out_loss']['mean']:.5f}" in table[3]
    assert (folder / "study.png").stat().st_size > 1000
    page = (folder / "study.html").read_text()
    assert f"<td>{dia['parameters']:,}</td>" in page
    assert base64.b64encode((folder / "study.png").read_bytes()).decode() in page
    assert "href='study.json'" in page


def test_a_study_that_was_finished_is_not_done_again(undisturbed):
    path, folder, summary = undisturbed
    before = {result: result.stat().st_mtime_ns for result in folder.glob("*/*/*") if result.is_file()}
    assert run_study(path, folder, jobs=1) == summary
    assert {result: result.stat().st_mtime_ns for result in folder.glob("*/*/*") if result.is_file()} == before


def test_a_study_that_was_killed_ends_as_if_it_had_not_been(undisturbed, tmp_path):
    path, _, expected = undisturbed
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "dia_diffusion.cli", "study", str(path), "--output_dir", str(folder)]
    process = subprocess.Popen([*command, "--jobs", "2"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(folder.glob("plain/seed-0/checkpoints/step-*")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    others = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Runs that live on would be trained by two processes at a time.
    assert not psutil.wait_procs(others, timeout=30)[1]
    assert not (folder / "plain" / "seed-0" / "result.json").exists()
    summary = run_study(path, folder, jobs=2)
    assert "resuming from" in (folder / "plain" / "seed-0" / "log.txt").read_text()
    assert summary["runs"] == expected["runs"]
    # Times are measured anew.
    for one in (summary, expected):
        one["variants"]["dia"]["step_time_ratio"] = None
    scores = load_study(path).scores
    assert format_table(summary, scores) == format_table(expected, scores)


def test_variants_start_from_the_same_weights_and_see_the_same(tmp_path, monkeypatch):
    """With a learning rate of zero the saved weights are those that a run starts from."""
    variants = {**VARIANTS, "se": {"dia_attention": "se", "dia_sharing": "block"}}
    path = write_study(tmp_path / "study.yaml", variants, {"learning_rate": 0.0, "max_train_steps": 3})
    seen = []

    def watched(objective, network, images, noise, levels, *others):
        if network.training:
            seen.append((images.clone(), noise.clone(), levels.clone()))
        return loss(objective, network, images, noise, levels, *others)

    loss = Objective.loss
    monkeypatch.setattr(Objective, "loss", watched)
    starts, views = {}, {}
    for run in runs_of(path, tmp_path)[1]:
        seen.clear()
        train(run.config)
        weights = DIAUNetPipeline.from_pretrained(run.folder).unet.state_dict()
        starts[run.name] = {name: tensor for name, tensor in weights.items() if not name.startswith("dia.")}
        views[run.name] = [tensor for step in seen for tensor in step]
        assert len(seen) == 3
    for seed in (0, 1):
        for variant in ("dia", "se"):
            assert starts[f"{variant}/seed-{seed}"].keys() == starts[f"plain/seed-{seed}"].keys()
            for name, tensor in starts[f"plain/seed-{seed}"].items():
                assert torch.equal(starts[f"{variant}/seed-{seed}"][name], tensor), name
            assert all(map(torch.equal, views[f"{variant}/seed-{seed}"], views[f"plain/seed-{seed}"]))
    assert not any(map(torch.equal, views["plain/seed-0"], views["plain/seed-1"]))
    assert not torch.equal(starts["plain/seed-0"]["conv_in.weight"], starts["plain/seed-1"]["conv_in.weight"])


def test_statistics_agree_with_formulas_and_with_scipy():
    scores = {0: 0.081, 1: 0.084, 2: 0.080, 5: 0.079}
    baseline = {0: 0.083, 1: 0.085, 2: 0.083, 3: 0.084}
    figures = compare(scores, baseline)
    values, paired = np.array(list(scores.values())), np.array([-0.002, -0.001, -0.003])
    for mean, interval, sample in (
        (figures["mean"], figures["interval"], values),
        (figures["difference"], figures["difference_interval"], paired),
    ):
        # Student's t: quantiles 0.975 for 3 and 2 degrees of freedom, from a printed table.
        quantile = {4: 3.182, 3: 4.303}[len(sample)]
        half = quantile * sample.std(ddof=1) / np.sqrt(len(sample))
        assert mean == pytest.approx(sample.mean())
        assert interval == pytest.approx([sample.mean() - half, sample.mean() + half], rel=1e-3)
    expected = stats.ttest_rel([scores[seed] for seed in (0, 1, 2)], [baseline[seed] for seed in (0, 1, 2)]).pvalue
    assert figures["p_value"] == pytest.approx(expected)
    assert figures["pairs"] == 3
    assert compare({}, baseline) is None
    single = compare({1: 0.08}, baseline)
    assert single["difference"] == pytest.approx(-0.005)
    assert (single["interval"], single["difference_interval"], single["p_value"]) == (None, None, None)
    itself = compare(baseline, baseline)
    assert (itself["difference"], itself["difference_interval"], itself["p_value"]) == (0, None, None)


@pytest.mark.parametrize(
    ("options", "differing"),
    [
        ({"prediction_type": "sample"}, {"held_out_loss": ["prediction_type"]}),
        ({"snr_gamma": 5.0}, {"held_out_loss": ["snr_gamma"]}),
        ({"ddpm_num_steps": 500}, {"held_out_loss": ["ddpm_num_steps"]}),
        ({"ddpm_beta_schedule": "sigmoid"}, {"held_out_loss": ["ddpm_beta_schedule"]}),
        (
            {"objective": "flow"},
            {
                "held_out_loss": "objective prediction_type ddpm_num_steps ddpm_beta_schedule rescale_betas_zero_snr "
                "weighting_scheme logit_mean logit_std".split()
            },
        ),
        ({"resolution": 16}, {"held_out_loss": ["resolution"], "fid": ["resolution"]}),
        ({"dataset_name": "mnist5k"}, {"held_out_loss": ["dataset_name"], "fid": ["dataset_name"]}),
        ({"vae": "somewhere", "center_crop": True}, {"held_out_loss": ["center_crop", "vae"], "fid": ["center_crop"]}),
        ({"class_conditional": True, "label_column": "kind"}, {"held_out_loss": ["class_conditional", "label_column"]}),
        ({"learning_rate": 0.1, "dia_attention": "se", "dropout": 0.5}, {}),
    ],
)
def test_what_is_not_the_same_quantity_is_not_compared(tmp_path, options, differing):
    path = write_study(tmp_path / "study.yaml", {"plain": {}, "other": options}, num_images=9)
    study, runs = runs_of(path, tmp_path)
    for number, run in enumerate(runs):
        run.folder.mkdir(parents=True)
        figures = {"held_out_loss": 1.0 + number**2, "fid": 2.0 + number**3, "parameters": 1, "attention_parameters": 0}
        scoring = run.scoring._asdict() | (
            {"classes": "as often as in the data"} if "class_conditional" in options and run.variant == "other" else {}
        )
        result = {"variant": run.variant, "seed": run.seed, "scoring": scoring}
        (run.folder / "result.json").write_text(json.dumps(result | figures | {"loss_spikes": 0}))
    summary = summarise(study, runs)
    other, table = summary["variants"]["other"], format_table(summary, study.scores)
    assert other["not_compared"] == differing
    for score in ("held_out_loss", "fid"):
        assert other[score]["mean"] > 1
        assert (other[score]["p_value"] is None) == (other[score]["difference"] is None) == (score in differing)
    of_scores = [line for line in table.splitlines() if line.startswith("| other")][:2]
    assert sum("| - | - | - |" in line for line in of_scores) == len(differing)
    assert table.count("Not compared: the") == len(differing)
    assert all(f"has another {names[0]}" in table for names in differing.values())
    save_figure(summary, study.scores, tmp_path / "study.png")
    # A plot without points is left out.
    assert (tmp_path / "study.png").exists() == (len(differing) < 2)


def test_spikes_are_counted():
    calm = [1.0, 1.2] * 15
    assert count_spikes(calm) == 0
    # The median is 1.1 before the 1.6 and at most 1.2 before each 2.0; the 9.0 has nothing to be compared with.
    assert count_spikes([9.0, *calm, 1.6, *calm, 2.0, 2.0]) == 2


def test_a_run_that_diverges_is_a_result(tmp_path):
    variants = {**VARIANTS, "hot": {"learning_rate": 1e30, "lr_warmup_steps": 0}}
    path = write_study(tmp_path / "study.yaml", variants, {"max_train_steps": 6}, seeds=[0])
    study, runs = runs_of(path, tmp_path)
    for run in runs:
        complete(run)
    hot = next(run for run in runs if run.variant == "hot")
    assert read_result(hot)["diverged_at_step"] in (2, 3)
    figures = summarise(study, runs)["variants"]["hot"]
    assert (figures["finished"], figures["diverged"], figures["held_out_loss"]) == (1, 1, None)
    table = format_table(summarise(study, runs), study.scores)
    assert "| hot | - | - | - | - | 0 |" in table
    assert "| hot | - | - | 1 | 1 | 0.0 |" in table


def test_a_model_is_scored_again_when_other_scores_are_asked_for(tmp_path):
    def only_run(draws):
        path = write_study(tmp_path / "study.yaml", {"plain": {}}, {"max_train_steps": 2}, seeds=[0], loss_draws=draws)
        return runs_of(path, tmp_path)[1][0]

    complete(only_run(2))
    before, log = read_result(only_run(2)), (only_run(2).folder / "metrics.jsonl").read_text()
    assert read_result(only_run(3)) is None
    complete(only_run(3))
    assert read_result(only_run(3))["held_out_loss"] != before["held_out_loss"]
    assert (only_run(3).folder / "metrics.jsonl").read_text() == log


def test_variants_of_another_precision_are_timed(tmp_path):
    path = write_study(tmp_path / "study.yaml", {"plain": {}, "half": {"mixed_precision": "bf16"}}, seeds=[0])
    plain, half = runs_of(path, tmp_path)[1]
    half.folder.mkdir(parents=True)
    time_step(half, plain, rounds=1)
    assert read_timing(half, plain) > 0
    # Of another baseline the ratio says nothing.
    assert read_timing(half, half) is None


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, capfd):
    path = write_study(tmp_path / "study.yaml", {"odd": {}, **VARIANTS}, {"max_train_steps": 2}, seeds=[0])
    (tmp_path / "out" / "odd" / "seed-0").mkdir(parents=True)
    (tmp_path / "out" / "odd" / "seed-0" / "model_index.json").touch()
    assert main(["study", str(path), "--output_dir", str(tmp_path / "out"), "--jobs", "1"]) == 2
    assert "already holds a run (model_index.json)" in capfd.readouterr().err
    assert len(json.loads((tmp_path / "out" / "study.json").read_text())["runs"]) == 2


def test_two_processes_do_not_work_on_one_study(tmp_path):
    path, folder = write_study(tmp_path / "study.yaml"), tmp_path / "out"
    folder.mkdir()
    with FileLock(folder / ".lock"), pytest.raises(UsageError, match="another process runs the study in"):
        run_study(path, folder)
    assert [entry.name for entry in folder.iterdir()] == [".lock"]


def test_runs_of_another_description_are_not_mixed_in(undisturbed, tmp_path):
    _, folder, _ = undisturbed
    path = write_study(tmp_path / "study.yaml", common={"learning_rate": 2e-3})
    with pytest.raises(UsageError, match=r"trained with other options: learning_rate is 0.002, was 0.001"):
        run_study(path, folder)


def test_a_step_is_timed_with_all_its_micro_batches(tmp_path, monkeypatch):
    path = write_study(tmp_path / "study.yaml", {"plain": {}, "more": {"gradient_accumulation_steps": 3}}, seeds=[0])
    seen, loss = [], Objective.loss
    monkeypatch.setattr(Objective, "loss", lambda *arguments: seen.append(len(arguments[2])) or loss(*arguments))
    for run, batches in zip(runs_of(path, tmp_path)[1], (1, 3), strict=True):
        make_step(run)()
        assert seen == [8] * batches
        seen.clear()


def test_another_baseline_has_other_ratios(undisturbed, tmp_path):
    path, folder, _ = undisturbed
    shutil.copytree(folder, tmp_path / "study")
    described = yaml.safe_load(path.read_text())
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(described | {"baseline": "dia"}))
    summary = run_study(tmp_path / "study.yaml", tmp_path / "study", jobs=1)
    assert summary["variants"]["dia"]["step_time_ratio"] == 1.0
    timing = json.loads((tmp_path / "study" / "plain" / "seed-0" / "timing.json").read_text())
    assert timing["baseline"]["variant"] == "dia"
    assert summary["variants"]["plain"]["step_time_ratio"] == timing["step_time_ratio"]


def test_variants_of_other_layers_are_not_said_to_start_alike(tmp_path):
    variants = {"plain": {}, "wide": {"resnet_time_scale_shift": "scale_shift"}, "se": {"dia_attention": "se"}}
    study, runs = runs_of(write_study(tmp_path / "study.yaml", variants), tmp_path)
    summary = summarise(study, runs)
    assert [figures["other_weights"] for figures in summary["variants"].values()] == [
        [], ["resnet_time_scale_shift"], []
    ]  # fmt: skip
    assert "`wide` starts from other weights than `plain`" in format_table(summary, study.scores)


def test_a_study_with_workers_ends(tmp_path):
    common = {"max_train_steps": 2, "dataloader_num_workers": 1}
    path = write_study(tmp_path / "study.yaml", {"plain": {}}, common, seeds=[0])
    log = tmp_path / "log"
    process = start(main, ["study", str(path), "--output_dir", str(tmp_path / "out"), "--jobs", "1"], output=log)
    process.join(300)
    assert process.exitcode == 0, log.read_text()
    assert "The report is" in log.read_text()
