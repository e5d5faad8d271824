"""Output that nobody can read, bars in a terminal, lines in a log, and no warnings for developers of others."""

import io
import os
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

from dia_diffusion.process import output
from environments import REFERENCE, run_python
from training_runs import configure

GUARDED = "import sys; from dia_diffusion.process.output import guard_streams; guard_streams()"
TRAIN = "dia_diffusion.cli train --config {config}"
SAMPLE = f"dia_diffusion.cli sample {REFERENCE} --num_images 2 --steps 2 --output_dir {{folder}}"


def run_command(command, folder, **streams):
    config = configure(folder, max_train_steps=2) if "train" in command else ""
    words = command.format(folder=folder, config=config).split()
    process = subprocess.run([sys.executable, "-m", *words], **streams, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return process.returncode


def test_output_that_nobody_reads_costs_nothing(tmp_path):
    """As behind `| head -0`, with the errors in the same pipe."""
    there, away = os.pipe()
    os.close(there)
    assert run_command(TRAIN, tmp_path / "out", stdout=away, stderr=away) == 0
    os.close(away)
    assert (tmp_path / "out" / "model_index.json").exists()


def close_streams():
    for descriptor in range(3):
        os.close(descriptor)


def test_closed_streams_cost_nothing_and_no_file_takes_their_numbers(tmp_path):
    assert run_command(SAMPLE, tmp_path / "out", preexec_fn=close_streams) == 0
    assert (tmp_path / "out" / "00001.png").exists()
    code = f"{GUARDED}; file = open('file', 'w'); print('a line'); print(1 / 0)"
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, preexec_fn=close_streams)
    assert process.returncode == 1
    assert (tmp_path / "file").read_text() == ""
    assert run_command("dia_diffusion.cli sample", tmp_path, preexec_fn=close_streams) == 2


def test_a_full_disk_for_the_log_costs_nothing():
    code = f"{GUARDED}; print('a line'); print('another', file=sys.stderr, flush=True)"
    with Path("/dev/full").open("w") as full:
        assert subprocess.run([sys.executable, "-c", code], stdout=full, stderr=full).returncode == 0


def test_what_is_printed_arrives_unchanged():
    code = f"{GUARDED}; print('ä', sys.stdout.fileno(), sys.stdout.isatty(), '\\udce9'); print('x' * 100_000)"
    assert run_python(code) == "ä 1 False \\udce9\n" + "x" * 100_000 + "\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_whole_lines_one_at_a_time(monkeypatch):
    log, clock = io.StringIO(), [0.0]
    monkeypatch.setattr(sys, "stderr", log)
    bar = output.progress_bar(total=40, desc="Training", unit="step", disable=False)
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
        with output.progress_bar(range(3), desc="Sampling") as bar:
            assert list(bar) == [0, 1, 2]
        assert ("\rSampling: 100%" in file.getvalue()) is expected


def test_a_notebook_has_a_bar_and_an_imported_kernel_is_none(monkeypatch):
    kernel = pytest.importorskip("ipykernel.kernelapp").IPKernelApp
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not output.is_watched()
    notebook = nbformat.v4.new_notebook()
    code = "from dia_diffusion.process import output; print(output.is_watched())"
    notebook.cells.append(nbformat.v4.new_code_cell(code))
    nbclient.NotebookClient(notebook).execute()
    assert notebook.cells[0].outputs[0].text.strip() == "True"
    assert not kernel.initialized()


def test_warnings_for_the_developers_of_others_are_left_out_unless_asked_for():
    code = (
        "from dia_diffusion.process.startup import quiet_dependencies; quiet_dependencies(); import warnings\n"
        "warnings.warn('old', FutureWarning); warnings.warn('older', DeprecationWarning); warnings.warn('mind this')\n"
        "from tqdm import tqdm; list(tqdm(range(3)))"
    )
    errors = run_python(f"{code}; raise SystemExit(1)", status=1)
    assert "mind this" in errors
    assert "old" not in errors
    assert "it/s" not in errors
    assert "FutureWarning: old" in run_python(f"{code}; raise SystemExit(1)", status=1, PYTHONWARNINGS="default")
