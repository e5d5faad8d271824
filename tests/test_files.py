"""Files are whole or not there, whatever happens while they are written."""

import errno
import fcntl
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dia_diffusion.errors import UsageError, first_line, why_not_loaded
from dia_diffusion.files import (
    LOCK,
    check_output_file,
    check_output_folder,
    file_digest,
    lock_folder,
    make_folder,
    replace_file,
    replace_files,
    replace_text,
    weights_digest,
    write_json,
)

SETUP = """
import os, resource, signal, sys
from concurrent.futures import ThreadPoolExecutor
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


def test_links_and_pipes_are_written_to_and_not_replaced(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "target")
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("link", "pipe"):
        check_output_file(tmp_path / name)
        # Text with the name of a file that is not UTF-8.
        replace_text(tmp_path / name, "new \udce9")
    assert os.read(pipe, 20) == (tmp_path / "folder" / "target").read_bytes() == b"new \\udce9"
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link", "pipe"]
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        replace_text(Path("/dev/full"), "x")
    with pytest.raises(UsageError, match="/dev/stdout"):
        check_output_file(Path("-"))


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
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    with pytest.raises(UsageError, match="is a folder: name the file to write"):
        check_output_file(tmp_path)
    with pytest.raises(UsageError, match=r"'.*file' is a file, and a folder is needed"):
        check_output_file(tmp_path / "file" / "x.json")
    with pytest.raises(UsageError, match="nothing can be written in '/proc/1': "):
        check_output_folder(Path("/proc/1"))


def test_commands_that_start_together_check_and_make_the_same_folder(tmp_path):
    def check_and_make(attempt: int) -> None:
        folder = tmp_path / str(attempt // 4) / "results"
        check_output_folder(folder)
        make_folder(folder)

    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(check_and_make, range(400)))) == 400
    assert [path for path in tmp_path.rglob("*") if path.name.startswith(".")] == []
    with pytest.raises(UsageError, match=rf"nothing can be written in '{tmp_path}/{'n' * 300}': File name too long"):
        check_output_folder(tmp_path / ("n" * 300))


def test_a_folder_belongs_to_one_command_at_a_time_and_goes_if_it_is_empty(tmp_path):
    folder = tmp_path / "new" / "results"
    with lock_folder(folder):
        with pytest.raises(UsageError, match="another command is at work in"), lock_folder(folder):
            pass
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "link").symlink_to(folder)
    with lock_folder(tmp_path / "link"):
        (folder / "x").touch()
    # As a kill leaves them.
    (folder / f".x.{16 * 'a'}.tmp").touch()
    (folder / LOCK).touch()
    with lock_folder(folder):
        pass
    assert [path.name for path in folder.iterdir()] == ["x"]


def test_a_folder_that_cannot_be_locked_is_used_with_a_word(tmp_path, monkeypatch, capsys):
    """Some network file systems have no locks."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock_folder(tmp_path / "results"):
        (tmp_path / "results" / "x").touch()
    assert "cannot be locked" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["x"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
def test_files_follow_the_umask_whatever_writes_them(tmp_path, mask):
    """safetensors writes for the owner alone."""
    before = os.umask(mask)
    try:
        tensors = {"x": torch.ones(2)}
        replace_file(tmp_path / "a.safetensors", lambda path: save_file(tensors, path))
        replace_files(tmp_path / "folder", lambda path: save_file(tensors, path / "b.safetensors"), "b.safetensors")
        write_json(tmp_path / "c.json", {})
    finally:
        os.umask(before)
    for name in ("a.safetensors", "folder/b.safetensors", "c.json"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~mask, name


def test_digests_are_of_contents(tmp_path):
    (tmp_path / "x").write_bytes(bytes(5 << 20))
    assert file_digest(tmp_path / "x") == hashlib.sha256(bytes(5 << 20)).hexdigest()
    weights = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    assert weights_digest(weights) == weights_digest(dict(reversed(weights.items())))
    others = [{"a": weights["a"], "c": weights["b"]}, weights | {"b": torch.ones(4)}, weights | {"a": torch.zeros(3)}]
    assert len({weights_digest(one) for one in (weights, *others)}) == 4


def test_the_reason_of_an_error_is_a_line(tmp_path):
    assert first_line(ValueError("\n  one.\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
    (tmp_path / "model").mkdir()
    failed = OSError("no file\nmore")
    assert why_not_loaded(str(tmp_path / "model"), failed) == "no file."
    assert why_not_loaded(str(tmp_path / "modle"), failed).startswith("there is no such folder. Did you mean")
    assert why_not_loaded("someone/something", failed) == "there is no such folder, and the Hub gave none (no file)."
    # What libraries say offline is no word for people.
    assert why_not_loaded("a/b", UsageError("its weights lack x.")) == "its weights lack x."
    assert "is named NAMESPACE/NAME, without an address" in why_not_loaded("https://huggingface.co/a/b", failed)
    offline = why_not_loaded("a/b", OSError("a/b does not appear to have a file named model_index.json."))
    assert "model_index" not in offline
    assert "the Hub out of reach: HF_HUB_OFFLINE is set" in offline
