"""Where the runs of a study are done makes no difference: on this machine, or on a Ray cluster that loses one."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from dia_diffusion.cli import main
from dia_diffusion.errors import UsageError
from dia_diffusion.study.description import load_study
from dia_diffusion.study.dia_study import Cluster, run_study
from dia_diffusion.study.engine import LocalEngine, Task, run_tasks
from dia_diffusion.study.single_run import complete, read_result
from small_studies import note_gpu, write_study
from training_runs import fresh_state


def runs_of(path, folder):
    return load_study(path).runs(folder)


def test_each_run_sees_one_of_the_gpus_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    runs = runs_of(write_study(tmp_path / "study.yaml", seeds=[0]), tmp_path)
    failures = run_tasks(LocalEngine(2, ["3", "5"]), [Task(note_gpu, run) for run in runs], lambda ended: None)
    assert failures == []
    assert {(run.folder / "gpu").read_text() for run in runs} == {"3", "5"}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"


ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'dia-diffusion[ray]'")
on_ray = pytest.importorskip("dia_diffusion.study.on_ray")


@pytest.fixture(scope="module")
def cluster():
    """Two machines of one core each, as far as Ray can tell."""
    from ray import cluster_utils

    # Beside other tests, workers of low priority, which is Ray's default, would hardly run.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def wait_for(condition, process):
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)


def log_of(run):
    log = run.folder / "log.txt"
    return log.read_text() if log.exists() else ""


def test_a_study_that_loses_a_machine_and_is_stopped_has_the_same_figures(cluster, tmp_path, monkeypatch, capfd):
    path = write_study(tmp_path / "study.yaml", common={"max_train_steps": 90, "checkpointing_steps": 10}, seeds=[0])
    command = ["study", str(path), "--output_dir", str(tmp_path / "out"), "--ray", cluster.address]
    runs = runs_of(path, tmp_path / "out")
    (lost_node,) = cluster.worker_nodes

    process = subprocess.Popen([sys.executable, "-m", "dia_diffusion.cli", *command], stdout=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: all(list(run.folder.glob("checkpoints/step-*")) for run in runs), process)
        (lost,) = [run for run in runs if lost_node.node_id in log_of(run)]
        cluster.remove_node(lost_node, allow_graceful=False)
        # It goes on where the other one was.
        wait_for(lambda: "resuming from" in log_of(lost), process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "2 machines with 2 CPUs and 0 GPUs; each run takes 1 CPUs and 0 GPUs" in output
    assert "All of them see its folder." in output
    assert read_result(lost) is None
    assert len(set(re.findall(r"node (\w+) of Ray", log_of(lost)))) == 2

    # The rest on a machine that does not see the folder: what is there goes along, and the results come back.
    monkeypatch.setattr(on_ray, "_is_seen", lambda mark: mark.unlink())
    assert main(command) == 0
    assert "the results of a run are brought back" in capfd.readouterr().out
    assert log_of(lost).count("resuming from") == 2
    assert not (lost.folder / "checkpoints").exists()
    for run, alone in zip(runs, runs_of(path, tmp_path / "alone"), strict=True):
        fresh_state()
        complete(alone)
        assert read_result(run) == read_result(alone)
    assert not list((tmp_path / "out").glob(".shared-*"))


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:x", "ray://127.0.0.1:10001", "127.0.0.1:1"])
def test_an_address_without_a_cluster_is_refused(address, tmp_path):
    path = write_study(tmp_path / "study.yaml", seeds=[0])
    with pytest.raises(UsageError, match=f"there is no Ray cluster to use at '{address}'"):
        run_study(path, tmp_path / "out", cluster=Cluster(address))


def test_what_a_run_takes_is_said_for_a_cluster_only(tmp_path, capsys):
    path = write_study(tmp_path / "study.yaml", seeds=[0])
    assert main(["study", str(path), "--output_dir", str(tmp_path / "out"), "--cpus_per_run", "2"]) == 2
    assert "cpus_per_run has no effect without --ray ADDRESS" in capsys.readouterr().err
