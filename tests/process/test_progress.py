"""Bars for those who watch, lines for those who read, and no warnings that are for others."""

import io
import sys

import nbclient
import nbformat
import pytest

from dia_diffusion.process import progress
from environments import run_python


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_whole_lines_one_at_a_time(monkeypatch):
    log, clock = io.StringIO(), [0.0]
    monkeypatch.setattr(sys, "stderr", log)
    bar = progress.progress_bar(total=40, desc="Training", unit="step", disable=False)
    bar._time = lambda: clock[0]
    bar.start_t = bar.last_print_t = 0.0
    for second in range(1, 41):
        clock[0] = float(second)
        bar.set_postfix(loss=f"{1 / second:.2f}", refresh=False)
        bar.update()
    bar.close()
    lines = log.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [f"Training: {share}%" for share in (25, 50, 75, 100)]
    assert lines[0] == "Training: 25%, 10 of 40 in 00:10, 00:30 to go,  1.00step/s, loss=0.10"
    assert "\r" not in log.getvalue()


def test_what_is_quick_leaves_no_line_and_a_terminal_has_a_bar(monkeypatch):
    for file, expected in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", file)
        with progress.progress_bar(range(3), desc="Sampling") as bar:
            assert list(bar) == [0, 1, 2]
        assert ("\rSampling: 100%" in file.getvalue()) is expected


def test_a_notebook_has_a_bar_and_an_imported_kernel_is_none(monkeypatch):
    kernel = pytest.importorskip("ipykernel.kernelapp").IPKernelApp
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not progress.is_watched()
    notebook = nbformat.v4.new_notebook()
    code = "from dia_diffusion.process import progress; print(progress.is_watched())"
    notebook.cells.append(nbformat.v4.new_code_cell(code))
    nbclient.NotebookClient(notebook).execute()
    assert notebook.cells[0].outputs[0].text.strip() == "True"
    assert not kernel.initialized()


def test_warnings_for_the_developers_of_others_are_left_out_unless_asked_for():
    code = (
        "from dia_diffusion.process import quiet_dependencies; quiet_dependencies(); import warnings\n"
        "warnings.warn('old', FutureWarning); warnings.warn('older', DeprecationWarning); warnings.warn('mind this')\n"
        "from tqdm import tqdm; list(tqdm(range(3)))"
    )
    errors = run_python(f"{code}; raise SystemExit(1)", status=1)
    assert "mind this" in errors
    assert "old" not in errors
    assert "it/s" not in errors
    assert "FutureWarning: old" in run_python(f"{code}; raise SystemExit(1)", status=1, PYTHONWARNINGS="default")
