"""Files are whole or not there, whatever happens while they are written."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dia_diffusion.errors import UsageError
from dia_diffusion.files import check_output_file, check_output_folder, write_json

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


def test_json_that_is_written_is_json(tmp_path):
    content = {"a": [1.5, float("nan")], "b": {"c": -math.inf, "d": ("x", None, True)}}
    write_json(tmp_path / "x.json", content)
    read = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert read == {"a": [1.5, None], "b": {"c": None, "d": ["x", None, True]}}


def test_places_that_cannot_be_written_are_noticed_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    check_output_file(tmp_path / "new" / "folder" / "x.json")
    check_output_folder(tmp_path / "another")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["another", "file", "folder", "new"]
    with pytest.raises(UsageError, match="is a folder: name the file to write"):
        check_output_file(tmp_path / "new")
    with pytest.raises(UsageError, match=r"'.*file' is a file, and a folder is needed"):
        check_output_file(tmp_path / "file" / "x.json")
    with pytest.raises(UsageError, match="nothing can be written in '/proc/1': "):
        check_output_folder(Path("/proc/1"))
