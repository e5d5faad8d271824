"""Files are whole or not there, whatever happens while they are written."""

import signal
import subprocess
import sys

SETUP = """
import os, resource, signal, sys
from pathlib import Path
from dia_diffusion.files import replace_file, replace_text
path = Path(sys.argv[1])
"""


def run(path, code):
    done = subprocess.run([sys.executable, "-c", SETUP + code, str(path)], capture_output=True, text=True)
    return done.returncode, done.stderr.strip().splitlines()


def test_a_kill_leaves_what_was_there(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("before")
    code = "replace_file(path, lambda place: (place.write_text('half'), os.kill(os.getpid(), signal.SIGKILL)))"
    assert run(path, code)[0] == -signal.SIGKILL
    assert path.read_text() == "before"
    assert run(path, "replace_text(path, 'after')") == (0, [])
    assert path.read_text() == "after"


def test_a_file_that_does_not_fit_is_named_and_leaves_what_was_there(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("before")
    limited = "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\nreplace_text(path, 'x' * 5000)"
    status, lines = run(path, limited)
    assert status == 1
    assert lines[-1] == f"OSError: [Errno 27] File too large: '{path}'"
    assert [file.name for file in tmp_path.iterdir()] == ["figures.json"]
    assert path.read_text() == "before"
