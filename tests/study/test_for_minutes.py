"""Studies for as many minutes as there are."""

import runpy

import pytest

from small_studies import write_study
from training_runs import ROOT

SCRIPT = ROOT / "studies" / "for_minutes.py"


@pytest.fixture
def for_minutes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return runpy.run_path(str(SCRIPT))["main"]


def test_what_there_was_no_time_for_is_named_and_done_by_the_next_call(for_minutes, tmp_path, capfd):
    study = write_study(tmp_path / "small.yaml", seeds=[0], common={"max_train_steps": 2})
    for minutes in ("0", "0.02"):
        # None starts, or the study is stopped before its first run is finished.
        for_minutes(["--minutes", minutes, str(study)])
        assert "small.yaml: left out plain/seed-0, dia/seed-0" in capfd.readouterr().out
    assert for_minutes(["--minutes", "5", str(study), "--", "--jobs", "1"]) == 0
    assert "small.yaml: complete" in capfd.readouterr().out
    assert (tmp_path / "runs" / "small" / "study.html").exists()


def test_a_file_that_is_not_there_is_refused(for_minutes, capsys):
    with pytest.raises(SystemExit) as refusal:
        for_minutes(["--minutes", "1", "nowhere.yaml"])
    assert refusal.value.code == 2
    assert "there is no file 'nowhere.yaml'." in capsys.readouterr().err
